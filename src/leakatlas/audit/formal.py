"""The formal side of a set of defenses: (epsilon, delta) where differential privacy is declared."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from leakatlas.defenses.formal.dp.central_dp import CentralDP
from leakatlas.defenses.formal.dp.client_dp import ClientDP
from leakatlas.fl import Defense, FedAVG, Protocol, Trait

ACCOUNTANT = "exact composition of Gaussian mechanisms, no subsampling"


def guarantees(
    defenses: Sequence[Defense], protocol: Protocol, *, rounds: int, delta: float
) -> list[dict[str, Any]]:
    """One entry for each defense that declares differential privacy, as plain JSON values.

    Batches and cohorts of a fixed size are no Poisson samples, so none is amplified.

    Args:
        defenses: In force.
        protocol: The client's training.
        rounds: Rounds in which one client takes part.
        delta: In (0, 1).
    """
    found = []
    for defense in defenses:
        if Trait.DP_NOISE not in defense.active_traits():
            continue
        epsilon, unit, mind = _of(defense, protocol, rounds, delta)
        found.append(
            {
                "defense": defense.key,
                "epsilon": epsilon if epsilon is None or math.isfinite(epsilon) else None,
                "delta": delta,
                "rounds": rounds,
                "unit": unit,
                "accountant": "none" if epsilon is None else ACCOUNTANT,
                "mind": mind,
            }
        )
    return found


def _of(
    defense: Defense, protocol: Protocol, rounds: int, delta: float
) -> tuple[float | None, str, str]:
    """Epsilon, what it protects, what to mind."""
    match defense:
        case ClientDP(unit="update"):
            value = defense.epsilon(rounds=rounds, delta=delta)
            share = "" if defense.share_of == 1 else f"if all {defense.share_of} clients add theirs"
            return value, "one client's whole contribution", share
        case ClientDP():
            steps = protocol.epochs if isinstance(protocol, FedAVG) else 1
            value = defense.epsilon(rounds=rounds, delta=delta, steps_per_round=steps)
            return value, "one example", "a person with several examples is protected less"
        case CentralDP():
            value = defense.epsilon(rounds=rounds, sampling_rate=1.0, delta=delta)
            return value, "one client", "against whoever sees the aggregate alone, not the server"
    return None, "unknown", f"no accountant is known for {defense.key}"
