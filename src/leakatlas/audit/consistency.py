"""Is an update what the described client would have sent for the true batch; if not, why not?

The harness-side check puts the true batch into the client's own computation and compares it with
the update. A residual that is not ~0 means that the description is wrong somewhere, and every
attack would chase a target that does not exist. So single mistakes that people make are tried,
each as another description, until one explains the update; then several at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from torch import Tensor, nn

from leakatlas.audit.described import (
    Described,
    Residual,
    attempted,
    residual_of,
    rounding_of,
    tolerance_of,
)
from leakatlas.audit.estimates import (
    dropout,
    example_clipping,
    learning_rate,
    looks_like,
    moving,
    noise_on,
    parameter_order,
    weight_decay,
)
from leakatlas.audit.mistakes import factor_in_words, mistakes, several
from leakatlas.data import Box
from leakatlas.fl import Defense, Protocol, Trait, Update, state_hash
from leakatlas.fl.draws import Draws
from leakatlas.fl.state import buffers, load_into, model_state, parameters

UNCHECKABLE = ("defense", "dropout", "augmentation", "moving buffers", "rounding")
"""What a replay cannot repeat: a residual that comes of it speaks against nothing."""


@dataclass(frozen=True)
class ReplayCheck:
    """Whether an update is what the described client would have sent for the true batch.

    Args:
        residual: ``|replay - update| / |update|`` under the description; None if there is no batch
            to replay.
        consistent: Whether the residual is one that rounding leaves in well-behaved training.
        culprit: What is wrong, in a word or two (``sign``, ``momentum``, ``several``, ...), or
            ``unknown``; empty if consistent.
        explanation: The finding in words.
    """

    residual: float | None
    consistent: bool
    culprit: str = ""
    explanation: str = ""

    @property
    def expected(self) -> bool:
        """Whether nothing speaks against the description, as far as it can be checked."""
        return self.consistent or self.culprit in UNCHECKABLE


def check_replay(
    model: nn.Module,
    update: Update,
    x: Tensor,
    y: Tensor,
    protocol: Protocol,
    *,
    order: Sequence[Tensor] | None = None,
    drawn: Sequence[Draws] | None = None,
    defenses: Sequence[Defense] = (),
    defended: bool = False,
    seeds: Sequence[int] | None = None,
    box: Box | None = None,
    clients: int = 1,
) -> ReplayCheck:
    """Compare an update with the described client's computation on the true batch.

    Args:
        model: Holding the state at which the update is said to have been computed.
        update: The observed update; weights are taken as the change that they are.
        x: True inputs ``(N, C, H, W)``, model space.
        y: True targets.
        protocol: The learning algorithm as described.
        order: Example indices of every local step, if known.
        drawn: What the model drew in every local step, if known.
        defenses: Declared for a captured update; it is replayed through their mirrors.
        defended: Whether a defense changed a simulated upload on purpose.
        seeds: Of the client's transforms in every local step, if known.
        box: The normalisation behind ``x``.
        clients: Who hold equal parts of the batch and whose mean was seen.
    """
    own = {**parameters(model), **buffers(model)}
    described = Described(
        model=load_into(model, model_state(model)),
        update=update.as_delta(own),
        x=x,
        y=y,
        protocol=protocol,
        order=order,
        drawn=drawn,
        defenses=tuple(defenses),
        seeds=seeds,
        box=box,
        clients=clients,
    )
    first = residual_of(described)
    if first.plain <= tolerance_of(described):
        return ReplayCheck(first.plain, True)

    def wrong(culprit: str, words: str) -> ReplayCheck:
        return ReplayCheck(first.plain, False, culprit, words)

    known = _known_beforehand(described, update, model, defended=defended, size=first.plain)
    if known is not None:
        return wrong(*known)
    # Client and replay both bear it.
    if first.plain <= NEARLY and first.plain <= 2 * (rounding := rounding_of(described)):
        return wrong(
            "rounding",
            f"it differs by {first.plain:.2%} of its norm, and double precision alone would move "
            f"what this client sends by {rounding:.2%}: so large a step on so few examples hangs "
            "on the last digit",
        )
    tried = list[Tried]()
    for culprit, words, changed in mistakes(described, box):
        found = attempted(changed)
        if found is not None:
            tried.append(Tried(culprit, words, changed, found))
            if found.plain <= tolerance_of(changed):
                return wrong(culprit, words)
    if (guess := _multiple(described, tried, first) or _estimated(described)) is not None:
        return wrong(*guess)
    if (together := several(described, box, first)) is not None:
        return wrong("several", together)
    if (almost := _almost(described, tried, first)) is not None:
        return wrong(*almost)
    seen = looks_like(described)
    return wrong(
        "unknown",
        "no single change of mode, labels, normalisation, loss, order, reduction, optimizer, sign, "
        "scale, defense or parameter order explains it, nor several together; check the weights, "
        "and the preprocessing of the batch" + (f". {seen}" if seen else ""),
    )


class Tried(NamedTuple):
    """A mistake that was made on purpose.

    Args:
        culprit: What is wrong, in a word or two.
        words: The same as a finding.
        changed: The description with it.
        found: How far the update is from that.
    """

    culprit: str
    words: str
    changed: Described
    found: Residual


def _multiple(
    described: Described, tried: Sequence[Tried], first: Residual
) -> tuple[str, str] | None:
    """Culprit and words, where the update is a multiple of what some client sends."""
    for one in (Tried("", "", described, first), *tried):
        if one.found.scaled <= tolerance_of(one.changed):
            return factor_in_words(one.found.factor, one.words)
    return None


def _estimated(described: Described) -> tuple[str, str] | None:
    for estimate in (learning_rate, weight_decay, parameter_order, example_clipping):
        if (guess := estimate(described)) is not None:
            return guess
    return None


NEARLY = 0.03
"""A residual that images which were saved in between leave: rounded to 8 bits, or as JPEG."""

CLEARLY = 5.0
"""A mistake is named for all but such a rest if it brings the residual down by this factor."""


def _almost(
    described: Described, tried: Sequence[Tried], first: Residual
) -> tuple[str, str] | None:
    """Culprit and words, where the images at hand are not the client's to the last digit."""
    rest = (
        "{} of the update's norm is left over, more than rounding of the arithmetic: the images at "
        "hand may not be the client's to the last digit (saved with 8 bits or as JPEG, or resized "
        "otherwise)"
    )
    best = min(tried, key=lambda one: one.found.plain, default=None)
    if best is not None and best.found.plain <= min(NEARLY, first.plain / CLEARLY):
        return best.culprit, f"{best.words}. {rest.format(f'{best.found.plain:.1%}')}"
    if first.plain <= NEARLY:
        seen = looks_like(described)
        words = f"it is nearly what this client sends. {rest.format(f'{first.plain:.1%}')}"
        return "images", words + (f". {seen}" if seen else "")
    loose = replace(described, loose=NEARLY)
    guess = _multiple(loose, (), first) or _estimated(loose)
    if guess is None:
        return None
    return guess[0], f"{guess[1]}. {rest.format(f'Up to {NEARLY:.0%}')}"


def _known_beforehand(
    described: Described, update: Update, model: nn.Module, *, defended: bool, size: float
) -> tuple[str, str] | None:
    """Culprit and words, where the description alone says why the replay cannot match.

    Args:
        described: What was replayed.
        update: As it was observed.
        model: Holding the state at which it is said to have been computed.
        defended: Whether a defense changed a simulated upload on purpose.
        size: The residual, relative to the upload.
    """
    if update.state_hash and not _computed_here(update, model):
        held = state_hash({**parameters(model), **buffers(model)})
        return (
            "weights",
            f"the update says it was computed at state {update.state_hash[:12]}, the model "
            f"holds {held[:12]}: capture the weights that the client received, "
            "before its first step",
        )
    if defended:
        return "defense", f"the defense changes the upload by {size:.1%} of its norm, as it should"
    noisy = [d.key for d in described.defenses if Trait.DP_NOISE in d.active_traits()]
    if noisy:
        return (
            "defense",
            f"{noisy[0]} adds noise, which is {size:.1%} of the upload's norm if all else "
            f"is as described; nobody can check that any closer. {_as_noise(described)}",
        )
    if described.protocol.augment and described.seeds is None:
        names = ", ".join(one.name for one in described.protocol.augment)
        return (
            "augmentation",
            f"the client transforms its images ({names}) and nobody recorded what it drew, so the "
            "update cannot be replayed",
        )
    if described.drawn is None and (words := dropout(described)):
        return "dropout", words
    if words := moving(described):
        return "moving buffers", words
    return None


def _as_noise(described: Described) -> str:
    """Whether what is left over behaves as noise does, for people who know theirs."""
    deviation = noise_on(described)
    if deviation is None:
        return (
            "What is left over differs from tensor to tensor, as one noise for all does not: if "
            "the defense adds such a one, something else is not as described"
        )
    return f"What is left over has the deviation {deviation:.3g} in every tensor: compare yours"


def _computed_here(update: Update, model: nn.Module) -> bool:
    """Whether the state hash of the update is that of the model, or of the part it shares."""
    own = {**parameters(model), **buffers(model)}
    fixed = {n for n, p in model.named_parameters() if not p.requires_grad}
    kept = {*update.tensors, *update.buffers_before}
    parts = [own, {n: t for n, t in own.items() if n in kept or n in buffers(model)},
             {n: t for n, t in own.items() if n in kept or n in fixed}]  # fmt: skip
    return any(update.state_hash == state_hash(part) for part in parts)
