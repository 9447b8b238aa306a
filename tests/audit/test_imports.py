"""What starting costs is counted in modules, as a busy machine's seconds say nothing."""

from __future__ import annotations

import json
import subprocess
import sys

HEAVY = ("scipy", "skimage", "sklearn", "torchmetrics", "torch._inductor", "matplotlib")
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
    assert loaded_by("import leakatlas.audit") == []
    assert "scipy.stats" in loaded_by("import scipy.stats")  # the count counts


def test_the_doctor_loads_none_for_a_set_up_with_public_images_of_its_own() -> None:
    held = "(torch.rand(2, 3, 4, 4), [0, 1])"
    what = (
        "from torch import nn; import leakatlas.audit; leakatlas.audit.doctor(nn.Sequential("
        f"nn.Flatten(), nn.Linear(48, 3)), {held}, surrogate={held}, threat='B')"
    )
    assert [m for m in loaded_by(what) if m.startswith(("scipy.stats", "skimage", "sklearn"))] == []
