from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch

from leakatlas.attacks.analytic.sparsification.robbing_the_fed import RobbingTheFed
from leakatlas.attacks.api import (
    ActiveAttack,
    Attack,
    Reconstruction,
    TamperedModel,
    Tampering,
    attack,
)
from leakatlas.attacks.optimization.basic.inverting_gradients import InvertingGradients
from leakatlas.bench import harness
from leakatlas.blocks.watch import Watch
from leakatlas.errors import InvalidInput, NotGranted, ProtocolError, Unavailable
from leakatlas.fl import FedAVG, View, load_into, model_state, state_hash
from leakatlas.metrics import Scores, score
from leakatlas.params import NonNegativeInt, PositiveInt
from leakatlas.report import VERDICTS, verdict
from leakatlas.threat import Knowledge, Vantage
from tests.conftest import build_stage, photos, surrogate

PASSIVE = Knowledge.UPDATES | Knowledge.BASIC
ACTIVE = PASSIVE | Knowledge.MANIPULATION


@attack("grey", needs=PASSIVE)
@dataclass(frozen=True, kw_only=True)
class Grey(Attack):
    """Guesses the middle of the pixel range, once for each example."""

    def run(self, view: View, *, generator: torch.Generator, watch: Watch) -> Reconstruction:
        middle = torch.full(view.batch_shape, 0.5, dtype=torch.float64)
        return Reconstruction(images=view.box.normalize(middle), notes={"rounds": len(view.rounds)})


@attack("meddler", needs=ACTIVE)
@dataclass(frozen=True, kw_only=True)
class Meddler(ActiveAttack):
    """Scales the model's weights for some rounds and notes by how much."""

    rounds: NonNegativeInt = 2
    sybils: NonNegativeInt = 0
    alone: bool = False
    heard: ClassVar[list[tuple[int, list[str]]]] = []

    def tamper(self, view: View, *, generator: torch.Generator, watch: Watch) -> Tampering | None:
        self.heard.append((len(view.rounds), sorted(view.key)))
        if len(view.rounds) >= self.rounds:
            return None
        factor = torch.rand(1, generator=generator, dtype=torch.float64) + torch.rand(1)
        model = view.model
        changed = load_into(model, {n: t * factor for n, t in model_state(model).items()})
        cohort = (view.target,) if self.alone else None
        return Tampering(
            sent=TamperedModel.of(changed),
            key={f"factor{len(view.rounds)}": factor},
            cohort=cohort,
            sybils=self.sybils,
        )

    def run(self, view: View, *, generator: torch.Generator, watch: Watch) -> Reconstruction:
        return Reconstruction(images=torch.zeros(view.batch_shape), notes={"n": view.num_examples})


@attack("insatiable", needs=ACTIVE)
@dataclass(frozen=True, kw_only=True)
class Insatiable(ActiveAttack):
    """Never has enough."""

    steps: PositiveInt = 1

    def tamper(self, view: View, *, generator: torch.Generator, watch: Watch) -> Tampering | None:
        return Tampering(sent=TamperedModel(), key={})

    def run(self, view: View, *, generator: torch.Generator, watch: Watch) -> Reconstruction:
        raise AssertionError("never reached")


def test_a_trial_brings_candidates_back_to_pixels_beside_the_truth() -> None:
    trial = harness.run_trial(build_stage(examples=3), Grey())
    assert torch.allclose(trial.images, torch.full_like(trial.images, 0.5))
    assert torch.equal(trial.truth.images, photos(3).images)
    assert trial.truth.labels.tolist() == [0, 1, 2]
    assert trial.found.recipe is not None
    assert trial.found.recipe.scenario == build_stage(examples=3).scenario.to_json()


def test_a_passive_adversary_watches_honest_training() -> None:
    stage = build_stage(protocol=FedAVG(lr=0.1), clients=2, rounds=3)
    start = state_hash(model_state(stage.federation.model))
    trial = harness.run_trial(stage, Grey(), target=1)
    assert [r.index for r in trial.records] == [0, 1, 2]
    assert trial.found.notes == {"rounds": 3}
    hashes = [trial.view.update_at(i).state_hash for i in range(3)]
    assert hashes[0] == start and len(set(hashes)) == 3
    # The last round is seen, not applied: the attack meets the model that it was computed at.
    assert state_hash(model_state(stage.federation.model)) == hashes[-1]
    assert torch.equal(trial.truth.images, photos(4).images[2:])


@pytest.mark.parametrize(
    ("vantage", "pooled"),
    [
        (Vantage.AGGREGATE, True),
        (Vantage.SERVER, False),
        (Vantage.WIRE, False),
        (Vantage.PEER, False),
    ],
)
def test_at_the_aggregate_every_client_is_the_target(vantage: Vantage, pooled: bool) -> None:
    trial = harness.run_trial(build_stage(clients=2, vantage=vantage), Grey(), target=1)
    assert len(trial.truth.images) == (4 if pooled else 2)
    expected = photos(4).images if pooled else photos(4).images[2:]
    assert torch.equal(trial.truth.images, expected)


def test_an_active_adversary_tampers_round_after_round_and_keeps_its_keys() -> None:
    Meddler.heard.clear()
    stage = build_stage(letter="F")
    honest = state_hash(model_state(stage.federation.model))
    trial = harness.run_trial(stage, Meddler(rounds=2))
    assert Meddler.heard == [(0, []), (1, ["factor0"]), (2, ["factor1"])]
    assert len(trial.records) == 2 and len(trial.view.rounds) == 2
    assert [sorted(seen.key) for seen in trial.view.rounds] == [["factor0"], ["factor1"]]
    received = [state_hash(trial.view.model_at(i).state_dict()) for i in range(2)]
    assert honest not in received
    assert received == [trial.view.update_at(i).state_hash for i in range(2)]
    assert state_hash(model_state(stage.federation.model)) == honest


def test_tampering_repeats_itself_with_its_seed_and_leaves_the_global_generator() -> None:
    def factors(seed: int) -> list[float]:
        torch.rand(3)
        before = torch.get_rng_state()
        trial = harness.run_trial(build_stage(letter="F"), Meddler(), seed=seed)
        assert torch.equal(before, torch.get_rng_state())
        return [float(t) for seen in trial.view.rounds for t in seen.key.values()]

    first = factors(0)
    assert first == factors(0) != factors(1) and first[0] != first[1]


@pytest.mark.parametrize("letter", "ABCDE")
def test_a_passive_letter_cannot_tamper(letter: str) -> None:
    stage = build_stage(letter=letter)
    with pytest.raises(
        NotGranted, match=f"Meddler needs .*MANIPULATION, which threat model {letter}"
    ):
        harness.run_trial(stage, Meddler())
    assert stage.federation.rounds_played == 0


@pytest.mark.parametrize("letter", "FG")
@pytest.mark.parametrize("how", [{"sybils": 1}, {"alone": True}])
def test_choosing_the_cohort_takes_selection(letter: str, how: dict[str, int]) -> None:
    stage = build_stage(letter=letter, clients=2)
    with pytest.raises(NotGranted, match=r"chooses the cohort, which .* may not; it takes H"):
        harness.run_trial(stage, Meddler(**how))  # type: ignore[arg-type]  # parametrised
    assert stage.federation.rounds_played == 0


def test_letter_h_adds_devices_and_isolates_its_target() -> None:
    stage = build_stage(letter="H", clients=3, vantage=Vantage.AGGREGATE)
    trial = harness.run_trial(stage, Meddler(rounds=1, sybils=2, alone=True), target=1)
    (record,) = trial.records
    assert record.cohort == (1, harness.SYBIL_IDS, harness.SYBIL_IDS + 1)
    assert record.sybils == {harness.SYBIL_IDS, harness.SYBIL_IDS + 1}
    assert record.aggregate.clients == 3
    assert torch.equal(trial.truth.images, photos(6).images[2:4])


def test_an_attack_that_never_stops_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "MOST_ROUNDS", 3)
    stage = build_stage(letter="F", examples=1)
    with pytest.raises(ProtocolError, match="insatiable asked for more than 3 rounds"):
        harness.run_trial(stage, Insatiable())
    assert stage.federation.rounds_played == 3


def test_the_watch_reaches_the_attack() -> None:
    @attack("slow", needs=PASSIVE)
    @dataclass(frozen=True, kw_only=True)
    class Slow(Attack):
        def run(self, view: View, *, generator: torch.Generator, watch: Watch) -> Reconstruction:
            steps = sum(1 for _ in watch.steps(10**9))
            return Reconstruction(images=torch.zeros(view.batch_shape), notes={"steps": steps})

    trial = harness.run_trial(build_stage(), Slow(), watch=Watch(0.01))
    assert trial.found.status == "cut short" and trial.found.notes["steps"] < 10**9


# -- the null baseline that reads another batch's update -------------------------------------------


def scored(trial: harness.Trial, other: torch.Tensor | None = None) -> Scores:
    return score(
        trial.images,
        trial.truth.images,
        public=surrogate().images,
        resamples=20,
        baselines=None if other is None else {"other_batch": other},
    )


@pytest.mark.parametrize(
    "attack",
    [RobbingTheFed(bins=16), InvertingGradients.tuned(steps=30)],
    ids=lambda a: str(a.key),
)
def test_10_the_control_never_yields_an_exact_leak_of_the_victims_batch(attack: Attack) -> None:
    pictures = photos(6)
    real, decoy = (
        build_stage(
            letter="G",
            victims=replace(pictures.subset(part), labels=torch.tensor([0, 1, 2])),
            public=surrogate(),
        )
        for part in ((0, 1, 2), (3, 4, 5))
    )
    direct = harness.run_trial(real, attack, seed=3)
    control = harness.control_trial(real, decoy, attack, seed=3)
    assert torch.equal(control.truth.images, direct.truth.images)
    if isinstance(attack, RobbingTheFed):  # so the control could have been exact
        assert verdict(scored(direct)) == VERDICTS[-1] == "exact leak"
        own = replace(control, truth=decoy.truth())
        assert verdict(scored(own)) == "exact leak"  # it did read its own batch
    assert verdict(scored(control)) != "exact leak"
    found = scored(direct, control.images)
    assert found.baselines["other_batch"].psnr == pytest.approx(scored(control).psnr.mean)


def test_a_control_must_be_another_batch_of_the_same_kind() -> None:
    real = build_stage(examples=2)
    pictures = photos(4)

    def control(indices: list[int], labels: list[int]) -> None:
        victims = replace(pictures.subset(indices), labels=torch.tensor(labels))
        harness.control_trial(real, build_stage(victims=victims), Grey())

    control([2, 3], [0, 1])
    with pytest.raises(InvalidInput, match="holds an image of the real one"):
        control([3, 0], [0, 1])
    with pytest.raises(InvalidInput, match=r"must have the labels \[0, 1\], got \[1, 0\]"):
        control([2, 3], [1, 0])
    with pytest.raises(InvalidInput, match="decoy batch of shape"):
        control([2], [0])


def test_a_round_that_would_outlast_the_budget_is_not_begun(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stage = build_stage(letter="G", public=surrogate())
    monkeypatch.setattr(harness, "_COSTS", {((), 1): 1.0})  # a second for every parameter
    with pytest.raises(Unavailable, match="are left; give it more time"):
        harness.observe(stage, Meddler(), watch=Watch(20.0))
    _, records = harness.observe(stage, Meddler(), watch=Watch())  # without a budget it is
    assert len(records) == 2
    size = sum(p.numel() for p in stage.federation.model.parameters())
    learnt = harness._COSTS[(), 1]
    assert 0 < learnt < 1.0
    monkeypatch.setattr(harness, "_COSTS", {((), 1): 0.9 * harness.LONG_ROUND / size})
    assert len(harness.observe(stage, Meddler(), watch=Watch(0.01))[1]) == 2  # mere overhead
