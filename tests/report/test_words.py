"""Each word at its border, and figures that agree with the word beside them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from leakatlas.metrics.score import Baseline, ImageScore, Scores, score
from leakatlas.metrics.success import EXACT_FLOAT32
from leakatlas.report import RECOGNISABLE_PSNR, VERDICTS, beside, rank, recognisable, verdict

GREY = torch.full((4, 1, 16, 16), 0.5, dtype=torch.float64)


def noisy(psnr: float) -> Tensor:
    """An image whose PSNR against the first original is exactly this."""
    return originals()[:1] + 10 ** (-psnr / 20)


def originals() -> Tensor:
    x = torch.full((1, 1, 16, 16), 0.25, dtype=torch.float64)
    x[..., ::2] = 0.75
    return x


def scored(candidates: Tensor | None, **more: object) -> Scores:
    return score(candidates, originals(), public=GREY, **more)  # type: ignore[arg-type]  # by name


def with_psnr(*psnrs: float, null: float = 10.0) -> Scores:
    """Scores of a batch whose images have these PSNRs and whose nulls all have ``null``."""
    base = scored(noisy(15.0))
    images = tuple(replace(base.images[0], psnr=p, null_psnr=null, candidate=0) for p in psnrs)
    mean = sum(psnrs) / len(psnrs)
    return replace(
        base,
        images=images,
        psnr=replace(base.psnr, mean=mean, max=max(psnrs)),
        baselines={"mean_image": Baseline(psnr=null, ssim=None, mse=0.1)},
        best_baseline="mean_image",
        gain=mean - null,
    )


def test_twenty_decibels_are_recognisable_and_less_is_not() -> None:
    assert RECOGNISABLE_PSNR == 20.0
    assert verdict(with_psnr(20.0)) == "recognisable"
    assert verdict(with_psnr(19.999)) == "not demonstrated"
    assert verdict(with_psnr(12.0)) == "not demonstrated"


def test_a_public_image_as_good_as_the_candidate_is_no_leak() -> None:
    assert verdict(with_psnr(25.0, null=25.0)) == "not demonstrated"
    assert verdict(with_psnr(25.0, null=24.999)) == "recognisable"


def test_the_mean_must_beat_the_null_as_well_as_the_best_image() -> None:
    mixed = with_psnr(25.0, 5.0, null=15.0)  # mean 15: as good as guessing
    assert verdict(mixed) == "not demonstrated" and recognisable(mixed) == (False, False)
    assert verdict(with_psnr(25.0, 5.1, null=15.0)) == "recognisable"


def test_the_best_image_must_beat_its_own_null() -> None:
    easy = with_psnr(25.0, 19.0, null=10.0)
    images = (replace(easy.images[0], null_psnr=30.0), easy.images[1])
    assert verdict(replace(easy, images=images)) == "not demonstrated"


def test_an_original_without_a_candidate_is_recognised_by_nobody() -> None:
    alone = with_psnr(25.0)
    missing = replace(alone.images[0], candidate=None)
    assert verdict(replace(alone, images=(missing,))) == "not demonstrated"


def test_on_real_scores_the_null_decides() -> None:
    """A flat original: public grey is as near as the candidate, though both are above 20 dB."""
    x = torch.full((1, 1, 16, 16), 0.52, dtype=torch.float64)
    candidate = torch.full_like(x, 0.54)
    found = score(candidate, x, public=GREY)
    assert found.images[0].psnr > 30 and found.gain == pytest.approx(0, abs=1e-6)
    assert verdict(replace(found, gain=0.0)) == "not demonstrated"
    assert verdict(scored(noisy(20.0001))) == "recognisable"
    assert scored(noisy(20.0001)).images[0].null_psnr == pytest.approx(12.04, abs=0.01)


def test_exact_begins_at_the_rounding_of_the_gradients() -> None:
    x = originals().float()
    for error, word in ((0.99, "exact leak"), (1.01, "recognisable")):
        found = score(x * (1 + error * EXACT_FLOAT32), x, public=GREY.float())
        assert verdict(found) == word


def test_every_label_makes_a_label_leak_and_one_wrong_label_none() -> None:
    x = originals().expand(2, -1, -1, -1)
    labels = torch.tensor([3, 5])
    right = score(None, x, public=GREY, labels=labels, recovered_labels=torch.tensor([5, 3]))
    wrong = score(None, x, public=GREY, labels=labels, recovered_labels=torch.tensor([5, 5]))
    granted = score(None, x, public=GREY, labels=labels)
    assert [verdict(s) for s in (right, wrong, granted)] == [
        "label leak only", "not demonstrated", "not demonstrated",
    ]  # fmt: skip


def test_the_words_stand_in_order() -> None:
    assert [rank(word) for word in VERDICTS] == [0, 1, 2, 3, 4, 5]
    assert rank("not tested") < rank("not demonstrated") < rank("label leak only")


@pytest.mark.parametrize(
    ("value", "threshold", "shown"),
    [
        (19.96, 20.0, "19.96"),
        (20.0, 20.0, "20.0"),
        (20.04, 20.0, "20.04"),
        (19.9999996, 20.0, "19.9999996"),
        (25.0, 20.0, "25.0"),
        (-0.04, 0.0, "-0.04"),
    ],
)
def test_a_figure_stands_on_its_side_of_the_threshold(
    value: float, threshold: float, shown: str
) -> None:
    assert beside(value, threshold) == shown


def test_a_gates_figure_has_significant_digits() -> None:
    assert beside(1.0, 0.05, 3, kind="g") == "1"
    assert beside(0.0500004, 0.05, 3, kind="g") == "0.0500004"


@given(st.floats(-100, 100), st.floats(-100, 100))
def test_no_figure_crosses_its_threshold(value: float, threshold: float) -> None:
    shown = float(beside(value, threshold))
    assert (shown > threshold) == (value > threshold)
    assert (shown < threshold) == (value < threshold)


def test_scores_keep_every_images_null() -> None:
    kept = Scores.from_json(scored(noisy(22.0)).to_json())
    assert isinstance(kept.images[0], ImageScore)
    assert kept.images[0].null_psnr == scored(noisy(22.0)).images[0].null_psnr
