from __future__ import annotations

import itertools

import pytest
import torch

from leakatlas import models
from leakatlas.defenses.heuristic.perturbation.grad_defense import (
    GradDefense,
    denoised,
    drowned,
    equal_slices,
    released_slices,
    sensitivity,
)
from leakatlas.errors import InvalidParameter
from leakatlas.fl import FedAVG, FedSGD, Protocol
from leakatlas.threat import Grant
from tests.conftest import build_stage, relative_error
from tests.defenses.heuristic.probes import observed, readout_error, replayed

ROUNDS: dict[str, Protocol] = {
    "fedsgd": FedSGD(), "fedavg": FedAVG(epochs=2, batch_size=2, lr=0.1)
}  # fmt: skip
SECRET = frozenset({Grant.LABELS, Grant.DEFENSE_SECRETS})


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("slices", [1, 3, 10])
def test_slices_cover_everything_once_and_hold_equal_sensitivity(slices: int) -> None:
    sizes, found = [300, 4, 1200, 50], [1.0, 0.2, 3.0, 0.05]
    spans = equal_slices(sizes, found, slices)
    assert [spans[0][0], spans[-1][1]] == [0, sum(sizes)]
    assert all(a[1] == b[0] for a, b in itertools.pairwise(spans))
    share = torch.cat([torch.full((n,), s / n) for n, s in zip(sizes, found, strict=True)])
    totals = [float(share[a:b].sum()) for a, b in spans]
    assert max(totals) - min(totals) <= 2 * float(share.max()) + 1e-6


def test_without_any_sensitivity_slices_are_equally_long() -> None:
    assert equal_slices([6, 6], [0.0, 0.0], 3) == [(0, 4), (4, 8), (8, 12)]


def test_released_slices_share_their_borders() -> None:
    spans = released_slices([20, 20, 21], [1.0, 1.0, 1.0], 3)
    assert all(a[1] == b[0] + 1 for a, b in itertools.pairwise(spans))
    assert spans[-1][1] == 61
    # One layer holds nearly everything: the last slice takes all that is left.
    crowded = released_slices([20, 20], [100.0, 1.0], 4)
    assert crowded[-1][1] - crowded[-1][0] > 20


def test_sensitivity_is_the_norm_of_the_vector_jacobian_product() -> None:
    model = models.build("lenet", size=8, width=4).double()
    x, y = torch.rand(2, 3, 8, 8).double(), torch.tensor([1, 2])
    names = [name for name, _ in model.named_parameters()]
    found = sensitivity(model, names, x, y, torch.nn.functional.cross_entropy)
    step = 1e-5

    def total(x: torch.Tensor, name: str) -> float:
        loss = torch.nn.functional.cross_entropy(model(x), y)
        (g,) = torch.autograd.grad(loss, [dict(model.named_parameters())[name]])
        return float(g.sum())

    name = names[0]
    slope = torch.zeros_like(x)
    for place in range(0, x.numel(), 7):  # finite differences of every seventh pixel
        ends = []
        for sign in (1, -1):
            moved = x.clone()
            moved.view(-1)[place] += sign * step
            ends.append(total(moved, name))
        slope.view(-1)[place] = (ends[0] - ends[1]) / (2 * step)
    seen = slope != 0
    leaves = x.clone().requires_grad_()
    loss = torch.nn.functional.cross_entropy(model(leaves), y)
    (g,) = torch.autograd.grad(loss, [dict(model.named_parameters())[name]], create_graph=True)
    (whole,) = torch.autograd.grad(g.sum(), leaves)
    torch.testing.assert_close(slope[seen], whole[seen], rtol=1e-4, atol=1e-8)
    assert found[0] == pytest.approx(float(whole.flatten(1).norm(dim=1).mean()))
    assert found[-1] == pytest.approx(0, abs=1e-12)  # errors of a softmax sum to zero


@pytest.mark.parametrize("protocol", ROUNDS.values(), ids=ROUNDS)
def test_unselected_slices_are_bitwise_unchanged(protocol: Protocol) -> None:
    def sent(*defenses: GradDefense) -> torch.Tensor:
        stage = build_stage(model="lenet", protocol=protocol, defenses=defenses)
        tensors = stage.federation.play_round().updates[0].tensors
        return torch.cat([t.flatten() for t in tensors.values()])

    plain, noisy = sent(), sent(GradDefense(scale=0.1))
    changed = plain != noisy
    assert 0 < int(changed.sum()) < len(plain)
    runs = int((changed[1:] != changed[:-1]).sum())
    assert runs <= 2 * 5  # five slices of consecutive entries
    spread = float((noisy - plain)[changed].std())
    assert spread == pytest.approx(0.1, rel=0.15)


def test_compensation_keeps_a_matrix_of_rank_one_and_removes_pure_noise() -> None:
    rank_one = (draw(60, 1) @ draw(1, 10, seed=1)).flatten()
    torch.testing.assert_close(denoised(rank_one, 1e-6, 6.0), rank_one)
    noise = draw(6000)
    assert float(denoised(noise, 1.0, 6.0).norm() / noise.norm()) < 0.4
    assert float(denoised(noise, 25.0, 6.0).norm() / noise.norm()) > 0.99  # another's band


def test_compensation_takes_any_number_of_entries() -> None:
    for size in (1, 7, 601):
        assert denoised(draw(size), 1e-9, 6.0).shape == (size,)
    for size in (7, 601):
        assert denoised(draw(size), 1e-9, 6.0, as_released=True).shape == (size,)


def test_the_server_brings_the_mean_nearer_to_the_truth() -> None:
    """Noise of K clients, as large as the entries of a mean of low rank."""
    signal = (draw(240, 2, seed=2) @ draw(2, 40, seed=3)).flatten()
    noisy = signal + draw(len(signal), seed=4)
    kept = denoised(noisy, 1.0, 6.0)
    assert float((kept - signal).norm()) < 0.6 * float((noisy - signal).norm())


def test_noise_is_found_where_it_drowns_the_update_and_nowhere_else() -> None:
    clean = 1e-4 * draw(640, seed=5)
    clean[:64] = draw(64, seed=6)  # large entries: noise is nothing there
    noisy = clean.clone()
    noisy[64:320] += 0.1 * draw(256, seed=7)
    found = drowned(noisy, 0.1)
    assert bool(found[64:320].all())
    assert not bool(found[:64].any())
    assert not bool(found[320:].any())


def test_the_very_noise_makes_the_true_batch_an_exact_zero() -> None:
    defense = GradDefense(scale=0.05)
    view, x = observed(defense, grants=SECRET)
    assert relative_error(replayed(view, x), view.update.tensors) < 1e-9
    assert relative_error(replayed(view, x, adaptive=False), view.update.tensors) > 0.05


def test_without_it_the_residual_is_the_noise_that_is_not_found() -> None:
    defense = GradDefense(scale=0.05)
    view, x = observed(defense)
    g = view.update.tensors

    def residual(adaptive: bool) -> float:
        own = replayed(view, x, adaptive=adaptive)
        return sum(float((own[n] - t).square().sum()) for n, t in g.items())

    assert 0 < residual(True) < residual(False)


def test_the_readout_is_as_wrong_as_the_noise() -> None:
    assert readout_error(GradDefense(scale=0)) < 1e-9
    assert readout_error(GradDefense(scale=0.1, perturbed=10)) > 0.05


def test_more_slices_than_there_are_cannot_be_perturbed() -> None:
    with pytest.raises(InvalidParameter, match="more slices"):
        GradDefense(slices=3, perturbed=4)
