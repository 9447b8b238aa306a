"""Hypothesis strategies for what a stranger, or an accident, puts into a file."""

from __future__ import annotations

import copy
import json
from typing import Any

from hypothesis import strategies as st

CANARY = "leakatlas-canary"
"""Part of every path that an injected program would make; see :mod:`tests.doors.guard`."""

TEXTS = (
    "", " ", "x" * 100_000, "²", "٣", "1e309", "-0", "nan", "[/x]", "[bold]", "\x1b[2J", "a\x00b",
    "\ud800", "\u202e", "../../../etc/passwd", "/dev/zero", "/dev/stdin", "a" * 300 + "/b",
    "os:mkdir", "subprocess:getoutput", "builtins:exec", "x.py:make", "{0.__class__}", "%s%n",
    "<script>", "A-Q", "A-", ",", "photos:²", "photos:9999999", "folder:.@1000000000", "parquet:",
    "torchvision:CIFAR10/test:/nowhere", "torchvision:Food101:.", "patches:32:99999999", "1s", "0s",
    "1e9h", "9" * 5000, "P(psnr > 20 dB) > 0.05", "P(psnr > nan) > 1e400", "__class__", "name",
)  # fmt: skip

NUMBERS = (
    0, -1, 1, 2, 7, 255, 10**6, 10**9, 2**31, 2**53, 2**63 - 1, 2**63, -(2**63), 2**64, 10**30,
    0.0, -0.0, 1e-320, 1e-30, 0.5, 1e30, 1e300, float("inf"), float("-inf"), float("nan"),
)  # fmt: skip

scalars: st.SearchStrategy[Any] = st.one_of(
    st.none(), st.booleans(), st.sampled_from(NUMBERS), st.sampled_from(TEXTS), st.integers(),
    st.floats(), st.text(max_size=12),
)  # fmt: skip


def _deep(levels: int, as_dict: bool) -> Any:
    value: Any = "x"
    for _ in range(levels):
        value = {"a": value} if as_dict else [value]
    return value


values: st.SearchStrategy[Any] = st.one_of(
    scalars,
    st.lists(scalars, max_size=3),
    st.dictionaries(st.one_of(st.sampled_from(TEXTS), st.text(max_size=6)), scalars, max_size=3),
    st.builds(_deep, st.sampled_from((3, 40, 400)), st.booleans()),
    st.builds(lambda v, n: [v] * n, scalars, st.sampled_from((100, 3000))),
)
"""Plain values of every kind and size, deep and long ones among them."""


def _paths(document: Any, here: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    found = [here] if here else []
    if isinstance(document, dict):
        for key, child in document.items():
            found += _paths(child, (*here, key))
    elif isinstance(document, list):
        for index, child in enumerate(document):
            found += _paths(child, (*here, index))
    return found


@st.composite
def tampered(draw: st.DrawFn, documents: tuple[Any, ...]) -> Any:
    """A valid document with one to three of its values replaced, lost, renamed or added."""
    document = copy.deepcopy(draw(st.sampled_from(documents)))
    for _ in range(draw(st.sampled_from((1, 1, 1, 2, 3)))):
        paths = _paths(document)
        if not paths:
            break
        *parents, last = draw(st.sampled_from(paths))
        holder = document
        for part in parents:
            holder = holder[part]
        action = draw(
            st.sampled_from(("alike", "alike", "alike", "other", "lose", "rename", "add"))
        )
        if action == "lose":
            del holder[last]
        elif action == "rename" and isinstance(holder, dict):
            holder[draw(st.sampled_from(TEXTS))] = holder.pop(last)
        elif action == "add" and isinstance(holder, dict):
            holder[draw(st.sampled_from(TEXTS))] = draw(values)
        else:
            holder[last] = draw(_alike(holder[last]) if action == "alike" else values)
    return document


def _alike(value: Any) -> st.SearchStrategy[Any]:
    """Values of the same kind, which pass the check of types and meet what lies behind it."""
    if isinstance(value, bool):
        return st.booleans()
    if isinstance(value, int):
        return st.one_of(
            st.sampled_from([n for n in NUMBERS if type(n) is int]), st.integers(-3, 40)
        )
    if isinstance(value, float):
        return st.one_of(st.sampled_from([n for n in NUMBERS if type(n) is float]), st.floats())
    if isinstance(value, str):
        return st.one_of(st.sampled_from(TEXTS), st.text(max_size=12))
    if isinstance(value, list):
        return st.one_of(
            st.just([]), st.just(value * 2), st.just(value * 500), st.lists(scalars, max_size=3)
        )
    return values


def as_json(value: Any) -> bytes:
    """JSON text, surrogates and NaN included."""
    return json.dumps(value).encode("utf-8", "surrogatepass")


PIECES = (
    b"", b"\x00" * 64, b"\xff" * 64, b"\xff\xfe", b"{", b"}", b'"', b"[" * 3000, b"A" * 5000, b"-",
    b"\x7f\xff\xff\xff", b"\xff\xff\xff\x7f", b"\x80\x00\x00\x00", b"1e999", b"NaN", b"<svg>",
    b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", b"GIF89a", b"PK\x03\x04", b"\x89PNG\r\n",
)  # fmt: skip


@st.composite
def damaged(draw: st.DrawFn, files: tuple[bytes, ...]) -> bytes:
    """A valid file with flipped, lost, repeated or foreign bytes."""
    content = bytearray(draw(st.sampled_from(files)))
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(len(content) - 1, 0)))
        match draw(st.sampled_from(("flip", "flip", "byte", "cut", "drop", "repeat", "insert"))):
            case "flip" if content:
                content[at] ^= 1 << draw(st.integers(0, 7))
            case "byte" if content:
                content[at] = draw(st.integers(0, 255))
            case "cut":
                del content[at:]
            case "drop":
                del content[at : at + draw(st.integers(1, 64))]
            case "repeat":
                content[at:at] = content[at : at + draw(st.integers(1, 64))]
            case "insert":
                content[at:at] = draw(st.sampled_from(PIECES))
    return bytes(content)
