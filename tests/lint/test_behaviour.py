"""The checks on the client's own batch: per-example gradients, activations, dynamics."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from leakatlas import models
from leakatlas.errors import InvalidInput
from leakatlas.lint import Score, behaviour
from leakatlas.lint.behaviour import Batch


def a_batch(n: int = 6, size: int = 8, classes: int = 10) -> Batch:
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(n, 3, size, size, generator=generator, dtype=torch.float64)
    return Batch(x, torch.arange(n) % classes)


def one(scores: list[Score], statistic: str) -> Score:
    found = [score for score in scores if score.statistic == statistic]
    assert len(found) == 1
    return found[0]


class Branching(nn.Module):
    """Control flow on values, which cannot be mapped over examples."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3 * 64, 10)

    def forward(self, x: Tensor) -> Tensor:
        z: Tensor = self.fc(x.flatten(1))
        return z if float(x.sum()) > 1e9 else 2 * z


@pytest.mark.parametrize("model", ["convnet-bn", "fc", "vit", "branching"])
def test_row_norms_are_those_of_one_gradient_at_a_time(model: str) -> None:
    settings: dict[str, dict[str, Any]] = {
        "convnet-bn": {"width": 2}, "fc": {"widths": (12,)}, "vit": {"dim": 8},
    }  # fmt: skip
    net = (
        Branching() if model == "branching" else models.build(model, size=8, **settings[model])
    ).double()
    batch = a_batch()
    found = behaviour.row_norms(net, batch)
    assert net.training
    net.eval()
    weights = {n: p for n, p in net.named_parameters() if p.dim() > 1}
    assert set(found) == set(weights)
    for i in range(len(batch.x)):
        loss = F.cross_entropy(net(batch.x[i : i + 1]), batch.y[i : i + 1])
        for name, g in zip(weights, torch.autograd.grad(loss, [*weights.values()]), strict=True):
            assert torch.allclose(found[name][i], g.flatten(1).norm(dim=1), atol=1e-12)


def test_logits_must_be_logits() -> None:
    with pytest.raises(InvalidInput, match="must return logits"):
        behaviour.logits_of(nn.Conv2d(3, 2, 3), torch.zeros(2, 3, 8, 8))
    with pytest.raises(InvalidInput, match="cannot read the batch of shape"):
        behaviour.logits_of(models.build("lenet"), torch.zeros(2, 1, 8, 8))
    broken = nn.Sequential(nn.Flatten(), nn.Linear(12, 2))
    broken.get_parameter("1.weight").data.fill_(math.inf)
    with pytest.raises(InvalidInput, match="not finite"):
        behaviour.logits_of(broken, torch.ones(2, 3, 2, 2))


def test_d7_is_the_confidence_of_wrong_predictions() -> None:
    logits = torch.tensor([[9.0, 0], [0, 9.0], [9.0, 0], [0, 0.1]])
    sure = float(torch.sigmoid(torch.tensor(9.0)))
    right = behaviour.d7_saturation(logits, torch.tensor([0, 1, 0, 1]))
    assert one(right, "D7/saturation").value == 0
    wrong = behaviour.d7_saturation(logits, torch.tensor([1, 0, 0, 1]))
    assert one(wrong, "D7/saturation").value == pytest.approx(sure / 2)
    assert behaviour.d7_saturation(logits[:3], torch.zeros(3, dtype=torch.int64)) == []


def test_d8_is_the_d_snr_of_the_definition() -> None:
    # Norms 3, 1, 1, 1 in one tensor and equal ones in another.
    norms = {
        "a.weight": torch.tensor([[3.0, 0], [0, 1], [0.6, 0.8], [1, 0]]),
        "b.weight": torch.ones(4, 2),
    }
    found = one(behaviour.d8_d_snr(norms), "D8/d_snr")
    assert found.place == "a" and found.value == pytest.approx(0.5) and "D-SNR 1" in found.words
    lone = {"a.weight": torch.tensor([[1.0], [0], [0], [0]])}
    assert behaviour.d8_d_snr(lone)[0].value == 1
    assert behaviour.d8_d_snr({"a.weight": torch.zeros(4, 1)}) == []


def test_d9_counts_neurons_that_answer_to_one_example() -> None:
    rows = torch.zeros(8, 5)
    rows[0, 0] = 1.0  # alone
    rows[:2, 1] = 1.0  # two examples
    rows[:, 2] = 1.0  # everyone
    rows[3, 3] = 1e-9  # rounding
    found = behaviour.d9_activations({"h.weight": rows}, frozenset({"h.weight"}))
    assert one(found, "D9/alone").value == pytest.approx(1 / 3)
    assert "1 of 3 active neurons" in found[0].words and "(2 to none, 1 to all)" in found[0].words
    assert behaviour.d9_activations({"fc.weight": rows}, frozenset()) == []


def test_d10_sees_empty_rows_and_blocks_of_columns() -> None:
    g = torch.zeros(10, 100)
    g[0, 60:] = 2.0
    g[1, 60:] = 1.0
    found = behaviour.d10_gradient_sparsity({"h.weight": g})
    assert one(found, "D10/zero_rows").value == pytest.approx(0.8)
    assert one(found, "D10/zero_columns").value == pytest.approx(0.6)
    assert one(found, "D10/top_row").value == pytest.approx(0.8)
    assert one(found, "D10/rank").value == pytest.approx(1)


def test_effective_rank() -> None:
    assert behaviour.effective_rank(torch.eye(7)) == pytest.approx(7)
    assert behaviour.effective_rank(torch.ones(7, 9)) == pytest.approx(1)


def test_d11_measures_jumps_beyond_chance() -> None:
    even = torch.zeros(4, 10)
    y = torch.zeros(4, dtype=torch.int64)
    wrong = even.clone()
    wrong[:, 1] = 100.0
    same = behaviour.d11_dynamics(even, even, y, 1.0, 1.0)
    assert one(same, "D11/loss").value == 0 and one(same, "D11/gradient").value == 0
    jump = behaviour.d11_dynamics(wrong, even, y, 100.0, 1.0)
    assert one(jump, "D11/loss").value > 0.98
    assert one(jump, "D11/gradient").value == pytest.approx(math.log(100) / (1 + math.log(100)))
    from_nothing = behaviour.d11_dynamics(even, even, y, 1.0, 0.0)
    assert [score.statistic for score in from_nothing] == ["D11/loss"]


def test_the_size_of_a_gradient_is_that_of_any_rescaled_network() -> None:
    weights = {"0.weight": torch.ones(3, 2), "0.bias": torch.ones(3), "2.weight": torch.ones(1, 3)}
    gradient = {name: 0.5 * w for name, w in weights.items()}
    plain = behaviour.relative_size(gradient, weights)
    assert plain == pytest.approx(0.5 * math.sqrt(6**2 + 3**2 + 3**2))
    s = {"0.weight": 1e25, "0.bias": 1e25, "2.weight": 1e-25}
    scaled = {n: w * s[n] for n, w in weights.items()}
    inverse = {n: g / s[n] for n, g in gradient.items()}
    assert behaviour.relative_size(inverse, scaled) == pytest.approx(plain)
