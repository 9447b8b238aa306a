"""The fields that a view may hold: who gives each, and a record of which were read.

===================  ==========================================================
field                given by
===================  ==========================================================
``rounds``           UPDATES (and with it ``update``, ``model``, ``num_examples``,
                     ``input_shape``, ``classes``)
``others``           UPDATES, from the vantage ``server`` alone, to attacks that ask for it
``box``              BASIC, or ``Grant.PIXEL_RANGE``
``protocol``         TRAINING
``defenses``         TRAINING
``surrogate``        SURROGATE
``distribution``     DISTRIBUTION
``key``              MANIPULATION
``clients``          MANIPULATION or SELECTION (and with it ``target``)
``labels``           ``Grant.LABELS``
``batch_bn``         ``Grant.BATCH_BN``
``batch_order``      ``Grant.BATCH_ORDER``
``dropout_masks``    ``Grant.DROPOUT_MASKS``
``augmentation``     ``Grant.AUGMENTATION``
``secrets``          ``Grant.DEFENSE_SECRETS``
===================  ==========================================================


A field that was not granted is not in the object; reading it raises
:class:`~leakatlas.errors.NotGranted`. Reads are recorded.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from leakatlas.data import Box, ImageSet
from leakatlas.errors import InvalidInput, NotGranted
from leakatlas.fl.draws import Draws
from leakatlas.fl.hooks import Defense
from leakatlas.fl.protocol import Protocol
from leakatlas.fl.update import Update
from leakatlas.threat import Grant, Knowledge, Vantage, threat_model

SOURCES: dict[str, tuple[Knowledge, Grant | None]] = {
    "rounds": (Knowledge.UPDATES, None),
    "num_examples": (Knowledge.UPDATES, None),
    "input_shape": (Knowledge.UPDATES, None),
    "classes": (Knowledge.UPDATES, None),
    "others": (Knowledge.UPDATES, None),
    "box": (Knowledge.BASIC, Grant.PIXEL_RANGE),
    "protocol": (Knowledge.TRAINING, None),
    "defenses": (Knowledge.TRAINING, None),
    "surrogate": (Knowledge.SURROGATE, None),
    "distribution": (Knowledge.DISTRIBUTION, None),
    "key": (Knowledge.MANIPULATION, None),
    "clients": (Knowledge.MANIPULATION | Knowledge.SELECTION, None),
    "target": (Knowledge.MANIPULATION | Knowledge.SELECTION, None),
    "labels": (Knowledge(0), Grant.LABELS),
    "batch_bn": (Knowledge(0), Grant.BATCH_BN),
    "batch_order": (Knowledge(0), Grant.BATCH_ORDER),
    "dropout_masks": (Knowledge(0), Grant.DROPOUT_MASKS),
    "augmentation": (Knowledge(0), Grant.AUGMENTATION),
    "secrets": (Knowledge(0), Grant.DEFENSE_SECRETS),
}
"""Which knowledge, or which grant instead, puts a field into a view."""

Statistics = Mapping[str, tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Distribution:
    """What is known of a client's population under ``Knowledge.DISTRIBUTION``.

    Computed from other images than any client's: the statistics of a batch nearly are the batch
    (of two images, mean and spread give both).

    Args:
        class_frequencies: ``(K,)``, sums to 1; zeros if no class of the images is the model's.
        mean: Per-pixel mean ``(C, H, W)``, model space.
        std: Per-pixel standard deviation ``(C, H, W)``, model space.
    """

    class_frequencies: Tensor
    mean: Tensor
    std: Tensor


@dataclass(frozen=True)
class RoundView:
    """One round as the adversary saw it.

    Args:
        index: Round number.
        state: Shared state of the model that the target received, by name.
        cohort: How many clients took part.
        update: The update visible at the vantage, or None.
        hidden_by: Why there is none.
        payload: Encoded tensors seen instead.
        own: At the peer vantage, the peer's own update.
        key: What an active adversary noted when it tampered with this round.
    """

    index: int
    state: Mapping[str, Tensor]
    cohort: int
    update: Update | None
    hidden_by: str = ""
    payload: Mapping[str, Tensor] = field(default_factory=dict)
    own: Update | None = None
    key: Mapping[str, Tensor] = field(default_factory=dict)


class Granted:
    """The fields of one adversary, and which of them it has read.

    Args:
        letter: Threat model, A-H.
        vantage: Where the adversary looks.
        grants: Extra facts.
        fields: The granted fields, by the names of :data:`SOURCES`.

    Raises:
        InvalidInput: If a field is given that neither the letter nor a grant allows, or one that
            cannot be seen from the vantage.
    """

    def __init__(
        self, letter: str, vantage: Vantage, grants: frozenset[Grant], fields: Mapping[str, Any]
    ) -> None:
        self.letter = threat_model(letter).letter
        self.knowledge = threat_model(letter).knowledge
        self.vantage = vantage
        self.grants = grants
        self._reads: set[str] = set()
        self._asked: set[str] = set()
        self._read_before: frozenset[str] = frozenset()
        self._fields = dict(fields)
        for name in self._fields:
            if not self._allowed(name):
                raise InvalidInput(f"{name!r} is not given to {self.describe()}.")
        if "others" in self._fields and vantage is not Vantage.SERVER:
            raise InvalidInput(f"'others' are not seen at {vantage.value}, only at server.")

    def _allowed(self, name: str) -> bool:
        knowledge, grant = SOURCES[name]
        return bool(knowledge & self.knowledge) or (grant is not None and grant in self.grants)

    def describe(self) -> str:
        """The adversary in words, for messages."""
        grants = f" + {', '.join(sorted(self.grants))}" if self.grants else ""
        return f"threat model {self.letter} at {self.vantage.value}{grants}"

    def has(self, name: str) -> bool:
        """Whether a field was granted; asking is not reading.

        Args:
            name: A name of :data:`SOURCES`.
        """
        self._asked.add(name)
        return name in self._fields

    @property
    def touched(self) -> frozenset[str]:
        """The fields read, or asked after, since :meth:`forget_reads`."""
        return frozenset(self._reads | self._asked)

    @property
    def reads(self) -> frozenset[str]:
        """The fields read so far, while tampering with earlier rounds too."""
        return self._read_before | self._reads

    def forget_reads(self) -> None:
        """Start a new record of reads; what was remembered stays."""
        self._reads.clear()
        self._asked.clear()

    def remember(self, reads: frozenset[str]) -> None:
        """Count ``reads`` of earlier views of the same adversary, such as those of tampering."""
        self._read_before |= reads

    def _get(self, name: str) -> Any:
        self._asked.add(name)
        if name not in self._fields:
            knowledge, grant = SOURCES[name]
            ways = []
            if knowledge:
                ways.append(f"a threat model with {'/'.join(knowledge.names()).upper()}")
            if grant is not None:
                ways.append(f"the grant {grant.value!r}")
            why = " or ".join(ways)
            held = ", ".join(self.knowledge.names()).upper()
            if self._allowed(name):
                raise NotGranted(f"view.{name} is absent for {self.describe()}: {_absence(name)}.")
            raise NotGranted(
                f"view.{name} is not granted to {self.describe()} (which holds {held}); "
                f"it takes {why}."
            )
        self._reads.add(name)
        return self._fields[name]

    # -- fields --------------------------------------------------------------------------------

    @property
    def rounds(self) -> tuple[RoundView, ...]:
        """Every round seen, oldest first."""
        return self._get("rounds")  # type: ignore[no-any-return]

    @property
    def num_examples(self) -> int:
        """Examples behind the observed update; clients send it as their aggregation weight."""
        return self._get("num_examples")  # type: ignore[no-any-return]

    @property
    def input_shape(self) -> tuple[int, ...]:
        """``(C, H, W)``, which the architecture fixes."""
        return self._get("input_shape")  # type: ignore[no-any-return]

    @property
    def classes(self) -> int:
        """Number of classes K, the width of the head."""
        return self._get("classes")  # type: ignore[no-any-return]

    @property
    def others(self) -> tuple[Mapping[int, Update], ...]:
        """For every round, the readable updates of the clients that are not the target, by id.

        They received what the target received.
        """
        return self._get("others")  # type: ignore[no-any-return]

    @property
    def box(self) -> Box:
        """The pixel space."""
        return self._get("box")  # type: ignore[no-any-return]

    @property
    def protocol(self) -> Protocol:
        """The learning algorithm and its local hyperparameters."""
        return self._get("protocol")  # type: ignore[no-any-return]

    @property
    def defenses(self) -> tuple[Defense, ...]:
        """The defenses in force: mechanism and parameters, never their secrets."""
        return self._get("defenses")  # type: ignore[no-any-return]

    @property
    def surrogate(self) -> ImageSet:
        """Public images from the client's population, in [0, 1]; none of them is the client's."""
        return self._get("surrogate")  # type: ignore[no-any-return]

    @property
    def distribution(self) -> Distribution:
        """Statistics of the client's data."""
        return self._get("distribution")  # type: ignore[no-any-return]

    @property
    def key(self) -> Mapping[str, Tensor]:
        """What the adversary noted when it tampered with the last round."""
        return self._get("key")  # type: ignore[no-any-return]

    @property
    def clients(self) -> tuple[int, ...]:
        """Ids that the adversary may select from."""
        return self._get("clients")  # type: ignore[no-any-return]

    @property
    def target(self) -> int:
        """Id of the client under attack."""
        return self._get("target")  # type: ignore[no-any-return]

    @property
    def labels(self) -> Tensor:
        """The private labels ``(N,)``, in order; of a sum, all its clients'. An oracle."""
        return self._get("labels")  # type: ignore[no-any-return]

    @property
    def batch_bn(self) -> Statistics:
        """Mean and biased variance at each BN layer's input on the private batch; an oracle."""
        return self._get("batch_bn")  # type: ignore[no-any-return]

    @property
    def batch_order(self) -> tuple[Tensor, ...]:
        """Example indices of every local step; an oracle."""
        return self._get("batch_order")  # type: ignore[no-any-return]

    @property
    def dropout_masks(self) -> tuple[Draws, ...]:
        """What the model drew in every local step, see :mod:`leakatlas.fl.draws`; an oracle."""
        return self._get("dropout_masks")  # type: ignore[no-any-return]

    @property
    def augmentation(self) -> tuple[int, ...]:
        """Seeds of every local step's transforms; an oracle."""
        return self._get("augmentation")  # type: ignore[no-any-return]

    @property
    def secrets(self) -> Mapping[str, Tensor]:
        """Secret state of the defenses, ``key/name -> tensor``; an oracle."""
        return self._get("secrets")  # type: ignore[no-any-return]


def _absence(name: str) -> str:
    """Why a field that knowledge or a grant allows can still be missing."""
    match name:
        case "surrogate":
            return "the scenario names no `surrogate` data"
        case "others":
            return (
                "it takes the vantage 'server', a round with several clients whose own updates "
                "can be read there, and an attack that asks for them"
            )
        case "distribution":
            return "it takes other images of the population, or `surrogate` data; there are none"
        case "batch_bn" | "batch_order" | "dropout_masks" | "augmentation":
            return (
                "this view holds none (they exist once a round was played, and describe one "
                "client's batch: the sum of several has none)"
            )
        case _:
            return "this view holds none (it may exist only once a round was played)"
