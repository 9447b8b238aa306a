from __future__ import annotations

import math

import pytest

from leakatlas import yamlfiles
from leakatlas.errors import InvalidInput


def yaml(text: str) -> object:
    return yamlfiles.parse(text, who="The file")


def test_plain_scalars_are_those_of_yaml_1_2() -> None:
    text = "[no, on, 010, 1e-3, .inf, -7, 0x1f, 0o17, ~, null, '', true, 1:30, 2001-01-01, x]"
    assert yaml(text) == [
        "no", "on", 10, 0.001, math.inf, -7, 31, 15, None, None, "", True, "1:30",
        "2001-01-01", "x",
    ]  # fmt: skip
    assert yaml("a: {b: [1, 2.5]}\nc: |\n  text\n") == {"a": {"b": [1, 2.5]}, "c": "text\n"}
    assert yaml("a: &x [1]\nb: *x") == {"a": [1], "b": [1]}
    assert yaml("") is None
    assert math.isnan(yaml(".nan"))  # type: ignore[arg-type]  # it is a float, which is the point


ANCHORS = "a: &a [x,x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [{','.join(['*' + chr(97 + i)] * 10)}]\n" for i in range(9)
)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("seed: !!int abc", "line 1, column 7: expected int; got 'abc'"),
        ("seed: " + "9" * 5000, "a whole number of 5,000 digits is too large"),
        (f"seed: {2**63}", "is too large"),
        ("seed: !!timestamp 2001-99-99", "the tag .*timestamp' is not allowed"),
        ("!!python/object/apply:os.system [x]", "is not allowed"),
        ("x: !!set {a, b}", "is not allowed"),
        ("x: !!binary aGk=", "is not allowed"),
        ("[" * 3000, "column 33: nested deeper than 32 levels"),
        ("a: &a [*a]", "nested deeper than 32 levels"),
        ("a: &a {b: *a}", "nested deeper than 32 levels"),
        (ANCHORS, "more than 20,000 values, aliases included"),
        ("a: 1\nb: 2\na: 3", "line 3, column 1: the key 'a' stands here a second time"),
        ("? [a]\n: b", "expected text as a key"),
        ("1: b", "expected text as a key; got 1"),
        ("a: [", "is not YAML that can be read, line 1, column 5"),
        ("a: *b", "undefined alias"),
        ("--- a\n--- b", "single document"),
        ("\x00", "special characters"),
        ("%YAML 9.9\n--- a", "YAML"),
    ],
)
def test_a_hostile_document_is_one_message_with_its_place(text: str, words: str) -> None:
    with pytest.raises(InvalidInput, match=words) as raised:
        yaml(text)
    assert str(raised.value).startswith("The file") and len(str(raised.value)) < 600
