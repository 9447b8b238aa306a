r"""Learning to Invert: a network that maps defended updates straight to the images behind them.

Wu, Chen, Guo and Weinberger, "Learning To Invert: Simple Adaptive Attacks for Gradient Inversion in
Federated Learning", UAI 2023. FedSGD; FedAVG alike, since only the client's work is imitated.

The adversary plays the client on public images, at the received state, under the client's
protocol and defenses (``view.rehearse``), and so holds pairs of an upload and its images. On them
it fits a perceptron with two hidden layers and sigmoid outputs,

.. math:: \min_\theta \; \mathbb{E} \; \min_{\pi} \frac1N \sum_{i=1}^N \frac1d
          \bigl\lVert f_\theta\bigl(H\, u(x_{1..N})\bigr)_{\pi(i)} - x_i \bigr\rVert^2 ,

where u is what the client would send for its images, defense included, H adds the entries of
large updates up in random bins, and the permutation pi (found by the Hungarian method) says that
an update has no order. Whatever a defense does to an upload, the training data went through it
too: that makes this the adaptive baseline of a defense. It differentiates through nothing, needs no
mirror of the defense, and answers a victim with one forward pass.

One lesson belongs to one state, protocol, defense and batch size; it is cached under them, and so
are the imitated clients, whatever is learned from them.

Measured (study ``lti``, beside a rehearsed [3] and searches with a generative prior): on a small
fresh network it is ahead of [3] where updates are pruned or truncated and level with it elsewhere;
GIAS is far ahead of both wherever an update keeps most of its entries' values. On a trained ConvNet
it stays near the nearest public image, ahead of GGL and clearly behind [3] and GIAS, except
under signs, where it leads all three. A rehearsal of its own gained nothing.

Departures:
    * Released code draws the defense's noise and the composition of batches anew in every epoch,
      for updates whose client takes one plain step. Here ``clients`` are imitated once, whatever
      they compute, and the epochs go over those.
    * It keeps the epoch of smallest loss *on the victims' test set*. Here a tenth of the imitated
      clients is held out and chooses; its PSNR is in the notes (``held_out_psnr``) and is what the
      adversary may expect.
    * The paper feeds entries as they are, which suits networks whose gradients are of order one.
      :meth:`LTI.tuned` standardises every entry over the imitated clients, has fewer hidden units
      and trains at a larger step size for fewer epochs; chosen on surrogate images.
    * Labels are not an input; public images keep their own where they are of the model's classes,
      and else get labels that the model draws.

Released code: ``wrh14/Learning_to_Invert``, ``main_learn_dlg.py`` and
``main_learn_dlg_large_model.py``. The inversion of text is left out.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Literal, Self

import numpy as np
import torch
from torch import Tensor, nn

from leakatlas import models
from leakatlas.attacks.api import (
    Attack,
    Outlook,
    Reconstruction,
    attack,
    learned,
    nothing_found,
)  # fmt: skip
from leakatlas.blocks.watch import Watch
from leakatlas.fl import View, stream
from leakatlas.params import Positive, PositiveInt
from leakatlas.threat import Knowledge

HELD_OUT = 0.1
"""Share of the imitated clients that chooses the epoch."""

FALL = 0.75
"""Share of the training after which the step size falls tenfold."""

IMITATION = 0.4
"""Share of a time budget for imitating clients; the rest is for learning from them."""


@attack(
    "lti",
    needs=Knowledge.UPDATES | Knowledge.BASIC | Knowledge.TRAINING | Knowledge.SURROGATE,
)
@dataclass(frozen=True, kw_only=True)
class LTI(Attack):
    """Imitated clients, a perceptron that inverts their updates, one forward pass.

    Args:
        epochs: Passes over the imitated clients (200 for one CIFAR-10 image and LeNet, 40 for
            ResNet-20; 5,000 for batches of four, whose clients are composed anew).
        hidden: Units of each hidden layer (3,000; 10,000 for batches of four on LeNet).
        lr: Adam's step size; a tenth of it in the last quarter.
        batch_size: Imitated clients a step.
        clients: How many are imitated; one for each public image if None.
        bins: Updates with more entries are hashed into so many bins; never if None.
        scaling: Entries as they are (``none``), or standardised over the imitated clients
            (``entry``).
    """

    counts = ("epochs",)
    fewest = 5
    draws_on_prior = True

    epochs: PositiveInt = 200
    hidden: PositiveInt = 3_000
    lr: Positive = 1e-4
    batch_size: PositiveInt = 256
    clients: PositiveInt | None = None
    bins: PositiveInt | None = 20_000
    scaling: Literal["none", "entry"] = "none"

    @classmethod
    def tuned(cls) -> Self:
        """Our setting for minutes on a CPU and gradients of any size."""
        return cls(epochs=60, hidden=512, lr=5e-4, batch_size=64, bins=8_192, scaling="entry")

    @classmethod
    def variants(cls) -> Mapping[str, Self]:
        """What an update may need: its entries as they are, coarser bins, more units.

        The published setting is none of them: a lesson of it takes the better part of an hour on a
        CPU, and there would be one for every variant.
        """
        tuned = cls.tuned()
        return {
            "tuned": tuned,
            "entries as they are": replace(tuned, scaling="none"),
            "coarse bins": replace(tuned, bins=2_048),
            "wide": replace(tuned, hidden=1_024),
        }

    def outlook(self, view: View) -> Outlook:
        """Whether there is something to learn from, and of the right shape."""
        if not view.has("surrogate"):
            return Outlook("hopeless", "it learns from surrogate images, and there are none")
        M, shape = len(view.surrogate.images), view.surrogate.shape
        if shape != tuple(view.input_shape):
            return Outlook(
                "hopeless", f"public images are {shape}, the client's {tuple(view.input_shape)}"
            )
        return Outlook(
            "unknown",
            f"as good as {self.clients or M} imitated clients teach, from {M} public images",
        )

    def run(self, view: View, *, generator: torch.Generator, watch: Watch) -> Reconstruction:
        """Learn once for this state and defense; then one forward pass."""
        del generator  # nothing is random but the lesson, which has a seed of its own
        if not any(bool(tensor.any()) for tensor in view.update.tensors.values()):
            return nothing_found(view.input_shape, "the update is zero; there is nothing to invert")
        lesson = self.learned_once(
            [view.circumstances(), view.surrogate.fingerprint()],
            lambda draws, budget: self.lesson(view, generator=draws, watch=budget),
            watch=watch,
            device=next(iter(view.update.tensors.values())).device,
        )
        inverter = Inverter.of(lesson)
        u = hashed(flat(view, view.update.tensors), self.bins).to(inverter.mean.device)
        with torch.no_grad():
            pixels = inverter(u.unsqueeze(0))[0]
        like = next(iter(view.update.tensors.values()))
        images = view.box.normalize(pixels.to(like).reshape(view.batch_shape))
        psnr = float(lesson["held_out_psnr"])
        return Reconstruction(
            images=view.box.clip(images),
            confidence=torch.full((len(images),), psnr, dtype=torch.float64),
            notes={
                "held_out_psnr": psnr,
                "imitated_clients": float(lesson["imitated_clients"]),
                "epoch": float(lesson["epoch"]),
            },
        )

    # -- the lesson ------------------------------------------------------------------------------

    def lesson(self, view: View, *, generator: torch.Generator, watch: Watch) -> dict[str, Tensor]:
        """Imitate clients and fit the inverter to what they send.

        Args:
            view: Whose client is imitated.
            generator: Of the order of training.
            watch: Budget and progress.

        Returns:
            ``network/<name>`` state of the inverter at its best epoch and ``shape`` of what it
            gives; ``held_out_psnr``, ``epoch`` and ``imitated_clients``.
        """
        parts = watch.share((IMITATION, 1 - IMITATION))
        pairs = learned(
            "imitated-clients",
            [view.circumstances(), view.surrogate.fingerprint(), self.clients, self.bins],
            lambda draws, budget: self.imitated(view, generator=draws, watch=budget),
            watch=next(parts),
            device=next(iter(view.update.tensors.values())).device,
        )
        left = next(parts, watch)  # out of time: a single step
        return self.fit(pairs["uploads"], pairs["images"], generator=generator, watch=left)

    def fit(
        self, u: Tensor, x: Tensor, *, generator: torch.Generator, watch: Watch
    ) -> dict[str, Tensor]:
        """The inverter of pairs, at the epoch that is best on those held out.

        Args:
            u: ``(P, F)`` uploads.
            x: ``(P, N, D)`` pixels in [0, 1]; the first tenth of the pairs is held out.
            generator: Of the order of training; weights come from the global one.
            watch: Budget and progress.

        Returns:
            As :meth:`lesson`.
        """
        mean, scale = self.standard(u)
        inverter = Inverter(u.shape[1], self.hidden, x.shape[1:], mean=mean, scale=scale)
        inverter.to(u.device)
        held = max(1, int(HELD_OUT * len(u))) if len(u) > 1 else 0
        seen, unseen = slice(held, None), slice(0, held or None)
        optimizer = torch.optim.Adam(inverter.parameters(), lr=self.lr)
        batches = _batches(len(u) - held, self.batch_size, generator)
        per_epoch = -(-(len(u) - held) // self.batch_size)
        best = _Best(inverter)
        for step in watch.steps(self.epochs * per_epoch):
            for group in optimizer.param_groups:
                group["lr"] = self.lr * (1.0 if step.progress < FALL else 0.1)
            chosen = next(batches)
            optimizer.zero_grad(set_to_none=True)
            loss = unordered_mse(inverter(u[seen][chosen]), x[seen][chosen]).mean()
            torch.autograd.backward(loss)
            optimizer.step()
            if (step.index + 1) % per_epoch == 0:
                best.judge(u[unseen], x[unseen], (step.index + 1) // per_epoch)
                watch.note = f"held-out error {best.error:.4f}"
        if not best.state:  # out of time within the first epoch
            best.judge(u[unseen], x[unseen], 0)
        psnr = -10 * torch.tensor(max(best.error, 1e-12), dtype=torch.float64).log10()
        return {
            **{f"network/{name}": tensor for name, tensor in best.state.items()},
            "shape": torch.tensor(x.shape[1:]),
            "held_out_psnr": psnr,
            "epoch": torch.tensor(best.epoch),
            "imitated_clients": torch.tensor(len(u)),
        }

    def imitated(
        self, view: View, *, generator: torch.Generator, watch: Watch
    ) -> dict[str, Tensor]:
        """``uploads`` ``(P, F)`` of imitated clients, their ``images`` ``(P, N, CHW)`` in [0, 1].

        Every public image is used before one is used again.
        """
        N, public = view.num_examples, view.surrogate.images
        y = public_labels(view, generator)
        like = next(iter(view.update.tensors.values()))
        protocol, defenses = view.protocol, view.defenses  # what an imitation rests on is read
        del protocol, defenses
        inputs = view.box.normalize(public.to(like))
        uploads: list[Tensor] = []
        images: list[Tensor] = []
        deck = torch.empty(0, dtype=torch.int64)
        for _ in watch.steps(self.clients or len(public)):
            while len(deck) < N:
                deck = torch.cat([deck, torch.randperm(len(public), generator=generator)])
            chosen, deck = deck[:N], deck[N:]
            seed = int(torch.randint(2**31, (1,), generator=generator))
            own = view.rehearse(inputs[chosen], y[chosen].to(like.device), seed=seed)
            uploads.append(hashed(flat(own, own.update.tensors), self.bins))
            images.append(public[chosen].flatten(1).float())
        pairs = {"uploads": torch.stack(uploads), "images": torch.stack(images)}
        return {name: tensor.to(like.device) for name, tensor in pairs.items()}

    def standard(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """What is subtracted from every entry, and what divides it."""
        if self.scaling == "none":
            return u.new_zeros(u.shape[1]), u.new_ones(u.shape[1])
        spread = u.std(0, correction=0)
        # An entry that the defense never sends, or that never moves, says nothing.
        return u.mean(0), torch.where(spread > 0, spread, torch.ones_like(spread))


class Inverter(nn.Module):
    """``(P, F)`` uploads to ``(P, N, D)`` pixels in [0, 1]: two hidden layers, ReLU, sigmoid.

    Args:
        features: Entries F of a (hashed) upload.
        hidden: Units of a hidden layer.
        shape: ``(N, D)``.
        mean: ``(F,)`` subtracted first.
        scale: ``(F,)`` divides then.
    """

    mean: Tensor
    scale: Tensor

    def __init__(
        self, features: int, hidden: int, shape: tuple[int, ...], *, mean: Tensor, scale: Tensor
    ) -> None:
        super().__init__()
        self.shape = tuple(shape)
        self.register_buffer("mean", mean)
        self.register_buffer("scale", scale)
        self.body = nn.Sequential(
            nn.Linear(features, hidden), nn.ReLU(),
            nn.Linear(hidden, hidden), nn.ReLU(),
            nn.Linear(hidden, self.shape[0] * self.shape[1]), nn.Sigmoid(),
        )  # fmt: skip

    def forward(self, u: Tensor) -> Tensor:
        """Pixels of uploads."""
        pixels: Tensor = self.body((u - self.mean) / self.scale)
        return pixels.reshape(len(u), *self.shape)

    @classmethod
    def of(cls, learned: Mapping[str, Tensor]) -> Inverter:
        """The network of a :meth:`LTI.lesson`."""
        weights = {
            n.removeprefix("network/"): t for n, t in learned.items() if n.startswith("network/")
        }
        hidden, features = weights["body.0.weight"].shape
        shape = tuple(int(n) for n in learned["shape"])
        made = cls(features, hidden, shape, mean=weights["mean"], scale=weights["scale"])
        models.apply_state(made, weights, source="the learned inverter")
        return made.eval().to(weights["mean"].device)


class _Best:
    """The state of smallest error on pairs that were held out."""

    def __init__(self, inverter: Inverter) -> None:
        self.inverter = inverter
        self.error, self.epoch = math.inf, 0
        self.state: dict[str, Tensor] = {}

    @torch.no_grad()
    def judge(self, u: Tensor, x: Tensor, epoch: int) -> None:
        error = float(unordered_mse(self.inverter(u), x).mean())
        if error < self.error or not self.state:
            self.error, self.epoch = error, epoch
            self.state = {n: t.detach().clone() for n, t in self.inverter.state_dict().items()}


# -- what it reads and what it is scored by ------------------------------------------------------


def flat(view: View, tensors: Mapping[str, Tensor]) -> Tensor:
    """An update as one float32 vector ``(P,)``; of weights, what changed."""
    held = view.rounds[-1].state if view.update.kind == "weights" else {}
    return torch.cat(
        [(t - held[n] if n in held else t).detach().flatten().float().cpu()
         for n, t in tensors.items()]
    )  # fmt: skip


def hashed(u: Tensor, bins: int | None) -> Tensor:
    """``u`` ``(P,)`` with its entries added up in random bins ``(F,)``, if it has more of them.

    The bins are the same for every update of a length.
    """
    if bins is None or len(u) <= bins:
        return u
    where = torch.randint(bins, (len(u),), generator=stream("lti", "bins", len(u), bins))
    return u.new_zeros(bins).index_add_(0, where, u)


def unordered_mse(found: Tensor, wanted: Tensor) -> Tensor:
    """Mean squared error ``(P,)`` of sets of images, each under its best assignment.

    Args:
        found: ``(P, N, D)``.
        wanted: ``(P, N, D)``.
    """
    if found.shape[1] == 1:
        return (found - wanted).square().mean((1, 2))
    from scipy.optimize import linear_sum_assignment  # half a second to import

    cost = torch.cdist(found.detach(), wanted).square().cpu().numpy()
    order = torch.tensor(np.array([linear_sum_assignment(c)[1] for c in cost]))
    matched = wanted.gather(1, order.to(wanted.device).unsqueeze(2).expand_as(wanted))
    return (found - matched).square().mean((1, 2))


def public_labels(view: View, generator: torch.Generator) -> Tensor:
    """Labels ``(M,)`` of the public images: their own, or such as the model would draw."""
    public = view.surrogate
    if public.labels.dim() == 1 and len(public.classes) == view.classes:
        return public.labels
    model = view.model.eval()
    like = next(model.parameters())
    with torch.no_grad():
        beliefs = torch.cat(
            [model(view.box.normalize(x.to(like))).softmax(1) for x in public.images.split(64)]
        )
    return torch.multinomial(beliefs.double().cpu(), 1, generator=generator)[:, 0]


def _batches(count: int, size: int, generator: torch.Generator) -> Iterator[Tensor]:
    while True:
        yield from torch.randperm(count, generator=generator).split(size)
