"""What a study may look at in a trial."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from leakatlas.attacks.analytic.sparsification.robbing_the_fed import RobbingTheFed
from leakatlas.attacks.optimization.basic.dlg import DLG
from leakatlas.bench import harness, looks
from leakatlas.bench.harness import Trial
from leakatlas.bench.scene import public_images
from leakatlas.data import Box, patches
from leakatlas.defenses.heuristic.perturbation.clipping import Clipping
from leakatlas.fl import ModelRef, Scenario, Stage, stage
from leakatlas.metrics.baselines import mean_image
from leakatlas.metrics.images import psnr

ATTACK = DLG(steps=1, restarts=1)


def scene(*defenses: Clipping, letter: str = "B") -> Stage:
    model = ModelRef("builtin", "fc", {"size": 8, "classes": 10, "widths": (16,)})
    scenario = Scenario(model=model, defenses=defenses, letter=letter, examples=2)
    return stage(scenario, victims=patches(8, 2), surrogate=patches(8, 8, part="surrogate"),
                 box=Box.unit(3))  # fmt: skip


def played(scene: Stage) -> Trial:
    return harness.run_trial(scene, ATTACK)


def test_a_halved_upload_is_half_away_and_points_the_same_way() -> None:
    plain = played(scene())
    norm = float(torch.cat([t.flatten() for t in plain.view.update.tensors.values()]).norm())
    clipped = scene(Clipping(max_norm=norm / 2))
    found = looks.of(played(clipped), clipped, ATTACK, ["error", "cosine", "size"])
    assert found == pytest.approx({"error": 0.5, "cosine": 1.0, "size": 0.5}, rel=1e-4)


def test_an_undefended_upload_is_compared_with_nothing() -> None:
    plain = scene()
    found = looks.of(played(plain), plain, ATTACK, ["error", "cosine", "psnr_equal_noise"])
    assert found == {"error": [], "cosine": [], "psnr_equal_noise": []}


def test_the_undefended_upload_is_that_of_the_weights_that_were_received() -> None:
    """Not of the network as it is described, which a study may have trained."""
    described = scene().scenario
    model = described.model.build()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    clipped = stage(
        replace(described, defenses=(Clipping(max_norm=1e9),)), model=model.double(),
        victims=patches(8, 2), surrogate=patches(8, 8, part="surrogate"), box=Box.unit(3),
    )  # fmt: skip
    found = looks.of(played(clipped), clipped, ATTACK, ["error", "size"])
    assert found == pytest.approx({"error": 0.0, "size": 1.0}, abs=1e-9)


def test_noise_of_equal_size_is_as_far_away() -> None:
    plain = scene()
    noisy = looks.under(plain, played(plain).view, looks.EqualNoise(ratio=0.25))
    (error,) = looks.of(played(noisy), noisy, ATTACK, ["error"]).values()
    assert error == pytest.approx(0.25, rel=1e-4)


def test_a_turned_copy_counts_as_the_image() -> None:
    plain = scene()
    trial = played(plain)
    turned = replace(trial, images=trial.truth.images.rot90(1, (-2, -1)))
    names = ["psnr_any_turn", "recognisable_in_any_turn"]
    assert looks.of(turned, plain, ATTACK, names) == {
        "psnr_any_turn": [100.0, 100.0], "recognisable_in_any_turn": [1.0, 1.0]
    }  # fmt: skip
    nothing = replace(trial, images=trial.images[:0])
    mean = mean_image(public_images(plain)[0])
    truths = trial.truth.images
    expected = psnr(mean.expand_as(truths).to(truths), truths).tolist()
    assert looks.of(nothing, plain, ATTACK, names)["psnr_any_turn"] == pytest.approx(expected)


def test_a_unit_that_one_example_fires_is_precise() -> None:
    plain = scene()
    trial = played(plain)
    layer = next(m for m in plain.federation.model.modules() if isinstance(m, torch.nn.Linear))
    first, second = trial.truth.images.flatten(1)
    apart = first / first.norm() - second / second.norm()
    with torch.no_grad():
        layer.weight.zero_()
        layer.bias.fill_(-1.0)
        layer.weight[0], layer.bias[0] = apart, 0.0  # the first alone
        layer.bias[1] = 1.0  # both
    found = looks.of(trial, plain, ATTACK, ["passive_recall", "passive_precision"])
    assert found == {"passive_recall": [1.0, 0.0], "passive_precision": [0.5]}


def test_success_is_said_and_checked() -> None:
    plain = scene(letter="G")
    attack = RobbingTheFed(bins=64)
    trial = harness.run_trial(plain, attack)
    names = ["complete", "whole", "falsely_complete"]
    told = replace(trial, found=replace(trial.found, status="complete"))
    exact = replace(told, images=trial.truth.images)
    assert looks.of(exact, plain, attack, names) == {
        "complete": 1.0, "whole": 1.0, "falsely_complete": 0.0
    }  # fmt: skip
    wrong = replace(told, images=torch.zeros_like(trial.truth.images))
    assert looks.of(wrong, plain, attack, names) == {
        "complete": 1.0, "whole": 0.0, "falsely_complete": 1.0
    }  # fmt: skip
    failed = replace(exact, found=replace(trial.found, status="failed"))
    assert set(looks.of(failed, plain, attack, names).values()) == {0.0}
