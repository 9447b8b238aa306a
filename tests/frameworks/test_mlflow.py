"""Reports and gates in a real MLflow store on this disk: ``make test-mlflow``."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

import leakatlas
from leakatlas import FedSGD
from leakatlas.data import photos
from leakatlas.errors import InvalidParameter

mlflow = pytest.importorskip("mlflow", reason="make test-mlflow builds an environment with MLflow")


@pytest.fixture(autouse=True)
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    # Newer releases ask to be told that a folder, not a database, is meant.
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow.set_tracking_uri((tmp_path / "store").as_uri())
    yield tmp_path / "store"
    mlflow.end_run()


@pytest.fixture(scope="module")
def report() -> leakatlas.Report:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 8), nn.ReLU(), nn.Linear(8, 4))
    private = photos(16).subset([0])
    return leakatlas.audit(
        model, (private.images, private.labels % 4), protocol=FedSGD(), threat="B",
        attacks=["rgap"], budget="20s",
    )  # fmt: skip


def test_a_report_and_its_gates_are_logged(report: leakatlas.Report, tmp_path: Path) -> None:
    from leakatlas.integrations.mlflow import log_report

    leaks, holds = "P(psnr > 20 dB) > 0.05", "P(psnr > 500 dB) > 0.99"
    answers = log_report(report, gates=[leaks, holds])
    assert answers[leaks] == "failed", "one image in a linear layer is read off exactly"
    assert answers[holds] in ("passed", "undecided")
    run = mlflow.last_active_run()
    assert run is not None
    assert run.data.tags["leakatlas.verdict.B"] == report.verdicts()[0].verdict
    assert run.data.tags["leakatlas.gate.0"] == f"{leaks}: failed"
    assert run.data.params["leakatlas.attacks"] == "rgap"
    worst = report.worst_case()["psnr"]
    assert run.data.metrics["leakatlas/psnr worst"] == pytest.approx(max(worst))
    assert run.data.metrics["leakatlas/attacks tried"] == 1
    folder = mlflow.artifacts.download_artifacts(
        run_id=run.info.run_id, artifact_path="leakatlas", dst_path=str(tmp_path / "back")
    )
    logged = json.loads((Path(folder) / "report.json").read_text(encoding="utf-8"))
    assert logged["letters"] == ["B"]
    assert (Path(folder) / "report.html").is_file()


def test_it_joins_a_run_that_is_active(report: leakatlas.Report) -> None:
    from leakatlas.integrations.mlflow import log_report

    with mlflow.start_run() as run:
        mlflow.log_metric("accuracy", 0.5)
        log_report(report)
        assert mlflow.active_run().info.run_id == run.info.run_id
    found = mlflow.get_run(run.info.run_id)
    assert found.data.metrics["accuracy"] == 0.5
    assert "leakatlas.verdict.B" in found.data.tags
    assert found.data.tags["leakatlas.undecided"] == "; ".join(report.undecided()) or "no"


def test_a_gate_that_cannot_be_read_logs_nothing(report: leakatlas.Report) -> None:
    from leakatlas.integrations.mlflow import log_report

    with mlflow.start_run() as run, pytest.raises(InvalidParameter):
        log_report(report, gates=["psnr is high"])
    assert not any(n.startswith("leakatlas") for n in mlflow.get_run(run.info.run_id).data.tags)
