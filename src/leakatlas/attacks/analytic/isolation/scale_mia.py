r"""Scale-MIA: bins in the latent space of a trained encoder, and a decoder for what they hold.

Shi, Liu, Wang, Chen, Zhang and Hou, "Scale-MIA: A Scalable Model Inversion Attack against Secure
Federated Learning via Latent Space Reconstruction", NDSS 2025. FedSGD and FedAVG, one round,
aggregate vantage suffices. Letter G: changed parameters (never the architecture), and public
images to learn an autoencoder from.

1. Offline (:meth:`ScaleMIA.prepare`): the layers in front of the model's first linear layer become
   the encoder e of an autoencoder d(e(x)), trained on public images with squared error.
2. Thresholds c_1 < ... < c_K: quantiles 0.001 to 0.999 of a normal law fitted to the latents'
   brightness q = mean(e(x)).
3. The victim's encoder gets the trained weights. First linear layer: every weight 1/n, bias -c_i;
   second: every weight 1/K and every bias 1/h_2, so that all active rows have the same delta; the
   third is uniform in [0, 1].
4. Read-out on the update or on the sum over clients, as in a pixel-space imprint,

   .. math:: \hat z_i = \frac{G_W[i] - G_W[i+1]}{G_b[i] - G_b[i+1]}, \qquad
             \hat x_i = d(\hat z_i),

   the latent itself if one example falls into bin i. Scale, learning rate and reduction cancel.

The latents are exact; the images are as good as the autoencoder, whose PSNR on the public images
is in the notes (``autoencoder_psnr``): the ceiling. Behind an encoder without parameters (a fully
connected network) the latent *is* the image, and nothing is learned.

Departures:
    * The released read-out finds the bins by the *true* activations of the client's batch. Here the
      differences of the bias gradient say which bins are occupied, candidates come unordered, and
      the strongest come first, as many as the update has examples.
    * Its averages leave out failures; nothing is left out here.
    * A second linear layer that is already the head gets rows that differ, since the deltas of a
      softmax add up to zero; its columns stay equal.
    * The decoder mirrors the resolution of the encoder: one transposed convolution per halving.
      The sizes of the released one belong to its own encoder.
    * The victim's encoder kernels are overwritten as they are; released code changes a kernel's
      size on the way.
    * From a change of weights in float32, where rounding eats the biases, a latent's size is taken
      from its bin (:func:`rounded_readout`).
    * Thresholds may be empirical quantiles (``quantiles``), and an autoencoder starts from the
      weights of the global model.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from leakatlas.attacks.api import (
    ActiveAttack,
    Outlook,
    Reconstruction,
    TamperedModel,
    Tampering,
    attack,
    nothing_found,
)
from leakatlas.blocks import readout, surgery
from leakatlas.blocks.watch import FEWEST, Watch
from leakatlas.data import Box, ImageSet
from leakatlas.errors import UnsupportedModel
from leakatlas.fl import View
from leakatlas.models.structure import example_input, in_mode
from leakatlas.params import NonNegative, Positive, PositiveInt
from leakatlas.threat import Knowledge

CHUNK = 256
"""Images encoded at once."""


@attack(
    "scale_mia",
    needs=Knowledge.UPDATES | Knowledge.BASIC | Knowledge.SURROGATE | Knowledge.MANIPULATION,
)
@dataclass(frozen=True, kw_only=True)
class ScaleMIA(ActiveAttack):
    """Trained encoder, binning linear layers, blind read-out, decoder.

    Args:
        epochs: Of the autoencoder over the public images (350 on CIFAR-10, 250 on TinyImageNet).
        lr: Adam's step size (paper: 1e-3).
        weight_decay: Adam's penalty (paper: 1e-5).
        batch_size: Public images per step (paper: 50).
        quantiles: Where the thresholds come from: a fitted ``normal`` law, or ``empirical``.
        tolerance: Bias differences below this share of the largest bias gradient are rounding;
            1e-12 in float64 and 1e-6 otherwise if None.
    """

    counts = ("epochs",)
    learned_by = ("epochs", "lr", "weight_decay", "batch_size")

    epochs: PositiveInt = 350
    lr: Positive = 1e-3
    weight_decay: NonNegative = 1e-5
    batch_size: PositiveInt = 50
    quantiles: Literal["normal", "empirical"] = "normal"
    tolerance: Positive | None = None

    @classmethod
    def tuned(cls) -> Self:
        """A short training; empirical quantiles waste no bins on a skewed brightness."""
        return cls(epochs=60, quantiles="empirical")

    def outlook(self, view: View) -> Outlook:
        """Two linear layers behind an encoder, public images, bins for the examples."""
        if not view.has("surrogate"):
            return Outlook("hopeless", "the autoencoder is learned from surrogate images")
        model = view.model
        try:
            parts = find_parts(model, example_input(model, view.input_shape))
        except UnsupportedModel as problem:
            return Outlook("hopeless", str(problem))
        n, bins = view.num_examples, parts.first.out_features
        told = (
            f"about {readout.expected_singletons(n, bins):.1f} of {n} latents have one of {bins} "
            "bins to themselves" + ("; images as good as the autoencoder's" if parts.learns else "")
        )
        if view.has("protocol"):
            if view.protocol.steps(n) > 1:
                return Outlook("unknown", f"{told}; several local steps blur neighbouring rows")
            if view.protocol.mode == "train" and parts.dropout:
                return Outlook("unknown", f"{told}; dropout behind the bins makes deltas unequal")
        return Outlook("applicable", told)

    # -- offline ---------------------------------------------------------------------------------

    def prepare(
        self, surrogate: ImageSet, model: nn.Module, *, generator: torch.Generator, watch: Watch
    ) -> dict[str, Tensor]:
        """Train ``d(e(x))`` on public images.

        Args:
            surrogate: Public images.
            model: The global model behind :class:`~leakatlas.blocks.surgery.Normalise`, so that it
                reads pixels.
            generator: Order of the images.
            watch: Budget.

        Returns:
            ``encoder/<name>`` and ``decoder/<name>`` weights, and ``psnr`` on the public images;
            nothing if the encoder has no parameters.
        """
        shape = surrogate.shape
        model = copy.deepcopy(model).float().eval()
        parts = find_parts(model, example_input(model, shape))
        if not parts.learns:
            return {}
        decoder = Decoder(parts.latent, shape).to(surrogate.images.device)
        weights = [*encoder_weights(parts).values(), *decoder.parameters()]
        optimizer = torch.optim.Adam(weights, lr=self.lr, weight_decay=self.weight_decay)
        images = surrogate.images
        batches = -(-len(images) // self.batch_size)
        order: list[Tensor] = []
        for _ in watch.steps(self.epochs * batches, stretches=True, fewest=FEWEST):
            if not order:
                order = list(torch.randperm(len(images), generator=generator).split(
                    self.batch_size
                ))  # fmt: skip
            x = images[order.pop()]
            loss = F.mse_loss(decoder(encode(parts, x)), x)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            errors = [
                (decoder(encode(parts, x)) - x).square().flatten(1).mean(dim=1)
                for x in images.split(CHUNK)
            ]
        psnr = -10 * torch.cat(errors).clamp(min=1e-12).log10().mean()
        learned = {f"encoder/{n}": p.detach() for n, p in encoder_weights(parts).items()}
        learned |= {f"decoder/{n}": p.detach() for n, p in decoder.state_dict().items()}
        return {**learned, "psnr": psnr}

    # -- before the clients train ----------------------------------------------------------------

    def tamper(self, view: View, *, generator: torch.Generator, watch: Watch) -> Tampering | None:
        """The trained encoder and the binning layers; one round is enough."""
        if view.rounds:
            return None
        model = view.model
        front = surgery.Normalise(view.box).to(view.surrogate.images.device)
        learned = self.artefact(view.surrogate, nn.Sequential(front, model), watch=watch)
        parts = find_parts(model, example_input(model, view.input_shape))
        with torch.no_grad():
            for name, parameter in encoder_weights(parts).items():
                # In the sequence behind the normalisation, the model's names begin with "1.".
                parameter.copy_(learned[f"encoder/1.{name}"])
        like = parts.first.weight
        with in_mode(model, train=False), torch.no_grad():
            images = view.box.normalize(view.surrogate.images.to(like))
            q = torch.cat([encode(parts, x).mean(dim=1) for x in images.split(CHUNK)])
        edges = thresholds(q, parts.first.out_features, self.quantiles).to(like)
        write_bins(parts, edges, generator)
        key = {n: t for n, t in learned.items() if not n.startswith("encoder/")}
        return Tampering(
            sent=TamperedModel.of(model),
            key={**key, "thresholds": edges, "latent": torch.tensor(parts.latent)},
        )

    # -- after -----------------------------------------------------------------------------------

    def run(self, view: View, *, generator: torch.Generator, watch: Watch) -> Reconstruction:
        """Differences of neighbouring rows, ranked without any truth, decoded."""
        del generator, watch
        shape = tuple(view.input_shape)
        model = view.model
        parts = find_parts(model, example_input(model, shape))
        state, edges = view.rounds[-1].state, view.key["thresholds"]
        g_w = readout.sent_change(view.update, state, f"{parts.names[0]}.weight")
        g_b = readout.sent_change(view.update, state, f"{parts.names[0]}.bias")
        if not bool(g_b.abs().max() > 0):
            return nothing_found(shape, "the binning layer has no bias gradient at all")
        if view.update.kind == "gradient" or g_b.dtype == torch.float64:
            read = readout.cumulative_readout(g_w, g_b, edges, tolerance=self.tolerance)
            w = g_w.new_full((g_w.shape[1],), 1 / g_w.shape[1])
            bounds = torch.cat([edges, edges.new_tensor([torch.inf])])
            chosen, confidence, floor = readout.rank_bins(read, w, bounds)
        else:
            read, floor = rounded_readout(g_w, edges), 0.0
            chosen, confidence = torch.arange(len(read.rows)), read.strength
        chosen, confidence = chosen[: view.num_examples], confidence[: view.num_examples]
        notes = {"bins_hit": float(len(read.rows)), "noise_floor": floor}
        if len(chosen) == 0:
            return nothing_found(shape, "no bin rises above the noise floor", **notes)
        if "psnr" in view.key:
            notes["autoencoder_psnr"] = float(view.key["psnr"])
        images = decode(read.x[chosen], view.key, view.box, shape)
        return Reconstruction(images=images, confidence=confidence, notes=notes)


# -- the parts of the victim's model ---------------------------------------------------------------


@dataclass(frozen=True)
class Parts:
    """An encoder and the linear layers behind it.

    Args:
        encoder: Layers in front of the first linear one.
        first: Will bin.
        second: Makes the deltas equal.
        third: Random, or None if ``second`` is the head.
        names: Names of first, second and third.
        latent: ``(c, h, w)`` of what the encoder gives before it is flattened.
        dropout: Whether a dropout layer stands between first and second.
    """

    encoder: tuple[surgery.Link, ...]
    first: nn.Linear
    second: nn.Linear
    third: nn.Linear | None
    names: tuple[str, ...]
    latent: tuple[int, ...]
    dropout: bool

    @property
    def learns(self) -> bool:
        """Whether the encoder has weights."""
        return any(True for link in self.encoder for _ in link.module.parameters())


def find_parts(model: nn.Module, example: Tensor) -> Parts:
    """Split a plain chain of layers at its first linear layer.

    Args:
        model: Not changed.
        example: ``(1, C, H, W)``.

    Raises:
        UnsupportedModel: If there is no linear layer with bias and ReLU, followed by another.
    """
    links = surgery.chain(model, example)
    at = [i for i, link in enumerate(links) if isinstance(link.module, nn.Linear)]
    name = type(model).__name__
    if len(at) < 2:
        raise UnsupportedModel(
            f"Scale-MIA needs an encoder and at least two linear layers; {name} has {len(at)}."
        )
    linears = [m for i in at[:3] if isinstance(m := links[i].module, nn.Linear)]
    between = [link.module for link in links[at[0] + 1 : at[1]]]
    if linears[0].bias is None or not between or not isinstance(between[0], nn.ReLU):
        raise UnsupportedModel(
            f"Scale-MIA needs a first linear layer with bias and a ReLU behind it; "
            f"{links[at[0]].name} of {name} is "
            f"{'without bias' if linears[0].bias is None else 'not followed by a ReLU'}."
        )
    spatial = [link.output_shape for link in links[: at[0]] if len(link.output_shape) == 3]
    return Parts(
        encoder=links[: at[0]],
        first=linears[0],
        second=linears[1],
        third=linears[2] if len(linears) == 3 else None,
        names=tuple(links[i].name for i in at[:3]),
        latent=spatial[-1] if spatial else tuple(example.shape[1:]),
        dropout=any(isinstance(m, nn.Dropout) for m in between),
    )


def encoder_weights(parts: Parts) -> dict[str, nn.Parameter]:
    """The encoder's own parameters, by their name in the model."""
    return {
        f"{link.name}.{name}": parameter
        for link in parts.encoder
        for name, parameter in link.module.named_parameters()
    }


def encode(parts: Parts, x: Tensor) -> Tensor:
    """Latents ``(N, n)`` of inputs ``(N, C, H, W)``."""
    for link in parts.encoder:
        x = link.module(x.reshape(-1, *link.input_shape))
    return x.flatten(1)


def thresholds(q: Tensor, bins: int, quantiles: Literal["normal", "empirical"]) -> Tensor:
    """Rising thresholds ``(K,)``: quantiles 0.001 to 0.999 of the latents' brightness.

    Args:
        q: ``(S,)`` brightness of public latents.
        bins: K.
        quantiles: Of a fitted normal law, or of ``q`` itself (evenly spaced beyond its ends).
    """
    q = q.double()
    level = torch.linspace(0.001, 0.999, bins, dtype=torch.float64, device=q.device)
    if quantiles == "normal":
        normal: Tensor = q.mean() + q.std() * torch.special.ndtri(level)
        return normal
    return readout.bin_edges("empirical", bins, values=q)[:-1]


def rounded_readout(g_w: Tensor, edges: Tensor, *, share: float = 0.02) -> readout.Readout:
    """Differences of neighbouring rows of a rounded change of weights, scaled by their bin.

    A bias of 0.3 that moved by 1e-6 has lost two of its digits in float32, and the ratio with them.
    The weights are a thousand times smaller and keep theirs; and since the bins are narrow, the bin
    says how large the latent is.

    Args:
        g_w: ``(K, n)`` change of the binning layer.
        edges: ``(K,)`` rising, one for each row.
        share: A bin is occupied if its row is longer than this share of the longest.

    Returns:
        Bins by falling length of their rows.
    """
    norms = readout.difference_norms(g_w)
    rows = torch.nonzero((norms > share * norms.max()) & (norms > 0)).flatten()
    size = norms[rows]
    upper = torch.cat([edges[1:], edges[-1:]])
    step = readout.quotients(g_w, rows, torch.ones_like(size), rows[rows < len(g_w) - 1] + 1)
    order = size.argsort(descending=True, stable=True)
    rows, size = rows[order], size[order]
    middle = ((edges + upper) / 2)[rows]
    x = readout.scaled_to_measurement(
        step[order], g_w.new_full((g_w.shape[1],), 1 / g_w.shape[1]), middle
    )
    return readout.Readout(x, rows, size / size.max() if len(size) else size)


def write_bins(parts: Parts, edges: Tensor, generator: torch.Generator) -> None:
    """Brightness bins into the first linear layer, equal columns into the second, in place.

    Args:
        parts: Of the model that will be sent.
        edges: ``(K,)`` rising.
        generator: For the rows of the head.
    """
    bins, n = parts.first.weight.shape

    def uniform(like: Tensor) -> Tensor:
        return torch.rand(like.shape, generator=generator, dtype=torch.float64).to(like)

    with torch.no_grad():
        parts.first.weight.fill_(1 / n)
        parts.first.bias.copy_(-edges)
        if parts.third is None:
            rows = uniform(parts.second.weight[:, :1])
            parts.second.weight.copy_((rows / bins).expand(-1, bins))
            return
        parts.second.weight.fill_(1 / bins)
        if parts.second.bias is not None:
            parts.second.bias.fill_(1 / parts.second.out_features)
        parts.third.weight.copy_(uniform(parts.third.weight))


# -- the autoencoder -------------------------------------------------------------------------------


class Decoder(nn.Module):
    """One transposed convolution per halving of the encoder, then pixels in [0, 1].

    Args:
        latent: ``(c, h, w)``.
        shape: ``(C, H, W)``.
    """

    def __init__(self, latent: tuple[int, ...], shape: tuple[int, ...]) -> None:
        super().__init__()
        self.latent, self.shape = latent, shape
        width = latent[0]
        layers: list[nn.Module] = []
        for _ in range(max(0, math.ceil(math.log2(shape[1] / latent[1])))):
            narrower = max(width // 2, 16)
            layers += [nn.ConvTranspose2d(width, narrower, 4, stride=2, padding=1), nn.ReLU()]
            width = narrower
        layers += [nn.Conv2d(width, shape[0], 3, padding=1), nn.Sigmoid()]
        self.layers = nn.Sequential(*layers)

    def forward(self, z: Tensor) -> Tensor:
        """Latents ``(N, n)`` to pixels ``(N, C, H, W)``."""
        images: Tensor = self.layers(z.reshape(-1, *self.latent))
        if images.shape[2:] != self.shape[1:]:
            images = F.interpolate(
                images, size=self.shape[1:], mode="bilinear", align_corners=False
            )
        return images


def decode(z: Tensor, key: Mapping[str, Tensor], box: Box, shape: tuple[int, ...]) -> Tensor:
    """Images in the model's input space ``(M, C, H, W)`` of latents ``(M, n)``.

    Args:
        z: As read.
        key: With the decoder's weights; without them the latent is the image.
        box: The pixel space.
        shape: ``(C, H, W)``.
    """
    weights = {n.removeprefix("decoder/"): t for n, t in key.items() if n.startswith("decoder/")}
    if not weights:
        return box.clip(z.reshape(-1, *shape))
    decoder = Decoder(tuple(int(size) for size in key["latent"]), shape).to(z)
    decoder.load_state_dict({n: t.to(z) for n, t in weights.items()})
    with torch.no_grad():
        images: Tensor = decoder(z)
    return box.normalize(images)
