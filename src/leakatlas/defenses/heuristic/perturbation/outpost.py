r"""Outpost (Wang, Hugh and Li, INFOCOM 2023; journal version 2024): sparing noise in local steps.

In local step :math:`i = 0, 1, \dots` the client perturbs its gradient with probability
:math:`1 / (1 + \beta i)`, and trains on with what comes out:

1. the risk of a tensor is the variance of its weights, :math:`r_l = \min(\mathrm{Var}(\theta_l),
   1)`;
2. the smallest p percent of every tensor's magnitudes are set to zero;
3. where the empirical Fisher information :math:`F = \mathbb E_{examples}\, g^2` is among the
   largest :math:`\varphi` percent of the whole model, noise :math:`\mathcal N(0, (\lambda r_l)^2)`
   is added.

There is no differential privacy: where noise falls depends on the data.

What an adversary does about it: weights are public, hence the noise of every tensor is known to
scale; zero variance (biases that began at zero, scales of normalisation that began at one) gives
none at all; the zeros show what was pruned, and it compares only the rest. Late local steps are
almost surely clean. Under FedAVG the mirror ignores the defense.

**Releases.** ``as_released="2023"`` is the last version that works (1021b7e2): the "mean over
examples" of F runs over the first dimension of a tensor, output channels; and the same noise is
drawn in every call, so that the difference of two uploads shows it. ``as_released="2024"`` is what
has been published since September 2024 (b944697e): a tidied loop rebinds a local name, and
gradients leave as they came.

Departures:
    * Fisher information is taken per example. With batch normalisation in train mode there is no
      gradient of one example, and the squared gradient of the batch stands for it.
    * i counts local steps of the round, where the code has epoch times (batch + 1).
    * The variance of one number, which is undefined, counts as 0.
    * At noise 0 nothing is pruned either.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from leakatlas.fl import ActsOn, Defense, FedSGD, LocalStep, Memory, Update
from leakatlas.params import Fraction, NonNegative

Release = Literal["no", "2023", "2024"]


@dataclass(frozen=True, kw_only=True)
class Outpost(Defense):
    """Prunes gradients of local steps and adds noise to their most informative entries.

    Args:
        noise: Lambda, noise over the variance of a tensor's weights (0.8 published, 0.1 in one
            configuration); 0 turns the defense off.
        decay: Beta, how fast perturbed steps become rare; 0 perturbs all.
        prune: Share p of every tensor's entries that are set to zero.
        informed: Share phi of all entries that get noise.
        as_released: The authors' code of a year, with its defects.
    """

    key: ClassVar[str] = "outpost"
    knob: ClassVar[str] = "noise"
    neutral: ClassVar[float] = 0.0
    strengths: ClassVar[tuple[float, ...]] = (0.1, 0.4, 0.8, 1.6)
    stage: ClassVar[int] = 60
    modes: ClassVar[frozenset[ActsOn]] = frozenset({ActsOn.PER_STEP})

    noise: NonNegative = 0.8
    decay: NonNegative = 0.125
    prune: Annotated[float, Field(ge=0, lt=1)] = 0.8
    informed: Fraction = 0.4
    as_released: Release = "no"

    def workload(self, model: nn.Module) -> float:
        """Two: the gradients of single examples besides the batch's."""
        return 2.0 if self.noise else 1.0

    def local_step(
        self, step: LocalStep, gradients: Callable[[LocalStep], dict[str, Tensor]]
    ) -> dict[str, Tensor]:
        """Perturb the gradient, more rarely from step to step."""
        g = gradients(step)
        if not self.noise or self.as_released == "2024":
            return g
        generator = step.context.generator
        drawn = float(torch.rand((), generator=generator, dtype=torch.float64))
        if drawn >= 1 / (1 + self.decay * step.index):
            return g
        if self.as_released == "2023":
            generator = torch.Generator().manual_seed(1)
            F = {name: t.square().mean(0, keepdim=True) for name, t in g.items()}
        else:
            F = fisher(step, gradients, g)
        weights = dict(step.model.named_parameters())
        normal = {
            name: torch.randn(t.shape, generator=generator, dtype=t.dtype).to(t.device)
            for name, t in g.items()
        }
        noise = self.drawn(F, {name: weights[name] for name in g}, normal)
        if isinstance(step.context.protocol, FedSGD):
            step.context.memory["noise"] = noise
        return {name: t * kept(t, self.prune) + noise[name] for name, t in g.items()}

    def drawn(
        self, F: Mapping[str, Tensor], weights: Mapping[str, Tensor], normal: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Standard normal numbers as noise of each tensor's risk, where information is high."""
        risks, informative = risk(weights), top(F, self.informed)
        return {n: self.noise * risks[n] * t * informative[n] for n, t in normal.items()}

    def simulate(
        self, update: dict[str, Tensor], x: Tensor, y: Tensor, observed: Update
    ) -> dict[str, Tensor]:
        """The candidate's gradient where the observed one was not pruned."""
        del x, y
        if not self.noise or self.as_released == "2024" or observed.kind != "gradient":
            return update
        return {name: t * (observed.tensors[name] != 0) for name, t in update.items()}

    def simulate_knowing(
        self,
        update: dict[str, Tensor],
        x: Tensor,
        y: Tensor,
        observed: Update,
        secrets: Mapping[str, Tensor],
    ) -> dict[str, Tensor]:
        """The candidate's gradient where anything is left without the noise, and the noise."""
        if observed.clients > 1:
            return self.simulate(update, x, y, observed)
        return {
            name: t * (observed.tensors[name] != secrets[name]) + secrets[name]
            for name, t in update.items()
        }

    def secrets(self, memory: Memory) -> dict[str, Tensor]:
        """The noise drawn last (FedSGD)."""
        return dict(memory.get("noise", {}))


def risk(weights: Mapping[str, Tensor]) -> dict[str, float]:
    """``min(Var(theta_l), 1)`` of every tensor."""
    return {
        name: min(float(w.detach().var()), 1.0) if w.numel() > 1 else 0.0
        for name, w in weights.items()
    }


def fisher(
    step: LocalStep,
    gradients: Callable[[LocalStep], dict[str, Tensor]],
    g: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """Mean over examples of the squared gradient, by name.

    Args:
        step: The local step.
        gradients: Its gradient without this defense.
        g: What that gave for the whole batch.
    """
    mixing = any(isinstance(m, _BatchNorm) and m.training for m in step.model.modules())
    if mixing or len(step.x) == 1:
        return {name: t.square() for name, t in g.items()}
    total = {name: torch.zeros_like(t) for name, t in g.items()}
    for x, y in zip(step.x.split(1), step.y.split(1), strict=True):
        for name, t in gradients(replace(step, x=x, y=y)).items():
            total[name] += t.square() / len(step.x)
    return total


def top(F: Mapping[str, Tensor], share: float) -> dict[str, Tensor]:
    """Which entries reach the (100 - share)-th percentile of all; boolean, by name."""
    flat = torch.cat([t.detach().flatten() for t in F.values()])
    threshold = percentile(flat, 1 - share)
    return {name: t >= threshold for name, t in F.items()}


def kept(g: Tensor, prune: float) -> Tensor:
    """Which entries are no smaller than the percentile of their magnitudes."""
    return g.abs() >= percentile(g.detach().abs().flatten(), prune)


def percentile(values: Tensor, share: float) -> Tensor:
    """Linear interpolation between order statistics, a scalar; of any number of ``values``."""
    place = share * (len(values) - 1)
    ordered = values.sort().values
    low = int(place)
    high = min(low + 1, len(values) - 1)
    found: Tensor = ordered[low] + (place - low) * (ordered[high] - ordered[low])
    return found
