"""Who attacks: whatever holds a view and answers with tampering and reconstructions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from leakatlas.attacks.api import ActiveAttack, Attack, Reconstruction, Tampering
from leakatlas.blocks.watch import Watch
from leakatlas.errors import AttackCrashed
from leakatlas.fl import View, stream


@dataclass(frozen=True, kw_only=True)
class Request:
    """What an adversary is asked to do.

    Args:
        attack: The attack.
        view: Its side so far.
        seed: Of the adversary's randomness.
        watch: Budget.
        code: A user's own model and loss (:func:`leakatlas.bench.task.code_of`).
        turn: Rounds played so far.
        draws: :attr:`Turn.draws` of the turn before; None at first.
    """

    attack: Attack
    view: View
    seed: int
    watch: Watch
    code: bytes | None = None
    turn: int = 0
    draws: Tensor | None = None


@dataclass(frozen=True)
class Turn:
    """What an active adversary does before a round.

    Args:
        tampering: The tampering; None once enough was seen.
        draws: State of the adversary's generator afterwards: the next turn draws on.
        reads: What was read of the view.
        cut_short: Whether what is learned beforehand was cut.
        planned: Iterations made, and asked for, where fewer were planned to fit the time.
    """

    tampering: Tampering | None
    draws: Tensor
    reads: frozenset[str]
    cut_short: bool = False
    planned: tuple[int, int] | None = None


class Adversary(Protocol):
    """Answers one request at a time; keeps nothing between two of them."""

    @property
    def process(self) -> Literal["own", "shared"]:
        """Whether the attack runs in a process of its own."""

    def tamper(self, request: Request) -> Turn:
        """Prepare the next round.

        Raises:
            AttackCrashed: If its process ended.
        """

    def attack(self, request: Request) -> Reconstruction:
        """Run the attack; the recipe's scenario is stamped by the caller.

        Raises:
            AttackCrashed: If its process ended.
        """

    def costs(self) -> Mapping[str, float]:
        """What the last attack took: ``cpu_seconds``, ``peak_memory`` in MiB."""


class Here:
    """The adversary in this process: for debugging, since the truth is within its reach."""

    process: Literal["own", "shared"] = "shared"
    """See :class:`Adversary`."""

    def tamper(self, request: Request) -> Turn:
        """One turn."""
        attack, view = request.attack, request.view
        assert isinstance(attack, ActiveAttack)
        watch = Watch(parent=request.watch)
        generator = stream(attack.key, "tamper", request.seed)
        first = generator.initial_seed()
        if request.draws is not None:
            generator.set_state(request.draws)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(first + request.turn)
            tampering = attack.tamper(view, generator=generator, watch=watch)
        return Turn(tampering, generator.get_state(), view.reads, watch.cut_short, watch.planned)

    def attack(self, request: Request) -> Reconstruction:
        """Attack."""
        trail = request.watch.conduct.trail
        if trail is not None:
            trail.begin()
        found = request.attack(request.view, seed=request.seed, watch=request.watch)
        if trail is not None:
            trail.end(found.images)
        return found

    def costs(self) -> Mapping[str, float]:
        """Not told apart from the rest of this process."""
        return {}


class Dead:
    """Stands for an adversary that is no more.

    Args:
        reason: How it ended.
    """

    process: Literal["own", "shared"] = "own"

    def __init__(self, reason: str) -> None:
        self._reason = reason

    def tamper(self, request: Request) -> Turn:
        """Nobody answers."""
        raise AttackCrashed(self._reason)

    def attack(self, request: Request) -> Reconstruction:
        """Nobody answers."""
        raise AttackCrashed(self._reason)

    def costs(self) -> Mapping[str, float]:
        """Unknown."""
        return {}
