r"""ROG: search a low-resolution image whose enlargement explains the update, then enhance it.

Yue, Jin, Wong, Baron and Dai, "Gradient Obfuscation Gives a False Sense of Security in Federated
Learning", USENIX Security 2023.   FedAVG (and FedSGD), compressed or noised updates.

1. *Search.* Over z of a fourth of the side, from uniform noise,

   .. math:: \min_z \; \lVert \hat g(\uparrow_4 z) - g \rVert^2,

   where :math:`\uparrow` is bicubic enlargement, :math:`\hat g` the gradient, or the
   pseudo-gradient :math:`(\theta_0 - \theta_\tau) / \eta` of the unrolled local steps, and g the
   update as it was decompressed. Sixteen times fewer unknowns are what regularises the search: no
   other prior. Adam, its step size falling along half a cosine to a tenth.
2. *Enhance.* A network that learned to turn inverted images into originals is applied to
   :math:`\uparrow z`.

The adversary makes its own lessons: it plays the client, defense included, on public images
(:meth:`leakatlas.fl.View.rehearse`), inverts what it sent, and learns from pairs of inverted and
original images. No victim is among them.

Measured (study ``rog``): where nine tenths of the update are withheld, fewer unknowns, the mirror
and most of all the enhancement each help, and all of them together stay behind [3], published or
rehearsed, under the same mirror. Study ``channels``: mirroring the channel pays where it withholds
or rescales (top-k, signs, clipping) and costs where it adds noise; a rehearsed [3] reaches more
under each.

Departures:
    - One small residual network enhances, learned by squared error. Published are a
      class-conditional generator and a super-resolution network, averaged, learned adversarially
      on ImageNet; their weights are out of reach.
    - The squared distance is divided by :math:`\lVert g \rVert^2`, which Adam does not see.
      ``distance="cosine"`` suits updates of signs, whose size says nothing.
    - ``adaptive`` compares through the mirrors of the defenses that the adversary knows (only
      where a pruned update holds something, say); the published match does not.
    - The replay starts at the received weights, as the paper has it; the released client trains
      the shared network in place, and its attacker unrolls from the trained weights.
    - Labels: granted, else by the rules for mean gradients; the release passes the true ones.
    - The iterate of least distance is enlarged, not the last one. The step size falls from the
      second step on; the release makes two of the first size.
    - :meth:`ROG.tuned`: scale (1 to 4), step size (0.01 to 0.1) and distance were searched one
      after the other, on three batches of four CIFAR-10 training images of which nine tenths of
      the update were withheld.

Released code: ``KAI-YUE/rog``, ``src/attack/attacker.py``, ``src/compress/compressor.py``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, Self

import torch
from torch import Tensor
from torch.nn import functional as F

from leakatlas.attacks.api import Attack, Outlook, Reconstruction, attack, nothing_found
from leakatlas.blocks import denoiser, descent, init, matching, observed
from leakatlas.blocks.denoiser import Denoiser
from leakatlas.blocks.watch import Watch
from leakatlas.fl import View
from leakatlas.params import NonNegativeInt, Positive, PositiveInt
from leakatlas.threat import Knowledge

LESSONS = 0.5
"""Share of a time budget for the network, where there is one to be learned."""


@attack("rog", needs=Knowledge.UPDATES | Knowledge.BASIC | Knowledge.SURROGATE)
@dataclass(frozen=True, kw_only=True)
class ROG(Attack):
    """Low-resolution search and a learned enhancement.

    Args:
        steps: Iterations T of the search.
        lr: Step size of Adam at first; a tenth of it at last.
        scale: How many times smaller the sides of z are.
        distance: Squared, relative to the update, or the cosine.
        adaptive: Whether known defenses' mirrors are applied to the replay.
        enhance: A network learned on inversions of public images, or nothing.
        pairs: Images that the network learns from.
        epochs: Passes over them.
        width: Channels of the network.
        labels: Labels that were read from this update beforehand, where none are granted; the
            attack's own rule if empty.
    """

    version: ClassVar[int] = 2
    draws_on_prior: ClassVar[bool] = True

    steps: PositiveInt = 100
    lr: Positive = 0.05
    scale: PositiveInt = 4
    distance: Literal["squared", "cosine"] = "squared"
    adaptive: bool = False
    enhance: Literal["learned", "none"] = "learned"
    pairs: PositiveInt = 256
    epochs: PositiveInt = 40
    width: PositiveInt = 32
    labels: tuple[NonNegativeInt, ...] = ()

    @classmethod
    def tuned(cls) -> Self:
        """Our setting for small images: a third of the side, known defenses mirrored."""
        return cls(steps=200, lr=0.02, scale=3, adaptive=True, pairs=96)

    @classmethod
    def variants(cls) -> Mapping[str, Self]:
        """Ours, with the cosine, and the published preset."""
        tuned = cls.tuned()
        return {
            "tuned": tuned,
            "cosine": replace(tuned, distance="cosine"),
            "published": cls(),
        }

    def knowledge(self) -> Knowledge:
        """Public images serve the enhancement alone."""
        public = Knowledge.SURROGATE if self.enhance == "learned" else Knowledge(0)
        return Knowledge.UPDATES | Knowledge.BASIC | public

    def outlook(self, view: View) -> Outlook:
        """What the enlargement can show at all."""
        if self.enhance == "learned" and view.has("surrogate"):
            public, own = view.surrogate.shape, tuple(view.input_shape)
            if public != own:
                return Outlook("hopeless", f"public images are {public}, the client's {own}")
        finest = "pixel" if self.scale == 1 else f"{self.scale} pixels"
        return Outlook("unknown", f"nothing finer than {finest} is sought; the network adds it")

    def run(self, view: View, *, generator: torch.Generator, watch: Watch) -> Reconstruction:
        """The enhancement first (learned once for this state and defense), then the search."""
        if not any(bool(tensor.any()) for tensor in view.update.tensors.values()):
            return nothing_found(view.input_shape, "the update is zero; there is nothing to match")
        enhancer, left = None, watch
        if self.enhance == "learned":
            parts = watch.share((LESSONS, 1 - LESSONS))
            learned = self.learned_once(
                [view.circumstances(), view.surrogate.fingerprint()],
                lambda draws, budget: self.lesson(view, generator=draws, watch=budget),
                watch=next(parts),
            )
            enhancer, left = Denoiser.of(learned), next(parts, watch)
        y = observed.known_labels(view, self.labels)
        found = self.search(view, y, generator=generator, watch=left)
        if found.trouble:
            return nothing_found(view.input_shape, found.trouble)
        pixels = enlarged(found.best["z"], view.input_shape)
        if enhancer is not None:
            with torch.no_grad():
                pixels = enhancer.to(pixels)(pixels)
        loss = float(found.criterion)
        return Reconstruction(
            images=view.box.clip(view.box.normalize(pixels)),
            labels=y,
            confidence=torch.full((len(pixels),), -loss, dtype=torch.float64),
            notes={
                "matching_loss": loss,
                "iterations": float(found.steps),
                "labels_granted": float(view.has("labels")),
            },
        )

    def search(
        self, view: View, y: Tensor, *, generator: torch.Generator, watch: Watch
    ) -> descent.Descended:
        """Step 1: the low-resolution images ``z``, in [0, 1] at first."""
        g = dict(view.update.tensors)
        replay = view.replayer(adaptive=self.adaptive)
        compare = matching.relative_l2 if self.distance == "squared" else matching.cosine
        shape, box = view.input_shape, view.box

        def objective(variables: descent.Variables, t: Tensor) -> Tensor:
            del t
            return compare(replay(box.normalize(enlarged(variables["z"], shape)), y), g)

        C, H, W = shape
        small = (view.num_examples, C, math.ceil(H / self.scale), math.ceil(W / self.scale))
        like = next(iter(g.values()))
        return descent.descend(
            objective,
            {"z": init.uniform(small, generator=generator, like=like)},
            optimizer=descent.adam(self.lr),
            steps=self.steps,
            watch=watch,
            schedule=lambda progress: 0.1 + 0.9 * descent.cosine_decay()(progress),
        )

    def lesson(self, view: View, *, generator: torch.Generator, watch: Watch) -> dict[str, Tensor]:
        """Invert updates of public images, and learn to undo what that does to them."""
        N, public = view.num_examples, view.surrogate
        like = next(iter(view.update.tensors.values()))
        damaged, originals = [], []
        parts = watch.share((0.7, 0.3))
        inverting = next(parts)
        for budget in inverting.share(-(-self.pairs // N)):
            places = torch.randint(len(public), (N,), generator=generator)
            x = view.box.normalize(public.images[places].to(like))
            y = public.labels[places].to(like.device) % view.classes
            seed = int(torch.randint(2**31, (1,), generator=generator))
            own = view.rehearse(x, y, seed=seed)
            end = self.search(own, y, generator=generator, watch=budget)
            damaged.append(enlarged(end.best["z"], view.input_shape))
            originals.append(public.images[places].to(like))
        network = Denoiser(view.input_shape[0], self.width).to(like)
        denoiser.fit(network, torch.cat(damaged), torch.cat(originals), epochs=self.epochs,
            generator=generator, watch=next(parts, watch))  # fmt: skip
        return {name: tensor.detach() for name, tensor in network.state_dict().items()}


def enlarged(z: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Bicubic enlargement of ``(N, C, h, w)`` to ``shape`` = ``(C, H, W)``; linear in z."""
    return F.interpolate(z, size=tuple(shape[1:]), mode="bicubic")
