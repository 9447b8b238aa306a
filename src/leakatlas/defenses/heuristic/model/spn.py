r"""SPN, the secret polarisation network: a private branch adds terms that no server can compute.

Fan et al., "Rethinking Privacy Preserving Deep Learning: How to Evaluate and Thwart Privacy
Attacks", in Federated Learning, LNCS 12500, 2020.

Beside the public head P stands a private branch S, on the same features :math:`\phi(x)`, and every
client holds fixed secret codes :math:`K \in \{-1, 1\}^{C \times b}`, one for each class:

.. math:: u = P(\phi(x)), \quad v = S(\phi(x)), \quad
          \mathcal L = \mathcal L_{CE}(u, y)
          + \alpha \sum_{j=1}^b \max(0, 1 - K_{y,j} \, v_j) .

Backbone and P are uploaded, S and K stay. A client predicts by u, or by the code that is nearest
to v.

What an adversary does about it: the gradient of P holds no secret,
:math:`(\mathrm{softmax}(u) - y)\, \phi(x)^\top`, so that labels and features are read as ever, and
an image is sought that has these features (:meth:`SPN.simulate` compares the head alone). Or it
makes up a branch and fits it along with the image; the secret's part of the backbone's gradient is
linear in :math:`\alpha`. And whatever the loss, a fully connected first layer gives the one image
behind it exactly.

Departures (the abstract was checked; the structure is rebuilt):
    * S is one linear layer, and the paper's two weights are one, alpha, on the polarisation loss.
    * That loss is averaged over the batch under a sum-reduced loss, too.
    * For targets that are probabilities it is the mean over classes that they give.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from leakatlas.errors import UnsupportedModel
from leakatlas.fl import ActsOn, Defense, LocalStep, Memory, Update
from leakatlas.models.structure import last_linear, replace_module
from leakatlas.params import NonNegative, PositiveInt


@dataclasses.dataclass(frozen=True, kw_only=True)
class SPN(Defense):
    """Puts a private branch with secret class codes beside the last linear layer.

    Args:
        alpha: Weight of the polarisation loss; at 0 nothing is added.
        code_length: Bits b of a class code.
        predict_by: What a client predicts with: the public ``head``, or its own ``codes``.
    """

    key: ClassVar[str] = "spn"
    knob: ClassVar[str] = "alpha"
    neutral: ClassVar[float] = 0.0
    strengths: ClassVar[tuple[float, ...]] = (0.1, 1.0, 10.0)
    stage: ClassVar[int] = 20
    modes: ClassVar[frozenset[ActsOn]] = frozenset({ActsOn.PER_STEP})

    alpha: NonNegative = 1.0
    code_length: PositiveInt = 64
    predict_by: Literal["head", "codes"] = "head"

    def model(self, model: nn.Module) -> nn.Module:
        """A copy with the branch; weights and codes are drawn anew at every call.

        Raises:
            UnsupportedModel: If there is no linear layer, or it is the model itself.
        """
        if self.alpha == 0:
            return model
        found = last_linear(model)
        if found is None or not found[0]:
            raise UnsupportedModel(
                f"SPN puts its branch beside the last torch.nn.Linear inside the model; "
                f"{type(model).__name__} has none. End the model with a linear head."
            )
        defended = copy.deepcopy(model)
        polarised = Polarised(defended.get_submodule(found[0]), self.code_length)
        replace_module(defended, found[0], polarised)
        return defended

    def private(self, model: nn.Module) -> frozenset[str]:
        """Branch and codes."""
        return frozenset(
            f"{path}.{name}"
            for path, module in model.named_modules()
            if isinstance(module, Polarised)
            for name in ("branch.weight", "branch.bias", "codes")
        )

    def local_step(
        self, step: LocalStep, gradients: Callable[[LocalStep], dict[str, Tensor]]
    ) -> dict[str, Tensor]:
        """The step on the loss with the polarisation added."""
        if self.alpha == 0:
            return gradients(step)
        places = [m for m in step.model.modules() if isinstance(m, Polarised)]

        def loss(logits: Tensor, y: Tensor) -> Tensor:
            value = step.loss(logits, y)
            for place in places:
                value = value + self.alpha * polarisation(place.take(), place.codes, y)
            return value

        return gradients(dataclasses.replace(step, loss=loss))

    def evaluate(self, model: nn.Module, memory: Memory) -> nn.Module:
        """The public network, or the one that reads codes."""
        del memory
        if self.alpha == 0:
            return model
        plain = copy.deepcopy(model)
        for name, module in list(plain.named_modules()):
            if isinstance(module, Polarised):
                replace_module(
                    plain, name, module.head if self.predict_by == "head" else module.reader()
                )
        return plain

    def simulate(
        self, update: dict[str, Tensor], x: Tensor, y: Tensor, observed: Update
    ) -> dict[str, Tensor]:
        """The candidate's head; all else as observed, since a secret is in it.

        At the truth this equals the observation.
        """
        del x, y
        if self.alpha == 0:
            return update
        return {n: t if n in heads(update) else observed.tensors[n] for n, t in update.items()}


class Polarised(nn.Module):
    """A head with a private branch beside it.

    Args:
        head: The public linear layer ``(N, d) -> (N, C)``.
        code_length: Bits b.
    """

    codes: Tensor

    def __init__(self, head: nn.Module, code_length: int) -> None:
        super().__init__()
        assert isinstance(head, nn.Linear)
        self.head = head
        self.branch = nn.Linear(head.in_features, code_length).to(head.weight)
        signs = torch.randint(2, (head.out_features, code_length)) * 2 - 1
        self.register_buffer("codes", signs.to(head.weight))
        self._v: Tensor | None = None

    def forward(self, features: Tensor) -> Tensor:
        """Logits of the public head; keeps what the branch says for :meth:`take`."""
        self._v = self.branch(features)
        logits: Tensor = self.head(features)
        return logits

    def take(self) -> Tensor:
        """What the branch said in the last forward pass ``(N, b)``, once.

        Raises:
            UnsupportedModel: If there was no forward pass since the last call.
        """
        taken, self._v = self._v, None
        if taken is None:
            raise UnsupportedModel(
                "SPN's branch stands beside the last torch.nn.Linear that the model registers, and "
                "the forward pass did not use it; register the head last."
            )
        return taken

    def reader(self) -> nn.Sequential:
        """A module that gives, for every class, how far its code agrees with the branch."""
        match = nn.Linear(self.codes.shape[1], self.codes.shape[0], bias=False).to(self.codes)
        with torch.no_grad():
            match.weight.copy_(self.codes / self.codes.shape[1])
        return nn.Sequential(copy.deepcopy(self.branch), match)

    def __getstate__(self) -> dict[str, Any]:
        # A copied or saved model carries no activations of somebody's batch.
        return {**self.__dict__, "_v": None}


def polarisation(v: Tensor, codes: Tensor, y: Tensor) -> Tensor:
    """The loss that pulls a branch towards its class' code, averaged over the batch.

    Args:
        v: ``(N, b)``.
        codes: ``(C, b)`` of -1 and 1.
        y: ``(N,)`` classes, or ``(N, C)`` probabilities.
    """
    v = v.reshape(-1, v.shape[-1])
    hinges = F.relu(1 - v[:, None, :] * codes).sum(2)
    weights = F.one_hot(y, len(codes)).to(v) if y.dim() == 1 else y
    return (weights * hinges).sum(1).mean()


def heads(update: dict[str, Tensor]) -> frozenset[str]:
    """Names in an upload that belong to the public head beside a branch."""
    return frozenset(n for n in update if n.rpartition(".")[0].endswith(".head"))
