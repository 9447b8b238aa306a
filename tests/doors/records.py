"""What the catalogue and reports are read from, and words on the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from leakatlas.catalogue import citations, loader, results
from tests.doors import hostile
from tests.doors.hostile import as_json, damaged, tampered
from tests.doors.registry import command, door, one

ROWS = tuple(text.encode()[:4000].rsplit(b"\n[[", 1)[0] for text in loader.shipped_texts().values())
TOML = (
    "[[attack]]\nkey = [[[[[[1]]]]]]",
    "[[attack]]\n" * 50,
    "a = " + "[" * 3000,
    "x = 2001-99-99",
    "attack = 1",
    "[attack]\nkey = 1",
    'a."b".c = 1\na = 2',
    "a = " + "9" * 5000,
    'a="\\ud800"',
    '[[attack]]\nkey = "[/x]"',
    "[[attack]]\nyear = 1e400",
)


@door(
    one("added.toml", st.one_of(damaged(ROWS), st.sampled_from(TOML).map(str.encode))),
    share=0.5,
    examples=40,
)
def rows(folder: Path) -> object:
    """``leakatlas validate added.toml``."""
    return loader.check_files([folder / "added.toml"])


RESULTS = tuple(
    json.loads(path.read_text()) for path in sorted(results.default_folder().glob("*.json"))[:4]
)


@door(
    one(
        "dlg.json",
        st.one_of(
            tampered(RESULTS).map(as_json),
            damaged(tuple(map(as_json, RESULTS))),
        ),
    ),
    share=0.5,
    examples=50,
)
def result(folder: Path) -> object:
    """``leakatlas validate dlg.json``."""
    return results.read(folder / "dlg.json")


REPORT: Any = {
    "schema": "leakatlas/report/3",
    "runs": [
        {
            "attack": "dlg",
            "recipe": {
                "attack": {"key": "dlg"},
                "defenses": [{"key": "clipping"}],
                "model": {"name": "lenet"},
            },
            "status": "complete",
        }
    ],
}


@door(
    one(
        "report.json",
        st.one_of(
            tampered((REPORT,)).map(as_json),
            damaged((as_json(REPORT),)),
            st.sampled_from((b"[" * 100_000, b"\xff\xfe", b"", b"null")),
        ),
    ),
    examples=100,
)
def report(folder: Path) -> object:
    """``leakatlas cite report.json``."""
    return citations.used_in(folder / "report.json")


COMMANDS = ("show", "cite", "table", "list", "validate", "lint", "doctor", "audit", "export")
OPTIONS = (
    "--json",
    "--printed",
    "--threat-model",
    "--where",
    "--format",
    "--mean",
    "--limit",
    "--out",
    "--budget",
    "--batch",
    "--update",
    "--reference",
    "--other",
    "--search",
    "--fail-on",
    "--seed",
)


@door(
    one(
        "arguments",
        st.builds(
            lambda command, rest: "\n".join([command, *rest]).encode("utf-8", "replace"),
            st.sampled_from(COMMANDS),
            st.lists(
                st.one_of(
                    st.sampled_from(OPTIONS),
                    st.sampled_from(hostile.TEXTS[3:]),
                    st.text(max_size=5),
                ),
                min_size=1,
                max_size=4,
            ),
        ),
    ),
    examples=40,
)
def command_line(folder: Path) -> object:
    """A command with words that it does not expect."""
    first, *rest = (folder / "arguments").read_text("utf-8").split("\n")
    if first == "audit" and not any(word and not word.startswith("-") for word in rest):
        return None  # the bundled audit would run, for minutes
    if first == "audit":
        rest = ["absent.yaml", *rest]
    return command(first, *rest)
