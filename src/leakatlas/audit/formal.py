"""The formal side of a set of defenses: (epsilon, delta) where differential privacy is declared."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from leakatlas.audit.promises import Promise
from leakatlas.defenses.formal.dp import _accounting
from leakatlas.defenses.formal.dp.central_dp import CentralDP
from leakatlas.defenses.formal.dp.client_dp import ClientDP
from leakatlas.defenses.formal.dp.flower_clipping import FlowerClipping
from leakatlas.defenses.formal.dp.local_dp_mod import LocalDpMod
from leakatlas.defenses.formal.dp.opacus_dpsgd import OpacusDPSGD
from leakatlas.defenses.formal.dp.svt_privacy import SVTPrivacy
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
        case OpacusDPSGD():
            steps = protocol.epochs if isinstance(protocol, FedAVG) else 1
            value = defense.epsilon(steps=rounds * steps, delta=delta)
            return value, "one example", "a person with several examples is protected less"
        case LocalDpMod():
            value = defense.worth(rounds=rounds, delta=delta)
            return value, "one client's whole contribution", "; ".join(_promise(defense, rounds))
        case FlowerClipping():
            value = _accounting.epsilon(defense.noise_multiplier, steps=rounds, delta=delta)
            return value, "one client", "; ".join(doubts([defense], rounds=rounds))
        case SVTPrivacy():
            return None, "one entry", "; ".join(doubts([defense], rounds=rounds))
    return None, "unknown", f"no accountant is known for {defense.key}"


def doubts(defenses: Sequence[Defense], *, rounds: int, entries: int = 0) -> list[str]:
    """Where a defense's own formula gives less than it says, in words.

    Args:
        defenses: In force.
        rounds: In which one client takes part.
        entries: Numbers in an update, where that is known.
    """
    said: list[str] = []
    for defense in defenses:
        if Trait.DP_NOISE not in defense.active_traits():
            continue
        match defense:
            case LocalDpMod():
                said += [f"{defense.key}: {why}" for why in _promise(defense, rounds)]
            case FlowerClipping():
                said.append(
                    f"{defense.key}: noise is added to the server's mean alone, so that server and "
                    "wire see updates without any; it is measured for equal weights, and the mean "
                    "is weighted by examples"
                )
            case SVTPrivacy():
                whole = (
                    f": {defense.spent(entries, rounds=rounds):.4g} for {entries:,} over "
                    f"{rounds} round{'s' if rounds != 1 else ''}"
                    if entries
                    else ""
                )
                said.append(
                    f"{defense.key}: epsilon={defense.epsilon:g} is that of choosing entries; "
                    f"sending them costs {defense.noise_var:g} each, which grows with the number "
                    f"of weights{whole}. More entries are accepted than that is meant for, so "
                    "that no budget holds"
                )
    return said


def _promise(defense: LocalDpMod, rounds: int) -> tuple[str, ...]:
    promise = Promise(
        epsilon=defense.epsilon,
        delta=defense.delta,
        sensitivity=defense.sensitivity,
        clipping_norm=defense.clipping_norm,
    )
    return promise.doubts(rounds=rounds)
