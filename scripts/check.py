"""The gate: style, types, architecture, tests. Prints what it runs and ends at the first failure.

``python scripts/check.py`` runs everything; ``python scripts/check.py lint types`` some of it.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent

STEPS = {
    "lint": [[str(BIN / "ruff"), "check", "."], [str(BIN / "ruff"), "format", "--check", "."]],
    "types": [[str(BIN / "mypy")]],
    "architecture": [[str(BIN / "lint-imports")]],
    "tests": [
        [
            str(BIN / "pytest"), "-q", "-n", "2", "--dist", "loadfile",
            "--cov=leakatlas.threat", "--cov=leakatlas.fl", "--cov=leakatlas.blocks",
            "--cov-report=term:skip-covered",
        ]
    ],
}  # fmt: skip


def main(wanted: list[str]) -> int:
    """Run the wanted steps, all of them by default."""
    # One thread for each worker: two workers on two cores would otherwise fight over both.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PATH": f"{BIN}:{os.environ['PATH']}"}
    for name in wanted or list(STEPS):
        for command in STEPS[name]:
            print(f"== {name}: {Path(command[0]).name} {' '.join(command[1:])}", flush=True)
            begun = time.perf_counter()
            code = subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode
            print(f"== {name}: {time.perf_counter() - begun:.0f} s, exit {code}", flush=True)
            if code:
                return code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
