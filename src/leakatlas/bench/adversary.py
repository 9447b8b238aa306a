"""Who attacks: whatever holds a view and answers with tampering and reconstructions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from leakatlas.attacks.api import ActiveAttack, Attack, Reconstruction, Tampering
from leakatlas.blocks.watch import Watch
from leakatlas.fl import View, stream


@dataclass(frozen=True)
class Turn:
    """What an active adversary does before a round.

    Args:
        tampering: The tampering; None once enough was seen.
        draws: State of the adversary's generator afterwards: the next turn draws on.
        reads: What was read of the view.
    """

    tampering: Tampering | None
    draws: Tensor
    reads: frozenset[str]


class Adversary(Protocol):
    """Answers for one attack at a time; keeps nothing between two calls."""

    @property
    def process(self) -> Literal["own", "shared"]:
        """Whether the attack runs in a process of its own."""

    def tamper(
        self,
        attack: ActiveAttack,
        view: View,
        *,
        seed: int,
        turn: int,
        draws: Tensor | None,
        watch: Watch,
        code: bytes | None = None,
    ) -> Turn:
        """Prepare the next round.

        Args:
            attack: The attack.
            view: Its side so far.
            seed: Of the adversary's randomness.
            turn: Rounds played so far.
            draws: :attr:`Turn.draws` of the turn before; None at first.
            watch: Budget.
            code: A user's own model and loss (:func:`leakatlas.bench.task.code_of`).

        Raises:
            AttackCrashed: If its process ended.
        """

    def attack(
        self, attack: Attack, view: View, *, seed: int, watch: Watch, code: bytes | None = None
    ) -> Reconstruction:
        """Run the attack; the recipe's scenario is stamped by the caller.

        Raises:
            AttackCrashed: If its process ended.
        """

    def costs(self) -> Mapping[str, float]:
        """What the last attack took: ``cpu_seconds``, ``peak_memory`` in MiB."""


def take_turn(
    attack: ActiveAttack, view: View, *, seed: int, turn: int, draws: Tensor | None, watch: Watch
) -> Turn:
    """One turn, in this process; see :meth:`Adversary.tamper`."""
    generator = stream(attack.key, "tamper", seed)
    first = generator.initial_seed()
    if draws is not None:
        generator.set_state(draws)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(first + turn)
        tampering = attack.tamper(view, generator=generator, watch=watch)
    return Turn(tampering, generator.get_state(), view.reads)


class Here:
    """The adversary in this process: for debugging, since the truth is within its reach."""

    process: Literal["own", "shared"] = "shared"
    """See :class:`Adversary`."""

    def tamper(
        self,
        attack: ActiveAttack,
        view: View,
        *,
        seed: int,
        turn: int,
        draws: Tensor | None,
        watch: Watch,
        code: bytes | None = None,
    ) -> Turn:
        """Tamper."""
        return take_turn(attack, view, seed=seed, turn=turn, draws=draws, watch=watch)

    def attack(
        self, attack: Attack, view: View, *, seed: int, watch: Watch, code: bytes | None = None
    ) -> Reconstruction:
        """Attack."""
        return attack(view, seed=seed, watch=watch)

    def costs(self) -> Mapping[str, float]:
        """Not told apart from the rest of this process."""
        return {}
