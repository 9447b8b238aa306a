"""Every need has its tests, and every test that is named exists."""

from __future__ import annotations

import importlib

import pytest

from tests.field.needs import NEEDS


@pytest.mark.parametrize("need", NEEDS)
def test_a_need_is_held_by_tests_of_this_room(need: str) -> None:
    assert NEEDS[need]
    for name in NEEDS[need]:
        module, _, function = name.partition(".")
        assert callable(getattr(importlib.import_module(f"tests.field.{module}"), function))
