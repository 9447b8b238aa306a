from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from leakatlas import models
from leakatlas.errors import InvalidInput, InvalidParameter, ProtocolError
from leakatlas.fl import (
    Client,
    ClientContext,
    Defense,
    FedAVG,
    Federation,
    FedSGD,
    Message,
    Protocol,
    RoundRecord,
    RoundSetup,
    TamperedModel,
    Update,
    load_into,
    model_state,
    state_hash,
    task_loss,
)
from tests.conftest import gradients_at, relative_error

D, K = 5, 3


def _linear(seed: int = 0) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    model = nn.Sequential(nn.Flatten(), nn.Linear(D, K)).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return model


def _clients(*sizes: int) -> dict[int, Client]:
    generator = torch.Generator().manual_seed(8)
    return {
        index: Client(
            torch.randn(n, 1, 1, D, generator=generator, dtype=torch.float64),
            torch.randint(K, (n,), generator=generator),
        )
        for index, n in enumerate(sizes)
    }


def _federation(
    *sizes: int, protocol: Protocol | None = None, defenses: tuple[Defense, ...] = (), **more: Any
) -> Federation:
    return Federation(_linear(), _clients(*sizes), protocol or FedSGD(), defenses, **more)


def _by_hand(weights: dict[str, Tensor], client: Client, protocol: FedAVG) -> dict[str, Tensor]:
    """Plain local SGD of softmax regression; the result of one client."""
    w, b = weights["1.weight"].clone(), weights["1.bias"].clone()
    x, y = client.x.flatten(1), client.y
    for _ in range(protocol.epochs):
        for start in range(0, len(x), protocol.batch_size):
            xs, ys = x[start : start + protocol.batch_size], y[start : start + protocol.batch_size]
            p = torch.softmax(xs @ w.T + b, 1)
            p[torch.arange(len(ys)), ys] -= 1
            w, b = w - protocol.lr * p.T @ xs / len(xs), b - protocol.lr * p.mean(0)
    return {"1.weight": w, "1.bias": b}


def test_three_applied_rounds_are_fedavg_by_hand() -> None:
    protocol = FedAVG(epochs=2, batch_size=2, lr=0.3)
    federation = _federation(1, 3, 4, protocol=protocol)
    state = model_state(federation.model)
    for _ in range(3):
        federation.play_round(apply=True)
        results = [(len(c.x), _by_hand(state, c, protocol)) for c in federation.clients.values()]
        state = {n: torch.stack([size * r[n] for size, r in results]).sum(0) / 8 for n in state}
    assert relative_error(model_state(federation.model), state) < 1e-12


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_applied_fedsgd_is_a_step_of_sgd(reduction: str) -> None:
    protocol = FedSGD(lr=0.2, reduction=reduction)  # type: ignore[arg-type]  # Literal
    federation = _federation(1, 3, protocol=protocol)
    before = model_state(federation.model)
    clients = list(federation.clients.values())
    if reduction == "mean":  # of all examples together
        x, y = torch.cat([c.x for c in clients]), torch.cat([c.y for c in clients])
        step = gradients_at(federation.model, x, y, task_loss)
    else:  # the mean of the clients' sums
        each = [
            gradients_at(federation.model, c.x, c.y, lambda z, y: task_loss(z, y, "sum"))
            for c in clients
        ]
        step = {n: (each[0][n] + each[1][n]) / 2 for n in each[0]}
    federation.play_round(apply=True)
    expected = {n: before[n] - 0.2 * step[n] for n in before}
    assert relative_error(model_state(federation.model), expected) < 1e-12


def test_a_round_that_is_not_applied_changes_nothing_and_repeats_itself() -> None:
    federation = _federation(2, 3)
    before = state_hash(model_state(federation.model))
    first, second = federation.play_round(), federation.play_round()
    assert state_hash(model_state(federation.model)) == before
    assert (first.index, second.index) == (0, 1)
    assert relative_error(first.aggregate.tensors, second.aggregate.tensors) == 0


def test_the_callers_model_and_data_are_not_touched() -> None:
    model, clients = models.build("convnet-bn", size=8).double(), _clients(0)
    clients = {0: Client(torch.rand(3, 3, 8, 8, dtype=torch.float64), torch.tensor([1, 2, 3]))}
    before, x = state_hash(model_state(model)), clients[0].x.clone()
    federation = Federation(model, clients, FedAVG(epochs=2, batch_size=2, lr=0.1))
    federation.play_round(apply=True)
    assert state_hash(model_state(model)) == before
    assert torch.equal(clients[0].x, x)
    assert state_hash(model_state(federation.model)) != before


def test_batchnorm_buffers_travel_with_the_aggregate() -> None:
    model = models.build("convnet-bn", size=8).double()
    clients = {
        i: Client(torch.rand(n, 3, 8, 8, dtype=torch.float64) * (i + 1), torch.arange(n))
        for i, n in enumerate((1, 3))
    }
    federation = Federation(model, clients, FedAVG(batch_size=4, lr=0.1))
    record = federation.play_round(apply=True)
    held = model_state(federation.model)
    for name in (n for n in held if "running" in n):
        ones, threes = (record.updates[i].buffers_after[name] for i in (0, 1))
        assert torch.allclose(held[name], (ones + 3 * threes) / 4, rtol=1e-12)
    counters = [held[n] for n in held if n.endswith("num_batches_tracked")]
    assert counters and all(int(c) == 1 and c.dtype == torch.int64 for c in counters)


def test_each_client_trains_on_the_model_that_it_was_sent() -> None:
    federation = _federation(2, 2, 2)
    changed = {0: _linear(10), 2: _linear(12)}
    record = federation.play_round(sent={c: TamperedModel.of(m) for c, m in changed.items()})
    received = {0: changed[0], 1: federation.model, 2: changed[2]}
    for index, model in received.items():
        client = federation.clients[index]
        oracle = gradients_at(model, client.x, client.y, task_loss)
        assert relative_error(record.updates[index].tensors, oracle) < 1e-12
        assert record.updates[index].state_hash == state_hash(model_state(model))
        assert state_hash(record.states[index]) == state_hash(model_state(model))
    assert len({u.state_hash for u in record.updates.values()}) == 3


def test_one_model_for_all_may_replace_the_global_one() -> None:
    federation = _federation(1, 1)
    before = state_hash(model_state(federation.model))
    trap = _linear(3)
    record = federation.play_round(sent=TamperedModel.of(trap))
    assert {u.state_hash for u in record.updates.values()} == {state_hash(model_state(trap))}
    assert state_hash(model_state(federation.model)) == before


def test_only_the_cohort_takes_part() -> None:
    federation = _federation(1, 2, 3)
    record = federation.play_round(cohort=[2, 0])
    assert record.cohort == (2, 0)
    assert set(record.updates) == set(record.messages) == set(record.order) == {0, 2}
    assert (record.aggregate.clients, record.aggregate.num_examples) == (2, 4)
    expected = {
        n: (record.updates[0].tensors[n] + 3 * record.updates[2].tensors[n]) / 4
        for n in record.aggregate.tensors
    }
    assert relative_error(record.aggregate.tensors, expected) < 1e-12


def test_an_unknown_or_dishonest_cohort_is_refused() -> None:
    federation = _federation(1, 1)
    with pytest.raises(ProtocolError, match="client 7 does not exist"):
        federation.play_round(cohort=[0, 7])
    with pytest.raises(ProtocolError, match="no honest client"):
        federation.play_round(cohort=[], sybils=[9])


def test_sybils_send_zeros_and_count_as_clients() -> None:
    federation = _federation(2)
    record = federation.play_round(sybils=[100, 101])
    assert record.cohort == (0, 100, 101) and record.sybils == {100, 101}
    assert all(not t.any() for s in (100, 101) for t in record.updates[s].tensors.values())
    expected = {n: t / 3 for n, t in record.updates[0].tensors.items()}
    assert relative_error(record.aggregate.tensors, expected) < 1e-12
    assert set(record.received) == {0}


def test_who_drops_out_is_missing_from_the_aggregate_only() -> None:
    federation = _federation(2, 2)
    record = federation.play_round(dropouts=[1])
    assert set(record.messages) == {0, 1} and record.dropped == {1}
    assert relative_error(record.aggregate.tensors, record.updates[0].tensors) == 0
    with pytest.raises(ProtocolError, match="every client dropped out"):
        federation.play_round(dropouts=[0, 1])


def test_the_update_carries_what_it_means() -> None:
    gradient = _federation(4, protocol=FedSGD(reduction="sum")).play_round().updates[0]
    delta = _federation(4, protocol=FedAVG()).play_round().updates[0]
    assert (gradient.kind, gradient.reduction, gradient.num_examples) == ("gradient", "sum", 4)
    assert (delta.kind, delta.reduction, delta.clients) == ("delta", "mean", 1)


def test_the_same_seed_plays_the_same_round_and_another_does_not() -> None:
    def order(seed: int) -> list[list[int]]:
        federation = _federation(6, protocol=FedAVG(batch_size=2, shuffle=True), seed=seed)
        return [b.tolist() for b in federation.play_round().order[0]]

    assert order(0) == order(0) != order(1)


def test_another_clients_presence_does_not_move_ones_draws() -> None:
    protocol = FedAVG(batch_size=2, shuffle=True)
    alone = _federation(6, protocol=protocol).play_round().order[0]
    together = _federation(6, 6, protocol=protocol).play_round().order
    assert [b.tolist() for b in alone] == [b.tolist() for b in together[0]]
    assert [b.tolist() for b in together[0]] != [b.tolist() for b in together[1]]


@pytest.mark.parametrize(
    ("clients", "message"),
    [
        ({0: Client(torch.zeros(0, D), torch.zeros(0))}, "0 inputs and 0 labels"),
        ({3: Client(torch.zeros(2, D), torch.zeros(1))}, "Client 3 has 2 inputs and 1 labels"),
        ({0: Client(torch.full((1, D), torch.nan), torch.zeros(1))}, "non-finite"),
    ],
)
def test_unusable_data_are_refused(clients: dict[int, Client], message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        Federation(_linear(), clients, FedSGD())


def test_no_clients_and_a_single_example_under_batchnorm1d_are_refused() -> None:
    with pytest.raises(InvalidParameter, match="at least one client"):
        Federation(_linear(), {}, FedSGD())
    model = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(D), nn.Linear(D, K)).double()
    with pytest.raises(
        InvalidInput, match=r"'1' in train mode .* two examples or more, mode='eval'"
    ):
        Federation(model, _clients(1), FedSGD(mode="train"))
    Federation(model, _clients(1), FedSGD(mode="eval")).play_round()


# -- defenses at their seams ---------------------------------------------------------------------


class _Log(Defense):
    """Notes which hook ran, on whose memory."""

    key = "log"
    knob = "level"
    neutral = 0
    level: int = 0

    def setup(self, setup: RoundSetup) -> None:
        setup.server["rounds"] = [*setup.server.get("rounds", []), setup.round]
        for client, memory in setup.clients.items():
            memory["hooks"] = [("setup", client)]

    def batch(self, x: Tensor, y: Tensor, context: ClientContext) -> tuple[Tensor, Tensor]:
        context.memory["hooks"].append(("batch", context.client))
        context.memory["noise"] = torch.rand(2, generator=context.generator)
        return x, y

    def update(self, update: Update, context: ClientContext) -> Update:
        context.memory["hooks"].append(("update", context.client))
        return update

    def wire(self, message: Message, context: ClientContext) -> Message:
        context.memory["hooks"].append(("wire", context.client))
        return message


def test_hooks_run_in_order_with_a_memory_for_each_client() -> None:
    federation = _federation(2, 2, defenses=(_Log(),))
    plain = _federation(2, 2).play_round()
    record = federation.play_round()
    for index, client in federation.clients.items():
        names = [hook for hook, _ in client.memories["log"]["hooks"]]
        assert names == ["setup", "batch", "update", "wire"]
        assert {who for _, who in client.memories["log"]["hooks"]} == {index}
        assert relative_error(record.updates[index].tensors, plain.updates[index].tensors) == 0
    noises = [client.memories["log"]["noise"] for client in federation.clients.values()]
    assert not torch.equal(noises[0], noises[1])
    federation.play_round()
    assert federation.server_memories["log"]["rounds"] == [0, 1]


class _PrivateBias(Defense):
    """The head's bias stays on the device."""

    key = "private_bias"
    knob = "level"
    neutral = 0
    level: int = 0

    def private(self, model: nn.Module) -> frozenset[str]:
        return frozenset({"1.bias"})


@pytest.mark.parametrize("protocol", [FedSGD(lr=0.2), FedAVG(lr=0.2, batch_size=8)])
def test_private_parameters_stay_learn_and_are_never_sent(protocol: Protocol) -> None:
    federation = _federation(2, 3, protocol=protocol, defenses=(_PrivateBias(),))
    start = model_state(federation.model)
    record = federation.play_round(apply=True)
    for index, client in federation.clients.items():
        assert set(record.updates[index].tensors) == {"1.weight"}
        assert "1.bias" not in record.states[index]
        oracle = gradients_at(load_into(_linear(), start), client.x, client.y, task_loss)
        moved = start["1.bias"] - 0.2 * oracle["1.bias"]
        assert torch.allclose(client.private["1.bias"], moved, rtol=1e-12)
        own = model_state(federation.evaluation_model(index))
        assert torch.equal(own["1.bias"], client.private["1.bias"])
        assert torch.equal(own["1.weight"], model_state(federation.model)["1.weight"])
    assert torch.equal(model_state(federation.model)["1.bias"], start["1.bias"])


def test_a_record_keeps_what_each_side_saw() -> None:
    federation = _federation(2)
    record: RoundRecord = federation.play_round()
    message = record.messages[0]
    assert message.client == 0 and message.num_examples == 2
    assert message.update is record.updates[0]
    assert isinstance(record.received[0], nn.Module)
