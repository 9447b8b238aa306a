from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from leakatlas.attacks.api import Reconstruction
from leakatlas.attacks.optimization.basic.inverting_gradients import InvertingGradients
from leakatlas.bench import harness
from leakatlas.blocks import descent
from leakatlas.blocks.watch import Step, Watch
from leakatlas.errors import InvalidParameter, NotGranted
from leakatlas.fl import FedAVG, FedSGD, Stage, View
from leakatlas.metrics import images as image_metrics
from leakatlas.threat import Grant, Knowledge
from tests.attacks.case import LENET, Case
from tests.conftest import build_stage, photos

CASE = Case({"steps": 3, "restarts": 2}, LENET, boxed=True)

LABELS = frozenset({Grant.LABELS})


def small(**changes: object) -> Stage:
    settings = {"examples": 1, "letter": "B", "grants": LABELS, "dtype": torch.float32}
    return build_stage(**{**settings, **changes})  # type: ignore[arg-type]  # a dict of settings


def psnr(trial: harness.Trial) -> float:
    return float(image_metrics.psnr(trial.images.clamp(0, 1), trial.truth.images).mean())


def mean_image_psnr(trial: harness.Trial) -> float:
    grey = torch.full_like(trial.truth.images, 0.5)
    return float(image_metrics.psnr(grey, trial.truth.images).mean())


def cosine_of(view: View, found: Reconstruction, *names: str) -> float:
    """The cosine distance of the replayed candidates, with torch's own formula."""
    chosen = names or tuple(view.update.tensors)
    replayed = view.replay(found.images, view.labels)
    a = torch.cat([replayed[name].detach().flatten() for name in chosen])
    b = torch.cat([view.update.tensors[name].flatten() for name in chosen])
    return 1 - float(torch.nn.functional.cosine_similarity(a, b, dim=0))


@pytest.mark.parametrize(
    "attack", [InvertingGradients.cifar(steps=200), InvertingGradients.tuned(steps=200)]
)
def test_one_small_image_comes_back(attack: InvertingGradients) -> None:
    trial = harness.run_trial(small(), attack)
    assert psnr(trial) > mean_image_psnr(trial) + 8
    assert trial.found.status == "complete"
    assert trial.found.notes["labels_granted"] == 1


def test_every_candidate_is_inside_the_box() -> None:
    stage = small()
    trial = harness.run_trial(stage, InvertingGradients(steps=5, lr=10.0))
    assert stage.box.contains(trial.found.images)


def test_the_default_is_the_published_setting() -> None:
    published = InvertingGradients()
    assert (published.steps, published.lr, published.tv_weight) == (4_800, 0.1, 0.1)
    assert (published.distance, published.optimizer, published.schedule) == (
        "cosine", "adam", "steps",
    )  # fmt: skip


def test_the_published_step_falls_tenfold_at_three_five_and_seven_eighths() -> None:
    rates: list[float] = []

    def seen(variables: Any, lr: Any, step: Step) -> None:
        rates.append(lr["x"])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(descent, "inside", lambda box, name: seen)
        InvertingGradients(steps=80)(harness.observe(small(), InvertingGradients())[0])
    falls = [i for i in range(1, 80) if rates[i] < 0.5 * rates[i - 1]]
    assert falls == [30, 50, 70]
    assert rates[0] == pytest.approx(0.1) and rates[-1] == pytest.approx(1e-4)


def test_tuned_is_the_preset_whose_figures_are_stored() -> None:
    """No one prior is best everywhere, so a change is known by its figures, not by one photo."""
    file = Path(__file__).parents[4] / "results" / "carried" / "inverting_gradients.json"
    measured = json.loads(file.read_text(encoding="utf-8"))["recipe"]["tuned"]
    own = InvertingGradients.tuned().to_json()
    assert {name: own[name] for name in measured} == measured


def test_tuned_keeps_within_400_iterations() -> None:
    assert InvertingGradients.tuned().steps <= 400


@pytest.mark.parametrize("examples", [1, 3])
def test_the_prior_can_grow_with_the_number_of_examples(examples: int) -> None:
    view, _ = harness.observe(small(examples=examples), InvertingGradients())
    grown = InvertingGradients(steps=5, tv_weight=0.01, tv_per_example=True)
    written_out = InvertingGradients(steps=5, tv_weight=0.01 * examples)
    assert torch.equal(grown(view).images, written_out(view).images)
    plain = InvertingGradients(steps=5, tv_weight=0.01)
    assert torch.equal(grown(view).images, plain(view).images) == (examples == 1)


def test_more_restarts_never_match_worse() -> None:
    attack = InvertingGradients.cifar(steps=15)
    stage = small()
    view, _ = harness.observe(stage, attack)
    one = attack(view, seed=3).notes["matching_loss"]
    three = replace(attack, restarts=3)(view, seed=3)
    assert three.notes["matching_loss"] <= one
    assert three.notes["restarts"] == 3


def test_restarts_are_ranked_without_the_prior() -> None:
    """With a crushing TV weight the flattest restart is not the best match."""
    stage = small()
    attack = InvertingGradients(steps=10, restarts=2, tv_weight=100.0)
    view, _ = harness.observe(stage, attack)
    found = attack(view)
    assert found.notes["matching_loss"] == pytest.approx(cosine_of(view, found), abs=1e-5)
    assert found.confidence is not None
    assert float(found.confidence[0]) == pytest.approx(-found.notes["matching_loss"])


def test_the_cosine_does_not_care_for_the_scale_of_the_update() -> None:
    stage = small(dtype=torch.float64)
    view, _ = harness.observe(stage, InvertingGradients())
    seen = view.rounds[-1]
    assert seen.update is not None
    louder = seen.update.with_tensors({n: 50 * t for n, t in seen.update.tensors.items()})
    scaled = view.with_rounds([replace(seen, update=louder)], {})
    plain = InvertingGradients(steps=20)
    torch.testing.assert_close(plain(scaled).images, plain(view).images, rtol=0, atol=1e-6)
    l2 = InvertingGradients(steps=20, distance="squared_l2")
    assert float((l2(scaled).images - l2(view).images).abs().max()) > 1e-2


def test_unsigned_gradient_of_the_wrong_label_cannot_match() -> None:
    """Ablation: with a wrong label the matching loss stays away from zero."""
    right = small()
    view, _ = harness.observe(right, InvertingGradients())
    attack = InvertingGradients.cifar(steps=150)
    fitted = attack(view).notes["matching_loss"]
    wrong = _with_labels(right, (view.labels + 1) % 10)
    assert attack(wrong).notes["matching_loss"] > 10 * fitted


def _with_labels(stage: Stage, labels: torch.Tensor) -> View:
    view, _ = harness.observe(stage, InvertingGradients())
    fields = {**view._fields, "labels": labels}
    return view._copy(fields)


def test_fedavg_through_the_replay() -> None:
    stage = small(
        protocol=FedAVG(epochs=2, batch_size=1, lr=0.05, mode="eval"), examples=2, letter="C"
    )
    trial = harness.run_trial(stage, InvertingGradients.tuned(steps=200))
    assert psnr(trial) > mean_image_psnr(trial) + 5
    assert "protocol" in trial.found.reads


def test_a_delta_without_the_protocol_is_refused() -> None:
    stage = small(protocol=FedAVG(epochs=2, batch_size=1, lr=0.05, mode="eval"), letter="B")
    with pytest.raises(NotGranted, match="TRAINING"):
        harness.run_trial(stage, InvertingGradients.tuned(steps=3))


def test_recovered_labels_of_one_and_of_several_examples() -> None:
    for examples in (1, 3):
        stage = small(grants=frozenset(), examples=examples)
        trial = harness.run_trial(stage, InvertingGradients(steps=2))
        assert trial.found.labels is not None
        assert trial.found.labels.shape == (examples,)
        assert trial.found.notes["labels_granted"] == 0
    single = harness.run_trial(small(grants=frozenset()), InvertingGradients(steps=2))
    assert single.found.labels is not None
    assert torch.equal(single.found.labels, single.truth.labels)


def test_labels_of_a_delta_follow_from_its_mean_gradient() -> None:
    protocol = FedAVG(epochs=1, batch_size=1, lr=0.05, mode="eval")
    stage = small(grants=frozenset(), protocol=protocol, letter="C", victims=photos(1))
    trial = harness.run_trial(stage, InvertingGradients(steps=2))
    assert trial.found.labels is not None
    assert torch.equal(trial.found.labels, trial.truth.labels)


def test_only_the_largest_tensors_are_matched() -> None:
    attack = InvertingGradients(steps=5, top=1)
    view, _ = harness.observe(small(), attack)
    found = attack(view)
    largest = max(view.update.tensors, key=lambda name: float(view.update.tensors[name].norm()))
    assert found.notes["matching_loss"] == pytest.approx(cosine_of(view, found, largest), abs=1e-5)
    assert found.notes["matching_loss"] != pytest.approx(cosine_of(view, found), abs=1e-4)


def test_a_zero_update_is_a_failure_that_says_so() -> None:
    stage = small()
    view, _ = harness.observe(stage, InvertingGradients())
    seen = view.rounds[-1]
    assert seen.update is not None
    silent = seen.update.with_tensors({n: 0 * t for n, t in seen.update.tensors.items()})
    found = InvertingGradients(steps=2)(view.with_rounds([replace(seen, update=silent)], {}))
    assert found.status == "failed"
    assert "zero" in found.reason
    assert found.images.shape == (0, 3, 8, 8)


def test_the_budget_is_respected_and_reported() -> None:
    watch = Watch(0.3)
    trial = harness.run_trial(small(), InvertingGradients(steps=10**6), watch=watch)
    # As many as fit are planned; on a machine where almost none do, the run is cut.
    assert trial.found.status in ("complete", "cut short")
    assert trial.found.notes["iterations"] < 10**6
    assert trial.found.notes["iterations_asked"] == 10**6
    assert trial.found.images.shape == (1, 3, 8, 8)


def test_what_it_reads_fits_its_letter() -> None:
    trial = harness.run_trial(small(grants=frozenset()), InvertingGradients(steps=2))
    assert trial.found.reads <= {"rounds", "num_examples", "input_shape", "classes", "box"}
    assert InvertingGradients.needs == Knowledge.UPDATES | Knowledge.BASIC
    with pytest.raises(NotGranted, match="BASIC"):
        harness.run_trial(small(letter="A"), InvertingGradients(steps=2))


def test_invalid_settings_are_named() -> None:
    with pytest.raises(InvalidParameter, match="lr"):
        InvertingGradients(lr=0.0)
    with pytest.raises(InvalidParameter, match="distance"):
        InvertingGradients(distance="manhattan")  # type: ignore[arg-type]  # the point of the test


def test_sum_reduction_and_mean_reduction_give_the_same_direction() -> None:
    attack = InvertingGradients(steps=20)
    both = [
        harness.run_trial(small(protocol=FedSGD(reduction=how), examples=2), attack).found.images
        for how in ("mean", "sum")
    ]
    torch.testing.assert_close(both[0], both[1], rtol=0, atol=1e-3)
