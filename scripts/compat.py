"""Do the stated ranges hold? The fast tests with the lowest allowed versions, on each Python.

``python scripts/compat.py`` makes one virtual environment for each combination outside of the
repository, with ``uv`` and ``--resolution lowest-direct`` (or the highest), runs the tests that
take seconds, and prints a table. ``--extra flower`` installs an extra in an environment of its own
instead, imports it beside LeakAtlas, and takes in what it hands over.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PYTHONS = ("3.11", "3.12", "3.13")
FAST = (
    "tests/test_errors.py", "tests/test_params.py", "tests/test_reading.py",
    "tests/test_yamlfiles.py", "tests/threat", "tests/data", "tests/models/test_registry.py",
    "tests/models/test_checkpoints.py", "tests/fl/test_update.py", "tests/fl/test_view.py",
    "tests/fl/test_state.py", "tests/fl/test_replay.py", "tests/catalogue/test_loader.py",
    "tests/metrics/test_images.py", "tests/blocks/test_matching.py", "tests/cli/test_lint.py",
    "tests/attacks/optimization/basic/test_dlg.py", "tests/report",
)  # fmt: skip
"""Tests that meet every dependency and take a minute or two."""

USES = {
    "flower": """
import flwr.common, torch, leakatlas, leakatlas.audit
from leakatlas.fl import Update
net = torch.nn.Linear(4, 3)
before = [t.numpy().copy() for t in net.state_dict().values()]
sent = flwr.common.ndarrays_to_parameters([a + 1 for a in before])
after = flwr.common.parameters_to_ndarrays(sent)
update = Update.from_arrays(before, after, net, num_examples=2)
assert update.kind == "delta" and torch.allclose(update.tensors["bias"], torch.ones(3))
print("flwr", flwr.__version__, "imported; its arrays are an update")
""",
}
"""What is tried with an extra: it hands over arrays as a client of it would."""

TESTERS = ("pytest>=8", "hypothesis>=6.100")


def run(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A command with its output kept."""
    return subprocess.run(
        command, cwd=ROOT, text=True, capture_output=True, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )  # fmt: skip


def interpreter(python: str) -> str:
    """The path of a Python of this version: on the PATH, or pyenv's."""
    found = sorted(Path.home().glob(f".pyenv/versions/{python}.*/bin/python3"))
    return str(found[-1]) if found else shutil.which(f"python{python}") or python


def install(folder: Path, python: str, resolution: str, *requirements: str) -> str:
    """A fresh environment with these requirements; what went wrong, or nothing."""
    uv = [sys.executable, "-m", "uv"]
    made = run(*uv, "venv", "--clear", "--python", interpreter(python), str(folder))
    if made.returncode:
        return made.stderr
    into = ("--python", str(folder / "bin" / "python"), "--resolution", resolution)
    done = run(*uv, "pip", "install", *into, *requirements)
    return done.stderr if done.returncode else ""


def tested(folder: Path, python: str, resolution: str) -> str:
    """One cell of the table: what the fast tests said."""
    # The project's own ranges decide; the tools that test it are as new as they come.
    problem = install(folder, python, resolution, f"{ROOT}")
    if problem:
        return "does not install: " + problem.strip().splitlines()[-1]
    binary = str(folder / "bin" / "python")
    run(sys.executable, "-m", "uv", "pip", "install", "--python", binary, *TESTERS)
    done = run(
        # What old versions say of newer ones below them is not ours to mend.
        binary, "-m", "pytest", "-q", "-W", "ignore::DeprecationWarning", "-p", "no:cacheprovider",
        *FAST,
        PYTHONPATH=str(ROOT / "src"),
    )  # fmt: skip
    lines = done.stdout.strip().splitlines() or done.stderr.strip().splitlines()
    if done.returncode:
        print(done.stdout[-4000:], done.stderr[-2000:], file=sys.stderr)
    return lines[-1] if lines else f"exit {done.returncode}"


def used(folder: Path, python: str, extra: str) -> tuple[bool, str]:
    """Whether an extra installs and can be used beside LeakAtlas, and what was said."""
    problem = install(folder, python, "highest", f"{ROOT}[{extra}]")
    if problem:
        return False, "does not install: " + problem.strip().splitlines()[-1]
    script = USES.get(extra, "import leakatlas.audit; print('installs')")
    done = run(str(folder / "bin" / "python"), "-c", script, PYTHONPATH="")
    said = (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines()
    return done.returncode == 0, said[-1] if said else f"exit {done.returncode}"


def main() -> int:
    """Test every combination, or one extra."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "compat")
    parser.add_argument("--python", action="append", help="such as 3.12; all if left out")
    parser.add_argument("--resolution", action="append", help="lowest-direct or highest")
    parser.add_argument("--extra", help="install this extra and import it")
    options = parser.parse_args()
    failed = False
    for python in options.python or PYTHONS:
        if options.extra:
            folder = options.folder / f"{options.extra}-{python}"
            fine, said = used(folder, python, options.extra)
            failed |= not fine
            print(f"{python} {options.extra}: {said}", flush=True)
            continue
        for resolution in options.resolution or ("lowest-direct", "highest"):
            said = tested(options.folder / f"{resolution}-{python}", python, resolution)
            failed |= "passed" not in said or "failed" in said or "error" in said
            print(f"{python} {resolution}: {said}", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
