"""The smallest inputs that once broke a promise, or would break it first; each with its answer."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from leakatlas import limits
from leakatlas.errors import LeakAtlasError
from tests.doors.doors import DOORS
from tests.doors.guard import check
from tests.doors.test_doors import SMALL_MACHINE

CORPUS = Path(__file__).parent / "corpus"

NOT_RUN = r"and was not run.*`model=`, or `trust_code=True`"
EXPECTED = {
    "captured_arrays/no-zip": r"a\.npz. cannot be read: .*numpy\.savez",
    # what is damaged of one's own is made again
    "checkpoint/leaves-of-another-shape": "answer",
    "checkpoint/short-buffer": "answer",
    "checkpoint/steps-as-text": "answer",
    "command_line/bad-input-makes-no-folder": "exit 2",
    "command_line/markup-in-a-path": "exit 2",
    "command_line/path-too-long": "exit 2",
    "command_line/show-superscript": "exit 2",
    "configuration/a-billion-classes": r"classes is larger than 16,777,216",
    "configuration/batch-of-1e30": r"line 30, column 17: a whole number of 31 digits is too large",
    "configuration/date": r"seed: input should be a valid integer.*got '2001-99-99'",
    "configuration/factory-that-exits": r"net\.py, line 2: it calls sys\.exit\(0\)",
    "configuration/factory-with-a-typo": r"net\.py, line 1: SyntaxError",
    "configuration/five-thousand-digits": r"line 1, column 7: a whole number of 5,000 digits",
    "configuration/hub-load": r"'torch\.hub:load' was not run: of an installed package only",
    "configuration/int-tag": r"line 1, column 7: expected int; got 'abc'",
    "configuration/list-as-key-of-a-defense": r"needs its 'key' as text; got \{'key': \['x'\]\}",
    "configuration/no-targets": r"targets: expected at least one client",
    "configuration/os-system": r"module 'os' is Python's own and was not run",
    "configuration/python-tag": r"the tag .*os\.mkdir' is not allowed",
    "configuration/rate-of-1e300": r"lr=1e\+300\): input should be less than or equal to 10{30}\.",
    "configuration/recursive-anchor": r"nested deeper than 32 levels",
    "configuration/setting-called-name": r"Model 'fc' has no setting 'name'",
    "configuration/superscript-size": r"expected a positive number .*got '²'",
    "configuration/ten-fold-aliases": r"more than 20,000 values, aliases included",
    "configuration/three-thousand-brackets": r"column 33: nested deeper than 32 levels",
    "configuration/value-of-twenty-thousand": r"^Unknown threat model 'X{30,45}\.\.\.X{30,45}'",
    "data_name/side-of-a-billion": r"expected a side from 1 to 8,000 pixels; got 1000000000",
    "data_name/superscript": r"expected a positive number .*got '²'",
    "doctor/a-billion-epochs": "exit 2",
    "doctor/rate-beyond-single-precision": "exit 2",
    "image/dds-called-png": r"a\.png: not an image .*expected PNG, JPEG",
    "image/eps-called-png": r"a\.png: not an image .*expected PNG, JPEG",
    "kept_run/nested": "answer",
    "kept_run/verdict-of-its-own": "answer",
    "lint_weights/vector-only": r"no weight with two or more dimensions",
    "rehearsal/nested": "answer",
    "report/nested": r"nested too deep",
    "result/study-of-a-long-name": "answer",
    "result/nested": "answer",  # validate lists it among the problems
    "result/not-utf-8": "answer",
    "rows/five-thousand-digits": "answer",
    "rows/nested": "answer",
    "rows/not-utf-8": r"added\.toml' cannot be read: 'utf-8' codec",
    "scenario/os-mkdir": NOT_RUN,
    "store/nested": r"1\.parquet is damaged \(maximum recursion depth.*remove it",
    "store/status-of-its-own": r"1\.parquet is damaged .*'complete', 'cut short'",
    "study_file/ten-fold-aliases": r"more than 20,000 values, aliases included",
    "tampering/a-billion-clients": r"clients=1,000,000,000\) needs 2\.63 TB of memory",
    "tampering/spread-beyond-float32": r"Imprint\(spread=1\.79.*less than or equal to 10{30}\.",
    "update/huge-count": r"a whole number of 31 digits is too large",
    "update/markup-in-hash": r"kind='\[/x\]'",
    "update/nested-description": r"nested too deep",
    "view/file-of-code": NOT_RUN,
    "view/nested-description": r"nested too deep",
    "view/os-mkdir": NOT_RUN,
    "weights/bits8": r"bits8; expected floats",
    "weights/compressed": r"compressed archive",
    "weights/meta": r"meta tensor",
    "weights/pickle-with-code": r"holds code or whole objects, which are never loaded",
    "weights/stride-0": r"stores only 4 bytes",
}


def test_every_offender_is_in_the_table() -> None:
    found = {f"{case.parent.name}/{case.name}" for case in CORPUS.glob("*/*")}
    assert found == set(EXPECTED)


@pytest.mark.parametrize("name", EXPECTED)
def test_an_offender_gets_its_answer(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "memory", lambda: SMALL_MACHINE)
    case, door = CORPUS / name, DOORS[name.partition("/")[0]]
    files = {
        str(path.relative_to(case)): path.read_bytes() for path in case.rglob("*") if path.is_file()
    }
    said: list[str] = []

    def opened(folder: Path) -> None:
        try:
            answer = door.open(folder)
        except LeakAtlasError as problem:
            said.append(str(problem))
            raise
        said.append(f"exit {answer}" if type(answer) is int else "answer")

    check(files, opened, tmp_path / "door")
    if EXPECTED[name] in ("answer", "exit 2"):
        assert said == [EXPECTED[name]]
    else:
        assert re.search(EXPECTED[name], said[0]), said[0]
