r"""What a framework's local differential privacy promises, and where the promise does not hold.

Flower's ``LocalDpMod`` clips a client's change to norm C and adds Gaussian noise of

.. math:: \sigma = s \sqrt{2 \ln(1.25/\delta)} / \varepsilon

to every number, every round. That is the classical Gaussian mechanism (Dwork and Roth, "The
Algorithmic Foundations of Differential Privacy", Theorem A.1): proven for epsilon below 1, for a
sensitivity s of at least 2C (two changes of norm C may be 2C apart), and for one release. What
this noise is really worth is a Gaussian mechanism of multiplier sigma / 2C, composed over rounds;
its privacy curve is known exactly.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from leakatlas.defenses.formal.dp import _accounting
from leakatlas.fl.recording import Recording, Scalar
from leakatlas.params import Configured, NonNegative, OpenFraction, Positive

NAMES = {
    "epsilon": ("dp_epsilon", "ldp_epsilon", "epsilon"),
    "delta": ("dp_delta", "ldp_delta", "delta"),
    "sensitivity": ("dp_sensitivity", "ldp_sensitivity", "sensitivity"),
    "clipping_norm": ("dp_clipping_norm", "ldp_clipping_norm", "clipping_norm"),
}
"""How applications call the arguments of ``LocalDpMod``; dashes and underscores are alike."""

ROUNDS = ("num_server_rounds", "num_rounds", "rounds")
"""How applications call the number of rounds."""


@dataclass(frozen=True, kw_only=True)
class Promise(Configured):
    """Arguments of the classical Gaussian mechanism, as ``LocalDpMod`` takes them.

    Args:
        epsilon: Promised for one round.
        delta: Promised for one round.
        sensitivity: s, by which the noise is scaled.
        clipping_norm: C, to which a change is clipped.
    """

    epsilon: Positive
    delta: OpenFraction
    sensitivity: NonNegative
    clipping_norm: Positive

    @property
    def sigma(self) -> float:
        """Standard deviation of the noise on every number."""
        return self.sensitivity * math.sqrt(2 * math.log(1.25 / self.delta)) / self.epsilon

    def worth(self, rounds: int = 1) -> float:
        """The epsilon, at the promised delta, that this noise really gives over so many rounds."""
        return _accounting.epsilon(
            self.sigma / (2 * self.clipping_norm), steps=rounds, delta=self.delta
        )

    def doubts(self, *, rounds: int = 1) -> tuple[str, ...]:
        """Why the promise does not hold, in words; empty if it does.

        Args:
            rounds: In which one client takes part.
        """
        why = []
        if self.epsilon >= 1:
            why.append(
                f"epsilon is {self.epsilon:g}, and the formula behind the noise is proven below 1 "
                "only"
            )
        if self.sensitivity < 2 * self.clipping_norm:
            why.append(
                f"sensitivity is {self.sensitivity:g}, where two changes clipped to "
                f"{self.clipping_norm:g} may be {2 * self.clipping_norm:g} apart"
            )
        if rounds > 1:
            why.append(f"it is spent anew in each of {rounds} rounds, and nothing adds that up")
        if why:
            why.append(
                f"what the noise of {self.sigma:.3g} is worth: epsilon {self.worth():.3g} for one "
                f"round and {self.worth(rounds):.3g} for {rounds}, at delta {self.delta:g}, by "
                "the exact curve of the Gaussian mechanism"
            )
        return tuple(why)


def promise_of(settings: Mapping[str, Scalar]) -> Promise | None:
    """The promise in a run's recorded settings; None if it makes none that can be read."""
    plain = {name.replace("-", "_").lower(): value for name, value in settings.items()}
    found: dict[str, Scalar] = {}
    for name, words in NAMES.items():
        value = next((plain[word] for word in words if word in plain), None)
        if value is None:
            return None
        found[name] = value
    return Promise.from_json(found)


def checked(recording: Recording) -> tuple[str, ...]:
    """What is to be said of the guarantee that a recorded run was configured with.

    Raises:
        InvalidParameter: If its numbers make no guarantee at all, such as a delta of 2.
    """
    settings = recording.last.settings
    promise = promise_of(settings)
    if promise is None:
        return ()
    plain = {name.replace("-", "_").lower(): value for name, value in settings.items()}
    told = next((plain[word] for word in ROUNDS if word in plain), None)
    rounds = told if isinstance(told, int) else len(recording.exchanges)
    doubts = promise.doubts(rounds=rounds)
    said = f"local differential privacy of epsilon {promise.epsilon:g}, delta {promise.delta:g}"
    if not doubts:
        return (f"{said} a round is promised, and its conditions hold",)
    return (f"{said} is promised and NOT given: {'; '.join(doubts)}",)
