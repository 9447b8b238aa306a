"""CGIR: the count identity, the condition, and what each of its stages is good for."""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest
import torch

from leakatlas.attacks.api import Reconstruction
from leakatlas.attacks.generative.latent import cgir
from leakatlas.attacks.generative.latent.cgir import CGIR, LATENT, Conditional
from leakatlas.bench import harness
from leakatlas.blocks import labels as rules
from leakatlas.data import ImageSet, bundled
from leakatlas.fl import Stage
from tests.attacks.case import LENET, Case
from tests.conftest import build_stage

CASE = Case({"coarse_steps": 2, "fine_steps": 2}, {**LENET, "size": 8}, boxed=True)

LABELS = (3, 7, 7, 3)


def _scene(dtype: torch.dtype = torch.float32) -> Stage:
    victims = ImageSet(
        bundled.photos(16).images[:4], torch.tensor(LABELS), tuple("0123456789"), "photos"
    )
    return build_stage(
        model="lenet", settings={"width": 6}, size=16, letter="B", examples=4, victims=victims,
        dtype=dtype,
    )  # fmt: skip


def test_the_counts_are_exact_given_the_true_probabilities() -> None:
    scene = _scene(torch.float64)
    view, _ = harness.observe(scene, CGIR())
    model = view.model.eval()
    x = scene.box.normalize(scene.victims[0].images.double())
    with torch.no_grad():
        p = rules.mean_probability(model(x))
    head = rules.find_head(view.model, x[:1])
    raw = rules.counts_from_bias(head.bias_grad(view.update.tensors), p, 4)
    expected = torch.bincount(torch.tensor(LABELS), minlength=10).double()
    assert torch.allclose(raw, expected, atol=1e-6)
    counted = cgir.count(view, model, x)
    assert counted is not None and counted.tolist() == sorted(LABELS)


def test_permuting_labels_with_latents_permutes_the_images() -> None:
    network = Conditional((3, 16, 16), 10, 0).double()
    draws = torch.Generator().manual_seed(0)
    z = torch.randn(4, LATENT, generator=draws, dtype=torch.float64)
    y, order = torch.tensor(LABELS), torch.tensor([2, 0, 3, 1])
    assert torch.allclose(network(z[order], y[order]), network(z, y)[order])
    assert not torch.allclose(network(z, y[order]), network(z, y), atol=1e-3)  # it is conditioned


@functools.cache
def _found(attack: CGIR) -> tuple[Reconstruction, float]:
    scene = _scene()
    trial = harness.run_trial(scene, attack)
    pixels, truth = trial.images.clamp(0, 1), trial.truth.images
    errors = (pixels[:, None] - truth[None]).square().flatten(2).mean(2)
    best = min(
        float(-10 * errors[torch.arange(4), torch.tensor(order)].log10().mean())
        for order in ((a, b, c, d) for a in range(4) for b in range(4) for c in range(4)
                      for d in range(4) if len({a, b, c, d}) == 4)
    )  # fmt: skip
    return trial.found, best


QUICK = CGIR(coarse_steps=80, fine_steps=80, fine_lr=3e-2)


def test_repeated_labels_are_counted_exactly() -> None:
    found, _ = _found(QUICK)
    assert found.labels is not None and sorted(found.labels.tolist()) == sorted(LABELS)


def test_the_fine_stage_starts_at_the_distance_at_which_the_coarse_one_ended() -> None:
    """With a step too small to move, the one iterate of the fine stage is what was handed over."""
    still = replace(QUICK, coarse_steps=20, fine_lr=1e-12)
    coarse, handed = (
        harness.run_trial(_scene(torch.float64), replace(still, fine_steps=n)).found.notes
        for n in (0, 1)
    )
    assert handed["matching_loss"] == pytest.approx(coarse["matching_loss"], rel=1e-9)


def test_the_fine_stage_ends_closer() -> None:
    coarse = _found(replace(QUICK, fine_steps=0))[0].notes["matching_loss"]
    assert _found(QUICK)[0].notes["matching_loss"] < coarse


def test_without_the_generator_it_ends_further_away() -> None:
    only = _found(replace(QUICK, coarse_steps=1))[0].notes["matching_loss"]
    assert _found(QUICK)[0].notes["matching_loss"] < only


def test_wrong_labels_hurt() -> None:
    wrong = _found(replace(QUICK, labels=(0, 1, 2, 4)))[0].notes["matching_loss"]
    assert wrong > 2 * _found(QUICK)[0].notes["matching_loss"]


def test_restarts_never_end_worse() -> None:
    short = replace(QUICK, coarse_steps=5, fine_steps=0)
    one, two = (_found(replace(short, restarts=r))[0].notes["matching_loss"] for r in (1, 2))
    assert two <= one


def test_no_public_image_is_read() -> None:
    found, _ = _found(replace(QUICK, coarse_steps=1, fine_steps=1))
    assert found.reads <= {"rounds", "num_examples", "input_shape", "classes", "box"}
