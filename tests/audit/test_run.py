"""Whole audits, small: what they find, keep, resume and refuse."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import leakatlas
from leakatlas import data
from leakatlas.audit import Plan, Report, Run, Watch, carry_out
from leakatlas.audit.listener import Silent
from leakatlas.catalogue import registry
from leakatlas.errors import InvalidInput, InvalidParameter, UnknownName
from leakatlas.fl import FedAVG


class Counting(Silent):
    """Counts finished runs; may stop the audit after some of them."""

    def __init__(self, stop: Watch | None = None, after: int = 0) -> None:
        self.runs: list[Run] = []
        self.stop, self.after = stop, after

    def done(self, run: Run) -> None:
        self.runs.append(run)
        if self.stop is not None and len(self.runs) >= self.after:
            self.stop.stop()


def test_an_active_server_leaks_exactly_and_a_weak_eavesdropper_does_not(small_plan: Plan) -> None:
    report = carry_out(small_plan)
    verdicts = {v.letter: v.verdict for v in report.verdicts()}
    assert verdicts["G"] == "exact leak"
    assert verdicts["B"] == "label leak only"
    assert verdicts["A"] == "not tested"  # neither attack works on so little
    assert report.exceeds("exact > 0") and report.exceeds("P(psnr > 60 dB) > 0.5")
    assert report.complete
    by_attack = {run.attack: run for run in report.runs}
    assert by_attack["robbing_the_fed"].letter == "G"
    assert by_attack["inverting_gradients"].letter == "B"


def test_a_run_counts_for_every_letter_that_knows_at_least_as_much(small_plan: Plan) -> None:
    report = carry_out(replace(small_plan, letters=("B", "F", "G", "H")))
    runs = {v.letter: v.run for v in report.verdicts()}
    # F tampers but lacks surrogate data, so only the passive run is within its reach.
    assert report.runs[runs["F"] or 0].attack == report.runs[runs["B"] or 0].attack
    assert runs["H"] == runs["G"]


def test_recipes_repeat_the_result(small_plan: Plan) -> None:
    first, second = carry_out(small_plan), carry_out(small_plan)
    for one, two in zip(first.runs, second.runs, strict=True):
        assert one.recipe == two.recipe
        assert one.scores == two.scores


def test_a_stopped_audit_keeps_its_runs_and_resumes(small_plan: Plan, tmp_path: Path) -> None:
    stop = Watch()
    first = Counting(stop, after=1)
    partial = carry_out(small_plan, out=tmp_path, listener=first, stop=stop)
    assert not partial.complete and len(first.runs) == 1
    assert json.loads((tmp_path / "report.json").read_text())["complete"] is False
    again = Counting()
    whole = carry_out(small_plan, out=tmp_path, listener=again)
    assert whole.complete
    kept = first.runs[0]
    resumed = next(run for run in whole.runs if run.attack == kept.attack)
    # The run that ended before the stop is not made again: its clock reading is the same.
    if list((tmp_path / "runs").glob("*.json")):
        assert resumed.scores is not None
    third = carry_out(small_plan, out=tmp_path)
    assert [r.seconds for r in third.runs] == [r.seconds for r in whole.runs]


def test_another_seed_or_model_is_not_mistaken_for_a_kept_run(
    small_plan: Plan, tmp_path: Path
) -> None:
    carry_out(small_plan, out=tmp_path)
    before = len(list((tmp_path / "runs").glob("*.json")))
    carry_out(replace(small_plan, seed=1), out=tmp_path)
    setting = small_plan.settings[0]
    with torch.no_grad():
        next(setting.model.parameters()).mul_(1.5)
    carry_out(small_plan, out=tmp_path)
    assert len(list((tmp_path / "runs").glob("*.json"))) == 3 * before


def test_alternatives_are_compared_with_equal_effort(small_plan: Plan) -> None:
    defenses = {"clipping": (registry.defense("clipping", max_norm=0.01),)}
    # Time enough for the price in accuracy, whatever else the machine does.
    report = carry_out(replace(small_plan, alternatives=defenses, seconds=3_600.0))
    names = [comparison.name for comparison in report.comparisons]
    assert names == ["as configured", "clipping"]
    # A positive factor on the update does not hide what a ratio of its entries reveals.
    assert any(run.verdict == "exact leak" for run in report.comparisons[1].runs)
    assert all(c.accuracy is not None for c in report.comparisons)


def test_the_python_entry_takes_ten_lines(small_model: nn.Module, tmp_path: Path) -> None:
    photos = data.photos(32).subset([1, 2])
    report = leakatlas.audit(
        small_model,
        (photos.images, photos.labels),
        protocol=FedAVG(epochs=1, batch_size=2, lr=0.01),
        threat="A-C",
        budget="paper",
        attacks=["inverting_gradients"],
        attack_parameters={"inverting_gradients": {"steps": 3}},
    )
    page = report.save(tmp_path / "report")
    assert page.read_text().startswith("<!doctype html>")
    assert [v.letter for v in report.verdicts()] == ["A", "B", "C"]
    assert report.runs[0].letter == "C"  # a delta can be replayed only with training details


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"threat": "A-Z"}, UnknownName, "Unknown threat model 'Z'"),
        ({"attacks": ["dlgg"]}, UnknownName, "Did you mean 'dlg'"),
        ({"budget": "soon"}, InvalidParameter, "write '30s'"),
        ({"attack_parameters": {"inverting_gradients": {"step": 3}}}, InvalidParameter, "no param"),
        ({"attack_parameters": {"inverting_gradients": {"steps": 0}}}, InvalidParameter, "steps=0"),
        ({"clients": 5}, InvalidInput, "cannot be dealt to 5 clients"),
    ],
)
def test_bad_requests_are_refused_before_compute(
    small_model: nn.Module,
    changes: Mapping[str, object],
    error: type[Exception],
    message: str,
) -> None:
    photos = data.photos(32).subset([0])
    arguments = {"attacks": ["inverting_gradients"], **changes}
    with pytest.raises(error, match=message):
        leakatlas.audit(small_model, photos, **arguments)  # type: ignore[arg-type]  # on purpose


def test_labels_outside_the_head_are_refused(small_model: nn.Module) -> None:
    images = data.photos(32).images[:1]
    with pytest.raises(InvalidInput, match=r"Label 8 is out of range for a model with 8 classes"):
        leakatlas.audit(small_model, (images, torch.tensor([8])))


def test_images_that_do_not_fit_are_refused(small_model: nn.Module) -> None:
    with pytest.raises(InvalidInput, match=r"expected \(N, C, H, W\)"):
        leakatlas.audit(small_model, (torch.zeros(2, 2, 3, 32, 32), torch.tensor([0])))
    with pytest.raises(InvalidInput, match="cannot read inputs of shape"):
        leakatlas.audit(small_model, (torch.zeros(1, 3, 16, 16), torch.tensor([0])))


def test_train_mode_batchnorm_with_one_example_is_refused() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 4), nn.BatchNorm1d(4))
    photos = data.photos(32).subset([0])
    with pytest.raises(InvalidInput, match=r"BatchNorm1d '2' in train mode"):
        leakatlas.audit(model, photos, protocol=FedAVG(mode="train"))


def test_an_unwritable_folder_is_refused_before_compute(small_plan: Plan, tmp_path: Path) -> None:
    blocker = tmp_path / "file"
    blocker.write_text("not a folder")
    listener = Counting()
    with pytest.raises(InvalidInput, match="Nothing was computed yet"):
        carry_out(small_plan, out=blocker, listener=listener)
    assert not listener.runs


def test_the_report_is_a_value(small_plan: Plan) -> None:
    report = carry_out(small_plan)
    assert isinstance(report, Report)
    plain = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert plain["schema"] == "leakatlas/report/3"
    for run in plain["runs"]:
        restored = Run.from_json(run)
        assert restored.to_json() == run


def test_a_defense_is_judged_against_whoever_knows_it(small_plan: Plan) -> None:
    defenses = {"clipping": (registry.defense("clipping", max_norm=0.01),)}
    report = carry_out(replace(small_plan, letters=("B", "C", "G"), alternatives=defenses))
    letters = {run.attack: run.letter for run in report.comparisons[1].runs}
    assert letters == {"inverting_gradients": "C", "robbing_the_fed": "G"}
    passive = next(r for r in report.comparisons[1].runs if r.attack == "inverting_gradients")
    assert "defenses" in passive.reads


class StopsWithin(Silent):
    """Stops the audit as soon as a run of one attack has begun."""

    def __init__(self, stop: Watch, attack: str) -> None:
        self.stop, self.attack = stop, attack

    def run(self, name: str, fraction: float, note: str = "") -> None:
        if self.attack in name:
            self.stop.stop()


def test_a_run_stopped_in_the_middle_goes_on_from_its_checkpoint(
    small_plan: Plan, tmp_path: Path, cache: Path
) -> None:
    plan = replace(small_plan, seconds=None)  # by steps, not by time: the end is the same
    plan = replace(plan, attack_parameters={"inverting_gradients": {"steps": 60}})
    whole = {r.attack: r for r in carry_out(plan).runs}["inverting_gradients"]
    stop = Watch()
    carry_out(plan, out=tmp_path, listener=StopsWithin(stop, "inverting_gradients"), stop=stop)
    assert len(list((cache / "progress").glob("*/*/*.pt"))) == 1
    resumed = {r.attack: r for r in carry_out(plan, out=tmp_path).runs}["inverting_gradients"]
    assert resumed.scores == whole.scores
    assert resumed.execution == "eager"
    assert not list((cache / "progress").glob("*"))
