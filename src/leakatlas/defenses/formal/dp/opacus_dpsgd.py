r"""Opacus' DP-SGD (``PrivacyEngine.make_private``) in every local step, by Opacus' own optimizer.

Abadi et al., "Deep Learning with Differential Privacy", CCS 2016, as shipped in Opacus 1.6: every
example's gradient is scaled to norm C at most, with :math:`C / (\lVert g_i \rVert + 10^{-6})`, and

.. math:: \tilde g = \frac 1B \Bigl(\sum_i \hat g_i + \mathcal N(0, z^2 C^2)\Bigr) .

Gradients of examples, clipping, noise and scaling are those of ``opacus.GradSampleModule`` and
``opacus.optimizers.DPOptimizer``; the local optimizer takes the step with what comes out. The unit
is one example. :mod:`.client_dp` states the same mechanism by itself, with decay, layers and
updates.

What an adversary does about it: with one example the clip is a factor and the noise has a mean of
zero; with more, the clipped mean is a mixture whose weights it does not know.

Departures:
    * Opacus has no defaults for noise and norm; these are ours.
    * Batches are those of the protocol, of a fixed size, where ``make_private`` draws Poisson
      samples by default; no amplification may be claimed.
    * Buffers are withheld, as models with running statistics are refused by Opacus anyway.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from leakatlas.defenses.formal.dp import _accounting
from leakatlas.defenses.formal.dp._examples import per_example_gradients
from leakatlas.defenses.formal.dp._mechanism import clip
from leakatlas.fl import (
    ActsOn,
    ClientContext,
    Defense,
    FedSGD,
    LocalStep,
    Memory,
    Trait,
    Update,
)
from leakatlas.params import NonNegative, Positive


@dataclass(frozen=True, kw_only=True)
class OpacusDPSGD(Defense):
    """Per-example clipping and noise by Opacus, in every local step.

    Args:
        noise_multiplier: z; 0 turns the defense off.
        max_grad_norm: C.
    """

    key: ClassVar[str] = "opacus_dpsgd"
    knob: ClassVar[str] = "noise_multiplier"
    neutral: ClassVar[float] = 0.0
    strengths: ClassVar[tuple[float, ...]] = (0.01, 0.1, 1.0)
    stage: ClassVar[int] = 30
    modes: ClassVar[frozenset[ActsOn]] = frozenset({ActsOn.PER_STEP})
    traits: ClassVar[frozenset[Trait]] = frozenset({Trait.DP_NOISE, Trait.EXAMPLE_DP})

    noise_multiplier: NonNegative = 1.0
    max_grad_norm: Positive = 1.0

    def active_traits(self) -> frozenset[Trait]:
        """None while it is off."""
        return self.traits if self.noise_multiplier else frozenset()

    def workload(self, model: nn.Module) -> float:
        """Two: gradients of single examples."""
        return 2.0 if self.noise_multiplier else 1.0

    def epsilon(self, *, steps: int, delta: float) -> float:
        """Epsilon of one example after so many steps, without any amplification."""
        return _accounting.epsilon(self.noise_multiplier, steps=steps, delta=delta)

    def local_step(
        self, step: LocalStep, gradients: Callable[[LocalStep], dict[str, Tensor]]
    ) -> dict[str, Tensor]:
        """Opacus' ``DPOptimizer.pre_step`` on the gradients of the step's examples."""
        if not self.noise_multiplier:
            return gradients(step)
        from opacus.optimizers import DPOptimizer

        protocol = step.context.protocol
        summed = isinstance(protocol, FedSGD) and protocol.reduction == "sum"
        each = per_example_gradients(step, "sum" if summed else "mean", self.key)
        leaves: dict[str, Any] = {
            name: nn.Parameter(torch.zeros_like(g[0], device="cpu")) for name, g in each.items()
        }
        for name, leaf in leaves.items():
            # Where Opacus' hooks put it; on the CPU, whose generator draws the noise.
            leaf.grad_sample = each[name].cpu()
        optimizer = DPOptimizer(
            torch.optim.SGD(leaves.values(), lr=1.0),
            noise_multiplier=self.noise_multiplier,
            max_grad_norm=self.max_grad_norm,
            expected_batch_size=len(step.x),
            loss_reduction="sum" if summed else "mean",
            generator=step.context.generator,
        )
        optimizer.pre_step()
        divisor = 1 if summed else len(step.x)
        made, noise = {}, {}
        for name, leaf in leaves.items():
            made[name] = leaf.grad.detach().to(each[name].device)
            noise[name] = made[name] - leaf.summed_grad.detach().to(made[name]) / divisor
        if isinstance(protocol, FedSGD):
            step.context.memory["noise"] = noise
        return made

    def update(self, update: Update, context: ClientContext) -> Update:
        """Withhold buffers."""
        del context
        return replace(update, buffers_after={}) if self.noise_multiplier else update

    def simulate(
        self, update: dict[str, Tensor], x: Tensor, y: Tensor, observed: Update
    ) -> dict[str, Tensor]:
        """The clipping of one example; of more, the update as it is."""
        del y
        one = observed.kind == "gradient" and len(x) == 1 and observed.clients == 1
        if not self.noise_multiplier or not one:
            return update
        return clip(update, self.max_grad_norm, "flat")

    def simulate_knowing(
        self,
        update: dict[str, Tensor],
        x: Tensor,
        y: Tensor,
        observed: Update,
        secrets: Mapping[str, Tensor],
    ) -> dict[str, Tensor]:
        """The same, and the very noise."""
        mirrored = self.simulate(update, x, y, observed)
        if observed.clients > 1 or observed.kind != "gradient":
            return mirrored
        return {name: t + secrets[name] for name, t in mirrored.items()}

    def secrets(self, memory: Memory) -> dict[str, Tensor]:
        """The noise drawn last, as it stands in the upload (FedSGD)."""
        return dict(memory.get("noise", {}))
