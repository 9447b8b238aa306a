"""GRNN: its two branches, its distance, and what it reaches on a LeNet."""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.func import functional_call

from leakatlas.attacks.api import Reconstruction
from leakatlas.attacks.generative.direct import grnn
from leakatlas.attacks.generative.direct.grnn import GRNN, INPUT, TwoBranches
from leakatlas.bench import harness
from leakatlas.data import bundled
from leakatlas.fl import Stage
from leakatlas.metrics import images as image_metrics
from tests.attacks.case import LENET, Case
from tests.conftest import build_stage

CASE = Case({"steps": 2}, {**LENET, "size": 8}, boxed=True)


def test_at_the_truth_nothing_differs() -> None:
    scene = build_stage(letter="B", examples=2)
    view, _ = harness.observe(scene, GRNN())
    x = scene.box.normalize(scene.victims[0].images.double())
    y = torch.nn.functional.one_hot(scene.victims[0].labels, 10).double()
    D = GRNN().measure(view.replay(x, y), view.update.tensors).detach()
    assert float(D) < 1e-9


def test_the_loss_does_not_see_the_order_of_pairs() -> None:
    view, _ = harness.observe(build_stage(letter="B", examples=3), GRNN())
    draws = torch.Generator().manual_seed(0)
    x = torch.randn(3, 3, 8, 8, generator=draws, dtype=torch.float64)
    y = torch.rand(3, 10, generator=draws, dtype=torch.float64).softmax(1)
    order = torch.tensor([2, 0, 1])
    a, b = view.replay(x, y), view.replay(x[order], y[order])
    assert all(torch.allclose(a[n], b[n], atol=1e-12) for n in a)
    apart = view.replay(x, y[order])  # pairs torn apart are another batch
    assert not all(torch.allclose(a[n], apart[n], atol=1e-4) for n in a)


def test_the_distance_is_the_squared_norm_and_the_norm() -> None:
    draws = torch.Generator().manual_seed(0)
    a, b = (
        {n: torch.randn(s, generator=draws, dtype=torch.float64) for n, s in (("w", 6), ("b", 3))}
        for _ in range(2)
    )
    flat = torch.cat([a[n] - b[n] for n in b])
    expected = flat.norm() ** 2 + flat.norm()
    assert float(GRNN().measure(a, b)) == pytest.approx(float(expected), rel=1e-5)


def test_sorted_entries_are_compared_as_samples_on_a_line() -> None:
    a, b = torch.tensor([3.0, 1.0, 2.0]), torch.tensor([2.0, 4.0, 3.0])
    assert float(grnn.sorted_distance(a, b)) == pytest.approx(3**0.5, rel=1e-5)
    assert float(grnn.sorted_distance(a, a.flip(0))) == pytest.approx(0, abs=1e-6)


def test_the_smoothness_term_is_that_of_the_released_code() -> None:
    x = torch.rand(2, 3, 4, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    down, across = torch.zeros(()), torch.zeros(())
    for image in x:
        for channel in image:
            for i in range(4):
                for j in range(5):
                    if i:
                        down = down + (channel[i, j] - channel[i - 1, j]) ** 2
                    if j:
                        across = across + (channel[i, j] - channel[i, j - 1]) ** 2
    expected = 2 * (down / (3 * 3 * 5) + across / (3 * 4 * 4)) / 2
    assert float(grnn.tv(x)) == pytest.approx(float(expected))


def test_the_network_has_the_published_size() -> None:
    network = TwoBranches((3, 32, 32), 10, seed=0)
    assert sum(p.numel() for p in network.parameters()) == pytest.approx(0.71e6, rel=0.01)
    pixels, y = network(torch.randn(2, INPUT))
    assert pixels.shape == (2, 3, 32, 32) and torch.allclose(y.sum(1), torch.ones(2))
    assert TwoBranches((1, 28, 28), 10, seed=0)(torch.randn(2, INPUT))[0].shape == (2, 1, 32, 32)
    assert TwoBranches((3, 4, 4), 10, seed=0)(torch.randn(2, INPUT))[0].shape == (2, 3, 8, 8)


def test_images_of_a_batch_share_its_statistics() -> None:
    network = TwoBranches((3, 8, 8), 10, seed=0)
    v = torch.randn(3, INPUT, generator=torch.Generator().manual_seed(0))
    assert not torch.allclose(network(v)[0][:2], network(v[:2])[0], atol=1e-4)
    assert not list(network.buffers())


def test_the_fixed_input_is_not_fitted(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor] = []
    original = functional_call

    def watched(module: torch.nn.Module, weights: dict[str, Tensor], args: tuple[Tensor]) -> object:
        if isinstance(module, TwoBranches):
            seen.append(args[0].clone())
        return original(module, weights, args)

    monkeypatch.setattr(grnn, "functional_call", watched)
    view, _ = harness.observe(build_stage(letter="B", model="lenet", dtype=torch.float32), GRNN())
    GRNN(steps=4)(view)
    assert len(seen) > 4 and all(torch.equal(v, seen[0]) for v in seen)


# -- what it reaches -----------------------------------------------------------------------------


def _scene() -> Stage:
    victims = bundled.photos(16).subset([0, 1])
    return build_stage(
        model="lenet", settings={"width": 6}, size=16, letter="B", examples=2,
        victims=type(victims)(victims.images, torch.tensor([3, 7]), tuple("0123456789"), "photos"),
        dtype=torch.float32,
    )  # fmt: skip


@functools.cache
def _reached(learn_labels: bool) -> tuple[Reconstruction, float]:
    scene, attack = _scene(), replace(GRNN(steps=300), learn_labels=learn_labels)
    trial = harness.run_trial(scene, attack)
    pixels = trial.images.clamp(0, 1)
    truth = trial.truth.images
    orders = (pixels, pixels.flip(0))
    return trial.found, max(float(image_metrics.psnr(p, truth).mean()) for p in orders)


def test_labels_are_exact_and_pictures_beat_the_mean_image() -> None:
    found, psnr = _reached(True)
    assert found.labels is not None and sorted(found.labels.tolist()) == [3, 7]
    truth = _scene().victims[0].images
    mean = bundled.patches(16, 64, part="surrogate").images.mean(0).expand_as(truth)
    assert psnr > float(image_metrics.psnr(mean, truth).mean()) + 1


def test_without_the_label_branch_it_is_worse() -> None:
    learned, frozen = _reached(True), _reached(False)
    assert frozen[0].notes["matching_loss"] > 5 * learned[0].notes["matching_loss"]
    assert frozen[1] < learned[1]


def test_the_defaults_are_the_published_ones() -> None:
    attack = GRNN()
    assert (attack.steps, attack.lr, attack.momentum, attack.tv_weight) == (1_000, 1e-4, 0.99, 1e-3)
