"""A rehearsal's view: the client's computation on the adversary's own images, and nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from leakatlas.catalogue import registry
from leakatlas.errors import InvalidInput, NotGranted
from leakatlas.fl import FedAVG, FedSGD, Stage, View
from leakatlas.fl.view import SOURCES
from leakatlas.threat import Grant, Vantage
from tests.conftest import build_stage

ALL = frozenset(Grant)


def _seen(stage: Stage) -> View:
    return stage.view([stage.federation.play_round()], target=0)


def _own(view: View, seed: int = 7) -> tuple[Tensor, Tensor]:
    draws = torch.Generator().manual_seed(seed)
    like = next(view.model.parameters())
    x = torch.rand(view.batch_shape, generator=draws).to(like)
    return x, torch.arange(view.num_examples) % view.classes


@pytest.mark.parametrize("letter", "ABCDE")
def test_it_is_what_the_client_would_have_sent_and_its_own_truth_fits_it(letter: str) -> None:
    view = _seen(build_stage(letter=letter))
    x, y = _own(view)
    own = view.rehearse(x, y)
    assert (own.letter, own.vantage, own.grants) == (view.letter, view.vantage, view.grants)
    for name, tensor in own.replay(x, y).items():
        torch.testing.assert_close(own.update.tensors[name], tensor.detach())


def test_local_steps_are_those_of_the_known_protocol() -> None:
    protocol = FedAVG(epochs=2, batch_size=2, lr=0.05, momentum=0.9)
    view = _seen(build_stage(letter="C", protocol=protocol, examples=4))
    x, y = _own(view)
    own = view.rehearse(x, y)
    for name, tensor in own.replay(x, y).items():
        torch.testing.assert_close(own.update.tensors[name], tensor.detach(), rtol=1e-4, atol=1e-6)


def test_a_delta_cannot_be_imitated_without_the_protocol() -> None:
    view = _seen(build_stage(letter="B", protocol=FedAVG()))
    with pytest.raises(NotGranted, match="cannot imitate a delta without the protocol"):
        view.rehearse(*_own(view))


@pytest.mark.parametrize("letter", "EH")
def test_nothing_of_the_private_batch_is_left_where_everything_was_granted(letter: str) -> None:
    stage = build_stage(
        letter=letter, model="convnet-bn", settings={}, examples=3, grants=ALL,
        protocol=FedSGD(mode="train"), defenses=(registry.defense("clipping", max_norm=0.1),),
    )  # fmt: skip
    view = _seen(stage)
    x, y = _own(view)
    own = view.rehearse(x, y)
    assert torch.equal(own.labels, y)
    for layer, (mean, _) in own.batch_bn.items():
        assert not torch.equal(mean, view.batch_bn[layer][0])
    assert not own.has("secrets") and not own.rounds[-1].payload and not own.rounds[-1].key
    victim = stage.federation.clients[0].x
    held = _tensors(own)
    for image in victim:
        assert not any(_contains(tensor, image) for tensor in held)
    for name, tensor in view.update.tensors.items():
        assert not torch.equal(own.update.tensors[name], tensor), name
    assert own.update.buffers_after.keys() == view.update.buffers_after.keys()


def _tensors(view: View) -> list[Tensor]:
    found: list[Tensor] = []

    def collect(value: Any) -> None:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, dict):
            for part in value.values():
                collect(part)
        elif isinstance(value, tuple | list):
            for part in value:
                collect(part)
        elif hasattr(value, "__dict__"):
            collect(vars(value))

    for name in SOURCES:
        if view.has(name):
            collect(getattr(view, name))
    return found


def _contains(tensor: Tensor, image: Tensor) -> bool:
    return tensor.shape[-3:] == image.shape and bool(
        (tensor.reshape(-1, *image.shape) == image).flatten(1).all(1).any()
    )


def test_it_needs_nothing_but_the_view(tmp_path: Path) -> None:
    view = _seen(build_stage(letter="C", defenses=(registry.defense("clipping", max_norm=0.1),)))
    view.save(tmp_path)
    again = View.load(tmp_path)
    x, y = _own(view)
    one, two = view.rehearse(x, y), again.rehearse(x, y)
    for name, tensor in one.update.tensors.items():
        assert torch.equal(tensor, two.update.tensors[name])


def test_known_defenses_act_with_the_adversarys_own_noise() -> None:
    noise = registry.defense("client_dp", unit="update", clip_norm=1.0, noise_multiplier=0.5)
    view = _seen(build_stage(letter="C", defenses=(noise,)))
    x, y = _own(view)
    first, second = view.rehearse(x, y, seed=1), view.rehearse(x, y, seed=2)
    name = next(iter(first.update.tensors))
    assert not torch.equal(first.update.tensors[name], second.update.tensors[name])
    assert torch.equal(first.update.tensors[name], view.rehearse(x, y, seed=1).update.tensors[name])
    unaware = _seen(build_stage(letter="B", defenses=(noise,)))
    own = unaware.rehearse(x, y, seed=1)
    torch.testing.assert_close(own.update.tensors[name], own.replay(x, y)[name].detach())


def test_an_average_of_clients_is_rehearsed_as_an_average_of_clients() -> None:
    protocol = FedAVG(epochs=1, batch_size=1, lr=0.5)
    stage = build_stage(
        letter="C", clients=2, examples=2, protocol=protocol, vantage=Vantage.AGGREGATE
    )
    view = _seen(stage)
    x, y = _own(view)
    own = view.rehearse(x, y)
    sequential = own.replay(x, y)
    name = next(iter(sequential))
    # One client that made all steps one after the other would have moved further.
    assert not torch.allclose(own.update.tensors[name], sequential[name].detach())


def test_another_shape_is_refused() -> None:
    view = _seen(build_stage(letter="B", examples=2))
    x, y = _own(view)
    with pytest.raises(InvalidInput, match="A rehearsal takes images"):
        view.rehearse(x[:1], y[:1])
    with pytest.raises(NotGranted, match="no round was played yet"):
        build_stage(letter="B").view().rehearse(x, y)
