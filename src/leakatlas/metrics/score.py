"""The one protocol by which every reconstruction in LeakAtlas is judged.

1. Originals and candidates are in [0, 1]; candidates are clamped, and how much was clamped is kept.
2. Candidates with non-finite pixels are dropped and counted.
3. Candidates are assigned one to one by MSE. An original without a candidate is a *failure*: it
   gets the score of the public mean image and is a success under no criterion.
4. Values are kept per image; mean, median, minimum and maximum follow, with intervals.
5. The same protocol scores the null baselines; the gain is over the best of them.

Published protocols that average successes only, let one candidate serve every original, or pick
the metric's best match for each metric separately give higher and incomparable numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from pydantic import TypeAdapter
from torch import Tensor

from leakatlas.errors import InvalidInput
from leakatlas.metrics import _checks
from leakatlas.metrics import labels as label_metrics
from leakatlas.metrics.assignment import Assignment, assign, pairwise_mse
from leakatlas.metrics.baselines import mean_image, nearest_public, random_same_class
from leakatlas.metrics.images import WINDOW, mse, psnr, ssim
from leakatlas.metrics.intervals import Interval, binomial, bootstrap, row_mean, row_median
from leakatlas.metrics.labels import LabelScores, label_scores
from leakatlas.metrics.success import (
    EXACT_FLOAT32,
    EXACT_FLOAT64,
    THRESHOLDS,
    Recovered,
    exact,
    pixel_exact,
    recovered,
)


@dataclass(frozen=True, kw_only=True)
class ImageScore:
    """What became of one original.

    Args:
        candidate: Index of its candidate, None for a failure (then the values are those of the
            public mean image).
        mse: Mean squared error.
        psnr: In dB, capped at 100.
        ssim: None where undefined (a side below 11 pixels).
        exact: Relative L2 error within ``eps``.
        pixel_exact: All 8-bit pixels equal.
        null_psnr: The highest PSNR that any null baseline has on this original, in dB.
        label: Whether the label that the attack gave *this* candidate is right; None if it gave
            no label a candidate.
    """

    candidate: int | None
    mse: float
    psnr: float
    ssim: float | None
    exact: bool
    pixel_exact: bool
    null_psnr: float
    label: bool | None = None


@dataclass(frozen=True, kw_only=True)
class Summary:
    """One measure over all originals, failures included."""

    mean: float
    median: float
    min: float
    max: float
    mean_interval: Interval
    median_interval: Interval


@dataclass(frozen=True, kw_only=True)
class Rate:
    """A share of originals with its Wilson interval."""

    value: float
    successes: int
    trials: int
    interval: Interval


@dataclass(frozen=True, kw_only=True)
class Baseline:
    """Mean scores of what an adversary without this update would hand in."""

    psnr: float
    ssim: float | None
    mse: float


@dataclass(frozen=True, kw_only=True)
class Scores:
    """All that is said about one reconstruction of one batch.

    Args:
        originals: Size of the private batch.
        candidates: Images the attack emitted.
        non_finite: Candidates dropped because of NaN or infinite pixels.
        clamped: Share of pixel values of the finite candidates outside [0, 1].
        surplus: Usable candidates left without an original.
        missing: Originals left without a candidate.
        matched_by: Measure of the assignment.
        eps: Relative error up to which an image is exact.
        level: Coverage of every interval.
        images: One entry an original, in the order of the batch.
        psnr: Summary over originals.
        ssim: The same; None where SSIM is undefined.
        mse: The same.
        success: Share of originals by criterion: ``exact``, ``pixel_exact``, ``asr@20`` ...
        recovered: Exact outputs among all that were emitted.
        baselines: Null baselines by name, scored in the same way.
        best_baseline: Name of the baseline with the highest mean PSNR.
        gain: Mean PSNR minus that of the best baseline, in dB.
        labels: Label measures; None unless both true and recovered labels were given.
        label_constrained_psnr: Mean PSNR if candidates may only stand for originals of their own
            label; None unless there is a label a candidate.
    """

    originals: int
    candidates: int
    non_finite: int
    clamped: float
    surplus: int
    missing: int
    eps: float
    level: float
    images: tuple[ImageScore, ...]
    psnr: Summary
    ssim: Summary | None
    mse: Summary
    success: dict[str, Rate]
    recovered: Recovered
    baselines: dict[str, Baseline]
    best_baseline: str
    gain: float
    labels: LabelScores | None = None
    label_constrained_psnr: float | None = None
    matched_by: str = field(default="mse")

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values, without NaN or infinities."""
        values: dict[str, Any] = _adapter().dump_python(self, mode="json")
        return values

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """The scores whose :meth:`to_json` is ``values``."""
        found = _adapter().validate_python(dict(values))
        assert isinstance(found, cls)
        return found


def _adapter() -> TypeAdapter[Scores]:
    return TypeAdapter(Scores)


def score(
    candidates: Tensor | None,
    originals: Tensor,
    *,
    public: Tensor,
    labels: Tensor | None = None,
    recovered_labels: Tensor | None = None,
    classes: int | None = None,
    public_labels: Tensor | None = None,
    baselines: Mapping[str, Tensor] | None = None,
    eps: float | None = None,
    level: float = 0.95,
    resamples: int = 2_000,
    generator: torch.Generator | None = None,
) -> Scores:
    """Score a reconstruction against the private batch.

    Args:
        candidates: What the attack emitted, ``(M, C, H, W)`` in any order; None or M = 0 when it
            emitted nothing, which is a failure of every original and not an error.
        originals: The private batch ``(B, C, H, W)`` in [0, 1].
        public: Public images ``(P, C, H, W)`` in [0, 1], for the baselines. None of them may be an
            original.
        labels: True labels ``(B,)``.
        recovered_labels: Labels the attack claims. As many as candidates: label m belongs to
            candidate m. Any other number: a multiset.
        classes: Number of classes; by default one more than the largest label in sight.
        public_labels: Labels of ``public``; with ``labels`` they give the same-class baseline.
        baselines: Further null reconstructions by name, ``(M', C, H, W)`` each: above all the
            attack run on the update of *another* batch (``"other_batch"``).
        eps: Relative error of an exact image; by default 1e-6 for float64 candidates, else 1e-3.
        level: Coverage of the intervals.
        resamples: Bootstrap resamples.
        generator: Source of resampling and of the same-class draw; by default seeded with 0, so
            that equal inputs give equal scores.

    Raises:
        InvalidInput: If shapes disagree, originals or public images are not finite images in
            [0, 1], the batch or the public set is empty, or labels do not fit the batch.
    """
    given = _prepare(candidates, originals, public, eps)
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    truth = _true_labels(labels, given.x)
    own = _own_labels(recovered_labels, truth, given)
    nulls = _nulls(given, truth, public_labels, baselines or {}, generator)
    best = max(nulls.scores, key=lambda name: nulls.scores[name].psnr)
    judged = _judge(given)

    def summary(of: Tensor) -> Summary:
        return _summary(of, level=level, resamples=resamples, generator=generator)

    psnr_summary = summary(judged.psnr)
    return Scores(
        originals=len(given.x),
        candidates=len(given.candidates),
        non_finite=int((~given.finite).sum()),
        clamped=given.clamped,
        surplus=given.matching.surplus,
        missing=given.matching.missing,
        eps=given.eps,
        level=level,
        images=_per_image(given, judged, nulls.highest, truth, own),
        psnr=psnr_summary,
        ssim=None if judged.ssim is None else summary(judged.ssim),
        mse=summary(judged.mse),
        success={name: _rate(hits, level) for name, hits in _successes(judged).items()},
        recovered=recovered(_relative_errors(given), eps=given.eps),
        baselines=nulls.scores,
        best_baseline=best,
        gain=psnr_summary.mean - nulls.scores[best].psnr,
        labels=_label_scores(truth, recovered_labels, classes),
        label_constrained_psnr=_constrained(given, truth, own),
    )


@dataclass(frozen=True)
class _Given:
    """Both sides, checked, in float64 and in [0, 1], and who belongs to whom.

    Args:
        x: Originals ``(B, C, H, W)``.
        public: Public images.
        candidates: ``(M, C, H, W)``; not a number where they were not finite.
        finite: ``(M,)``.
        clamped: Share of pixels outside [0, 1].
        eps: Relative error of an exact image.
        fallback: The public mean image.
        cost: ``(M, B)`` mean squared errors.
        matching: The assignment.
    """

    x: Tensor
    public: Tensor
    candidates: Tensor
    finite: Tensor
    clamped: float
    eps: float
    fallback: Tensor
    cost: Tensor
    matching: Assignment


def _prepare(
    candidates: Tensor | None, originals: Tensor, public: Tensor, eps: float | None
) -> _Given:
    _checks.images("score", "originals", originals)
    _checks.images("score", "public", public)
    for name, side in {"originals": originals, "public": public}.items():
        if side.shape[0] == 0 or side.shape[1:] != originals.shape[1:]:
            raise InvalidInput(
                f"score: {name} must be one or more images of shape {tuple(originals.shape[1:])}, "
                f"got {tuple(side.shape)}."
            )
    x = originals.detach().double().clamp(0, 1)
    public = public.detach().to(x).clamp(0, 1)
    emitted = originals[:0] if candidates is None else candidates.detach()
    _fits("candidates", emitted, x)
    finite = torch.isfinite(emitted).flatten(1).all(dim=1)
    kept = emitted[finite]
    prepared = emitted.to(x.device).double().clamp(0, 1)
    prepared[~finite.to(x.device)] = torch.nan  # clamping has turned infinities into 0 and 1
    cost = pairwise_mse(prepared, x)
    if eps is None:
        eps = EXACT_FLOAT64 if emitted.dtype == torch.float64 else EXACT_FLOAT32
    return _Given(
        x=x,
        public=public,
        candidates=prepared,
        finite=finite,
        clamped=float(((kept < 0) | (kept > 1)).double().mean()) if kept.numel() else 0.0,
        eps=eps,
        fallback=mean_image(public),
        cost=cost,
        matching=assign(cost),
    )


@dataclass(frozen=True)
class _Judged:
    """Values ``(B,)`` of every original; failures have those of the public mean image."""

    found: Tensor
    mse: Tensor
    psnr: Tensor
    ssim: Tensor | None
    exact: Tensor
    pixel_exact: Tensor


def _judge(given: _Given) -> _Judged:
    x = given.x
    x_hat, found = _by_original(given.candidates, given.matching, given.fallback, len(x))
    return _Judged(
        found=found,
        mse=mse(x_hat, x),
        psnr=psnr(x_hat, x),
        ssim=ssim(x_hat, x) if min(x.shape[2:]) >= WINDOW else None,
        exact=exact(x_hat, x, eps=given.eps) & found,
        pixel_exact=pixel_exact(x_hat, x) & found,
    )


def _successes(judged: _Judged) -> dict[str, Tensor]:
    """Which originals were recovered, by criterion; a failure is a success under none."""
    success = {"exact": judged.exact, "pixel_exact": judged.pixel_exact}
    for tau in THRESHOLDS:
        success[f"asr@{tau:g}"] = (judged.psnr >= tau) & judged.found
    if judged.ssim is not None:
        success["asr_ssim@0.5"] = (judged.ssim >= 0.5) & judged.found
    return success


def _per_image(
    given: _Given, judged: _Judged, nulls: Tensor, truth: Tensor | None, own: Tensor | None
) -> tuple[ImageScore, ...]:
    return tuple(
        ImageScore(
            candidate=m,
            mse=float(judged.mse[i]),
            psnr=float(judged.psnr[i]),
            ssim=None if judged.ssim is None else float(judged.ssim[i]),
            exact=bool(judged.exact[i]),
            pixel_exact=bool(judged.pixel_exact[i]),
            null_psnr=float(nulls[i]),
            label=None if truth is None or own is None or m is None else bool(own[m] == truth[i]),
        )
        for i, m in enumerate(given.matching.of_original)
    )


def _relative_errors(given: _Given) -> Tensor:
    """``(M, B)``: L2 distance over the norm of the original (black originals: the distance)."""
    norms = torch.linalg.vector_norm(given.x, dim=(1, 2, 3))
    scale = torch.where(norms > 0, norms, torch.ones_like(norms))
    return (given.cost * given.x[0].numel()).sqrt() / scale


@dataclass(frozen=True)
class _Nulls:
    """What an adversary without this update would have handed in."""

    scores: dict[str, Baseline]
    highest: Tensor
    """``(B,)``: the best PSNR of any of them on every original."""


def _nulls(
    given: _Given,
    truth: Tensor | None,
    public_labels: Tensor | None,
    others: Mapping[str, Tensor],
    generator: torch.Generator,
) -> _Nulls:
    x, public = given.x, given.public
    handed_in = {
        "mean_image": given.fallback.expand_as(x),
        "nearest_public": nearest_public(x, public),
    }
    if truth is not None and public_labels is not None:
        handed_in["same_class"] = random_same_class(
            truth, public, public_labels, generator=generator
        )
    for name, other in others.items():
        handed_in[name] = _matched(f"baselines[{name!r}]", other, x, given.fallback)
    return _Nulls(
        scores={name: _scored(image, x) for name, image in handed_in.items()},
        highest=torch.stack([psnr(image, x) for image in handed_in.values()]).amax(0),
    )


def _own_labels(claimed: Tensor | None, truth: Tensor | None, given: _Given) -> Tensor | None:
    """Labels ``(M,)`` that belong to single candidates, or None for a multiset."""
    if truth is None or claimed is None or len(given.candidates) == 0:
        return None
    return claimed if claimed.shape == given.candidates.shape[:1] else None


def _fits(name: str, images: Tensor, x: Tensor) -> None:
    if images.shape[1:] != x.shape[1:] or images.ndim != 4 or not images.is_floating_point():
        raise InvalidInput(
            f"score: {name} must be float images (M, {', '.join(map(str, x.shape[1:]))}) like the "
            f"originals, got {images.dtype} {tuple(images.shape)}."
        )


def _by_original(
    candidates: Tensor, matching: Assignment, fallback: Tensor, batch: int
) -> tuple[Tensor, Tensor]:
    """Candidates in the order of the originals, the fallback where there is none, and a mask."""
    x_hat = fallback.repeat(batch, 1, 1, 1)
    found = torch.zeros(batch, dtype=torch.bool, device=x_hat.device)
    for i, m in enumerate(matching.of_original):
        if m is not None:
            x_hat[i], found[i] = candidates[m], True
    return x_hat, found


def _true_labels(labels: Tensor | None, x: Tensor) -> Tensor | None:
    if labels is None:
        return None
    if labels.shape != x.shape[:1] or labels.is_floating_point():
        raise InvalidInput(
            f"score: labels must be {len(x)} integers, one an original, got {labels.dtype} "
            f"{tuple(labels.shape)}."
        )
    return labels.detach().long().cpu()


def _label_scores(
    truth: Tensor | None, claimed: Tensor | None, classes: int | None
) -> LabelScores | None:
    if truth is None or claimed is None:
        return None
    claimed = claimed.detach().cpu()
    if classes is None:
        classes = 1 + max(int(truth.max()), int(claimed.max()) if claimed.numel() else 0)
    return label_scores(
        label_metrics.counts_of(claimed, classes), label_metrics.counts_of(truth, classes)
    )


def _constrained(given: _Given, truth: Tensor | None, own: Tensor | None) -> float | None:
    """Mean PSNR if a candidate may only stand for an original of its own label."""
    if truth is None or own is None:
        return None
    allowed = own.detach().cpu()[:, None] == truth[None, :]
    matching = assign(given.cost, allowed=allowed)
    x_hat, _ = _by_original(given.candidates, matching, given.fallback, len(given.x))
    return float(psnr(x_hat, given.x).mean())


def _scored(x_hat: Tensor, x: Tensor) -> Baseline:
    return Baseline(
        psnr=float(psnr(x_hat, x).mean()),
        ssim=float(ssim(x_hat, x).mean()) if min(x.shape[2:]) >= WINDOW else None,
        mse=float(mse(x_hat, x).mean()),
    )


def _matched(name: str, other: Tensor, x: Tensor, fallback: Tensor) -> Tensor:
    """Another reconstruction in the order of the originals, by the same assignment."""
    _fits(name, other, x)
    finite = torch.isfinite(other).flatten(1).all(dim=1)
    usable = other.detach()[finite].to(x).clamp(0, 1)
    return _by_original(usable, assign(pairwise_mse(usable, x)), fallback, len(x))[0]


def _summary(
    values: Tensor, *, level: float, resamples: int, generator: torch.Generator
) -> Summary:
    def interval(statistic: Any) -> Interval:
        return bootstrap(
            values, generator=generator, statistic=statistic, level=level, resamples=resamples
        )

    return Summary(
        mean=float(values.mean()),
        median=float(row_median(values)),
        min=float(values.min()),
        max=float(values.max()),
        mean_interval=interval(row_mean),
        median_interval=interval(row_median),
    )


def _rate(hits: Tensor, level: float) -> Rate:
    successes, trials = int(hits.sum()), hits.numel()
    return Rate(
        value=successes / trials,
        successes=successes,
        trials=trials,
        interval=binomial(successes, trials, level=level),
    )
