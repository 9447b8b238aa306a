"""Exchanges recorded from a running federation: what went to a client, and what came back.

A folder holds one folder a round (``round-00003``), and in it two files an exchange: its arrays
(``raw-7.safetensors``) and what is known of them (``raw-7.json``). The facts are written last and
appear under their name only when whole, so that a killed process leaves no half exchange. What was
left out, for its size say, leaves a file of facts without arrays, so that a reader can say so.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Self

from safetensors.torch import save_file
from torch import Tensor, nn

from leakatlas import limits, reading, tensorfiles
from leakatlas.errors import InvalidInput, InvalidParameter, UnknownName, shown
from leakatlas.fl.capture import Capture, CapturedRound
from leakatlas.fl.naming import by_name
from leakatlas.fl.protocol import FedAVG, FedSGD, Protocol
from leakatlas.fl.update import Kind, Update
from leakatlas.params import Configured, NonNegativeInt, PositiveInt

FORMAT = "leakatlas/exchange/1"

Place = Literal["raw", "wire", "server", "aggregate"]
"""Where it was recorded: at the client before (``raw``) or after (``wire``) what guards its
update, at the server for every client, or the mean of all that the server broadcasts."""

PREFERRED: tuple[Place, ...] = ("wire", "server", "raw", "aggregate")
"""The order in which a reader chooses a place, if nobody names one: as an adversary sees it."""

Scalar = bool | int | float | str

BEYOND = "beyond"
"""The setting in which a recorder says what happened that no protocol describes."""

SETTINGS: dict[str, tuple[str, ...]] = {
    "lr": ("lr", "learning_rate", "local_lr", "client_lr"),
    "epochs": ("epochs", "local_epochs", "num_epochs", "num_train_epochs"),
    "batch_size": ("batch_size", "local_batch_size", "train_batch_size"),
    "momentum": ("momentum",),
    "weight_decay": ("weight_decay",),
    "optimizer": ("optimizer",),
    "shuffle": ("shuffle",),
    "mode": ("mode",),
}
"""How applications call what a protocol needs; dashes and underscores are alike."""


@dataclass(frozen=True, kw_only=True)
class _Facts(Configured):
    """The JSON file beside the arrays; see :class:`Exchange`."""

    format: Literal["leakatlas/exchange/1"]
    round: NonNegativeInt
    client: str
    place: Place
    kind: Kind
    examples: PositiveInt | None = None
    cohort: PositiveInt = 1
    settings: dict[str, Scalar] = field(default_factory=dict)
    framework: str = ""
    left_out: str = ""


@dataclass(frozen=True, kw_only=True)
class Exchange:
    """What one client received and sent in one round.

    Args:
        round: As the framework counts it.
        client: Its id in the framework, as text.
        place: Where it was recorded.
        received: Arrays by name, as they came: parameters, buffers and counters.
        sent: The same of the answer.
        kind: What was sent: weights after training, their change, or a gradient.
        examples: Examples behind it, as the client reported them; None if it did not.
        cohort: How many clients took part.
        settings: Plain values that the run was configured with.
        framework: Name and version of what ran.
    """

    round: int
    client: str
    place: Place
    received: Mapping[str, Tensor]
    sent: Mapping[str, Tensor]
    kind: Kind = "weights"
    examples: int | None = None
    cohort: int = 1
    settings: Mapping[str, Scalar] = field(default_factory=dict)
    framework: str = ""


@dataclass(frozen=True, kw_only=True)
class Recorder:
    """Writes exchanges into a folder.

    Args:
        folder: Made where it is missing; several processes may write into one.
        rounds: Which; all if None.
        clients: Which; all if None.
        limit: Bytes that the folder may hold; what would pass it is left out, and says so.
    """

    folder: Path
    rounds: frozenset[int] | None = None
    clients: frozenset[str] | None = None
    limit: int = 2 * 1024 * limits.MIB

    def wants(self, round: int, client: str) -> bool:
        """Whether this exchange is to be recorded."""
        return (self.rounds is None or round in self.rounds) and (
            self.clients is None or client in self.clients
        )

    def refuses(self, size: int) -> str:
        """Why so many bytes of arrays do not fit any more; empty if they do."""
        held = sum(f.stat().st_size for f in self.folder.glob("round-*/*.safetensors"))
        if held + size <= self.limit:
            return ""
        return (
            f"its {limits.size(size)} beside {limits.size(held)} that are there pass the limit "
            f"of {limits.size(self.limit)}"
        )

    def write(self, exchange: Exchange, *, left_out: str = "") -> None:
        """Write an exchange.

        Args:
            exchange: With its arrays.
            left_out: Why they are not written; see :meth:`refuses`. Readers show it.

        Raises:
            InvalidInput: If the folder cannot be written to.
        """
        folder = self.folder / f"round-{exchange.round:05d}"
        stem = f"{exchange.place}-{_file_name(exchange.client)}"
        facts = {n: v for n, v in vars(exchange).items() if n not in ("received", "sent")}
        facts["settings"] = dict(exchange.settings)
        text = json.dumps({"format": FORMAT, **facts, "left_out": left_out}, indent=1)
        content = {f"received/{n}": t for n, t in exchange.received.items()}
        content |= {f"sent/{n}": t for n, t in exchange.sent.items()}
        who = f"The folder of captures {shown(str(self.folder))}"
        with reading.boundary(who, way_out="Give a folder that can be written to."):
            folder.mkdir(parents=True, exist_ok=True)
            if not left_out:
                plain = _apart(content)
                _whole(folder / f"{stem}.safetensors", lambda path: save_file(plain, path))
            _whole(folder / f"{stem}.json", lambda path: path.write_text(text, encoding="utf-8"))


def _apart(content: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """On the CPU, whole, and none sharing memory, which safetensors refuses; others uncopied."""
    apart, seen = {}, set()
    for name, tensor in content.items():
        plain = tensor.detach().cpu().contiguous()
        storage = plain.untyped_storage()
        shared = storage.data_ptr() in seen or storage.nbytes() != plain.nbytes
        apart[name] = plain.clone() if shared else plain
        seen.add(storage.data_ptr())
    return apart


def _whole(path: Path, write: Callable[[Path], Any]) -> None:
    """The file appears under its name when it is whole, or not at all."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        write(part)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _file_name(client: str) -> str:
    return re.sub(r"[^A-Za-z0-9_.-]", "_", client)[:100] or "_"


@dataclass(frozen=True)
class Recording:
    """Exchanges of one client at one place, oldest first.

    Args:
        exchanges: At least one, rounds ascending.
        notes: What else the folder holds, and what is missing, for people.
    """

    exchanges: tuple[Exchange, ...]
    notes: tuple[str, ...] = ()

    @property
    def last(self) -> Exchange:
        """The latest exchange."""
        return self.exchanges[-1]

    def select(self, rounds: Iterable[int]) -> Self:
        """Only these rounds.

        Raises:
            InvalidInput: If none of them was recorded.
        """
        wanted = set(rounds)
        kept = tuple(e for e in self.exchanges if e.round in wanted)
        if not kept:
            there = ", ".join(str(e.round) for e in self.exchanges)
            raise InvalidInput(
                f"Rounds {sorted(wanted)} of client {self.last.client!r} were not recorded; "
                f"these were: {there}."
            )
        return replace(self, exchanges=kept)

    def capture(self, model: nn.Module, *, examples: int | None = None) -> Capture:
        """What audits take.

        Args:
            model: Whose names the arrays bear; its values are not read.
            examples: Behind each update, where the client did not report them.

        Raises:
            InvalidInput: If the arrays do not fit the model, or nobody says how many examples.
        """
        return Capture(
            rounds=tuple(_captured(e, model, examples) for e in self.exchanges), notes=self.notes
        )


def _captured(exchange: Exchange, model: nn.Module, examples: int | None) -> CapturedRound:
    where = f"round {exchange.round} of client {exchange.client!r}"
    count = exchange.examples or examples
    if count is None:
        raise InvalidInput(
            f"Nothing in {where} says how many examples were behind it: clients report it to "
            "Flower as 'num-examples', and to others in their own words. Give examples=."
        )
    start = by_name(exchange.received, model, f"state received in {where}")
    clients = exchange.cohort if exchange.place == "aggregate" else 1
    if exchange.kind == "gradient":
        update = Update.from_gradients(exchange.sent, model, num_examples=count, clients=clients)
    elif exchange.kind == "weights":
        update = Update.from_state_dicts(
            exchange.received, exchange.sent, model, num_examples=count, clients=clients
        )
    else:
        moved = by_name(exchange.sent, model, f"change sent in {where}")
        trained = {n for n, p in model.named_parameters() if p.requires_grad}
        update = Update(
            tensors={n: t for n, t in moved.parameters.items() if n in trained},
            kind="delta",
            state_hash="",
            num_examples=count,
            clients=clients,
        ).check()
    return CapturedRound(
        update=update,
        received={**start.parameters, **start.buffers},
        index=exchange.round,
        cohort=exchange.cohort,
    )


def read_recording(
    folder: Path | str, *, place: Place | None = None, client: str | None = None
) -> Recording:
    """Read what :class:`Recorder` wrote.

    Args:
        folder: The folder of captures.
        place: Where it was recorded; if None the first of :data:`PREFERRED` that holds arrays.
        client: Whose exchanges; the first one's if None, with a note.

    Raises:
        InvalidInput: If there is nothing whole in the folder, or a file is damaged.
        UnknownName: If the place or client is not there.
    """
    root = Path(folder)
    who = f"The folder of captures {shown(str(folder))}"
    with reading.boundary(who):
        files = sorted(root.glob("round-*/*.json")) if reading.is_folder(root) else []
    if not files:
        raise InvalidInput(
            f"{who} holds no exchange (round-*/*.json); the capture of your framework writes them: "
            "see leakatlas.integrations."
        )
    found = [(path, _read_facts(path)) for path in files]
    places = {facts.place for _, facts in found}
    if place is not None and place not in places:
        raise UnknownName("place", place, sorted(places))
    seen = {facts.place for _, facts in found if not facts.left_out} or places
    # Where the wire was hidden, raw updates are what no adversary sees.
    order = sorted(PREFERRED, key=lambda p: p == "raw") if places - seen else PREFERRED
    chosen = place or next(p for p in order if p in seen)
    there = [(path, facts) for path, facts in found if facts.place == chosen]
    clients = list(dict.fromkeys(facts.client for _, facts in there))
    if client is not None and client not in clients:
        raise UnknownName("client", client, clients)
    name = client or clients[0]
    notes = [f"recorded at {chosen!r} by {there[0][1].framework or 'an unnamed framework'}"]
    if others := sorted(places - {chosen}):
        notes.append(f"also recorded at {', '.join(others)}")
    if hidden := sorted({facts.left_out for _, facts in found if facts.place in places - seen}):
        unseen = ", ".join(sorted(places - seen))
        notes.append(f"nothing is to be seen at {unseen}: {'; '.join(hidden[:3])}")
    versions = dict.fromkeys(facts.framework for _, facts in there if facts.framework)
    if len(versions) > 1:
        notes.append(f"recorded by several versions: {_some(list(versions))}")
    if len(clients) > 1:
        notes.append(f"client {name} of {len(clients)}: {_some(clients)}")
    mine = [(path, facts) for path, facts in there if facts.client == name]
    notes += [f"round {f.round} was left out: {f.left_out}" for _, f in mine if f.left_out]
    beyond = dict.fromkeys(str(f.settings[BEYOND]) for _, f in mine if BEYOND in f.settings)
    notes += [f"the client's training is not what a protocol can say: {words}" for words in beyond]
    exchanges = [_read_arrays(path, facts) for path, facts in mine if not facts.left_out]
    if not exchanges:
        raise InvalidInput(f"{who} holds no arrays of client {name!r}: {'; '.join(notes)}.")
    return Recording(tuple(sorted(exchanges, key=lambda e: e.round)), tuple(notes))


def _read_facts(path: Path) -> _Facts:
    who = f"The captured exchange {shown(str(path))}"
    content = reading.read_json(path, what="captured exchange")
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise InvalidInput(f"{who} is no exchange of the form {FORMAT!r}.")
    try:
        return _Facts.from_json(content)
    except (InvalidParameter, TypeError) as problem:
        raise InvalidInput(f"{who} is malformed: {problem}") from None


def _read_arrays(path: Path, facts: _Facts) -> Exchange:
    arrays, _ = tensorfiles.read_safetensors(
        path.with_suffix(".safetensors"), what="captured exchange"
    )
    split: dict[str, dict[str, Tensor]] = {"received": {}, "sent": {}}
    for key, tensor in arrays.items():
        side, _, name = key.partition("/")
        if side not in split or not name:
            raise InvalidInput(
                f"The captured exchange {shown(str(path))} has an array {shown(key)}, which is "
                "neither received nor sent."
            )
        split[side][name] = tensor
    known = {n: v for n, v in asdict(facts).items() if n not in ("format", "left_out")}
    return Exchange(received=split["received"], sent=split["sent"], **known)


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")


def described_by(
    settings: Mapping[str, Scalar], *, kind: Kind, given: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The description of a protocol that recorded settings and a person give together.

    Args:
        settings: As recorded; names are looked up in :data:`SETTINGS`.
        kind: What was sent; one gradient is FedSGD's.
        given: What somebody says on top, by the protocol's own names; it wins.

    Raises:
        InvalidInput: If something that a replay needs is neither recorded nor given, by name.
    """
    said = dict(given or {})
    algorithm = said.pop("algorithm", "fedsgd" if kind == "gradient" else "fedavg")
    plain = {name.replace("-", "_").lower(): value for name, value in settings.items()}
    names = SETTINGS if algorithm == "fedavg" else {"mode": SETTINGS["mode"]}
    known: dict[str, Any] = {}
    for name, words in names.items():
        found = next((plain[word] for word in words if word in plain), None)
        if found is not None:
            known[name] = found.lower() if isinstance(found, str) else found
    known |= said
    missing = [n for n in ("lr", "epochs", "batch_size") if n not in known]
    if algorithm == "fedavg" and missing:
        recorded = ", ".join(sorted(settings)) or "nothing"
        raise InvalidInput(
            f"The capture does not say the client's {', '.join(missing)} (recorded settings: "
            f"{recorded}). Give them: "
            + " ".join(f"--protocol {name}=..." for name in missing)
            + ", or under protocol: in YAML."
        )
    return {"algorithm": algorithm, **known}


def protocol_of(
    settings: Mapping[str, Scalar], *, kind: Kind, given: Mapping[str, Any] | None = None
) -> Protocol:
    """The protocol of :func:`described_by`."""
    described = described_by(settings, kind=kind, given=given)
    algorithm = described.pop("algorithm")
    return FedAVG.from_json(described) if algorithm == "fedavg" else FedSGD.from_json(described)
