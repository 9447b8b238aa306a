"""Valid files, from which hostile ones are made."""

from __future__ import annotations

import functools
import io
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st

from leakatlas.fl import FedAVG, FedSGD, Update, View
from leakatlas.threat import Grant
from tests.conftest import build_stage, surrogate
from tests.doors.hostile import as_json, damaged, tampered


@functools.cache
def views() -> tuple[View, ...]:
    made = []
    for protocol, letter in ((FedSGD(), "C"), (FedAVG(batch_size=2, shuffle=True), "H")):
        scene = build_stage(
            protocol=protocol,
            letter=letter,
            grants=frozenset(Grant),
            public=surrogate(),
            settings={"widths": (3,)},
            dtype=torch.float32,
        )
        made.append(scene.view([scene.federation.play_round()]))
    return tuple(made)


def update_of_a_client() -> Update:
    return views()[0].update


def saved(value: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def safetensors_file(
    valid: Callable[[Path], object], metadata: str | None
) -> st.SearchStrategy[bytes]:
    """Damaged bytes, exotic tensors, and a description that is tampered with."""
    with tempfile.TemporaryDirectory() as folder:
        valid(Path(folder))
        content = next(Path(folder).glob("*.safetensors")).read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    body = content[8 + length :]

    def joined(changed: Any, text: Any = None) -> bytes:
        if isinstance(changed, dict) and text is not None and metadata is not None:
            held = text if isinstance(text, str) else as_json(text).decode("utf-8", "replace")
            changed = {**changed, "__metadata__": {metadata: held}}
        new = as_json(changed)
        return len(new).to_bytes(8, "little") + new + body

    ways = [damaged((content,)), tampered((header,)).map(joined)]
    if metadata is not None:
        described = json.loads(header["__metadata__"][metadata])
        ways.append(tampered((described,)).map(lambda text: joined(header, text)))
        deep = st.sampled_from(("[" * 100_000, '{"a":' * 50_000, "1" * 10_000, "", "null", "[]"))
        ways.append(deep.map(lambda text: joined(header, text)))
    return st.one_of(*ways)
