"""Every hook of a round, called at its place, with what it is promised."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from leakatlas.errors import IncompatibleDefenses, ProtocolError
from leakatlas.fl import (
    ActsOn,
    ClientContext,
    Defense,
    FedAVG,
    FedSGD,
    LocalStep,
    Memory,
    Message,
    RoundSetup,
    ServerContext,
    Stage,
    Update,
    acts_at,
)
from leakatlas.threat import Grant, Vantage
from tests.conftest import build_stage

Call = tuple[str, str, Any]
LOG: list[Call] = []
"""Which double was called at which hook, with what; emptied before every test."""


@pytest.fixture(autouse=True)
def empty_log() -> None:
    LOG.clear()


class Scaled(nn.Module):
    """What a double makes of a model: the same one with a private factor on its logits."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.secret = nn.Parameter(torch.rand((), dtype=torch.float64) + 1)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.inner(x)
        return self.secret * logits


@dataclass(frozen=True, kw_only=True)
class Inner(Defense):
    """Overrides all nine hooks, writes down every call, and changes something at each."""

    key: ClassVar[str] = "inner_double"
    knob: ClassVar[str] = "strength"
    neutral: ClassVar[float] = 0.0
    stage: ClassVar[int] = 20

    strength: float = 1.0

    def note(self, hook: str, what: Any = None) -> None:
        LOG.append((self.key, hook, what))

    def setup(self, setup: RoundSetup) -> None:
        self.note("setup", setup)
        for client, memory in setup.clients.items():
            memory.setdefault("number", torch.tensor(float(client)))
        setup.server["rounds"] = setup.server.get("rounds", 0) + 1

    def model(self, model: nn.Module) -> nn.Module:
        self.note("model", model)
        return Scaled(model)

    def private(self, model: nn.Module) -> frozenset[str]:
        return frozenset(n for n, _ in model.named_parameters() if n.endswith("secret"))

    def batch(self, x: Tensor, y: Tensor, context: ClientContext) -> tuple[Tensor, Tensor]:
        self.note("batch", (x, y, context))
        return torch.cat([x, -x]), torch.cat([y, y])

    def local_step(
        self, step: LocalStep, gradients: Callable[[LocalStep], dict[str, Tensor]]
    ) -> dict[str, Tensor]:
        self.note("local_step", step)
        return {name: 2 * g for name, g in gradients(step).items()}

    def update(self, update: Update, context: ClientContext) -> Update:
        self.note("update", (update, context))
        return update.with_tensors({name: t + 1 for name, t in update.tensors.items()})

    def peer(self, updates: Mapping[int, Update], setup: RoundSetup) -> Mapping[int, Update]:
        self.note("peer", (dict(updates), setup))
        members = sorted(updates)
        return {m: updates[n] for m, n in zip(members, members[1:] + members[:1], strict=True)}

    def wire(self, message: Message, context: ClientContext) -> Message:
        self.note("wire", (message, context))
        assert message.update is not None
        return dataclasses.replace(
            message,
            update=None,
            payload={name: -t for name, t in message.update.tensors.items()},
            encoded_by=self.key,
        )

    def aggregate(
        self,
        messages: Mapping[int, Message],
        combine: Callable[[Mapping[int, Message]], Update],
        context: ServerContext,
    ) -> Update:
        self.note("aggregate", (messages, context))
        template = Update(tensors={}, kind="gradient", state_hash="", num_examples=2)
        decoded = {
            client: dataclasses.replace(
                message,
                update=template.with_tensors({n: -t for n, t in message.payload.items()}),
            )
            for client, message in messages.items()
        }
        return combine(decoded)

    def evaluate(self, model: nn.Module, memory: Memory) -> nn.Module:
        self.note("evaluate", memory)
        return Scaled(model)

    def secrets(self, memory: Memory) -> dict[str, Tensor]:
        return {"number": memory["number"]}


@dataclass(frozen=True, kw_only=True)
class Outer(Inner):
    """A second double; the earlier stage comes first."""

    key: ClassVar[str] = "outer_double"
    stage: ClassVar[int] = 10

    def model(self, model: nn.Module) -> nn.Module:
        self.note("model", model)
        return model

    def private(self, model: nn.Module) -> frozenset[str]:
        return frozenset()

    def wire(self, message: Message, context: ClientContext) -> Message:
        self.note("wire", (message, context))
        return message

    def aggregate(
        self,
        messages: Mapping[int, Message],
        combine: Callable[[Mapping[int, Message]], Update],
        context: ServerContext,
    ) -> Update:
        self.note("aggregate", (messages, context))
        return combine(messages)


@dataclass(frozen=True, kw_only=True)
class Refuses(Defense):
    """A client that finds the round too dangerous."""

    key: ClassVar[str] = "refuses"
    knob: ClassVar[str] = "strength"
    neutral: ClassVar[float] = 0.0
    strength: float = 1.0

    def batch(self, x: Tensor, y: Tensor, context: ClientContext) -> tuple[Tensor, Tensor]:
        raise ProtocolError("too dangerous")


def calls(hook: str, key: str = Inner.key) -> list[Any]:
    return [what for who, at, what in LOG if at == hook and who == key]


def play(*defenses: Defense, **settings: Any) -> Stage:
    settings = {"clients": 2, **settings}
    return build_stage(model="fc", defenses=defenses or (Inner(),), **settings)


def test_a_double_that_overrides_everything_acts_at_all_nine() -> None:
    assert acts_at(Inner()) == (
        "setup", "model", "batch", "local_step", "update", "peer", "wire", "aggregate", "evaluate",
    )  # fmt: skip
    assert acts_at(Refuses()) == ("batch",)


def test_the_order_of_a_round() -> None:
    stage = play()
    assert [hook for _, hook, _ in LOG] == ["model"]
    stage.federation.play_round()
    stage.federation.evaluation_model(1)
    hooks = [hook for _, hook, _ in LOG if hook != "model"]
    client = ["batch", "local_step", "update"]
    assert hooks == [
        "setup", *client, *client, "peer", "wire", "wire", "aggregate", "evaluate",
    ]  # fmt: skip


def test_two_defenses_act_in_the_order_of_their_stages() -> None:
    stage = play(Inner(), Outer(), clients=1)
    LOG.clear()
    stage.federation.play_round()
    pairs = [(who.removesuffix("_double"), hook) for who, hook, _ in LOG if hook != "model"]
    assert pairs == [
        (who, hook)
        for hook in ("setup", "batch", "local_step", "update", "peer", "wire")
        for who in ("outer", "inner")
    ] + [("inner", "aggregate"), ("outer", "aggregate")]  # the last to encode decodes first


def test_setup_sees_the_cohort_and_both_sides_memories() -> None:
    stage = play(clients=3)
    stage.federation.play_round(cohort=[0, 2])
    stage.federation.play_round()
    first, second = calls("setup")
    assert (first.round, tuple(first.cohort), sorted(first.clients)) == (0, (0, 2), [0, 2])
    assert (second.round, tuple(second.cohort)) == (1, (0, 1, 2))
    assert second.clients[2] is stage.federation.clients[2].memories[Inner.key]
    assert float(second.clients[1]["number"]) == 1
    assert second.server == {"rounds": 2}
    assert second.protocol == FedSGD()
    draws = [s.generator.initial_seed() for s in (first, second)]
    assert draws[0] != draws[1]


def test_model_gets_the_undefended_architecture_and_its_private_part_stays() -> None:
    stage = play()
    (given,) = calls("model")
    assert given is stage.federation.base_model
    record = stage.federation.play_round()
    assert stage.federation.private_names == {"secret"}
    for update in record.updates.values():
        assert "inner.hidden.1.weight" in update.tensors
        assert "secret" not in update.tensors
    private = [stage.federation.clients[i].private["secret"] for i in (0, 1)]
    assert float(private[0]) != float(private[1])  # each client draws its own


def test_batch_changes_what_the_steps_see() -> None:
    stage = play(protocol=FedAVG(epochs=2, batch_size=1), examples=2, clients=1)
    stage.federation.play_round()
    x, y, context = calls("batch")[0]
    assert x.shape == (1, 3, 8, 8)
    assert torch.equal(x, stage.federation.clients[0].x[:1])
    assert int(y) == 0
    assert (context.client, context.round) == (0, 0)
    steps = calls("local_step")
    assert [step.index for step in steps] == [0, 1, 2, 3]
    assert torch.equal(steps[0].x, torch.cat([x, -x]))
    assert torch.equal(steps[-1].context.x, steps[-1].x)
    assert all(step.model.training for step in steps)


def test_local_step_owns_the_gradient_and_update_what_is_sent() -> None:
    stage = play(clients=1)
    stage.federation.play_round()
    (step,) = calls("local_step")
    ((update, context),) = calls("update")
    named = dict(step.model.named_parameters())
    loss = step.loss(step.model(step.x), step.y)
    expected = dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))
    for name, tensor in update.tensors.items():
        torch.testing.assert_close(tensor, 2 * expected[name])
    assert context.model is step.model
    assert context.memory is stage.federation.clients[0].memories[Inner.key]
    (message, _) = calls("wire")[0]
    for name, tensor in message.update.tensors.items():
        assert torch.equal(tensor, update.tensors[name] + 1)


def test_peers_exchange_before_the_wire_and_the_wire_hides() -> None:
    stage = play(vantage=Vantage.WIRE)
    record = stage.federation.play_round()
    ((before, setup),) = calls("peer")
    assert sorted(before) == [0, 1]
    assert tuple(setup.cohort) == (0, 1)
    for (message, context), other in zip(calls("wire"), (1, 0), strict=True):
        assert context.client == message.client == 1 - other
        for name, tensor in message.update.tensors.items():
            assert torch.equal(tensor, before[other].tensors[name])
    sent = record.messages[0]
    assert sent.update is None
    assert sent.encoded_by == Inner.key
    assert torch.equal(sent.payload["inner.fc.bias"], -before[1].tensors["inner.fc.bias"])
    view = stage.view([record])
    assert view.rounds[0].update is None
    assert Inner.key in view.rounds[0].hidden_by
    assert view.rounds[0].payload.keys() == sent.payload.keys()


def test_the_server_decodes_and_averages() -> None:
    stage = play(clients=3)
    record = stage.federation.play_round(dropouts=[2])
    ((messages, context),) = calls("aggregate")
    assert sorted(messages) == [0, 1]  # who dropped out is not among the messages
    assert tuple(context.cohort) == (0, 1, 2)
    assert context.server == {"rounds": 1}
    name = "inner.fc.bias"
    expected = torch.stack([-m.payload[name] for m in messages.values()]).mean(0)
    torch.testing.assert_close(record.aggregate.tensors[name], expected)


def test_evaluate_gives_the_model_a_client_predicts_with() -> None:
    stage = play()
    stage.federation.play_round(apply=True)
    model = stage.federation.evaluation_model(1)
    (memory,) = calls("evaluate")
    assert float(memory["number"]) == 1
    assert isinstance(model, Scaled)
    assert isinstance(model.inner, Scaled)
    assert torch.equal(model.inner.secret.detach(), stage.federation.clients[1].private["secret"])
    assert not model.training


def test_secrets_are_handed_over_only_by_their_grant() -> None:
    stage = play(grants=frozenset({Grant.DEFENSE_SECRETS}))
    view = stage.view([stage.federation.play_round()], target=1)
    assert float(view.secrets[f"{Inner.key}/number"]) == 1
    assert "private/secret" in view.secrets
    plain = play()
    assert not plain.view([plain.federation.play_round()]).has("secrets")


def test_a_client_may_refuse_the_round() -> None:
    with pytest.raises(ProtocolError, match="too dangerous"):
        play(Refuses()).federation.play_round()


def test_hooks_left_alone_change_nothing() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Idle(Defense):
        key: ClassVar[str] = "idle"
        knob: ClassVar[str] = "strength"
        neutral: ClassVar[float] = 0.0
        modes: ClassVar[frozenset[ActsOn]] = frozenset({ActsOn.SINGLE_BATCH})
        strength: float = 1.0

    assert acts_at(Idle()) == ()
    plain = build_stage(model="fc", clients=2).federation
    idle = build_stage(model="fc", clients=2, defenses=(Idle(),)).federation
    a, b = plain.play_round(), idle.play_round()
    for name, tensor in a.aggregate.tensors.items():
        assert torch.equal(tensor, b.aggregate.tensors[name])
    assert idle.evaluation_model(0)(plain.clients[0].x).shape == (2, 10)
    with pytest.raises(IncompatibleDefenses, match="idle"):
        build_stage(model="fc", protocol=FedAVG(), defenses=(Idle(),))
