"""The house, drawn from what its rooms import."""

from __future__ import annotations

import ast
import graphlib
from collections import defaultdict

import grimp

from leakatlas.catalogue.registry import PACKAGE

SHARED = ("attacks", "attacks.optimization", "attacks.generative", "attacks.analytic")
"""Folders that are several rooms: the base classes, and each category of rows."""


def room(module: str) -> str:
    """The folder or file below the package that a module lies in."""
    parts = module.split(".")[1:]
    if len(parts) > 1 and ".".join(parts[:2]) in SHARED:
        return ".".join(parts[:2])
    return "attacks.api" if parts[:1] == ["attacks"] and len(parts) > 1 else ".".join(parts[:1])


def test_no_room_reaches_itself_through_another() -> None:
    graph = grimp.build_graph("leakatlas", exclude_type_checking_imports=True, cache_dir=None)
    reaches: dict[str, set[str]] = defaultdict(set)
    for module in graph.modules:
        for other in graph.find_modules_directly_imported_by(module):
            if room(module) != room(other) and room(module) and room(other):
                reaches[room(module)].add(room(other))
    order = list(graphlib.TopologicalSorter(reaches).static_order())  # raises on a cycle
    assert order.index("errors") < order.index("fl") < order.index("bench") < order.index("audit")
    assert "audit" not in reaches["bench"] and "report" not in reaches["bench"]


def test_no_function_is_longer_than_a_hundred_lines() -> None:
    """What does not fit on a screen falls into parts."""
    long = [
        f"{path.relative_to(PACKAGE)}: {node.name}"
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef) and (node.end_lineno or 0) - node.lineno >= 100
    ]
    assert not long
