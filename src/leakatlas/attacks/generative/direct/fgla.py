r"""FGLA: features of a batch read off the last layer's gradient, and a decoder for these weights.

Xue, Hu, Zhao, et al., "Fast Generation-Based Gradient Leakage Attacks against Highly Compressed
Gradients", IEEE INFOCOM 2023. FedSGD; images in milliseconds, nothing is optimised online.

Offline, on public images, a decoder learns to invert the received model's features phi, the input
of its last linear layer:

.. math:: \min_\vartheta \; \mathbb E \lVert D_\vartheta(\varphi(x)) - x \rVert^2 .

Online, with the rows of the mean gradient of W and b, labels :math:`y_i` that are all distinct, and
A the classes that are absent,

.. math:: \hat\varphi_i = \frac{\partial W_{y_i} - o_W}{\partial b_{y_i} - o_b}, \qquad
          o_W = \kappa \, \mathrm{mean}_{c \in A}\, \partial W_c , \quad
          o_b = \kappa \, \mathrm{mean}_{c \in A}\, \partial b_c , \qquad
          \hat x_i = D_\vartheta(\hat\varphi_i).

Row :math:`y_i` holds :math:`(p_{i, y_i} - 1) \varphi_i` and what the other examples leave in it;
the absent rows say what that is. With :math:`\kappa = 1` the separation is *exact* where every
example's probabilities are equal over the classes, as near the initialisation; the paper's
:math:`\kappa = (B - 1) / B` is not, for B > 1, and without an offset the examples stay mixed.

A factor on the gradient cancels: clipping is no defense. Pruning keeps what is large, and the rows
of the present classes are; once these have more entries than are kept, features are cut, so that
what one image survives is the end of a large batch (``leakatlas bench fgla``). Labels that repeat
share a row; then one mixed feature comes out for each class. Where the model pools its last feature
map, only texture is left in the features.

Measured (study ``generative``, the lesson included, a few epochs): above the nearest public image
where the victims are of the public images' population, on fresh and trained ConvNets alike; on
other images about as close as that image. What a decoder learned on 200 portraits makes of a face,
and of a fresh ResNet-18's pooled features, it makes of other images' updates too: the prior, not
the update. From those of a trained one it drew a little more than that of images of the population,
and less than the nearest public image.

Departures:
    - ``offset="full"`` is ours and the default of :meth:`FGLA.tuned`; the paper's is the default.
    - The decoder has one residual block after each doubling instead of three, 64 feature maps
      instead of 1024 to 64, and GroupNorm instead of BN, whose mode would be one more question.
      Features are standardised, and those without a spatial shape go through a linear layer first.
    - It learns from features in the mode in which the client trains; a tenth of the images is held
      out, and its PSNR there is in the notes: with exact features nothing better can come.
    - Labels need not be granted: a class is present where its row of the bias gradient is
      negative, which is exact early in training.

Released code: ``pigeon-dove/FGLA``, ``gen_attack/algorithm.py``, ``gen_attack/model.py``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from leakatlas import models
from leakatlas.attacks.api import Attack, Outlook, Reconstruction, attack, nothing_found
from leakatlas.blocks import labels, observed
from leakatlas.blocks.watch import FEWEST, Watch
from leakatlas.data import ImageSet
from leakatlas.errors import UnsupportedModel
from leakatlas.fl import View
from leakatlas.fl.state import model_state, state_hash
from leakatlas.models.parts import norm2d
from leakatlas.models.structure import example_input
from leakatlas.params import Positive, PositiveInt
from leakatlas.threat import Knowledge

Offset = Literal["official", "full", "none"]

HELD_OUT = 0.1
"""Share of the public images on which the decoder is measured."""

CHUNK = 64
"""Images whose features are computed together."""


@attack("fgla", needs=Knowledge.UPDATES | Knowledge.BASIC | Knowledge.SURROGATE)
@dataclass(frozen=True, kw_only=True)
class FGLA(Attack):
    """Separated features, decoded.

    Args:
        offset: What is subtracted from the rows of present classes: ``official`` is (B - 1) / B of
            the mean of the absent ones, ``full`` all of it, ``none`` nothing.
        epochs: Passes over the public images when the decoder is learned (30).
        lr: Adam's step size.
        batch_size: Images in a step.
        width: Feature maps of the decoder.
    """

    learned_by = ("epochs", "lr", "batch_size", "width")
    draws_on_prior = True
    plain_loss_only = True

    offset: Offset = "official"
    epochs: PositiveInt = 30
    lr: Positive = 1e-4
    batch_size: PositiveInt = 24
    width: PositiveInt = 64

    @classmethod
    def tuned(cls) -> Self:
        """The exact offset, and a decoder in minutes."""
        return cls(offset="full", epochs=10, lr=1e-3, batch_size=64, width=48)

    def outlook(self, view: View) -> Outlook:
        """Whether a head with a bias is there, and images to learn a decoder from."""
        if not view.has("surrogate"):
            return Outlook("hopeless", "its decoder learns from surrogate images; there are none")
        if view.surrogate.shape != tuple(view.input_shape):
            return Outlook("hopeless", f"public images are {view.surrogate.shape}")
        try:
            head = head_of(view)
        except UnsupportedModel as problem:
            return Outlook("hopeless", str(problem))
        N, K = view.num_examples, head.classes
        if N > K:
            return Outlook("hopeless", f"{N} examples of {K} classes cannot have distinct labels")
        if spatial(view.model, view.input_shape, head) is None:
            return Outlook("unknown", "the head reads pooled features: texture without places")
        return Outlook("unknown", f"exact features if the {N} labels are distinct, then a decoder")

    def run(self, view: View, *, generator: torch.Generator, watch: Watch) -> Reconstruction:
        """Separate, decode."""
        del generator  # nothing is random but the lesson, which has a seed of its own
        head = head_of(view)
        g = observed.mean_gradient(view)
        W, b = head.weight_grad(g), head.bias_grad(g)
        if not bool(W.any()) or not bool(b.any()):
            return nothing_found(view.input_shape, "the last layer's gradient is zero")
        y = view.labels if view.has("labels") else torch.nonzero(b < 0).flatten()
        present = y.unique()
        if not len(present):
            return nothing_found(view.input_shape, "no class has a negative bias gradient")
        features = separate(W, b, present, view.num_examples, self.offset)
        shape = spatial(view.model, view.input_shape, head)
        learned = self.learned_once(
            [view.surrogate.fingerprint(), state_hash(model_state(view.model)),
             view.model.training, view.box.to_json()],
            lambda draws, budget: self.lesson(view, head, shape, draws, budget),
            watch=watch,
            device=W.device,
        )  # fmt: skip
        decoder = self.decoder(view, head, shape)
        models.apply_state(
            decoder,
            {n.removeprefix("decoder/"): t for n, t in learned.items() if n.startswith("decoder/")},
            source="the learned decoder",
        )
        with torch.no_grad():
            pixels = decoder.to(W.device).eval()(features.float())
        psnr = float(learned["held_out_psnr"])
        return Reconstruction(
            images=view.box.clip(view.box.normalize(pixels.to(W))),
            labels=present,
            confidence=torch.full((len(present),), psnr, dtype=torch.float64),
            notes={
                "held_out_psnr": psnr,
                "mixed_features": float(view.num_examples - len(present)),
                "absent_classes": float(head.classes - len(present)),
            },
        )

    # -- the decoder -----------------------------------------------------------------------------

    def decoder(self, view: View, head: labels.Head, shape: tuple[int, int, int] | None) -> Decoder:
        """A fresh decoder of this model's features, its weights from the global generator."""
        C, H, W = view.input_shape
        return Decoder(head.in_features, shape, channels=C, size=(H, W), width=self.width)

    def lesson(
        self,
        view: View,
        head: labels.Head,
        shape: tuple[int, int, int] | None,
        generator: torch.Generator,
        watch: Watch,
    ) -> dict[str, Tensor]:
        """Weights of a decoder of the received model's features, and its PSNR on held-out images.

        Args:
            view: Whose model is inverted.
            head: Its last layer.
            shape: Spatial shape of its features, if they have one.
            generator: Order of training.
            watch: Budget and progress.
        """
        device = next(iter(view.update.tensors.values())).device
        public: ImageSet = view.surrogate
        x = public.images.float().to(device)
        phi = features_of(view.model, view.box.normalize(x), head)
        held = max(1, int(HELD_OUT * len(x)))
        decoder = self.decoder(view, head, shape).to(device)
        decoder.mean.copy_(phi.mean())
        decoder.scale.copy_(phi.std().clamp_min(1e-12))
        optimizer = torch.optim.Adam(decoder.parameters(), lr=self.lr)
        seen = len(x) - held if len(x) > 1 else len(x)
        per_epoch = -(-seen // self.batch_size)
        for step in watch.steps(self.epochs * per_epoch, stretches=True, fewest=FEWEST):
            for group in optimizer.param_groups:
                group["lr"] = self.lr * (1.0 if step.progress < 0.75 else 0.1)
            chosen = torch.randint(seen, (min(self.batch_size, seen),), generator=generator)
            chosen = chosen.to(device)
            optimizer.zero_grad(set_to_none=True)
            torch.autograd.backward((decoder(phi[chosen]) - x[chosen]).square().mean())
            optimizer.step()
        decoder.eval()
        with torch.no_grad():
            error = (decoder(phi[-held:]) - x[-held:]).square().flatten(1).mean(1)
        return {
            **{f"decoder/{n}": t for n, t in decoder.state_dict().items()},
            "held_out_psnr": -10 * error.double().log10().mean(),
        }


# -- features ------------------------------------------------------------------------------------


def head_of(view: View) -> labels.Head:
    """The last linear layer.

    Raises:
        UnsupportedModel: If there is none, or if it has no bias to divide by.
    """
    head = labels.find_head(view.model, example_input(view.model, view.input_shape))
    if head.bias_name is None:
        raise UnsupportedModel(
            "FGLA divides rows of the last layer's gradient by those of its bias; this model's "
            "last layer has none."
        )
    return head


def separate(W: Tensor, b: Tensor, present: Tensor, count: int, offset: Offset) -> Tensor:
    """Features ``(M, D)`` of the examples of M distinct labels; 0 where a division fails.

    Args:
        W: ``(K, D)`` gradient of the head's weight.
        b: ``(K,)`` gradient of its bias.
        present: ``(M,)`` distinct labels.
        count: Examples B of the batch.
        offset: As of :class:`FGLA`; without an absent class there is none.
    """
    absent = torch.ones(len(b), dtype=torch.bool, device=b.device)
    absent[present] = False
    share = {"official": (count - 1) / count, "full": 1.0, "none": 0.0}[offset]
    o_W, o_b = torch.zeros_like(W[0]), torch.zeros_like(b[0])
    if bool(absent.any()):
        o_W, o_b = share * W[absent].mean(0), share * b[absent].mean()
    features = (W[present] - o_W) / (b[present] - o_b).unsqueeze(1)
    return torch.where(torch.isfinite(features), features, torch.zeros_like(features))


def features_of(model: nn.Module, x: Tensor, head: labels.Head) -> Tensor:
    """The inputs ``(N, D)`` of the last layer, float32, in the model's own mode."""
    layer = model.get_submodule(head.module_name)
    taken: list[Tensor] = []
    handle = layer.register_forward_pre_hook(lambda _, inputs: taken.append(inputs[0].detach()))
    like = next(model.parameters())
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            for part in x.to(like).split(CHUNK):
                model(part)
    finally:
        handle.remove()
    return torch.cat(taken).flatten(1).float()


def spatial(
    model: nn.Module, shape: tuple[int, ...], head: labels.Head
) -> tuple[int, int, int] | None:
    """``(C, h, w)`` of the feature map that the head reads flattened; None if there is none."""
    found: list[tuple[int, ...]] = []

    def note(module: nn.Module, inputs: object, output: object) -> None:
        del module, inputs
        if isinstance(output, Tensor) and output.dim() == 4:
            found.append(tuple(output.shape[1:]))

    model = model.eval()
    handles = [m.register_forward_hook(note) for m in model.modules()]
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            model(example_input(model, shape))
    finally:
        for handle in handles:
            handle.remove()
    if not found or math.prod(found[-1]) != head.in_features or found[-1][1] < 2:
        return None
    C, h, w = found[-1]
    return C, h, w


class Decoder(nn.Module):
    """Features ``(N, D)`` to pixels ``(N, channels, H, W)`` of [0, 1].

    Args:
        features: D.
        shape: ``(C, h, w)`` of the features; None if they have no places.
        channels: Channels of an image.
        size: Its height and width.
        width: Feature maps.
    """

    mean: Tensor
    scale: Tensor

    def __init__(
        self,
        features: int,
        shape: tuple[int, int, int] | None,
        *,
        channels: int,
        size: tuple[int, int],
        width: int,
    ) -> None:
        super().__init__()
        self.size = size
        side = max(size)
        self.register_buffer("mean", torch.zeros(()))
        self.register_buffer("scale", torch.ones(()))
        if shape is None:
            coarse = max(1, -(-side // 8))
            self.enter: nn.Module = nn.Sequential(
                nn.Linear(features, width * coarse * coarse),
                nn.Unflatten(1, (width, coarse, coarse)),
            )
        else:
            coarse = min(shape[1:])
            self.enter = nn.Sequential(nn.Unflatten(1, shape), nn.Conv2d(shape[0], width, 1))
        layers: list[nn.Module] = [nn.LeakyReLU(), _Residual(width)]
        while coarse < side:
            layers += [
                nn.ConvTranspose2d(width, width, 3, stride=2, padding=1, output_padding=1),
                nn.LeakyReLU(),
                _Residual(width),
            ]
            coarse *= 2
        self.body = nn.Sequential(*layers, nn.Conv2d(width, channels, 1), nn.Sigmoid())

    def forward(self, features: Tensor) -> Tensor:
        """Pixels of features."""
        pixels: Tensor = self.body(self.enter((features - self.mean) / self.scale))
        if pixels.shape[2:] != self.size:
            pixels = F.interpolate(pixels, size=self.size, mode="area")
        return pixels


class _Residual(nn.Module):
    """Two convolutions and a skip."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1, bias=False), norm2d("group", width),
            nn.LeakyReLU(),
            nn.Conv2d(width, width, 3, padding=1, bias=False), norm2d("group", width),
        )  # fmt: skip

    def forward(self, h: Tensor) -> Tensor:
        return F.leaky_relu(h + self.body(h))
