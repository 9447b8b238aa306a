r"""SPEAR: the rank of a ReLU layer's gradient counts the batch, its sparsity separates it.

Dimitrov, Baader, Müller and Vechev, "SPEAR: Exact Gradient Inversion of Batches in Federated
Learning", NeurIPS 2024. FedSGD, one round, passive. The first linear layer reads the b inputs
X (n, b) as Z = W X + beta 1^T, is followed by a ReLU, and D = dL/dZ:

.. math:: G_W = D X^T = L R, \qquad G_b = D 1, \qquad D = L Q, \quad X^T = Q^{-1} R .

1. b is the rank of G_W; a thin singular value decomposition gives L (m, b) and R (b, n). One
   invertible Q (b, b) is missing.
2. The ReLU makes about half of every column of D zero. If the b - 1 rows A of a sample all lie on
   zeros of column i, the kernel of L[A] is the direction q_i. Row sets are drawn uniformly, many
   at once; q is kept if a share tau of L q is zero, which wrong directions hardly ever reach.
3. Greedy 1: the sparsest b independent directions.
4. Scale: L Q diag(s) 1 = G_b, so s = Q^{-1} L^+ G_b.
5. *Consistency score* lambda: the share of the m b entries with [D != 0] = [Z > 0].
6. Greedy 2: exchange directions for unused ones while lambda rises; else draw on.

lambda = 1 is the certificate: the attack itself knows whether the batch is exact. Anything below
ends as ``failed``, with lambda in the notes. A direction is hit with probability about 2^-(b-1),
so :func:`expected_samples` row sets are needed; batches beyond about 24 are out of reach.

Scale, sign, reduction and learning rate cancel, so the weight change of a single SGD step is as
good as its gradient. Two equal inputs share one column and come back as one.

Departures:
    - L holds the left singular vectors as they are (the paper splits the singular values between
      both factors); any factorisation has its own Q, and this one is the best conditioned.
    - A kept direction is computed again from *all* of its zeros, so its accuracy does not depend
      on the b - 1 rows that happened to find it.
    - Row sets come b at a time, as the kernels in the inverse of b rows (:func:`draw`), and b rows
      at a time as the pieces of one permutation. Each set is uniform, as in the paper; those of
      one piece depend on one another, which costs about half of them and saves ten times as much.
    - The paper sets tau by a false rejection rate; here it is one share, counted among the rows
      that some input excites. Inputs in [0, 1] leave many rows dead and the others mostly active:
      with tau = 0.3 their directions are missed, with 0.2 they are found.
    - Entries of D that are neither rounding nor clearly above it agree with any Z.
    - The number of row sets is bounded.
    - Behind convolutions the paper attacks a later layer and adds feature inversion; here the
      layer must read the input itself.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar, Self

import torch
from torch import Tensor, nn

from leakatlas.attacks.api import Attack, Outlook, Reconstruction, attack, nothing_found
from leakatlas.blocks import readout
from leakatlas.blocks.watch import Watch
from leakatlas.errors import UnsupportedModel
from leakatlas.fl import View
from leakatlas.models.structure import example_input, hooked, in_mode
from leakatlas.params import Fraction, OpenFraction, PositiveInt
from leakatlas.threat import Knowledge

CACHED = 2_048
"""Kernels tested at once, so that their products with a few rows stay in a core's cache."""

LARGEST_POOL = 512
"""Directions kept, the sparsest ones; small batches show thousands of useless ones."""

TRIED = 64
"""Unused directions, the sparsest ones, that the second greedy stage tries."""


@dataclass(frozen=True)
class Precision:
    """What rounding of the observed gradient allows to tell apart.

    Args:
        rank: A singular value below this share of the largest is rounding.
        zero: An entry of L q below this share of the largest is zero.
        same: Two directions whose cosine is within this of 1 are one.
        certified: The consistency score from which a result counts as exact.
    """

    rank: float
    zero: float
    same: float
    certified: float

    @classmethod
    def of(cls, dtype: torch.dtype) -> Precision:
        """For a gradient that arrived in ``dtype``."""
        if dtype == torch.float64:
            return cls(rank=1e-13, zero=1e-7, same=1e-9, certified=1.0)
        return cls(rank=1e-6, zero=1e-4, same=1e-6, certified=0.999)


@attack("spear", needs=Knowledge.UPDATES)
@dataclass(frozen=True, kw_only=True)
class SPEAR(Attack):
    """Sampled row sets, two greedy stages, and a certificate.

    Args:
        samples: Most row sets that are drawn; :func:`expected_samples` says how many a batch needs.
        chunk: Row sets drawn and tested at once (paper: 10,000).
        sparsity: tau, the share of zeros, among the rows that any input excites, from which a
            direction is kept.
        certificate: The score lambda from which a result counts as exact; None for 1 if the
            gradient came in float64 and 0.999 otherwise.
    """

    departs_from_letter = (
        "The update and the model suffice: the pixel space (BASIC) is never read, so letter A "
        "would do."
    )

    version: ClassVar[int] = 3

    samples: PositiveInt = 20_000_000
    chunk: PositiveInt = 10_000
    sparsity: OpenFraction = 0.2
    certificate: Fraction | None = None

    @classmethod
    def tuned(cls) -> Self:
        """A bound of about a minute on one core."""
        return cls(samples=10_000_000)

    def outlook(self, view: View) -> Outlook:
        """Rank against width, activation, and the expected number of row sets."""
        try:
            layer = input_layer(view.model, view.input_shape)
        except UnsupportedModel as problem:
            return Outlook("hopeless", str(problem))
        b, (m, n) = view.num_examples, layer.shape
        if not layer.relu:
            return Outlook(
                "hopeless",
                f"{layer.name} is not followed by a ReLU module, so its gradient is not sparse",
            )
        if b >= min(m, n):
            return Outlook(
                "hopeless",
                f"{b} examples leave no rank to read in the {m}x{n} gradient of {layer.name}",
            )
        needed = expected_samples(b)
        if needed > self.samples:
            return Outlook(
                "unknown",
                f"{b} examples need about {needed:.1e} row sets, samples={self.samples:.1e} allow "
                "fewer",
            )
        if view.rounds and view.update.kind != "gradient":
            return Outlook("unknown", "exact for one local step only; more steps blur the rank")
        return Outlook(
            "applicable",
            f"rank {b} < {min(m, n)}, about {needed:.1e} row sets; normalised inputs separate "
            "better than inputs in [0, 1]",
        )

    def run(self, view: View, *, generator: torch.Generator, watch: Watch) -> Reconstruction:
        """Factorise, sample, select, certify."""
        shape = tuple(view.input_shape)
        layer = input_layer(view.model, shape)
        update, state = view.update, view.rounds[-1].state
        missing = [name for name in (layer.weight, layer.bias) if name not in update.tensors]
        if missing:
            return nothing_found(shape, f"the update lacks {missing[0]}")
        sent = readout.sent_change(update, state, layer.weight)
        precision = Precision.of(sent.dtype)
        factors = factorise(
            sent.double(),
            readout.sent_change(update, state, layer.bias).double(),
            state[layer.weight].double(),
            state[layer.bias].double(),
            most=view.num_examples,
            precision=precision,
        )
        if factors is None:
            return nothing_found(shape, f"the gradient of {layer.name} is zero")
        notes = {"rank": float(factors.b), "examples": float(view.num_examples)}
        if factors.b >= min(layer.shape):
            return nothing_found(
                shape,
                f"the {layer.shape[0]}x{layer.shape[1]} gradient of {layer.name} has full rank "
                f"{factors.b}; a batch of fewer than {min(layer.shape)} inputs is needed",
                **notes,
            )
        pool = Pool(factors, precision, self.sparsity)
        best: Choice | None = None
        drawn = 0
        enough = precision.certified if self.certificate is None else self.certificate
        for step in watch.steps(math.ceil(self.samples / self.chunk)):
            count = min(self.chunk, self.samples - step.index * self.chunk)
            drawn += count
            if pool.add(draw(factors.alive, factors.b, count, generator)):
                best = better(best, choose(factors, pool, precision))
            if best is not None and best.score >= enough:
                break
            if factors.b == 1:  # one direction is all there is
                break
            score = 0.0 if best is None else best.score
            watch.note = f"{len(pool.directions)} directions, lambda {score:.3f}"
        notes["samples"] = float(drawn)
        notes["samples_over_theory"] = drawn / expected_samples(factors.b)
        notes["directions"] = float(len(pool.directions))
        notes["lambda"] = 0.0 if best is None else best.score
        if best is None:
            return nothing_found(
                shape,
                f"{drawn} row sets showed {len(pool.directions)} sparse directions, not the "
                f"{factors.b} independent ones that a batch of rank {factors.b} has"
                + ("" if layer.relu else f"; {layer.name} is not followed by a ReLU"),
                **notes,
            )
        weak = f"lambda = {best.score:.4f} < {enough:g}: not the batch"
        return Reconstruction(
            images=best.x.reshape(-1, *shape).to(sent),
            confidence=best.per_input,
            notes=notes,
        ).or_failed(weak if best.score < enough else "")


# -- the layer -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class InputLayer:
    """The linear layer that reads the input.

    Args:
        name: Module name.
        shape: ``(m, n)``.
        relu: Whether the module executed right after it is a ReLU.
    """

    name: str
    shape: tuple[int, int]
    relu: bool

    @property
    def weight(self) -> str:
        """Parameter name of W."""
        return f"{self.name}.weight" if self.name else "weight"

    @property
    def bias(self) -> str:
        """Parameter name of beta."""
        return f"{self.name}.bias" if self.name else "bias"


def input_layer(model: nn.Module, shape: tuple[int, ...]) -> InputLayer:
    """The linear layer whose input is the flattened image itself.

    The model is run once in eval mode on zeros; layers behind it do not matter.

    Raises:
        UnsupportedModel: If there is none, or it has no bias.
    """
    names = {module: name for name, module in model.named_modules()}
    example = example_input(model, shape)
    order: list[tuple[nn.Module, Tensor]] = []

    def note(module: nn.Module, inputs: tuple[object, ...], output: object) -> None:
        del output
        if inputs and isinstance(inputs[0], Tensor):
            order.append((module, inputs[0]))

    leaves = [m for m in model.modules() if not list(m.children())]
    with (
        in_mode(model, train=False),
        hooked(leaves, note),
        torch.no_grad(),
        torch.random.fork_rng(devices=[]),
    ):
        model(example)
    for position, (module, given) in enumerate(order):
        if not isinstance(module, nn.Linear):
            continue
        if given.data_ptr() != example.data_ptr() or given.numel() != example.numel():
            break
        if module.bias is None:
            raise UnsupportedModel(
                f"SPEAR takes the scale of every input from the bias gradient; {names[module]!r} "
                "has no bias."
            )
        after = order[position + 1][0] if position + 1 < len(order) else None
        return InputLayer(
            names[module], (module.out_features, module.in_features), isinstance(after, nn.ReLU)
        )
    raise UnsupportedModel(
        f"SPEAR reads a linear layer that is fed the input itself; the first linear layer of "
        f"{type(model).__name__} comes behind others."
    )


# -- factors ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Factors:
    """G_W = L R and what the scale and the score need.

    Args:
        left: L ``(m, b)``, orthonormal columns.
        right: R ``(b, n)``.
        images_of_right: W R^T ``(m, b)``, so that ``Z = (W R^T) Q^{-T} + beta``.
        beta: The layer's bias ``(m,)``.
        scale: L^T G_b ``(b,)``.
        alive: L's rows that some input excites ``(m', b)``.
    """

    left: Tensor
    right: Tensor
    images_of_right: Tensor
    beta: Tensor
    scale: Tensor
    alive: Tensor

    @property
    def b(self) -> int:
        """The batch size."""
        return self.left.shape[1]


def factorise(
    g_w: Tensor, g_b: Tensor, weight: Tensor, beta: Tensor, *, most: int, precision: Precision
) -> Factors | None:
    """Steps 1 and 4's constants; None if the gradient is zero.

    Args:
        g_w: ``(m, n)`` float64.
        g_b: ``(m,)``.
        weight: W ``(m, n)``.
        beta: ``(m,)``.
        most: The batch size that the client states, which bounds the rank.
        precision: Of the gradient.
    """
    if not bool(g_w.any()):
        return None
    u, s, vh = torch.linalg.svd(g_w, full_matrices=False)
    b = numerical_rank(s, floor=precision.rank, most=most)
    left, right = u[:, :b], s[:b, None] * vh[:b]
    size = left.norm(dim=1)
    alive = left[size > precision.zero * size.max()]
    return Factors(left, right, weight @ right.T, beta, left.T @ g_b, alive)


def numerical_rank(s: Tensor, *, floor: float, most: int) -> int:
    """Where falling singular values ``(k,)`` have their largest gap.

    Args:
        s: Falling.
        floor: Values below this share of the largest are rounding, and all alike.
        most: An upper bound.
    """
    relative = (s / s[0]).clamp(min=floor)
    following = torch.cat([relative[1:], relative.new_tensor([floor])])
    gaps = (relative / following)[:most]
    return int(gaps.argmax()) + 1


# -- directions ------------------------------------------------------------------------------------


def draw(alive: Tensor, b: int, count: int, generator: torch.Generator) -> Tensor:
    """Kernels of ``count`` row sets of b - 1, unit vectors ``(M, b)``, M <= count.

    b rows hold b such sets, and the inverse of those rows holds all of their kernels: column j
    vanishes on every row but j. Each set is uniform among all sets, and costs one b-th of a small
    inverse. Of several that come from the same b rows, one zero pattern may serve two or more.
    Rows of deficient rank are left out.

    Args:
        alive: L ``(m', b)``.
        b: Rank.
        count: Row sets.
        generator: Randomness.
    """
    if b == 1:
        return alive.new_ones(1, 1)
    m, systems = len(alive), math.ceil(count / b)
    pieces = m // b
    if pieces == 0:
        return alive.new_zeros(0, b)
    order = torch.rand(math.ceil(systems / pieces), m, generator=generator).argsort(dim=1)
    rows = order[:, : pieces * b].reshape(-1, b)[:systems].to(alive.device)
    inverse, info = torch.linalg.inv_ex(alive[rows])
    q = inverse[info == 0].transpose(1, 2).reshape(-1, b)[:count]
    q = q[torch.isfinite(q).all(dim=1)]
    unit: Tensor = q / q.norm(dim=1, keepdim=True)
    return unit


def zeros_of(left: Tensor, q: Tensor, tolerance: float) -> Tensor:
    """Which entries of L q vanish, ``(M, m)``, relative to the largest of each direction."""
    size = (q @ left.T).abs()
    return size <= tolerance * size.amax(dim=1, keepdim=True)


@dataclass
class Pool:
    """The sparse directions found so far, unit vectors, the sparsest first.

    Args:
        factors: Of the gradient.
        precision: Of the gradient.
        sparsity: tau.
    """

    factors: Factors
    precision: Precision
    sparsity: float
    directions: Tensor = field(init=False)
    zeros: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.directions = self.factors.alive.new_zeros(0, self.factors.b)
        self.zeros = torch.zeros(0, dtype=torch.int64, device=self.factors.alive.device)

    def add(self, q: Tensor) -> bool:
        """Keep the new sparse directions among ``q`` ``(M, b)``; whether there were any."""
        alive, zero = self.factors.alive, self.precision.zero
        b = self.factors.b
        # A kernel vanishes on its own b - 1 rows, so only more than those say anything.
        enough = max(self.sparsity * len(alive), b) if b > 1 else 0
        if b > 1 and len(alive) > 128:  # most are dismissed on a sixth of the rows or less
            probed = alive[:: len(alive) // 64]
            passed = [
                zeros_of(probed, part, zero).mean(dim=1, dtype=torch.float32) >= self.sparsity / 2
                for part in q.split(CACHED)
            ]
            q = q[torch.cat(passed)] if passed else q
        q = q[zeros_of(alive, q, zero).sum(dim=1) >= enough]
        grown = False
        while len(q):
            polished = self._polish(q[0]) if b > 1 else q[0]
            count = zeros_of(alive, polished[None], zero).sum()
            known = self._same(self.directions, polished)
            if count >= enough and not bool(known.any()):
                grown = self._insert(polished, count) or grown
            same = self._same(q, polished)
            same[0] = True
            q = q[~same]
        return grown

    def _same(self, many: Tensor, one: Tensor) -> Tensor:
        cosine: Tensor = many @ one
        return cosine.abs() > 1 - self.precision.same

    def _polish(self, q: Tensor) -> Tensor:
        """The direction that fits all zeros of L q best, not only the rows that found it."""
        rows = zeros_of(self.factors.alive, q[None], self.precision.zero)[0]
        kernel: Tensor = torch.linalg.svd(self.factors.alive[rows])[2][-1]
        return kernel

    def _insert(self, q: Tensor, count: Tensor) -> bool:
        if len(self.zeros) == LARGEST_POOL and bool(count <= self.zeros[-1]):
            return False
        zeros = torch.cat([self.zeros, count[None]])
        order = zeros.argsort(descending=True, stable=True)[:LARGEST_POOL]
        self.directions = torch.cat([self.directions, q[None]])[order]
        self.zeros = zeros[order]
        return True


# -- choosing among them ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Choice:
    """A full set of directions and what it says.

    Args:
        score: lambda.
        per_input: Share of consistent entries of every column ``(b,)``.
        x: Inputs ``(b, n)``.
    """

    score: float
    per_input: Tensor
    x: Tensor


def better(a: Choice | None, b: Choice | None) -> Choice | None:
    """The one of higher score."""
    if a is None or b is None:
        return a or b
    return b if b.score > a.score else a


def choose(factors: Factors, pool: Pool, precision: Precision) -> Choice | None:
    """Both greedy stages; None while there are not b independent directions."""
    chosen = independent(pool.directions, factors.b, tolerance=precision.same**0.5)
    if len(chosen) < factors.b:
        return None
    unused = [i for i in range(len(pool.directions)) if i not in chosen][:TRIED]
    q = pool.directions[chosen].T  # (b, b), columns are directions
    score = float(consistency(factors, q[None], precision)[0][0])
    improved = True
    while improved and score < 1:
        improved = False
        for index in unused:
            trials = q.expand(factors.b, -1, -1).clone()
            place = torch.arange(factors.b, device=q.device)
            trials[place, :, place] = pool.directions[index]
            scores, _, _ = consistency(factors, trials, precision)
            top = int(scores.argmax())
            if float(scores[top]) > score:
                score, q, improved = float(scores[top]), trials[top], True
    scores, agreement, inverse = consistency(factors, q[None], precision)
    return Choice(float(scores[0]), agreement[0], inverse[0] @ factors.right)


def independent(directions: Tensor, b: int, *, tolerance: float) -> list[int]:
    """Indices of the first b linearly independent unit vectors of ``(P, b)``, in order."""
    basis = directions.new_zeros(0, directions.shape[1])
    chosen: list[int] = []
    for index, q in enumerate(directions):
        rest = q - (basis @ q) @ basis
        rest = rest - (basis @ rest) @ basis  # once more: rounding of nearly parallel vectors
        if float(rest.norm()) > tolerance:
            basis = torch.cat([basis, (rest / rest.norm())[None]])
            chosen.append(index)
            if len(chosen) == b:
                break
    return chosen


def consistency(factors: Factors, q: Tensor, precision: Precision) -> tuple[Tensor, Tensor, Tensor]:
    """Scale the columns and score them.

    Args:
        factors: Of the gradient.
        q: ``(T, b, b)``, columns up to their length.
        precision: What counts as zero in D.

    Returns:
        lambda ``(T,)``, its share per column ``(T, b)``, and Q^{-1} ``(T, b, b)``. A set that is
        singular, or in which an input has no weight, scores 0.
    """
    inverse, info = torch.linalg.inv_ex(q)
    s = inverse @ factors.scale  # (T, b)
    usable = (info == 0) & torch.isfinite(s).all(dim=1) & (s != 0).all(dim=1)
    s = torch.where(usable[:, None], s, torch.ones_like(s))
    inverse = torch.where(usable[:, None, None], inverse, torch.zeros_like(inverse))
    inverse = inverse / s[:, :, None]
    d = (factors.left @ q).abs()  # (T, m, b), each column up to a factor
    active = d > precision.zero * d.amax(dim=1, keepdim=True)
    # Between rounding and clear, an entry of D says nothing: an active neuron's may be that small,
    # above all where an input is there twice, with two labels whose deltas nearly cancel.
    unclear = ~active & (d > precision.rank * d.amax(dim=1, keepdim=True))
    z = factors.images_of_right @ inverse.transpose(1, 2) + factors.beta[:, None]
    agreement = ((active == (z > 0)) | unclear).double().mean(dim=1)
    agreement = torch.where(usable[:, None], agreement, torch.zeros_like(agreement))
    return agreement.mean(dim=1), agreement, inverse


def expected_samples(b: int) -> float:
    r"""Row sets until every direction was hit: about :math:`2^{b-1} \sum_{k \le b} 1/k`.

    Each of b directions is hit with probability 2^-(b-1) if every ReLU is off half of the time,
    independently; the sum is that of the coupon collector.
    """
    return 2.0 ** (b - 1) * sum(1 / k for k in range(1, b + 1))
