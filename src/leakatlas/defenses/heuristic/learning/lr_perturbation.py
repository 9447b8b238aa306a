r"""Learning-rate perturbation: nobody but the client knows how far it stepped.

Wan et al., "Enhancing Privacy Preservation in Federated Learning via Learning Rate Perturbation",
ICCV 2023.

.. math:: \eta_k = \eta \, (1 + u_k), \quad u_k \sim \mathcal U(-a, a), \qquad
          \Delta_k = \sum_t \eta_{k,t} \, g_{k,t} .

An adversary that divides an update by the agreed rate gets a gradient of the wrong size.

What an adversary does about it: it uses no size. After one local step the update is a *positive
multiple* of the gradient, so that matching by the cosine, ratios of a layer's weight and bias
gradients, and signs (labels) see nothing of the defense. :meth:`LRPerturbation.simulate` scales a
candidate's update to fit the observed one best, within the range that the amplitude allows: for one
local step the true batch is an exact zero again. With several steps of one rate it is one more
scalar on the way; the path that it bends is left as an error of second order.

Departures:
    * The paper's interval could not be read: the symmetric one above, and its default, are ours.
    * ada-LRP, which moves the mean of a client's rate with its data, is left out.
    * A client of FedSGD sends a gradient and takes no step; the factor is on what it sends, as if
      it had sent its step.
    * A rate acts on what the optimizer adds as well: weight decay is perturbed alike. Adam divides
      its steps by their size and would undo a factor; it is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from leakatlas.errors import IncompatibleDefenses
from leakatlas.fl import ActsOn, Defense, FedAVG, LocalStep, Memory, Protocol, Update


@dataclass(frozen=True, kw_only=True)
class LRPerturbation(Defense):
    """Draws the learning rate of every round, or of every local step.

    Args:
        amplitude: Largest relative change a of the rate; 0 leaves it alone.
        per: Whether a rate holds for a ``round`` or for one ``step``.
    """

    key: ClassVar[str] = "lr_perturbation"
    knob: ClassVar[str] = "amplitude"
    neutral: ClassVar[float] = 0.0
    strengths: ClassVar[tuple[float, ...]] = (0.25, 0.5, 0.9)
    stage: ClassVar[int] = 30
    modes: ClassVar[frozenset[ActsOn]] = frozenset({ActsOn.PER_STEP})

    amplitude: Annotated[float, Field(ge=0, lt=1)] = 0.5
    per: Literal["round", "step"] = "round"

    def local_step(
        self, step: LocalStep, gradients: Callable[[LocalStep], dict[str, Tensor]]
    ) -> dict[str, Tensor]:
        """The step's gradient, times what its rate is of the agreed one.

        Raises:
            IncompatibleDefenses: Under an optimizer on which a factor does not act as a rate.
        """
        if self.amplitude == 0:
            return gradients(step)
        decay = self._weight_decay(step.context.protocol)
        memory = step.context.memory
        if step.index == 0 or self.per == "step":
            drawn = torch.rand((), generator=step.context.generator, dtype=torch.float64)
            memory["factor"] = 1 + self.amplitude * (2 * float(drawn) - 1)
        own = dict(step.model.named_parameters()) if decay else {}
        return perturbed(gradients(step), memory["factor"], own, decay)

    def _weight_decay(self, protocol: Protocol) -> float:
        """What the optimizer adds to a gradient, in units of the weights."""
        if not isinstance(protocol, FedAVG):
            return 0.0
        if protocol.optimizer == "adam" or (self.per == "step" and protocol.momentum):
            what = "Adam" if protocol.optimizer == "adam" else "SGD with momentum"
            raise IncompatibleDefenses(
                f"lr_perturbation(per={self.per!r}) changes the client's rate, which under {what} "
                "is no factor on the gradient; use SGD"
                + (", with per='round' if it has momentum." if what != "Adam" else ".")
            )
        return protocol.weight_decay

    def simulate(
        self, update: dict[str, Tensor], x: Tensor, y: Tensor, observed: Update
    ) -> dict[str, Tensor]:
        """The candidate's update at the factor that fits the observed one best."""
        del x, y
        if self.amplitude == 0 or observed.kind == "weights":
            return update
        factor = fitted_factor(update, observed.tensors, self.amplitude)
        return {name: factor * t for name, t in update.items()}

    def secrets(self, memory: Memory) -> dict[str, Tensor]:
        """The factor of the last step."""
        return {"factor": torch.tensor(memory["factor"])} if "factor" in memory else {}


def perturbed(
    gradients: Mapping[str, Tensor], factor: float, own: Mapping[str, Tensor], decay: float
) -> dict[str, Tensor]:
    """Gradients with which a step at the agreed rate goes as far as one at ``factor`` times it.

    Args:
        gradients: Of the loss.
        factor: ``eta_k / eta``.
        own: Weights, where the optimizer adds ``decay`` times them.
        decay: Weight decay.
    """
    if decay == 0:
        return {name: factor * g for name, g in gradients.items()}
    return {
        name: factor * g + (factor - 1) * decay * own[name].detach()
        for name, g in gradients.items()
    }


def fitted_factor(
    update: Mapping[str, Tensor], observed: Mapping[str, Tensor], amplitude: float
) -> Tensor:
    """The factor in ``[1 - a, 1 + a]`` by which ``update`` comes closest to ``observed``.

    A scalar tensor through which slopes pass.
    """
    dots = [(t * observed[name]).sum() for name, t in update.items()]
    squares = [t.square().sum() for t in update.values()]
    along, size = torch.stack(dots).sum(), torch.stack(squares).sum()
    best = along / torch.where(size > 0, size, torch.ones_like(size))
    return best.clamp(1 - amplitude, 1 + amplitude)
