"""The canonical protocol: failures count, order does not, baselines go through the same door."""

from __future__ import annotations

import json

import pytest
import torch

from leakatlas.errors import InvalidInput
from leakatlas.metrics import Scores, pairwise_mse, psnr_of_mse, score
from leakatlas.metrics.images import PSNR_CAP


def photos(n: int, seed: int, side: int = 16, channels: int = 3) -> torch.Tensor:
    return torch.rand(n, channels, side, side, generator=torch.Generator().manual_seed(seed))


X, PUBLIC = photos(4, 0), photos(12, 1)


def noisy(x: torch.Tensor, std: float) -> torch.Tensor:
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(9))
    return (x + std * noise).clamp(0, 1)


def test_4_exact_copies_hit_the_cap_and_the_exact_count() -> None:
    found = score(X, X, public=PUBLIC)
    assert found.psnr.mean == PSNR_CAP
    assert found.success["exact"].successes == found.success["pixel_exact"].successes == 4
    assert (found.recovered.exact, found.recovered.unique, found.recovered.precision) == (4, 4, 1.0)
    assert found.gain == pytest.approx(PSNR_CAP - found.baselines[found.best_baseline].psnr)


def test_5_permuting_outputs_leaves_every_metric_unchanged() -> None:
    candidates = noisy(X, 0.1)
    ordered = score(candidates, X, public=PUBLIC).to_json()
    cycled = score(candidates[[1, 2, 3, 0]], X, public=PUBLIC).to_json()
    assert [i.pop("candidate") for i in ordered["images"]] == [0, 1, 2, 3]
    assert [i.pop("candidate") for i in cycled["images"]] == [3, 0, 1, 2]
    assert ordered == cycled


@pytest.mark.parametrize("nothing", [None, X[:0]])
def test_5_no_candidates_is_a_failure_of_every_original(nothing: torch.Tensor | None) -> None:
    found = score(nothing, X, public=PUBLIC)
    assert (found.candidates, found.missing, found.surplus) == (0, 4, 0)
    assert found.psnr.mean == pytest.approx(found.baselines["mean_image"].psnr)
    assert all(rate.successes == 0 for rate in found.success.values())
    assert found.recovered.precision is None
    assert found.gain <= 0


def test_5_unmatched_originals_stay_in_the_mean_and_never_succeed() -> None:
    # the mean public image is itself the third original: its score is 100 dB, still a failure
    public = X[2:3].repeat(5, 1, 1, 1)
    found = score(X[:2], X, public=public)
    assert found.missing == 2
    assert [image.candidate for image in found.images] == [0, 1, None, None]
    assert found.images[2].psnr == PSNR_CAP and not found.images[2].exact
    assert found.success["asr@20"].successes == 2
    fallback = psnr_of_mse(pairwise_mse(public[:1], X))[0]
    expected = (2 * PSNR_CAP + float(fallback[2]) + float(fallback[3])) / 4
    assert found.psnr.mean == pytest.approx(expected)


def test_surplus_and_duplicates_cost_precision() -> None:
    candidates = torch.cat([X[:2], X[:1], photos(3, 5)])
    found = score(candidates, X, public=PUBLIC)
    assert (found.surplus, found.missing) == (2, 0)
    assert (found.recovered.outputs, found.recovered.exact, found.recovered.unique) == (6, 3, 2)
    assert found.recovered.precision == 0.5 and found.recovered.recall == 0.5


def test_non_finite_candidates_are_dropped_and_counted() -> None:
    candidates = X.clone()
    candidates[0, 0, 0, 0], candidates[1, 0, 0, 0] = torch.nan, torch.inf
    found = score(candidates, X, public=PUBLIC)
    assert (found.non_finite, found.missing) == (2, 2)
    assert [image.candidate for image in found.images] == [None, None, 2, 3]
    json.dumps(found.to_json(), allow_nan=False)


def test_candidates_are_clamped_and_the_share_is_kept() -> None:
    candidates = X.clone()
    candidates[:, 0] += 2
    found = score(candidates, X, public=PUBLIC)
    assert found.clamped == pytest.approx(1 / 3)
    clamped = score(candidates.clamp(0, 1), X, public=PUBLIC)
    assert clamped.psnr.mean == found.psnr.mean and clamped.clamped == 0


def test_input_is_not_changed() -> None:
    candidates = X.clone()
    candidates[0] = torch.nan
    before = candidates.clone()
    score(candidates, X, public=PUBLIC)
    torch.testing.assert_close(candidates, before, equal_nan=True)


def test_the_mean_image_gains_nothing() -> None:
    grey = PUBLIC.mean(dim=0, keepdim=True).repeat(4, 1, 1, 1)
    found = score(grey, X, public=PUBLIC)
    assert found.gain == pytest.approx(0, abs=1e-4)


def test_every_baseline_is_scored_and_the_best_is_subtracted() -> None:
    labels, public_labels = torch.tensor([0, 1, 2, 3]), torch.arange(12) % 4
    found = score(
        noisy(X, 0.2), X, public=PUBLIC, labels=labels, public_labels=public_labels,
        baselines={"other_batch": noisy(X, 0.01)},
    )  # fmt: skip
    assert set(found.baselines) == {"mean_image", "nearest_public", "same_class", "other_batch"}
    assert found.best_baseline == "other_batch"
    assert found.gain < 0


def test_labels_are_scored_as_multiset_and_with_their_image() -> None:
    labels = torch.tensor([2, 0, 1, 1])
    found = score(
        X[[1, 0, 2, 3]], X, public=PUBLIC, labels=labels,
        recovered_labels=torch.tensor([2, 0, 1, 1]), classes=10,
    )  # fmt: skip
    assert found.labels is not None and found.labels.irec == 1 and found.labels.exact_batch
    # the multiset is right, but candidate 0 shows original 1 and was labelled 2 instead of 0
    assert [image.label for image in found.images] == [False, False, True, True]
    assert found.label_constrained_psnr is not None
    assert found.label_constrained_psnr < found.psnr.mean


def test_a_multiset_of_another_size_has_no_label_a_candidate() -> None:
    found = score(
        X[:3], X, public=PUBLIC, labels=torch.tensor([0, 1, 2, 2]),
        recovered_labels=torch.tensor([0, 1, 2, 3]),
    )  # fmt: skip
    assert found.labels is not None and found.labels.irec == 0.75
    assert found.label_constrained_psnr is None
    assert all(image.label is None for image in found.images)


@pytest.mark.parametrize("channels", [1, 4])
@pytest.mark.parametrize("side", [8, 224])
def test_channels_and_sizes(channels: int, side: int) -> None:
    x, public = photos(2, 0, side, channels), photos(3, 1, side, channels)
    found = score(x, x, public=public)
    assert found.psnr.mean == PSNR_CAP
    assert (found.ssim is None) == (side < 11)


def test_a_black_batch_is_defined() -> None:
    black = torch.zeros(2, 1, 16, 16)
    found = score(black, black, public=photos(2, 0, 16, 1))
    assert found.success["exact"].value == 1
    json.dumps(found.to_json(), allow_nan=False)


def test_json_round_trip_and_equal_inputs_give_equal_scores() -> None:
    found = score(noisy(X, 0.1), X, public=PUBLIC)
    text = json.dumps(found.to_json(), allow_nan=False)
    assert Scores.from_json(json.loads(text)) == found
    assert score(noisy(X, 0.1), X, public=PUBLIC) == found


def test_precision_of_exactness_follows_the_gradients() -> None:
    x = X.double()
    nearly = (x * (1 + 1e-4)).clamp(0, 1)
    assert score(nearly, x, public=PUBLIC).success["exact"].successes == 0
    assert score(nearly.float(), x, public=PUBLIC).success["exact"].successes == 4


def test_intervals_hold_their_value_and_widen_with_level() -> None:
    narrow = score(noisy(X, 0.1), X, public=PUBLIC, level=0.5)
    wide = score(noisy(X, 0.1), X, public=PUBLIC, level=0.99)
    for found in (narrow, wide):
        assert found.psnr.mean_interval.low <= found.psnr.mean <= found.psnr.mean_interval.high
        rate = found.success["asr@15"]
        assert rate.interval.low <= rate.value <= rate.interval.high
    assert wide.psnr.mean_interval.low <= narrow.psnr.mean_interval.low


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"originals": X + 1}, r"originals must lie in \[0, 1\]"),
        ({"originals": X[:0]}, "originals must be one or more images"),
        ({"public": PUBLIC[:0]}, "public must be one or more images"),
        ({"public": PUBLIC[:, :1]}, "public must be one or more images"),
        ({"candidates": X[:, :, :8]}, "candidates must be float images"),
        ({"candidates": X[0]}, "candidates must be float images"),
        ({"labels": torch.tensor([1, 2])}, "labels must be 4 integers"),
        ({"baselines": {"other": X[0]}}, "baselines"),
    ],
)
def test_what_does_not_fit_is_named(arguments: dict[str, torch.Tensor], message: str) -> None:
    given = {"candidates": X, "originals": X, "public": PUBLIC} | arguments
    candidates, originals = given.pop("candidates"), given.pop("originals")
    with pytest.raises(InvalidInput, match=message):
        score(candidates, originals, **given)  # type: ignore[arg-type]  # one wrong value a case
