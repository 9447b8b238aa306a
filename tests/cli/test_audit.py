"""Commands as people type them: what they print, write and exit with."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file

from leakatlas import models
from leakatlas.fl import Client, Federation, FedSGD

MODEL = {"builtin": "fc", "kwargs": {"in_channels": 3, "size": 32, "classes": 8, "widths": [8]}}
QUICK: dict[str, Any] = {
    "model": MODEL,
    "data": {"victims": "photos", "limit": 1, "surrogate": "patches:32:32:surrogate"},
    "attacks": ["inverting_gradients", "robbing_the_fed"],
    "attack_parameters": {"inverting_gradients": {"steps": 3}},
    "threat": "B,C,G",
    "budget": "10m",
}


def leakatlas(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", "from leakatlas.cli import main; main()", *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
    )


def write(folder: Path, content: Mapping[str, Any] | str, name: str = "audit.yaml") -> str:
    text = content if isinstance(content, str) else yaml.safe_dump(dict(content))
    (folder / name).write_text(text)
    return name


def test_an_audit_from_a_file_that_points_to_python_code(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "from torch import nn\n"
        "def make(hidden):\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(3072, hidden), nn.ReLU(),\n"
        "                         nn.Linear(hidden, 8))\n"
    )
    config = QUICK | {"model": {"python": "mine.py:make", "kwargs": {"hidden": 8}}}
    done = leakatlas("audit", write(tmp_path, config), "--out", "out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "exact leak" in done.stderr and "Report: out/report.html" in done.stderr
    values = json.loads((tmp_path / "out" / "report.json").read_text())
    assert values["command"] == "leakatlas audit audit.yaml --out out"
    assert {v["letter"]: v["verdict"] for v in values["verdicts"]}["G"] == "exact leak"


def test_a_gate_decides_the_exit_code_and_a_second_run_resumes(tmp_path: Path) -> None:
    config = write(tmp_path, QUICK | {"fail_on": ["P(psnr > 20 dB) > 0.05"]})
    failed = leakatlas("audit", config, "--out", "out", "--json", cwd=tmp_path)
    assert failed.returncode == 1
    assert "Failed: P(psnr > 20 dB) > 0.05 (it is 1)" in failed.stderr
    first = json.loads(failed.stdout)
    write(tmp_path, QUICK)
    passed = leakatlas(
        "audit", config, "--out", "out", "--json", "--fail-on", "exact > 9", cwd=tmp_path
    )
    assert passed.returncode == 0
    second = json.loads(passed.stdout)
    assert [r["seconds"] for r in second["runs"]] == [r["seconds"] for r in first["runs"]]


def test_ctrl_c_keeps_what_was_computed_and_the_same_command_continues(tmp_path: Path) -> None:
    slow = {"inverting_gradients": {"steps": 1_000_000}}
    config = write(tmp_path, QUICK | {"attack_parameters": slow, "budget": "24h"})
    interrupted = (
        "import os, signal\n"
        "from leakatlas.audit import kept\n"
        "from leakatlas.cli import main\n"
        "save, runs = kept.save, []\n"
        "def save_and_interrupt(*args, **kwargs):\n"
        "    save(*args, **kwargs)\n"
        "    runs.append(args)\n"
        "    if len(runs) == 1:  # the first run, the quick one, is kept\n"
        "        os.kill(os.getpid(), signal.SIGINT)\n"
        "kept.save = save_and_interrupt\n"
        "main()\n"
    )
    process = subprocess.run(
        [sys.executable, "-c", interrupted, "audit", config, "--out", "out"],
        cwd=tmp_path, stderr=subprocess.PIPE, text=True, check=False,
    )  # fmt: skip
    errors = process.stderr
    assert process.returncode == 3, errors
    assert "Undecided: the audit was stopped" in errors
    assert "Stopped early; the same command continues." in errors
    values = json.loads((tmp_path / "out" / "report.json").read_text())
    assert values["complete"] is False
    assert any(run["verdict"] == "exact leak" for run in values["runs"])


def test_doctor_is_consistent_on_a_simulated_update(tmp_path: Path) -> None:
    done = leakatlas("doctor", write(tmp_path, QUICK), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "consistent" in done.stdout and "robbing_the_fed" in done.stdout
    assert "Before any attack" in done.stdout and "label_exposure" in done.stdout
    assert "Realism of" in done.stdout and "granted: nothing" in " ".join(done.stdout.split())
    assert "if higher" in done.stdout and "spectrum are left out" in done.stdout


def test_doctor_names_what_is_wrong_with_a_captured_update(tmp_path: Path) -> None:
    from leakatlas import data

    model = models.build("fc", **MODEL["kwargs"])  # type: ignore[arg-type]  # a plain dict
    photos = data.photos(32).subset([0])
    federation = Federation(model, {0: Client(photos.images, photos.labels)}, FedSGD())
    update = federation.play_round().updates[0]
    update.with_tensors({n: -t for n, t in update.tensors.items()}).save(tmp_path / "u.safetensors")
    config = write(tmp_path, QUICK | {"captured": "u.safetensors"})
    done = leakatlas("doctor", config, cwd=tmp_path)
    assert done.returncode == 1
    assert "wrong: sign" in done.stdout


def nan_update(folder: Path) -> None:
    facts = {"kind": "gradient", "state_hash": "", "num_examples": 1, "sign": 1, "scale": 1.0,
             "reduction": "mean", "clients": 1}  # fmt: skip
    save_file(
        {"tensors/x": torch.tensor([float("nan")])},
        folder / "bad.safetensors",
        metadata={"leakatlas.update": json.dumps(facts)},
    )


class _Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (Path.touch, (Path("owned"),))  # type: ignore[return-value]  # what pickle runs


def evil_pickle(folder: Path) -> None:
    (folder / "bad.pt").write_bytes(pickle.dumps({"w": _Evil()}))


def truncated(folder: Path) -> None:
    save_file({"w": torch.zeros(100)}, folder / "whole.safetensors")
    (folder / "bad.safetensors").write_bytes((folder / "whole.safetensors").read_bytes()[:50])


def wrong_shapes(folder: Path) -> None:
    save_file({"fc.weight": torch.zeros(3, 3)}, folder / "bad.safetensors")


def nothing(folder: Path) -> None:
    del folder


@pytest.mark.parametrize(
    ("changes", "prepare", "words"),
    [
        ({"atacks": []}, nothing, ["unknown key 'atacks'", "did you mean 'attacks'"]),
        ({"data": {"victim": "photos"}}, nothing, ["unknown key 'data.victim'", "'victims'"]),
        ({"threat": "A-Q"}, nothing, ["Unknown threat model 'Q'"]),
        ({"attacks": ["inverting_gradient"]}, nothing, ["Did you mean 'inverting_gradients'"]),
        ({"defenses": [{"key": "soterai"}]}, nothing, ["Did you mean 'soteria'"]),
        ({"defenses": [{"key": "clipping", "max_nrom": 1}]}, nothing, ["no parameter 'max_nrom'"]),
        ({"grants": ["label"]}, nothing, ["Unknown grant 'label'", "labels"]),
        ({"protocol": {"algorithm": "fedsdg"}}, nothing, ["Did you mean 'fedsgd'"]),
        ({"protocol": {"algorithm": "fedavg", "epochs": 0}}, nothing, ["epochs=0"]),
        ({"data": {"limit": 0}}, nothing, ["data.limit"]),
        ({"data": {"victims": "folder:missing"}}, nothing, ["missing"]),
        ({"data": {"victims": "photos", "mean": [0.5]}}, nothing, ["Box"]),
        ({"model": {"builtin": "lenett"}}, nothing, ["Did you mean 'lenet'"]),
        ({"model": {"python": "absent.py:make"}}, nothing, ["does not exist"]),
        ({"model": {}}, nothing, ["exactly one of 'builtin' and 'python'"]),
        ({"model": MODEL | {"weights": "bad.pt"}}, evil_pickle, ["bad.pt"]),
        ({"model": MODEL | {"weights": "bad.safetensors"}}, truncated, ["bad.safetensors"]),
        (
            {"model": MODEL | {"weights": "bad.safetensors"}},
            wrong_shapes,
            ["not the weights of this FCNet", "fc.bias"],
        ),
        ({"fail_on": ["psnr is high"]}, nothing, ["write 'P(psnr > 20 dB) > 0.05'"]),
        ({"budget": "later"}, nothing, ["write '30s'"]),
    ],
)
def test_bad_input_is_one_clear_line_and_exit_code_2(
    tmp_path: Path,
    changes: Mapping[str, Any],
    prepare: Any,
    words: Sequence[str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from leakatlas.cli import main

    prepare(tmp_path)
    name = write(tmp_path, QUICK | dict(changes))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["leakatlas", "audit", name, "--out", "out"])
    monkeypatch.setenv("COLUMNS", "1000")
    with pytest.raises(SystemExit) as ended:
        main()
    message = capsys.readouterr().err
    assert ended.value.code == 2, message
    assert "Traceback" not in message
    for word in words:
        assert word in message
    assert not (tmp_path / "owned").exists()
    assert not (tmp_path / "out" / "report.html").exists()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("model: [", "is not YAML"),
        ("- a\n- b\n", "expected keys such as 'model:'"),
        ("", "expected"),
    ],
)
def test_what_is_not_a_configuration_is_refused(tmp_path: Path, content: str, words: str) -> None:
    done = leakatlas("audit", write(tmp_path, content), cwd=tmp_path)
    assert done.returncode == 2 and words in " ".join(done.stderr.split())


def test_an_unknown_execution_is_refused_by_name(tmp_path: Path) -> None:
    done = leakatlas("audit", write(tmp_path, QUICK), "--execution", "warp", cwd=tmp_path)
    assert done.returncode == 2
    assert "warp" in done.stderr and "eager" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_missing_file_and_an_unwritable_folder(tmp_path: Path) -> None:
    done = leakatlas("audit", "absent.yaml", cwd=tmp_path)
    assert done.returncode == 2 and "does not exist" in done.stderr
    (tmp_path / "file").write_text("")
    done = leakatlas("audit", write(tmp_path, QUICK), "--out", "file", cwd=tmp_path)
    assert done.returncode == 2 and "cannot be written" in done.stderr


def test_a_captured_update_with_nan_is_refused(tmp_path: Path) -> None:
    nan_update(tmp_path)
    config = write(tmp_path, QUICK | {"captured": "bad.safetensors"})
    done = leakatlas("doctor", config, cwd=tmp_path)
    assert done.returncode == 2 and "non-finite" in done.stderr
