"""Rounds recorded from a real system: what was sent to a client, and what it sent back.

There is no federation behind a capture. A view is made from it exactly as from a simulated round,
by :class:`Replayed`, which plays back what was recorded where a federation would compute. Nothing
can be sent to the client any more, so active attacks have nothing to tamper with.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

from safetensors.torch import save_file
from torch import Tensor, nn

from leakatlas import reading, tensorfiles
from leakatlas.errors import InvalidInput, ProtocolError, shown
from leakatlas.fl import state
from leakatlas.fl.hooks import Message
from leakatlas.fl.rounds import Federation, RoundRecord
from leakatlas.fl.tampering import TamperedModel
from leakatlas.fl.update import Update

METADATA = "leakatlas.capture"
FORMAT = "leakatlas/capture/1"


@dataclass(frozen=True, kw_only=True)
class CapturedRound:
    """One round as it was recorded.

    Args:
        update: What the client sent.
        received: The state that it had received, by name: parameters and buffers. What is not
            named here the model's own values stand for.
        index: Round number.
        client: Whose update it is.
        cohort: How many clients took part.
    """

    update: Update
    received: Mapping[str, Tensor] = field(default_factory=dict)
    index: int = 0
    client: int = 0
    cohort: int = 1


@dataclass(frozen=True, kw_only=True)
class Capture:
    """Rounds of one client in a real system, or means over several clients, oldest first.

    Args:
        rounds: At least one.
        notes: How the files were understood, for people.

    Raises:
        InvalidInput: If there is no round.
    """

    rounds: tuple[CapturedRound, ...]
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.rounds:
            raise InvalidInput("A capture needs at least one round.")

    @classmethod
    def of(cls, captured: Capture | Update) -> Capture:
        """A capture as it is; a single update as a capture of one round."""
        return Capture(rounds=(_round(captured),)) if isinstance(captured, Update) else captured

    @classmethod
    def of_rounds(cls, captures: Sequence[Capture]) -> Self:
        """Captures of one round after the other, made one; rounds are counted from 0."""
        rounds = [one for capture in captures for one in capture.rounds]
        notes = dict.fromkeys(note for capture in captures for note in capture.notes)
        numbered = tuple(replace(one, index=i) for i, one in enumerate(rounds))
        return cls(rounds=numbered, notes=tuple(notes))

    @property
    def update(self) -> Update:
        """The last update."""
        return self.rounds[-1].update

    @property
    def num_examples(self) -> int:
        """Examples behind the last update."""
        return self.update.num_examples

    def fingerprint(self) -> str:
        """SHA-256 of all that was recorded."""
        parts = [
            [one.index, one.client, one.cohort, facts, state.state_hash(content),
             state.state_hash(one.received)]
            for one in self.rounds
            for content, facts in [one.update.pack()]
        ]  # fmt: skip
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def fitted(self, model: nn.Module) -> Self:
        """With whole received states, and deltas instead of weights.

        Args:
            model: Whose names these are; its values stand for what no round names.

        Raises:
            InvalidInput: If a name or shape is not the model's, or a value is not finite.
        """
        own = state.model_state(model)
        rounds = []
        for one in self.rounds:
            for name, tensor in one.received.items():
                if name not in own or own[name].shape != tensor.shape:
                    raise InvalidInput(
                        f"Round {one.index} of the capture received {name!r} of shape "
                        f"{tuple(tensor.shape)}, which {type(model).__name__} does not have; it "
                        f"has: {', '.join(list(own)[:6])}."
                    )
            received = {**own, **{n: t.to(own[n]) for n, t in one.received.items()}}
            who = f"The state received in round {one.index} of the capture"
            state.require_finite(received, model, who)
            update = one.update.check().check_fits(own).as_delta(received)
            update = update.with_tensors({n: t.to(own[n]) for n, t in update.tensors.items()})
            rounds.append(replace(one, received=received, update=update))
        return replace(self, rounds=tuple(rounds))

    def save(self, path: Path | str) -> None:
        """Write to one safetensors file."""
        tensors: dict[str, Tensor] = {}
        described = []
        for number, one in enumerate(self.rounds):
            content, facts = one.update.pack()
            tensors |= {f"{number}/update/{n}": t for n, t in content.items()}
            tensors |= {f"{number}/received/{n}": t for n, t in one.received.items()}
            described.append(
                {"update": facts, "index": one.index, "client": one.client, "cohort": one.cohort}
            )
        # Copies: safetensors refuses tensors that share memory.
        save_file(
            {n: t.detach().clone().contiguous() for n, t in tensors.items()},
            path,
            metadata={
                METADATA: json.dumps(
                    {"format": FORMAT, "rounds": described, "notes": list(self.notes)}
                )
            },
        )

    @classmethod
    def load(cls, path: Path | str) -> Self:
        """Read what :meth:`save` wrote, or the single update of :meth:`Update.save`.

        Raises:
            InvalidInput: If the file is missing, truncated, or neither.
        """
        tensors, texts = tensorfiles.read_safetensors(path, what="capture")
        who = f"The capture {shown(str(path))}"
        if METADATA not in texts and "leakatlas.update" in texts:
            return cls(rounds=(_round(Update.load(path)),))
        facts = reading.parse_json(texts.get(METADATA, "null"), who=who)
        if not isinstance(facts, dict) or facts.get("format") != FORMAT:
            raise InvalidInput(
                f"{who} is a safetensors file but no capture. Make one of it: leakatlas capture "
                "FILE... --model MODEL."
            )
        with reading.boundary(who, LookupError, TypeError, AttributeError):
            rounds = tuple(
                CapturedRound(
                    update=Update.unpack(_under(tensors, f"{n}/update/"), one["update"]).check(),
                    received=_under(tensors, f"{n}/received/"),
                    index=int(one["index"]),
                    client=int(one["client"]),
                    cohort=int(one["cohort"]),
                )
                for n, one in enumerate(facts["rounds"])
            )
            return cls(rounds=rounds, notes=tuple(map(str, facts["notes"])))


def _round(update: Update) -> CapturedRound:
    return CapturedRound(update=update, cohort=update.clients)


def _under(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}


class Replayed(Federation):
    """Plays back captured rounds instead of computing them.

    Args:
        like: The federation that describes protocol, defenses and architecture.
        capture: Fitted to its model; the last round repeats if more are asked for.
        target: The client whose updates these are.
    """

    def __init__(self, like: Federation, capture: Capture, target: int) -> None:
        vars(self).update(vars(like))
        self.capture = capture
        self.target = target
        self.rounds_played = 0

    def play_round(
        self,
        *,
        cohort: Sequence[int] | None = None,
        sent: TamperedModel | Mapping[int, TamperedModel] | None = None,
        sybils: Collection[int] = (),
        dropouts: Collection[int] = (),
        apply: bool = False,
    ) -> RoundRecord:
        """The next recorded round.

        Raises:
            ProtocolError: If anything about it is to be changed: it has happened.
        """
        del apply
        if cohort is not None or sent is not None or sybils or dropouts:
            raise ProtocolError(
                "The update was captured from a round that is over: nothing can be sent to that "
                "client any more. Simulate it (leave out captured=) to try active attacks."
            )
        one = self.capture.rounds[min(self.rounds_played, len(self.capture.rounds) - 1)]
        self.rounds_played += 1
        received = state.load_into(self.model, one.received)
        received.train(self.protocol.mode == "train")
        cohort = tuple(sorted(self.clients)) if one.update.clients > 1 else (self.target,)
        shared = {n: t for n, t in one.received.items() if n not in self.private_names}
        message = Message(
            client=self.target, num_examples=one.update.num_examples, update=one.update
        )
        return RoundRecord(
            index=one.index,
            cohort=cohort,
            sybils=frozenset(),
            received={self.target: received},
            states=dict.fromkeys(cohort, shared),
            updates={self.target: one.update},
            messages={self.target: message},
            aggregate=one.update,
            order={},
            draws={},
            augmentation={},
            dropped=frozenset(),
            broadcast=one.update,
        )


def facts_of(capture: Capture) -> dict[str, Any]:
    """What a capture is, as plain JSON, for reports."""
    last = capture.rounds[-1]
    return {
        "rounds": len(capture.rounds),
        "client": last.client,
        "cohort": last.cohort,
        "averaged": last.update.clients,
        "kind": last.update.kind,
        "examples": last.update.num_examples,
        "tensors": len(last.update.tensors),
        "notes": list(capture.notes),
    }
