r"""GradDefense (Wang et al., INFOCOM 2022): noise in some slices of the update, and its removal.

1. *Sensitivity* of layer l on a root set: :math:`S_l = \frac 1R \sum_i \lVert \nabla_{x_i}
   (\mathbf 1^\top \partial L / \partial \theta_l) \rVert_F`, one vector-Jacobian product a layer.
2. *Slices*: the flattened update is cut into m slices of equal total sensitivity.
3. *Noise* :math:`\mathcal N(0, s^2)` in n of the m slices, drawn anew in every round.
4. *Compensation* on the server: the mean over K clients as a matrix C of v rows and w columns,
   Q = v/w. Pure noise has the eigenvalues of :math:`C^\top C / v` within the Marchenko-Pastur band

   .. math:: \bar s^2 \, (1 \pm Q^{-1/2})^2, \qquad \bar s^2 = \frac nm \frac{s^2}{K} ,

   so that only components outside of it are kept.

There is no differential privacy: the noise has no relation to a sensitivity in its sense, and the
other slices are sent as they are.

What an adversary does about it: it knows s, and finds stretches of the upload that are nothing but
noise, which it leaves out; whatever is much larger than s, or much smaller, is as good as clean.

Departures:
    * The release (``as_released``) cuts at multiples of the greatest common divisor of the layers'
      sizes, notes border entries twice (in both slices), and puts all that is left into the last
      slice, when a single piece exceeds the mean. Here slices are cut on the cumulative
      sensitivity of single entries.
    * Its covariance is centred, the paper's is not; its matrix takes the exact divisors of the
      number of entries, which a prime number lacks. Here zeros fill the matrix up.
    * Its demo multiplies the variance by the number of clients, where averaging divides by it.
    * Noise comes from the client's own stream; the release draws it from one fixed seed.
    * The root set is standard normal noise with labels in turn, drawn from a public seed: nobody
      has to give images away, and everyone can compute the slices.
    * Under FedAVG, sensitivities are those at the end of local training. Clipping per example in
      the chosen slices, an option of the release, is left out.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.func import functional_call

from leakatlas.errors import InvalidParameter
from leakatlas.fl import (
    ActsOn,
    ClientContext,
    Defense,
    Memory,
    Message,
    ServerContext,
    Update,
    model_state,
)
from leakatlas.params import NonNegative, Positive, PositiveInt

_ROOT_SEED = 0

_WINDOW = 64
"""Entries whose sizes are held against those of noise."""


@dataclass(frozen=True, kw_only=True)
class GradDefense(Defense):
    """Gaussian noise in randomly chosen slices of equal sensitivity.

    Args:
        scale: Standard deviation s, in the units of the update (5e-4 published).
        slices: m.
        perturbed: n, how many of them get noise.
        compensate: Whether the server removes what looks like noise from the mean.
        aspect: Q, rows over columns of the matrix in which it looks.
        root: Inputs R on which sensitivities are measured.
        as_released: Slices and covariance as in the authors' code.

    Raises:
        InvalidParameter: If more slices are to be perturbed than there are.
    """

    key: ClassVar[str] = "grad_defense"
    knob: ClassVar[str] = "scale"
    neutral: ClassVar[float] = 0.0
    strengths: ClassVar[tuple[float, ...]] = (5e-4, 1e-2, 1e-1)
    stage: ClassVar[int] = 60
    modes: ClassVar[frozenset[ActsOn]] = frozenset({ActsOn.PER_UPDATE})

    scale: NonNegative = 5e-4
    slices: PositiveInt = 10
    perturbed: PositiveInt = 5
    compensate: bool = True
    aspect: Positive = 6.0
    root: PositiveInt = 4
    as_released: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.perturbed > self.slices:
            raise InvalidParameter(
                f"GradDefense(perturbed={self.perturbed}, slices={self.slices}): more slices "
                "cannot be perturbed than there are."
            )

    def workload(self, model: nn.Module) -> float:
        """A second derivative for each tensor, on the root set."""
        return 1.0 if not self.scale else 1.0 + 2.0 * len(list(model.parameters()))

    def update(self, update: Update, context: ClientContext) -> Update:
        """Add noise in the chosen slices."""
        if not self.scale:
            return update
        names = list(update.tensors)
        sizes = [update.tensors[name].numel() for name in names]
        found = sensitivity(context.model, names, *self._root_set(context), context.protocol.loss)
        cut = released_slices if self.as_released else equal_slices
        spans = cut(sizes, found, self.slices)
        chosen = torch.randperm(self.slices, generator=context.generator)[: self.perturbed]
        noise = torch.zeros(sum(sizes), dtype=torch.float64)
        for k in chosen.tolist():
            start, end = spans[k]
            drawn = torch.randn(end - start, generator=context.generator, dtype=torch.float64)
            noise[start:end] += self.scale * drawn
        parts = noise.split(sizes)
        context.memory["noise"] = {
            name: part.reshape(update.tensors[name].shape).to(update.tensors[name])
            for name, part in zip(names, parts, strict=True)
        }
        return update.with_tensors(
            {name: t + context.memory["noise"][name] for name, t in update.tensors.items()}
        )

    def _root_set(self, context: ClientContext) -> tuple[Tensor, Tensor]:
        """Inputs and targets shaped like the client's; they tell nothing of its own."""
        public = torch.Generator().manual_seed(_ROOT_SEED)
        x, y = context.x, context.y
        shape = (self.root, *x.shape[1:])
        inputs = torch.randn(shape, generator=public, dtype=x.dtype).to(x.device)
        with torch.no_grad():
            outputs = functional_call(context.model, model_state(context.model), (inputs,))
        classes = outputs.shape[-1]
        labels = torch.arange(self.root, device=y.device) % max(classes, 2)
        if y.dim() == 2:
            return inputs, nn.functional.one_hot(labels % classes, classes).to(y.dtype)
        return inputs, labels.to(y.dtype)

    def aggregate(
        self,
        messages: Mapping[int, Message],
        combine: Callable[[Mapping[int, Message]], Update],
        context: ServerContext,
    ) -> Update:
        """Take the mean and drop what has the spectrum of noise."""
        del context
        mean = combine(messages)
        if not self.scale or not self.compensate:
            return mean
        variance = self.perturbed / self.slices * self.scale**2 / len(messages)
        flat = torch.cat([t.flatten() for t in mean.tensors.values()]).double()
        kept = denoised(flat, variance, self.aspect, as_released=self.as_released)
        parts = kept.split([t.numel() for t in mean.tensors.values()])
        return mean.with_tensors(
            {
                name: part.reshape(t.shape).to(t)
                for (name, t), part in zip(mean.tensors.items(), parts, strict=True)
            }
        )

    def simulate(
        self, update: dict[str, Tensor], x: Tensor, y: Tensor, observed: Update
    ) -> dict[str, Tensor]:
        """The candidate's update, and the observed one where that is nothing but noise."""
        del x, y
        if not self.scale:
            return update
        return {
            name: torch.where(drowned(seen, self.scale), seen, update[name])
            for name, seen in observed.tensors.items()
        }

    def simulate_knowing(
        self,
        update: dict[str, Tensor],
        x: Tensor,
        y: Tensor,
        observed: Update,
        secrets: Mapping[str, Tensor],
    ) -> dict[str, Tensor]:
        """The candidate's update and the very noise."""
        if observed.clients > 1:
            return self.simulate(update, x, y, observed)
        return {name: t + secrets[name] for name, t in update.items()}

    def secrets(self, memory: Memory) -> dict[str, Tensor]:
        """The noise drawn last, zero in the slices that got none."""
        return dict(memory.get("noise", {}))


def sensitivity(
    model: nn.Module,
    names: Sequence[str],
    x: Tensor,
    y: Tensor,
    loss: Callable[[Tensor, Tensor], Tensor],
) -> list[float]:
    """``S_l`` of each named parameter; a pure function of model and root set.

    Args:
        model: In the mode of the client.
        names: Of trained parameters.
        x: ``(R, C, H, W)``.
        y: Targets.
        loss: ``(logits, y) -> scalar``.
    """
    state = {n: t.detach().clone() for n, t in model_state(model).items()}
    leaves = {name: state[name].requires_grad_() for name in names}
    x = x.detach().clone().requires_grad_()
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.default_generator.manual_seed(_ROOT_SEED)
        value = loss(functional_call(model, {**state, **leaves}, (x,)), y)
        gradients = torch.autograd.grad(
            value, list(leaves.values()), create_graph=True, allow_unused=True
        )
    found = []
    for g in gradients:
        if g is None or not g.requires_grad:
            found.append(0.0)
            continue
        (slope,) = torch.autograd.grad(g.sum(), x, retain_graph=True, allow_unused=True)
        found.append(0.0 if slope is None else float(slope.flatten(1).norm(dim=1).mean()))
    return found


def equal_slices(
    sizes: Sequence[int], sensitivities: Sequence[float], slices: int
) -> list[tuple[int, int]]:
    """Borders ``[start, end)`` of consecutive slices of equal total sensitivity.

    Every entry of a layer has the same share of the layer's; the totals differ by one entry's at
    most. Slices that would be empty (more slices than entries) are.

    Args:
        sizes: Entries of every layer.
        sensitivities: ``S_l``; equal ones if all are zero.
        slices: m.
    """
    weights = torch.tensor(list(sensitivities), dtype=torch.float64)
    counts = torch.tensor(list(sizes))
    if not bool(weights.sum() > 0):
        weights = counts.double()
    ends = (weights / counts).repeat_interleave(counts).cumsum(0)
    cuts = torch.arange(1, slices, dtype=torch.float64) * (ends[-1] / slices)
    places = [0, *torch.searchsorted(ends, cuts, right=True).tolist(), len(ends)]
    return list(itertools.pairwise(places))


def released_slices(
    sizes: Sequence[int], sensitivities: Sequence[float], slices: int
) -> list[tuple[int, int]]:
    """The same as in the authors' code: pieces of a common size, and borders counted twice."""
    piece = math.gcd(*sizes)
    pieces = [
        value / (size // piece)
        for size, value in zip(sizes, sensitivities, strict=True)
        for _ in range(size // piece)
    ]
    mean, borders, start = sum(sensitivities) / slices, [0], 0
    for _ in range(slices - 1):
        total = 0.0
        for place in range(start, len(pieces)):
            total += pieces[place]
            if total >= mean:
                start = place
                borders.append(place * piece - 1)
                break
    borders.append(len(pieces) * piece - 1)
    # What comes before the first entry is none; a slice that found no border is the last again.
    borders += [borders[-1]] * (slices + 1 - len(borders))
    return [
        (max(first, 0), max(last + 1, max(first, 0))) for first, last in itertools.pairwise(borders)
    ]


def denoised(flat: Tensor, variance: float, aspect: float, *, as_released: bool = False) -> Tensor:
    """The components of a vector whose eigenvalues lie outside the band of noise.

    Args:
        flat: ``(D,)`` float64.
        variance: Of the noise in an entry, s-bar squared.
        aspect: Rows over columns, Q.
        as_released: A centred covariance, and exact divisors of D as sides.
    """
    if as_released:
        divisors = [v for v in range(1, len(flat) + 1) if len(flat) % v == 0]
        rows = next(v for v in divisors if v >= min(len(flat), math.sqrt(aspect * len(flat))))
        columns = len(flat) // rows
    else:
        columns = max(1, int(math.sqrt(len(flat) / aspect)))
        rows = -(-len(flat) // columns)
    C = torch.cat([flat, flat.new_zeros(rows * columns - len(flat))]).reshape(rows, columns)
    covariance = torch.cov(C.T).reshape(columns, columns) if as_released else C.T @ C / rows
    values, vectors = torch.linalg.eigh(covariance)
    ratio = (columns / rows) ** 0.5
    low, high = variance * (1 - ratio) ** 2, variance * (1 + ratio) ** 2
    kept = vectors[:, (values <= low) | (values >= high)]
    rebuilt: Tensor = C @ kept @ kept.T
    return rebuilt.flatten()[: len(flat)]


def drowned(seen: Tensor, scale: float) -> Tensor:
    """Where an upload is nothing but noise of a known scale: a mask of its shape.

    Stretches of 64 entries are held against N(0, s^2): their root mean square is about s, and
    their smaller entries are no smaller than noise has them.
    """
    flat = seen.detach().flatten().abs()
    whole = -(-len(flat) // _WINDOW) * _WINDOW
    # The last stretch is filled up from the front.
    rows = flat[torch.arange(whole, device=flat.device) % len(flat)].reshape(-1, _WINDOW)
    size, middle = rows.square().mean(1).sqrt(), rows.median(1).values
    noise = (size > 0.5 * scale) & (size < 2 * scale) & (middle > 0.4 * scale)  # 0.67 in theory
    return noise.repeat_interleave(_WINDOW)[: len(flat)].reshape(seen.shape)
