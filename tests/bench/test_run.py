"""What the record of a cell says: what its attack took, and how it ended."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from leakatlas.attacks.api import Reconstruction
from leakatlas.bench import run, scene
from leakatlas.bench.adversary import Here, Request
from leakatlas.bench.cells import Cell
from leakatlas.bench.record import FINAL
from leakatlas.bench.schema import Case
from leakatlas.errors import LeakAtlasError, NotGranted, Unavailable


class Counting(Here):
    """Each attack takes one second more than the one before."""

    attacks = 0

    def attack(self, request: Request) -> Reconstruction:
        self.attacks += 1
        return super().attack(request)

    def costs(self) -> Mapping[str, float]:
        return {"cpu_seconds": float(self.attacks)}


CASE = Case.model_validate({
    "model": {"builtin": "fc", "kwargs": {"in_channels": 1, "size": 8, "widths": [12]}},
    "victims": {"set": "digits", "first": 1100, "count": 200},
    "surrogate": {"set": "digits", "first": 700, "count": 60},
    "pixels": {"mean": [0.5], "std": [0.5]},
    "attack": {"key": "rgap"},
    "control": True,
    "measures": ["psnr", "cpu_seconds"],
})  # fmt: skip


def test_the_costs_are_those_of_the_attack_and_not_of_its_control() -> None:
    adversary = Counting()
    record = run.run_cell(Cell("here", "main", CASE, seed=0, batch=0), adversary)
    assert record.status == "complete", record.reason
    assert adversary.attacks == 2 and record.costs["cpu_seconds"] == 1.0


@pytest.mark.parametrize(("error", "final"), [(Unavailable, False), (NotGranted, True)])
@pytest.mark.parametrize("where", ["attack", "stage"])
def test_what_another_machine_may_have_is_no_refusal_for_good(
    error: type[LeakAtlasError], final: bool, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A defense whose extra is not installed: the cell is run again where it is."""

    def raising(*args: object, **kwargs: object) -> Reconstruction:
        raise error("needs an extra")

    if where == "attack":
        monkeypatch.setattr(Here, "attack", raising)
    else:
        monkeypatch.setattr(scene, "staged", raising)
    record = run.run_cell(Cell("here", "main", CASE, seed=0, batch=0), Here())
    assert (record.status in FINAL) == final
    assert record.reason == f"{error.__name__}: needs an extra"
