"""Capture and guard for Flower apps (``flwr`` 1.24 and newer, message API).

A client records what goes by with a mod; where it stands in the list is what it sees::

    app = ClientApp(mods=[capture_wire_mod, LocalDpMod(...), capture_raw_mod])

``capture_wire_mod`` belongs first (outermost): it sees what the wire carries, after all others.
``capture_raw_mod`` belongs last: it sees what training gave. Their difference is what the mods
between them do. A server records every client with :class:`CapturingStrategy` around its own
strategy. :func:`guard_mod` looks at what arrives and what would leave.

The client's mods read their settings from the run configuration (``[tool.flwr.app.config]``),
since they are made before it exists: ``leakatlas-folder`` (absolute), ``leakatlas-rounds`` and
``leakatlas-clients`` (``"1,3"``; all if left out), ``leakatlas-limit-mb``. Nothing is added to any
message.

Under SecAgg+, which Flower has for its older API only, a client's wire holds masked integers: the
capture says so and holds no arrays. What the server learns is the mean:
:class:`CapturingLegacyStrategy` records it.

Source: the API of flwr 1.24 to 1.42 (``flwr.clientapp``, ``flwr.serverapp.strategy``).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from flwr.app import (
    Array,
    ArrayRecord,
    ConfigRecord,
    Context,
    Error,
    Message,
    MessageType,
    MetricRecord,
)
from flwr.common import parameters_to_ndarrays
from flwr.server.strategy import Strategy as LegacyStrategy
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy
from torch import Tensor

from leakatlas import limits
from leakatlas.errors import InvalidParameter, LeakAtlasError, shown
from leakatlas.fl.recording import Exchange, Place, Recorder, Scalar
from leakatlas.integrations.guard import Guard, judged, outgoing

log = logging.getLogger("leakatlas.flower")

Next = Callable[[Message, Context], Message]
Mod = Callable[[Message, Context, Next], Message]

REFUSED = 451
"""Code of the error that a guard answers with; Flower leaves codes from 100 on to applications."""

EXAMPLES = ("num-examples", "num_examples")
"""What clients call their number of examples in the metrics of a reply."""

PREFIX = "leakatlas-"

SECAGG = "secaggplus"
"""How the records of SecAgg+ in a message begin."""

MASKED_VECTOR = "masked_params"
"""Under which name a client of SecAgg+ sends what it computed."""

MASKED = (
    "SecAgg+ masks it: the wire holds integers that look random; what the server learns is the "
    "mean, recorded by CapturingLegacyStrategy"
)


def tensors(record: Mapping[str, Array]) -> dict[str, Tensor]:
    """Copies of the arrays of a record by name: counters and single numbers too."""
    return {name: torch.as_tensor(array.numpy()) for name, array in record.items()}


def capture_wire_mod(message: Message, context: Context, call_next: Next) -> Message:
    """Record what goes on the wire: first in the list of mods."""
    return _captured("wire", message, context, call_next)


def capture_raw_mod(message: Message, context: Context, call_next: Next) -> Message:
    """Record what training gave, before any other mod: last in the list of mods."""
    return _captured("raw", message, context, call_next)


def _captured(place: Place, message: Message, context: Context, call_next: Next) -> Message:
    if not _trains(message) or _agrees_on_keys(message):
        return call_next(message, context)
    recorder, client = recorder_of(context.run_config), str(context.node_id)
    arrived = _only(message, "arrived") if recorder.wants(_round(message), client) else None
    if arrived is None:
        return call_next(message, context)
    # The client may empty the message; the arrays in it are bytes, which nobody changes in place.
    held = dict(arrived.items())
    reply = call_next(message, context)
    if reply.has_error() or (sent := _only(reply, "would leave")) is None:
        return reply
    exchange = Exchange(
        round=_round(message),
        client=client,
        place=place,
        received={},
        sent={},
        examples=_examples(reply),
        settings=_settings(message, context),
        framework=f"flwr {version('flwr')}",
    )
    hidden = MASKED if place == "wire" and _masked(reply) else ""
    _record(recorder, exchange, held, sent, hidden=hidden)
    return reply


def _agrees_on_keys(message: Message) -> bool:
    """Whether a message belongs to a stage of SecAgg+ in which no model travels."""
    return not message.content.array_records and any(
        name.startswith(SECAGG) for name in message.content.config_records
    )


def _masked(reply: Message) -> bool:
    """Whether a reply carries the masked vector of SecAgg+."""
    return any(
        name.startswith(SECAGG) and MASKED_VECTOR in config
        for name, config in reply.content.config_records.items()
    )


def recorder_of(config: Mapping[str, Any]) -> Recorder:
    """The recorder that a run configuration asks for.

    Raises:
        InvalidParameter: If ``leakatlas-folder`` is missing or relative, or a value makes no sense.
    """
    known = {"folder", "rounds", "clients", "limit-mb"}
    given = {n.removeprefix(PREFIX): v for n, v in config.items() if n.startswith(PREFIX)}
    if unknown := sorted(set(given) - known):
        raise InvalidParameter(
            f"The run configuration has {PREFIX}{unknown[0]}; known: "
            + ", ".join(PREFIX + name for name in sorted(known))
            + "."
        )
    folder = Path(str(given.get("folder", "")))
    if not folder.is_absolute():
        raise InvalidParameter(
            f"{PREFIX}folder is {shown(given.get('folder', 'missing'))}; expected an absolute "
            "path: Flower runs apps in folders of its own. Set it in [tool.flwr.app.config], or "
            f"with flwr run --run-config '{PREFIX}folder=\"/where/captures/go\"'."
        )
    return Recorder(
        folder=folder,
        rounds=_rounds(given.get("rounds")),
        clients=_clients(given.get("clients")),
        limit=_limit(given.get("limit-mb")),
    )


def _clients(value: object) -> frozenset[str] | None:
    return None if value is None else frozenset(part.strip() for part in str(value).split(","))


def _rounds(value: object) -> frozenset[int] | None:
    if value is None:
        return None
    try:
        return frozenset(int(part) for part in str(value).split(","))
    except ValueError:
        raise InvalidParameter(
            f"{PREFIX}rounds is {shown(value)}; expected whole numbers such as '1,3'."
        ) from None


def _limit(value: object) -> int:
    if value is None:
        return Recorder.limit
    if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
        raise InvalidParameter(f"{PREFIX}limit-mb is {shown(value)}; expected a positive number.")
    return int(value * limits.MIB)


def _record(
    recorder: Recorder,
    exchange: Exchange,
    received: Mapping[str, Array],
    sent: Mapping[str, Array],
    *,
    hidden: str = "",
) -> None:
    """Write an exchange; a folder that fails costs the capture, never the training.

    Args:
        recorder: Writes it.
        exchange: Without its arrays, which are read only if they fit.
        received: Its arrays.
        sent: Its arrays.
        hidden: Why there is nothing to see in them.
    """
    where = f"round {exchange.round} of client {exchange.client}"
    try:
        why = hidden or recorder.refuses(_size(received) + _size(sent))
        if not why:
            exchange = replace(exchange, received=tensors(received), sent=tensors(sent))
        recorder.write(exchange, left_out=why)
        if why:
            log.warning("Not captured: %s, since %s.", where, why)
    except LeakAtlasError as problem:
        log.warning("Not captured: %s. %s", where, problem)


def _size(record: Mapping[str, Array]) -> int:
    return sum(len(array.data) for array in record.values())


def _trains(message: Message) -> bool:
    kind: str = message.metadata.message_type  # "train", or "train.name of a function"
    return kind.split(".")[0] == str(MessageType.TRAIN)


def _only(message: Message, what: str) -> ArrayRecord | None:
    """The one record of arrays in a message; None, and a warning, where there is another number."""
    records = list(message.content.array_records.values())
    if len(records) == 1:
        return records[0]
    log.warning("Not captured: what %s has %d records of arrays, expected one.", what, len(records))
    return None


def _round(message: Message) -> int:
    for config in message.content.config_records.values():
        if "server-round" in config:
            return int(str(config["server-round"]))
    # Strategies name the group of a round's messages after it.
    group = message.metadata.group_id
    return int(group) if group.isdigit() else 0


def _examples(reply: Message) -> int | None:
    for metrics in reply.content.metric_records.values():
        for name in EXAMPLES:
            if isinstance(value := metrics.get(name), int | float):
                return int(value)
    return None


def _settings(message: Message, context: Context) -> dict[str, Scalar]:
    """Numbers and switches of the run; texts stay out: they may be secrets."""
    found: dict[str, Scalar] = {}
    for source in (context.run_config, *message.content.config_records.values()):
        for name, value in source.items():
            if isinstance(value, bool | int | float) and not name.startswith(PREFIX):
                found[name] = value
    if "partition-id" in context.node_config:
        found["partition-id"] = int(str(context.node_config["partition-id"]))
    return found


class CapturingStrategy(Strategy):
    """Records at the server what every client was sent and what it answered, around a strategy.

    Args:
        strategy: The one that decides; everything is passed on to it.
        folder: Where captures go.
        rounds: Which; all if None.
        clients: Which node ids; all if None.
        limit: Bytes that the folder may hold.
        aggregate: Whether the mean that the strategy made is recorded too, as everybody sees it.
        per_client: Whether single clients are; with SecAgg+ there is nothing to see of them.
    """

    def __init__(
        self,
        strategy: Strategy,
        folder: Path | str,
        *,
        rounds: Iterable[int] | None = None,
        clients: Iterable[int] | None = None,
        limit: int = Recorder.limit,
        aggregate: bool = True,
        per_client: bool = True,
    ) -> None:
        self.strategy = strategy
        self.recorder = Recorder(
            folder=Path(folder),
            rounds=None if rounds is None else frozenset(rounds),
            clients=None if clients is None else frozenset(map(str, clients)),
            limit=limit,
        )
        self.aggregate = aggregate
        self.per_client = per_client
        self._sent: dict[int, tuple[dict[str, Array], dict[str, Scalar]]] = {}
        self._broadcast: dict[str, Array] = {}

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """The strategy's messages; what each client is sent is kept until it answers."""
        messages = list(self.strategy.configure_train(server_round, arrays, config, grid))
        self._sent = {}
        self._broadcast = dict(arrays.items()) if self.aggregate else {}
        for message in messages:
            client = str(message.metadata.dst_node_id)
            if not (self.per_client and self.recorder.wants(server_round, client)):
                continue
            record = _only(message, "is sent")
            if record is not None:  # a server may send every client something else
                held = dict(record.items())
                self._sent[message.metadata.dst_node_id] = (held, _plain(message))
        return messages

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Record the replies, then let the strategy aggregate them."""
        # Both read them, and they may be a generator.
        answers = list(replies)
        good = [reply for reply in answers if not reply.has_error()]
        for reply in good:
            client = reply.metadata.src_node_id
            if client not in self._sent or (sent := _only(reply, "came back")) is None:
                continue
            received, settings = self._sent[client]
            exchange = self._exchange(server_round, str(client), "server", len(good))
            exchange = replace(exchange, examples=_examples(reply), settings=settings)
            _record(self.recorder, exchange, received, sent)
        arrays, metrics = self.strategy.aggregate_train(server_round, answers)
        if self.aggregate and arrays is not None and good:
            counts = [_examples(reply) for reply in good]
            known = [count for count in counts if count is not None]
            exchange = self._exchange(server_round, "all", "aggregate", len(good))
            total = sum(known) if len(known) == len(counts) else None
            _record(self.recorder, replace(exchange, examples=total), self._broadcast, arrays)
        return arrays, metrics

    def _exchange(self, round: int, client: str, place: Place, cohort: int) -> Exchange:
        return Exchange(
            round=round, client=client, place=place, received={}, sent={}, cohort=cohort,
            framework=f"flwr {version('flwr')}",
        )  # fmt: skip

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """The strategy's."""
        messages: Iterable[Message] = self.strategy.configure_evaluate(
            server_round, arrays, config, grid
        )
        return messages

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """The strategy's."""
        return self.strategy.aggregate_evaluate(server_round, replies)

    def summary(self) -> None:
        """The strategy's, and where captures go."""
        self.strategy.summary()
        log.info("LeakAtlas captures go to %s.", self.recorder.folder)


class CapturingLegacyStrategy(LegacyStrategy):
    """Records the mean that a strategy of Flower's older API makes: all that SecAgg+ shows.

    Args:
        strategy: The one that decides; everything is passed on to it.
        folder: Where captures go.
        rounds: Which; all if None.
        limit: Bytes that the folder may hold.
    """

    def __init__(
        self,
        strategy: LegacyStrategy,
        folder: Path | str,
        *,
        rounds: Iterable[int] | None = None,
        limit: int = Recorder.limit,
    ) -> None:
        self.strategy = strategy
        self.recorder = Recorder(
            folder=Path(folder), rounds=None if rounds is None else frozenset(rounds), limit=limit
        )
        self._broadcast: dict[str, Array] = {}

    def initialize_parameters(self, client_manager: Any) -> Any:
        """The strategy's."""
        return self.strategy.initialize_parameters(client_manager)

    def configure_fit(self, server_round: int, parameters: Any, client_manager: Any) -> Any:
        """The strategy's; what is broadcast is kept until the mean is there."""
        self._broadcast = _unnamed(parameters)
        return self.strategy.configure_fit(server_round, parameters, client_manager)

    def aggregate_fit(self, server_round: int, results: Any, failures: Any) -> Any:
        """The strategy's, recorded."""
        aggregated, metrics = self.strategy.aggregate_fit(server_round, results, failures)
        if aggregated is not None and results:
            exchange = Exchange(
                round=server_round,
                client="all",
                place="aggregate",
                received={},
                sent={},
                examples=sum(answer.num_examples for _, answer in results),
                cohort=len(results),
                framework=f"flwr {version('flwr')}",
            )
            _record(self.recorder, exchange, self._broadcast, _unnamed(aggregated))
        return aggregated, metrics

    def configure_evaluate(self, server_round: int, parameters: Any, client_manager: Any) -> Any:
        """The strategy's."""
        return self.strategy.configure_evaluate(server_round, parameters, client_manager)

    def aggregate_evaluate(self, server_round: int, results: Any, failures: Any) -> Any:
        """The strategy's."""
        return self.strategy.aggregate_evaluate(server_round, results, failures)

    def evaluate(self, server_round: int, parameters: Any) -> Any:
        """The strategy's."""
        return self.strategy.evaluate(server_round, parameters)


def _unnamed(parameters: Any) -> dict[str, Array]:
    """Arrays of the older API, which come without names: places in their list."""
    return {
        str(place): Array(array) for place, array in enumerate(parameters_to_ndarrays(parameters))
    }


def _plain(message: Message) -> dict[str, Scalar]:
    return {
        name: value
        for config in message.content.config_records.values()
        for name, value in config.items()
        if isinstance(value, bool | int | float)
    }


def guard_mod(guard: Guard) -> Mod:
    """A mod that examines what arrives and what would leave; first in the list of mods.

    On an alarm the guard logs it, refuses the round (the server gets an error reply, and goes on
    without this client), or sends an update defended by its named defense.

    Args:
        guard: What is examined, and what follows.
    """

    def mod(message: Message, context: Context, call_next: Next) -> Message:
        if not _trains(message):
            return call_next(message, context)
        records = list(message.content.array_records.values())
        if not records:
            return call_next(message, context)
        client, received = str(context.node_id), tensors(records[0])
        alarm = judged(guard, received, client=client)
        if len(records) > 1:
            # The app may train on either, and a server chooses what it sends.
            alarm = f"{len(records)} records of arrays arrived, where one model was agreed"
        if alarm and guard.on_alarm == "refuse":
            return _refusal(message, client, alarm)
        reply = call_next(message, context)
        if reply.has_error():
            return reply
        if _masked(reply) and not alarm:
            return reply  # what leaves is hidden in the mean; what arrived was in order
        leaving = list(reply.content.array_records.values())
        if len(leaving) != 1 or len(records) != 1 or set(leaving[0]) != set(received):
            why = f"{len(records)} records of arrays arrived, {len(leaving)} others would leave"
            return _unjudged(guard, message, reply, client, alarm or why)
        sent = leaving[0]
        alarm = alarm or outgoing(guard, received, tensors(sent), client=client)
        if not alarm:
            return reply
        if guard.on_alarm == "refuse":
            return _refusal(message, client, alarm)
        log.warning("Client %s, round %d: %s", client, _round(message), alarm)
        if guard.on_alarm == "defend":
            changed = guard.defended(received, tensors(sent), round=_round(message), client=client)
            if missing := set(sent) - set(changed):
                why = f"{alarm} (arrays named {min(missing)!r} cannot be defended by name)"
                return _refusal(message, client, why)
            key = next(iter(reply.content.array_records))
            reply.content[key] = ArrayRecord(torch_state_dict={n: changed[n] for n in sent})
        return reply

    return mod


def _unjudged(guard: Guard, message: Message, reply: Message, client: str, why: str) -> Message:
    """What follows where an update cannot be told from what else travels: nothing to defend."""
    if guard.on_alarm == "log":
        log.warning("Client %s, round %d: %s", client, _round(message), why)
        return reply
    return _refusal(message, client, why)


def _refusal(message: Message, client: str, alarm: str) -> Message:
    log.error("Client %s refuses round %d: %s", client, _round(message), alarm)
    reason = f"Client {client} refuses this round: {alarm}"
    return Message(Error(code=REFUSED, reason=reason[:1000]), reply_to=message)


__all__ = [
    "REFUSED",
    "CapturingLegacyStrategy",
    "CapturingStrategy",
    "Guard",
    "capture_raw_mod",
    "capture_wire_mod",
    "guard_mod",
    "recorder_of",
]
