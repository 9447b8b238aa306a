"""How good the best iterate was after which time: kept with a record, drawn as a curve."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from leakatlas.bench import runner
from leakatlas.bench import study as studies
from leakatlas.bench.adversary import Adversary, Here
from leakatlas.bench.record import Record
from leakatlas.bench.run import run_cell
from leakatlas.bench.runner import Options
from leakatlas.bench.spawned import Spawned
from leakatlas.bench.store import Store
from leakatlas.catalogue import results
from leakatlas.site import measured_page

FILE = {
    "schema": "leakatlas/study/1",
    "title": "Curves",
    "question": "Is the way kept?",
    "chosen": "nothing",
    "setup": {
        "model": {"builtin": "lenet", "kwargs": {"width": 4, "size": 8, "classes": 10}},
        "victims": "patches:8:16",
        "attack": {"key": "inverting_gradients", "parameters": {"steps": 100, "restarts": 2}},
        "measures": ["psnr", "cpu_seconds"],
        "control": True,
        "batch": 2,
        "seeds": [0, 1],
        "beside": {"attack": "inverting_gradients"},
    },
    "axes": {"attack.parameters.steps": [100, 3]},
}


def options(folder: Path) -> Options:
    return Options(records=folder / "records", results=folder / "results")


def played(folder: Path, who: Adversary) -> list[Record]:
    home = folder / "curves"
    home.mkdir()
    (home / "study.yaml").write_text(yaml.safe_dump(FILE), encoding="utf-8")
    study = studies.load(home)
    found = [run_cell(cell, who) for cell in runner.standing(study, options(folder)).cells]
    for record in found:
        Store(folder / "records" / "curves").append(record)
    return found


@pytest.mark.parametrize("own", [False, True])
def test_milestones_end_with_what_came_out(tmp_path: Path, own: bool) -> None:
    who: Adversary = Spawned() if own else Here()
    long, _, short, _ = played(tmp_path, who)
    if isinstance(who, Spawned):
        who.close()
    assert long.status == "complete", long.reason
    # Reports after 25, 50, 75 and 100 iterations, then the result; no report in three.
    assert len(long.trace) == 5 and short.trace == ()
    seconds = [spent for spent, _ in long.trace]
    assert seconds == sorted(seconds) and seconds[0] > 0
    assert long.scores is not None
    psnr = [image["psnr"] for image in long.scores["images"]]
    assert long.trace[-1][1] == pytest.approx(sum(psnr) / len(psnr), abs=1e-6)
    assert Record.from_json(long.to_json()) == long


def test_the_curve_of_a_case_reaches_the_site(tmp_path: Path) -> None:
    first, second, *_ = played(tmp_path, Here())
    study = studies.load(tmp_path / "curves")
    assert runner.write(study, options(tmp_path)) is not None
    found, problems = results.read(tmp_path / "results" / "curves.json")
    assert not problems
    (result,) = found
    (held,) = result.recipe["curves"][""].values()
    assert held["seconds"] == sorted(held["seconds"])
    last = (first.trace[-1][1] + second.trace[-1][1]) / 2
    assert held["psnr"][-1] == pytest.approx(last)
    (drawn,) = measured_page.timed(found)
    ((case, chart),) = drawn["cases"]
    assert case == "" and "PSNR of the best iterate against time" in chart
