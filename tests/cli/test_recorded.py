"""From what a framework recorded to an answer, in one line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from leakatlas.audit import run
from leakatlas.audit.deadline import Deadline
from leakatlas.cli import app
from leakatlas.cli.recorded import Recorded
from leakatlas.data import patches
from leakatlas.errors import InvalidParameter
from tests.audit.test_recorded import record


def _options(**changes: Any) -> Recorded:
    nothing = dict.fromkeys(("captured", "model", "truth", "shape", "client", "place"))
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


def test_a_place_can_be_chosen() -> None:
    shape = {"model": "lenet", "shape": "3,2,2"}
    found = _options(captured=Path("x"), place="aggregate", **shape).config(None)
    assert found is not None
    assert vars(found.captured)["place"] == "aggregate"
    with pytest.raises(ValueError, match="'raw', 'wire', 'server' or 'aggregate'"):
        _options(captured=Path("x"), place="elsewhere", **shape).config(None)


def test_an_audit_of_a_folder_of_captures_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    settings = {"learning-rate": 0.05, "local-epochs": 2}
    record(tmp_path / "captures", images=patches(16, 2), settings=settings)
    (tmp_path / "net.py").write_text(
        "from leakatlas.models import build\n"
        "def net():\n    return build('lenet', size=16, classes=8)\n",
        encoding="utf-8",
    )

    # The attacks have five seconds; whatever the machine is doing, the set-up is examined before.
    monkeypatch.setattr(run, "Deadline", lambda begun, seconds: Deadline(begun, None))
    monkeypatch.setattr(run, "EXAMINED", 1_000.0)
    monkeypatch.chdir(tmp_path)

    def audit(*options: str) -> Result:
        return CliRunner().invoke(app, [
            "audit", "--captured", "captures", "--model", "net.py:net", "--truth", "patches:16:2",
            "--out", "report", *options,
        ])  # fmt: skip

    asked = audit()
    assert asked.exit_code == 2
    assert "--protocol batch_size=..." in " ".join(asked.output.split())
    done = audit("--protocol", "batch_size=2", "--budget", "5s", "--threat", "B", "--place", "raw")
    report = json.loads((tmp_path / "report" / "report.json").read_text(encoding="utf-8"))
    (diagnosis,) = report["diagnoses"].values()
    assert diagnosis["replay"]["residual"] < 1e-5, done.output
    (realism,) = report["realism"]
    assert realism["record"]["update"] == "captured"
    assert realism["record"]["weights"] == "received by the captured client"
    assert (realism["record"]["epochs"], realism["record"]["batch_size"]) == (2, 2)
    assert any("recorded at 'raw'" in finding for finding in diagnosis["findings"])


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
