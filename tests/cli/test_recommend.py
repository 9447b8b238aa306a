"""``leakatlas recommend``: the table, the sentence under it, and the exit code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import cast

import pytest
import yaml
from typer.testing import CliRunner, Result

from leakatlas.audit.recommend import Advice, Recommendation
from leakatlas.audit.utility import Utility
from leakatlas.cli import app
from leakatlas.cli.recommend import _words
from leakatlas.report import Report

CONFIG = {
    "model": {
        "builtin": "fc",
        "kwargs": {"in_channels": 1, "size": 8, "classes": 10, "widths": [32]},
    },
    "data": {"victims": "digits", "limit": 1},
    "attacks": ["rgap"],
    "threat": "B",
    "budget": "paper",
}


def asked(folder: Path, monkeypatch: pytest.MonkeyPatch, keys: list[str], *options: str) -> Result:
    monkeypatch.setattr("leakatlas.audit.recommend.price_of", lambda *_, **__: Utility(0.9))
    monkeypatch.setattr("leakatlas.audit.recommend.registry.defense_keys", lambda: tuple(keys))
    file = folder / "audit.yaml"
    file.write_text(yaml.safe_dump(CONFIG), encoding="utf-8")
    return CliRunner().invoke(app, ["recommend", str(file), "--out", str(folder / "out"), *options])


def test_what_keeps_the_condition_is_named_with_its_price(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = asked(tmp_path, monkeypatch, ["client_dp", "fedkl"], "--fail-on", "exact > 0")
    assert done.exit_code == 0, done.output
    words = " ".join(done.output.split())
    assert "is the cheapest that keeps every condition: it costs 0.0 points" in words
    assert "before you rely on it" in words and "fedkl was not tried" in words
    assert (tmp_path / "out" / "report.html").is_file()


def test_what_keeps_it_at_an_unknown_price_is_counted() -> None:
    """It was passed over in silence, and the first price that was measured called the cheapest."""
    kept = [
        Advice("pruned", (), "keeps", accuracy=0.8, points=2.0),
        Advice("noised", (), "keeps"),
        Advice("masked", (), "keeps"),
    ]
    found = Recommendation(
        ("exact > 0",), Advice("as it is", (), "breaks"), tuple(kept), {}, cast("Report", None)
    )
    assert _words(found).startswith(
        "pruned is the cheapest that keeps every condition (2 more keep them, at a price that was "
        "not measured): it costs 2.0 points"
    )


def test_nothing_that_keeps_it_is_exit_1(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = asked(tmp_path, monkeypatch, ["clipping"], "--fail-on", "exact > 0", "--json")
    assert done.exit_code == 1, done.output
    found = json.loads(done.stdout)
    assert [advice["finding"] for advice in found["advice"]] == ["breaks"]


def test_where_nothing_was_tried_to_its_end_nothing_is_claimed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It said that no defense that was tried keeps the conditions."""
    keys = ["clipping", "client_dp"]
    done = asked(tmp_path, monkeypatch, keys, "--fail-on", "exact > 0", "--budget", "0.01s")
    assert done.exit_code == 3, done.output
    words = " ".join(done.output.split())
    assert "No defense was tried to its end, so nothing is decided; a longer --budget" in words


def test_a_file_without_an_aim_is_bad_input(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = asked(tmp_path, monkeypatch, ["clipping"])
    assert done.exit_code == 2
    assert "give fail_on" in done.output


def test_a_price_without_alternatives_is_a_key_without_effect(tmp_path: Path) -> None:
    file = tmp_path / "audit.yaml"
    file.write_text(yaml.safe_dump({**CONFIG, "utility": "own"}), encoding="utf-8")
    done = CliRunner().invoke(app, ["audit", str(file), "--out", str(tmp_path / "out")])
    assert done.exit_code == 2 and "give alternatives" in " ".join(done.output.split())
