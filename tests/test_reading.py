from __future__ import annotations

import os
from pathlib import Path

import pytest

from leakatlas import limits, reading
from leakatlas.errors import InvalidInput, InvalidParameter


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
