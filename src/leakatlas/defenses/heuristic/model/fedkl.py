r"""FedKL (Ren et al., 2023): scale and shift of normalisation layers come from a private key.

In a locked block the affine part of the normalisation is replaced by

.. math:: y = \gamma \odot \mathrm{Norm}(x) + \beta_s, \quad
          \gamma = \mathrm{act}(W_\gamma \kappa + b_\gamma), \quad
          \beta_s = \mathrm{act}(W_\beta \kappa + b_\beta),

with the client's key :math:`\kappa \in [0, 1]^{1024}` and lock layers :math:`W, b` that are trained
and never leave the client; both depend on the key alone, not on the image. The rest is uploaded
and averaged, so each client predicts with the shared weights and its own locks.

What an adversary does about it: the secret amounts to two numbers per locked channel, which can
be fitted along with the image. With ReLU, a channel whose :math:`\gamma` is 0 has no gradient,
which looks like protection but is a dead channel.

Departures: private tensors are absent from the upload (the released code sends zeros). Every
client draws its own key and its own initial locks. One key serves scale and shift of every block
(``Rand2AI/FedKL: backbone/KL_layer_block.py`` takes one for each). The normalisation's own scale
and shift are dropped when a model with learned ones is locked. :meth:`FedKL.evaluate` folds the
locks into ordinary affine layers, which gives the same logits. Group normalisation can be locked
as well as batch normalisation.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from leakatlas.errors import UnsupportedModel
from leakatlas.fl import ActsOn, Defense, Memory
from leakatlas.models.structure import replace_module
from leakatlas.params import Fraction, PositiveInt

Activation = Literal["relu", "sigmoid"]


@dataclass(frozen=True, kw_only=True)
class FedKL(Defense):
    """Locks the normalisation layers of a model with a private key.

    Args:
        locked: Share of the normalisation layers that are locked, from the first on.
        key_length: Length of the key.
        activation: Of scale and shift ("relu" published; "sigmoid" keeps every channel alive).
    """

    key: ClassVar[str] = "fedkl"
    knob: ClassVar[str] = "locked"
    neutral: ClassVar[float] = 0.0
    strengths: ClassVar[tuple[float, ...]] = (0.5, 1.0)
    stage: ClassVar[int] = 20
    modes: ClassVar[frozenset[ActsOn]] = frozenset({ActsOn.PER_STEP, ActsOn.PER_UPDATE})

    locked: Fraction = 1.0
    key_length: PositiveInt = 1024
    activation: Activation = "relu"

    def model(self, model: nn.Module) -> nn.Module:
        """A copy with locks; keys and lock layers are drawn anew at every call.

        Raises:
            UnsupportedModel: If there is no affine normalisation layer to lock.
        """
        if self.locked == 0:
            return model
        names = lockable(model)
        if not names:
            raise UnsupportedModel(
                f"FedKL locks the scale and shift of normalisation layers, and "
                f"{type(model).__name__} has none (BatchNorm or GroupNorm with affine=True); "
                "use a model with norm='batch' or norm='group', or another defense."
            )
        defended = copy.deepcopy(model)
        like = next(model.parameters())
        key = torch.rand(self.key_length).to(like)
        for name in names[: math.ceil(self.locked * len(names))]:
            lock = KeyLock(defended.get_submodule(name), key, self.activation).to(like)
            replace_module(defended, name, lock)
        return defended

    def private(self, model: nn.Module) -> frozenset[str]:
        """The keys, and weights and biases of the lock layers."""
        return frozenset(
            f"{path}.{name}"
            for path, module in model.named_modules()
            if isinstance(module, KeyLock)
            for name in ("key", *(f"{p}.{q}" for p in ("scale", "shift") for q in _AFFINE))
        )

    def evaluate(self, model: nn.Module, memory: Memory) -> nn.Module:
        """The client's model with its locks folded into affine layers."""
        del memory
        return merged(model)


_AFFINE = ("weight", "bias")


class KeyLock(nn.Module):
    """A normalisation whose scale and shift come from a key.

    Args:
        norm: A BatchNorm or GroupNorm; it is copied without its affine part.
        key: ``(key length,)``.
        activation: Of scale and shift.
    """

    key: Tensor

    def __init__(self, norm: nn.Module, key: Tensor, activation: Activation) -> None:
        super().__init__()
        self.norm = copy.deepcopy(norm)
        for name in _AFFINE:
            self.norm.register_parameter(name, None)
        setattr(self.norm, "affine", False)  # noqa: B010 - both norm types have it, nn.Module not
        channels = _channels(norm)
        self.activation = activation
        self.register_buffer("key", key.clone())
        self.scale = nn.Linear(len(key), channels)
        self.shift = nn.Linear(len(key), channels)

    def affine(self) -> tuple[Tensor, Tensor]:
        """``gamma`` and ``beta``, each ``(channels,)``."""
        act = torch.relu if self.activation == "relu" else torch.sigmoid
        return act(self.scale(self.key)), act(self.shift(self.key))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise ``(N, channels, ...)``, scale and shift."""
        shape = (1, -1, *[1] * (x.dim() - 2))
        gamma, beta = self.affine()
        normalised: Tensor = self.norm(x)
        return gamma.reshape(shape) * normalised + beta.reshape(shape)


def lockable(model: nn.Module) -> tuple[str, ...]:
    """Names of the affine BatchNorm and GroupNorm layers, in the order of the module tree."""
    return tuple(
        name
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm | nn.GroupNorm) and module.affine and name
    )


def merged(model: nn.Module) -> nn.Module:
    """A copy in which every lock is an ordinary normalisation with its scale and shift.

    With the true key this is the client's own model; with fitted values in place of the affine
    parameters it is what an adversary optimises.
    """
    plain = copy.deepcopy(model)
    for name, module in list(plain.named_modules()):
        if isinstance(module, KeyLock):
            norm = module.norm
            for field, value in zip(_AFFINE, module.affine(), strict=True):
                norm.register_parameter(field, nn.Parameter(value.detach().clone()))
            setattr(norm, "affine", True)  # noqa: B010 - see KeyLock
            replace_module(plain, name, norm)
    return plain


def _channels(norm: nn.Module) -> int:
    return norm.num_channels if isinstance(norm, nn.GroupNorm) else norm.num_features  # type: ignore[return-value]  # a BatchNorm: lockable() checked
