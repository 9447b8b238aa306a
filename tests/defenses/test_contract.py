"""What every defense promises, whatever it does; every implemented row is found by itself."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from leakatlas import models
from leakatlas.catalogue import loader, registry, source
from leakatlas.errors import IncompatibleDefenses, InvalidParameter, NotGranted
from leakatlas.fl import (
    ActsOn,
    Defense,
    FedAVG,
    FedSGD,
    ModelRef,
    Protocol,
    RoundRecord,
    Scenario,
    Stage,
    Trait,
    View,
    acts_at,
    model_state,
    stage,
)
from leakatlas.fl.view import defense_from_json, defense_json
from leakatlas.threat import Grant, Vantage
from tests.conftest import BOX, photos

KEYS = registry.defense_keys()
CLIENTS, EXAMPLES = 4, 2
PROTOCOLS: dict[str, Protocol] = {
    "fedsgd": FedSGD(),
    "fedavg": FedAVG(epochs=2, batch_size=1, lr=0.05),
}
SIZE = 8
OWN_RANDOMNESS = {"homomorphic_encryption"}
"""Their library draws where no seed reaches; sums differ by the noise of ciphertexts."""


def network(dtype: torch.dtype = torch.float64) -> nn.Module:
    """Convolutions, group normalisation (no mixing of examples) and a linear head.

    Its large head makes large gradients, so that bounds on norms are felt.
    """
    model = models.build("convnet", size=SIZE, width=4, norm="group").to(dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name == "fc.weight":
                parameter.mul_(100)
    return model


def on_stage(
    *defenses: Defense,
    protocol: Protocol = PROTOCOLS["fedsgd"],
    dtype: torch.dtype = torch.float64,
    vantage: Vantage = Vantage.SERVER,
    seed: int = 0,
) -> Stage:
    scenario = Scenario(
        model=ModelRef("object", "network"),
        clients=CLIENTS,
        protocol=protocol,
        defenses=defenses,
        letter="C",
        vantage=vantage,
        seed=seed,
    )
    return stage(scenario, model=network(dtype), victims=photos(EXAMPLES * CLIENTS, SIZE), box=BOX)


def load(key: str) -> type[Defense]:
    cls = registry.load_defense(key)
    assert issubclass(cls, Defense)
    return cls


LESS_WORK: Mapping[str, Mapping[str, object]] = {"dcs2": {"iterations": 3}}
"""Parameters of defenses whose default takes minutes; what is tested does not rest on them."""


def usual(key: str) -> Defense:
    """At its default strength."""
    return load(key)(**LESS_WORK.get(key, {}))


def neutral(key: str) -> Defense:
    cls = load(key)
    return cls(**{cls.knob: cls.neutral})


def accepts(defense: Defense, protocol: Protocol) -> bool:
    return isinstance(protocol, FedSGD) or defense.modes != {ActsOn.SINGLE_BATCH}


def same(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def close(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(
        torch.allclose(a[name], b[name], rtol=0, atol=1e-6) for name in a
    )


def uploads(record: RoundRecord) -> dict[int, Mapping[str, Tensor]]:
    return {client: update.tensors for client, update in record.updates.items()}


def seen(record: RoundRecord) -> list[Mapping[str, Tensor]]:
    """Everything that any vantage shows of a round."""
    messages = [
        {**(m.update.tensors if m.update else {}), **m.payload} for m in record.messages.values()
    ]
    return [*messages, record.aggregate.tensors]


def test_the_stress_set_is_found() -> None:
    assert {
        "gradient_pruning",
        "clipping",
        "soteria",
        "vicinal_augmentation",
        "precode",
        "fedkl",
    } <= set(KEYS)


@pytest.mark.parametrize("key", KEYS)
def test_names_agree(key: str) -> None:
    cls = load(key)
    assert cls.key == key
    assert cls.__name__.lower() == key.replace("_", "")
    assert dataclasses.is_dataclass(cls)
    assert cls.__doc__ is not None
    assert "Args:" in cls.__doc__
    assert loader.defense(key).key == key


@pytest.mark.parametrize("key", KEYS)
def test_there_is_one_knob_with_a_neutral_value(key: str) -> None:
    cls = load(key)
    assert cls.knob in {field.name for field in dataclasses.fields(cls)}
    assert getattr(neutral(key), cls.knob) == cls.neutral
    assert getattr(cls(), cls.knob) != cls.neutral, "the default defends nothing"


@pytest.mark.parametrize("key", KEYS)
def test_its_strengths_are_worth_trying(key: str) -> None:
    cls = load(key)
    assert cls.strengths, f"{key} names no value of its knob that is worth trying"
    assert cls.neutral not in cls.strengths
    assert getattr(cls(), cls.knob) in cls.strengths
    read = source.of("defense", key)
    assert read is not None and read.strengths == cls.strengths, "write them as plain numbers"
    for value in cls.strengths:
        assert getattr(dataclasses.replace(cls(), **{cls.knob: value}), cls.knob) == value


@pytest.mark.parametrize("key", KEYS)
def test_it_acts_somewhere_and_says_on_what(key: str) -> None:
    defense = usual(key)
    assert acts_at(defense)
    assert defense.modes
    assert all(isinstance(mode, ActsOn) for mode in defense.modes)
    assert all(isinstance(trait, Trait) for trait in defense.active_traits())


@pytest.mark.parametrize("key", KEYS)
def test_it_is_frozen_and_round_trips_through_json(key: str) -> None:
    for defense in (usual(key), neutral(key)):
        text = json.dumps(defense_json(defense), allow_nan=False)
        assert defense_from_json(json.loads(text)) == defense
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(defense, defense.knob, defense.neutral)


@pytest.mark.parametrize("key", KEYS)
def test_every_parameter_refuses_nonsense_by_name(key: str) -> None:
    cls = load(key)
    for field in dataclasses.fields(cls):
        with pytest.raises(InvalidParameter, match=rf"{cls.__name__}\({field.name}="):
            cls(**{field.name: object()})
    with pytest.raises(InvalidParameter, match="no_such_parameter"):
        cls.from_json({"no_such_parameter": 1})


@pytest.mark.parametrize("protocol", PROTOCOLS.values(), ids=PROTOCOLS)
@pytest.mark.parametrize("key", KEYS)
def test_the_neutral_knob_sends_the_undefended_upload_bitwise(key: str, protocol: Protocol) -> None:
    defense = neutral(key)
    if not accepts(defense, protocol):
        with pytest.raises(IncompatibleDefenses, match=key):
            on_stage(defense, protocol=protocol)
        return
    plain = on_stage(protocol=protocol).federation
    defended = on_stage(defense, protocol=protocol).federation
    for _ in range(2):  # memory of the first round must not show in the second
        a, b = plain.play_round(apply=True), defended.play_round(apply=True)
        assert all(same(uploads(a)[client], uploads(b)[client]) for client in uploads(a))
        if Trait.HIDES_UPDATES not in defense.active_traits():
            assert all(same(x, y) for x, y in zip(seen(a), seen(b), strict=True))


def test_a_pipeline_of_neutral_defenses_sends_the_undefended_upload_bitwise() -> None:
    pipeline = [d for d in map(neutral, KEYS) if not d.active_traits()]
    assert len(pipeline) >= 6
    a = on_stage().federation.play_round()
    b = on_stage(*pipeline).federation.play_round()
    assert all(same(uploads(a)[client], uploads(b)[client]) for client in uploads(a))


@pytest.mark.parametrize("key", KEYS)
def test_the_default_knob_changes_what_somebody_sees(key: str) -> None:
    plain = on_stage().federation.play_round()
    defended = on_stage(usual(key)).federation.play_round()
    pairs = zip(seen(plain), seen(defended), strict=True)
    assert any(not same(a, b) for a, b in pairs)


@pytest.mark.parametrize("protocol", PROTOCOLS.values(), ids=PROTOCOLS)
@pytest.mark.parametrize("key", KEYS)
def test_the_same_seed_gives_the_same_round(key: str, protocol: Protocol) -> None:
    defense = usual(key)
    if not accepts(defense, protocol):
        with pytest.raises(IncompatibleDefenses, match=key):
            on_stage(defense, protocol=protocol)
        return
    global_state = torch.get_rng_state()
    first, second = (on_stage(defense, protocol=protocol).federation.play_round() for _ in range(2))
    assert all(same(uploads(first)[c], uploads(second)[c]) for c in uploads(first))
    agree = close if key in OWN_RANDOMNESS else same
    assert agree(first.aggregate.tensors, second.aggregate.tensors)
    assert torch.equal(torch.get_rng_state(), global_state)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("key", KEYS)
def test_uploads_keep_names_shapes_and_dtype_and_stay_finite(key: str, dtype: torch.dtype) -> None:
    federation = on_stage(usual(key), dtype=dtype).federation
    record = federation.play_round()
    shared = {
        name: p for name, p in federation.model.named_parameters()
        if name not in federation.private_names
    }  # fmt: skip
    for update in record.updates.values():
        assert update.tensors.keys() == shared.keys()
        for name, tensor in update.check().tensors.items():
            assert tensor.shape == shared[name].shape
            assert tensor.dtype == dtype
            assert not tensor.requires_grad


@pytest.mark.parametrize("key", KEYS)
def test_nothing_is_changed_in_place(key: str) -> None:
    model = network()
    before = model_state(model)
    federation = on_stage(usual(key)).federation
    held = model_state(federation.model)
    data = {i: (c.x.clone(), c.y.clone()) for i, c in federation.clients.items()}
    federation.play_round()
    assert same(model_state(federation.model), held)
    assert same(model_state(network()), before)
    for index, (x, y) in data.items():
        assert torch.equal(federation.clients[index].x, x)
        assert torch.equal(federation.clients[index].y, y)


@pytest.mark.parametrize("key", KEYS)
def test_defending_a_model_leaves_the_original_alone(key: str) -> None:
    model = network()
    before, modules = model_state(model), [name for name, _ in model.named_modules()]
    with torch.random.fork_rng(devices=[]):
        usual(key).model(model)
    assert same(model_state(model), before)
    assert [name for name, _ in model.named_modules()] == modules


@pytest.mark.parametrize("key", KEYS)
def test_a_client_can_predict_with_it(key: str) -> None:
    federation = on_stage(usual(key)).federation
    federation.play_round(apply=True)
    logits = federation.evaluation_model(1)(federation.clients[1].x)
    assert logits.shape == (EXAMPLES, 10)
    assert torch.isfinite(logits).all()


@pytest.mark.parametrize("vantage", [Vantage.SERVER, Vantage.AGGREGATE])
@pytest.mark.parametrize("key", KEYS)
def test_a_saved_view_simulates_as_the_live_one(key: str, vantage: Vantage, tmp_path: Path) -> None:
    live_stage = on_stage(usual(key), vantage=vantage)
    live = live_stage.view([live_stage.federation.play_round()])
    live.save(tmp_path)
    with torch.random.fork_rng(devices=[]):
        loaded = View.load(tmp_path, model=network())
    assert loaded.defenses == live.defenses
    if live.rounds[0].update is None:
        assert loaded.rounds[0].update is None
        return
    shape = live.batch_shape
    x = torch.rand(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    y = torch.arange(len(x)) % 10
    replays = []
    for view in (live, loaded):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            replays.append({n: t.detach() for n, t in view.replay(x, y).items()})
    assert same(*replays)


@pytest.mark.parametrize("key", KEYS)
def test_the_mirror_is_differentiable_and_keeps_its_inputs(key: str) -> None:
    defense = usual(key)
    live_stage = on_stage(defense, vantage=Vantage.AGGREGATE)
    record = live_stage.federation.play_round()
    view = live_stage.view([record])
    if record.broadcast is None:  # only members read the sum
        live_stage = on_stage(defense, vantage=Vantage.PEER)
        view = live_stage.view([live_stage.federation.play_round()])
    observed = copy.deepcopy(dict(view.update.tensors))
    x = torch.full(view.batch_shape, 0.3, dtype=torch.float64, requires_grad=True)
    replayed = view.replay(x, torch.arange(len(x)) % 10)
    assert replayed.keys() == observed.keys()
    total = torch.stack([t.square().sum() for t in replayed.values()]).sum()
    (slope,) = torch.autograd.grad(total, x)
    assert torch.isfinite(slope).all()
    assert bool(slope.any())
    assert same(view.update.tensors, observed)


ELSEWHERE = {
    "secure_aggregation": "its sum is exact; nobody is granted the masks",
    "fragmented_fl": "a group's uploads are those of its clients together",
    "quantization": "rounds at random; the true batch is within a level",
    "ats": "the true transformed batch is an exact zero",
    "dcs2": "what conceals is fitted along with the image",
    "precode": "with its draws in the bottleneck the true batch is an exact zero",
    "fedkl": "with its locks merged the true batch is an exact zero",
}
"""Whose oracle is shown by tests of their own, and what they show."""


@pytest.mark.parametrize("key", KEYS)
def test_with_its_secret_disclosed_the_true_batch_fits_the_upload(key: str) -> None:
    """One image, one gradient; a mirror that is off would make every adaptive attack miss."""
    scenario = Scenario(
        model=ModelRef("object", "network"), clients=CLIENTS, protocol=PROTOCOLS["fedsgd"],
        defenses=(usual(key),), letter="C",
        grants=frozenset({Grant.LABELS, Grant.DEFENSE_SECRETS}),
    )  # fmt: skip
    live = stage(scenario, model=network(), victims=photos(CLIENTS, SIZE), box=BOX)
    record = live.federation.play_round()
    if key == "secure_aggregation":
        with pytest.raises(NotGranted):
            _ = live.view([record]).update
        return
    view, client = live.view([record]), live.federation.clients[0]
    found, sent = view.replay(client.x, client.y), view.update.tensors
    apart = sum((found[n] - sent[n]).detach().square().sum() for n in sent)
    whole = sum(t.square().sum() for t in sent.values())
    assert (float(apart) < 1e-16 * float(whole)) == (key not in ELSEWHERE)
