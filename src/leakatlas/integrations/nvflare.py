"""Capture and lint as NVFlare filters (``nvflare`` 2.9).

:class:`CaptureFilter` belongs into both chains of one side, with the same folder: it remembers the
task data that arrived and pairs them with the result that leaves. It returns nothing, so that no
filter history and no audit event is added. :class:`LintFilter` belongs into the task data of a
client; by raising ``ContentBlockedException`` it keeps a tampered model from being trained on.

Filters of a site (``local/privacy.json``) run before those of a job, and a job cannot opt out of
them: a capture there sees the update before the job's own protection. The site must allow the
package (``class_allow_list``). Arguments are plain values, as a site's JSON holds them.

Source: the API of nvflare 2.9.0 (``nvflare.apis.dxo_filter``).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nvflare.apis.dxo import DXO, DataKind, MetaKey, from_shareable
from nvflare.apis.dxo_filter import DXOFilter
from nvflare.apis.filter import ContentBlockedException, FilterChainType, FilterContextKey
from nvflare.apis.fl_constant import FLContextKey
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import ReservedHeaderKey, Shareable
from torch import Tensor

from leakatlas import limits
from leakatlas.errors import InvalidInput, InvalidParameter, LeakAtlasError
from leakatlas.fl import ModelRef
from leakatlas.fl.recording import Exchange, Place, Recorder, Scalar
from leakatlas.integrations.guard import Guard, judged

log = logging.getLogger("leakatlas.nvflare")

KINDS = [DataKind.WEIGHTS, DataKind.WEIGHT_DIFF]
ROUND = "current_round"
FRAMEWORK = (ReservedHeaderKey.HEADERS, ReservedHeaderKey.PEER_CTX)
"""Entries of a task that NVFlare itself reads and no trainer."""

KEPT = "leakatlas_received"
"""Under which name the context of a site keeps what arrived."""


@dataclass(frozen=True)
class Arrived:
    """What a task brought, until its result leaves.

    Args:
        task: Its number; empty at a server, which numbers it later.
        round: Its round.
        arrays: Copies by name; none where they are left out.
        why: Why they are.
    """

    task: str
    round: int
    arrays: Mapping[str, Tensor] = field(default_factory=dict)
    why: str = ""


class CaptureFilter(DXOFilter):
    """Records what a task brought and what its result takes away.

    Args:
        folder: Where captures go.
        place: ``raw`` in a site's policy or before a job's protection, ``wire`` after it, both at
            a client; ``server`` at the server.
        rounds: Which; all if None.
        clients: Which, by site name; all if None.
        limit_mb: What the folder may hold.
    """

    def __init__(
        self,
        folder: str,
        place: Place = "raw",
        rounds: Sequence[int] | None = None,
        clients: Sequence[str] | None = None,
        limit_mb: float = 2048.0,
    ) -> None:
        super().__init__(supported_data_kinds=KINDS, data_kinds_to_filter=KINDS)
        if place not in ("raw", "wire", "server"):
            raise InvalidParameter(f"place is {place!r}; expected raw, wire or server.")
        # NVFlare writes a job's arguments from attributes of their names.
        self.folder, self.place, self.rounds = folder, place, rounds
        self.clients, self.limit_mb = clients, limit_mb
        self.recorder = Recorder(
            folder=Path(folder),
            rounds=None if rounds is None else frozenset(rounds),
            clients=None if clients is None else frozenset(clients),
            limit=int(limit_mb * limits.MIB),
        )
        self._last: Mapping[str, Tensor] = {}

    def process_dxo(self, dxo: DXO, shareable: Shareable, fl_ctx: FLContext) -> None:
        """Look, and change nothing."""
        client = _client(fl_ctx, at_server=self.place == "server")
        name = f"{KEPT}_{client}"
        task = str(fl_ctx.get_prop(FLContextKey.TASK_ID, ""))
        if self.get_prop(FilterContextKey.CHAIN_TYPE) == FilterChainType.TASK_DATA_CHAIN:
            # Of every task, so that no result is paired with the task before.
            arrived = self._arrived(dxo, Arrived(task, _round(dxo, shareable)), client)
            fl_ctx.set_prop(name, arrived, private=True, sticky=True)
            return
        arrived = fl_ctx.get_prop(name)
        if arrived is None or arrived.task not in ("", task):
            said = "Not captured: what leaves client %s, since no data of its task passed here."
            log.warning(said, client)
        elif self.recorder.wants(arrived.round, client):
            self._record(arrived, dxo, client)

    def _arrived(self, dxo: DXO, task: Arrived, client: str) -> Arrived:
        """With copies of what arrived, if the exchange is wanted and fits; else why not."""
        if not self.recorder.wants(task.round, client):
            return replace(task, why="a filter of the task data was told to leave this round out")
        try:
            # What comes back is about as large.
            if why := self.recorder.refuses(2 * _size(dxo)):
                return replace(task, why=why)
            held = tensors(dxo)
        except InvalidInput as problem:
            return replace(task, why=f"what arrived cannot be read: {problem}")
        if not _equal(held, self._last):  # a server sends many clients the same model
            self._last = held
        return replace(task, arrays=self._last)

    def _record(self, arrived: Arrived, dxo: DXO, client: str) -> None:
        """Write the exchange, or why its arrays are left out; never stop the job."""
        exchange = Exchange(
            round=arrived.round,
            client=client,
            place=self.place,
            received=arrived.arrays,
            sent={},
            kind="weights" if dxo.data_kind == DataKind.WEIGHTS else "delta",
            settings=_settings(dxo),
            framework=f"nvflare {version('nvflare')}",
        )
        why = arrived.why
        try:
            size = sum(tensor.nbytes for tensor in arrived.arrays.values()) + _size(dxo)
            why = why or self.recorder.refuses(size)
            if not why:
                exchange = replace(exchange, sent=tensors(dxo))
            self.recorder.write(exchange, left_out=why)
        except LeakAtlasError as problem:
            why = str(problem)
        if why:
            said = "Not captured: round %d of client %s, since %s."
            log.warning(said, arrived.round, client, why.rstrip("."))


class LintFilter(DXOFilter):
    """Keeps a client from training on a model that looks tampered with.

    A server chooses how it dresses what it sends, so whatever holds arrays is examined or counts
    as an alarm: a change of weights, arrays beside the model, a task that says it failed. Tasks
    without arrays pass.

    Args:
        model: ``package.module:factory`` of the agreed architecture; only names and weights are
            examined without it.
        on_alarm: ``refuse`` blocks the task, ``log`` says so and goes on.
    """

    def __init__(self, model: str | None = None, on_alarm: str = "refuse") -> None:
        super().__init__(supported_data_kinds=KINDS, data_kinds_to_filter=[DataKind.WEIGHTS])
        if on_alarm not in ("refuse", "log"):
            raise InvalidParameter(f"on_alarm is {on_alarm!r}; expected refuse or log.")
        self.model, self.on_alarm = model, on_alarm
        reference = None if model is None else ModelRef("python", model)
        self.guard = Guard(
            # Whoever configures the site names this code.
            model=None if reference is None else lambda: reference.build(trust_code=True),
            on_alarm="refuse" if on_alarm == "refuse" else "log",
        )

    def process(self, shareable: Shareable, fl_ctx: FLContext) -> Shareable:
        """Examine a task, whatever its return code; the inherited one lets failed ones through.

        Raises:
            ContentBlockedException: On an alarm, with the evidence.
        """
        if not _holds_arrays({n: v for n, v in shareable.items() if n not in FRAMEWORK}):
            return shareable
        weights, why = _weights(shareable)
        if weights is None:
            self._alarm(f"what arrived cannot be examined: {why}", _round(None, shareable), fl_ctx)
        else:
            self.process_dxo(weights, shareable, fl_ctx)
        return shareable

    def process_dxo(self, dxo: DXO, shareable: Shareable, fl_ctx: FLContext) -> None:
        """Examine the weights.

        Raises:
            ContentBlockedException: On an alarm, with the evidence.
        """
        client = _client(fl_ctx, at_server=False)
        try:
            alarm = judged(self.guard, tensors(dxo), client=client)
        except InvalidInput as problem:
            alarm = f"what arrived cannot be examined: {problem}"
        if alarm:
            self._alarm(alarm, _round(dxo, shareable), fl_ctx)

    def _alarm(self, alarm: str, round: int, fl_ctx: FLContext) -> None:
        said = f"Client {_client(fl_ctx, at_server=False)} refuses round {round}: {alarm}"
        if self.guard.on_alarm == "refuse":
            raise ContentBlockedException(said)
        log.warning("%s", said)


def _weights(shareable: Shareable) -> tuple[DXO | None, str]:
    """The weights that are all the arrays of a task; None, and why, where there is more or less."""
    try:
        dxo = from_shareable(shareable)
    except ValueError as problem:
        return None, f"it is no data exchange object ({problem})"
    if dxo.data_kind != DataKind.WEIGHTS:
        return None, f"it is of kind {dxo.data_kind!r}, and only whole weights can be judged"
    beside = {n: v for n, v in shareable.items() if n not in (*FRAMEWORK, "DXO")}
    if _holds_arrays([beside, dxo.meta]):
        return None, "arrays stand beside the model"
    return dxo, ""


def _holds_arrays(value: object) -> bool:
    """Whether an array is anywhere within; what is not plain data is taken for one."""
    if isinstance(value, dict):
        return any(map(_holds_arrays, value.values()))
    if isinstance(value, list | tuple | set | frozenset):
        return any(map(_holds_arrays, value))
    return not (value is None or isinstance(value, str | int | float | bool | np.generic))


def tensors(dxo: DXO) -> dict[str, Tensor]:
    """Copies of the arrays by name; counters and single numbers too.

    Copies, since later filters and the trainer may change arrays in place.

    Raises:
        InvalidInput: If something else stands among them.
    """
    try:
        return {name: torch.as_tensor(value).detach().clone() for name, value in dxo.data.items()}
    except (AttributeError, TypeError, ValueError, RuntimeError) as problem:
        raise InvalidInput(f"It holds more than arrays by name: {problem}.") from None


def _size(dxo: DXO) -> int:
    """Bytes of its arrays, which need not be read for it.

    Raises:
        InvalidInput: If it holds no arrays by name.
    """
    if not isinstance(dxo.data, dict):
        raise InvalidInput(f"It holds a {type(dxo.data).__name__} and no arrays by name.")
    return sum(int(getattr(value, "nbytes", 0)) for value in dxo.data.values())


def _equal(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        t.dtype == other[n].dtype and torch.equal(t, other[n]) for n, t in one.items()
    )


def _client(context: FLContext, *, at_server: bool) -> str:
    peer = context.get_peer_context() if at_server else None
    return str((peer or context).get_identity_name())


def _round(dxo: DXO | None, shareable: Shareable) -> int:
    # The header first: what stands beside an aggregated model is of the round that made it.
    found = shareable.get_header(ROUND)
    if found is None and dxo is not None:
        found = dxo.get_meta_prop(MetaKey.CURRENT_ROUND)
    return int(found) if isinstance(found, int | str) and str(found).isdigit() else 0


def _settings(dxo: DXO) -> dict[str, Scalar]:
    steps: Any = dxo.get_meta_prop(MetaKey.NUM_STEPS_CURRENT_ROUND)
    return {"steps": int(steps)} if isinstance(steps, int | float) else {}
