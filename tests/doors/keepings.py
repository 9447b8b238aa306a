"""What LeakAtlas itself kept: runs of an audit, checkpoints of a descent, records of studies.

A seal tells damage, not malice, so half of the inputs carry the right digest.
"""

from __future__ import annotations

import copy
import functools
import io
import json
import shutil
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from hypothesis import strategies as st

from leakatlas import sealed
from leakatlas.audit import kept
from leakatlas.audit.rehearsal import Rehearsal, Trial
from leakatlas.audit.rehearsal import _kept as kept_rehearsal
from leakatlas.bench.record import Record
from leakatlas.bench.store import Store
from leakatlas.blocks import descent
from leakatlas.blocks.descent.objective import Variables
from leakatlas.blocks.watch import Conduct, Watch
from leakatlas.metrics.score import score
from leakatlas.report import Run
from tests.doors import hostile
from tests.doors.hostile import as_json, damaged, tampered
from tests.doors.registry import Files, door, one
from tests.doors.seeds import saved


def _elsewhere(folder: Path, use: Callable[[Path], object]) -> object:
    """Use a copy of a folder: what is damaged there is discarded, with a warning."""
    with tempfile.TemporaryDirectory() as other:
        shutil.copytree(folder, other, dirs_exist_ok=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", sealed.DamagedFile)
            return use(Path(other))


# -- runs of an audit ------------------------------------------------------------------------------


@functools.cache
def _run() -> tuple[Any, bytes]:
    """A kept run as the values of its JSON, and the pictures beside it."""
    images = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    run = Run(
        setting="s", attack="dlg", letter="B", vantage="server", target=0,
        defenses=("clipping",), status="complete", reason="", verdict="recognisable",
        reads=("rounds",), confidence=(-1.0, -2.0), recipe={"seed": 0}, notes={"restarts": 1.0},
        scores=score(images, images, public=images, labels=None), pictures=images[:, None],
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        kept.save(Path(folder) / "r", run, 10.0)
        content = json.loads((Path(folder) / "r.json").read_bytes())
        return content, (Path(folder) / "r.safetensors").read_bytes()


def _sealed_run(content: Any) -> bytes:
    """With the digest of what it says, as far as it says anything."""
    if isinstance(content, dict):
        content = {name: value for name, value in content.items() if name != "sha256"}
        with_digest = {"sha256": kept._digest(json.loads(as_json(content))), **content}
        return as_json(with_digest)
    return as_json(content)


def _kept_runs() -> st.SearchStrategy[Files]:
    content, pictures = _run()
    whole = as_json(content)
    text = st.one_of(
        tampered((content,)).map(_sealed_run),
        tampered((content["run"],)).map(lambda run: _sealed_run({**content, "run": run})),
        tampered((content,)).map(as_json),
        damaged((whole,)),
        st.sampled_from((b"[" * 100_000, b'{"a":' * 50_000, b"", b"null", b"[]", b"\xff", whole)),
    )
    beside = st.one_of(st.just(pictures), damaged((pictures,)))
    return st.builds(lambda a, b: {"r.json": a, "r.safetensors": b}, text, beside)


@door(_kept_runs(), share=2.0)
def kept_run(folder: Path) -> object:
    """A run in ``--out``, which the same command takes over."""

    def again(other: Path) -> object:
        found = kept.load(other / "r", 10.0)
        return None if found is None else (found.leaked, json.dumps(found.to_json()))

    return _elsewhere(folder, again)


REHEARSAL: Any = Rehearsal(
    attack="dlg", variant="v", parameters={"steps": 3}, psnr=20.0, null=10.0, iterations=3,
    planned=None, per_iteration=0.1, images="patches", seconds=1.0,
    trials=(Trial("v", 3, 20.0, 1, 1.0),),
).to_json()  # fmt: skip


@door(
    one(
        "r.sealed",
        st.one_of(
            st.one_of(
                tampered((REHEARSAL,)).map(as_json),
                st.sampled_from((b"[" * 100_000, b"", b"{}", b"\xff")),
            ).map(lambda content: f"{sealed.digest(content)}\n".encode() + content),
            st.binary(max_size=100),
        ),
    ),
    share=0.5,
    examples=60,
)
def rehearsal(folder: Path) -> object:
    """What an adversary chose on public images, kept for the next audit."""
    return _elsewhere(folder, lambda other: _told(kept_rehearsal(other / "r.sealed")))


def _told(found: Rehearsal | None) -> object:
    return None if found is None else json.dumps([found.gain, found.to_json()])


# -- checkpoints -----------------------------------------------------------------------------------


def _descend(folder: Path, steps: int = 3) -> object:
    watch = Watch(conduct=Conduct(execution="eager", checkpoints=folder))
    generator = torch.Generator().manual_seed(0)

    def objective(variables: Variables, t: torch.Tensor) -> descent.Value:
        del t
        value = (variables["x"] - 1).square().sum()
        return descent.Value(value, value)

    return descent.descend(
        objective, {"x": torch.zeros(2, 4)}, candidates=2, optimizer=descent.adam(0.1), steps=steps,
        watch=watch, generators=[generator],
    )  # fmt: skip


@functools.cache
def _checkpoint() -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        _descend(Path(folder))
        (file,) = [f for f in Path(folder).rglob("*") if f.is_file()]
        content = sealed.unseal(file)
        assert content is not None
        state = torch.load(io.BytesIO(content), weights_only=True)
        return {"name": str(file.relative_to(folder)), "content": content, "state": state}


def _places(value: Any, here: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    found = [here] if here else []
    if isinstance(value, dict | list):
        pairs = value.items() if isinstance(value, dict) else enumerate(value)
        for key, child in pairs:
            found += _places(child, (*here, key))
    return found


@st.composite
def _states(draw: st.DrawFn) -> bytes:
    """A checkpoint with one or two of its values replaced, and sealed again."""
    state = copy.deepcopy(_checkpoint()["state"])
    if draw(st.booleans()):
        state["finished"] = False
    for _ in range(draw(st.sampled_from((1, 1, 2)))):
        # The optimizer's own memory is its own: what is wrong there ends one attack as crashed.
        places = [p for p in _places(state) if p[0] != "optimizer" or len(p) == 1]
        *parents, last = draw(st.sampled_from(places))
        holder = state
        for part in parents:
            holder = holder[part]
        tensors = st.sampled_from(
            (torch.zeros(0), torch.zeros(2, 4), torch.zeros(2), torch.zeros(3, 3).bool(),
             torch.full((2, 4), torch.nan), torch.zeros(2, 4).long())
        )  # fmt: skip
        other: Any = draw(st.one_of(tensors, hostile.scalars, st.just([]), st.just({})))
        if draw(st.booleans()) and isinstance(holder, dict):
            del holder[last]
        else:
            holder[last] = other
    return saved(state)


def _checkpoints() -> st.SearchStrategy[Files]:
    name, content = _checkpoint()["name"], _checkpoint()["content"]
    inner = st.one_of(_states(), _states(), damaged((content,)), hostile.scalars.map(saved))
    resealed = inner.map(lambda c: f"{sealed.digest(c)}\n".encode() + c)
    whole = f"{sealed.digest(content)}\n".encode() + content
    return one(name, st.one_of(resealed, resealed, damaged((whole,))))


@door(_checkpoints(), share=1.0, examples=100)
def checkpoint(folder: Path) -> object:
    """A descent that goes on from its checkpoint."""
    return _elsewhere(folder, _descend)


# -- records of studies ----------------------------------------------------------------------------


@functools.cache
def _records() -> tuple[Any, bytes]:
    record = Record(
        cell="c", code="h", study="s", label="l", seed=0, batch=0, status="complete",
        recipe={"seed": 0}, scores={"psnr": 1.0}, trace=((1.0, 2.0),), images=("a",),
        costs={"seconds": 1.0},
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        Store(Path(folder)).append(record)
        (part,) = Path(folder).glob("*.parquet")
        return json.loads(json.dumps(record.to_json())), part.read_bytes()


def _part(order: Any, record: Any) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.table({"order": [order], "record": [record]}), buffer)
    return buffer.getvalue()


def _parts() -> st.SearchStrategy[bytes]:
    record, whole = _records()
    texts = st.one_of(
        tampered((record,)).map(lambda r: as_json(r).decode("utf-8", "replace")),
        st.sampled_from(("[" * 100_000, "", "null", "{}", "1" * 6_000)),
    )
    odd = st.sampled_from(
        (_part("x", "y"), _part(None, None), _part(1.5, json.dumps(record)), _part(1, 2))
    )
    return st.one_of(damaged((whole,)), texts.map(lambda text: _part(1, text)), odd)


@door(one("1.parquet", _parts()), share=2.0)
def store(folder: Path) -> object:
    """The records of a study, which the same command goes on from."""
    found = Store(folder).records()
    return [json.dumps(record.to_json()) for record in found.values()]
