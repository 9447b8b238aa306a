"""How files from outside are read: within a limit, as plain data, with errors that say where.

Whatever stands in a file, reading it returns plain values or raises
:class:`~leakatlas.errors.InvalidInput`; nothing in it is executed. Every reader of the other
rooms goes through here, or through :func:`boundary` where a library does the parsing.
"""

from __future__ import annotations

import json
import re
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from leakatlas import limits
from leakatlas.errors import InvalidInput, LeakAtlasError, shown

_CONTENT = (ValueError, OSError, RecursionError, MemoryError, OverflowError)
"""What reading can always meet: wrong values, failing files, too deep, too large."""


@contextmanager
def boundary(who: str, *more: type[Exception], way_out: str = "") -> Iterator[None]:
    """Turn what a parser raises on hostile content into one message.

    Args:
        who: What is being read, such as "The update 'a.safetensors'".
        more: What this parser raises besides :data:`_CONTENT`.
        way_out: A sentence for the end of the message.

    Raises:
        InvalidInput: In place of any of these.
    """
    expected: tuple[type[Exception], ...] = (*_CONTENT, *more)
    try:
        yield
    except LeakAtlasError:
        raise
    except expected as problem:
        reason = " ".join(str(problem).split()).rstrip(".") or type(problem).__name__
        if isinstance(problem, RecursionError):
            reason = "it is nested too deep"
        elif isinstance(problem, KeyError):
            reason = f"{reason} is missing"
        way_out = f" {way_out}" if way_out else ""
        raise InvalidInput(f"{who} cannot be read: {reason[:400]}.{way_out}") from problem


def read_bytes(path: Path | str, *, what: str, limit: int) -> bytes:
    """The content of a regular file of at most ``limit`` bytes.

    Args:
        path: The file; pipes and devices, which may never end, are refused.
        what: For messages, such as "configuration".
        limit: In bytes.

    Raises:
        InvalidInput: If there is no such file, it is too large, or it cannot be read.
    """
    who = f"The {what} {shown(str(path))}"
    with boundary(who):
        try:
            kind = Path(path).stat().st_mode
        except FileNotFoundError:
            raise InvalidInput(f"{who} does not exist.") from None
        if not stat.S_ISREG(kind):
            got = "a folder" if stat.S_ISDIR(kind) else "a pipe or a device"
            raise InvalidInput(f"{who} is {got}, expected a file.")
        with Path(path).open("rb") as file:
            content = file.read(limit + 1)
    if len(content) > limit:
        raise InvalidInput(f"{who} is larger than {limits.size(limit)}, the limit for its kind.")
    return content


def read_text(path: Path | str, *, what: str, limit: int) -> str:
    """The UTF-8 text of a file; as :func:`read_bytes`."""
    content = read_bytes(path, what=what, limit=limit)
    with boundary(f"The {what} {shown(str(path))}"):
        return content.decode("utf-8")


def read_json(path: Path | str, *, what: str, limit: int = limits.DESCRIPTION) -> Any:
    """The value in a JSON file; as :func:`read_bytes`."""
    text = read_text(path, what=what, limit=limit)
    return parse_json(text, who=f"The {what} {shown(str(path))}")


def parse_json(text: str, *, who: str) -> Any:
    """The value that JSON text describes.

    Raises:
        InvalidInput: If it is not JSON, is nested too deep, or holds a whole number of more than
            64 bits.
    """
    with boundary(who):
        return json.loads(text, parse_int=_whole)


def read_yaml(path: Path | str, *, what: str) -> Any:
    """The value in a YAML file; see :func:`parse_yaml`."""
    text = read_text(path, what=what, limit=limits.CONFIGURATION)
    return parse_yaml(text, who=f"The {what} {shown(str(path))}")


def parse_yaml(text: str, *, who: str) -> Any:
    """The plain value that one YAML document describes.

    Scalars follow YAML 1.2 (``no`` is text, ``010`` is ten, ``1e-3`` is a number); dates, sets,
    binary and every other tag are refused, keys are text, and a key stands once. Aliases count as
    often as they are used.

    Raises:
        InvalidInput: If the text is not such a document, or is beyond the limits on depth and
            number of values; the message has line and column.
    """
    with boundary(who, yaml.YAMLError):
        try:
            root = _Loader(text).get_single_node()
            return None if root is None else _Plain(who).value(root)
        except yaml.MarkedYAMLError as problem:
            reason = f"{problem.context} {problem.problem}" if problem.context else problem.problem
            raise InvalidInput(
                f"{who} is not YAML that can be read{_place(problem.problem_mark)}: {reason}."
            ) from None


_SCALARS: tuple[tuple[str, str, str, Callable[[str], Any]], ...] = (
    ("null", r"~|null|Null|NULL|", "~nN", lambda text: None),
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF", lambda text: text.lower() == "true"),
    ("int", r"[-+]?[0-9]+|0x[0-9a-fA-F]+|0o[0-7]+", "-+0123456789", lambda text: _whole(text)),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+.0123456789",
        lambda text: float(text.replace(".inf", "inf").replace(".nan", "nan")),
    ),
)
"""YAML 1.2's core schema: tag, pattern, first characters, meaning."""


def _whole(text: str) -> int:
    if len(text) > 25:
        raise ValueError(f"a whole number of {len(text):,} digits is too large")
    number = int(text, 0) if text[:2] in ("0x", "0o") else int(text)
    if abs(number) >= limits.WHOLE:
        raise ValueError(f"the whole number {number} is too large")
    return number


class _Loader(yaml.SafeLoader):
    """PyYAML's parser with YAML 1.2's plain scalars; it counts what it composes."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.nodes = self.depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]  # PyYAML has none
        self.nodes += 1
        self.depth += 1
        _require_room(self.nodes, self.depth, mark)
        try:
            return super().compose_node(parent, index)
        finally:
            self.depth -= 1


for _tag, _pattern, _first, _ in _SCALARS:
    _Loader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), [*_first]
    )


def _require_room(nodes: int, depth: int, mark: Any) -> None:
    if depth > limits.DEPTH:
        reason = f"nested deeper than {limits.DEPTH} levels"
    elif nodes > limits.NODES:
        reason = f"more than {limits.NODES:,} values, aliases included"
    else:
        return
    raise yaml.MarkedYAMLError(problem=reason, problem_mark=mark)


def _place(mark: Any) -> str:
    return "" if mark is None else f", line {mark.line + 1}, column {mark.column + 1}"


class _Plain:
    """Turns composed nodes into plain values."""

    def __init__(self, who: str) -> None:
        self.who = who
        self.nodes = 0

    def value(self, node: yaml.Node, depth: int = 1) -> Any:
        self.nodes += 1
        _require_room(self.nodes, depth, node.start_mark)
        kind = node.tag.removeprefix("tag:yaml.org,2002:")
        if isinstance(node, yaml.SequenceNode) and kind == "seq":
            return [self.value(child, depth + 1) for child in node.value]
        if isinstance(node, yaml.MappingNode) and kind == "map":
            return self._mapping(node, depth)
        if isinstance(node, yaml.ScalarNode):
            return self._scalar(node, kind)
        raise self._refused(node, f"the tag {shown(node.tag)} is not allowed")

    def _mapping(self, node: yaml.MappingNode, depth: int) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key_node, child in node.value:
            key = self.value(key_node, depth + 1)
            if not isinstance(key, str):
                raise self._refused(key_node, f"expected text as a key; got {shown(key)}")
            if key in found:
                raise self._refused(key_node, f"the key {shown(key)} stands here a second time")
            found[key] = self.value(child, depth + 1)
        return found

    def _scalar(self, node: yaml.ScalarNode, kind: str) -> Any:
        if kind == "str":
            return node.value
        for tag, pattern, _, meaning in _SCALARS:
            if tag == kind:
                if not re.fullmatch(pattern, node.value):
                    raise self._refused(node, f"expected {kind}; got {shown(node.value)}")
                try:
                    return meaning(node.value.lower() if kind == "float" else node.value)
                except ValueError as problem:
                    raise self._refused(node, str(problem)) from None
        raise self._refused(node, f"the tag {shown(node.tag)} is not allowed")

    def _refused(self, node: yaml.Node, reason: str) -> InvalidInput:
        mark = node.start_mark
        return InvalidInput(
            f"{self.who}, line {mark.line + 1}, column {mark.column + 1}: {reason}."
        )
