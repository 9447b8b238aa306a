"""What a client checks on its own side, whatever framework carries its messages.

The framework's adapter hands over what arrived and what is about to leave, as arrays by name; a
:class:`Guard` says what it thinks of them, and what is to be done. Lint examines what arrives. What
would leave is read as a server would read it: by the closed forms that cost nothing, which the
client can check against its own examples, and by the doctor, who knows what the agreed training
gives.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from leakatlas.audit import Diagnosis, doctor
from leakatlas.data import Box
from leakatlas.errors import InvalidInput, InvalidParameter, LeakAtlasError
from leakatlas.fl import ActsOn, ClientContext, Defense, FedAVG, Protocol, Update, load_into
from leakatlas.fl.capture import Capture, CapturedRound
from leakatlas.fl.hooks import acts_at
from leakatlas.fl.naming import by_name
from leakatlas.fl.state import model_state
from leakatlas.lint import Verdict, calibration, lint, measure
from leakatlas.lint.findings import judge

log = logging.getLogger("leakatlas.guard")

Consequence = Literal["log", "refuse", "defend"]
"""On an alarm: say so and go on; take no part in the round; send a defended update."""

Examples = Callable[[], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Departure:
    """What a guard found in an update that is about to leave.

    Args:
        verdict: Of lint, with this update.
        readable: How many of the examples that were looked at a closed form reads off it, pixel by
            pixel. Honest layers give small batches away, too.
        examples: How many were looked at.
        diagnosis: The doctor's, where the guard knows the local training.
    """

    verdict: Verdict
    readable: int
    examples: int
    diagnosis: Diagnosis | None = None

    @property
    def alarm(self) -> str:
        """Why it should not leave, in words; empty if nothing speaks against it."""
        why = []
        if self.readable:
            why.append(f"{self.readable} of {self.examples} own images can be read off it")
        if self.verdict.alarm:
            why.append(str(self.verdict))
        if self.diagnosis is not None and not self.diagnosis.replay.expected:
            why.append(
                "it is not what the agreed training gives for these examples: "
                f"{self.diagnosis.replay.explanation}"
            )
        return "; ".join(why)

    def __str__(self) -> str:
        said = [self.alarm or f"none of {self.examples} own images can be read off it"]
        if self.diagnosis is not None:
            said += self.diagnosis.findings
        return ". ".join(one.rstrip(".") for one in said)


@dataclass(frozen=True, kw_only=True)
class Guard:
    """A client's own look at a round.

    Args:
        model: Builds the agreed architecture; without it only names and weights are examined.
        on_alarm: What follows from an alarm on what arrived or would leave.
        defense: Applied to the update on an alarm, for ``"defend"``; one that acts on whole
            updates, such as ``ClientDP``.
        examples: Gives a few of the client's own inputs and labels, model space; they add the
            checks on gradients, and let it be seen whether the update holds them to be read.
        protocol: The local training; the doctor then replays it and says whether the update is
            what it gives. ``examples`` are all that is trained on, then, and no other mod stands
            between the training and the guard.
        box: Pixel space of these inputs.
        seed: Of the defense's noise.

    Raises:
        InvalidParameter: If a defense is missing, is not used, or does not act on updates.
    """

    model: Callable[[], nn.Module] | None = None
    on_alarm: Consequence = "log"
    defense: Defense | None = None
    examples: Examples | None = None
    protocol: Protocol | None = None
    box: Box | None = None
    seed: int | None = None
    _accepted: dict[str, dict[str, Tensor]] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if (self.on_alarm == "defend") != (self.defense is not None):
            raise InvalidParameter(
                "A guard defends with on_alarm='defend' and defense=..., both or neither; got "
                f"on_alarm={self.on_alarm!r} and defense={self.defense!r}."
            )
        if self.defense is not None and (
            acts_at(self.defense) != ("update",) or ActsOn.PER_UPDATE not in self.defense.modes
        ):
            raise InvalidParameter(
                f"{self.defense.key!r} acts at {', '.join(acts_at(self.defense))}; a guard can "
                "only apply a defense of whole updates to what is about to leave, such as clipping."
            )
        if self.defense is not None and self.model is None:
            raise InvalidParameter(
                "A guard that defends needs model=, to know what are parameters."
            )
        if self.protocol is not None and (self.model is None or self.examples is None):
            raise InvalidParameter(
                "A guard replays the training of protocol= on examples= with model=: give all "
                "three."
            )

    def arriving(self, received: Mapping[str, Any], *, client: str = "") -> Verdict:
        """Was this model tampered with?

        Args:
            received: What arrived, by name.
            client: Whose memory of accepted models this is.

        Raises:
            InvalidInput: If the arrays do not fit the model.
        """
        state = self._state(received)
        before = self._accepted.get(client)
        verdict = lint(self._loaded(state), reference=before, batch=self._batch(), box=self.box)
        if not verdict.alarm:
            self._accepted[client] = state
        return verdict

    def leaving(self, received: Mapping[str, Any], sent: Mapping[str, Any]) -> Departure | None:
        """What does the update that is about to leave give away?

        Returns:
            The findings, or None without ``model`` and ``examples``: nobody else can tell.

        Raises:
            InvalidInput: If the arrays do not fit the model, or the examples do not.
        """
        batch = self._batch()
        if self.model is None or batch is None:
            return None
        model = self.model()
        state = self._state(received)
        update = Update.from_state_dicts(received, sent, model, num_examples=len(batch[0]))
        # Rows are read up to their scale: a change of the weights serves as a gradient.
        gradient = Update(
            tensors={n: -t for n, t in update.tensors.items()},
            kind="gradient",
            state_hash="",
            num_examples=len(batch[0]),
        )
        scores, skipped, leaks = measure(
            load_into(model, state), batch=batch, update=gradient, box=self.box
        )
        verdict = judge(scores, calibration().thresholds, skipped=skipped)
        read = torch.zeros(len(batch[0]), dtype=torch.bool)
        for leak in leaks:
            if leak.pixels:
                read |= leak.found.cpu()
        return Departure(verdict, int(read.sum()), len(read), self._diagnosed(state, update, batch))

    def _diagnosed(
        self, state: dict[str, Tensor], update: Update, batch: tuple[Tensor, Tensor]
    ) -> Diagnosis | None:
        if self.protocol is None:
            return None
        assert self.model is not None
        return doctor(
            self.model(),
            batch,
            captured=Capture(rounds=(CapturedRound(update=update, received=state),)),
            protocol=self.protocol,
            box=self.box,
        )

    def defended(
        self, received: Mapping[str, Any], sent: Mapping[str, Any], *, round: int, client: str
    ) -> dict[str, Tensor]:
        """What is sent instead: the received state plus the defended change; buffers as received.

        Raises:
            InvalidInput: If the arrays do not fit the model.
        """
        assert self.model is not None and self.defense is not None
        model = self.model()
        start = self._state(received)
        update = Update.from_state_dicts(received, sent, model, num_examples=1)
        generator = torch.Generator()
        generator.manual_seed(self.seed) if self.seed is not None else generator.seed()
        none = torch.empty(0)
        context = ClientContext(
            client=0, round=round, model=load_into(model, start),
            x=none, y=none, protocol=FedAVG(), generator=generator, memory={},
        )  # fmt: skip
        changed = self.defense.update(update, context)
        log.warning("Client %s sends an update defended with %s.", client, self.defense.key)
        return {**start, **{n: start[n] + t for n, t in changed.tensors.items()}}

    def _batch(self) -> tuple[Tensor, Tensor] | None:
        return None if self.examples is None or self.model is None else self.examples()

    def _state(self, received: Mapping[str, Any]) -> dict[str, Tensor]:
        if self.model is not None:
            model = self.model()
            named = by_name(received, model, "state received")
            return {**model_state(model), **named.parameters, **named.buffers}
        try:
            return {name: torch.as_tensor(value).clone() for name, value in received.items()}
        except (TypeError, ValueError, RuntimeError) as problem:
            raise InvalidInput(f"The received state holds more than arrays: {problem}.") from None

    def _loaded(self, state: dict[str, Tensor]) -> nn.Module | dict[str, Tensor]:
        return state if self.model is None else load_into(self.model(), state)


def judged(guard: Guard, received: Mapping[str, Any], *, client: str) -> str:
    """Why the round is to be refused or answered with a defended update; empty if all is well.

    What cannot be examined counts as an alarm: a model that does not fit the agreed one has been
    changed by somebody.
    """
    try:
        verdict = guard.arriving(received, client=client)
    except LeakAtlasError as problem:
        return f"the received model cannot be examined: {problem}"
    if not verdict.alarm:
        return ""
    return f"the received model looks tampered with ({', '.join(verdict.checks)}). {verdict}"


def outgoing(
    guard: Guard, received: Mapping[str, Any], sent: Mapping[str, Any], *, client: str
) -> str:
    """Why an update is not to leave as it is; empty if nothing speaks against it.

    What cannot be examined counts as an alarm.
    """
    try:
        found = guard.leaving(received, sent)
    except LeakAtlasError as problem:
        return f"the update cannot be examined: {problem}"
    if found is None:
        return ""
    log.info("What leaves client %s: %s.", client, found)
    return f"the update gives examples away: {found.alarm}" if found.alarm else ""
