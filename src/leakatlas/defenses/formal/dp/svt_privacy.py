r"""NVFlare's ``SVTPrivacy``: the sparse vector technique on changes of weights.

As shipped in NVFlare 2.9 (``nvflare.app_common.filters``). Of P changes per local step, truncated
to :math:`[-\gamma, \gamma]`, :math:`n = \lceil f P \rceil` are sent:

1. a threshold is drawn, :math:`\tau + \mathrm{Lap}(\gamma / \varepsilon_1)`;
2. passes over all entries accept those with :math:`|d| + \mathrm{Lap}(2 \gamma n / \varepsilon_2)`
   above it, until n are accepted;
3. n of the accepted are drawn, with replacement, and sent with noise
   :math:`\mathrm{Lap}(2 \gamma n / \varepsilon_3)`; all other entries are zero.

By default :math:`\varepsilon_1 : \varepsilon_2 = 1 : (2n)^{2/3}` of a sum ``epsilon``, and
:math:`\varepsilon_3 = n \cdot` ``noise_var``, for which no number in the configuration stands:
NVFlare's own accountant adds it up to **0.1 + 0.01 P a round** at the shipped settings (70,333 for
seven million weights). Noise of scale :math:`2 \gamma / 0.1` is 20 times the largest change that is
left, so that what is sent is noise almost entirely: the upload protects, and teaches nothing.

Besides, the pass that reaches n accepts every entry above the threshold, some five times n at the
shipped settings, where the technique's budget is for n.

What an adversary does about it: it compares where anything was sent.

Departures:
    * A FedSGD upload is a gradient; the filter sees the change :math:`-\eta g`.
    * The filter is told T by the trainer and takes 1 if it is not; here T is known.
    * At gamma = infinity, where its noise has no scale, the filter is off.
    * Sampling from accepted entries goes tensor by tensor in NVFlare, with counts whose joint law
      is that of drawing from all at once, as it is done here.
    * Buffers stay as they are; scalars are sent as they are, as in NVFlare.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from leakatlas.fl import ActsOn, ClientContext, Defense, Memory, Trait, Update
from leakatlas.params import Fraction, NonNegative, Positive, PositiveOrInf


@dataclass(frozen=True, kw_only=True)
class SVTPrivacy(Defense):
    """Sends some truncated changes of weights, chosen by noisy comparisons, with Laplace noise.

    Args:
        gamma: Largest change of a weight per local step (1e-5 shipped); infinity turns it off.
        fraction: f, share of all entries that is sent.
        epsilon: For threshold and comparisons together.
        noise_var: Epsilon of a single sent entry; the sum over them is not ``epsilon``.
        tau: Threshold before noise.
        replace: Whether accepted entries are drawn with replacement.
    """

    key: ClassVar[str] = "svt_privacy"
    knob: ClassVar[str] = "gamma"
    neutral: ClassVar[float] = float("inf")
    strengths: ClassVar[tuple[float, ...]] = (1e-3, 1e-5)
    stage: ClassVar[int] = 60
    modes: ClassVar[frozenset[ActsOn]] = frozenset({ActsOn.PER_UPDATE})
    traits: ClassVar[frozenset[Trait]] = frozenset({Trait.DP_NOISE})

    gamma: PositiveOrInf = 1e-5
    fraction: Fraction = 0.1
    epsilon: Positive = 0.1
    noise_var: Positive = 0.1
    tau: NonNegative = 1e-6
    replace: bool = True

    def active_traits(self) -> frozenset[Trait]:
        """None while it is off."""
        return self.traits if self.gamma != float("inf") else frozenset()

    def uploaded(self, entries: int) -> int:
        """How many of so many entries are sent, n."""
        return min(math.ceil(entries * self.fraction), entries)

    def spent(self, entries: int, *, rounds: int = 1) -> float:
        """Epsilon by NVFlare's accountant: pure composition of all three phases."""
        return rounds * (self.epsilon + self.uploaded(entries) * self.noise_var)

    def update(self, update: Update, context: ClientContext) -> Update:
        """Send the chosen entries."""
        if self.gamma == float("inf"):
            return update
        names = [name for name, t in update.tensors.items() if t.dim()]
        parts = [update.tensors[name] for name in names]
        unit = context.change_unit(update)
        flat = torch.cat([t.flatten() for t in parts]) / unit
        generator = context.generator

        def laplace(scale: float, size: int) -> Tensor:
            # Zero has no logarithm; the smallest positive number of float64 is far beyond 2^-53.
            drawn = torch.rand(size, generator=generator, dtype=torch.float64) - 0.5
            inner = (1 - 2 * drawn.abs()).clamp(min=torch.finfo(torch.float64).tiny)
            return (-scale * drawn.sign() * inner.log()).to(flat)

        def choose(accepted: Tensor, size: int) -> Tensor:
            if self.replace:
                drawn = torch.randint(len(accepted), (size,), generator=generator)
            else:
                drawn = torch.randperm(len(accepted), generator=generator)[:size]
            return accepted[drawn.to(accepted.device)]

        sent = self.released(flat, laplace, choose)
        noise = (sent - flat.clamp(-self.gamma, self.gamma)) * (sent != 0)
        sizes = [t.numel() for t in parts]

        def shaped(vector: Tensor) -> dict[str, Tensor]:
            pieces = (unit * vector).split(sizes)
            return {n: p.reshape(t.shape) for n, t, p in zip(names, parts, pieces, strict=True)}

        context.memory["noise"] = {f"noise/{name}": t for name, t in shaped(noise).items()}
        context.memory["noise"]["bound"] = torch.tensor(unit * self.gamma, dtype=torch.float64)
        return update.with_tensors({**update.tensors, **shaped(sent)})

    def released(
        self,
        d: Tensor,
        laplace: Callable[[float, int], Tensor],
        choose: Callable[[Tensor, int], Tensor],
    ) -> Tensor:
        """What is sent of changes ``(P,)``.

        Args:
            d: Per local step.
            laplace: Noise of a scale, so many of it.
            choose: So many of given positions.
        """
        n = self.uploaded(len(d))
        sent = torch.zeros_like(d)
        if n == 0:
            return sent
        ratio = (2 * n) ** (2 / 3)
        threshold_share = self.epsilon / (1 + ratio)
        truncated = d.clamp(-self.gamma, self.gamma)
        threshold = self.tau + laplace(self.gamma / threshold_share, 1)[0]
        query = self.gamma * 2 * n / (self.epsilon - threshold_share)
        accepted = torch.zeros(len(d), dtype=torch.bool, device=d.device)
        while int(accepted.sum()) < n:
            rest = (~accepted).nonzero()[:, 0]
            above = truncated[rest].abs() + laplace(query, len(rest)) >= threshold
            accepted[rest[above]] = True
        chosen = choose(accepted.nonzero()[:, 0], n)
        noisy = truncated[chosen] + laplace(2 * self.gamma / self.noise_var, n)
        # Of an entry that is drawn twice the last draw stays, as in the release; a GPU would write
        # either.
        turns = torch.arange(n, device=d.device)
        last = torch.zeros_like(sent, dtype=torch.int64).scatter_reduce(0, chosen, turns, "amax")
        stays = last[chosen] == turns
        sent[chosen[stays]] = noisy[stays]
        return sent

    def simulate(
        self, update: dict[str, Tensor], x: Tensor, y: Tensor, observed: Update
    ) -> dict[str, Tensor]:
        """The candidate's update where anything was sent."""
        del x, y
        if self.gamma == float("inf"):
            return update
        return {name: v * (observed.tensors[name] != 0) for name, v in update.items()}

    def secrets(self, memory: Memory) -> dict[str, Tensor]:
        """The noise on what was sent, and the bound of truncation, in units of the upload."""
        return dict(memory.get("noise", {}))

    def simulate_knowing(
        self,
        update: dict[str, Tensor],
        x: Tensor,
        y: Tensor,
        observed: Update,
        secrets: Mapping[str, Tensor],
    ) -> dict[str, Tensor]:
        """The candidate's truncated entries where anything was sent, and the very noise."""
        if observed.clients > 1:
            return self.simulate(update, x, y, observed)
        bound = float(secrets["bound"])
        return {
            name: v.clamp(-bound, bound) * (observed.tensors[name] != 0) + secrets[f"noise/{name}"]
            if f"noise/{name}" in secrets
            else v
            for name, v in update.items()
        }
