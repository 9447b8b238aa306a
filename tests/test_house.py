"""The house, drawn from what its rooms import."""

from __future__ import annotations

import graphlib
from collections import defaultdict

import grimp

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
