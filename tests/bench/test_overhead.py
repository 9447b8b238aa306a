"""What the bench measures of itself."""

from __future__ import annotations

import pytest
import torch

from leakatlas.bench import overhead
from leakatlas.bench.cells import Cell
from leakatlas.bench.schema import Case


def cell(label: str) -> Cell:
    case = Case.model_validate(
        {"model": {"builtin": "fc", "kwargs": {"size": 8, "widths": [8]}},
         "victims": "patches:8:8:victim",
         "measures": ["seconds"]}
    )  # fmt: skip
    return Cell("workers", label, case, seed=0, batch=0)


def test_the_boundary_costs_what_own_takes_beyond_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overhead, "REPEATED", 1)
    found = overhead.measure(cell("boundary, fc"))
    shared, own, more = (torch.as_tensor(found[n]) for n in ("shared", "own", "overhead"))
    assert shared.shape == (1,) and shared > 0 and torch.allclose(more, own - shared)
