"""The generated documents."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

from leakatlas import catalogue
from leakatlas.catalogue import pages

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def generate() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate", ROOT / "scripts" / "generate.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_no_generated_file_is_stale(generate: ModuleType) -> None:
    assert generate.stale(ROOT) == [], "run: python scripts/generate.py"


def test_generating_writes_what_checking_accepts(generate: ModuleType, tmp_path: Path) -> None:
    earlier = f"a\n{pages.BEGIN}\nwritten earlier\n{pages.END}\nz\n"
    (tmp_path / "README.md").write_text(earlier, encoding="utf-8")
    assert generate.write(tmp_path) > 60
    assert generate.stale(tmp_path) == []
    assert generate.write(tmp_path) == 0
    readme = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert readme.startswith("a\n") and readme.endswith("\nz\n") and "written earlier" not in readme
    assert "(docs/attacks/dlg.md)" in readme
    page = tmp_path / "docs" / "attacks" / "dlg.md"
    page.write_text("edited by hand", encoding="utf-8")
    (tmp_path / "docs" / "attacks" / "ghost.md").write_text("no row", encoding="utf-8")
    assert generate.stale(tmp_path) == ["docs/attacks/dlg.md", "docs/attacks/ghost.md"]
    assert generate.write(tmp_path) == 2
    assert not (tmp_path / "docs" / "attacks" / "ghost.md").exists()


def test_the_check_leaves_with_1_and_names_the_files(
    generate: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(generate, "ROOT", tmp_path)
    monkeypatch.setattr(sys, "argv", ["generate.py", "--check"])
    assert generate.main() == 1
    assert "stale: docs/tables.md" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["generate.py"])
    assert generate.main() == 0
    monkeypatch.setattr(sys, "argv", ["generate.py", "--check"])
    assert generate.main() == 0


def test_every_row_has_a_page_and_links_lead_somewhere() -> None:
    files = pages.generated(ROOT)
    for row in catalogue.attacks():
        assert f"docs/attacks/{row.key}.md" in files
        assert f"(attacks/{row.key}.md)" in files["docs/tables.md"]
    for letter in "ABCDEFGH":
        for line in files[f"docs/threat-models/{letter}.md"].splitlines():
            if line.startswith("- ["):
                target = line.partition("](../")[2].rstrip(")")
                assert f"docs/{target}" in files


@pytest.mark.parametrize(
    ("docstring", "markdown"),
    [
        ("Plain.", "Plain."),
        ("A :math:`x^2` of ``f`` in :func:`~a.b.c`.", "A $x^2$ of `f` in `c`."),
        (
            ".. math:: a = b\n    + c\n\nText.",
            "```math\na = b\n+ c\n```\n\nText.",
        ),
        (
            ".. math::\n\n    a = b\n\nText.",
            "```math\na = b\n```\n\nText.",
        ),
        ("Tree::\n\n    a\n      b\n\nEnd.", "Tree:\n\n```text\na\n  b\n```\n\nEnd."),
    ],
)
def test_docstrings_become_markdown(docstring: str, markdown: str) -> None:
    assert pages.to_markdown(docstring) == markdown
