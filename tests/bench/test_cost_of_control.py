"""What a cell says that its attack took, where a control runs after it."""

from __future__ import annotations

from collections.abc import Mapping

from leakatlas.attacks.api import Reconstruction
from leakatlas.bench import run
from leakatlas.bench.adversary import Here, Request
from leakatlas.bench.cells import Cell
from leakatlas.bench.schema import Case


class Counting(Here):
    """Each attack takes one second more than the one before."""

    attacks = 0

    def attack(self, request: Request) -> Reconstruction:
        self.attacks += 1
        return super().attack(request)

    def costs(self) -> Mapping[str, float]:
        return {"cpu_seconds": float(self.attacks)}


def test_the_costs_are_those_of_the_attack_and_not_of_its_control() -> None:
    case = Case.model_validate({
        "model": {"builtin": "fc", "kwargs": {"in_channels": 1, "size": 8, "widths": [12]}},
        "victims": {"set": "digits", "first": 1100, "count": 200},
        "surrogate": {"set": "digits", "first": 700, "count": 60},
        "pixels": {"mean": [0.5], "std": [0.5]},
        "attack": {"key": "rgap"},
        "control": True,
        "measures": ["psnr", "cpu_seconds"],
    })  # fmt: skip
    adversary = Counting()
    record = run.run_cell(Cell("here", "main", case, seed=0, batch=0), adversary)
    assert record.status == "complete", record.reason
    assert adversary.attacks == 2 and record.costs["cpu_seconds"] == 1.0
