from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from leakatlas.errors import InvalidInput, NotGranted, UnknownName, UnsupportedModel
from leakatlas.fl import (
    ClientContext,
    Defense,
    Distribution,
    FedAVG,
    FedSGD,
    Message,
    ModelRef,
    RoundView,
    Scenario,
    Stage,
    Update,
    View,
    model_state,
    stage,
    state_hash,
)
from leakatlas.fl.view import SOURCES
from leakatlas.threat import LETTERS, Grant, Knowledge, Vantage
from tests.conftest import BOX, build_stage, photos, relative_error, surrogate

ALL = frozenset(Grant)
PASSIVE, NONE = frozenset("ABCDE"), frozenset[Grant]()

# What each letter holds without grants, written out: the table that the code must agree with.
GIVEN: dict[str, set[str]] = {"A": {"rounds", "num_examples", "input_shape", "classes", "others"}}
GIVEN["B"] = GIVEN["A"] | {"box"}
GIVEN["C"] = GIVEN["B"] | {"protocol", "defenses"}
GIVEN["D"] = GIVEN["C"] | {"surrogate"}
GIVEN["E"] = GIVEN["D"] | {"distribution"}
GIVEN["F"] = GIVEN["C"] | {"key", "clients", "target"}
GIVEN["G"] = GIVEN["D"] | {"key", "clients", "target"}
GIVEN["H"] = GIVEN["G"]
BY_GRANT = {
    Grant.PIXEL_RANGE: "box",
    Grant.LABELS: "labels",
    Grant.BATCH_BN: "batch_bn",
    Grant.BATCH_ORDER: "batch_order",
    Grant.DEFENSE_SECRETS: "secrets",
}


def _stage(letter: str = "C", grants: frozenset[Grant] = NONE, **more: Any) -> Stage:
    settings: dict[str, Any] = {
        "model": "convnet-bn", "settings": {}, "protocol": FedAVG(batch_size=2, shuffle=True),
        "examples": 3, "clients": 2, "public": surrogate(),
    }  # fmt: skip
    return build_stage(letter=letter, grants=grants, **{**settings, **more})


def _view(letter: str = "C", grants: frozenset[Grant] = NONE, **more: Any) -> View:
    stage = _stage(letter, grants, **more)
    return stage.view([stage.federation.play_round()], target=1, others=True)


@pytest.mark.parametrize("letter", LETTERS)
def test_a_letter_gives_its_fields_and_nothing_else(letter: str) -> None:
    view = _view(letter)
    assert {name for name in SOURCES if view.has(name)} == GIVEN[letter]
    for name in SOURCES:
        if name in GIVEN[letter]:
            getattr(view, name)
            assert name in view.reads
            continue
        with pytest.raises(NotGranted) as caught:
            getattr(view, name)
        message = str(caught.value)
        assert f"view.{name} is not granted to threat model {letter} at server" in message
        knowledge, grant = SOURCES[name]
        ways = [column.upper() for column in knowledge.names()] + ([grant.value] if grant else [])
        assert all(way in message.rpartition("it takes")[2] for way in ways)
        assert name not in view.reads


@pytest.mark.parametrize(("grant", "field"), BY_GRANT.items())
def test_a_grant_gives_one_field_more(grant: Grant, field: str) -> None:
    view = _view("A", frozenset({grant}))
    assert {name for name in SOURCES if view.has(name)} == GIVEN["A"] | {field}
    assert view.describe() == f"threat model A at server + {grant.value}"


def test_the_sources_cover_all_knowledge_and_all_grants() -> None:
    knowledge = Knowledge(0)
    for source, _ in SOURCES.values():
        knowledge |= source
    assert knowledge == ~Knowledge(0)
    assert {grant for _, grant in SOURCES.values() if grant} == set(Grant)


def test_a_field_that_is_not_given_cannot_be_smuggled_in() -> None:
    stage = _stage("B")
    with pytest.raises(InvalidInput, match="'surrogate' is not given to threat model B at server"):
        View(
            letter="B",
            vantage=Vantage.SERVER,
            grants=NONE,
            fields={"surrogate": surrogate()},
            architecture=stage.federation.model,
            model_ref=stage.scenario.model,
        )


def test_what_is_allowed_but_not_there_says_why() -> None:
    with pytest.raises(NotGranted, match="names no `surrogate` data"):
        _ = _view("D", public=None).surrogate
    with pytest.raises(NotGranted, match="other images of the population"):
        _ = _view("E", public=None).distribution
    with pytest.raises(NotGranted, match="once a round was played"):
        _ = _stage("A", ALL).view().batch_order


def test_asking_is_not_reading_and_reads_can_be_forgotten() -> None:
    view = _view("D", ALL)
    assert view.has("labels") and not view.reads
    _ = view.update, view.batch_shape
    assert view.reads == {"rounds", "num_examples", "input_shape"}
    view.forget_reads()
    assert view.reads == set()


def test_the_values_are_right() -> None:
    stage = _stage("E", ALL)
    record = stage.federation.play_round()
    view = stage.view([record], target=1)
    assert view.num_examples == 3 and view.batch_shape == (3, 3, 8, 8) and view.classes == 10
    assert view.box == BOX and view.protocol == stage.scenario.protocol and view.defenses == ()
    assert torch.equal(view.labels, torch.tensor([3, 4, 5]))
    assert torch.equal(torch.cat(view.batch_order), torch.cat(record.order[1]))
    public = surrogate()
    x = BOX.normalize(public.images.double())
    assert torch.allclose(view.distribution.mean, x.mean(0))
    assert torch.allclose(view.distribution.std, x.std(0, correction=0))
    counts = torch.bincount(public.labels[public.labels < 10], minlength=10).double()
    assert torch.allclose(view.distribution.class_frequencies, counts / counts.sum())
    assert view.surrogate.fingerprint() == surrogate().fingerprint()


def test_the_distribution_is_computed_without_any_private_image() -> None:
    """Mean and spread of two images are the two images, pixel by pixel."""
    model = ModelRef("builtin", "fc", {"size": 8, "in_channels": 1})
    played = stage(Scenario(model=model, data="digits", examples=2, clients=2, letter="E"))
    assert played.others is not None and len(played.others) > 1_000
    known = played.view().distribution
    assert torch.equal(known.mean, played.others.images.mean(0))
    others = {image.numpy().tobytes() for image in played.others.images}
    for client, held in played.victims.items():
        assert not others & {image.numpy().tobytes() for image in held.images}, client
        low, high = held.images.amin(0), held.images.amax(0)
        assert float((known.mean - known.std - low).abs().max()) > 0.1
        assert float((known.mean + known.std - high).abs().max()) > 0.1
    assert float(known.class_frequencies.sum()) == pytest.approx(1)


def test_batch_statistics_belong_to_the_target_and_its_received_model() -> None:
    stage = _stage("A", ALL, model="convnet-bn")
    record = stage.federation.play_round()
    view = stage.view([record], target=1)
    first = next(iter(view.batch_bn))
    conv = dict(record.received[1].named_modules())
    layer = next(m for m in conv.values() if isinstance(m, torch.nn.Conv2d))
    h = layer(stage.federation.clients[1].x)
    assert torch.allclose(view.batch_bn[first][0], h.mean((0, 2, 3)))
    assert torch.allclose(view.batch_bn[first][1], h.var((0, 2, 3), correction=0))


# -- vantages ------------------------------------------------------------------------------------


@pytest.mark.parametrize("vantage", [Vantage.WIRE, Vantage.SERVER])
def test_in_the_clear_wire_and_server_see_the_clients_update(vantage: Vantage) -> None:
    stage = _stage(vantage=vantage)
    record = stage.federation.play_round()
    view = stage.view([record], target=1)
    assert relative_error(view.update.tensors, record.updates[1].tensors) == 0
    assert view.num_examples == 3 and view.rounds[0].cohort == 2 and view.rounds[0].own is None


def test_a_server_that_is_asked_to_also_sees_the_others_update_of_every_round() -> None:
    stage = _stage("A", clients=3, examples=2)
    records = [stage.federation.play_round(apply=True) for _ in range(2)]
    assert not stage.view(records, target=1).has("others")
    view = stage.view(records, target=1, others=True)
    for number, record in enumerate(records):
        assert view.others[number].keys() == {0, 2}
        for client in (0, 2):
            seen, sent = view.others[number][client], record.updates[client]
            assert relative_error(seen.tensors, sent.tensors) == 0
            beside = view.beside(client, number)
            assert beside.update is seen and beside.num_examples == seen.num_examples
            assert len(beside.rounds) == 1 and not beside.has("others")
            assert _same(dict(beside.rounds[0].state), dict(record.states[client]))
    with pytest.raises(NotGranted, match="Round 1 shows no update of client 1; it shows: 0, 2"):
        view.beside(1, 1)


@pytest.mark.parametrize("vantage", [v for v in Vantage if v is not Vantage.SERVER])
def test_nobody_but_the_server_sees_the_others(vantage: Vantage) -> None:
    stage = _stage(vantage=vantage, clients=3, examples=2)
    view = stage.view([stage.federation.play_round()], target=1, others=True)
    with pytest.raises(NotGranted, match=r"view\.others is absent .*the vantage 'server'"):
        _ = view.others
    with pytest.raises(InvalidInput, match=f"'others' are not seen at {vantage}, only at server"):
        View(
            letter="C", vantage=vantage, grants=NONE, fields={"others": ({},)},
            architecture=stage.federation.model, model_ref=stage.scenario.model,
        )  # fmt: skip


def test_what_a_defense_encodes_shows_no_others() -> None:
    stage = _stage("C", defenses=(_Sealed(),), clients=3, examples=2)
    view = stage.view([stage.federation.play_round()], target=1, others=True)
    assert not view.has("others")


def test_what_was_granted_of_the_target_is_not_said_of_another_client() -> None:
    view = _view("D", ALL)
    beside = view.beside(0, 0)
    for name in ("labels", "batch_bn", "batch_order", "secrets"):
        assert view.has(name) and not beside.has(name)
    assert beside.has("protocol") and beside.has("surrogate") and beside.has("box")


@pytest.mark.parametrize("vantage", [Vantage.AGGREGATE, Vantage.PEER])
def test_aggregate_and_peer_see_the_mean_of_everyone(vantage: Vantage) -> None:
    stage = _stage(vantage=vantage)
    record = stage.federation.play_round()
    view = stage.view([record], target=1)
    assert relative_error(view.update.tensors, record.aggregate.tensors) == 0
    assert relative_error(view.update.tensors, record.updates[1].tensors) > 1e-3
    assert view.num_examples == 6 and view.update.clients == 2


def test_a_peer_also_holds_its_own_contribution_and_can_subtract_it() -> None:
    stage = _stage(vantage=Vantage.PEER)
    record = stage.federation.play_round()
    seen = stage.view([record], target=1).rounds[0]
    assert seen.own is not None and seen.update is not None
    assert relative_error(seen.own.tensors, record.updates[0].tensors) == 0
    rest = {n: 2 * t - seen.own.tensors[n] for n, t in seen.update.tensors.items()}
    assert relative_error(rest, record.updates[1].tensors) < 1e-12


@pytest.mark.parametrize("vantage", Vantage)
def test_granted_labels_are_of_the_examples_behind_the_update(vantage: Vantage) -> None:
    protocol = FedSGD(mode="eval")
    stage = _stage(grants=frozenset({Grant.LABELS}), vantage=vantage, protocol=protocol)
    view = stage.view([stage.federation.play_round()], target=1)
    clients = stage.federation.clients
    behind = [0, 1] if vantage in (Vantage.AGGREGATE, Vantage.PEER) else [1]
    assert torch.equal(view.labels, torch.cat([clients[c].y for c in behind]))
    assert len(view.labels) == view.num_examples == view.update.num_examples
    replayed = torch.cat([clients[c].x for c in behind])
    assert relative_error(view.replay(replayed, view.labels), view.update.tensors) < 1e-12


@pytest.mark.parametrize("vantage", [Vantage.AGGREGATE, Vantage.PEER])
def test_of_a_sum_no_single_batch_is_described(vantage: Vantage) -> None:
    told = frozenset({Grant.BATCH_BN, Grant.BATCH_ORDER, Grant.DROPOUT_MASKS, Grant.AUGMENTATION})
    stage = _stage(grants=told, vantage=vantage)
    view = stage.view([stage.federation.play_round()], target=1)
    with pytest.raises(NotGranted, match="the sum of several has none"):
        _ = view.batch_bn
    for name in told:
        assert not view.has(name.value)
    alone = stage.view([stage.federation.play_round(cohort=[1])], target=1)
    assert alone.has("batch_bn") and alone.has("batch_order")


class _Sealed(Defense):
    """A stand-in for encryption: the message leaves encoded."""

    key = "sealed"
    knob = "level"
    neutral = 0
    level: int = 1

    def wire(self, message: Message, context: ClientContext) -> Message:
        context.memory["sealed"] = message.update
        return Message(
            client=message.client,
            num_examples=message.num_examples,
            update=None,
            payload={"ciphertext": torch.ones(2)},
            encoded_by=self.key,
        )

    def aggregate(self, messages: Any, combine: Any, context: Any) -> Update:
        return self.opened

    opened = Update(tensors={"w": torch.ones(1)}, kind="gradient", state_hash="", num_examples=6)


@pytest.mark.parametrize("vantage", [Vantage.WIRE, Vantage.SERVER])
def test_an_encoded_message_shows_its_payload_and_who_hides_it(vantage: Vantage) -> None:
    stage = _stage(vantage=vantage, defenses=(_Sealed(),))
    view = stage.view([stage.federation.play_round()], target=1)
    assert view.rounds[0].update is None
    assert torch.equal(view.rounds[0].payload["ciphertext"], torch.ones(2))
    with pytest.raises(NotGranted, match=f"not readable at {vantage.value}: sealed encodes"):
        _ = view.update


def test_an_encoded_message_still_yields_an_aggregate() -> None:
    stage = _stage(vantage=Vantage.AGGREGATE, defenses=(_Sealed(),))
    view = stage.view([stage.federation.play_round()], target=1)
    assert torch.equal(view.update.tensors["w"], torch.ones(1))


# -- rounds and models ---------------------------------------------------------------------------


def test_every_round_keeps_its_own_model_and_update() -> None:
    stage = _stage()
    records = [stage.federation.play_round(apply=True) for _ in range(3)]
    view = stage.view(records, target=1)
    assert [seen.index for seen in view.rounds] == [0, 1, 2]
    hashes = [state_hash(model_state(view.model_at(i))) for i in range(3)]
    assert hashes == [view.update_at(i).state_hash for i in range(3)] and len(set(hashes)) == 3
    assert state_hash(model_state(view.model)) == hashes[-1]


def test_before_any_round_there_is_a_model_but_no_update() -> None:
    stage = _stage()
    view = stage.view()
    assert state_hash(model_state(view.model)) == state_hash(model_state(stage.federation.model))
    with pytest.raises(NotGranted, match="No round was played yet"):
        _ = view.update


def test_the_model_comes_in_the_clients_mode_and_as_a_copy() -> None:
    assert _view(protocol=FedAVG(mode="train")).model.training
    view = _view(protocol=FedSGD(mode="eval"))
    model = view.model
    assert not model.training
    with torch.no_grad():
        next(iter(model.parameters())).zero_()
    assert next(iter(view.model.parameters())).abs().sum() > 0


def test_a_round_of_another_architecture_is_not_replayed() -> None:
    view = _view()
    seen = view.rounds[0]
    other = RoundView(0, {**seen.state, "trap.weight": torch.zeros(2)}, 2, seen.update)
    with pytest.raises(UnsupportedModel, match=r"Round 0 used another architecture.*trap\.weight"):
        view.with_rounds([other], {}).model_at(0)


def test_without_takes_one_field_away() -> None:
    view = _view("D", frozenset({Grant.LABELS}))
    for name in [n for n in SOURCES if view.has(n)]:
        less = view.without(name)
        assert not less.has(name) and view.has(name)
        assert {n for n in SOURCES if less.has(n)} == {n for n in SOURCES if view.has(n)} - {name}
        with pytest.raises(NotGranted, match=rf"view\.{name} "):
            getattr(less, name)


# -- on disk -------------------------------------------------------------------------------------


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_same(a[k], b[k]) for k in a)
    if isinstance(a, tuple | list):
        return len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, Update | RoundView | Distribution):
        return type(a) is type(b) and _same(vars(a), vars(b))
    if hasattr(a, "fingerprint"):
        return bool(a.fingerprint() == b.fingerprint()) and a.name == b.name
    return bool(a == b)


@pytest.mark.parametrize("letter", ["A", "E", "H"])
@pytest.mark.parametrize("vantage", list(Vantage))
def test_a_saved_view_comes_back_with_every_field(
    letter: str, vantage: Vantage, tmp_path: Path
) -> None:
    stage = _stage(letter, ALL, vantage=vantage)
    records = [stage.federation.play_round(apply=True) for _ in range(2)]
    keys = [{"a": torch.ones(2)}, {"b": torch.zeros(1)}]
    view = stage.view(records, target=1, keys=keys, others=True)
    assert view.has("others") == (vantage is Vantage.SERVER)
    view.save(tmp_path)
    loaded = View.load(tmp_path)
    assert (loaded.letter, loaded.vantage, loaded.grants) == (letter, vantage, ALL)
    present = [name for name in SOURCES if view.has(name)]
    assert present == [name for name in SOURCES if loaded.has(name)]
    for name in present:
        assert _same(getattr(view, name), getattr(loaded, name)), name
    assert state_hash(model_state(loaded.model)) == state_hash(model_state(view.model))
    assert loaded.model.training == view.model.training
    if vantage is Vantage.SERVER and letter != "A":  # A lacks the rate behind a delta
        x = torch.rand(3, 3, 8, 8, dtype=torch.float64)
        ours, theirs = view.replay(x, view.labels), loaded.replay(x, loaded.labels)
        assert all(torch.equal(ours[n], theirs[n]) for n in ours)


def test_a_live_model_is_needed_where_the_description_cannot_build_one(tmp_path: Path) -> None:
    view = _view()
    view.save(tmp_path)
    file = tmp_path / "view.json"
    description = json.loads(file.read_text())
    description["model"] = {"kind": "object", "name": "MyNet", "kwargs": {}}
    file.write_text(json.dumps(description))
    with pytest.raises(InvalidInput, match="pass it as `model=`"):
        View.load(tmp_path)
    loaded = View.load(tmp_path, model=view.model.float())
    assert state_hash(model_state(loaded.model)) == state_hash(model_state(view.model))


@pytest.mark.parametrize("code", ["os:mkdir", "pathlib:Path.touch", "{folder}/net.py:make"])
def test_a_view_never_runs_the_code_that_it_names(code: str, tmp_path: Path) -> None:
    view = _view()
    view.save(tmp_path)
    canary = tmp_path / "owned"
    (tmp_path / "net.py").write_text(f"from pathlib import Path\nPath({str(canary)!r}).touch()\n")
    file = tmp_path / "view.json"
    description = json.loads(file.read_text())
    name = code.format(folder=tmp_path)
    description["model"] = {"kind": "python", "name": name, "kwargs": {"path": str(canary)}}
    file.write_text(json.dumps(description))
    with pytest.raises(InvalidInput, match=r"was not run.*`model=`, or `trust_code=True`"):
        View.load(tmp_path)
    assert not canary.exists()
    loaded = View.load(tmp_path, model=view.model.float())
    assert state_hash(model_state(loaded.model)) == state_hash(model_state(view.model))
    assert not canary.exists()


def test_trusted_code_of_ones_own_is_run(tmp_path: Path) -> None:
    view = _view()
    view.save(tmp_path)
    (tmp_path / "net.py").write_text(
        "from leakatlas import models\ndef make(**settings):\n"
        "    return models.build('convnet-bn', **settings)\n"
    )
    file = tmp_path / "view.json"
    description = json.loads(file.read_text())
    description["model"] |= {"kind": "python", "name": f"{tmp_path}/net.py:make"}
    file.write_text(json.dumps(description))
    loaded = View.load(tmp_path, trust_code=True)
    assert state_hash(model_state(loaded.model)) == state_hash(model_state(view.model))


def _damage(folder: Path, change: str) -> None:
    text, data = folder / "view.json", folder / "view.safetensors"
    description = json.loads(text.read_text())
    match change:
        case "no json":
            text.unlink()
        case "no tensors":
            data.unlink()
        case "truncated json":
            text.write_text(text.read_text()[:200])
        case "binary json":
            text.write_bytes(b"\xff\xfe\x00view")
        case "a list":
            text.write_text("[1, 2]")
        case "truncated tensors":
            data.write_bytes(data.read_bytes()[:-100])
        case "empty tensors":
            data.write_bytes(b"")
        case "pickle":
            torch.save({"w": torch.zeros(1)}, data)
        case "other format":
            text.write_text(json.dumps({**description, "format": "leakatlas/view/9"}))
        case "missing key":
            del description["vantage"]
            text.write_text(json.dumps(description))
        case "unknown vantage":
            text.write_text(json.dumps({**description, "vantage": "moon"}))
        case "unknown grant":
            text.write_text(json.dumps({**description, "grants": ["everything"]}))
        case "unknown letter":
            text.write_text(json.dumps({**description, "letter": "Q"}))
        case "unknown field":
            description["fields"]["private_images"] = {}
            text.write_text(json.dumps(description))
        case "a field too much":
            description["letter"] = "A"
            text.write_text(json.dumps(description))
        case "another model":
            description["model"]["kwargs"]["classes"] = 11
            text.write_text(json.dumps(description))
        case "labels without tensor":
            description["grants"] = ["labels"]
            description["fields"]["labels"] = {}
            text.write_text(json.dumps(description))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("no json", r"is not a saved view: .*view\.json.* is missing"),
        ("no tensors", "is missing|No such file"),
        ("truncated json", "cannot be read"),
        ("binary json", "cannot be read"),
        ("a list", "is not the description of a view"),
        ("truncated tensors", "cannot be read"),
        ("empty tensors", "cannot be read"),
        ("pickle", "cannot be read"),
        ("other format", "format 'leakatlas/view/9', expected 'leakatlas/view/1'"),
        ("missing key", "cannot be read: 'vantage' is missing"),
        ("unknown vantage", "Unknown vantage 'moon'"),
        ("unknown grant", "Unknown grant 'everything'"),
        ("unknown letter", "Unknown threat model 'Q'"),
        ("unknown field", "A view has no field 'private_images'"),
        ("a field too much", "is not given to threat model A"),
        ("another model", r"model expects \(11"),
        ("labels without tensor", "cannot be read: 'labels' is missing"),
    ],
)
def test_a_damaged_view_is_refused_with_a_reason(change: str, message: str, tmp_path: Path) -> None:
    _view().save(tmp_path)
    _damage(tmp_path, change)
    with pytest.raises((InvalidInput, UnknownName), match=message):
        View.load(tmp_path)


def test_a_nan_in_a_stored_update_is_named(tmp_path: Path) -> None:
    view = _view()
    next(iter(view.update.tensors.values())).view(-1)[0] = torch.nan
    view.save(tmp_path)
    with pytest.raises(InvalidInput, match="1 non-finite"):
        View.load(tmp_path)


def _spoil(folder: Path, name: str, value: float) -> None:
    file = folder / "view.safetensors"
    tensors = load_file(file)
    (path,) = [path for path in tensors if path.startswith(name)]
    tensors[path].view(-1)[0] = value
    save_file(tensors, file)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("architecture/fc.weight", r"model of the view holds 1 values at 'fc\.weight'"),
        ("architecture/features.1.running_var", r"model of the view .*running_var' that are not"),
        ("rounds/0/state/fc.bias", r"received in round 0 holds 1 values at 'fc\.bias'"),
        ("rounds/0/state/features.1.running_mean", r"received in round 0 .*running_mean'"),
        ("distribution/mean", "view holds values at 'distribution/mean' that are not finite"),
        ("batch_bn/features.1:variance", "view holds values at 'batch_bn/features.*' that are not"),
    ],
)
def test_what_is_not_finite_in_a_stored_view_is_named(
    name: str, words: str, value: float, tmp_path: Path
) -> None:
    _view("E", ALL).save(tmp_path)
    View.load(tmp_path)
    _spoil(tmp_path, name, value)
    with pytest.raises(InvalidInput, match=words):
        View.load(tmp_path)


def test_a_global_model_that_diverged_makes_no_view() -> None:
    scene = _stage("C")
    record = scene.federation.play_round()
    record.states[1]["fc.weight"].view(-1)[3] = torch.inf
    with pytest.raises(InvalidInput, match=r"received in round 0 .*'fc\.weight'.*diverged"):
        scene.view([record], target=1)


def test_no_pickle_and_no_private_pixel_is_on_disk(tmp_path: Path) -> None:
    _view("D").save(tmp_path)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["view.json", "view.safetensors"]
    content = (tmp_path / "view.safetensors").read_bytes()
    client = BOX.normalize(photos(6).images.double())
    for image in client:
        assert image.numpy().tobytes()[:64] not in content
