"""Counts without the head's gradient: exact where theory says so, refused or wrong where it does.

Networks are in float64; the head's gradient is taken out of every update before the rule sees it.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from leakatlas import models
from leakatlas.blocks import labels
from leakatlas.blocks.labels import METHODS, Bridge, Evidence
from leakatlas.errors import InvalidInput, NotGranted, UnsupportedModel
from leakatlas.metrics import counts_of, irec


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def network(activation: nn.Module, classes: int = 5, width: int = 16, *, bias: bool = True,
            deep: bool = False) -> nn.Sequential:  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        above = [nn.Linear(width, width), activation] if deep else []
        return nn.Sequential(
            nn.Linear(12, width, bias=bias), activation, *above, nn.Linear(width, classes)
        ).double()


def inputs(n: int, seed: int = 0) -> Tensor:
    return torch.randn(n, 12, generator=seeded(seed), dtype=torch.float64)


def update(model: nn.Module, x: Tensor, y: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """What is sent with the head withheld, and the head's bias gradient that was not."""
    head = labels.find_head(model, x[:1])
    found = torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters()))
    whole = dict(zip(dict(model.named_parameters()), found, strict=True))
    assert head.bias_name is not None
    hidden = whole.pop(head.bias_name)
    del whole[head.weight_name]
    return whole, hidden


def bridge_of(model: nn.Module, auxiliary: Tensor, shared: dict[str, Tensor]) -> Bridge:
    head = labels.find_head(model, auxiliary[:1])
    return labels.build_bridge(model, head, auxiliary, shared=shared)


def logit_gradient(sent: dict[str, Tensor], bridge: Bridge) -> Tensor:
    return labels.logit_gradient(labels.output_gradient(sent, bridge), bridge.jacobian)


@pytest.mark.parametrize("deep", [False, True])
def test_an_affine_network_gives_the_hidden_bias_gradient_exactly(deep: bool) -> None:
    model = network(nn.Identity(), deep=deep)
    sent, hidden = update(model, inputs(9), torch.tensor([0, 0, 1, 2, 2, 2, 2, 4, 4]))
    bridge = bridge_of(model, inputs(3, seed=7), sent)  # any auxiliary inputs at all
    torch.testing.assert_close(logit_gradient(sent, bridge), hidden, rtol=0, atol=1e-12)


@pytest.mark.parametrize("activation", [nn.ReLU(), nn.Sigmoid(), nn.Tanh(), nn.GELU()])
def test_one_example_is_exact_if_its_own_derivative_is_known(activation: nn.Module) -> None:
    model, x = network(activation), inputs(1)
    for label in range(5):
        sent, hidden = update(model, x, torch.tensor([label]))
        bridge = bridge_of(model, x, sent)
        torch.testing.assert_close(logit_gradient(sent, bridge), hidden, rtol=0, atol=1e-10)
        raw = labels.gdbr(sent, bridge, 1)
        torch.testing.assert_close(raw, F.one_hot(torch.tensor(label), 5).double(), rtol=0,
                                   atol=1e-10)  # fmt: skip


def test_the_bridge_is_weights_times_mean_derivatives() -> None:
    model, auxiliary = network(nn.Sigmoid()), inputs(50, seed=3)
    sent, _ = update(model, inputs(2), torch.tensor([0, 1]))
    bridge = bridge_of(model, auxiliary, sent)
    first, head = model[0], model[2]
    assert isinstance(first, nn.Linear) and isinstance(head, nn.Linear)
    s = first(auxiliary).sigmoid()
    expected = head.weight * (s * (1 - s)).mean(dim=0)
    torch.testing.assert_close(bridge.jacobian, expected.detach())
    assert bridge.layer == "0" and bridge.bias_name == "0.bias"
    torch.testing.assert_close(bridge.mean_probability, model(auxiliary).softmax(1).mean(0))


def test_independence_is_an_assumption_a_nonlinear_batch_breaks_it() -> None:
    model = network(nn.ReLU())
    x, y = inputs(9), torch.tensor([0, 0, 1, 2, 2, 2, 2, 4, 4])
    sent, hidden = update(model, x, y)
    own = bridge_of(model, x, sent)  # even with the batch's own mean derivatives
    assert float((logit_gradient(sent, own) - hidden).abs().max()) > 1e-3


def test_counts_of_an_untrained_network_beat_the_even_spread() -> None:
    model, total, even = network(nn.ReLU(), width=64), 0.0, 0.0
    for seed in range(12):
        y = torch.randint(0, 5, (8,), generator=seeded(seed))
        sent, _ = update(model, inputs(8, seed=100 + seed), y)
        bridge = bridge_of(model, inputs(300, seed=5_000), sent)
        found = labels.recover(
            "gdbr",
            Evidence(
                gradients=sent, head=labels.find_head(model), batch_size=8, bridge=bridge
            ),
        )  # fmt: skip
        total += irec(labels.as_counts(found), counts_of(y, 5)) / 12
        even += irec(labels.round_counts(torch.zeros(5), 8), counts_of(y, 5)) / 12
    assert total > even + 0.15


def test_more_classes_than_a_narrow_layer_can_carry_are_refused() -> None:
    x, y = inputs(4), torch.tensor([0, 1, 2, 3])
    narrow = network(nn.Identity(), classes=9, width=7)  # 8 unknowns, 7 equations
    sent, _ = update(narrow, x, y)
    with pytest.raises(UnsupportedModel, match=r"need 8 independent equations.*give 7"):
        logit_gradient(sent, bridge_of(narrow, x, sent))
    enough = network(nn.Identity(), classes=8, width=7)
    sent, hidden = update(enough, x, y)
    torch.testing.assert_close(
        logit_gradient(sent, bridge_of(enough, x, sent)), hidden, rtol=0, atol=1e-10
    )


def test_dead_units_carry_nothing() -> None:
    model = network(nn.ReLU())
    first = model[0]
    assert isinstance(first, nn.Linear)
    with torch.no_grad():
        first.bias[3:] = -1e3  # three live units for four unknowns
    sent, _ = update(model, inputs(4), torch.tensor([0, 1, 2, 3]))
    with pytest.raises(UnsupportedModel, match="derivatives that vanish"):
        logit_gradient(sent, bridge_of(model, inputs(40, seed=1), sent))


def test_a_layer_without_bias_is_read_through_its_mean_input() -> None:
    model = network(nn.Identity(), bias=False)
    x = inputs(1).expand(6, 12)  # equal inputs: the weight gradient is an exact outer product
    sent, hidden = update(model, x, torch.tensor([0, 1, 1, 3, 3, 3]))
    bridge = bridge_of(model, x[:1], sent)
    assert bridge.bias_name is None
    torch.testing.assert_close(logit_gradient(sent, bridge), hidden, rtol=0, atol=1e-10)
    centred = torch.stack([x[0], -x[0]])
    with pytest.raises(UnsupportedModel, match="mean input is zero"):
        logit_gradient(sent, bridge_of(model, centred, sent))


def test_convolutions_sum_over_positions() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(3, 6, 3, padding=1), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(96, 4)
        ).double()
    x = torch.rand(7, 3, 8, 8, generator=seeded(), dtype=torch.float64)
    sent, hidden = update(model, x, torch.tensor([0, 0, 0, 1, 2, 3, 3]))
    bridge = bridge_of(model, x[:2], sent)
    torch.testing.assert_close(logit_gradient(sent, bridge), hidden, rtol=0, atol=1e-10)
    without = {n: g for n, g in sent.items() if n != "0.bias"}
    with pytest.raises(UnsupportedModel, match="nothing to build a bridge on"):
        bridge_of(model, x[:2], without)


def test_a_normalisation_stands_in_for_a_convolution_without_bias() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6), nn.AvgPool2d(6), nn.Flatten(),
            nn.Linear(6, 4),
        ).double().eval()  # fmt: skip
    x = torch.rand(7, 3, 8, 8, generator=seeded(), dtype=torch.float64)
    sent, hidden = update(model, x, torch.tensor([0, 0, 0, 1, 2, 3, 3]))
    bridge = bridge_of(model, x[:2], sent)
    assert (bridge.layer, bridge.bias_name) == ("1", "1.bias")
    torch.testing.assert_close(logit_gradient(sent, bridge), hidden, rtol=0, atol=1e-10)


def test_a_transformers_last_normalisation_gives_the_head_away_exactly() -> None:
    vit = models.build("vit", size=8, dim=16, depth=1, classes=4).double()
    x = torch.rand(5, 3, 8, 8, generator=seeded(), dtype=torch.float64)
    sent, hidden = update(vit, x, torch.tensor([0, 1, 1, 3, 3]))
    bridge = bridge_of(vit, torch.zeros_like(x[:1]), sent)  # any auxiliary input does
    torch.testing.assert_close(logit_gradient(sent, bridge), hidden, rtol=0, atol=1e-10)


def test_the_model_is_left_as_it_was_and_nothing_below_the_head_is_refused() -> None:
    model = nn.Sequential(network(nn.ReLU()), nn.Dropout(0.5), nn.Linear(5, 3)).double().train()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    sent, _ = update(model.eval(), inputs(2), torch.tensor([0, 1]))
    model.train()
    state = torch.get_rng_state()
    first, again = (bridge_of(model, inputs(5, seed=2), sent) for _ in range(2))
    assert torch.equal(first.jacobian, again.jacobian)  # eval mode: no dropout
    assert torch.equal(torch.get_rng_state(), state)
    assert all(module.training for module in model.modules())
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    with pytest.raises(UnsupportedModel, match="nothing to build a bridge on"):
        bridge_of(model, inputs(5), {})
    with pytest.raises(InvalidInput, match="at least one auxiliary input"):
        labels.build_bridge(model, labels.find_head(model), inputs(0), shared=sent)


def test_the_lowest_letter_with_auxiliary_data_and_no_head() -> None:
    method = METHODS["gdbr"]
    assert method.letters == ("D",) and not method.reads_head
    assert all(other.reads_head for key, other in METHODS.items() if key != "gdbr")
    model = network(nn.ReLU())
    sent, _ = update(model, inputs(2), torch.tensor([0, 1]))
    head = labels.find_head(model)
    with pytest.raises(NotGranted, match=r"evidence\.bridge"):
        labels.recover("gdbr", Evidence(gradients=sent, head=head, batch_size=2))
    bridge = bridge_of(model, inputs(5), sent)
    with pytest.raises(InvalidInput, match="on which the bridge stands"):
        labels.recover("gdbr", Evidence(gradients={}, head=head, batch_size=2, bridge=bridge))
