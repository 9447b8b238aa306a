r"""CENSOR (Zhang et al., NDSS 2025): send a gradient that is orthogonal to the true one.

For every tensor of the batch gradient, in each of K trials:

1. draw :math:`r \sim \mathcal N(0, I)`, and take off its part along g,
   :math:`o = r - \frac{\langle r, g\rangle}{\lVert g\rVert^2} g`;
2. give it the length of g: :math:`o \leftarrow o \, \lVert g\rVert / \lVert o\rVert`;
3. evaluate the loss of the batch at :math:`\theta - \alpha o`.

The trial of lowest loss is sent (the limit of a cold posterior). To first order no trial changes
the loss at all; training lives on the luck of K draws, and on rounds without the defense.

What an adversary does about it: every tensor gives two equations, its gradient's length and that
it is orthogonal to what was sent; so it takes the part along its own candidate off the
*observation* and compares what is left with it. And it attacks unprotected rounds.

Departures:
    * ``mix`` is ours: :math:`\lambda o + (1 - \lambda) g`, for a curve; 1 is the paper's.
    * The release (``as_released``) divides by the norm and not by its square, so that o is
      orthogonal to gradients of norm 1 only, and more and more parallel to larger ones; and if no
      trial lowers the loss of the unchanged model, it sends the raw gradient. What was sent is
      counted in the client's memory.
    * A tensor with one entry has no orthogonal direction; it sends 0, as does a zero gradient.
    * As in the release the loss is evaluated in eval mode.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.func import functional_call

from leakatlas.fl import ActsOn, ClientContext, Defense, Memory, Trait, Update, model_state
from leakatlas.models.structure import in_mode
from leakatlas.params import Fraction, Positive, PositiveInt


@dataclass(frozen=True, kw_only=True)
class CENSOR(Defense):
    """Replaces every tensor of a gradient by the best of several orthogonal ones.

    Args:
        mix: Share lambda of the orthogonal gradient; the rest is the true one.
        trials: K.
        step: Alpha, at which trials are evaluated.
        rounds: Rounds at the beginning of training that are protected; all if None. (Published:
            10 epochs of 12.)
        as_released: The authors' projection and fallback.
    """

    key: ClassVar[str] = "censor"
    knob: ClassVar[str] = "mix"
    neutral: ClassVar[float] = 0.0
    strengths: ClassVar[tuple[float, ...]] = (0.5, 0.9, 1.0)
    stage: ClassVar[int] = 60
    modes: ClassVar[frozenset[ActsOn]] = frozenset({ActsOn.SINGLE_BATCH})
    traits: ClassVar[frozenset[Trait]] = frozenset({Trait.READS_BATCH})

    mix: Fraction = 1.0
    trials: PositiveInt = 20
    step: Positive = 1e-4
    rounds: PositiveInt | None = None
    as_released: bool = False

    def workload(self, model: nn.Module) -> float:
        """K forward passes, a third of a gradient each."""
        return 1.0 + self.trials / 3 if self.mix else 1.0

    def update(self, update: Update, context: ClientContext) -> Update:
        """Send the trial of lowest loss."""
        if not self.mix or (self.rounds is not None and context.round >= self.rounds):
            context.memory.pop("draws", None)
            return update
        g = update.tensors
        best, lowest, kept = None, float("inf"), None
        if self.as_released:
            lowest = self._loss(context, {name: torch.zeros_like(t) for name, t in g.items()})
        for _ in range(self.trials):
            draws = {
                name: torch.randn(t.shape, generator=context.generator, dtype=t.dtype).to(t.device)
                for name, t in g.items()
            }
            made = {n: orthogonal(draws[n], t, released=self.as_released) for n, t in g.items()}
            value = self._loss(context, made)
            if value < lowest or (best is None and not self.as_released):
                best, lowest, kept = made, value, draws
        if best is None or kept is None:
            context.memory["raw gradients sent"] = context.memory.get("raw gradients sent", 0) + 1
            context.memory.pop("draws", None)
            return update
        context.memory["draws"] = kept
        return update.with_tensors({name: self._mixed(best[name], t) for name, t in g.items()})

    def _mixed(self, o: Tensor, g: Tensor) -> Tensor:
        return o if self.mix == 1 else self.mix * o + (1 - self.mix) * g

    def _loss(self, context: ClientContext, direction: Mapping[str, Tensor]) -> float:
        """Of the batch, after a step of alpha along a direction."""
        model = context.model
        held = {name: t.detach().clone() for name, t in model_state(model).items()}
        for name, t in direction.items():
            held[name] = held[name] - self.step * t
        with in_mode(model, train=False), torch.no_grad():
            return float(
                context.protocol.loss(functional_call(model, held, (context.x,)), context.y)
            )

    def simulate(
        self, update: dict[str, Tensor], x: Tensor, y: Tensor, observed: Update
    ) -> dict[str, Tensor]:
        """What the candidate would have sent, had the draw been the observation itself.

        At the truth this equals the observation, and not only there: it is two equations a tensor.
        """
        del x, y
        if not self.mix:
            return update
        return {
            name: self._mixed(orthogonal(observed.tensors[name], g, released=False), g)
            for name, g in update.items()
        }

    def simulate_knowing(
        self,
        update: dict[str, Tensor],
        x: Tensor,
        y: Tensor,
        observed: Update,
        secrets: Mapping[str, Tensor],
    ) -> dict[str, Tensor]:
        """What the candidate would have sent with the draws that won."""
        if observed.clients > 1:
            return self.simulate(update, x, y, observed)
        return {
            name: self._mixed(orthogonal(secrets[name], g, released=self.as_released), g)
            for name, g in update.items()
        }

    def secrets(self, memory: Memory) -> dict[str, Tensor]:
        """The draws of the trial that was sent."""
        return dict(memory.get("draws", {}))


def orthogonal(r: Tensor, g: Tensor, *, released: bool) -> Tensor:
    """``r`` without its part along ``g``, as long as ``g``; differentiable in both.

    Args:
        r: Any direction, of the shape of ``g``.
        g: A gradient; where it is zero, so is the result.
        released: Divide by the norm of ``g`` where its square belongs, and normalise ``r``.
    """
    if g.numel() == 1 and not released:
        return torch.zeros_like(g)
    square = g.square().sum()
    alive = square > 0
    safe = torch.where(alive, square, torch.ones_like(square))
    if released:
        r = r / r.norm()
    along = (r * g).sum() / (safe.sqrt() if released else safe)
    o = r - along * g
    size = o.square().sum()
    size = torch.where(size > 0, size, torch.ones_like(size))
    return torch.where(alive, o * (safe / size).sqrt(), torch.zeros_like(o))
