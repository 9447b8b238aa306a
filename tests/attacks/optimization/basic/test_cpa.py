from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from leakatlas.attacks.optimization.basic import cpa
from leakatlas.attacks.optimization.basic.cpa import CPA
from leakatlas.bench import harness
from leakatlas.blocks import separation
from leakatlas.blocks.separation import Mixture, Negentropy, White
from leakatlas.blocks.watch import Watch
from leakatlas.errors import UnsupportedModel
from leakatlas.fl import FedAVG, Stage
from leakatlas.models import build
from leakatlas.threat import Vantage
from tests.attacks.case import Case
from tests.conftest import BOX, build_stage

WIDE = {"model": "fc", "settings": {"widths": (32,), "act": "relu"}}
CASE = Case({"steps": 3, "inversion_steps": 2}, WIDE, boxed=True)

SHAPE = (3, 8, 8)
FLAT = (1, 20, 25)
SHORT = CPA(steps=3, inversion_steps=2, scale="bias")


def noise(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def uniform(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(shape, generator=generator, dtype=torch.float64)


def laplace(*shape: int, seed: int = 0) -> Tensor:
    centred = uniform(*shape, seed=seed) - 0.5
    return -centred.sign() * torch.log1p(-2 * centred.abs())


def image_layer(h: int, d: int) -> Mixture:
    return Mixture("fc", nn.Linear(d, h).double(), True)


def wide(examples: int = 4, **changes: Any) -> Stage:
    return build_stage(**{**WIDE, "examples": examples, "letter": "B", **changes})


def mixed(stage: Stage) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient of the first layer, that of its bias, and the flat private inputs."""
    view, _ = harness.observe(stage, SHORT)
    g = view.update.tensors
    x = torch.cat([client.x for client in stage.federation.clients.values()])
    return g["hidden.1.weight"], g["hidden.1.bias"], x.flatten(1)


def correlation(found: Tensor, truth: Tensor) -> Tensor:
    """The largest |correlation| of every row of ``truth`` with a row of ``found``."""
    rows = [v - v.mean(1, keepdim=True) for v in (found, truth)]
    a, b = (v / v.norm(dim=1, keepdim=True) for v in rows)
    closeness: Tensor = a @ b.T
    return closeness.abs().amax(0)


# -- what the gradient of a linear layer says ------------------------------------------------------


def test_every_centred_input_lies_in_the_row_space_of_the_gradient() -> None:
    G, _, x = mixed(wide())
    centred = x - x.mean(1, keepdim=True)
    _, _, right = torch.linalg.svd(G - G.mean(1, keepdim=True), full_matrices=False)
    basis = right[:4]
    assert float((centred - centred @ basis.T @ basis).norm() / centred.norm()) < 1e-8


def test_with_more_examples_than_rows_inputs_stick_out_of_the_row_space() -> None:
    """Theory's failure: no unmixing of four rows gives six images, however it is found."""
    G, _, x = mixed(wide(6, settings={"widths": (4,), "act": "relu"}))
    centred = x - x.mean(1, keepdim=True)
    _, _, basis = torch.linalg.svd(G - G.mean(1, keepdim=True), full_matrices=False)
    residual = (centred - centred @ basis.T @ basis).norm(dim=1) / centred.norm(dim=1)
    assert float(residual.max()) > 0.1


def test_whitened_rows_have_unit_covariance_and_the_mean_comes_back() -> None:
    G = noise(32, 8) @ uniform(8, 500)
    white = separation.whiten(G, 8)
    covariance = white.Z @ white.Z.T / (G.shape[1] - 1)
    torch.testing.assert_close(covariance, torch.eye(8).double(), atol=1e-6, rtol=0)
    U = separation.unit_rows(noise(8, 8, seed=1))
    torch.testing.assert_close(U @ (white.Z + white.shift), U @ white.W @ G,
                               atol=1e-6, rtol=0)  # fmt: skip


def test_the_right_unmixing_and_the_bias_give_sign_and_scale() -> None:
    """Exact images from the oracle's unmixing matrix, whatever factor each of its rows has."""
    G, g_b, x = mixed(wide())
    W = separation.whiten(G, 4).W
    factors = torch.tensor([2.0, -0.5, 30.0, -1.0]).double()
    oracle = (factors[:, None] * x) @ torch.linalg.pinv(W @ G)
    images = cpa.as_images(oracle @ W @ G, oracle @ W @ g_b, "bias", BOX, SHAPE, x)
    assert float((images.flatten(1) - x).abs().max()) < 1e-6


def test_without_the_bias_rows_fill_the_pixel_range() -> None:
    rows = noise(4, 192)
    images = BOX.denormalize(cpa.as_images(rows, None, "bias", BOX, SHAPE, rows))
    torch.testing.assert_close(images.flatten(1).amin(1), torch.zeros(4).double())
    torch.testing.assert_close(images.flatten(1).amax(1), torch.ones(4).double())
    flipped = cpa.as_images(rows, -torch.ones(4).double(), "minmax", BOX, SHAPE, rows)
    torch.testing.assert_close(BOX.denormalize(flipped), 1 - images)


# -- what is minimised -----------------------------------------------------------------------------


def test_as_released_without_priors_nothing_moves() -> None:
    """Independence set to zero, as in the released code: the start is stationary."""
    white = separation.whiten(noise(32, 8) @ uniform(8, 500), 8)
    u = torch.eye(8, dtype=torch.float64).requires_grad_()
    released = CPA(negentropy="off", tv_weight=0)
    terms = released.terms(u, white, image_layer(32, 500), FLAT)
    total = torch.stack(list(terms.values())).sum()
    (slope,) = torch.autograd.grad(total, u)
    assert float(slope.abs().max()) < 1e-9 * float(total.detach())
    moving = replace(released, negentropy="fastica")
    term = moving.terms(u, white, image_layer(32, 500), FLAT)["negentropy"]
    (slope,) = torch.autograd.grad(term, u)
    assert float(slope.abs().max()) > 1e-6


@pytest.mark.parametrize(
    ("kind", "law", "separates"),
    [
        ("fastica", "uniform", True),
        ("fastica", "laplace", True),
        ("paper", "uniform", True),
        ("paper", "laplace", False),
    ],
)
def test_a_scan_of_rotations_finds_the_sources_or_the_mixture(
    kind: Negentropy, law: str, separates: bool
) -> None:
    """Two sources: the least objective lies at them, or halfway between."""
    S = (uniform if law == "uniform" else laplace)(2, 200_000)
    S = (S - S.mean(1, keepdim=True)) / S.std(1, keepdim=True)
    angles = torch.arange(0, 46, 5) * math.pi / 180
    values = []
    for angle in angles.tolist():
        c, s = math.cos(angle), math.sin(angle)
        rotated = torch.tensor([[c, -s], [s, c]]).double() @ S
        values.append(float(separation.negentropy(rotated, kind)))
    assert int(torch.tensor(values).argmin()) == (0 if separates else len(angles) - 1)


@pytest.mark.parametrize(
    ("kind", "law", "low", "high"),
    [
        ("fastica", "uniform", 0.99, 1.0),
        ("fastica", "laplace", 0.99, 1.0),
        ("paper", "uniform", 0.99, 1.0),
        ("paper", "laplace", 0.0, 0.95),
    ],
)
def test_independent_sources_are_separated(
    kind: Negentropy, law: str, low: float, high: float
) -> None:
    X = (uniform if law == "uniform" else laplace)(8, 3072, seed=3)
    white = separation.whiten(noise(32, 8, seed=4) @ X, 8)
    attack = CPA(steps=150, lr=0.05, negentropy=kind, negentropy_weight=1e3, tv_weight=0,
                 decorrelation=1.0, temperature=5.0)  # fmt: skip
    found = attack.separate(white, image_layer(32, 3072), (3, 32, 32), Watch())
    reached = correlation(separation.unit_rows(found.best["u"]) @ white.Z, X)
    assert low < float(reached.min()) <= high + 1e-12


def test_the_gaussian_reference_is_that_of_a_gaussian() -> None:
    grid = torch.linspace(-12, 12, 200_001, dtype=torch.float64)
    density = torch.exp(-grid.square() / 2) / math.sqrt(2 * math.pi)
    expected = torch.trapezoid(separation.log_cosh(grid) * density, grid)
    assert float(expected) == pytest.approx(separation.GAUSSIAN, abs=1e-7)
    assert float(separation.log_cosh(torch.tensor(1e4))) == pytest.approx(1e4 - math.log(2))


def test_signs_and_likeness_vanish_where_they_should() -> None:
    X = uniform(3, 20)
    assert float(separation.two_signs(X)) == 0 == float(separation.two_signs(-X))
    assert float(separation.two_signs(X - 0.5)) > 0
    identity = torch.eye(4).double()
    assert float(separation.alike(identity, 2.0)) == pytest.approx((math.exp(2.0) - 1) / 4)
    assert float(separation.alike(torch.ones(4, 4).double() / 2, 2.0)) > float(
        separation.alike(identity, 2.0)
    )


# -- the whole attack ------------------------------------------------------------------------------


def test_images_come_out_of_a_sum_over_clients_that_nobody_saw_alone() -> None:
    """Behind an aggregate; correlation with the originals far above that of the start."""
    stage = wide(2, clients=2, vantage=Vantage.AGGREGATE, size=16)
    attack = replace(CPA.tuned(), steps=300, lr=0.02)
    trial = harness.run_trial(stage, attack)
    assert len(trial.found.images) == 4
    assert BOX.contains(trial.found.images)
    truth = trial.truth.images.flatten(1).double()
    reached = correlation(trial.images.flatten(1), truth)
    begun = correlation(harness.run_trial(stage, SHORT).images.flatten(1), truth)
    assert float(reached.mean()) > 0.75
    assert float(reached.mean()) > float(begun.mean())


def test_more_examples_than_rows_is_hopeless_and_says_the_rank() -> None:
    stage = wide(6, settings={"widths": (4,), "act": "relu"})
    view, _ = harness.observe(stage, SHORT)
    assert SHORT.outlook(view).verdict == "hopeless"
    found = SHORT(view)
    assert found.status == "failed" and found.notes["rank"] == 4
    assert SHORT.outlook(harness.observe(wide(), SHORT)[0]).verdict == "applicable"


def test_local_steps_keep_the_inputs_in_the_rows() -> None:
    """Every step of SGD adds mixtures of the same inputs, so a FedAVG delta is one as well."""
    protocol = FedAVG(epochs=3, batch_size=2, lr=0.05)
    G, _, x = mixed(wide(protocol=protocol, letter="C"))
    white = separation.whiten(G, 4)
    centred = x - x.mean(1, keepdim=True)
    basis = white.Z / white.Z.norm(dim=1, keepdim=True)
    assert float((centred - centred @ basis.T @ basis).norm() / centred.norm()) < 1e-8


def test_a_convolutional_network_gives_embeddings_that_are_inverted() -> None:
    stage = build_stage(model="lenet", settings={"width": 8, "classes": 10}, examples=2, letter="B")
    view, _ = harness.observe(stage, SHORT)
    assert SHORT.outlook(view).verdict == "unknown"
    f = separation.features(view.model, separation.find_mixture(view.model, SHAPE).name)
    x = stage.federation.clients[0].x
    z = f(x).detach()
    attack = CPA(inversion_steps=150, inversion_tv=0.0)
    mixture = separation.find_mixture(view.model, SHAPE)
    generator = torch.Generator().manual_seed(0)
    end = attack.invert(z, mixture, view, generator, Watch())
    aligned = torch.nn.functional.cosine_similarity(z, f(end.best["x"]), dim=1)
    assert float(aligned.min().detach()) > 0.99
    found = replace(SHORT, match_weight=1.0)(view)
    assert found.labels is not None and found.status == "complete"
    assert SHORT(view).labels is None


def test_where_the_image_enters_is_found_on_a_copy() -> None:
    shape = (3, 8, 8)
    assert separation.find_mixture(build("fc", size=8), shape).reads_image
    assert not separation.find_mixture(build("lenet", size=8), shape).reads_image
    with pytest.raises(UnsupportedModel, match="one row an example"):
        separation.find_mixture(build("vit", size=8, patch=4), shape)
    with pytest.raises(UnsupportedModel, match="calls none"):
        separation.find_mixture(nn.Sequential(nn.Conv2d(3, 4, 8), nn.Flatten()), shape)


def test_white_is_what_the_weights_say() -> None:
    G = noise(16, 4) @ uniform(4, 300)
    white: White = separation.whiten(G, 4)
    torch.testing.assert_close(white.Z, white.W @ (G - G.mean(1, keepdim=True)))
    assert separation.numerical_rank(G, 1e-12, 4) == 4


def test_a_large_gradient_is_whitened_without_all_its_singular_vectors(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Above the noise that sending in single precision adds, both ways agree."""
    n = 6
    G = (noise(96, n) @ uniform(n, 400)).float().double()
    monkeypatch.setattr(separation, "LARGE", 1000)
    whole = separation.whiten(G, n)
    monkeypatch.setattr(separation, "LARGE", 50)
    assert separation.is_large(G, n)
    assert not separation.is_large(G, 20)
    state = torch.random.get_rng_state()
    few = separation.whiten(G, n)
    assert torch.equal(torch.random.get_rng_state(), state)
    for mine, theirs in ((few.Z, whole.Z), (few.W, whole.W), (few.shift, whole.shift)):
        torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=1e-8)
    assert torch.equal(separation.whiten(G, n).Z, few.Z)
    assert separation.numerical_rank(G, 1e-5, n) == n
    short = (noise(96, n - 1) @ uniform(n - 1, 400)).float().double()
    assert separation.numerical_rank(short, 1e-5, n) == n - 1
