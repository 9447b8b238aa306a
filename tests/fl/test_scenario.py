from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from leakatlas import models
from leakatlas.data import Box, ImageSet
from leakatlas.errors import InvalidInput, InvalidParameter, LeakAtlasError, UnknownName
from leakatlas.fl import FedAVG, FedSGD, ModelRef, Scenario, model_state, stage, state_hash
from leakatlas.threat import Grant, Vantage
from tests.conftest import BOX, build_stage, photos, surrogate

FC = ModelRef("builtin", "fc", {"size": 8, "widths": [4]})


def _scenario(**changes: Any) -> Scenario:
    return Scenario(**{"model": FC, **changes})


def test_a_scenario_survives_real_json() -> None:
    scenario = _scenario(
        weights="w.safetensors", data="faces", surrogate="digits", examples=4, clients=3,
        distinct_labels=True, protocol=FedAVG(epochs=2, optimizer="adam", betas=(0.8, 0.9)),
        letter="E", vantage=Vantage.AGGREGATE, rounds=5, seed=7,
        grants=frozenset({Grant.LABELS, Grant.BATCH_BN}),
    )  # fmt: skip
    plain = json.loads(json.dumps(scenario.to_json(), allow_nan=False))
    again = Scenario.from_json(plain)
    assert again.to_json() == scenario.to_json() == plain
    assert again.protocol == scenario.protocol and again.grants == scenario.grants


def test_what_is_left_out_takes_its_default() -> None:
    scenario = Scenario.from_json({"model": {"kind": "builtin", "name": "lenet"}})
    assert scenario == Scenario(model=ModelRef("builtin", "lenet"))


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ({"letters": "A"}, InvalidParameter, "no key 'letters'; it has: .*letter"),
        ({"letter": "Q"}, UnknownName, "Unknown threat model 'Q'"),
        ({"examples": 0}, InvalidParameter, r"Scenario\(examples=0\): expected at least 1"),
        ({"clients": -1}, InvalidParameter, r"Scenario\(clients=-1\)"),
        ({"rounds": 0}, InvalidParameter, r"Scenario\(rounds=0\)"),
        ({"protocol": {"algorithm": "fedprox"}}, UnknownName, "Unknown learning algorithm"),
        ({"protocol": {"name": "fedavg"}}, InvalidParameter, "Write algorithm: fedavg"),
        ({"protocol": {"algorithm": "fedavg", "lr": -1}}, InvalidParameter, r"FedAVG\(lr=-1"),
        ({"protocol": {"algorithm": "fedsgd", "epochs": 2}}, InvalidParameter, "no parameter"),
        ({"defenses": [{"key": "wishful_thinking"}]}, UnknownName, "wishful_thinking"),
        ({"vantage": "moon"}, UnknownName, "Unknown vantage 'moon'"),
        ({"grants": ["labls"]}, UnknownName, "Did you mean 'labels'"),
    ],
)
def test_bad_values_are_refused_by_name(
    values: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        Scenario.from_json({"model": {"kind": "builtin", "name": "lenet"}, **values})


def test_the_named_data_are_dealt_by_seed_and_disjointly() -> None:
    def dealt(seed: int) -> list[int]:
        scene = stage(Scenario(model=ModelRef("builtin", "fc", {"widths": ()}), data="photos",
                               examples=2, clients=3, seed=seed))  # fmt: skip
        return [int(i) for c in sorted(scene.victims) for i in scene.victims[c].labels]

    first = dealt(0)
    assert len(set(first)) == 6 and first == dealt(0) != dealt(1)


def test_distinct_labels_are_distinct_within_each_client() -> None:
    scene = stage(
        Scenario(
            model=ModelRef("builtin", "fc", {"widths": (), "in_channels": 1, "size": 8}),
            data="digits",
            examples=10,
            clients=2,
            distinct_labels=True,
        )
    )
    for client in scene.victims.values():
        assert sorted(client.labels.tolist()) == list(range(10))
    both = torch.cat([c.images for c in scene.victims.values()]).flatten(1)
    assert len(torch.unique(both, dim=0)) == 20


def test_too_few_images_are_refused_with_the_count() -> None:
    lenet = ModelRef("builtin", "lenet")
    with pytest.raises(InvalidInput, match=r"gives 8 of the 9 images needed \(1 clients x 9"):
        stage(Scenario(model=lenet, data="photos", examples=9))
    with pytest.raises(InvalidInput, match="2 images cannot be dealt to 3 clients"):
        stage(_scenario(clients=3), victims=photos(2))


def test_live_victims_are_dealt_in_order_and_normalised() -> None:
    scene = build_stage(examples=2, clients=3)
    for client in range(3):
        expected = photos(6).subset([2 * client, 2 * client + 1])
        assert torch.equal(scene.truth(client).images, expected.images)
        x = scene.federation.clients[client].x
        assert torch.allclose(BOX.denormalize(x), expected.images.double(), atol=1e-12)
    pooled = scene.pooled_truth()
    assert torch.equal(pooled.images, photos(6).images)
    assert pooled.labels.tolist() == list(range(6))


def test_the_clients_hold_copies() -> None:
    victims = photos(2)
    scene = stage(_scenario(), victims=victims)
    scene.federation.clients[0].x.zero_()
    scene.federation.clients[0].y.zero_()
    assert victims.images.abs().sum() > 0 and victims.labels.tolist() == [0, 1]


def test_without_a_box_pixels_stay_in_the_unit_interval() -> None:
    scene = stage(_scenario(), victims=photos(2))
    assert scene.box == Box.unit(3)
    assert torch.equal(scene.federation.clients[0].x, photos(2).images)


def test_weights_from_a_file_replace_the_initialisation(tmp_path: Any) -> None:
    trained = models.build("fc", size=8, widths=(4,), seed=5)
    torch.save(trained.state_dict(), tmp_path / "w.pt")
    scene = stage(_scenario(weights=str(tmp_path / "w.pt")), victims=photos(2))
    assert state_hash(model_state(scene.federation.model)) == state_hash(model_state(trained))


class _Net(nn.Module):
    def __init__(self, answer: str = "logits", classes: int = 10) -> None:
        super().__init__()
        self.answer = answer
        self.fc = nn.Linear(192, classes)

    def forward(self, x: Tensor) -> Any:
        logits = self.fc(x.flatten(1))
        return {"logits": logits, "tuple": (logits,), "flat": logits.flatten()}[self.answer]


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            _Net("tuple"),
            r"must return class logits \(N, K\).*a tuple with 0: \(1, 10\).*output=",
        ),
        (_Net("flat"), r"gave \(10,\)"),
        (_Net(classes=1), r"Label 1 is out of range for a model with 1 classes"),
        (models.build("fc", size=16, widths=()), r"FCNet cannot read inputs of shape \(1, 3, 8"),
    ],
)
def test_models_that_do_not_fit_are_refused(model: nn.Module, message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        stage(_scenario(), model=model, victims=photos(2))


def test_trying_the_model_leaves_its_mode_and_the_random_state() -> None:
    model = _Net().train()
    before = torch.get_rng_state()
    stage(_scenario(), model=model, victims=photos(2))
    assert model.training and torch.equal(before, torch.get_rng_state())


def test_public_data_that_hold_a_victim_are_refused() -> None:
    mixed = ImageSet(
        torch.cat([surrogate().images[:3], photos(2).images[1:]]), torch.arange(4),
        ("a", "b", "c", "d"), "mixed",
    )  # fmt: skip
    with pytest.raises(InvalidInput, match="1 of client 0's 2 images are also in the surrogate"):
        stage(_scenario(letter="D"), victims=photos(2), surrogate=mixed)
    stage(_scenario(letter="D"), victims=photos(2), surrogate=surrogate())


def test_the_default_protocol_is_fedsgd() -> None:
    assert _scenario().protocol == FedSGD()


def test_a_described_scenario_runs_no_code_unless_told_to(tmp_path: Path) -> None:
    canary = tmp_path / "owned"
    file = tmp_path / "factory.py"
    file.write_text("import os\n\n\ndef make(path):\n    os.mkdir(path)\n", encoding="utf-8")
    named = ModelRef("python", f"{file}:make", {"path": str(canary)})
    values = Scenario(model=named).to_json()
    scenario = Scenario.from_json(values)
    with pytest.raises(InvalidInput, match=r"was not run.*`model=`, or `trust_code=True`"):
        stage(scenario)
    assert not canary.exists()
    with pytest.raises(InvalidInput, match="returned NoneType"):
        stage(scenario, trust_code=True)
    assert canary.exists()


@pytest.mark.parametrize(
    "change",
    [
        {"model": "lenet"}, {"model": {"kind": "shell", "name": "x"}},
        {"model": {"kind": "builtin"}},
        {"model": {"kind": "builtin", "name": ["lenet"]}}, {"examples": "x"}, {"examples": True},
        {"clients": 1.5}, {"rounds": None}, {"defenses": [{"key": ["x"]}]}, {"defenses": [3]},
        {"protocol": []}, {"protocol": {"algorithm": ["x"]}}, {"grants": "labels"},
        {"vantage": 3}, {"letter": None}, {"data": 3}, {"seed": "x"},
    ],
)  # fmt: skip
def test_a_description_of_another_shape_is_refused(change: dict[str, Any]) -> None:
    values = Scenario(model=ModelRef("builtin", "lenet")).to_json() | change
    with pytest.raises(LeakAtlasError):
        Scenario.from_json(values)
