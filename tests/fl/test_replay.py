"""The adversary's replay is the client's computation, and its derivative is the right one."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from leakatlas import models
from leakatlas.errors import InvalidInput, NotGranted
from leakatlas.fl import (
    FedAVG,
    FedSGD,
    Protocol,
    RoundView,
    Stage,
    Update,
    View,
    model_state,
    replay,
    state_hash,
    task_loss,
)
from leakatlas.fl.replay import gradient, simulate_client, unroll
from leakatlas.threat import Grant
from tests.conftest import build_stage, gradients_at, relative_error

PROTOCOLS: dict[str, Protocol] = {
    "fedsgd": FedSGD(),
    "fedsgd sum": FedSGD(reduction="sum"),
    "fedsgd train": FedSGD(mode="train"),
    "fedavg": FedAVG(epochs=2, batch_size=2, lr=0.05),
    "fedavg short last batch": FedAVG(epochs=2, batch_size=3, lr=0.05),
    "fedavg eval": FedAVG(epochs=2, batch_size=2, lr=0.05, mode="eval"),
    "momentum": FedAVG(epochs=2, batch_size=2, lr=0.05, momentum=0.9),
    "weight decay": FedAVG(epochs=2, batch_size=2, lr=0.05, weight_decay=0.1),
    "shuffled": FedAVG(epochs=2, batch_size=2, lr=0.05, momentum=0.5, shuffle=True),
    "adam": FedAVG(epochs=2, batch_size=2, lr=0.01, optimizer="adam"),
    "adam shuffled": FedAVG(
        epochs=2, batch_size=3, lr=0.01, optimizer="adam", betas=(0.8, 0.9), weight_decay=0.01,
        shuffle=True,
    ),
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "fc": {"widths": (12,), "act": "tanh"},
    "lenet": {"width": 4},
    "convnet-bn": {},
}


@pytest.mark.parametrize(
    ("protocol", "model"), list(itertools.product(PROTOCOLS, MODELS)), ids=lambda v: str(v)
)
def test_the_replay_at_the_truth_is_what_the_client_sent(protocol: str, model: str) -> None:
    stage = build_stage(
        model=model, settings=MODELS[model], protocol=PROTOCOLS[protocol], examples=4,
        grants=frozenset({Grant.LABELS, Grant.BATCH_ORDER}),
    )  # fmt: skip
    record = stage.federation.play_round()
    view = stage.view([record])
    sent = record.updates[0].tensors
    replayed = view.replay(stage.federation.clients[0].x, view.labels)
    # Adam divides by the square root of squares: a gradient of 1e-9 carries its rounding along.
    assert relative_error(replayed, sent) < (1e-6 if "adam" in protocol else 1e-10)


def test_without_the_order_a_shuffled_client_is_not_matched() -> None:
    stage = build_stage(protocol=PROTOCOLS["shuffled"], examples=4,
                        grants=frozenset({Grant.LABELS}))  # fmt: skip
    view = stage.view([stage.federation.play_round()])
    replayed = view.replay(stage.federation.clients[0].x, view.labels)
    assert relative_error(replayed, view.update.tensors) > 1e-4


@pytest.mark.parametrize(
    ("sign", "scale", "reduction"), [(-1, 1.0, "mean"), (1, 0.01, "mean"), (-1, 3.0, "sum")]
)
def test_the_replay_speaks_the_units_of_the_message(
    sign: int, scale: float, reduction: str
) -> None:
    stage = build_stage(protocol=FedSGD(reduction=reduction),  # type: ignore[arg-type]  # Literal
                        letter="B", grants=frozenset({Grant.LABELS}))  # fmt: skip
    view = stage.view([stage.federation.play_round()])
    plain = view.update
    message = Update(
        tensors={n: sign * scale * t for n, t in plain.tensors.items()}, kind="gradient",
        sign=sign, scale=scale, reduction=plain.reduction,  # type: ignore[arg-type]  # Literal
        state_hash=plain.state_hash, num_examples=plain.num_examples,
    )  # fmt: skip
    seen = view.rounds[0]
    other = view.with_rounds([RoundView(0, seen.state, 1, message)], {})
    replayed = other.replay(stage.federation.clients[0].x, view.labels)
    assert relative_error(replayed, message.tensors) < 1e-12


@pytest.mark.parametrize("protocol", list(PROTOCOLS))
def test_the_derivative_in_the_images_agrees_with_finite_differences(protocol: str) -> None:
    chosen = PROTOCOLS[protocol]
    model = models.build("fc", in_channels=1, size=2, classes=3, widths=(4,), act="tanh").double()
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(4, 1, 2, 2, generator=generator, dtype=torch.float64)
    y = torch.tensor([0, 1, 2, 1])
    batches = None
    if isinstance(chosen, FedAVG) and chosen.shuffle:
        batches = [torch.tensor(b) for b in ([2, 0], [3, 1], [1, 2], [0, 3])]
    parameters = {n: p.detach() for n, p in model.named_parameters()}

    def sent(candidate: Tensor) -> tuple[Tensor, ...]:
        return tuple(
            simulate_client(model, parameters, {}, candidate, y, chosen, batches=batches).values()
        )

    x.requires_grad_()
    assert torch.autograd.gradcheck(sent, (x,), eps=1e-6, atol=1e-5, rtol=1e-4)


def test_the_derivative_in_soft_labels_agrees_with_finite_differences() -> None:
    model = models.build("fc", in_channels=1, size=2, classes=3, widths=(4,), act="tanh").double()
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(2, 1, 2, 2, generator=generator, dtype=torch.float64)
    y = torch.rand(2, 3, generator=generator, dtype=torch.float64).requires_grad_()
    parameters = {n: p.detach() for n, p in model.named_parameters()}

    def sent(labels: Tensor) -> tuple[Tensor, ...]:
        protocol = FedAVG(epochs=1, batch_size=1, lr=0.1)
        return tuple(unroll(model, parameters, {}, x, labels, protocol).values())

    assert torch.autograd.gradcheck(sent, (y,))


def test_the_gradient_equals_autograd_and_sums_over_the_batch() -> None:
    model = models.build("lenet", size=8, width=4).double()
    generator = torch.Generator().manual_seed(6)
    x = torch.rand(3, 3, 8, 8, generator=generator, dtype=torch.float64)
    y = torch.tensor([1, 5, 5])
    parameters = {n: p.detach() for n, p in model.named_parameters()}
    found = gradient(model, parameters, {}, x, y)
    assert relative_error(found, gradients_at(model, x, y, task_loss)) < 1e-12
    singles = [gradient(model, parameters, {}, x[i : i + 1], y[i : i + 1]) for i in range(3)]
    mean = {n: torch.stack([s[n] for s in singles]).mean(0) for n in found}
    assert relative_error(found, mean) < 1e-12


def test_replaying_leaves_model_buffers_and_view_untouched() -> None:
    stage = build_stage(model="convnet-bn", settings={}, protocol=PROTOCOLS["fedavg"], examples=4,
                        grants=frozenset({Grant.LABELS}))  # fmt: skip
    view = stage.view([stage.federation.play_round()])
    model = view.model
    before = state_hash(model_state(model)), state_hash(view.rounds[0].state)
    x = torch.zeros(4, 3, 8, 8, dtype=torch.float64, requires_grad=True)
    simulate_client(
        model, dict(model.named_parameters()), dict(model.named_buffers()), x, view.labels,
        FedAVG(epochs=2, batch_size=2),
    )  # fmt: skip
    view.replay(x, view.labels)
    assert before == (state_hash(model_state(model)), state_hash(view.rounds[0].state))
    assert all(p.grad is None for p in model.parameters()) and x.grad is None


class _Idle(nn.Module):
    """A parameter that takes no part, and a unit that is always off."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 3)
        self.dead = nn.Linear(4, 2)
        self.idle = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        logits: Tensor = self.head(x) + torch.relu(self.dead(x) - 1e3).sum(1, keepdim=True)
        return logits


@pytest.mark.parametrize("protocol", ["fedsgd", "fedavg", "momentum", "adam", "weight decay"])
def test_parameters_without_gradient_replay_as_zeros_with_finite_slopes(protocol: str) -> None:
    chosen = PROTOCOLS[protocol]
    model = _Idle().double()
    x = torch.rand(4, 1, 2, 2, dtype=torch.float64, requires_grad=True)
    y = torch.tensor([0, 1, 2, 0])
    parameters = {n: p.detach() for n, p in model.named_parameters()}
    sent = simulate_client(model, parameters, {}, x, y, chosen)
    for name in ("idle", "dead.weight", "dead.bias"):
        decays = isinstance(chosen, FedAVG) and chosen.weight_decay > 0
        assert bool((sent[name] == 0).all()) is not decays
    total = torch.stack([t.square().sum() for t in sent.values()]).sum()
    (slope,) = torch.autograd.grad(total, x)
    assert torch.isfinite(slope).all() and slope.abs().max() > 0


def test_a_gradient_without_graph_is_a_constant() -> None:
    model = models.build("fc", in_channels=1, size=2, classes=3, widths=()).double()
    x = torch.rand(2, 1, 2, 2, dtype=torch.float64, requires_grad=True)
    parameters = {n: p.detach() for n, p in model.named_parameters()}
    found = gradient(model, parameters, {}, x, torch.tensor([0, 1]), create_graph=False)
    assert not any(t.requires_grad for t in found.values())


def test_an_eavesdropper_without_training_knowledge_cannot_replay_a_delta() -> None:
    stage = build_stage(protocol=PROTOCOLS["fedavg"], letter="B", grants=frozenset({Grant.LABELS}))
    view = stage.view([stage.federation.play_round()])
    with pytest.raises(NotGranted, match=r"view\.protocol is not granted to threat model B"):
        view.replayer()


def test_an_eavesdropper_replays_a_gradient_without_training_knowledge() -> None:
    stage = build_stage(letter="A", grants=frozenset({Grant.LABELS}))
    view = stage.view([stage.federation.play_round()])
    replayed = view.replay(stage.federation.clients[0].x, view.labels)
    assert relative_error(replayed, view.update.tensors) < 1e-10
    assert "protocol" not in view.reads


def test_an_update_that_does_not_belong_to_the_model_is_refused_before_any_replay() -> None:
    stage = build_stage(letter="A")
    view = stage.view([stage.federation.play_round()])
    seen = view.rounds[0]
    wrong = view.update.with_tensors({"fc.bias": torch.zeros(3)})
    with pytest.raises(InvalidInput, match=r"'fc\.bias' has shape \(3,\)"):
        view.with_rounds([RoundView(0, seen.state, 1, wrong)], {}).replayer()


CHECKPOINTED: dict[str, FedAVG] = {
    "sgd": FedAVG(epochs=2, batch_size=2, lr=0.05),
    "momentum and decay": FedAVG(
        epochs=2, batch_size=2, lr=0.05, momentum=0.9, weight_decay=0.1
    ),
    "adam": FedAVG(epochs=2, batch_size=2, lr=0.01, optimizer="adam"),
}  # fmt: skip


@pytest.mark.parametrize("protocol", CHECKPOINTED)
def test_forgetting_the_graph_changes_neither_the_replay_nor_its_derivative(protocol: str) -> None:
    model = models.build("convnet-bn", width=4, size=16, classes=5).double()
    parameters = {n: p.detach() for n, p in model.named_parameters()}
    buffers = {n: b.detach() for n, b in model.named_buffers()}
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 3, 16, 16, generator=generator, dtype=torch.float64)
    soft = torch.randn(4, 5, generator=generator, dtype=torch.float64).softmax(1)
    weights = {
        n: torch.randn(p.shape, generator=generator, dtype=torch.float64)
        for n, p in parameters.items()
    }
    found: dict[bool, tuple[Tensor, ...]] = {}
    for checkpoint in (False, True):
        leaves = (x.clone().requires_grad_(), soft.clone().requires_grad_())
        sent = unroll(
            model, parameters, buffers, *leaves, CHECKPOINTED[protocol], checkpoint=checkpoint
        )
        total = torch.stack([(sent[n] * w).sum() for n, w in weights.items()]).sum()
        found[checkpoint] = (total.detach(), *torch.autograd.grad(total, leaves))
    for kept, forgotten in zip(found[False], found[True], strict=True):
        torch.testing.assert_close(forgotten, kept, rtol=1e-10, atol=1e-14)


def test_long_replays_forget_by_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    """One local step fewer than the limit keeps the graph; from the limit on, weights are kept."""
    calls: list[int] = []
    real = replay._Forgotten.apply

    def counted(step: object, t: int, *rest: object) -> object:
        calls.append(t)
        return real(step, t, *rest)

    monkeypatch.setattr(replay._Forgotten, "apply", counted)
    model = models.build("fc", widths=(4,), size=8, classes=3)
    parameters = {n: p.detach() for n, p in model.named_parameters()}
    x, y = torch.randn(1, 3, 8, 8), torch.tensor([1])
    for steps in (replay.CHECKPOINT_FROM - 1, replay.CHECKPOINT_FROM):
        unroll(model, parameters, {}, x, y, FedAVG(epochs=steps, batch_size=1, lr=0.1))
    assert calls == list(range(1, replay.CHECKPOINT_FROM + 1))


def test_batchnorm_in_train_mode_is_the_same_without_running_statistics() -> None:
    model = models.build("convnet-bn", width=4, size=16).train()
    x = torch.randn(4, 3, 16, 16)
    expected = model(x)
    before = {n: b.clone() for n, b in model.named_buffers()}
    found = replay.without_running_statistics(model)(x)
    assert torch.equal(found, expected)
    assert all(torch.equal(b, before[n]) for n, b in model.named_buffers())
    evaluated = models.build("convnet-bn", width=4, size=16).eval()
    again = replay.without_running_statistics(evaluated)
    assert all(m.track_running_stats for m in again.modules() if isinstance(m, nn.BatchNorm2d))


def test_central_differences_replay_the_gradient_exactly_and_its_derivative_nearly() -> None:
    torch.manual_seed(6)  # away from kinks
    model = models.build("lenet", width=4).double()
    parameters = {n: p.detach() for n, p in model.named_parameters()}
    x, y = torch.randn(2, 3, 32, 32, dtype=torch.float64), torch.tensor([1, 2])
    slopes = {}
    for how in ("autograd", "finite"):
        leaf = x.clone().requires_grad_()
        with replay.derivative("autograd" if how == "autograd" else "finite"):
            g = gradient(model, parameters, {}, leaf, y)
        slopes[how] = (
            {n: t.detach() for n, t in g.items()},
            torch.autograd.grad(torch.stack([t.square().sum() for t in g.values()]).sum(), leaf)[0],
        )
    for name, tensor in slopes["autograd"][0].items():
        assert torch.equal(slopes["finite"][0][name], tensor)
    torch.testing.assert_close(slopes["finite"][1], slopes["autograd"][1], rtol=1e-4, atol=1e-9)


def test_central_differences_of_a_distance_without_slope_are_zero() -> None:
    model = models.build("lenet", width=4)
    parameters = {n: p.detach() for n, p in model.named_parameters()}
    leaf = torch.randn(1, 3, 32, 32).requires_grad_()
    with replay.derivative("finite"):
        g = gradient(model, parameters, {}, leaf, torch.tensor([0]))
    flat = torch.stack([0.0 * t.sum() for t in g.values()]).sum()
    assert not bool(torch.autograd.grad(flat, leaf)[0].any())


def _seen(protocol: Protocol, letter: str = "C") -> tuple[Stage, View]:
    stage = build_stage(protocol=protocol, examples=3, letter=letter,
                        grants=frozenset({Grant.LABELS}))  # fmt: skip
    return stage, stage.view([stage.federation.play_round()])


def test_one_step_at_the_received_weights_is_the_gradient_itself() -> None:
    stage, view = _seen(FedSGD(reduction="sum"))
    x = stage.federation.clients[0].x
    one = view.replayer(one_step=True)(x, view.labels)
    assert relative_error(one, view.update.tensors) < 1e-12


def test_one_step_stands_for_all_of_them_and_may_be_taken_elsewhere() -> None:
    """A gradient at the weights where the second step begins is the second step."""
    lr = 0.2
    stage, view = _seen(FedAVG(epochs=2, batch_size=3, lr=lr, mode="eval"))
    x, y = stage.federation.clients[0].x, view.labels
    one = view.replayer(one_step=True)
    before = {n: p.detach() for n, p in view.model.named_parameters()}
    first = {n: d / 2 for n, d in one(x, y).items()}
    middle = {n: before[n] + first[n] for n in before}
    second = {n: d / 2 for n, d in one(x, y, at=middle).items()}
    both = {n: first[n] + second[n] for n in first}
    assert relative_error(both, view.update.tensors) < 1e-12


def test_one_step_has_slopes_in_the_weights_and_finite_differences_refuse_them() -> None:
    stage, view = _seen(FedAVG(epochs=2, batch_size=3, lr=0.2, mode="eval"))
    x, y = stage.federation.clients[0].x, view.labels
    one = view.replayer(one_step=True)
    before = {n: p.detach() for n, p in view.model.named_parameters()}
    delta = view.update.tensors

    def value(alpha: Tensor) -> Tensor:
        sent = one(x, y, at={n: before[n] + alpha * delta[n] for n in before})
        return torch.stack([(sent[n] - delta[n]).square().sum() for n in delta]).sum()

    alpha = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(value, (alpha,), eps=1e-6)
    with replay.derivative("finite"), pytest.raises(InvalidInput, match="not through weights"):
        value(alpha)
    with replay.derivative("finite"):  # weights that stay where they are may be anywhere
        value(torch.tensor(0.4, dtype=torch.float64))


def test_one_step_without_the_protocol_has_a_direction_and_no_size() -> None:
    stage, view = _seen(FedAVG(epochs=1, batch_size=3, lr=0.2, mode="eval"), letter="B")
    x, y = stage.federation.clients[0].x, view.labels
    sent = view.replayer(one_step=True)(x, y)
    scaled = {n: 0.2 * tensor for n, tensor in sent.items()}
    assert relative_error(scaled, view.update.tensors) < 1e-12
    with pytest.raises(NotGranted):
        view.replayer()


def test_one_step_goes_through_the_mirrors_of_known_defenses() -> None:
    from leakatlas.defenses.heuristic.perturbation.clipping import Clipping

    stage = build_stage(protocol=FedSGD(), examples=2, defenses=(Clipping(max_norm=0.1),),
                        grants=frozenset({Grant.LABELS}))  # fmt: skip
    view = stage.view([stage.federation.play_round()])
    x = stage.federation.clients[0].x
    one = view.replayer(one_step=True)(x, view.labels)
    assert relative_error(one, view.replay(x, view.labels)) < 1e-12
    with pytest.raises(InvalidInput, match="no trained parameter"):
        view.replayer(one_step=True)(x, view.labels, at={"nobody": torch.zeros(1)})
