"""A few hundred inputs for every door; ``make fuzz`` tries tens of thousands."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from leakatlas import limits
from tests.doors.doors import DOORS
from tests.doors.guard import check

SMALL_MACHINE = 2**28
"""Bytes of memory that the doors believe in, so that what may be large stays quick."""


@pytest.mark.parametrize("name", DOORS)
def test_a_hostile_input_is_an_answer_or_one_message(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    door = DOORS[name]
    monkeypatch.setattr(limits, "memory", lambda: SMALL_MACHINE)

    @settings(
        max_examples=door.examples, deadline=None, database=None, derandomize=True,
        suppress_health_check=list(HealthCheck), phases=(Phase.generate, Phase.shrink),
    )  # fmt: skip
    @given(st.data())
    def knock(data: st.DataObject) -> None:
        check(data.draw(door.files), door.open, tmp_path / "door")

    knock()
