"""Check only what was touched: style, types, rows, pages, and the tests that belong to it.

``python scripts/touched.py [--base BRANCH]`` looks at the files that differ from where BRANCH
(``main``) was left, committed or not. The whole gate is ``scripts/check.py``.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

from leakatlas.catalogue import registry, results

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
CATALOGUE = ("tests/catalogue", "tests/cli/test_catalogue.py", "tests/site/test_build.py")


def changed(base: str) -> list[Path]:
    """Files that differ from the common ancestor with ``base``, new ones included."""
    fork = _git("merge-base", base, "HEAD") or [base]
    names = [*_git("diff", "--name-only", "--diff-filter=d", fork[0])]
    names += _git("ls-files", "--others", "--exclude-standard")
    return sorted({Path(name) for name in names})


def _git(*arguments: str) -> list[str]:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


def tests_of(path: Path) -> set[str]:
    """The tests that belong to one changed file."""
    parts = path.parts
    if parts[0] == "tests":
        if path.name.startswith("test_"):
            return {str(path)}
        return {str(path.parent)} if path.suffix == ".py" and len(parts) > 2 else set()
    if parts[:3] == ("src", "leakatlas", "catalogue") or parts[0] in ("docs", "results"):
        return set(CATALOGUE)
    if parts[:2] == ("src", "leakatlas") and path.suffix == ".py":
        beside = results.test_beside(ROOT / path)
        if beside.is_file():
            return {beside.relative_to(ROOT).as_posix()}
        return {beside.parent.relative_to(ROOT).as_posix()} if beside.parent.is_dir() else set()
    if parts[0] == "studies":
        return {"tests/bench"}
    return set()


def contracts(paths: list[Path]) -> list[list[str]]:
    """Arguments of pytest for the contracts of the touched attacks and defenses."""
    found = []
    kinds: tuple[registry.Kind, ...] = ("attack", "defense")
    for kind in kinds:
        keys = [
            place.rpartition("/")[2]
            for place, module in registry.modules(kind).items()
            if {module, results.test_beside(module)} & {ROOT / path for path in paths}
        ]
        if keys:
            found.append([f"tests/{kind}s/test_contract.py", "-k", " or ".join(keys)])
    return found


def commands(paths: list[Path]) -> list[list[str]]:
    """What is run, in order."""
    python = [str(path) for path in paths if path.suffix == ".py"]
    found = []
    if python:
        found += [[str(BIN / "ruff"), "check", *python]]
        found += [[str(BIN / "ruff"), "format", "--check", *python]]
    found += [[str(BIN / "leakatlas"), "validate"]]
    found += [[sys.executable, "scripts/generate.py", "--check"]]
    if python:
        found += [[str(BIN / "lint-imports")], [str(BIN / "mypy")]]
    pytest = [str(BIN / "pytest"), "-q", "-x"]
    tests = sorted({test for path in paths for test in tests_of(path)})
    found += [[*pytest, *tests]] if tests else []
    return found + [[*pytest, *arguments] for arguments in contracts(paths)]


def main() -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description="Check only what was touched.")
    parser.add_argument("--base", default="main", help="the branch that yours left (main)")
    paths = changed(parser.parse_args().base)
    if not paths:
        print("nothing was touched")
        return 0
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PATH": f"{BIN}:{os.environ['PATH']}"}
    begun = time.perf_counter()
    for command in commands(paths):
        print(f"== {Path(command[0]).name} {' '.join(command[1:])}", flush=True)
        code = subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode
        if code:
            print(f"== exit {code} after {time.perf_counter() - begun:.0f} s", flush=True)
            return code
    print(f"== {len(paths)} touched files are fine, {time.perf_counter() - begun:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
