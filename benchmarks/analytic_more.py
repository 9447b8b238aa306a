"""Measures APRIL, SPEAR and MKOR on CIFAR-10 test images, and writes ``results/<key>.json``.

    python benchmarks/analytic_more.py [april april_positions spear mkor] --data TEST_PARQUET

Every trial has its own images and its own model seed. Candidates are assigned to originals one to
one (least squared error); an original without a candidate counts as not recovered.
"""

from __future__ import annotations

import argparse
import datetime
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from leakatlas.attacks.analytic.closed_form.april import (
    APRIL,
    find_front,
    label_of,
    solve_rows,
    token_system,
    tokens_of,
)
from leakatlas.attacks.analytic.closed_form.spear import SPEAR, expected_samples
from leakatlas.attacks.analytic.isolation.mkor import MKOR
from leakatlas.attacks.api import Attack
from leakatlas.bench.harness import Trial, observe, run_trial
from leakatlas.blocks import init, matching
from leakatlas.data import CIFAR10, Box, ImageSet, parquet
from leakatlas.fl import ModelRef, Scenario, stage, stream
from leakatlas.metrics import images as image_metrics
from leakatlas.metrics.assignment import assign, pairwise_mse
from leakatlas.metrics.intervals import binomial, bootstrap

EXACT = 1e-6
"""Root mean square error, in pixels of [0, 1], below which an image counts as exactly recovered."""

SEEDS = (0, 1, 2, 3, 4)


@dataclass(frozen=True)
class Outcome:
    """One trial, scored.

    Args:
        trial: What happened.
        rms: ``(N,)`` in pixels of [0, 1]; infinite for an original without a candidate.
        psnr: ``(N,)`` of clamped candidates; 0 dB for an original without one.
        seconds: Of the attack.
    """

    trial: Trial
    rms: Tensor
    psnr: Tensor
    seconds: float


def play(
    victims: ImageSet,
    attack: Attack,
    *,
    letter: str,
    model: str,
    settings: Mapping[str, Any],
    box: Box = CIFAR10,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> Outcome:
    """One attack on one client, FedSGD."""
    reference = ModelRef("builtin", model, {"size": 32, "classes": 10, "seed": seed, **settings})
    scenario = Scenario(model=reference, letter=letter, examples=len(victims), seed=seed)
    scene = stage(scenario, model=reference.build().to(dtype), victims=victims, box=box)
    begun = time.perf_counter()
    trial = run_trial(scene, attack, seed=seed)
    seconds = time.perf_counter() - begun
    truth, found = victims.images.double(), trial.images.double()
    rms = torch.full((len(truth),), torch.inf, dtype=torch.float64)
    psnr = torch.zeros(len(truth), dtype=torch.float64)
    if len(found):
        owners = assign(pairwise_mse(found.clamp(0, 1), truth)).of_original
        for original, candidate in enumerate(owners):
            if candidate is None:
                continue
            pair = found[candidate : candidate + 1], truth[original : original + 1]
            rms[original] = (pair[0] - pair[1]).square().mean().sqrt()
            psnr[original] = float(image_metrics.psnr(pair[0].clamp(0, 1), pair[1])[0])
    return Outcome(trial, rms, psnr, seconds)


# -- measures --------------------------------------------------------------------------------------


def mean(name: str, values: Tensor, unit: str, note: str) -> dict[str, Any]:
    """A mean with its bootstrap interval."""
    values = values.double()
    interval = bootstrap(values, generator=stream("benchmark", name))
    return measure(name, float(values.mean()), unit, list(interval), len(values), note)


def share(name: str, hits: Tensor, note: str) -> dict[str, Any]:
    """A rate with its binomial interval."""
    count = int(hits.sum())
    interval = binomial(count, len(hits))
    return measure(name, count / len(hits), "share", list(interval), len(hits), note)


def measure(
    name: str, value: float, unit: str, interval: list[float] | None, n: int, note: str
) -> dict[str, Any]:
    """One entry of a result."""
    return {
        "name": name, "value": value, "unit": unit, "interval": interval, "n": n, "note": note,
    }  # fmt: skip


# -- APRIL -----------------------------------------------------------------------------------------


def april(data: ImageSet) -> list[dict[str, Any]]:
    """Exact, lossy and refused architectures; the optimization form."""
    rows = []
    direct = {"first_block": "april"}
    cases: list[tuple[str, dict[str, Any], torch.dtype]] = [
        ("d = 96, float64", {**direct, "dim": 96}, torch.float64),
        ("d = 96, float32", {**direct, "dim": 96}, torch.float32),
        ("patch 8, d = 64 < 192 pixels", {**direct, "dim": 64, "patch": 8}, torch.float64),
        ("one block only, d = 96", {**direct, "dim": 96, "depth": 1}, torch.float64),
        ("usual pre-norm ViT", {"dim": 96}, torch.float64),
    ]  # fmt: skip
    for name, settings, dtype in cases:
        played = [
            play(data.subset([i]), APRIL(), letter="B", model="vit", settings=settings,
                 dtype=dtype, seed=i)
            for i in range(20)
        ]  # fmt: skip
        claimed = torch.tensor([p.trial.found.status == "complete" for p in played])
        note = f"32x32, {settings}, attack says complete in {int(claimed.sum())} of {len(played)}"
        rows.append(mean(f"psnr, {name}", torch.cat([p.psnr for p in played]), "dB", note))
        rows.append(share(f"exact, {name}", torch.cat([p.rms for p in played]) < EXACT, note))
        if settings.get("first_block") and len(played[0].trial.images):
            tokens = torch.tensor([token_error(p.trial) for p in played])
            rows.append(mean(f"largest token error, {name}", tokens, "", "relative to the largest"))
    for alpha in (0.0, 1.0):
        played = [
            play(data.subset([i]), APRIL(variant="optimization", steps=150, alpha=alpha),
                 letter="B", model="vit", settings={"dim": 96, "patch": 8}, dtype=torch.float32,
                 seed=i)
            for i in range(3)
        ]  # fmt: skip
        psnr = torch.cat([p.psnr for p in played])
        note = "usual pre-norm ViT, patch 8, d = 96, untrained, 150 steps: far from converged"
        rows.append(mean(f"psnr, optimization form, alpha = {alpha:g}", psnr, "dB", note))
    return rows


def april_positions(data: ImageSet) -> list[dict[str, Any]]:
    """Why the position term of the optimization form changes nothing, and what it does at weight.

    The squared distance holds the positions' gradient too, so the term adds no equation: it only
    weighs them more. How much, the two gradients towards the image say.
    """
    rows = []
    settings = {"dim": 96, "patch": 8}
    ratios, aligned = [], {"squared distance": [], "position term": []}  # type: ignore[var-annotated]
    for i in range(10):
        reference = ModelRef("builtin", "vit", {"size": 32, "classes": 10, "seed": i, **settings})
        scenario = Scenario(model=reference, letter="B", examples=1, seed=i)
        scene = stage(scenario, model=reference.build(), victims=data.subset([i]), box=CIFAR10)
        view, _ = observe(scene, APRIL(variant="optimization"))
        g, y, replay = dict(view.update.tensors), label_of(view), view.replayer()
        name = find_front(view.model, view.input_shape).positions
        x = init.normal(view.batch_shape, generator=stream("start", i), like=g[name])
        mine = replay(x.requires_grad_(), y)
        towards = (x - scene.box.normalize(scene.victims[0].images)).detach().flatten()
        size = {}
        for term, value in (
            ("squared distance", matching.squared_l2(mine, g)),
            ("position term", matching.subset(matching.cosine, [name])(mine, g)),
        ):
            (slope,) = torch.autograd.grad(value, x, retain_graph=True)
            size[term] = float(slope.norm())
            aligned[term].append(float(F.cosine_similarity(slope.flatten(), towards, dim=0)))
        ratios.append(size["squared distance"] / size["position term"])
    note = "pre-norm ViT, patch 8, d = 96, untrained, at the random start, 10 images"
    slopes = torch.tensor(ratios)
    rows.append(mean("slope of the squared distance over the position term's", slopes, "x", note))
    for term, values in aligned.items():
        name = f"cosine of the {term}'s slope with the way to the image"
        rows.append(mean(name, torch.tensor(values), "", note))
    for alpha in (0.0, 1e3, 1e4):
        played = [
            play(data.subset([i]), APRIL(variant="optimization", steps=200, alpha=alpha),
                 letter="B", model="vit", settings=settings, dtype=torch.float32, seed=i)
            for i in range(4)
        ]  # fmt: skip
        note = "pre-norm ViT, patch 8, d = 96, untrained, 200 steps, same starts for every alpha"
        psnr = torch.cat([p.psnr for p in played])
        rows.append(mean(f"psnr, alpha = {alpha:g}", psnr, "dB", note))
        if alpha == 0.0:
            without = psnr
        else:
            rows.append(mean(f"psnr gained, alpha = {alpha:g}", psnr - without, "dB", note))
    return rows


def token_error(trial: Trial) -> float:
    """Largest error of the tokens, over the largest token entry."""
    view = trial.view
    front = find_front(view.model, view.input_shape)
    x = view.box.normalize(trial.truth.images.double())
    z, _ = tokens_of(view.model.double().eval(), x)
    a, b = token_system(view, front)
    found = solve_rows(a.T, b, 1e-11 if view.model.fc.weight.dtype == torch.float64 else 1e-6).x  # type: ignore[union-attr]  # a ViT
    return float((found - z).abs().max() / z.abs().max())


# -- SPEAR -----------------------------------------------------------------------------------------


def spear(data: ImageSet) -> list[dict[str, Any]]:
    """The success curve over b and m, beside the expected number of row sets."""
    rows = []
    cases: list[tuple[str, int, int, Box, torch.dtype, int]] = [
        *(
            ("normalised", b, m, CIFAR10, torch.float64, 5)
            for b in (4, 8, 12)
            for m in (100, 200, 400)
        ),
        ("normalised", 14, 200, CIFAR10, torch.float64, 3),
        ("normalised", 14, 400, CIFAR10, torch.float64, 3),
        ("normalised", 16, 200, CIFAR10, torch.float64, 3),
        ("normalised", 16, 400, CIFAR10, torch.float64, 3),
        ("normalised", 18, 400, CIFAR10, torch.float64, 1),
        ("in [0, 1]", 4, 200, Box.unit(3), torch.float64, 3),
        ("in [0, 1]", 8, 200, Box.unit(3), torch.float64, 3),
        ("in [0, 1]", 8, 400, Box.unit(3), torch.float64, 3),
        ("normalised, float32", 8, 200, CIFAR10, torch.float32, 3),
        ("normalised, float32", 12, 400, CIFAR10, torch.float32, 3),
    ]
    for name, b, m, box, dtype, trials in cases:
        expected = expected_samples(b)
        attack = SPEAR(samples=max(100_000, int(6 * expected)), chunk=1_000 if b < 16 else 10_000)
        played = [
            play(data.subset(range(i * b, (i + 1) * b)), attack, letter="A", model="fc",
                 settings={"widths": (m,) * 5}, box=box, dtype=dtype, seed=i)
            for i in range(trials)
        ]  # fmt: skip
        found = [p.trial.found for p in played]
        certified = torch.tensor([f.status == "complete" for f in found])
        limit = EXACT if dtype == torch.float64 else 1e-4
        exact = torch.tensor([float(p.rms.max()) < limit for p in played])
        wrong = int((certified & ~exact).sum())
        where = f"b = {b}, m = {m}, {name}"
        note = (
            f"n = 3072, 6 layers, 2^(b-1) H_b = {expected:.3g} row sets expected, at most "
            f"{attack.samples} drawn; certified but inexact: {wrong}"
        )
        rows.append(share(f"batches recovered whole, {where}", certified & exact, note))
        drawn = torch.tensor([f.notes["samples"] for f in found])
        rows.append(mean(f"row sets drawn, {where}", drawn, "", f"in steps of {attack.chunk}"))
        ratio = drawn / expected
        rows.append(mean(f"row sets over theory, {where}", ratio, "", f"theory {expected:.4g}"))
        rows.append(
            mean(f"seconds, {where}", torch.tensor([p.seconds for p in played]), "s", "one thread")
        )
        if bool(exact.any()):
            rms = torch.cat([p.rms for p, ok in zip(played, exact, strict=True) if ok])
            rows.append(mean(f"rms error of the recovered, {where}", rms, "", "pixels of [0, 1]"))
    return rows


# -- MKOR ------------------------------------------------------------------------------------------


def by_class(data: ImageSet, classes: int, batch: int) -> ImageSet:
    """The ``batch``-th image of every class below ``classes``."""
    chosen = [int(torch.nonzero(data.labels == c).flatten()[batch]) for c in range(classes)]
    return data.subset(chosen)


def mkor(data: ImageSet) -> list[dict[str, Any]]:
    """Models from exact to bounded, one example a class, and the null baseline."""
    rows = []
    exact_lenet = {"width": 48}
    cases: list[tuple[str, str, dict[str, Any], int, MKOR, torch.dtype]] = [
        ("LeNet, 48 channels", "lenet", exact_lenet, 9, MKOR(), torch.float64),
        ("LeNet, 48 channels, float32", "lenet", exact_lenet, 9, MKOR(), torch.float32),
        ("LeNet, 12 channels", "lenet", {}, 9, MKOR(), torch.float64),
        ("LeNet-5", "lenet5", {}, 9, MKOR(), torch.float64),
        ("ConvNet", "convnet", {}, 9, MKOR(), torch.float64),
        ("ConvNet, unsmoothed", "convnet", {}, 9, MKOR(smoothing=0), torch.float64),
        ("VGG-16", "vgg16", {"hidden": (512, 512)}, 9, MKOR(), torch.float32),
        ("LeNet, 48 channels, all classes", "lenet", exact_lenet, 10, MKOR(), torch.float64),
        ("LeNet, 48 channels, all classes, sink", "lenet", exact_lenet, 10, MKOR(isolate="sink"),
         torch.float64),
    ]  # fmt: skip
    for name, model, settings, classes, attack, dtype in cases:
        played = [
            play(by_class(data, classes, i), attack, letter="F", model=model, settings=settings,
                 dtype=dtype, seed=i)
            for i in SEEDS
        ]  # fmt: skip
        note = f"{classes} of 10 classes, one image each, 32x32"
        rows.append(mean(f"psnr, {name}", torch.cat([p.psnr for p in played]), "dB", note))
        hits = torch.cat([p.rms for p in played]) < (EXACT if dtype == torch.float64 else 1e-3)
        rows.append(share(f"exact, {name}", hits, note))
        labels = torch.tensor(
            [
                (f := p.trial.found).label_counts is not None
                and f.label_counts.tolist() == [1] * classes + [0] * (10 - classes)
                for p in played
            ]
        )
        rows.append(share(f"label multiset right, {name}", labels, note))
        seconds = torch.tensor([p.trial.found.seconds for p in played])
        rows.append(mean(f"seconds of the read-out, {name}", seconds, "s", "one thread"))
    null = []
    for i in SEEDS:
        truth = by_class(data, 9, i).images.double()
        grey = data.images[500:].double().mean(dim=0).expand_as(truth)
        null.append(image_metrics.psnr(grey, truth).double())
    rows.append(mean("psnr, null: the mean of other images", torch.cat(null), "dB", "no attack"))
    return rows


STUDIES: dict[str, tuple[Callable[[ImageSet], list[dict[str, Any]]], type[Attack]]] = {
    "april": (april, APRIL),
    "april_positions": (april_positions, APRIL),
    "spear": (spear, SPEAR),
    "mkor": (mkor, MKOR),
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the studies that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("keys", nargs="*", metavar="KEY", help=f"{', '.join(STUDIES)}; all if none")
    parser.add_argument("--data", type=Path, required=True, help="test Parquet file of CIFAR-10")
    parser.add_argument("--results", type=Path, default=Path("results"))
    chosen = parser.parse_args(arguments)
    unknown = sorted(set(chosen.keys) - set(STUDIES))
    if unknown:
        parser.error(f"no study {unknown[0]!r}; there are {', '.join(STUDIES)}")
    torch.set_num_threads(1)
    data = parquet(chosen.data, limit=1_000)
    chosen.results.mkdir(parents=True, exist_ok=True)
    for key in chosen.keys or STUDIES:
        study, cls = STUDIES[key]
        result = {
            "schema": "leakatlas/result/1",
            "kind": "attack",
            "key": cls.key,
            "code_version": cls.version,
            "recipe": {"defaults": cls().to_json(), "data": "CIFAR-10 test, first 1,000 images"},
            "hardware": "2 CPU cores, no GPU",
            "seeds": list(range(20)) if key == "april" else list(SEEDS),
            "measures": study(data),
            "command": f"python benchmarks/analytic_more.py {key} --data CIFAR10_TEST_PARQUET",
            "date": datetime.date.today().isoformat(),
        }
        file = chosen.results / f"{key}.json"
        file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
