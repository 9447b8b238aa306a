from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from leakatlas import data
from leakatlas.attacks.analytic.isolation.sybils import (
    Sybils,
    cluster,
    live_rows,
)
from leakatlas.bench.harness import Trial, observe, run_trial
from leakatlas.blocks.surgery import find_trap, set_traps, trap_rows, tuned_scaling
from leakatlas.data import Box
from leakatlas.defenses.formal.crypto.secure_aggregation import SecureAggregation
from leakatlas.defenses.formal.dp.client_dp import ClientDP
from leakatlas.errors import NotGranted, UnsupportedModel
from leakatlas.fl import Stage
from leakatlas.threat import Vantage
from tests.attacks.analytic.support import UNIT, crops, errors, psnr, same_after_saving, small_stage
from tests.attacks.case import Case
from tests.conftest import BOX

CASE = Case({"cohort_size": 3}, {"settings": {"widths": (32,), "act": "relu"}})

FC = {"widths": (160, 32), "act": "relu"}


def _stage(**settings: Any) -> Stage:
    chosen = {
        "letter": "H", "model": "fc", "settings": FC, "size": 8, "examples": 8,
        "vantage": Vantage.AGGREGATE, **settings,
    }  # fmt: skip
    return small_stage(**chosen)


def _noise(multiplier: float, members: int) -> tuple[ClientDP, ...]:
    return (
        ClientDP(
            noise_multiplier=multiplier, clip_norm=1.0, unit="update", clipping="flat",
            share_of=members,
        ),
    )  # fmt: skip


def _fired_alone(trial: Trial, box: Box) -> Tensor:
    """From the forward pass: who is the only one to fire some trap row."""
    model = trial.view.model
    x = box.normalize(trial.truth.images.double()).flatten(1)
    first = next(m for m in model.modules() if isinstance(m, nn.Linear))
    fires = first(x) > 0
    alone: Tensor = (fires & (fires.sum(dim=0) == 1)).any(dim=1)
    return alone


@pytest.mark.parametrize("box", [UNIT, BOX], ids=["plain", "normalised"])
def test_without_noise_exactly_the_sole_activators_come_back(box: Box) -> None:
    trial = run_trial(_stage(box=box), Sybils())
    alone = _fired_alone(trial, box)
    assert 0 < int(alone.sum()) < 8
    wrong = errors(trial)
    assert float(wrong[alone].max()) < 1e-6
    assert float(wrong[~alone].min()) > 1e-6


@pytest.mark.parametrize("normalised", [False, True], ids=["plain", "normalised"])
def test_lone_digits_of_64_pixels_come_back_exactly(normalised: bool) -> None:
    """Few pixels, black beside white: what neighbours say of them is within chance."""
    box = Box((0.5,), (0.5,)) if normalised else Box.unit(1)
    settings = {"widths": (32,), "act": "relu", "in_channels": 1}
    for image in range(3):
        stage = _stage(
            victims=data.digits().subset([image]), examples=1, box=box, settings=settings
        )
        assert float(errors(run_trial(stage, Sybils())).min()) < 1e-6


def test_a_secure_sum_with_silent_devices_is_the_targets_update() -> None:
    defenses = (SecureAggregation(ring_bits=64),)
    stage = _stage(defenses=defenses, clients=3, examples=6)
    trial = run_trial(stage, Sybils(cohort_size=4))
    assert trial.records[0].cohort[0] == 0 and len(trial.records[0].cohort) == 4
    assert len(trial.truth.images) == 6  # the target's batch and nobody else's
    alone = _fired_alone(trial, stage.box)
    assert bool(alone.any()) and float(errors(trial)[alone].max()) < 1e-6


def test_secure_aggregation_and_dp_noise_together_do_not_help_a_lone_client() -> None:
    """Ten silent devices in a masked, noisy round: the same quality as without the masks."""
    settings = {"widths": (200,), "act": "relu"}
    noise = _noise(3e-4, 10)
    masked = _stage(defenses=(*noise, SecureAggregation(ring_bits=64)), settings=settings)
    plain = _stage(defenses=noise, settings=settings)
    hidden = run_trial(masked, Sybils(cohort_size=10))
    assert hidden.records[0].messages[0].update is None  # nobody sees the target's own message
    through = float(psnr(hidden).median())
    assert through > 15
    assert through == pytest.approx(
        float(psnr(run_trial(plain, Sybils(cohort_size=10))).median()), abs=0.1
    )


def test_quality_rises_by_ten_decibels_for_ten_times_the_sybils() -> None:
    """The noise left is the target's share: its variance falls as 1/M."""
    at = {}
    for members in (10, 100, 1000):
        stage = _stage(
            defenses=_noise(3e-4, members),
            settings={"widths": (200,), "act": "relu"},
            dtype=torch.float32,
        )
        at[members] = float(psnr(run_trial(stage, Sybils(cohort_size=members))).median())
    assert 7 < at[100] - at[10] < 13
    assert 7 < at[1000] - at[100] < 13


def test_honest_noise_keeps_the_curve_flat_and_bad() -> None:
    """If all M clients add their share, the sum carries the full noise whatever M."""
    z = 1e-2
    silent, honest = {}, {}
    for members in (10, 100, 1000):
        stage = _stage(defenses=_noise(z, members), dtype=torch.float32)
        attack = Sybils(cohort_size=members)
        trial = run_trial(stage, attack)
        silent[members] = int((psnr(trial) > 20).sum())
        seen = trial.view.rounds[0]
        assert seen.update is not None
        generator = torch.Generator().manual_seed(members)
        # What the M - 1 others would have added to the mean: shares of variance z^2 / M.
        missing = z * ((members - 1) / members) ** 0.5 / members
        noisy = {
            n: t + missing * torch.randn(t.shape, generator=generator)
            for n, t in seen.update.tensors.items()
        }
        view = trial.view.with_rounds(
            [replace(seen, update=seen.update.with_tensors(noisy))], dict(trial.view.key)
        )
        found = attack(view)
        shown = replace(trial, found=found, images=stage.box.denormalize(found.images))
        honest[members] = int((psnr(shown) > 20).sum())
    assert silent[1000] > silent[10]
    assert set(honest.values()) == {0}


def test_the_combination_has_the_promised_variance() -> None:
    """Var(x) = noise^2 / sum of squared factors, for known factors."""
    generator = torch.Generator().manual_seed(2)
    x = torch.rand(48 * 48, generator=generator, dtype=torch.float64).cumsum(0) % 1
    g = torch.linspace(0.5, 2.0, 20, dtype=torch.float64)
    noise = 0.01
    rows = g[:, None] * x + noise * torch.randn(
        20, len(x), generator=generator, dtype=torch.float64
    )
    found = cluster(rows, g, noise, 0.95)
    assert len(found) == 1 and found[0].rows == 20
    variance = float((found[0].x - x).square().mean())
    assert variance == pytest.approx(noise**2 / float(g.square().sum()), rel=0.15)
    ratios = (rows / g[:, None]).mean(dim=0)
    assert float((ratios - x).square().mean()) > variance


def test_two_images_make_two_clusters() -> None:
    images = crops(16, 2).images.double().flatten(1)
    g = torch.tensor([1.0, 0.8, 0.9, 1.1], dtype=torch.float64)
    which = torch.tensor([0, 1, 0, 1])
    generator = torch.Generator().manual_seed(0)
    noise = 1e-3
    rows = g[:, None] * images[which]
    rows = rows + noise * torch.randn(rows.shape, generator=generator, dtype=torch.float64)
    found = cluster(rows, g, noise, 0.95)
    assert sorted(c.rows for c in found) == [2, 2]


def test_rows_of_noise_are_dead_and_tell_its_size() -> None:
    image = crops(16, 1).images.double().flatten(1)
    generator = torch.Generator().manual_seed(0)
    noise = 0.05 * torch.randn(40, image.shape[1], generator=generator, dtype=torch.float64)
    g_b = 0.05 * torch.randn(40, generator=generator, dtype=torch.float64)
    rows = noise.clone()
    rows[:5] += image
    g_b[:5] += 1
    live, size = live_rows(rows, g_b, *_unit(image))
    assert live.tolist() == [True] * 5 + [False] * 35
    assert size == pytest.approx(0.05, rel=0.05)


def _unit(image: Tensor) -> tuple[Tensor, Tensor]:
    return torch.zeros_like(image), torch.ones_like(image)


@pytest.mark.parametrize("noise", [0.0, 0.05])
def test_an_image_whose_pixels_do_not_resemble_each_other_is_live_too(noise: float) -> None:
    """Of 64 pixels that alternate; neighbours tell nothing."""
    image = torch.arange(64, dtype=torch.float64) % 2
    generator = torch.Generator().manual_seed(0)
    rows = noise * torch.randn(40, 64, generator=generator, dtype=torch.float64)
    g_b = noise * torch.randn(40, generator=generator, dtype=torch.float64)
    rows[:5] += image
    g_b[:5] += 1
    live, size = live_rows(rows, g_b, *_unit(image))
    assert live.tolist() == [True] * 5 + [False] * 35
    assert size == pytest.approx(noise, rel=0.05)


def test_rows_that_all_hold_a_lively_image_are_all_live() -> None:
    """Then no row is left to tell the noise from."""
    image = torch.arange(64, dtype=torch.float64) % 2
    g_b = torch.linspace(0.5, 2, 12, dtype=torch.float64)
    live, size = live_rows(g_b[:, None] * image, g_b, *_unit(image))
    assert bool(live.all()) and size == 0


def test_gain_changes_no_output_and_moves_norm_to_the_traps() -> None:
    stage = _stage()
    norms, outputs = [], []
    for gain in (1.0, 30.0):
        trial = run_trial(stage, Sybils(gain=gain))
        tensors = trial.view.update.tensors
        total = torch.stack([t.norm() for t in tensors.values()]).norm()
        norms.append(float(tensors["hidden.1.weight"].norm() / total))
        outputs.append(trial.view.model(stage.box.normalize(trial.truth.images.double())).detach())
    assert torch.allclose(outputs[0], outputs[1])
    assert norms[1] > norms[0]


def test_scaling_is_tuned_to_the_surrogate() -> None:
    generator = torch.Generator().manual_seed(0)
    images = crops(8, 200, "surrogate").images
    s = tuned_scaling(images, 8, generator)
    flat = images.double().flatten(1)

    def share(scaling: float) -> float:
        fresh = torch.Generator().manual_seed(9)
        traps = trap_rows(256, 192, scaling=scaling, sigma=0.5, generator=fresh, like=flat)
        fires = flat[:64].reshape(8, 8, -1) @ traps.T > 0
        alone = fires & (fires.sum(dim=1, keepdim=True) == 1)
        return float(alone.any(dim=2).double().mean())

    assert share(s) > share(0.7) - 0.05 and share(s) > share(0.99) - 0.05
    assert run_trial(_stage(), Sybils(scaling=None)).view.key["scaling"] > 0.7


class _Behind(nn.Module):
    """Convolutions (with what may follow them), then a trapped layer."""

    def __init__(self, middle: nn.Module, *, bias: bool = True, features: int = 4 * 64) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 4, 3, padding=1, bias=bias), middle, nn.Conv2d(4, 4, 5, padding=2),
            nn.ReLU(), nn.Flatten(), nn.Linear(features, 160), nn.ReLU(), nn.Linear(160, 10),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.body(x)
        return logits


@pytest.mark.parametrize("box", [UNIT, BOX], ids=["plain", "normalised"])
def test_convolutions_pass_the_image_through(box: Box) -> None:
    torch.manual_seed(0)
    stage = _stage(live=_Behind(nn.ReLU()), box=box)
    trial = run_trial(stage, Sybils())
    assert int((errors(trial) < 1e-6).sum()) > 0


def test_a_pooled_image_comes_back_smaller() -> None:
    torch.manual_seed(0)
    stage = _stage(live=_Behind(nn.MaxPool2d(2), features=4 * 16))
    trial = run_trial(stage, Sybils())
    assert trial.view.key["carried"].tolist() == [3, 4, 4]
    assert trial.images.shape[1:] == (3, 8, 8)
    assert float(psnr(trial).max()) > 10 and float(errors(trial).min()) > 1e-6


@pytest.mark.parametrize(
    ("middle", "message"),
    [(nn.LayerNorm([4, 8, 8]), "LayerNorm"), (nn.Sigmoid(), "Sigmoid"), (nn.BatchNorm2d(4), "Ba")],
)
def test_layers_that_change_the_image_are_named(middle: nn.Module, message: str) -> None:
    with pytest.raises(UnsupportedModel, match=message):
        find_trap(_Behind(middle), torch.zeros(1, 3, 8, 8))


def test_models_without_a_place_for_traps_are_refused() -> None:
    with pytest.raises(UnsupportedModel, match="not followed by a ReLU"):
        run_trial(_stage(model="convnet", settings={"width": 4}), Sybils())
    with pytest.raises(UnsupportedModel, match="without bias"):
        run_trial(_stage(settings={**FC, "bias": False}), Sybils())
    with pytest.raises(UnsupportedModel, match="plain chain"):
        run_trial(_stage(model="resnet8", settings={}), Sybils())


def test_a_normalised_input_needs_a_bias_in_the_first_convolution() -> None:
    path = find_trap(_Behind(nn.ReLU(), bias=False), torch.zeros(1, 3, 8, 8))
    with pytest.raises(UnsupportedModel, match="undo the pixel normalisation"):
        set_traps(
            path, BOX, scaling=0.95, sigma=0.5, gain=1.0, generator=torch.Generator().manual_seed(0)
        )


def test_choosing_the_cohort_takes_letter_h() -> None:
    with pytest.raises(NotGranted, match="SELECTION"):
        run_trial(_stage(letter="G"), Sybils())


def test_the_same_from_a_saved_view(tmp_path: Path) -> None:
    attack = Sybils(cohort_size=5)
    view, _ = observe(_stage(defenses=_noise(1e-4, 5)), attack)
    same_after_saving(attack, view, tmp_path)
