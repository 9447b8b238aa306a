"""The guide, followed to the letter: every file on a page is written, every snippet is run.

A block whose first line is ``# name`` is a file. Other Python is executed, page by page in one
namespace; every ``leakatlas`` line of a ``bash`` block is run in the page's folder and must end
with code 0, or with the one that its comment names (``# exit 1``).
"""

from __future__ import annotations

import json
import re
import shlex
import sys
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from leakatlas.blocks.watch import MORE_TIME
from leakatlas.cli import app
from leakatlas.site.guide import GUIDE

ROOT = Path(__file__).resolve().parents[2]
PAGES = ROOT / "docs" / "guide"
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.DOTALL | re.MULTILINE)
NAMED = re.compile(r"# ([\w./-]+\.\w+)\n")
EXIT = re.compile(r"\s+# exit (\d)$")
LEAKATLAS = "leakatlas "
ELSEWHERE = ("pip install leakatlas",)
"""What a machine without LeakAtlas needs first, and this one has."""


def commands(text: str) -> list[tuple[list[str], int]]:
    """The commands of a block with the exit codes that they must end with."""
    found = []
    for line in text.splitlines():
        end = EXIT.search(line)
        words = shlex.split(EXIT.sub("", line))
        assert words[0] == "leakatlas", f"only leakatlas is run, not {line!r}"
        found.append((words[1:], int(end[1]) if end else 0))
    return found


def run(words: list[str], code: int) -> None:
    done = CliRunner().invoke(app, words)
    # On a busy machine the clock may leave something undecided, and that is all that may differ.
    late = done.exit_code == 3 and MORE_TIME in " ".join(done.output.split())
    said = f"leakatlas {shlex.join(words)}\n{done.output[-3000:]}"
    assert done.exit_code == code or (code == 0 and late), said


@pytest.fixture
def folder(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to work in, from which Python imports."""
    del cache
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("name", GUIDE)
def test_a_page_works_as_it_is_written(name: str, folder: Path) -> None:
    before = set(sys.modules)
    namespace: dict[str, object] = {}
    for language, text in BLOCK.findall((PAGES / f"{name}.md").read_text(encoding="utf-8")):
        head = NAMED.match(text)
        if head:
            path = folder / head[1]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text[head.end() :], encoding="utf-8")
        elif language == "python":
            exec(compile(text, f"{name}.md", "exec"), namespace)
        elif language == "bash":
            for words, code in commands(text):
                run(words, code)
        else:
            raise AssertionError(f"{name}.md: nothing runs a block of {language}")
    for module in set(sys.modules) - before:  # the next page may write another my_model.py
        if Path(getattr(sys.modules[module], "__file__", None) or "/").is_relative_to(folder):
            del sys.modules[module]
    for workflow in folder.glob(".github/workflows/*.yml"):
        for step in yaml.safe_load(workflow.read_text())["jobs"]["audit"]["steps"]:
            if step.get("run", "").startswith(LEAKATLAS):
                for words, code in commands(step["run"]):
                    run(words, code)
            else:
                assert "run" not in step or step["run"] in ELSEWHERE


def test_every_page_of_the_folder_is_in_the_guide() -> None:
    assert {path.stem for path in PAGES.glob("*.md")} == set(GUIDE)
    index = (PAGES / "README.md").read_text(encoding="utf-8")
    assert all(f"({name}.md)" in index for name in GUIDE if name != "README")


def test_inline_commands_are_commands_with_these_options() -> None:
    """``leakatlas audit --budget 1h`` in a sentence: each names a command and its options."""
    for path in PAGES.glob("*.md"):
        prose = BLOCK.sub("", path.read_text(encoding="utf-8"))
        for said in re.findall(r"`leakatlas ([a-z][^`]*)`", prose):
            words = shlex.split(said)
            shown = CliRunner().invoke(app, [words[0], "--help"], env={"COLUMNS": "200"})
            assert shown.exit_code == 0, (path.name, said)
            for option in [word for word in words if word.startswith("--")]:
                assert option in shown.output, (path.name, said)


def test_verdicts_and_letters_of_the_guide_are_those_of_reports() -> None:
    from leakatlas.report import VERDICTS

    text = (PAGES / "reading-a-report.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ([a-z ]+) \|", text, flags=re.MULTILINE)
    assert set(rows) == set(VERDICTS)


def test_what_a_page_promises_of_json_is_so(folder: Path) -> None:
    run(["init", "small.yaml"], 0)
    schema = json.loads((folder / "audit.schema.json").read_text())
    assert "context" in schema["properties"]
