"""Tests of the adapters for frameworks that cannot share this project's environment.

``python scripts/frameworks.py flower`` makes a virtual environment outside of the repository with
the project and the extra of that name, runs ``tests/frameworks/test_flower.py`` in it, and ends
with its exit code. With ``--lowest`` the framework is the oldest that the extra allows. With
``--study`` it runs a study of that name in it instead.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
EXTRAS = {
    "flower": ("flower", ["flwr[simulation]"]),
    "nvflare": ("nvflare", []),
    "lightning": ("lightning", []),
    "huggingface": ("huggingface", []),
    "mlflow": ("tracking", []),
    "priors": ("biggan,diffusers", []),
}
"""For each framework the extra of this project, and what its tests need beside it."""

TESTERS = ["pytest>=8", "hypothesis>=6.100"]


def lowest(extra: str) -> list[str]:
    """The requirements of an extra at their lower bounds."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    found: dict[str, list[str]] = project["optional-dependencies"]
    return [one.replace(">=", "==") for name in extra.split(",") for one in found[name]]


def main() -> int:
    """Build the environment and run the tests."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("framework", choices=sorted(EXTRAS))
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "frameworks")
    parser.add_argument("--lowest", action="store_true", help="the oldest that is allowed")
    parser.add_argument("--study", help="run this study there instead of the tests")
    options = parser.parse_args()
    folder = options.folder / (options.framework + "-lowest" * options.lowest)
    binary = str(folder / "bin" / "python")
    uv = [sys.executable, "-m", "uv"]
    extra, beside = EXTRAS[options.framework]
    wanted = [f"{ROOT}[{extra}]", *beside, *TESTERS, *(lowest(extra) if options.lowest else [])]
    for command in (
        [*uv, "venv", "--quiet", "--clear", "--python", sys.executable, str(folder)],
        [*uv, "pip", "install", "--quiet", "--python", binary, *wanted],
    ):
        done = subprocess.run(command, cwd=ROOT, check=False)
        if done.returncode:
            return done.returncode
    tests = [
        "pytest", "-q", "-p", "no:cacheprovider",
        # What frameworks warn of is theirs to mend.
        "-W", "default", f"tests/frameworks/test_{options.framework}.py",
    ]  # fmt: skip
    study = ["leakatlas", "bench", options.study]
    return subprocess.run(
        [binary, "-m", *(study if options.study else tests)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"},
        check=False,
    ).returncode


if __name__ == "__main__":
    sys.exit(main())
