"""What leaves a client: patterns, frozen parameters, and what stays behind."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from leakatlas.data import ImageSet
from leakatlas.errors import InvalidInput, InvalidParameter
from leakatlas.fl import FedAVG, FedSGD, ModelRef, Protocol, Scenario, Stage, Update, stage
from leakatlas.fl.sharing import unshared_names
from leakatlas.threat import Grant
from tests.conftest import relative_error


def _net() -> nn.Sequential:
    torch.manual_seed(5)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Tanh(), nn.Flatten(), nn.Linear(4 * 36, 5)
    ).double()


def _images(count: int = 3) -> ImageSet:
    generator = torch.Generator().manual_seed(7)
    return ImageSet(
        torch.rand(count, 3, 8, 8, generator=generator),
        torch.arange(count) % 5,
        tuple("abcde"),
        "noise",
    )


def _stage(model: nn.Module, protocol: Protocol, **rest: object) -> Stage:
    scenario = Scenario(
        model=ModelRef("object", "net"), letter="C", protocol=protocol,
        grants=frozenset({Grant.LABELS}), **rest,  # type: ignore[arg-type]  # a test's shorthand
    )  # fmt: skip
    return stage(scenario, model=model, victims=_images())


@pytest.mark.parametrize(
    ("patterns", "stay"),
    [
        (("*",), set()),
        (("4.*",), {"0.weight", "0.bias", "1.weight", "1.bias", "buffers"}),
        (("!4.weight",), {"4.weight"}),
        (("*", "!@BatchNorm*"), {"1.weight", "1.bias", "buffers"}),
        (("!@BatchNorm*", "1.weight"), {"1.bias", "buffers"}),
        (("@Linear", "0.weight"), {"0.bias", "1.weight", "1.bias", "buffers"}),
    ],
)
def test_the_last_pattern_that_matches_decides(patterns: tuple[str, ...], stay: set[str]) -> None:
    buffers = {"1.running_mean", "1.running_var", "1.num_batches_tracked"}
    expected = (stay - {"buffers"}) | (buffers if "buffers" in stay else set())
    assert unshared_names(_net(), patterns) == expected


def test_patterns_without_effect_and_clients_without_a_message_are_refused() -> None:
    with pytest.raises(InvalidParameter, match=r"'head\.\*' matches no parameter"):
        unshared_names(_net(), ("head.*",))
    with pytest.raises(InvalidParameter, match="leaves no trained parameter"):
        unshared_names(_net(), ("1.running*",))
    with pytest.raises(InvalidParameter, match="nothing to train"):
        unshared_names(_net().requires_grad_(False), ("*",))


def _frozen_but_head(model: nn.Sequential) -> nn.Sequential:
    model[:4].requires_grad_(False)
    return model


def test_a_frozen_backbone_sends_the_full_gradients_head_bit_for_bit() -> None:
    full = _stage(_net(), FedSGD()).federation.play_round().updates[0]
    frozen = _stage(_frozen_but_head(_net()), FedSGD()).federation.play_round().updates[0]
    assert list(frozen.tensors) == ["4.weight", "4.bias"]
    assert all(torch.equal(frozen.tensors[n], full.tensors[n]) for n in frozen.tensors)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_local_steps_leave_constants_where_they_are(momentum: float) -> None:
    protocol = FedAVG(epochs=2, batch_size=2, momentum=momentum, weight_decay=0.1, mode="eval")
    model = _frozen_but_head(_net())
    played = _stage(model, protocol)
    view = played.view([played.federation.play_round()])
    assert list(view.update.tensors) == ["4.weight", "4.bias"]
    assert view.trained_names == ("4.weight", "4.bias")
    x = played.federation.clients[0].x
    assert relative_error(view.replay(x, view.labels), view.update.tensors) < 1e-10


@pytest.mark.parametrize("protocol", [FedSGD(shared=("!@BatchNorm*",), lr=0.5),
                                      FedAVG(shared=("!@BatchNorm*",), lr=0.5)])  # fmt: skip
def test_what_is_trained_and_stays_moves_on_the_client_out_of_sight(protocol: Protocol) -> None:
    played = _stage(_net(), protocol)
    federation = played.federation
    first = federation.play_round(apply=True)
    assert not any(name.startswith("1.") for name in first.updates[0].tensors)
    assert not any(name.startswith("1.") for name in first.states[0])
    view = played.view([first])
    x = federation.clients[0].x
    # As handed out, the adversary's values are the client's; after a round they are not.
    assert relative_error(view.replay(x, view.labels), view.update.tensors) < 1e-10
    second = federation.play_round()
    later = played.view([second])
    assert relative_error(later.replay(x, later.labels), later.update.tensors) > 1e-3
    assert torch.equal(later.model.get_parameter("1.weight"), _net().get_parameter("1.weight"))
    assert not torch.equal(federation.clients[0].private["1.weight"], torch.ones(4).double())


def test_a_view_on_disk_remembers_what_is_constant(tmp_path: object) -> None:
    from pathlib import Path

    from leakatlas.fl import View

    folder = Path(str(tmp_path))
    played = _stage(_frozen_but_head(_net()), FedAVG(mode="eval"))
    view = played.view([played.federation.play_round()])
    view.save(folder)
    again = View.load(folder, model=_net())
    assert again.trained_names == view.trained_names
    x = played.federation.clients[0].x
    assert relative_error(again.replay(x, view.labels), view.update.tensors) < 1e-10


def test_an_update_of_a_constant_is_refused_by_name() -> None:
    played = _stage(_frozen_but_head(_net()), FedSGD())
    record = played.federation.play_round()
    update = record.updates[0]
    odd: dict[str, Tensor] = {"0.bias": torch.zeros(4).double(), **update.tensors}
    other = copy.copy(record)
    object.__setattr__(other, "messages", {0: _message(record, update.with_tensors(odd))})
    with pytest.raises(InvalidInput, match=r"'0\.bias', which takes no gradient"):
        played.view([other]).replayer()


def _message(record: object, update: Update) -> object:
    from dataclasses import replace

    from leakatlas.fl import RoundRecord

    assert isinstance(record, RoundRecord)
    return replace(record.messages[0], update=update)
