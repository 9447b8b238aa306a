r"""HCGLA: match a sparse gradient where it holds something, from a generated start, with a filter.

Yang, Ge, Xiao, Wu, Chen, Li and Wang, "Using Highly Compressed Gradients in Federated Learning for
Data Reconstruction Attacks", IEEE TIFS 2023.   FedSGD, top-k sparsified.

With M the entries that the upload visibly holds, the image is sought by L-BFGS on

.. math:: \sum_l \lVert M_l \odot \nabla_{\theta_l} \mathcal L(x, y) - g_l \rVert^2 ,

which is zero at the truth however few entries survive; without the mask every withheld entry would
pull the candidate's to zero. Two learned parts help where little is left to match:

1. *Start.* A small deconvolution network maps the row of the head's gradient that belongs to an
   example's label to an image. It learns on public images, whose uploads the adversary makes
   itself, through the same channel (:meth:`leakatlas.fl.View.rehearse`).
2. *Filter.* After every few outer iterations the candidate is rounded to 8 bits and passed through
   a denoiser, and L-BFGS begins anew. The denoiser learns on the adversary's own unfinished
   inversions, of which those near their image are kept.

Measured (studies ``hcgla`` and ``channels``): of one image, the generated start carries nearly all
of it, and puts it ahead of a rehearsed [3] that mirrors the channel, at one and at ten percent; the
mask helps where entries are withheld, and there alone; the filter changes nothing. From noise, on
batches, [3] reaches more under every channel.

Departures:
    - The released single-image script feeds the *private image* to a network of its own and starts
      from what the generator makes of that network's whole gradient; the batch script uses the
      observed rows, as here.
    - Labels, where none are granted: the least row sum of the head's gradient (one image), or
      counts by E2EGI's rule, since row sums survive sparsification; the batch script is given them.
    - Rows are standardised, entry by entry, over public images. The generator's inner width and
      its lesson are smaller than published, and it ends by pooling to the model's side.
    - The denoiser has five layers in place of 17 or 48, and is ROG's of this project.
    - The distance is relative to the update's; see DLG for its unit and L-BFGS' tolerances.
    - ``tensors="head"`` matches the head's weight alone, as the release does on ResNet-18.
    - Dead units of a network are zeros as well, and are masked with what was withheld.
    - Of the iterates after the last filtering the one of least distance is returned.
    - :meth:`HCGLA.tuned`: a line search, and lengths that fit minutes; tuned on no image.

Published PSNR values are 48.13 dB too high (a peak of 255 for images in [0, 1]).

Released code: ``SuperX612/HCGLA``, ``Reconstruct_minibatch.py``, ``Reconstruct_batchsize1.py``,
``models.py``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, Self

import torch
from torch import Tensor, nn

from leakatlas.attacks.api import Attack, Outlook, Reconstruction, attack, nothing_found
from leakatlas.attacks.optimization.augmented.hcgla._generator import (
    RowGenerator,
    find_head,
    fit,
    part,
    rows,
)  # fmt: skip
from leakatlas.blocks import denoiser, descent, init, labels, matching, observed
from leakatlas.blocks.denoiser import Denoiser
from leakatlas.blocks.watch import Watch
from leakatlas.fl import View
from leakatlas.fl.losses import PLAIN
from leakatlas.models.structure import example_input
from leakatlas.params import NonNegativeInt, Positive, PositiveInt
from leakatlas.threat import Knowledge

UNIT = 1e-12
"""The distance is minimised in units of this, as DLG's."""

NEAR = 0.1
"""Mean squared error in [0, 1] below which an inversion of the adversary's own teaches."""

LESSONS = 0.6
"""Share of a time budget for generator and denoiser, where there is one to be learned."""


@attack("hcgla", needs=Knowledge.UPDATES | Knowledge.BASIC | Knowledge.SURROGATE)
@dataclass(frozen=True, kw_only=True)
class HCGLA(Attack):
    """Masked matching by L-BFGS, a generated start, and a denoiser between its stretches.

    Args:
        steps: Outer iterations of L-BFGS.
        inner: L-BFGS iterations within each.
        lr: Step size; 0.01 for batches.
        line_search: Whether steps obey the strong Wolfe conditions.
        masked: Whether only what the upload holds is compared.
        tensors: All tensors, or the head's weight (ResNet-18).
        start: A generated image, noise, or grey.
        filter_every: Outer iterations between two filterings; 0 for none, as for batches.
        lessons: Uploads that the adversary makes for the generator.
        generator_epochs: Passes over them.
        generator_lr: Adam's step size on it.
        generator_width: Channels of the generator's last inner layer; 64 in the release.
        pairs: Inversions that the denoiser learns from.
        epochs: Passes over them.
        width: Channels of the denoiser.
        labels: Labels that were read from this update beforehand, where none are granted; the
            rules above if empty.
    """

    replays: ClassVar[bool] = True
    draws_on_prior: ClassVar[bool] = True
    fewest: ClassVar[int] = 4  # each evaluates some twenty times
    learned_by: ClassVar[tuple[str, ...] | None] = (
        "inner", "lr", "line_search", "masked", "tensors", "start", "filter_every", "lessons",
        "generator_epochs", "generator_lr", "generator_width", "pairs", "epochs", "width",
    )  # fmt: skip

    steps: PositiveInt = 42
    inner: PositiveInt = 20
    lr: Positive = 0.1
    line_search: bool = False
    masked: bool = True
    tensors: Literal["all", "head"] = "all"
    start: Literal["generator", "noise", "grey"] = "generator"
    filter_every: NonNegativeInt = 5
    lessons: PositiveInt = 2_000
    generator_epochs: PositiveInt = 100
    generator_lr: Positive = 1e-3
    generator_width: PositiveInt = 64
    pairs: PositiveInt = 256
    epochs: PositiveInt = 40
    width: PositiveInt = 32
    labels: tuple[NonNegativeInt, ...] = ()

    @classmethod
    def tuned(cls) -> Self:
        """Our setting for small images and minutes on a CPU."""
        return cls(
            steps=15, line_search=True, lr=1.0, lessons=512, generator_epochs=30,
            generator_lr=3e-3, generator_width=16, pairs=32, epochs=30, width=16,
        )  # fmt: skip

    @classmethod
    def variants(cls) -> Mapping[str, Self]:
        """Ours, without the filter, and the published settings of one image and of batches."""
        tuned = cls.tuned()
        return {
            "tuned": tuned,
            "no filter": replace(tuned, filter_every=0),
            "published": cls(),
            "published, batches": cls(lr=0.01, filter_every=0),
        }

    def knowledge(self) -> Knowledge:
        """Public images teach generator and denoiser; the box is theirs, too."""
        learned = self.start == "generator" or self.filter_every > 0
        public = Knowledge.SURROGATE if learned else Knowledge(0)
        boxed = Knowledge.BASIC if learned or self.start == "grey" else Knowledge(0)
        return Knowledge.UPDATES | boxed | public

    def outlook(self, view: View) -> Outlook:
        """How much of the update is there to be matched."""
        if self.knowledge() & Knowledge.SURROGATE and view.has("surrogate"):
            public, own = view.surrogate.shape, tuple(view.input_shape)
            if public != own:
                return Outlook("hopeless", f"public images are {public}, the client's {own}")
        if not view.rounds:
            return Outlook("unknown", "it compares what a sparse update holds")
        held = sum(int((t != 0).sum()) for t in view.update.tensors.values())
        n = sum(t.numel() for t in view.update.tensors.values())
        pixels = view.num_examples * example_input(view.model, view.input_shape)[0].numel()
        return Outlook(
            "unknown", f"the update holds {held:,} of {n:,} entries, for {pixels:,} unknown pixels"
        )

    def run(self, view: View, *, generator: torch.Generator, watch: Watch) -> Reconstruction:
        """The two networks (learned once), labels, the start, stretches of L-BFGS."""
        g = view.update.tensors
        if not any(bool(tensor.any()) for tensor in g.values()):
            return nothing_found(view.input_shape, "the update is zero; there is nothing to match")
        learned, left = self.learned(view, watch)
        y = self.read_labels(view)
        like = next(iter(g.values()))
        x = self.first(view, y, learned, generator, like)
        clean = Denoiser.of(part(learned, "denoiser")).to(like) if self.filter_every else None
        found = self.search(view, x, y, left, clean=clean)
        loss = float(found.criterion)
        return Reconstruction(
            images=found.best["x"],
            labels=y,
            confidence=torch.full((len(y),), -loss, dtype=torch.float64),
            notes={
                "relative_distance": loss,
                "entries": float(sum(int((t != 0).sum()) for t in g.values())),
                "labels_granted": float(view.has("labels")),
            },
        ).or_failed(found.trouble)

    def search(
        self, view: View, x: Tensor, y: Tensor, watch: Watch, *, clean: nn.Module | None
    ) -> descent.Descended:
        """Stretches of L-BFGS from ``x``, filtered in between; the last of them."""
        lengths = stretches(self.steps, self.filter_every)
        objective = self.objective(view, y)
        found: descent.Descended | None = None
        for steps, budget in zip(lengths, watch.share([float(n) for n in lengths]), strict=False):
            if found is not None and clean is not None:
                x = self.filtered(view, found.best["x"], clean)
            found = descent.descend(
                objective,
                {"x": x},
                optimizer=descent.lbfgs(self.lr, inner=self.inner, line_search=self.line_search),
                steps=steps,
                watch=budget,
            )
            if found.trouble:
                break
        assert found is not None  # there is a first stretch, whatever the budget
        return found

    def objective(self, view: View, y: Tensor) -> descent.Objective:
        """The masked distance, in its unit."""
        held = dict(view.update.tensors)
        if self.tensors == "head":
            name = find_head(view).weight_name
            held = {name: held[name]}
        distance: matching.Distance = matching.relative_l2
        if self.masked:
            distance = matching.masked(distance, {n: t != 0 for n, t in held.items()})
        replay = view.replayer(adaptive=False)

        def objective(variables: descent.Variables, t: Tensor) -> descent.Value:
            del t
            D = distance(replay(variables["x"], y), held)
            return descent.Value(D / UNIT, D)

        return objective

    def filtered(self, view: View, x: Tensor, clean: nn.Module) -> Tensor:
        """Candidates, rounded to 8 bits and denoised."""
        pixels = (view.box.denormalize(x).clamp(0, 1) * 255).round() / 255
        with torch.no_grad():
            return view.box.normalize(clean(pixels).clamp(0, 1))

    def read_labels(self, view: View) -> Tensor:
        """Granted labels, else by the rules of the module docstring, ``(N,)``."""
        if view.has("labels") or self.labels or view.loss != PLAIN:
            return observed.known_labels(view, self.labels)
        g, head = observed.mean_gradient(view), find_head(view)
        if view.num_examples == 1:
            return labels.idlg(g, head, rule="sum")
        return labels.labels_from_counts(labels.e2egi(head.weight_grad(g), view.num_examples))

    def first(
        self,
        view: View,
        y: Tensor,
        learned: Mapping[str, Tensor],
        generator: torch.Generator,
        like: Tensor,
    ) -> Tensor:
        """Where the search starts, ``(N, C, H, W)``."""
        if self.start == "noise":
            return init.normal(view.batch_shape, generator=generator, like=like)
        if self.start == "grey":
            return init.grey(view.batch_shape, like=like, box=view.box)
        network = RowGenerator.of(part(learned, "generator"), view.input_shape).to(like)
        with torch.no_grad():
            r = (rows(view, y) - learned["mean"].to(like)) / learned["size"].to(like)
            return view.box.normalize(network(r))

    # -- the lessons -----------------------------------------------------------------------------

    def learned(self, view: View, watch: Watch) -> tuple[Mapping[str, Tensor], Watch]:
        """What both networks learned for this state and channel, and the watch that is left."""
        if self.start != "generator" and not self.filter_every:
            return {}, watch
        parts = watch.share((LESSONS, 1 - LESSONS))
        found = self.learned_once(
            [view.circumstances(), view.surrogate.fingerprint()],
            lambda draws, budget: self.lesson(view, generator=draws, watch=budget),
            watch=next(parts),
        )
        return found, next(parts, watch)

    def lesson(self, view: View, *, generator: torch.Generator, watch: Watch) -> dict[str, Tensor]:
        """``generator/...`` with ``mean`` and ``size`` of a row's entries, and ``denoiser/...``."""
        found: dict[str, Tensor] = {}
        parts = watch.share((0.5, 0.5))
        if self.start == "generator":
            found |= self.teach_generator(view, generator, next(parts))
        if self.filter_every:
            found |= self.teach_denoiser(view, found, generator, next(parts, watch))
        return found

    def teach_generator(
        self, view: View, generator: torch.Generator, watch: Watch
    ) -> dict[str, Tensor]:
        """Pairs of a row and its image, and the generator that they teach."""
        parts = watch.share((0.5, 0.5))
        made, originals = [], []
        for own, x, y in self.own_uploads(view, self.lessons, generator, next(parts)):
            made.append(rows(own, y))
            originals.append(view.box.denormalize(x))
        r, u = torch.cat(made), torch.cat(originals)
        left = next(parts, watch)
        return fit(
            r, u, width=self.generator_width, lr=self.generator_lr, epochs=self.generator_epochs,
            generator=generator, watch=left,
        )  # fmt: skip

    def teach_denoiser(
        self,
        view: View,
        learned: Mapping[str, Tensor],
        generator: torch.Generator,
        watch: Watch,
    ) -> dict[str, Tensor]:
        """Unfinished inversions and their images, and the denoiser that they teach."""
        parts = watch.share((0.7, 0.3))
        inverting = next(parts)
        short = replace(self, steps=self.filter_every)
        damaged, originals = [], []
        for own, x, y in self.own_uploads(view, self.pairs, generator, inverting):
            start = self.first(own, y, learned, generator, x)
            reached = short.search(own, start, y, Watch(parent=inverting), clean=None).best["x"]
            pixels, truth = (view.box.denormalize(t).clamp(0, 1) for t in (reached, x))
            near = (pixels - truth).square().flatten(1).mean(1) < NEAR
            damaged.append(pixels[near])
            originals.append(truth[near])
        network = Denoiser(view.input_shape[0], self.width).to(damaged[0])
        bad, good = torch.cat(damaged), torch.cat(originals)
        if len(bad):  # else it stays the identity
            denoiser.fit(network, bad, good, epochs=self.epochs, generator=generator,
                         watch=next(parts, watch))  # fmt: skip
        return {f"denoiser/{n}": t.detach() for n, t in network.state_dict().items()}

    def own_uploads(
        self, view: View, images: int, generator: torch.Generator, watch: Watch
    ) -> Iterator[tuple[View, Tensor, Tensor]]:
        """The client, defenses included, played on public images, N at a time."""
        N, public = view.num_examples, view.surrogate
        like = next(iter(view.update.tensors.values()))
        for _ in watch.steps(-(-images // N)):
            places = torch.randint(len(public), (N,), generator=generator)
            x = view.box.normalize(public.images[places].to(like))
            y = public.labels[places].to(like.device) % view.classes
            seed = int(torch.randint(2**31, (1,), generator=generator))
            yield view.rehearse(x, y, seed=seed), x, y


def stretches(steps: int, every: int) -> list[int]:
    """Outer iterations between two filterings; they sum to ``steps``."""
    if not every:
        return [steps]
    whole, rest = divmod(steps, every)
    return [every] * whole + ([rest] if rest else [])
