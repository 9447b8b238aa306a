"""Write the generated documents, or check that they are up to date.

Usage: ``python scripts/generate.py [--check]``. Generated are the rows' pages, the threat models'
pages and the tables under ``docs/``, the JSON Schemas of the rows, of study files and of an audit's
YAML, the page of its keys, the page and the thresholds of lint, and the tables in README.md if it
has the markers. With ``--check`` nothing is written and stale files are named (exit code 1).
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from leakatlas.audit import keys
from leakatlas.bench import schema
from leakatlas.catalogue import pages, results
from leakatlas.site import lint_page

ROOT = Path(__file__).resolve().parent.parent
STUDY_SCHEMA = "src/leakatlas/bench/study.schema.json"
FOLDERS = ("docs/attacks", "docs/defenses", "docs/threat-models")


def generated(root: Path) -> dict[str, str]:
    """Every generated file, by its path, and its text."""
    study_schema = json.dumps(schema.json_schema(), indent=1, ensure_ascii=False) + "\n"
    measured = results.load(root / "results")
    audit_schema = json.dumps(keys.json_schema(), indent=1, ensure_ascii=False) + "\n"
    return {
        **pages.generated(root),
        **lint_page.generated(measured),
        STUDY_SCHEMA: study_schema,
        f"src/leakatlas/audit/{keys.SCHEMA_FILE}": audit_schema,
        keys.PAGE: keys.page(),
    }


def stale(root: Path) -> list[str]:
    """Generated files that are missing, differ, or belong to no row any more."""
    wanted = generated(root)
    different = [
        name
        for name, text in wanted.items()
        if not (root / name).is_file() or (root / name).read_text(encoding="utf-8") != text
    ]
    return different + orphans(root, wanted)


def orphans(root: Path, wanted: dict[str, str]) -> list[str]:
    """Pages in the generated folders that no row stands behind."""
    found = (path for folder in FOLDERS for path in (root / folder).glob("*.md"))
    names = (path.relative_to(root).as_posix() for path in found)
    return sorted(name for name in names if name not in wanted)


def write(root: Path) -> int:
    """Write what differs and remove orphans; the number of files touched."""
    wanted = generated(root)
    touched = stale(root)
    for name in touched:
        path = root / name
        if name in wanted:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(wanted[name], encoding="utf-8")
        else:
            path.unlink()
    return len(touched)


def main() -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description="Write or check the generated documents.")
    parser.add_argument("--check", action="store_true", help="write nothing; name stale files")
    if parser.parse_args().check:
        names = stale(ROOT)
        for name in names:
            sys.stdout.write(f"stale: {name}\n")
        if names:
            sys.stdout.write("run: python scripts/generate.py\n")
        return 1 if names else 0
    sys.stdout.write(f"{write(ROOT)} files written\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
