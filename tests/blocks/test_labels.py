"""The head, the identity, the rounding and the sign rules, against real networks."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from leakatlas.blocks import labels
from leakatlas.errors import InvalidInput, InvalidParameter, UnsupportedModel

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "leaky": nn.LeakyReLU,
    "tanh": nn.Tanh,
    "silu": nn.SiLU,
    "sigmoid": nn.Sigmoid,
}


def network(
    activation: str = "relu", classes: int = 10, *, seed: int = 0, bias: bool = True
) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers = (nn.Linear(12, 24), ACTIVATIONS[activation](), nn.Linear(24, classes, bias=bias))
        return nn.Sequential(*layers).double()


def inputs(n: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 12, generator=generator, dtype=torch.float64)


def gradients(
    model: nn.Module, x: Tensor, y: Tensor, *, label_smoothing: float = 0.0
) -> dict[str, Tensor]:
    loss = F.cross_entropy(model(x), y, label_smoothing=label_smoothing)
    found = torch.autograd.grad(loss, list(model.parameters()))
    return {name: g for (name, _), g in zip(model.named_parameters(), found, strict=True)}


def trained(model: nn.Sequential, steps: int, classes: int) -> nn.Sequential:
    x = inputs(64, seed=99)
    y = torch.arange(64) % classes
    for _ in range(steps):
        found = torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters()))
        with torch.no_grad():
            for parameter, g in zip(model.parameters(), found, strict=True):
                parameter.sub_(g)
    return model


@settings(max_examples=40, deadline=None)
@given(
    activation=st.sampled_from(sorted(ACTIVATIONS)),
    steps=st.sampled_from([0, 3, 40]),
    y=st.lists(st.integers(0, 6), min_size=1, max_size=40),
    seed=st.integers(0, 1_000),
)
def test_1_identity_with_the_true_mean_probability_is_exact(
    activation: str, steps: int, y: list[int], seed: int
) -> None:
    model = trained(network(activation, 7, seed=seed), steps, 7)
    x, target = inputs(len(y), seed), torch.tensor(y)
    head = labels.find_head(model)
    g = head.bias_grad(gradients(model, x, target))
    raw = labels.counts_from_bias(g, labels.mean_probability(model(x)), len(y))
    true = torch.bincount(target, minlength=7)
    torch.testing.assert_close(raw, true.double(), rtol=0, atol=1e-9)
    assert torch.equal(labels.round_counts(raw, len(y)), true)


def test_identity_by_hand() -> None:
    # two samples of classes 0 and 2, p = (.5, .3, .2) for both: g = p - (.5, 0, .5)
    g = torch.tensor([0.0, 0.3, -0.3])
    raw = labels.counts_from_bias(g, torch.tensor([0.5, 0.3, 0.2]), 2)
    torch.testing.assert_close(raw, torch.tensor([1.0, 0.0, 1.0], dtype=torch.float64))


def test_weight_form_is_exact_for_equal_feature_sums() -> None:
    model = network(bias=False, classes=5)
    h = torch.rand(9, 24, dtype=torch.float64)
    h = h / h.sum(dim=1, keepdim=True) * 3
    y = torch.tensor([0, 0, 0, 1, 2, 2, 4, 4, 4])
    g = gradients(model[2], h, y)["weight"]
    raw = labels.counts_from_weight(g, labels.mean_probability(model[2](h)), 3.0, 9)
    expected = torch.tensor([3, 1, 2, 0, 3], dtype=torch.float64)
    torch.testing.assert_close(raw, expected, rtol=0, atol=1e-9)


def test_sign_of_the_update_matters() -> None:
    model, y = network(), torch.tensor([3, 3, 3, 3])
    head = labels.find_head(model)
    g = gradients(model, inputs(4), y)
    delta = {name: -value for name, value in g.items()}
    assert labels.idlg(g, head) != labels.idlg(delta, head)
    right = labels.uniform_counts(head.bias_grad(g), 4)
    wrong = labels.uniform_counts(head.bias_grad(delta), 4)
    assert right[3] == 4 and wrong[3] == 0


@given(
    raw=st.lists(st.floats(allow_nan=True, allow_infinity=True, width=32), min_size=1, max_size=12),
    batch=st.integers(1, 50),
)
@settings(deadline=None)
def test_2_rounding_always_sums_to_the_batch(raw: list[float], batch: int) -> None:
    counts = labels.round_counts(torch.tensor(raw), batch)
    assert int(counts.sum()) == batch
    assert int(counts.min()) >= 0 and int(counts.max()) <= batch


@pytest.mark.parametrize(
    ("raw", "batch", "expected"),
    [
        ([1.0, 2.0, 0.0], 3, [1, 2, 0]),
        ([0.6, 0.6, 1.8], 3, [1, 0, 2]),  # floors 0 0 1, two left: .8 first, then .6 (lower class)
        ([2.4, 2.3, 1.2], 4, [2, 2, 0]),  # floors 2 2 1, one too many: .2 is the smallest share
        ([-3.0, 1.0, 5.0], 5, [0, 0, 5]),  # clipped to 0 1 5; shares equal, the lower class gives
        ([0.0, 0.0, 0.0, 0.0], 6, [2, 2, 1, 1]),
        ([2.9999999999, 0.0000001], 3, [3, 0]),
    ],
)
def test_rounding_by_hand(raw: list[float], batch: int, expected: list[int]) -> None:
    assert labels.round_counts(torch.tensor(raw, dtype=torch.float64), batch).tolist() == expected


def test_counts_become_labels() -> None:
    assert labels.labels_from_counts(torch.tensor([2, 0, 1])).tolist() == [0, 0, 2]


@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
@pytest.mark.parametrize("steps", [0, 40])
def test_idlg_bias_and_paper_rules_are_exact_for_one_sample(activation: str, steps: int) -> None:
    model = trained(network(activation), steps, 10)
    head = labels.find_head(model)
    for label in range(10):
        g = gradients(model, inputs(1, seed=label), torch.tensor([label]))
        assert labels.idlg(g, head).tolist() == [label]
        assert labels.idlg(g, head, rule="paper").tolist() == [label]


@pytest.mark.parametrize("activation", ["relu", "sigmoid"])
def test_idlg_sum_rule_is_exact_for_non_negative_features(activation: str) -> None:
    model = network(activation, bias=False)
    head = labels.find_head(model)
    for label in range(10):
        g = gradients(model, inputs(1, seed=label), torch.tensor([label]))
        assert labels.idlg(g, head).tolist() == [label]


def test_idlg_sum_rule_fails_where_features_change_sign() -> None:
    model = network("tanh")
    head = labels.find_head(model)
    hits = sum(
        labels.idlg(gradients(model, inputs(1, seed=s), torch.tensor([4])), head, rule="sum").item()
        == 4
        for s in range(50)
    )
    assert 5 < hits < 45


def test_idlg_survives_label_smoothing() -> None:
    model = network()
    head = labels.find_head(model)
    g = gradients(model, inputs(1), torch.tensor([6]), label_smoothing=0.2)
    assert labels.idlg(g, head).tolist() == [6]


@pytest.mark.parametrize("steps", [0, 40])
@pytest.mark.parametrize("seed", range(5))
def test_negative_column_minimum_has_no_false_positive_under_relu(steps: int, seed: int) -> None:
    model = trained(network("relu", seed=seed), steps, 10)
    y = torch.randint(0, 10, (12,), generator=torch.Generator().manual_seed(seed))
    present = labels.column_min_set(gradients(model, inputs(12, seed), y), labels.find_head(model))
    assert set(present.nonzero().flatten().tolist()) <= set(y.tolist())


def test_column_min_finds_distinct_labels_and_refuses_more_than_there_are() -> None:
    model = network("relu", 50)
    head = labels.find_head(model)
    y = torch.tensor([41, 3, 17, 28])
    found = labels.column_min(gradients(model, inputs(4), y), head, 4)
    assert sorted(found.tolist()) == sorted(y.tolist())
    with pytest.raises(InvalidInput, match=r"batch_size must be 1\.\.50"):
        labels.column_min(gradients(model, inputs(4), y), head, 51)


@pytest.mark.parametrize("steps", [0, 40])
def test_rules_follow_a_permutation_of_classes(steps: int) -> None:
    model = trained(network("relu", 8), steps, 8)
    head = labels.find_head(model)
    y = torch.tensor([0, 5, 5, 7])
    g = gradients(model, inputs(4), y)
    perm = torch.tensor([3, 1, 7, 0, 6, 2, 5, 4])
    renamed = dict(g)
    renamed[head.weight_name] = g[head.weight_name][perm]
    assert head.bias_name is not None
    renamed[head.bias_name] = g[head.bias_name][perm]
    for rule in ("bias", "sum", "paper"):
        assert perm[labels.idlg(renamed, head, rule=rule)] == labels.idlg(g, head, rule=rule)
    assert torch.equal(perm[labels.column_min(renamed, head, 3)], labels.column_min(g, head, 3))
    for rule_set in (labels.column_min_set, labels.sum_sign_set):
        assert torch.equal(rule_set(renamed, head), rule_set(g, head)[perm])


def test_joint_logits_are_reproducible_and_distinct_a_sample() -> None:
    drawn = [
        labels.joint_logits(3, 5, generator=torch.Generator().manual_seed(1), like=torch.zeros(1))
        for _ in range(2)
    ]
    assert torch.equal(*drawn) and not torch.equal(drawn[0][0], drawn[0][1])
    soft = labels.soft_labels(drawn[0])
    torch.testing.assert_close(soft.sum(dim=1), torch.ones(3))


class Crossed(nn.Module):
    """Registers its head first and has batch norm, so position tells nothing."""

    def __init__(self, *, bias: bool) -> None:
        super().__init__()
        self.classifier = nn.Linear(6, 4, bias=bias)
        self.body = nn.Linear(12, 6)
        self.norm = nn.BatchNorm1d(6)
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.classifier(self.drop(torch.relu(self.norm(self.body(x)))))
        return out


@pytest.mark.parametrize("bias", [True, False])
def test_head_is_the_last_linear_that_runs_not_the_last_registered(bias: bool) -> None:
    head = labels.find_head(Crossed(bias=bias), torch.zeros(1, 12))
    assert head.weight_name == "classifier.weight"
    assert head.bias_name == ("classifier.bias" if bias else None)
    assert (head.classes, head.in_features) == (4, 6)
    with pytest.raises(UnsupportedModel, match="pass example="):
        labels.find_head(Crossed(bias=bias))


def test_finding_the_head_leaves_no_trace() -> None:
    model = Crossed(bias=True).train()
    model.norm.eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    rng = torch.random.get_rng_state()
    labels.find_head(model, torch.randn(2, 12, generator=torch.Generator().manual_seed(0)))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert model.training and not model.norm.training and model.drop.training
    assert torch.equal(rng, torch.random.get_rng_state())
    assert not any(m._forward_hooks for m in model.modules())


def test_head_without_example_is_the_last_layer_with_parameters() -> None:
    head = labels.find_head(network("relu", 7))
    assert (head.weight_name, head.bias_name) == ("2.weight", "2.bias")
    assert (head.classes, head.in_features, head.module_name) == (7, 24, "2")


def test_a_tied_head_has_the_name_under_which_its_update_is_shared() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6))
    model[2].weight = model[0].weight
    assert labels.find_head(model).weight_name == "0.weight"


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Sequential(nn.Conv2d(1, 2, 3)), "got Conv2d"),
        (nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)), "got BatchNorm1d"),
        (nn.ReLU(), "got none"),
        (nn.utils.parametrizations.weight_norm(nn.Linear(3, 2)), "a Linear"),
    ],
)
def test_models_without_a_plain_linear_head_are_refused(model: nn.Module, message: str) -> None:
    with pytest.raises(UnsupportedModel, match=message):
        labels.find_head(model)


def test_a_convolutional_output_is_refused_by_running_it() -> None:
    with pytest.raises(UnsupportedModel, match="no Linear"):
        labels.find_head(nn.Conv2d(1, 2, 3), torch.zeros(1, 1, 4, 4))
    model = nn.Sequential(nn.Linear(3, 4), nn.Unflatten(1, (1, 4)), nn.Conv1d(1, 1, 2))
    with pytest.raises(UnsupportedModel, match="produce the logits"):
        labels.find_head(model, torch.zeros(1, 3))
    normed = nn.utils.parametrizations.weight_norm(nn.Linear(3, 2))
    with pytest.raises(UnsupportedModel, match="not a plain parameter"):
        labels.find_head(normed, torch.zeros(1, 3))


def test_missing_and_misshapen_gradients_are_named() -> None:
    head = labels.find_head(network("relu", 7))
    with pytest.raises(InvalidInput, match=r"'2\.bias', which the update does not hold"):
        head.bias_grad({"2.weight": torch.zeros(7, 24)})
    with pytest.raises(InvalidInput, match=r"must be \(7, 24\)"):
        head.weight_grad({"2.weight": torch.zeros(24, 7)})
    biasless = labels.find_head(network("relu", 7, bias=False))
    with pytest.raises(UnsupportedModel, match="has no bias"):
        biasless.bias_grad({})


def test_bad_arguments_are_named() -> None:
    with pytest.raises(InvalidInput, match="batch_size must be positive"):
        labels.round_counts(torch.zeros(3), 0)
    with pytest.raises(InvalidInput, match=r"raw must be \(K,\)"):
        labels.round_counts(torch.zeros(3, 3), 2)
    with pytest.raises(InvalidInput, match="mean_probability must be"):
        labels.counts_from_bias(torch.zeros(3), torch.zeros(4), 2)
    with pytest.raises(InvalidParameter, match="rule="):
        model = network()
        labels.idlg(gradients(model, inputs(1), torch.tensor([0])), labels.find_head(model),
                    rule="last")  # type: ignore[arg-type]  # fmt: skip  # the wrong value is the test
