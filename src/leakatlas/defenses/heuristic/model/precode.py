r"""PRECODE (Scheliga et al., WACV 2022): a variational bottleneck in front of the head.

The head's input h passes an encoder, fresh noise and a decoder,

.. math:: (\mu, a) = W_e h + b_e, \quad \sigma = \mathrm{softplus}(a), \quad
          z = \mu + s\,\sigma \odot \epsilon, \;\epsilon \sim \mathcal N(0, I), \quad
          \hat h = W_d z + b_d,

in every forward pass, at evaluation as well, and the training loss becomes

.. math:: \mathcal L_{CE} + \frac{\beta}{\ln 2}\,
          \mathrm{KL}\bigl(\mathcal N(\mu, \sigma^2) \,\Vert\, \mathcal N(0, I)\bigr),

the divergence summed over the K latent dimensions and averaged over the batch. All weights are
shared; what randomises the gradient is :math:`\epsilon`.

What an adversary does about it: the layers in front of the bottleneck carry the image. A fully
connected first layer gives its input exactly for a batch of one, whatever was drawn; leaving out
the tensors from the bottleneck on, or fitting the noise, serves for the rest.

Departures: the factor s on the noise is ours (1 in the paper). The divergence is averaged over the
batch under a sum-reduced loss too. :math:`\ln\sigma` is taken in a form that does not underflow.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from leakatlas.errors import UnsupportedModel
from leakatlas.fl import ActsOn, Defense, LocalStep
from leakatlas.models.structure import last_linear, replace_module
from leakatlas.params import NonNegative, PositiveInt


@dataclasses.dataclass(frozen=True, kw_only=True)
class PRECODE(Defense):
    """Inserts a variational bottleneck before the last linear layer.

    Args:
        sigma_scale: Factor s on the noise. At 0 nothing is inserted; the limit of small values is
            the network with a noiseless bottleneck, which is another network.
        latent: Latent dimensions K.
        beta: Weight of the divergence.
    """

    key: ClassVar[str] = "precode"
    knob: ClassVar[str] = "sigma_scale"
    neutral: ClassVar[float] = 0.0
    strengths: ClassVar[tuple[float, ...]] = (0.5, 1.0)
    stage: ClassVar[int] = 20
    modes: ClassVar[frozenset[ActsOn]] = frozenset({ActsOn.PER_STEP})

    sigma_scale: NonNegative = 1.0
    latent: PositiveInt = 256
    beta: NonNegative = 1e-3

    def model(self, model: nn.Module) -> nn.Module:
        """A copy whose last linear layer is ``Sequential(bottleneck, head)``.

        Raises:
            UnsupportedModel: If there is no linear layer, or it is the model itself.
        """
        if self.sigma_scale == 0:
            return model
        found = last_linear(model)
        if found is None or not found[0]:
            raise UnsupportedModel(
                f"PRECODE puts its bottleneck before the last torch.nn.Linear inside the model; "
                f"{type(model).__name__} has none. End the model with a linear head."
            )
        defended = copy.deepcopy(model)
        name = found[0]
        head = defended.get_submodule(name)
        bottleneck = Bottleneck(found[1].in_features, self.latent, self.sigma_scale)
        bottleneck.to(found[1].weight)
        wrapped = nn.Sequential(OrderedDict(bottleneck=bottleneck, head=head))
        replace_module(defended, name, wrapped)
        return defended

    def local_step(
        self, step: LocalStep, gradients: Callable[[LocalStep], dict[str, Tensor]]
    ) -> dict[str, Tensor]:
        """The step on the loss with the divergence added."""
        if self.sigma_scale == 0:
            return gradients(step)

        def loss(logits: Tensor, y: Tensor) -> Tensor:
            return self.simulate_loss(step.loss(logits, y), step.model)

        return gradients(dataclasses.replace(step, loss=loss))

    def simulate_loss(self, loss: Tensor, model: nn.Module) -> Tensor:
        """The loss with the divergence of the forward pass that has just been made."""
        if self.sigma_scale == 0:
            return loss
        for module in model.modules():
            if isinstance(module, Bottleneck):
                loss = loss + self.beta / math.log(2) * module.take_divergence().mean()
        return loss


class Bottleneck(nn.Module):
    """``h (..., d)`` to ``(..., d)`` through K noisy latent dimensions.

    Noise is drawn from torch's global generator, also in eval mode.

    Args:
        features: Width d.
        latent: Latent dimensions K.
        sigma_scale: Factor on the noise.
    """

    def __init__(self, features: int, latent: int, sigma_scale: float) -> None:
        super().__init__()
        self.sigma_scale = sigma_scale
        self.encoder = nn.Linear(features, 2 * latent)
        self.decoder = nn.Linear(latent, features)
        self.noise: Tensor | None = None
        """Draws ``(..., K)`` to use instead of fresh ones, as an adversary does that fits them."""
        self._divergence: Tensor | None = None

    def forward(self, h: Tensor) -> Tensor:
        """Encode, add noise, decode; keeps the divergence for :meth:`take_divergence`."""
        mu, a = self.encoder(h).chunk(2, dim=-1)
        sigma = F.softplus(a)
        self._divergence = divergence(mu, a).reshape(len(h), -1).sum(1)
        drawn = torch.randn_like(mu, device="cpu") if self.noise is None else self.noise
        epsilon = drawn.to(mu.device)
        decoded: Tensor = self.decoder(mu + self.sigma_scale * sigma * epsilon)
        return decoded

    def take_divergence(self) -> Tensor:
        """The divergences ``(N,)`` of the last forward pass, once: no graph is kept alive.

        Raises:
            UnsupportedModel: If there was no forward pass since the last call.
        """
        taken, self._divergence = self._divergence, None
        if taken is None:
            raise UnsupportedModel(
                "PRECODE's bottleneck stands before the last torch.nn.Linear that the model "
                "registers, and the forward pass did not use it; register the head last."
            )
        return taken

    def __getstate__(self) -> dict[str, Any]:
        # A copied or saved model carries no activations of somebody's batch.
        return {**self.__dict__, "_divergence": None}


def divergence(mu: Tensor, a: Tensor) -> Tensor:
    """``KL(N(mu, softplus(a)^2) || N(0, I))`` of ``(..., K)``, summed over K."""
    sigma = F.softplus(a)
    return 0.5 * (sigma.square() + mu.square() - 1 - 2 * log_softplus(a)).sum(-1)


def log_softplus(a: Tensor) -> Tensor:
    """``ln softplus(a)``, which tends to ``a`` where softplus underflows."""
    small = a < -15
    return torch.where(small, a, F.softplus(torch.where(small, torch.zeros_like(a), a)).log())
