"""Filtering rows on any column."""

import pytest

from leakatlas.catalogue import facets
from leakatlas.errors import UnknownName

RECORDS = facets.records()


def keys(wanted: dict[str, object], search: str = "") -> set[str]:
    """Keys among the published rows: what is added later changes nothing here."""
    found = facets.select(RECORDS, {"origin": "published", **wanted}, search)
    return {row["key"] for row in found}


def test_a_column_of_one_value() -> None:
    assert keys({"threat_model": "H"}) == {"sybils"}
    assert keys({"mechanism": "trap"}) == {"trap_weights", "sybils"}


def test_columns_are_joined_by_and() -> None:
    assert keys({"threat_model": "D", "algorithm": "fedavg"}) == {"rog"}


def test_a_column_of_many_values_agrees_if_one_does() -> None:
    both = keys({"algorithm": "fedavg"}) & keys({"algorithm": "fedsgd"})
    assert both == {"robbing_the_fed", "trap_weights", "seer", "scale_mia"}
    assert keys({"knowledge": "selection"}) == {"sybils"}
    assert keys({"knowledge": "distribution"}) == {"gradinversion", "fl_gradinv", "e2egi"}


def test_corrections_move_rows_between_letters() -> None:
    printed = {
        row["key"] for row in facets.select(facets.records(printed=True), {"threat_model": "E"})
    }
    assert printed - keys({"threat_model": "E"}) == {"gradvit", "hf_gradinv"}
    every = facets.records(printed=True)
    assert {row["origin"] for row in every} == {"published"}


def test_rows_without_a_column_do_not_agree() -> None:
    assert all(row["kind"] == "attack" for row in facets.select(RECORDS, {"threat_model": "A"}))
    assert all(row["kind"] == "defense" for row in facets.select(RECORDS, {"holds": "A"}))


def test_text_numbers_and_flags_are_compared_as_people_write_them() -> None:
    assert keys({"number": "14", "kind": "attack"}) == {"rog"}
    assert keys({"category": "ANALYTIC", "year": 2021}) == {"rgap"}
    assert keys({"reconstructed": "true", "technique": "crypto"}) == set()


def test_words_are_searched_everywhere() -> None:
    assert keys({}, "diffusion GUIDES") == {"ggdm"}
    assert keys({}, "no such words") == set()


def test_an_unknown_column_is_named() -> None:
    with pytest.raises(UnknownName, match=r"Unknown column 'algoritm'. Did you mean 'algorithm'"):
        facets.select(RECORDS, {"algoritm": "fedavg"})
