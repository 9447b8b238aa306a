"""Local training against a loop that owes nothing to torch's optimizers or autograd."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from leakatlas import models
from leakatlas.fl import (
    ClientContext,
    Defense,
    FedAVG,
    FedSGD,
    LocalStep,
    Protocol,
    model_state,
    stream,
    task_loss,
)
from leakatlas.fl.training import LocalResult, local_batches, plain_gradients, train_locally
from tests.conftest import gradients_at, relative_error

N, D, K = 7, 6, 4


def _data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(N, D, generator=generator, dtype=torch.float64)
    return x, torch.randint(K, (N,), generator=generator)


def _softmax_regression() -> nn.Linear:
    model = nn.Linear(D, K, dtype=torch.float64)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return model


def _train(model: nn.Module, x: Tensor, y: Tensor, protocol: Protocol) -> LocalResult:
    return train_locally(model, x, y, protocol, generator=stream("test"))


def _closed_form_gradient(w: Tensor, b: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Of softmax regression: (p - onehot(y)) x^T, averaged over the examples."""
    logits = x @ w.T + b
    p = logits.exp() / logits.exp().sum(1, keepdim=True)
    p[torch.arange(len(y)), y] -= 1
    return p.T @ x / len(x), p.mean(0)


def _naive(
    model: nn.Module, x: Tensor, y: Tensor, protocol: FedAVG, order: list[list[int]]
) -> dict[str, Tensor]:
    """``after - before`` by the textbook, one scalar rule at a time."""
    start = [p.detach().clone() for p in model.parameters()]
    now = [p.clone() for p in start]
    m = [torch.zeros_like(p) for p in start]
    v = [torch.zeros_like(p) for p in start]
    for t, batch in enumerate(order, start=1):
        gradients = _closed_form_gradient(now[0], now[1], x[batch], y[batch])
        for i, g in enumerate(gradients):
            g = g + protocol.weight_decay * now[i]
            if protocol.optimizer == "adam":
                one, two = protocol.betas
                m[i] = one * m[i] + (1 - one) * g
                v[i] = two * v[i] + (1 - two) * g * g
                g = (m[i] / (1 - one**t)) / ((v[i] / (1 - two**t)) ** 0.5 + 1e-8)
            else:
                m[i] = protocol.momentum * m[i] + g
                g = m[i]
            now[i] = now[i] - protocol.lr * g
    names = [name for name, _ in model.named_parameters()]
    return {n: after - before for n, after, before in zip(names, now, start, strict=True)}


@pytest.mark.parametrize(
    "protocol",
    [
        FedAVG(epochs=1, batch_size=7, lr=0.3),
        FedAVG(epochs=3, batch_size=3, lr=0.1),
        FedAVG(epochs=2, batch_size=2, lr=0.1, momentum=0.9),
        FedAVG(epochs=2, batch_size=3, lr=0.1, weight_decay=0.05),
        FedAVG(epochs=3, batch_size=4, lr=0.1, momentum=0.8, weight_decay=0.02),
        FedAVG(epochs=2, batch_size=3, lr=0.01, optimizer="adam"),
        FedAVG(epochs=3, batch_size=2, lr=0.01, optimizer="adam", betas=(0.8, 0.95),
               weight_decay=0.1),
    ],
    ids=["one step", "sgd", "momentum", "decay", "momentum+decay", "adam", "adam+decay"],
)  # fmt: skip
def test_fedavg_equals_the_textbook_loop(protocol: FedAVG) -> None:
    x, y = _data()
    model = _softmax_regression()
    epoch = [list(range(N))[i : i + protocol.batch_size] for i in range(0, N, protocol.batch_size)]
    expected = _naive(model, x, y, protocol, epoch * protocol.epochs)
    result = _train(model, x, y, protocol)
    assert relative_error(result.tensors, expected) < 1e-12
    assert len(result.order) == protocol.steps(N)


def test_a_shuffled_run_follows_the_order_that_it_reports() -> None:
    x, y = _data()
    protocol = FedAVG(epochs=2, batch_size=3, lr=0.2, shuffle=True)
    expected_model = _softmax_regression()
    result = _train(_softmax_regression(), x, y, protocol)
    order = [batch.tolist() for batch in result.order]
    assert relative_error(result.tensors, _naive(expected_model, x, y, protocol, order)) < 1e-12
    first, second = ([i for batch in epoch for i in batch] for epoch in (order[:3], order[3:]))
    assert sorted(first) == sorted(second) == list(range(N))
    assert first != list(range(N)) and first != second


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_fedsgd_sends_the_closed_form_gradient_and_does_not_move(reduction: str) -> None:
    x, y = _data()
    model = _softmax_regression()
    before = model_state(model)
    w, b = _closed_form_gradient(before["weight"], before["bias"], x, y)
    factor = N if reduction == "sum" else 1
    result = _train(model, x, y, FedSGD(reduction=reduction))  # type: ignore[arg-type]  # Literal
    expected = {"weight": factor * w, "bias": factor * b}
    assert relative_error(result.tensors, expected) < 1e-12
    assert all(torch.equal(t, before[n]) for n, t in model_state(model).items())


def test_the_first_loss_is_reported() -> None:
    x, y = _data()
    model = _softmax_regression()
    expected = float(task_loss(model(x[:3]), y[:3]).detach())
    assert _train(model, x, y, FedAVG(batch_size=3)).loss == pytest.approx(expected, rel=1e-12)


def test_batches_of_an_epoch_partition_the_examples() -> None:
    batches = local_batches(7, FedAVG(epochs=2, batch_size=3), stream("order"))
    assert [b.tolist() for b in batches] == [[0, 1, 2], [3, 4, 5], [6]] * 2
    assert [b.tolist() for b in local_batches(3, FedSGD(), stream("order"))] == [[0, 1, 2]]


# -- batch normalisation -------------------------------------------------------------------------


def _bn_model() -> nn.Module:
    torch_model = nn.Sequential(nn.Linear(D, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, K))
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for parameter in torch_model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
        for name, buffer in torch_model.named_buffers():
            if "running" in name:
                buffer.copy_(torch.rand(buffer.shape, generator=generator) + 0.5)
    return torch_model.double()


def test_train_mode_moves_the_running_statistics_by_the_rule() -> None:
    x, y = _data()
    model = _bn_model()
    before = model_state(model)
    h = x @ before["0.weight"].T + before["0.bias"]
    result = _train(model, x, y, FedSGD(mode="train"))
    after = result.buffers_after
    mean = 0.9 * before["1.running_mean"] + 0.1 * h.mean(0)
    # Running variance takes the unbiased one, the forward pass the biased one.
    variance = 0.9 * before["1.running_var"] + 0.1 * ((h - h.mean(0)) ** 2).sum(0) / (N - 1)
    assert torch.allclose(after["1.running_mean"], mean, rtol=1e-12)
    assert torch.allclose(after["1.running_var"], variance, rtol=1e-12)
    assert int(after["1.num_batches_tracked"]) == int(before["1.num_batches_tracked"]) + 1


def test_eval_mode_leaves_the_buffers_and_uses_the_running_statistics() -> None:
    x, y = _data()
    model = _bn_model()
    before = model_state(model)
    oracle = gradients_at(_bn_model().eval(), x, y, task_loss)
    result = _train(model, x, y, FedAVG(epochs=1, batch_size=N, lr=0.5, mode="eval"))
    for name, buffer in result.buffers_after.items():
        assert torch.equal(buffer, before[name])
    assert relative_error(result.tensors, {n: -0.5 * g for n, g in oracle.items()}) < 1e-12


def test_train_mode_uses_the_batch_and_mixes_examples() -> None:
    x, y = _data()
    oracle = gradients_at(_bn_model().train(), x, y, task_loss)
    result = _train(_bn_model(), x, y, FedSGD(mode="train"))
    assert relative_error(result.tensors, oracle) < 1e-12
    other = gradients_at(_bn_model().eval(), x, y, task_loss)
    assert relative_error(result.tensors, other) > 1e-2


# -- details -------------------------------------------------------------------------------------


class _Unused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used = nn.Linear(D, K)
        self.idle = nn.Parameter(torch.full((3,), 2.0))

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.used(x)
        return logits


def test_a_parameter_without_part_in_the_loss_gets_zeros_but_decays() -> None:
    x, y = _data()
    result = _train(_Unused().double(), x, y, FedSGD())
    assert torch.equal(result.tensors["idle"], torch.zeros(3, dtype=torch.float64))
    decayed = _train(_Unused().double(), x, y, FedAVG(batch_size=N, lr=0.1, weight_decay=0.5))
    assert torch.allclose(decayed.tensors["idle"], torch.full((3,), -0.1, dtype=torch.float64))


def test_dropout_draws_from_the_clients_stream_alone() -> None:
    x, y = _data()
    net = nn.Sequential(nn.Linear(D, 32), nn.Dropout(0.5), nn.Linear(32, K)).double()
    weights = {n: t.clone() for n, t in net.state_dict().items()}

    def run(seed: int, global_seed: int) -> dict[str, Tensor]:
        net.load_state_dict(weights)
        torch.manual_seed(global_seed)
        before = torch.get_rng_state()
        result = train_locally(net, x, y, FedSGD(mode="train"), generator=stream("d", seed))
        assert torch.equal(before, torch.get_rng_state())
        return result.tensors

    assert relative_error(run(0, 1), run(0, 2)) == 0
    assert relative_error(run(0, 1), run(1, 1)) > 0


class _Note(Defense):
    """Writes down the order in which hooks are called, and doubles or shifts on the way."""

    key = "note"
    knob = "factor"
    neutral = 1.0
    factor: float = 2.0

    def batch(self, x: Tensor, y: Tensor, context: ClientContext) -> tuple[Tensor, Tensor]:
        context.memory.setdefault("log", []).append("batch")
        return x + 1, y

    def local_step(
        self,
        step: LocalStep,
        gradients: Callable[[LocalStep], dict[str, Tensor]],
    ) -> dict[str, Tensor]:
        step.context.memory.setdefault("log", []).append(f"step {step.index}")
        return {n: 2 * g for n, g in gradients(step).items()}


def test_defenses_wrap_every_step() -> None:
    x, y = _data()
    model = _softmax_regression()
    plain = _closed_form_gradient(model.weight.detach(), model.bias.detach(), x + 1, y)
    defense = _Note()
    context = ClientContext(0, 0, model, x, y, FedSGD(), stream("n"), {})
    result = train_locally(
        model, x, y, FedAVG(epochs=2, batch_size=N, lr=0.1),
        defenses=[defense], contexts=[context], generator=stream("t"),
    )  # fmt: skip
    assert context.memory["log"] == ["batch", "step 0", "batch", "step 1"]
    one = train_locally(
        _softmax_regression(), x, y, FedSGD(),
        defenses=[defense], contexts=[context], generator=stream("t"),
    )  # fmt: skip
    assert relative_error(one.tensors, {"weight": 2 * plain[0], "bias": 2 * plain[1]}) < 1e-12
    assert result.order[0].tolist() == list(range(N))


def test_plain_gradients_equal_autograd_on_a_real_net() -> None:
    generator = torch.Generator().manual_seed(5)
    x = torch.rand(3, 3, 8, 8, generator=generator, dtype=torch.float64)
    y = torch.tensor([0, 3, 9])
    model = models.build("convnet-bn", size=8).double()
    context = ClientContext(0, 0, model, x, y, FedSGD(), generator, {})
    found = plain_gradients(LocalStep(model, x, y, task_loss, 0, context))
    assert relative_error(found, gradients_at(model, x, y, task_loss)) < 1e-12
