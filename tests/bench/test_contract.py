"""What every study in ``studies/`` promises: it is sound, and its smallest case can be played."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from leakatlas.attacks.api import Attack, Reconstruction, attack
from leakatlas.bench import differential, run, runner, scene
from leakatlas.bench import study as studies
from leakatlas.bench.adversary import Here
from leakatlas.bench.cells import Cell, cells_of
from leakatlas.bench.measures import BINS
from leakatlas.bench.schema import Images, OwnMeasure
from leakatlas.bench.study import Study
from leakatlas.blocks.watch import Watch
from leakatlas.catalogue import registry
from leakatlas.fl import View
from leakatlas.threat import Knowledge

FOUND = studies.find()


@attack("dummy", needs=Knowledge.UPDATES)
@dataclass(frozen=True, kw_only=True)
class Dummy(Attack):
    """Finds a black image for every example, whatever it was shown."""

    def run(self, view: View, *, generator: torch.Generator, watch: Watch) -> Reconstruction:
        return Reconstruction(images=torch.zeros(view.batch_shape))


MOST_LINES = 850
"""Of Python beside all study files together."""

MOST_LINES_A_ROW = 21
"""Of our side of the comparisons with official code, which grows with the rows that have any."""


def lines_of(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


def test_studies_are_data() -> None:
    """What two studies need belongs in the bench; what the schema can say, into study.yaml."""
    folder = studies.default_folder()
    comparisons = folder / differential.FILE
    total = sum(lines_of(path) for path in folder.rglob("*.py") if path != comparisons)
    assert 0 < total <= MOST_LINES, f"{total} lines; see leakatlas.bench.looks, labelling, utility"
    rows = len(differential.ours())
    assert 0 < lines_of(comparisons) <= rows * MOST_LINES_A_ROW


@pytest.mark.parametrize("path", FOUND.values(), ids=FOUND.keys())
def test_it_is_sound(path: Path) -> None:
    study, problems = studies.check(path)
    assert study is not None, "\n".join(map(str, problems))
    assert study.cases


def test_the_smoke_study_takes_every_implemented_row() -> None:
    cases = studies.load("smoke").cases.values()
    played = {case.attack.key for case in cases if case.attack is not None}
    played |= {str(defense["key"]) for case in cases for defense in case.defenses}
    every = {*registry.attack_keys(), *registry.defense_keys()}
    missing = {key for key in every - played if "/" not in key}
    assert not missing, f"add a tiny case to studies/smoke/study.yaml for: {sorted(missing)}"


def smallest(study: Study) -> Cell | None:
    """The cell whose client computes least; None where no attack is run at all."""
    cells = [cell for cell in cells_of(study) if cell.case.attack is not None]
    return min(
        cells, key=lambda cell: cell.case.batch * cell.case.clients * cell.case.rounds, default=None
    )


def at_hand(cell: Cell) -> Cell:
    """The cell on bundled crops in place of files that may not be here, without own measures.

    At most two clients with two images each: the whole gate plays every study.
    """

    def stand_in(images: Images | None, part: str) -> Images | None:
        if images is None or images.set.partition(":")[0] not in ("parquet", "folder"):
            return images
        size = images.size or int(cell.case.model.kwargs.get("size", 32))
        if cell.case.model.kwargs.get("in_channels") == 1:
            return Images(set=f"digits:{size}", first=64 * (part == "surrogate"), count=64)
        return Images(set=f"patches:{size}:64:{part}")

    said = (m for m in cell.case.measures if not isinstance(m, OwnMeasure))
    plain = tuple(m for m in said if m not in BINS) or ("psnr",)  # the dummy has no bins
    case = cell.case.model_copy(
        update={
            "victims": stand_in(cell.case.victims, "victim"),
            "surrogate": stand_in(cell.case.surrogate, "surrogate"),
            "measures": plain,
            "choose": "in order",
            "label": None,
            "control": False,
            "batch": min(cell.case.batch, 2),
            "clients": min(cell.case.clients, 2),
            "target": 0,
            "model": cell.case.model.model_copy(update={"train": None}),
        }
    )
    return replace(cell, case=case, batch=0, hook=None, data=runner.data_folder())


@pytest.mark.parametrize("path", FOUND.values(), ids=FOUND.keys())
def test_its_smallest_case_is_played_and_scored(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cell = smallest(studies.load(path))
    if cell is None:  # it measures by itself
        study = studies.load(path)
        instead = [case.labelling or case.utility for case in study.cases.values()]
        assert study.hook is not None or all(instead)
        return
    scene.attack_of(cell.case)  # its own attack, preset and parameters exist
    monkeypatch.setattr(scene, "attack_of", lambda case: Dummy())
    record = run.run_cell(at_hand(cell), Here())
    assert record.status == "complete", record.reason
    assert record.scores is not None and record.process == "shared"
