from __future__ import annotations

import itertools

import pytest

from leakatlas import catalogue
from leakatlas.errors import UnknownName
from leakatlas.threat import LETTERS, Knowledge, threat_model, threat_models

# The published table, a row a letter, a tick a column: updates, basic, training, surrogate,
# distribution, manipulation, selection.
TABLE = {
    "A": "x......",
    "B": "xx.....",
    "C": "xxx....",
    "D": "xxxx...",
    "E": "xxxxx..",
    "F": "xxx..x.",
    "G": "xxxx.x.",
    "H": "xxxx.xx",
}


@pytest.mark.parametrize("letter", TABLE)
def test_a_letter_holds_the_ticked_columns(letter: str) -> None:
    ticked = [c for c, tick in zip(Knowledge, TABLE[letter], strict=True) if tick == "x"]
    assert list(threat_model(letter).knowledge) == ticked


@pytest.mark.parametrize("letter", TABLE)
def test_code_and_catalogue_say_the_same(letter: str) -> None:
    row = catalogue.threat_model(letter)
    assert threat_model(letter).name == row.name
    assert threat_model(letter).knowledge == Knowledge.from_names(row.knowledge)


def test_letters_are_sets_and_not_ranks() -> None:
    f, e = threat_model("F").knowledge, threat_model("E").knowledge
    assert f & e not in (f, e)
    later = [
        (a, b)
        for a, b in itertools.combinations(LETTERS, 2)
        if LETTERS[a].knowledge & LETTERS[b].knowledge != LETTERS[a].knowledge
    ]
    assert later == [("D", "F"), ("E", "F"), ("E", "G"), ("E", "H")]


def test_active_letters_change_the_protocol() -> None:
    assert [letter for letter in LETTERS if LETTERS[letter].active] == ["F", "G", "H"]


@pytest.mark.parametrize(
    ("text", "letters"),
    [
        ("A-E", "ABCDE"),
        ("A-C,G", "ABCG"),
        ("a - c , g", "ABCG"),
        ("H,B", "BH"),
        ("C,A-D,C", "ABCD"),
        ("F", "F"),
        ("H-H", "H"),
    ],
)
def test_ranges(text: str, letters: str) -> None:
    assert "".join(model.letter for model in threat_models(text)) == letters


@pytest.mark.parametrize("text", ["", "Z", "A-", "E-A", "A,,B", "A-Z", "A-B-C", "AB"])
def test_what_is_no_range_is_refused_with_the_known_letters(text: str) -> None:
    with pytest.raises(UnknownName, match="Known: A, B, C, D, E, F, G, H"):
        threat_models(text)


def test_a_lower_case_letter_is_understood() -> None:
    assert threat_model(" d ").letter == "D"


def test_an_unknown_letter_is_quoted() -> None:
    with pytest.raises(UnknownName, match="Unknown threat model 'I'"):
        threat_model("I")
