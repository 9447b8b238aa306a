r"""GRNN: an untrained generator whose weights are fitted until its pictures give the update.

Ren, Deng and Xie, "GRNN: Generative Regression Neural Network - A Data Leakage Attack for Federated
Learning", ACM TIST 2022. FedSGD; FedAVG by replaying the local steps.

A fixed random input v goes through two branches of one network, of which one ends in labels and
the other in images; all weights are fitted at once:

.. math:: \hat y = \mathrm{softmax}(A v + a), \qquad \hat x = G_w(v), \qquad
          \min_{A, a, w} \; \lVert \Delta \rVert^2 + \lVert \Delta \rVert
          + \lambda \, \mathrm{TV}(\hat x), \quad
          \Delta = \nabla_\theta \mathcal L(\hat x, \hat y) - g,

with the cross-entropy against soft labels, and TV the squared differences of neighbours. Nothing is
learned beforehand: the architecture alone is the prior. The images of a batch share the weights and
the statistics of BN, so they are drawn together.

Measured (study ``generative``: one image, about as many CPU seconds as [3]): level with the
published [3] on fresh ConvNets, on photos outside the other rows' prior three decibels behind it,
and far behind a rehearsed one; behind both on trained ones, and at the mean image or below it on a
ResNet-18.

Departures:
    - The paper's second term is a Wasserstein distance; the released code computes it between two
      "samples" of one vector each, where it is the norm of the difference, and so do we.
      ``distance="sorted"`` is what the text suggests: the 1-D Wasserstein distance between the
      entries of both updates, tensor by tensor.
    - Released code means to start from N(0, 0.02) and, by an oversight, starts from PyTorch's
      default; that produced the results, and is the default here.
    - Its victims are sigmoid networks with weights from U(-.5, .5) on pixels of [0, 1]; ours are
      whatever the view holds, and pixels are normalised as the client does.
    - Sizes other than powers of two are drawn larger and averaged down.
    - The iterate of smallest distance is returned, not the last one; ``restarts`` are ours.

Released code: ``Rand2AI/GRNN``, ``GRNN.py`` and ``Generator/model.py``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Self

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from leakatlas.attacks.api import Attack, Outlook, Reconstruction, attack, nothing_found
from leakatlas.blocks import descent, init, latent, matching
from leakatlas.blocks.watch import Watch
from leakatlas.fl import View
from leakatlas.params import Fraction, NonNegative, Positive, PositiveInt
from leakatlas.threat import Knowledge

INPUT = 128
"""Length of v."""

WIDTH = 32
"""Feature maps at half the final resolution."""


@attack("grnn", needs=Knowledge.UPDATES | Knowledge.BASIC)
@dataclass(frozen=True, kw_only=True)
class GRNN(Attack):
    """RMSprop on the weights of a two-branched generator.

    Args:
        steps: Iterations (1,000).
        lr: Step size; with this momentum, larger ones diverge.
        momentum: Of RMSprop.
        tv_weight: Lambda: 1e-3 for LeNet, 1e-6 for ResNet-18.
        distance: ``norm`` adds the norm of the difference as released, ``sorted`` the distance
            between sorted entries as the text has it.
        learn_labels: Whether the label branch is fitted; if not, every label is uniform
            (an ablation).
        restarts: Independent networks; the one of smallest distance counts.
    """

    replays = True

    steps: PositiveInt = 1_000
    lr: Positive = 1e-4
    momentum: Fraction = 0.99
    tv_weight: NonNegative = 1e-3
    distance: Literal["norm", "sorted"] = "norm"
    learn_labels: bool = True
    restarts: PositiveInt = 1

    @classmethod
    def variants(cls) -> Mapping[str, Self]:
        """The settings for LeNet and for ResNet-18."""
        return {"tuned": cls(), "published": cls(), "weak smoothing": cls(tv_weight=1e-6)}

    def outlook(self, view: View) -> Outlook:
        """Whether it can draw what the client's model reads."""
        if len(view.input_shape) != 3:
            return Outlook("hopeless", f"it draws images, not inputs of {view.input_shape}")
        return Outlook(
            "unknown",
            f"{view.num_examples} images share one gradient; no prior but an architecture",
        )

    def run(self, view: View, *, generator: torch.Generator, watch: Watch) -> Reconstruction:
        """Fit both branches; the images and labels of the closest iterate."""
        g = dict(view.update.tensors)
        if not any(bool(tensor.any()) for tensor in g.values()):
            return nothing_found(view.input_shape, "the update is zero; nothing can be matched")
        like = next(iter(g.values()))
        N, K = view.num_examples, view.classes
        images, replay = latent.to_model_space(view.input_shape, view.box), view.replayer()
        best, loss, steps, trouble = None, math.inf, 0, ""
        for part in watch.share(self.restarts):
            seed = int(torch.randint(2**31, (1,), generator=generator))
            network = TwoBranches(view.input_shape, K, seed=seed).to(like)
            v = init.normal((N, INPUT), generator=generator, like=like)

            def objective(
                variables: descent.Variables, t: Tensor, network: nn.Module = network, v: Tensor = v
            ) -> descent.Value:
                del t
                pixels, y = functional_call(network, dict(variables), (v,))
                if not self.learn_labels:
                    y = torch.full_like(y, 1 / K)
                D = self.measure(replay(images(pixels), y), g)
                return descent.Value(D + self.tv_weight * tv(pixels), D)

            found = descent.descend(
                objective,
                {n: p.detach() for n, p in network.named_parameters()},
                optimizer=descent.rmsprop(self.lr, momentum=self.momentum),
                steps=self.steps,
                watch=part,
            )
            steps, trouble = steps + found.steps, found.trouble
            if float(found.criterion) < loss:
                with torch.no_grad():
                    best = functional_call(network, found.best, (v,))
                loss = float(found.criterion)
        if best is None:
            return nothing_found(view.input_shape, trouble)
        pixels, y = best
        return Reconstruction(
            images=view.box.clip(images(pixels)),
            labels=y.argmax(1),
            confidence=torch.full((N,), -loss, dtype=torch.float64),
            notes={
                "matching_loss": loss,
                "iterations": float(steps),
                "label_certainty": float(y.max(1).values.mean()),
            },
        )

    def measure(self, a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> Tensor:
        """The distance between two updates."""
        square = matching.squared_l2(a, b)
        if self.distance == "norm":
            return (
                square + (square + matching.ROOT_EPSILON).sqrt() - math.sqrt(matching.ROOT_EPSILON)
            )
        return square + torch.stack([sorted_distance(a[n], b[n]) for n in b]).sum()


def sorted_distance(a: Tensor, b: Tensor) -> Tensor:
    """2-Wasserstein distance between the entries of two tensors, each as a sample on a line."""
    return matching.norm(a.flatten().sort().values - b.flatten().sort().values)


def tv(pixels: Tensor) -> Tensor:
    """Squared differences of neighbours: twice the mean over images, per difference and channel."""
    across, down = (pixels.diff(dim=d).square() for d in (3, 2))
    terms = [d.sum() / d[0].numel() for d in (across, down) if d.numel()]
    return 2 * torch.stack(terms).sum() / len(pixels) if terms else pixels.sum() * 0


class TwoBranches(nn.Module):
    """``v`` ``(N, 128)`` to pixels ``(N, C, S, S)`` of [0, 1] and labels ``(N, K)``.

    S is the power of two, at least 8, that covers the wanted size.

    Args:
        shape: ``(C, H, W)``.
        classes: K.
        seed: Of the weights.
    """

    def __init__(self, shape: tuple[int, ...], classes: int, *, seed: int) -> None:
        super().__init__()
        doublings = max(0, math.ceil(math.log2(max(shape[1:]))) - 3)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            self.label = nn.Linear(INPUT, classes)
            self.root = nn.ConvTranspose2d(INPUT, 2 * WIDTH * 2**doublings, 4)
            sizes = [WIDTH * 2**n for n in reversed(range(doublings + 1))]
            outs = [*sizes[1:], shape[0]]
            self.blocks = nn.ModuleList(_upsample(a, b) for a, b in zip(sizes, outs, strict=True))

    def forward(self, v: Tensor) -> tuple[Tensor, Tensor]:
        """Pixels and soft labels."""
        h = F.glu(self.root(v[:, :, None, None]), dim=1)
        for block in self.blocks:
            h = F.glu(block(h), dim=1)
        return h.sigmoid(), self.label(v).softmax(1)


def _upsample(wide: int, out: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Upsample(scale_factor=2, mode="nearest"),
        nn.Conv2d(wide, 2 * out, 3, padding=1, bias=False),
        # The batch's own statistics, as in train mode; running ones would be a state.
        nn.BatchNorm2d(2 * out, track_running_stats=False),
    )
