"""What starting costs is counted in modules, as a busy machine's seconds say nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import leakatlas

HEAVY = (
    "scipy", "skimage", "sklearn", "torchmetrics", "torchvision", "matplotlib", "pyarrow", "jinja2",
    "sympy", "torch._dynamo", "torch._inductor", "torch._functorch.aot_autograd",
)  # fmt: skip
"""Seconds of import between them; torch itself loads none."""

COUNT = (
    "import json, sys, torch; before = set(sys.modules); {what}; "
    f"heavy = {HEAVY!r}; "
    "print(json.dumps(sorted(m for m in set(sys.modules) - before if m.startswith(heavy))))"
)


def loaded_by(what: str) -> list[str]:
    run = subprocess.run(
        [sys.executable, "-c", COUNT.format(what=what)], capture_output=True, text=True, check=True
    )
    found: list[str] = json.loads(run.stdout.splitlines()[-1])
    return found


def test_importing_the_audit_loads_no_library_that_only_some_runs_use() -> None:
    assert loaded_by("import leakatlas.audit, leakatlas.lint, leakatlas.bench.worker") == []
    assert "scipy.stats" in loaded_by("import scipy.stats")  # the count counts


def test_the_doctor_loads_none_for_a_set_up_with_public_images_of_its_own() -> None:
    held = "(torch.rand(2, 3, 4, 4), [0, 1])"
    what = (
        "from torch import nn; import leakatlas.audit; leakatlas.audit.doctor(nn.Sequential("
        f"nn.Flatten(), nn.Linear(48, 3)), {held}, surrogate={held}, threat='B')"
    )
    assert loaded_by(what) == []


ABSENT = (
    "sklearn", "cryptography", "pyarrow", "latex2mathml", "opacus", "ray", "flwr", "lpips",
    "datasets", "matplotlib", "pooch", "tenseal", "mlflow",
)  # fmt: skip
"""Packages without which an audit of one's own model and images, the doctor and lint run."""

BLOCKER = f"import sys\nsys.modules.update(dict.fromkeys({ABSENT!r}))\n"
"""None in place of a module makes its import fail as if it were not there."""

WITHOUT = """
import importlib, sys
import torch
from torch import nn
import leakatlas
from leakatlas import data
from leakatlas.catalogue import registry
from leakatlas.errors import Unavailable

torch.manual_seed(0)
model = nn.Sequential(nn.Flatten(), nn.Linear(192, 8), nn.ReLU(), nn.Linear(8, 3))
held, public = (torch.rand(2, 3, 8, 8), [0, 1]), (torch.rand(8, 3, 8, 8), [0, 1, 2, 0] * 2)
report = leakatlas.audit(
    model, held, surrogate=public, threat="A-C", budget=None, rehearsal=False,
    attacks=["spear", "idlg", "inverting_gradients"],
    attack_parameters={"inverting_gradients": {"steps": 3}, "idlg": {"steps": 1}},
)
print(sorted({run.status for run in report.runs}), any(run.scores for run in report.runs))
print(leakatlas.doctor(model, held, surrogate=public, threat="C").replay.consistent)
print(leakatlas.lint(model).alarm)
for use in (
    lambda: data.load("digits"),
    lambda: data.photos(8),
    lambda: registry.load_defense("secure_aggregation"),
    lambda: data.load("parquet:a.parquet"),
    lambda: importlib.import_module("leakatlas.site"),
):
    try:
        use()
    except Unavailable as problem:
        print(problem)
print([m for m in sys.modules if m.partition(".")[0] in %r and sys.modules[m]])
"""


def test_an_audit_the_doctor_and_lint_run_without_what_few_uses_need(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(BLOCKER)  # the attacks' own process has it too
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    source = str(Path(leakatlas.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT % (ABSENT,)],
        cwd=tmp_path, capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join((str(tmp_path), source))},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    statuses, consistent, alarm, *said, left = done.stdout.splitlines()
    assert "'complete'" in statuses and "'error'" not in statuses and statuses.endswith("True")
    assert (consistent, alarm, left) == ("True", "False", "[]")
    assert said == [
        "The set of digits needs sklearn, which is not installed: pip install 'scikit-learn'",
        "The bundled picture 'flower.jpg' needs sklearn, which is not installed: pip install "
        "'scikit-learn'",
        "The defense 'secure_aggregation' needs cryptography, which is not installed: pip install "
        "'cryptography'",
        "The Parquet file 'a.parquet' needs pyarrow, which is not installed: pip install 'pyarrow'",
        "The site needs latex2mathml, which is not installed: pip install 'leakatlas[site]'",
    ]


def test_the_doctor_of_a_file_with_bundled_photos_loads_none(tmp_path: Path) -> None:
    """Photos, strangers' photos, every outlook and every measure of the forward tier."""
    file = tmp_path / "audit.yaml"
    file.write_text("model: {builtin: lenet}\ndata: {victims: 'photos:32', limit: 2}\n")
    what = (
        "from typer.testing import CliRunner; from leakatlas.cli import app; "
        f"done = CliRunner().invoke(app, ['doctor', {str(file)!r}]); "
        "assert done.exit_code == 0, done.output"
    )
    assert loaded_by(what) == []


@pytest.mark.parametrize("arguments", [["--help"], ["list", "--help"], ["show", "dlg"]])
def test_help_and_catalogue_do_without_torch(arguments: list[str]) -> None:
    code = (
        "import sys; from typer.testing import CliRunner; from leakatlas.cli import app; "
        f"done = CliRunner().invoke(app, {arguments}); assert done.exit_code == 0, done.output; "
        "print('torch' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.splitlines()[-1] == "False"
