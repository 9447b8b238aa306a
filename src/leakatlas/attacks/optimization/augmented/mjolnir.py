r"""Mjölnir: take the noise out of a protected gradient by diffusion, then invert what is left.

Liu, Wang, Wang, Xu and Wang, "Mjölnir: Breaking the Shield of Perturbation-Protected Gradients via
Adaptive Diffusion", AAAI 2025.   FedSGD, a stage in front of any inversion.

1. *Gradients of one's own.* Public images give clean gradients at the received state; flattened and
   padded with their mean to a square, they are images of one channel.
2. *Gradient diffusion.* A U-Net :math:`\epsilon_\phi(x, t)` learns the noise of diffused gradients
   (T = 1,000 linear steps, Huber loss).
3. *Adaptive denoising.* For noise of standard deviation M, :math:`\sqrt{\bar n}\,(g + M n)` with
   :math:`\bar n = 1 / (1 + M^2)` is exactly a diffused sample, since :math:`\sqrt{\bar n} M =
   \sqrt{1 - \bar n}`. The reverse chain starts at :math:`t^* = \min \{t : \bar\alpha_t < \bar n\}`
   and ends at a clean gradient.
4. *Inversion* by another attack; DLG in the paper.

Measured (study ``channels``): the denoiser helps under noise, and there alone; Wiener's formula
does as well as the learned network, and a rehearsed [3] without either reaches more.

Departures:
    - In the released reverse loop every step reads the noisy *input* and none the output of the
      one before, so that it returns one tiny step; here each reads the last.
    - M is measured: the adversary plays the client twice on one public batch under the declared
      defenses, and what differs is the noise. ``noise`` gives it by hand. Noise of any law enters
      by its standard deviation (the release takes the scale of a Laplace law for one).
    - ``standardised`` (ours) brings every gradient to unit size first, as diffusion presumes, and
      M with it; what clipping does to the size does not matter then.
    - ``denoiser="wiener"`` (ours) shrinks every entry towards its mean on public images by
      :math:`v / (v + M^2)`, the best that can be done entry by entry, without a network.
    - ``path`` (ours) may follow the chain's mean (DDIM) in place of drawing noise at each step, or
      take the mean of all clean gradients in a single step, which squared error prefers.
    - The U-Net is this project's, without linear attention; published width 120. That is for
      gradients of some ten thousand entries: one of millions is an image of thousands of pixels a
      side, and wants a ``width`` of some eight and a ``batch_size`` of 1.
    - The non-adaptive and conditional baselines of the paper are left out; ``start`` fixes t*.
    - Sparse updates, sums over clients and several local steps are denoised all the same, by
      gradients of the same kind.

Published PSNR of images is 48.13 dB too high (a peak of 255 for images in [0, 1]), and the noise of
the release is no differential privacy: it clips nothing.

Released code: ``XuanL17/Mjolnir``, ``Mjolnir_GradientDiffusion/main.py``,
``diffusionModels/simpleDiffusion/simpleDiffusion.py``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor
from torch.nn import functional as F

from leakatlas import models
from leakatlas.attacks.api import Attack, Outlook, Reconstruction, attack, nothing_found
from leakatlas.blocks.watch import Watch
from leakatlas.catalogue import registry
from leakatlas.fl import View
from leakatlas.models.denoiser import Denoiser
from leakatlas.params import NonNegative, Positive, PositiveInt
from leakatlas.priors.ddpm import noised
from leakatlas.priors.prior import linear_schedule
from leakatlas.threat import Knowledge

LESSONS = 0.6
"""Share of a time budget for the denoiser, where it is to be learned."""

Noise = Callable[[Tensor, int], Tensor]
"""``(x, t) -> noise``, t from 0."""

Path = Literal["drawn", "mean", "single"]


@attack(
    "mjolnir",
    needs=Knowledge.UPDATES | Knowledge.BASIC | Knowledge.TRAINING | Knowledge.SURROGATE,
)
@dataclass(frozen=True, kw_only=True)
class Mjolnir(Attack):
    """Gradient diffusion as a denoiser, and an inversion behind it.

    Args:
        steps: Iterations of the inversion; DLG's outer ones in the release.
        base: The inversion.
        preset: Its preset.
        denoiser: A learned diffusion, shrinkage of every entry, or nothing.
        noise: Standard deviation M of an entry's noise; measured if None.
        start: Step t* of the reverse chain; by M if None.
        standardised: Whether gradients are brought to unit size first.
        path: Of the reverse chain: draws at every step, its mean, or a single step.
        gradients: Clean gradients that the adversary makes.
        epochs: Passes over them.
        batch_size: Gradients a step.
        width: Feature maps of the U-Net's first resolution, doubled twice.
        lr: Its step size of Adam.
    """

    learned_by: ClassVar[tuple[str, ...] | None] = (
        "denoiser", "standardised", "gradients", "epochs", "batch_size", "width", "lr",
    )  # fmt: skip

    steps: PositiveInt = 20
    base: Literal["dlg", "idlg", "inverting_gradients"] = "dlg"
    preset: Literal["published", "tuned"] = "published"
    denoiser: Literal["diffusion", "wiener", "none"] = "diffusion"
    noise: NonNegative | None = None
    start: PositiveInt | None = None
    standardised: bool = False
    path: Path = "drawn"
    gradients: PositiveInt = 10_000
    epochs: PositiveInt = 20
    batch_size: PositiveInt = 8
    width: PositiveInt = 120
    lr: Positive = 1e-4

    @classmethod
    def tuned(cls) -> Self:
        """Our setting for minutes on a CPU and networks of some thousand parameters."""
        return cls(
            steps=400, base="inverting_gradients", preset="tuned", standardised=True,
            path="single", gradients=512, epochs=8, width=16, lr=2e-3,
        )  # fmt: skip

    @classmethod
    def variants(cls) -> Mapping[str, Self]:
        """Ours, with shrinkage in place of the network, with neither, and the published one."""
        tuned = cls.tuned()
        return {
            "tuned": tuned,
            "wiener": replace(tuned, denoiser="wiener"),
            "no denoiser": replace(tuned, denoiser="none"),
            "published": cls(),
        }

    def knowledge(self) -> Knowledge:
        """Images and protocol serve the denoiser; what the inversion needs comes on top."""
        own = Knowledge.TRAINING | Knowledge.SURROGATE if self.denoiser != "none" else Knowledge(0)
        boxed = Knowledge.BASIC if self.denoiser != "none" else Knowledge(0)
        return Knowledge.UPDATES | own | boxed | self.inversion().knowledge()

    def inversion(self) -> Attack:
        """The attack behind the denoiser, as long as ``steps``."""
        cls: type[Attack] = registry.load_attack(self.base)
        return (cls() if self.preset == "published" else cls.tuned()).lasting(self.steps)

    def outlook(self, view: View) -> Outlook:
        """Whether there is noise to be taken out, and something to learn from."""
        behind = self.inversion().outlook(view)
        if behind.verdict == "hopeless":
            return Outlook("hopeless", f"{self.base} behind the denoiser: {behind.reason}")
        if self.denoiser != "none" and view.has("surrogate"):
            public, own = view.surrogate.shape, tuple(view.input_shape)
            if public != own:
                return Outlook("hopeless", f"public images are {public}, the client's {own}")
        if view.has("defenses") and not view.defenses and self.noise is None:
            return Outlook("unknown", f"no defense adds noise; this is {self.base}, with a detour")
        return Outlook("unknown", f"as far as noise can be told from gradients, then {self.base}")

    def run(self, view: View, *, generator: torch.Generator, watch: Watch) -> Reconstruction:
        """The noise's size, the denoiser (learned once), the inversion."""
        g = dict(view.update.tensors)
        if not any(bool(tensor.any()) for tensor in g.values()):
            return nothing_found(view.input_shape, "the update is zero; there is nothing to match")
        left, clean, notes = watch, view, {}
        if self.denoiser != "none":
            M = self.noise_of(view) if self.noise is None else self.noise
            notes = {"noise": M, "signal_to_noise": rms(flat(g)) / M if M else math.inf}
            if M > 0:
                parts = watch.share((LESSONS, 1 - LESSONS))
                learned = self.learned_once(
                    [view.circumstances(), view.surrogate.fingerprint()],
                    lambda draws, budget: self.lesson(view, generator=draws, watch=budget),
                    watch=next(parts),
                )
                left = next(parts, watch)
                found = self.denoised(flat(g), M, learned, generator)
                notes |= {"moved": float((found - flat(g)).norm() / flat(g).norm())}
                clean = showing(view, unflat(found, g))
        behind = self.inversion()
        inverted = behind.run(clean, generator=generator, watch=left)
        finite = {n: v for n, v in (dict(inverted.notes) | notes).items() if math.isfinite(v)}
        return replace(inverted, notes=finite)

    # -- the noise -------------------------------------------------------------------------------

    def noise_of(self, view: View) -> float:
        """The noise's standard deviation, from two plays of the client on one public batch."""
        x, y = public_batch(view, torch.Generator().manual_seed(0))
        one, two = (flat(view.rehearse(x, y, seed=seed).update.tensors) for seed in (0, 1))
        return rms(one - two) / math.sqrt(2)

    def denoised(
        self, g: Tensor, M: float, learned: Mapping[str, Tensor], generator: torch.Generator
    ) -> Tensor:
        """Step 3: ``g`` ``(P,)`` without the noise of standard deviation ``M``."""
        size = signal_size(g, M) if self.standardised else 1.0
        x, m = g / size, M / size
        if self.denoiser == "wiener":
            return size * shrunk(x, m, learned["mean"].to(g), learned["variance"].to(g))
        network = network_of(learned).to(device=g.device)
        side = network.size
        share = 1 / (1 + m**2)
        kept = linear_schedule().to(g.device)
        t = self.start or first_step(share, kept)

        def predicted(x: Tensor, t: int) -> Tensor:
            times = torch.full((1,), t, device=x.device)
            noise: Tensor = network(x.float(), times)
            return noise.to(x)

        image = math.sqrt(share) * padded(x, side)[None, None]
        with torch.no_grad():
            end = reverse(image, predicted, t, kept, path=self.path, generator=generator)
        return size * end.flatten()[: len(g)]

    def lesson(self, view: View, *, generator: torch.Generator, watch: Watch) -> dict[str, Tensor]:
        """Steps 1 and 2: ``network/...``, or ``mean`` and ``variance`` of every entry."""
        parts = watch.share((0.3, 0.7))
        replay = view.replayer(adaptive=False)
        rows = []
        for _ in next(parts).steps(self.gradients):
            x, y = public_batch(view, generator)
            row = flat({n: t.detach() for n, t in replay(x, y).items()}).float()
            rows.append(row / rms(row) if self.standardised and rms(row) > 0 else row)
        data = torch.stack(rows)
        if self.denoiser == "wiener":
            return {"mean": data.mean(0), "variance": data.var(0, correction=0)}
        side = side_of(data.shape[1])
        widths = (self.width, 2 * self.width, 4 * self.width)
        # Seeded by the lesson, not by the network's own default.
        seed = int(torch.randint(2**31, (1,), generator=generator))
        network = Denoiser(channels=1, size=side, widths=widths, seed=seed).to(data.device)
        images = torch.stack([padded(row, side) for row in data])[:, None]
        engine = torch.optim.Adam(network.parameters(), lr=self.lr)
        kept = linear_schedule()
        budget = next(parts, watch)
        for step in budget.steps(self.epochs):
            for group in engine.param_groups:
                group["lr"] = self.lr * (1.0 if step.progress < 0.75 else 0.2)
            for places in torch.randperm(len(images), generator=generator).split(self.batch_size):
                t = torch.randint(len(kept), (len(places),), generator=generator)
                n = torch.randn((len(places), 1, side, side), generator=generator).to(images)
                diffused = noised(images[places], n, kept[t])
                loss = F.smooth_l1_loss(network(diffused, t.to(images.device)), n)
                engine.zero_grad()
                loss.backward()
                engine.step()
        state = {f"network/{name}": t.detach() for name, t in network.state_dict().items()}
        return {**state, "layout": torch.tensor([side, self.width])}


# -- the reverse chain -----------------------------------------------------------------------------


def first_step(share: float, kept: Tensor) -> int:
    r"""Step t* from 1, the first with :math:`\bar\alpha_t` below ``share``; T if there is none."""
    below = torch.nonzero(kept < share).flatten()
    return int(below[0]) + 1 if len(below) else len(kept)


def reverse(
    x: Tensor,
    predicted: Noise,
    steps: int,
    kept: Tensor,
    *,
    path: Path,
    generator: torch.Generator,
) -> Tensor:
    r"""The reverse chain from step ``steps`` to a clean sample.

    Args:
        x: ``(N, 1, S, S)``, as diffused by ``steps`` steps.
        predicted: The noise in a sample.
        steps: t*, from 1.
        kept: :math:`\bar\alpha_t`, float64 ``(T,)``.
        path: DDPM's draws, DDIM's mean path, or the mean of clean samples in one step.
        generator: Of the draws.
    """
    before = torch.cat([kept.new_ones(1), kept[:-1]])
    for t in reversed(range(steps)):
        noise = predicted(x, t)
        now, then = float(kept[t]), float(before[t])
        if path != "drawn":
            clean = (x - math.sqrt(1 - now) * noise) / math.sqrt(now)
            if path == "single":
                return clean
            x = math.sqrt(then) * clean + math.sqrt(1 - then) * noise
            continue
        alpha = now / then
        x = (x - (1 - alpha) / math.sqrt(1 - now) * noise) / math.sqrt(alpha)
        if t > 0:
            spread = math.sqrt((1 - alpha) * (1 - then) / (1 - now))
            drawn = torch.randn(x.shape, generator=generator, device=generator.device)
            x = x + spread * drawn.to(x)
    return x


def shrunk(x: Tensor, M: float, mean: Tensor, variance: Tensor) -> Tensor:
    """Every entry of ``x`` ``(P,)``, drawn towards its mean by ``v / (v + M^2)``."""
    return mean + variance / (variance + M**2) * (x - mean)


# -- gradients as images ---------------------------------------------------------------------------


def flat(g: Mapping[str, Tensor]) -> Tensor:
    """All tensors in a row ``(P,)``, in their order."""
    return torch.cat([t.detach().flatten() for t in g.values()])


def unflat(row: Tensor, g: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of :func:`flat`, in the shapes and dtypes of ``g``."""
    parts = row.split([t.numel() for t in g.values()])
    named = zip(g.items(), parts, strict=True)
    return {name: part.reshape(t.shape).to(t) for (name, t), part in named}


def side_of(entries: int) -> int:
    """Side of the smallest square that holds so many entries and can be halved twice."""
    root = math.isqrt(entries - 1) + 1  # rounded up
    return -(-root // 4) * 4


def padded(row: Tensor, side: int) -> Tensor:
    """``row`` ``(P,)`` as an image ``(side, side)``, filled up with its mean."""
    rest = side * side - len(row)
    return torch.cat([row, row.mean().expand(rest)]).reshape(side, side)


def rms(row: Tensor) -> float:
    """Root mean square."""
    return float(row.double().square().mean().sqrt())


def signal_size(g: Tensor, M: float) -> float:
    """Root mean square of what noise of standard deviation ``M`` was added to.

    Where noise drowns it, a hundredth of the noise.
    """
    return math.sqrt(max(rms(g) ** 2 - M**2, (0.01 * M) ** 2))


def network_of(learned: Mapping[str, Tensor]) -> Denoiser:
    """The U-Net of a lesson."""
    side, width = (int(n) for n in learned["layout"])
    network = Denoiser(channels=1, size=side, widths=(width, 2 * width, 4 * width))
    prefix = "network/"
    weights = {n.removeprefix(prefix): t for n, t in learned.items() if n.startswith(prefix)}
    models.apply_state(network, weights, source="the learned denoiser")
    return network.eval()


def public_batch(view: View, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """As many public images as the client has, model space, and their labels."""
    public, like = view.surrogate, next(iter(view.update.tensors.values()))
    places = torch.randint(len(public), (view.num_examples,), generator=generator)
    x = view.box.normalize(public.images[places].to(like))
    return x, public.labels[places].to(like.device) % view.classes


def showing(view: View, tensors: Mapping[str, Tensor]) -> View:
    """The same view, its last update replaced."""
    last = view.rounds[-1]
    assert last.update is not None
    key: Mapping[str, Any] = view.key if view.has("key") else {}
    seen = replace(last, update=last.update.with_tensors(dict(tensors)))
    return view.with_rounds([*view.rounds[:-1], seen], key)
