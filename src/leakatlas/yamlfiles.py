"""YAML files: plain values within limits, and mistakes told by line and column."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from leakatlas import limits
from leakatlas.errors import InvalidInput, shown
from leakatlas.reading import boundary, read_text, whole


def read(path: Path | str, *, what: str) -> Any:
    """The value in a YAML file; see :func:`parse`."""
    text = read_text(path, what=what, limit=limits.CONFIGURATION)
    return parse(text, who=f"The {what} {shown(str(path))}")


def parse(text: str, *, who: str) -> Any:
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
    ("int", r"[-+]?[0-9]+|0x[0-9a-fA-F]+|0o[0-7]+", "-+0123456789", lambda text: whole(text)),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+.0123456789",
        lambda text: float(text.replace(".inf", "inf").replace(".nan", "nan")),
    ),
)
"""YAML 1.2's core schema: tag, pattern, first characters, meaning."""


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
