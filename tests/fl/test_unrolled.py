"""What an unrolled client keeps is what the arithmetic says, and too much of it is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from leakatlas import limits, models
from leakatlas.errors import InvalidParameter
from leakatlas.fl import FedAVG, replay, unrolled
from tests.conftest import build_stage

MODELS: dict[str, dict[str, Any]] = {
    "convnet": {"width": 4},
    "fc": {"widths": (64,)},
    "vit": {"dim": 16, "patch": 4},
}


def _moved(
    model: torch.nn.Module, protocol: FedAVG, x: Tensor, *, checkpoint: bool
) -> list[Tensor]:
    moved = replay.unroll(
        model, {n: p.detach() for n, p in model.named_parameters()}, dict(model.named_buffers()),
        x.requires_grad_(), torch.zeros(len(x), dtype=torch.int64), protocol, checkpoint=checkpoint,
    )  # fmt: skip
    assert all(t.requires_grad for t in moved.values())
    return list(moved.values())


def _graphs(model: torch.nn.Module, protocol: FedAVG, x: Tensor) -> int:
    """Bytes of the distinct storages that the tape of a whole unroll holds."""
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with saved_tensors_hooks(note, lambda tensor: tensor):
        moved = _moved(model, protocol, x, checkpoint=False)
    assert moved
    return sum(kept.values())


def _starts(model: torch.nn.Module, protocol: FedAVG, x: Tensor) -> int:
    """Bytes that the steps of an unroll hold which forget their graphs."""
    left: list[Any] = [t.grad_fn for t in _moved(model, protocol, x, checkpoint=True)]
    seen: set[Any] = set()
    kept: dict[int, int] = {}
    while left:
        node = left.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        left += [after for after, _ in node.next_functions]
        if "Forgotten" in node.name():
            for tensor in node.saved_tensors:
                kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return sum(kept.values())


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_the_arithmetic_is_what_a_tape_holds(
    name: str, optimizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model = replay.without_running_statistics(models.build(name, size=8, **MODELS[name]))
    protocol = FedAVG(epochs=6, batch_size=4, optimizer=optimizer)
    x = torch.randn(4, 3, 8, 8)
    graph = unrolled.graph_bytes(model, tuple(x.shape))
    whole, words = unrolled.arithmetic_of(model, protocol, 6, graph)
    assert "6 graphs of a step" in words
    # Adam's own arithmetic is on weights, and is kept as part of a step's graph.
    own = 0.5 if optimizer == "adam" else 0.75
    assert own < whole / _graphs(model, protocol, x) < 1.35
    monkeypatch.setattr(replay, "CHECKPOINT_FROM", 6)
    forgetful, words = unrolled.arithmetic_of(model, protocol, 6, graph)
    assert "the graph of one step" in words
    assert 0.75 < (forgetful - graph) / _starts(model, protocol, x) < 1.35


def test_a_larger_batch_keeps_more_and_measuring_changes_nothing() -> None:
    model = models.build("convnet-bn", size=8, width=4).train()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    noise = torch.get_rng_state()
    small, large = (unrolled.graph_bytes(model, (n, 3, 8, 8)) for n in (4, 40))
    assert 4 < large / small < 10  # what belongs to the weights does not grow
    assert torch.equal(noise, torch.get_rng_state())
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())


def test_a_replay_that_no_memory_holds_is_refused_with_the_arithmetic(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    protocol = FedAVG(epochs=4_000, batch_size=1, lr=1e-9)
    live = build_stage(protocol=FedAVG(batch_size=1), examples=2, dtype=torch.float32)
    view = live.view([live.federation.play_round()])
    view._fields["protocol"] = protocol  # the round itself is played with few steps
    view.replayer()
    monkeypatch.setattr(limits, "memory", lambda: 60_000_000)
    words = r"The replay of 8,000 local steps needs 78.* of memory \(8,000 steps x 9\.78 kB of w"
    with pytest.raises(InvalidParameter, match=words) as raised:
        view.replayer()
    assert str(raised.value).endswith(unrolled.WAY_OUT)
    view.replayer(one_step=True)  # a single gradient stands for all of them
