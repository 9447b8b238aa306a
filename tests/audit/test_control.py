"""The other-batch control: what an attack would have drawn anyway is not the update's."""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import ClassVar, cast

import pytest
import torch
from torch import Tensor, nn

from leakatlas.attacks.api import Attack, Reconstruction, attack
from leakatlas.attacks.optimization.basic.inverting_gradients import InvertingGradients
from leakatlas.audit import Plan, Watch, control
from leakatlas.audit.jobs import Job, run_job
from leakatlas.audit.listener import Silent
from leakatlas.audit.ready import Readied
from leakatlas.audit.schedule import Pace
from leakatlas.blocks import readout
from leakatlas.cli.progress import disowned
from leakatlas.data import ImageSet
from leakatlas.fl import View
from leakatlas.report import Report, Run
from leakatlas.threat import Knowledge


@dataclass(frozen=True, kw_only=True)
class Learned(Attack):
    """Learns offline, as generators do; here it learns nothing."""

    def prepare(
        self, surrogate: ImageSet, model: nn.Module, *, generator: torch.Generator, watch: Watch
    ) -> dict[str, Tensor]:
        return {}


@attack("remembers", needs=Knowledge.UPDATES)
@dataclass(frozen=True, kw_only=True)
class Remembers(Learned):
    """Gives the same fine picture whatever it is shown."""

    picture: ClassVar[Tensor]

    def run(self, view: View, *, generator: torch.Generator, watch: Watch) -> Reconstruction:
        return Reconstruction(images=self.picture.clone())


@attack("reads", needs=Knowledge.UPDATES)
@dataclass(frozen=True, kw_only=True)
class Reads(Learned):
    """Reads the image off the update, not quite exactly."""

    shown: ClassVar[list[str]] = []

    def run(self, view: View, *, generator: torch.Generator, watch: Watch) -> Reconstruction:
        self.shown.append(view.fingerprint())
        g = view.update.tensors
        x = readout.combined_ratio(g["hidden.1.weight"], g["hidden.1.bias"])
        return Reconstruction(images=(x + 0.02).reshape(view.batch_shape))


def tried(plan: Plan, attack: Attack, **changes: object) -> Run:
    setting = replace(plan.settings[0], **changes)  # type: ignore[arg-type]  # fields of a setting
    job = Job(setting, attack, "D", 0)
    return run_job(job, plan, None, None, Silent(), Watch())


@pytest.fixture(autouse=True)
def picture(monkeypatch: pytest.MonkeyPatch, small_plan: Plan) -> None:
    victim = small_plan.settings[0].victims.images
    noise = 0.03 * torch.randn(victim.shape, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(Remembers, "picture", victim + noise, raising=False)
    monkeypatch.setattr(Reads, "shown", [])


def test_a_picture_that_comes_from_any_batch_is_the_priors(small_plan: Plan) -> None:
    run = tried(small_plan, Remembers())
    assert run.scores is not None and run.scores.psnr.mean > 25
    assert (run.verdict, run.status, run.reason) == (
        "not demonstrated", "complete", control.PRIOR,
    )  # fmt: skip
    assert run.scores.best_baseline == control.BASELINE


def test_a_picture_that_is_read_off_the_update_stays_recognisable(small_plan: Plan) -> None:
    run = tried(small_plan, Reads())
    assert (run.verdict, run.reason) == ("recognisable", "")
    assert len(set(Reads.shown)) == 2  # the victim's update, and that of another batch
    assert run.scores is not None and control.BASELINE in run.scores.baselines


def test_without_a_picture_nothing_is_run_twice(
    small_plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Remembers, "picture", torch.zeros(1, 3, 32, 32))
    run = tried(small_plan, Remembers())
    assert (run.verdict, run.reason) == ("not demonstrated", "")
    assert run.scores is not None and control.BASELINE not in run.scores.baselines


def test_a_control_that_cannot_be_run_is_said(
    small_plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(control, "strangers", lambda shape, n: small_plan.settings[0].public)
    run = tried(small_plan, Remembers())
    assert run.verdict == "recognisable"
    assert run.reason.startswith("the control could not be run: ")
    assert "takes 1 photos of strangers, and 0 are left" in run.reason


def test_decoys_are_strangers_to_both_sides_under_the_victims_labels(small_plan: Plan) -> None:
    setting = small_plan.settings[0]
    found = control.decoys(setting.victims, setting.public)
    assert torch.equal(found.labels, setting.victims.labels)
    assert found.shape == setting.victims.shape and found.classes == setting.victims.classes
    for part in (setting.victims, setting.public):
        assert not any(torch.equal(x, y) for x in found.images for y in part.images)


def test_the_control_is_paid_from_the_allowance() -> None:
    assert control.part(InvertingGradients()) == 1.0 and control.part(Reads()) == 0.5
    plain = Readied(InvertingGradients(), Pace(0.0, 0.01), None)
    assert plain.lasting(10.0).length == 850

    @dataclass(frozen=True, kw_only=True)
    class Generates(InvertingGradients):
        def prepare(
            self, surrogate: ImageSet, model: nn.Module, *, generator: torch.Generator, watch: Watch
        ) -> dict[str, Tensor]:
            return {}

    assert Readied(Generates(), Pace(0.0, 0.01), None).lasting(10.0).length == 425


def test_the_terminal_says_it(small_plan: Plan) -> None:
    run = tried(small_plan, Remembers())
    (line,) = disowned(cast(Report, SimpleNamespace(runs=(run, run))))
    assert line.startswith("remembers under D on ")
    assert line.endswith(": the prior, not the update.")
