"""Transforms of a client's images: replayed by who was told what was drawn, hidden otherwise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from leakatlas.data import Box
from leakatlas.errors import InvalidInput, InvalidParameter, UnknownName
from leakatlas.fl import FedAVG, FedSGD, Protocol, View
from leakatlas.fl.augmentation import as_augmentations, augmented
from leakatlas.threat import Grant
from tests.conftest import BOX, build_stage, relative_error

RECIPE: list[Any] = [
    {"name": "RandomHorizontalFlip", "p": 0.5},
    {"name": "RandomCrop", "size": 8, "padding": 2},
    {"name": "ColorJitter", "brightness": 0.3},
]


def test_examples_draw_for_themselves_and_the_seed_settles_it() -> None:
    x = torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    flips = as_augmentations(["RandomHorizontalFlip"])
    once, again, other = (augmented(x, flips, seed) for seed in (4, 4, 5))
    assert torch.equal(once, again) and not torch.equal(once, other)
    turned = [bool(torch.equal(a, b.flip(-1))) for a, b in zip(once, x, strict=True)]
    assert any(turned) and not all(turned)
    assert all(torch.equal(a, b) for a, b, t in zip(once, x, turned, strict=True) if not t)


def test_transforms_act_on_pixels_whatever_the_models_space() -> None:
    pixels = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    recipe = as_augmentations([{"name": "RandomCrop", "size": 8, "padding": 3}])
    plain = augmented(pixels, recipe, 7)
    normal = augmented(BOX.normalize(pixels), recipe, 7, BOX)
    torch.testing.assert_close(normal, BOX.normalize(plain))
    assert float(plain.min()) == 0.0  # the padding is black


def test_what_torchvision_does_not_know_or_take_is_refused() -> None:
    with pytest.raises(UnknownName, match="Did you mean 'RandomHorizontalFlip'"):
        FedSGD(augment=["RandomHorizontalFlp"])
    with pytest.raises(UnknownName):
        FedSGD(augment=[{"name": "Lambda", "lambd": "print"}])
    with pytest.raises(InvalidParameter, match="refused by torchvision"):
        FedSGD(augment=[{"name": "RandomCrop", "sice": 3}])
    with pytest.raises(InvalidParameter, match="a list of transforms"):
        FedSGD(augment="RandomHorizontalFlip")
    with pytest.raises(InvalidInput, match=r"into \(3, 4, 4\)"):
        augmented(torch.rand(1, 3, 8, 8), as_augmentations([{"name": "CenterCrop", "size": 4}]), 0)


@pytest.mark.parametrize(
    "protocol", [FedSGD(augment=RECIPE), FedAVG(epochs=2, batch_size=2, lr=0.1, augment=RECIPE)]
)
def test_the_draws_settle_the_replay_and_are_hidden_without_the_grant(
    protocol: Protocol, tmp_path: Path
) -> None:
    assert type(protocol).from_json(protocol.to_json()) == protocol
    grants = frozenset({Grant.LABELS, Grant.AUGMENTATION})
    told = build_stage(protocol=protocol, examples=3, grants=grants)
    view = told.view([told.federation.play_round()])
    x = told.federation.clients[0].x
    assert relative_error(view.replay(x, view.labels), view.update.tensors) < 1e-10
    view.save(tmp_path)
    again = View.load(tmp_path, model=told.federation.base_model)
    assert relative_error(again.replay(x, view.labels), view.update.tensors) < 1e-10
    untold = build_stage(protocol=protocol, examples=3, grants=frozenset({Grant.LABELS}))
    view = untold.view([untold.federation.play_round()])
    assert not view.has("augmentation")
    assert relative_error(view.replay(x, view.labels), view.update.tensors) > 1e-2


def test_the_doctor_replays_the_transforms_that_it_saw_and_names_those_it_did_not() -> None:
    from leakatlas.audit import doctor

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 4))
    batch = (torch.rand(3, 3, 8, 8), torch.arange(3))
    protocol = FedSGD(augment=RECIPE)
    seen = doctor(model, batch, protocol=protocol, box=Box.unit(3), threat="C")
    assert seen.replay.consistent
    assert any("transforms its images (RandomHorizontalFlip" in f for f in seen.findings)
    stage = build_stage(protocol=protocol, examples=3)
    update = stage.federation.play_round().updates[0]
    from leakatlas.audit import examine

    real = examine(stage, captured=update).replay
    assert real.culprit == "augmentation" and real.expected and not real.consistent
