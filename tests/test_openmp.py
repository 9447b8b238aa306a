"""Threads give up their cores soon, unless the user chose how they wait."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from leakatlas.bench.child import Child
from leakatlas.openmp import OWN_WISH, SPINS, spin_briefly


def test_threads_spin_briefly_where_nobody_chose() -> None:
    environment = {"HOME": "/"}
    spin_briefly(environment)
    assert environment == {"HOME": "/", **SPINS}


@pytest.mark.parametrize("name", OWN_WISH)
def test_what_the_user_chose_stands(name: str) -> None:
    environment = {name: "own"}
    spin_briefly(environment)
    assert environment == {name: "own"}


def test_the_command_line_loads_no_torch_before_it_is_set() -> None:
    """Torch reads it once, when it is loaded."""
    code = "import sys, leakatlas.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_child_process_has_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in OWN_WISH:
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "tells.py").write_text("import json, os; print(json.dumps(dict(os.environ)))")
    monkeypatch.syspath_prepend(str(tmp_path))
    child = Child("tells")
    _, environment = child.inbox.get(timeout=60)
    child.close()
    assert environment is not None
    assert SPINS.items() <= environment.items()
