"""Labels by the factors of the head's gradient: exact on networks of any state, and certified."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from leakatlas import data, models
from leakatlas.blocks import labels
from leakatlas.blocks.labels import factors
from leakatlas.errors import InvalidInput


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def head_of(classes: int, features: int, *, sure: float = 1.0) -> tuple[Tensor, Tensor]:
    """A head; the larger its weights, the surer it is of what it says."""
    generator = seeded(3)
    W = sure * torch.randn(classes, features, generator=generator, dtype=torch.float64)
    return W, torch.randn(classes, generator=generator, dtype=torch.float64)


def gradient(W: Tensor, b: Tensor, h: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Of the mean loss, from its definition."""
    W, b = W.clone().requires_grad_(), b.clone().requires_grad_()
    of_weight, of_bias = torch.autograd.grad(F.cross_entropy(h @ W.T + b, y), (W, b))
    return of_weight, of_bias


def features(batch: int, width: int, seed: int = 0) -> Tensor:
    return torch.rand(batch, width, generator=seeded(seed), dtype=torch.float64)


@pytest.mark.parametrize("y", [[0], [2, 2], [0, 3, 3], [1, 1, 4, 5], [2, 2, 2, 2]])
@pytest.mark.parametrize("sure", [0.1, 1.0, 3.0])
def test_labels_are_exact_on_a_head_of_any_confidence(y: list[int], sure: float) -> None:
    W, b = head_of(7, 20, sure=sure)
    truth = torch.tensor(y)
    G, g = gradient(W, b, features(len(y), 20), truth)
    found = factors.factored(G, g, W, b, len(y), generator=seeded())
    right = torch.equal(found.counts, torch.bincount(truth, minlength=7))
    assert right or not found.settled
    # Where a head is surer still, descent may miss the features; then it says so.
    assert sure == 3.0 or (right and found.residual < 1e-9)


def test_the_slopes_are_those_of_finite_differences() -> None:
    W, b = head_of(5, 9)
    y = torch.tensor([0, 2, 4])
    problem = factors.Problem.of(*gradient(W, b, features(3, 9), y), W, b, 3)
    t = torch.randn(1, 3, 2, generator=seeded(1), dtype=torch.float64)
    one_hot = F.one_hot(y[None], 5).double()
    _, slopes = problem.explained(t, one_hot)
    for i in range(3):
        for q in range(2):
            step = torch.zeros_like(t)
            step[0, i, q] = 1e-6
            ahead, _ = problem.explained(t + step, one_hot)
            behind, _ = problem.explained(t - step, one_hot)
            torch.testing.assert_close(
                slopes[0, :, :, i, q], ((ahead - behind) / 2e-6)[0], atol=1e-7, rtol=1e-6
            )


def test_the_true_features_explain_the_gradient() -> None:
    """In the coordinates of the row space nothing is lost."""
    W, b = head_of(5, 9)
    h, y = features(3, 9), torch.tensor([0, 2, 4])
    G, g = gradient(W, b, h, y)
    problem = factors.Problem.of(G, g, W, b, 3)
    basis = torch.linalg.svd(torch.cat([G, g[:, None]], 1), full_matrices=False).Vh[:3].T
    m = torch.cat([h, torch.ones(3, 1, dtype=h.dtype)], 1) @ basis
    t = ((m - problem.origin) @ problem.along)[None]
    residual, _ = problem.explained(t, F.one_hot(y[None], 5).double())
    assert float(residual.abs().max()) < 1e-12


def test_the_bias_gradient_says_which_label_sets_are_allowed() -> None:
    W, b = head_of(6, 9)
    y = torch.tensor([1, 1, 3])
    _, g = gradient(W, b, features(3, 9), y)
    rows = factors.allowed(g, 3)
    naive = [
        sorted(row)
        for row in torch.cartesian_prod(*[torch.arange(6)] * 3).tolist()
        if bool((torch.bincount(torch.tensor(row), minlength=6) >= -3 * g - 1e-3).all())
    ]
    assert sorted(rows.tolist()) == sorted([*map(list, {tuple(row) for row in naive})])
    assert [1, 1, 3] in rows.tolist()


@pytest.mark.parametrize("spoilt", ["noise", "pruned", "scaled"])
def test_what_is_no_gradient_of_one_step_does_not_settle(spoilt: str) -> None:
    W, b = head_of(7, 20)
    G, g = gradient(W, b, features(3, 20), torch.tensor([0, 3, 5]))
    if spoilt == "noise":
        G = G + 0.05 * G.abs().mean() * torch.randn(G.shape, generator=seeded(1), dtype=G.dtype)
    elif spoilt == "pruned":
        G = torch.where(G.abs() > G.abs().median(), G, torch.zeros_like(G))
    else:
        G, g = 0.5 * G, 0.5 * g
    assert not factors.factored(G, g, W, b, 3, generator=seeded()).settled


def test_what_the_rank_cannot_tell_is_refused() -> None:
    W, b = head_of(4, 20)
    G, g = gradient(W, b, features(4, 20), torch.tensor([0, 1, 2, 3]))
    with pytest.raises(InvalidInput, match="up to 3 samples at a head of 4 classes"):
        factors.factored(G, g, W, b, 4, generator=seeded())
    with pytest.raises(InvalidInput, match="shows no label"):
        factors.factored(0 * G, 0 * g, W, b, 2, generator=seeded())
    many, bias = head_of(100, 20)
    G, g = gradient(many, bias, features(4, 20), torch.tensor([0, 1, 2, 3]))
    with pytest.raises(InvalidInput, match=r"more than 5,000 sets"):
        factors.allowed(0 * g, 4)


def test_a_trained_network_in_float32_where_fixed_rules_fail() -> None:
    """Crops, labelled as the network believes: the fixed rule reads few sets, this one all."""
    model = models.build("convnet")
    model.load_state_dict(models.load_weights("convnet-cifar10"))
    model.eval()
    x = data.CIFAR10.normalize(data.patches(32, 64, part="surrogate").images)
    head = labels.find_head(model, x[:1])
    held = dict(model.named_parameters())
    W, b = held[head.weight_name], held[str(head.bias_name)]
    by_rule = {"factored": 0, "uniform": 0}
    for seed in range(6):
        chosen = torch.randperm(len(x), generator=seeded(seed))[:4]
        beliefs = model(x[chosen]).detach().softmax(1)
        y = torch.multinomial(beliefs, 1, generator=seeded(seed)).flatten()
        G, g = torch.autograd.grad(F.cross_entropy(model(x[chosen]), y), (W, b))
        wanted = torch.bincount(y, minlength=10)
        found = factors.factored(G, g, W, b, 4, generator=seeded())
        assert not found.settled or torch.equal(found.counts, wanted)
        by_rule["factored"] += torch.equal(found.counts, wanted)
        by_rule["uniform"] += torch.equal(labels.uniform_counts(g, 4), wanted)
    assert by_rule["factored"] == 6 >= by_rule["uniform"] + 2
