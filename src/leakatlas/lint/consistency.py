"""Checks across clients and of the protocol, D12 and D13."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from leakatlas.errors import InvalidInput, InvalidParameter
from leakatlas.fl import model_state, state_hash
from leakatlas.lint.findings import Score
from leakatlas.params import Configured, NonNegative, OpenFraction, Positive, PositiveInt

Received = str | Mapping[str, Tensor] | nn.Module
"""What another client reports: the hash of its state, or the state itself."""


def d12_consistency(state: Mapping[str, Tensor], others: Sequence[Received]) -> list[Score]:
    """D12: the hash of the received state against other clients', or a transparency log's.

    Catches every attack that sends a model per client. A hash is that of
    :func:`leakatlas.fl.state_hash`; states also show which tensors differ.

    Args:
        state: What this client received.
        others: What others received.

    Raises:
        InvalidInput: If a hash is not one.
    """
    if not others:
        return []
    own = state_hash(state)
    differing, names = 0, set[str]()
    for other in others:
        if isinstance(other, str):
            differing += _hash(other) != own
            continue
        theirs = model_state(other) if isinstance(other, nn.Module) else other
        odd = _differing(state, theirs)
        names |= odd
        differing += bool(odd)
    where = f", at {_some(sorted(names))}" if names else ""
    words = f"{differing} of {len(others)} other clients received a different model{where}"
    return [Score("D12/others", "", float(differing > 0), words)]


def _hash(text: str) -> str:
    text = text.strip().lower()
    if len(text) != 64 or set(text) - set("0123456789abcdef"):
        raise InvalidInput(
            f"{text[:70]!r} is not the SHA-256 of a model state (64 hexadecimal digits), as "
            "leakatlas.fl.state_hash gives it."
        )
    return text


def _differing(state: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> set[str]:
    odd = set(state) ^ set(theirs)
    for name in set(state) & set(theirs):
        if state_hash({name: state[name]}) != state_hash({name: theirs[name]}):
            odd.add(name)
    return odd


@dataclass(frozen=True, kw_only=True)
class RoundFacts(Configured):
    """What a client knows of the round it is asked to join.

    Args:
        clip_norm: Norm C to which it clips its own contribution; 0 if it does not.
        noise_std: Standard deviation of the noise that it adds itself, per coordinate.
        rounds: In how many rounds T it takes part.
        delta: Of (epsilon, delta).
        epsilon: What it was promised for all rounds together.
        cohort: Members of the round, by public key or name; empty if not shown.
        attested: Those whose device or key somebody vouches for; None if nobody does.
        least_cohort: How many members were agreed upon.
    """

    clip_norm: NonNegative = 0.0
    noise_std: NonNegative = 0.0
    rounds: PositiveInt = 1
    delta: OpenFraction = 1e-5
    epsilon: Positive | None = None
    cohort: tuple[str, ...] = ()
    attested: tuple[str, ...] | None = None
    least_cohort: PositiveInt = 1


def d13_protocol(facts: RoundFacts) -> list[Score]:
    """D13: does *own* noise alone keep the promise, and who else is in the cohort?

    Noise that others are to add is worth nothing if they are the server's own devices, so epsilon
    is computed from this client's share alone. A client cannot tell a sybil from a stranger; it
    can ask for attestation and for the agreed number.
    """
    scores = []
    if facts.epsilon is not None:
        own = own_epsilon(facts.clip_norm, facts.noise_std, facts.rounds, facts.delta)
        scores.append(
            Score(
                "D13/noise",
                "",
                float(own > facts.epsilon),
                f"own noise alone gives epsilon {own:.3g} at delta {facts.delta:g}, "
                f"{facts.epsilon:g} was promised",
            )
        )
    if facts.cohort:
        size = len(set(facts.cohort))
        strangers = _strangers(facts.cohort, facts.attested)
        problem = size < facts.least_cohort or bool(strangers)
        words = f"{size} distinct members, {facts.least_cohort} were agreed"
        if strangers:
            words += f"; nobody vouches for {_some(strangers)}"
        scores.append(Score("D13/cohort", "", float(problem), words))
    return scores


def _strangers(cohort: Sequence[str], attested: Collection[str] | None) -> list[str]:
    return [] if attested is None else sorted(set(cohort) - set(attested))


def own_epsilon(clip_norm: float, noise_std: float, rounds: int, delta: float) -> float:
    r"""Epsilon of T Gaussian mechanisms with sensitivity C and noise sigma, without subsampling.

    With :math:`\mu = \sqrt T\,C / \sigma` (adding or removing one client), exactly
    :math:`\delta(\epsilon) = \Phi(\mu/2 - \epsilon/\mu) - e^\epsilon \Phi(-\mu/2 - \epsilon/\mu)`
    (Balle and Wang, 2018); epsilon is found by bisection.

    Returns:
        Infinity without clipping or noise.
    """
    if rounds < 1 or not 0 < delta < 1:
        raise InvalidParameter(f"own_epsilon(rounds={rounds}, delta={delta}): out of range.")
    if clip_norm <= 0 or noise_std <= 0:
        return math.inf
    mu = math.sqrt(rounds) * clip_norm / noise_std

    def delta_of(epsilon: float) -> float:
        # Logarithms, since e^epsilon overflows where its partner underflows.
        first = math.exp(_log_normal_cdf(mu / 2 - epsilon / mu))
        return first - math.exp(epsilon + _log_normal_cdf(-mu / 2 - epsilon / mu))

    if delta_of(0.0) <= delta:
        return 0.0
    low, high = 0.0, 1.0
    while delta_of(high) > delta:
        low, high = high, 2 * high
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if delta_of(middle) > delta else (low, middle)
    return high


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _log_normal_cdf(z: float) -> float:
    return float(torch.special.log_ndtr(torch.tensor(z, dtype=torch.float64)))
