from __future__ import annotations

import math
import os
from pathlib import Path

import pytest

from leakatlas import limits, reading
from leakatlas.errors import InvalidInput, InvalidParameter


def yaml(text: str) -> object:
    return reading.parse_yaml(text, who="The file")


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


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[" * 100_000, "nested too deep"),
        ('{"a": ' * 100_000, "nested too deep"),
        ("1" * 30, "30 digits is too large"),
        ("{", "cannot be read"),
        ('"\\ud800', "cannot be read"),
        ("", "cannot be read"),
    ],
)
def test_hostile_json_is_one_message(text: str, words: str) -> None:
    with pytest.raises(InvalidInput, match=words):
        reading.parse_json(text, who="The file")


def test_reading_is_bounded_and_takes_regular_files_only(tmp_path: Path) -> None:
    file = tmp_path / "a"
    file.write_bytes(b"12345")
    assert reading.read_bytes(file, what="row", limit=5) == b"12345"
    with pytest.raises(InvalidInput, match="larger than 4 bytes"):
        reading.read_bytes(file, what="row", limit=4)
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(InvalidInput, match="utf-8"):
        reading.read_text(file, what="row", limit=5)
    os.mkfifo(tmp_path / "pipe")
    for path, words in (
        (tmp_path / "absent", "does not exist"),
        (tmp_path, "is a folder"),
        (tmp_path / "pipe", "is a pipe or a device"),
        (Path("/dev/zero"), "is a pipe or a device"),
        (tmp_path / ("x" * 5000), "cannot be read"),
        (Path("a\x00b"), "cannot be read"),
        (file / "inside", "cannot be read"),
    ):
        with pytest.raises(InvalidInput, match=words):
            reading.read_bytes(path, what="row", limit=5)


@pytest.mark.parametrize(
    "raised", [ValueError, OSError, RecursionError, MemoryError, OverflowError, KeyError]
)
def test_a_boundary_turns_what_was_announced(raised: type[Exception]) -> None:
    with pytest.raises(InvalidInput, match=r"^The row cannot be read: .*\. Look\.$"):
        with reading.boundary("The row", KeyError, way_out="Look."):
            raise raised("x" * 10_000)


def test_a_boundary_lets_defects_and_our_own_errors_pass() -> None:
    with pytest.raises(ZeroDivisionError), reading.boundary("The row"):
        raise ZeroDivisionError
    with pytest.raises(InvalidParameter, match=r"^as it was$"), reading.boundary("The row"):
        raise InvalidParameter("as it was")


def test_memory_is_what_the_machine_has_and_needs_are_held_against_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert 2**28 < limits.memory() <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    monkeypatch.setattr(limits, "memory", lambda: 1_000_000)
    limits.require_memory("it", 1_000_000, "")
    message = r"^it needs 8 MB of memory \(2 x 4 MB\); this machine has 1 MB\.$"
    with pytest.raises(InvalidParameter, match=message):
        limits.require_memory("it", 8_000_000, "2 x 4 MB")
