"""From what a framework recorded to an answer, in one line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from leakatlas.cli.recorded import Recorded
from leakatlas.errors import InvalidParameter
from tests.audit.test_recorded import record


def _options(**changes: Any) -> Recorded:
    nothing = dict.fromkeys(("captured", "model", "truth", "shape", "client"))
    return Recorded(**{**nothing, "protocol": (), **changes})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model": "lenet"}, "--model belongs to --captured"),
        ({"captured": Path("x"), "shape": "3,2,2"}, "needs --model"),
        ({"captured": Path("x"), "model": "lenet"}, "--truth.*or --shape"),
        ({"captured": Path("x"), "model": "lenet", "truth": "a", "shape": "3,2,2"}, "or --shape"),
        ({"captured": Path("x"), "model": "lenet", "shape": "3,32"}, "expected C,H,W"),
        (
            {"captured": Path("x"), "model": "lenet", "shape": "3,2,2", "protocol": ("lr",)},
            "name=value",
        ),
    ],
)
def test_what_is_missing_is_said(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidParameter, match=words):
        _options(**changes).config(None)


def test_a_file_and_a_capture_are_one_too_many() -> None:
    with pytest.raises(InvalidParameter, match="not both"):
        _options(captured=Path("x"), model="lenet", shape="3,2,2").config(Path("audit.yaml"))


def test_values_keep_their_kind() -> None:
    found = _options(
        captured=Path("x"), model="lenet", shape="3x2x2",
        protocol=("lr=0.1", "epochs=2", "shuffle=true", "optimizer=adam"),
    ).config(None)  # fmt: skip
    assert found is not None
    assert found.protocol == {"lr": 0.1, "epochs": 2, "shuffle": True, "optimizer": "adam"}
    assert found.data.shape == (3, 2, 2)


def test_the_doctor_checks_a_folder_of_captures(tmp_path: Path) -> None:
    record(tmp_path / "captures")
    (tmp_path / "net.py").write_text(
        "from leakatlas.models import build\n"
        "def net():\n    return build('lenet', size=16, classes=8)\n",
        encoding="utf-8",
    )
    done = subprocess.run(
        [sys.executable, "-m", "leakatlas", "doctor", "--captured", "captures", "--json",
         "--model", "net.py:net", "--shape", "3,16,16"],
        cwd=tmp_path, text=True, capture_output=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (found,) = json.loads(done.stdout).values()
    assert found["facts"]["local steps"] == 2
    assert "not at hand" in found["replay"]["explanation"]
