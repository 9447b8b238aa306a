"""Doctor and audit ask one function; what it lets start is never refused afterwards."""

from __future__ import annotations

import inspect
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import leakatlas
from leakatlas import data, models
from leakatlas.audit import Plan, Setting, Watch, carry_out, examine, presets
from leakatlas.audit import start as asking
from leakatlas.audit.jobs import Job, run_job
from leakatlas.audit.listener import Silent
from leakatlas.audit.start import Adversaries, can_start
from leakatlas.blocks.watch import MORE_TIME
from leakatlas.catalogue import registry
from leakatlas.data import Box
from leakatlas.fl import FedAVG, FedSGD, ModelRef, Protocol, Stage, View, unrolled
from leakatlas.threat import LETTERS, Vantage

FC = ModelRef("builtin", "fc", {"in_channels": 3, "size": 32, "classes": 8, "widths": [16]})
CONV = ModelRef("builtin", "convnet", {"in_channels": 3, "size": 32, "classes": 8, "width": 4})


def setting(reference: ModelRef, protocol: Protocol, **changes: object) -> Setting:
    return Setting(
        name="s",
        model=reference.build(),
        model_ref=reference,
        victims=data.photos(32).subset([0, 1]),
        protocol=protocol,
        box=Box.unit(3),
        **changes,  # type: ignore[arg-type]  # by name
    )


SETTINGS = {
    "linear, gradients": setting(FC, FedSGD()),
    "convolutions, local steps": setting(
        CONV, FedAVG(epochs=1, batch_size=1, lr=0.01, mode="train")
    ),
    "behind an aggregate": setting(FC, FedSGD(), clients=2, vantage=Vantage.AGGREGATE),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_what_may_start_is_not_refused_afterwards(name: str) -> None:
    few = data.patches(32, 16, part="surrogate")
    chosen = replace(SETTINGS[name], surrogate=few)
    plan = Plan(settings=(chosen,), letters=tuple(LETTERS), seconds=1.0, rehearsal=False)
    started = 0
    stage = chosen.stage(letter="A", seed=0)
    adversaries = Adversaries(stage, stage.federation.play_round())
    for attack in presets(None, {}, published=False):
        start = can_start(adversaries, attack, plan.letters)
        if start.obstacle is not None:
            assert start.obstacle in ("refused", "not applicable") and start.outlook.reason
            continue
        started += 1
        job = Job(chosen, attack, start.letter, 0)
        run = run_job(job, plan, 1e-9, None, Silent(), Watch())
        assert run.tried, (attack.key, run.status, run.reason)
    assert started >= 5


def test_doctor_and_audit_agree_attack_by_attack() -> None:
    chosen = SETTINGS["linear, gradients"]
    found = leakatlas.doctor(chosen.model, chosen.victims, threat="A-C")
    stop = Watch()
    stop.stop()  # after the question, before the answer
    report = carry_out(Plan(settings=(chosen,), letters=("A", "B", "C")), stop=stop)
    left_out = {run.attack: run.status for run in report.runs}
    assert left_out == {
        key: start.obstacle for key, start in found.outlooks.items() if start.obstacle
    }
    assert {start.word for start in found.outlooks.values()} >= {"refused", "not applicable"}


def test_a_letter_that_theory_rules_out_does_not_hide_a_stronger_one() -> None:
    """Trap weights tune their scale on public images: hopeless under F, at hand under G."""
    from leakatlas.attacks.analytic.sparsification.trap_weights import TrapWeights

    stage = SETTINGS["linear, gradients"].stage(letter="F", seed=0)
    tuned = TrapWeights(scaling=None)
    assert can_start(Adversaries(stage), tuned, ("F",)).word == "not applicable"
    assert can_start(Adversaries(stage), tuned, ("F", "G")).letter == "G"


def test_the_refusal_is_that_of_the_letter_that_lacks_least() -> None:
    from leakatlas.attacks.analytic.isolation.sybils import Sybils

    stage = SETTINGS["linear, gradients"].stage(letter="A", seed=0)
    start = can_start(Adversaries(stage), Sybils(), ("A", "B", "G"))
    assert start.obstacle == "refused" and start.letter == ""
    assert "needs SELECTION, which threat model G" in start.outlook.reason


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 28, 28), (3, 20, 32), (4, 8, 8)])
def test_everybody_has_some_public_images(shape: tuple[int, int, int]) -> None:
    victims = data.ImageSet(torch.rand(2, *shape), torch.zeros(2, dtype=torch.int64), ("a",), "own")
    public = data.strangers(victims, 16)
    assert public.shape == shape and 4 <= len(public) <= 16
    assert float(public.images.min()) >= 0 and float(public.images.max()) <= 1
    assert public.images.flatten(1).std(1).max() > 0.05


def test_a_victim_among_the_strangers_is_left_out() -> None:
    every = data.strangers(data.photos(32))
    victims = every.subset([0, 5])
    chosen = replace(SETTINGS["linear, gradients"], victims=victims)
    assert len(chosen.public) >= len(every) - 2
    held = {image.numpy().tobytes() for image in chosen.public.images}
    assert not held & {image.numpy().tobytes() for image in victims.images}


def test_grey_victims_meet_grey_strangers() -> None:
    digits = data.digits().subset([0])
    model = models.build("fc", in_channels=1, size=8, classes=10, widths=[8])
    report = leakatlas.audit(model, digits, threat="G", attacks=["robbing_the_fed"], budget="paper")
    assert report.runs[0].verdict == "exact leak"
    assert report.facts["settings"][0]["strangers"] is True
    assert torch.equal(digits.images, data.digits().subset([0]).images)


def test_a_replay_beyond_the_memory_is_refused_and_the_others_go_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    chosen = setting(FC, FedAVG(epochs=2, batch_size=1, lr=0.01))
    chosen = replace(chosen, attacks=("inverting_gradients", "april", "mkor"))
    monkeypatch.setattr(unrolled, "graph_bytes", lambda model, shape: 2**50)
    attacks = presets(chosen.attacks, {}, published=False)
    stage = chosen.stage(letter="C", seed=0)
    found = examine(stage, attacks, letters=("C",)).outlooks
    start = found["inverting_gradients"]
    assert start.obstacle == "refused" and start.wants == unrolled.WAY_OUT
    assert re.search(r"4 local steps needs 4\.5 PB .*4 graphs of a step", start.outlook.reason)
    assert all("local steps needs" not in found[key].outlook.reason for key in ("april", "mkor"))
    (refused,) = [r for r in carry_out(Plan(settings=(chosen,), letters=("C",), seconds=600.0)).runs
                  if r.attack == "inverting_gradients"]  # fmt: skip
    assert refused.status == "refused" and "this machine has" in refused.reason


def test_attacks_that_say_so_replay_the_client() -> None:
    """The doctor asks these; others are refused when they start."""
    replaying = {
        key
        for key in registry.attack_keys()
        if "view.replayer(" in Path(inspect.getfile(registry.load_attack(key))).read_text("utf-8")
    }
    said = {attack.key for attack in presets(None, {}, published=False) if attack.replays}
    assert {"dlg", "inverting_gradients", "gias"} <= said <= replaying


def test_attacks_are_asked_one_after_the_other_about_the_same_views(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What one of them read is not held against the next, and nobody's answer hangs on the others'.

    A view of a large model takes seconds: there is one a letter, before a round and after it.
    """
    stage = SETTINGS["linear, gradients"].stage(letter="A", seed=0)
    record = stage.federation.play_round()
    attacks = presets(None, {}, published=False)
    alone = [can_start(Adversaries(stage, record), attack, tuple(LETTERS)) for attack in attacks]
    made: list[str] = []
    view = Stage.view

    def counted(self: Stage, *args: Any, **kwargs: Any) -> View:
        made.append(self.scenario.letter)
        return view(self, *args, **kwargs)

    monkeypatch.setattr(Stage, "view", counted)
    adversaries = Adversaries(stage, record)
    together = [can_start(adversaries, attack, tuple(LETTERS)) for attack in reversed(attacks)]
    assert together[::-1] == alone
    assert len(made) <= 2 * len(LETTERS) < len(attacks)
    assert adversaries.view("C", passive=True).reads == frozenset()


def test_of_a_large_network_few_views_are_held_and_the_answers_are_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stage = SETTINGS["linear, gradients"].stage(letter="A", seed=0)
    record = stage.federation.play_round()
    attacks = presets(None, {}, published=False)
    small, large = Adversaries(stage, record), Adversaries(stage, record)
    expected = [can_start(small, attack, tuple(LETTERS)) for attack in attacks]
    monkeypatch.setattr(asking, "is_large", lambda model: True)
    assert [can_start(large, attack, tuple(LETTERS)) for attack in attacks] == expected
    assert len(large._views) <= asking.MOST < len(small._views)


def test_an_examination_ends_with_its_time() -> None:
    stage = SETTINGS["linear, gradients"].stage(letter="A", seed=0)
    found = examine(
        stage, presets(None, {}, published=False), letters=tuple(LETTERS), watch=Watch(0.0)
    )
    assert found.replay.consistent and not found.measures and "budget" in found.left_out
    for start in found.outlooks.values():
        assert start.obstacle == "refused" and start.wants == MORE_TIME
