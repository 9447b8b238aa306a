r"""Gradient quantisation [14]: every entry is rounded to one of a few levels before it is sent.

With :math:`b` bits a tensor has the lattice :math:`c \cdot \{-s, \dots, s\} / s`, where
:math:`s = 2^{b-1} - 1` and the scale :math:`c` is its largest magnitude (or its norm). One bit,
for which that gives no level at all, leaves :math:`\{-c, c\}`, the sign. An entry :math:`v`
becomes

.. math:: Q(v) = \frac{c}{s} \, \mathrm{sgn}(v) \, (\lfloor a \rfloor + \xi), \qquad
          a = \frac{s |v|}{c}, \quad P(\xi = 1) = a - \lfloor a \rfloor, \qquad
          \mathbb{E}\, Q(v) = v

(QSGD), or goes to the nearest level (uniform quantisation; with one bit, signSGD, whose ties at
zero go to +1). FedAVG quantises the pseudo-gradient :math:`(\theta_0 - \theta_T) / \eta` of a
whole round tensor by tensor; as scales move with the tensor, :math:`\eta` matters only where the
scale is 1.

What an adversary does about it: round its own candidates alike, and let slopes pass as if nothing
were rounded. (Comparing only what of a candidate lies outside the observed cells loses to that
by far: inside a cell nothing pulls, and of signs any small update is right.) Random rounding is
noise of mean zero, under which a candidate's own update is the expectation. At 5 bits directions
are hardly touched at all.

Sources: Alistarh et al., "QSGD", NeurIPS 2017; Bernstein et al., "signSGD", ICML 2018; the rates
and bounds that attacks are tested against are those of ROG (Yue et al., USENIX Security 2023),
whose default of 16 magnitudes and a sign is 5 bits here.

Departures:
    * QSGD as published scales by the norm; ROG's code, which made the figures of [14], by the
      largest magnitude. Here that is the default and ``scale="norm"`` the other.
    * ROG's FedAVG update runs over the whole state dict, so that it quantises the running
      statistics and counters of batch normalisation too; here parameters alone.
    * A tensor of zeros, for which the formula is 0/0, is sent as it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal, Self

import torch
from pydantic import Field
from torch import Tensor

from leakatlas.errors import InvalidParameter
from leakatlas.fl import ActsOn, ClientContext, Defense, Trait, Update

Rounding = Literal["random", "nearest"]
Scale = Literal["largest", "norm", "mean", "one"]

_WHOLE = 32
"""Bits of a number that nobody rounds."""


@dataclass(frozen=True, kw_only=True)
class Quantization(Defense):
    """Rounds every entry of an update to a few levels.

    Args:
        bits: Bits of an entry, b, its sign among them; 32 sends the update as it is.
        rounding: To one of the two neighbours at random, without bias, or to the nearer one.
        scale: The outermost level c of a tensor: its largest magnitude, its norm, or, for signs
            alone (one bit, nearest), its mean magnitude or 1 in units of the gradient.
        error_feedback: Whether what rounding took off is added to the next round's update.

    Raises:
        InvalidParameter: If the scale is too small for a lattice of more than two levels.
    """

    key: ClassVar[str] = "quantization"
    knob: ClassVar[str] = "bits"
    neutral: ClassVar[int] = _WHOLE
    strengths: ClassVar[tuple[int, ...]] = (8, 5, 4, 3, 2, 1)
    stage: ClassVar[int] = 70
    modes: ClassVar[frozenset[ActsOn]] = frozenset({ActsOn.PER_UPDATE})

    bits: Annotated[int, Field(ge=1, le=_WHOLE)] = 5
    rounding: Rounding = "random"
    scale: Scale = "largest"
    error_feedback: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.scale in ("mean", "one") and (self.bits > 1 or self.rounding != "nearest"):
            raise InvalidParameter(
                f"Quantization(scale={self.scale!r}): the largest entries lie beyond that scale, "
                "which only signs (bits=1, rounding='nearest') can do without; use "
                "scale='largest' or 'norm'."
            )

    @classmethod
    def uniform(cls, bits: int) -> Self:
        """The nearest of equidistant levels up to the largest magnitude."""
        return cls(bits=bits, rounding="nearest")

    @classmethod
    def sign(cls, scale: Scale = "one", *, error_feedback: bool = False) -> Self:
        """signSGD; with the mean as scale, the scaled form that error feedback needs."""
        return cls(bits=1, rounding="nearest", scale=scale, error_feedback=error_feedback)

    def active_traits(self) -> frozenset[Trait]:
        """Error feedback, while it is on and something is rounded."""
        on = self.error_feedback and self.bits < _WHOLE
        return frozenset({Trait.ERROR_FEEDBACK}) if on else frozenset()

    def update(self, update: Update, context: ClientContext) -> Update:
        """Send the rounded tensors, and remember what rounding took off."""
        if self.bits == _WHOLE:
            return update
        memory = context.memory.get("residual", {})
        one = update.scale * (1.0 if update.kind == "gradient" else context.protocol.lr)
        sent: dict[str, Tensor] = {}
        residual: dict[str, Tensor] = {}
        for name, g in update.tensors.items():
            v = g + memory[name] if name in memory else g
            draws = None
            if self.rounding == "random":
                draws = torch.rand(v.shape, generator=context.generator, dtype=v.dtype).to(v.device)
            sent[name] = self.rounded(v, update, v.new_tensor(one), draws)
            residual[name] = v - sent[name]
        if self.error_feedback:
            context.memory["residual"] = residual
        return update.with_tensors(sent)

    def rounded(
        self, v: Tensor, update: Update, one: Tensor, draws: Tensor | None = None
    ) -> Tensor:
        """A tensor on its lattice.

        Args:
            v: In the units of ``update``.
            update: Whose kind and sign say which way the gradient points: ties of signs follow it.
            one: What 1 in units of the gradient is in those of the update, a scalar.
            draws: See :func:`quantised`.
        """
        way = update.sign * (1 if update.kind == "gradient" else -1)
        match self.scale:
            case "largest":
                scale = v.abs().max()
            case "norm":
                scale = torch.linalg.vector_norm(v)
            case "mean":
                scale = v.abs().mean()
            case "one":
                scale = one
        return way * quantised(way * v, self.bits, scale, draws)

    def simulate(
        self, update: dict[str, Tensor], x: Tensor, y: Tensor, observed: Update
    ) -> dict[str, Tensor]:
        """The candidate's update, rounded alike, with the slope of what is not rounded.

        At the truth this equals the observation if rounding was to the nearest and nothing was
        remembered; of random rounding it is the expectation.
        """
        del x, y
        if self.bits == _WHOLE or self.rounding == "random":
            return update
        found: dict[str, Tensor] = {}
        for name, v in update.items():
            # Where signs are sent at scale 1, every entry of the upload shows it.
            one = observed.tensors[name].abs().max()
            found[name] = v + (self.rounded(v.detach(), observed, one) - v.detach())
        return found


def levels(bits: int) -> int:
    """Positive levels s of the lattice; 0 for signs, which have no level at zero."""
    return int(2 ** (bits - 1) - 1)


def quantised(v: Tensor, bits: int, scale: Tensor, draws: Tensor | None = None) -> Tensor:
    """The entries of ``v``, each at one of the two levels next to it.

    Args:
        v: Any shape, no entry larger than ``scale`` unless signs are taken.
        bits: b.
        scale: The outermost level c.
        draws: Of the shape of ``v``, uniform in [0, 1): the larger magnitude (or +1) where below
            its probability; the nearer level (ties to the even one, signs to +1) if None.
    """
    if not bool(scale > 0):
        return v
    s = levels(bits)
    if s == 0:
        up = v >= 0 if draws is None else draws < (1 + v / scale) / 2
        return torch.where(up, scale, -scale)
    place = (v.abs() / scale * s).clamp(max=s)  # rounding may put the largest beyond
    lower = place.floor()
    level = place.round() if draws is None else lower + (draws < place - lower).to(v.dtype)
    return v.sign() * level * (scale / s)
