from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from leakatlas.audit import compare, iterating, ready, run, utility
from leakatlas.audit.budget import Budget
from leakatlas.audit.deadline import Deadline

MADE = Budget.of


@pytest.fixture(autouse=True)
def brief(monkeypatch: pytest.MonkeyPatch) -> None:
    """What fills a budget's time is cut short, and no budget ends, however busy the machine."""
    for room in (iterating, compare):
        monkeypatch.setattr(room, "REHEARSED", 0.0)
    monkeypatch.setattr(ready, "LONGEST", 20)
    monkeypatch.setattr(utility, "FEDAVG_ROUNDS", 1)

    def ample(*given: Any, **named: Any) -> Budget:
        return replace(MADE(*given, **named), seconds=3_600.0)

    monkeypatch.setattr(Budget, "of", ample)
    monkeypatch.setattr(run, "Deadline", lambda begun, seconds: Deadline(begun, None))
    monkeypatch.setattr(run, "EXAMINED", 1_000.0)
