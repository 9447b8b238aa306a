from __future__ import annotations

import pytest

from leakatlas.errors import UnknownName
from leakatlas.threat import Knowledge

COLUMNS = (
    "updates",
    "basic",
    "training",
    "surrogate",
    "distribution",
    "manipulation",
    "selection",
)


def test_the_members_are_the_seven_columns_in_order() -> None:
    everything = Knowledge.from_names(COLUMNS)
    assert everything.names() == COLUMNS
    assert everything == ~Knowledge(0)


def test_names_are_a_set_in_the_tables_order() -> None:
    assert Knowledge.from_names(["Training", "updates"]).names() == ("updates", "training")
    assert Knowledge.from_names([]) == Knowledge(0)


def test_an_unknown_column_suggests_the_right_one() -> None:
    with pytest.raises(UnknownName, match="Did you mean 'surrogate'"):
        Knowledge.from_names(["surogate"])
