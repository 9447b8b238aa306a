"""CONTRIBUTING.md, followed to the letter in a copy of this checkout.

The guide adds an attack, a defense, their references and a study, all made up. Nothing else may
have to change: the catalogue's, the command line's and the site's checks, and the contracts, run
on the copy as they are.
"""

from __future__ import annotations

import importlib
import inspect
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from leakatlas.fl import Defense

ROOT = Path(__file__).resolve().parents[1]
GUIDE = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.DOTALL | re.MULTILINE)
FILES = re.compile(r"# ([\w./-]+)\n")
COPIED = (
    "src", "tests", "docs", "examples", "scripts", "results", "studies",
    "README.md", "CONTRIBUTING.md", "CHANGELOG.md", "pyproject.toml",
)  # fmt: skip
KEYS = "lantern or dimmer"
SHIPPED = """#:schema ../catalogue.schema.json

[[defense]]
key = "shipped_dimmer"
name = "ShippedDimmer"
origin = "deployed"
ships_in = "A Framework 1.0: framework.mods.ShippedDimmer"
superseded_by = "dimmer"
category = "heuristic"
technique = "perturbation"
year = 2026
where = "client"
hooks = ["update"]
intuition = "A framework ships it."
weakness = "Nobody wrote a paper about it."
planned = true
"""
"""A deployed defense without a paper: the kind of row that the guide only describes."""


ROOMS = (
    "", "leakatlas.", "leakatlas.attacks.", "leakatlas.blocks.", "leakatlas.bench.harness.",
    "leakatlas.catalogue.", "leakatlas.fl.", "tests.conftest.", "tests.defenses.heuristic.probes.",
)  # fmt: skip
"""Where a short name of the guide may live."""
LIKELY = {"view": "leakatlas.fl.View"}
"""What the guide calls an instance of."""


def files_of_the_guide() -> dict[str, str]:
    """Every block that begins with a path, by that path."""
    found = {}
    for _, text in BLOCK.findall(GUIDE):
        head = FILES.match(text)
        if head:
            found[head[1]] = text[head.end() :]
    return found


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of this checkout in which the guide was followed."""
    root = tmp_path_factory.mktemp("checkout")
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, root / name, ignore=shutil.ignore_patterns("__pycache__"))
        elif source.is_file():
            shutil.copy(source, root / name)
    for name, text in files_of_the_guide().items():
        path = root / name
        assert not path.exists(), f"{name} exists; the guide must make its files up"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    (root / "src/leakatlas/catalogue/added/shipped_dimmer.toml").write_text(SHIPPED)
    for language, text in BLOCK.findall(GUIDE):
        if language == "bash":
            run(root, "bash", "-c", text)
    run(root, sys.executable, "scripts/generate.py")
    return root


def run(root: Path, *command: str) -> str:
    """What a command prints in the copy; it must succeed."""
    environment = {**os.environ, "PYTHONPATH": str(root / "src"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=root, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    return done.stdout


def passes(root: Path, *arguments: str) -> str:
    return run(root, sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments)


def test_the_guide_adds_every_kind_of_file() -> None:
    rooms = {name.split("/")[0] for name in files_of_the_guide()}
    assert rooms == {"src", "tests", "studies"}


def named(name: str) -> object | None:
    """What a name of the guide stands for, if anything."""
    first, _, rest = name.partition(".")
    whole = ".".join(filter(None, (LIKELY.get(first, first), rest)))
    for room in ROOMS:
        parts = (room + whole).split(".")
        for length in range(len(parts), 0, -1):
            try:
                found: object = importlib.import_module(".".join(parts[:length]))
                for attribute in parts[length:]:
                    found = getattr(found, attribute)
            except (ImportError, AttributeError):
                continue
            return found
    return None


def test_every_name_that_the_guide_offers_exists_and_takes_what_it_says() -> None:
    offered = GUIDE.partition("## What is there already")[2].partition("\n## ")[0]
    names = re.findall(r"`(\w[\w.]*)(?:\(([^`]*)\))?`", offered)
    assert len(names) > 25
    for name, arguments in names:
        found = named(name)
        assert found is not None, name
        told = [part.strip() for part in arguments.split(",") if part.strip() not in ("", "...")]
        assert not told or set(told) <= set(inspect.signature(found).parameters), name  # type: ignore[arg-type]  # a function, since the guide calls it


def test_every_command_file_and_hook_that_the_guide_names_exists() -> None:
    words = set(re.findall(r"`([^`\n]+)`", BLOCK.sub("", GUIDE)))
    targets = {w.removeprefix("make ") for w in words if w.startswith("make ")}
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert targets >= {"test", "touched", "generate"}
    assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in targets), targets
    made_up = files_of_the_guide()
    for path in (w for w in words if re.fullmatch(r"(docs|tests|src|scripts)/[\w./-]+", w)):
        assert path in made_up or (ROOT / path).exists(), path
    hooks = next(w for w in words if w.startswith("setup, "))
    assert all(callable(getattr(Defense, hook)) for hook in hooks.split(", "))


def test_rows_modules_and_results_have_no_problems(copy: Path) -> None:
    assert "0 problems" in run(copy, sys.executable, "-m", "leakatlas", "validate")


def test_the_files_are_in_the_house_style(copy: Path) -> None:
    python = [name for name in files_of_the_guide() if name.endswith(".py")]
    ruff = str(Path(sys.executable).parent / "ruff")
    run(copy, ruff, "check", *python)
    run(copy, ruff, "format", "--check", *python)


def test_the_tests_of_the_catalogue_the_command_line_and_the_site_pass(copy: Path) -> None:
    passes(copy, "tests/catalogue", "tests/cli/test_catalogue.py", "tests/site/test_build.py")


def test_the_tables_work_in_a_browser(copy: Path) -> None:
    words = "filters or address or deep or search or screen_reader or without_script or switches"
    passes(copy, "tests/site/test_browser.py", "-k", words)


def test_their_own_tests_and_the_contracts_pass(copy: Path) -> None:
    own = [name for name in files_of_the_guide() if "/test_" in name]
    passes(copy, *own)
    said = passes(copy, "tests/attacks/test_contract.py", "tests/defenses/test_contract.py",
                 "-k", KEYS)  # fmt: skip
    assert " passed" in said


def test_the_study_runs_and_its_figures_and_picture_are_shown(copy: Path, tmp_path: Path) -> None:
    cli = (sys.executable, "-m", "leakatlas")
    played = tmp_path / "results"
    run(
        copy,
        "env",
        f"LEAKATLAS_CACHE={tmp_path}",
        *cli,
        "bench",
        "lantern",
        "--results",
        str(played),
    )
    assert (played / "lantern.json").is_file()
    assert "0 problems" in run(copy, *cli, "validate", str(played / "lantern.json"))
    run(copy, *cli, "site", "build", str(tmp_path / "site"), "--results", str(played))
    page = (tmp_path / "site" / "attacks" / "lantern.html").read_text(encoding="utf-8")
    assert "2 victims above, what Lantern made of each below" in page
    assert "psnr" in page and "leakatlas bench lantern" in page


def test_the_rows_are_shown_as_added(copy: Path) -> None:
    cli = (sys.executable, "-m", "leakatlas")
    assert "@inproceedings{doe2026lantern," in run(copy, *cli, "cite", "lantern")
    table = run(copy, *cli, "table", "attacks")
    assert "Doe et al. (2026) [doe2026lantern] ‡" in table and "‡ added by LeakAtlas" in table
    assert "doe2026lantern" not in run(copy, *cli, "table", "attacks", "--mode", "printed")
    page = (copy / "docs/defenses/dimmer.md").read_text(encoding="utf-8")
    assert "Added by LeakAtlas" in page and "| Printed |" not in page
    page = (copy / "docs/defenses/shipped_dimmer.md").read_text(encoding="utf-8")
    assert "ships in A Framework 1.0" in page and "Superseded by [Dimmer](dimmer.md)" in page
    assert "no paper; ships in A Framework 1.0" in run(copy, *cli, "cite", "shipped_dimmer")
    assert "ShippedDimmer ‡" in run(copy, *cli, "table", "defenses")
    assert "A Framework 1.0" in run(copy, *cli, "show", "ShippedDimmer")
