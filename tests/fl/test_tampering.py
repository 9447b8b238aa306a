"""What a malicious server can send is data: no module, no code, no buffer of its own."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from leakatlas import models
from leakatlas.errors import InvalidInput
from leakatlas.fl import (
    Client,
    FedAVG,
    Federation,
    FedSGD,
    Protocol,
    TamperedModel,
    Tampering,
    edits,
    model_state,
)
from leakatlas.fl.tampering import METADATA

DOUBLE = torch.float64
N = 3 * 8 * 8
W = torch.full((N,), 1 / N, dtype=DOUBLE)
EDGES = torch.linspace(0, 1, 9, dtype=DOUBLE)
IMPRINT = edits.Imprint(W, EDGES)


def _split(group: int) -> edits.SplitImprint:
    return edits.SplitImprint(
        W, EDGES, shape=(3, 8, 8), clients=2, group=group, kappa=3.0, mean=(0.1, 0.2, 0.3)
    )


def _traps() -> edits.TrapBlock:
    generator = torch.Generator().manual_seed(0)
    weight, back = (torch.randn(s, generator=generator, dtype=DOUBLE) for s in ((5, N), (N, 5)))
    return edits.TrapBlock(weight, torch.zeros(5, dtype=DOUBLE), back)


def _federation(protocol: Protocol | None = None, model: nn.Module | None = None) -> Federation:
    generator = torch.Generator().manual_seed(1)
    clients = {
        c: Client(torch.rand(4, 3, 8, 8, generator=generator, dtype=DOUBLE), torch.arange(4))
        for c in range(2)
    }
    model = model or models.build("convnet-bn", size=8, width=4).double()
    return Federation(model, clients, protocol or FedSGD())


def _changed() -> dict[str, Tensor]:
    return {n: t + 1 if t.is_floating_point() else t
            for n, t in model_state(_federation().model).items()}  # fmt: skip


def _same(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


# -- what a client builds --------------------------------------------------------------------------


def test_values_that_are_not_named_are_those_of_the_global_model() -> None:
    federation = _federation()
    name = "fc.weight"
    sent = TamperedModel(weights={name: torch.zeros_like(model_state(federation.model)[name])})
    record = federation.play_round(sent=sent)
    assert not bool(record.states[0][name].any())
    rest = {n: t for n, t in model_state(federation.model).items() if n != name}
    assert _same({n: t for n, t in record.states[0].items() if n != name}, rest)


def test_edits_are_passed_in_their_order() -> None:
    federation = _federation()
    sent = TamperedModel(edits=(IMPRINT, _traps()))
    built = sent.build(federation.model, pixels=N)
    x = federation.clients[0].x
    by_hand = federation.model.eval()(_traps().layers()(IMPRINT.layers()(x)))
    assert torch.equal(built.eval()(x), by_hand)
    names = {name.split(".")[0] for name, _ in built.named_parameters()}
    assert names == {"block", "model"} and "model.block.first.weight" in dict(
        built.named_parameters()
    )


@pytest.mark.parametrize(
    ("sent", "match"),
    [
        (TamperedModel(weights={"seen": torch.zeros(4, N)}), "'seen' as .* has nothing there"),
        (TamperedModel(weights={"fc.bias": torch.zeros(3)}), "'fc.bias' as .*float64 .10,"),
        (TamperedModel(weights={"fc.bias": torch.zeros(10)}), r"float32 \(10,\); .*float64"),
        (TamperedModel(edits=(replace(IMPRINT, w=W[:48]),)), "made for 48 entries .* have 192"),
        (TamperedModel(edits=(edits.Imprint(W.float(), EDGES.float()),)), "float32; .*float64"),
    ],
)
def test_what_does_not_fit_the_agreed_architecture_is_refused(
    sent: TamperedModel, match: str
) -> None:
    with pytest.raises(InvalidInput, match=match):
        _federation().play_round(sent=sent)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: edits.Imprint(W, EDGES.flip(0)), "must rise strictly"),
        (lambda: edits.Imprint(W, EDGES * torch.nan), "must rise strictly"),
        (lambda: edits.Imprint(W[None], EDGES), "expected w .n,. and edges"),
        (lambda: _split(2), "a group below clients"),
        (lambda: replace(_split(0), shape=(3, 8, 9)), "w of 216 entries, got 192"),
        (lambda: replace(_split(0), std=(1.0,)), "expected 3 values"),
        (lambda: replace(_traps(), back=W), "expected weight"),
    ],
)
def test_an_edit_that_is_not_well_formed_is_refused(
    make: Callable[[], edits.Edit], match: str
) -> None:
    with pytest.raises(InvalidInput, match=match):
        make()


def test_a_normalisation_is_undone_by_the_kernels() -> None:
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)
    block = replace(_split(1), mean=mean, std=std).layers()
    pixels = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(2), dtype=DOUBLE)
    shift, scale = (torch.tensor(v, dtype=DOUBLE)[:, None, None] for v in (mean, std))
    features = block.conv((pixels - shift) / scale)
    assert torch.allclose(features[:, 3:], 3.0 * pixels, atol=1e-12)
    assert not bool(features[:, :3].any())


# -- private parameters ----------------------------------------------------------------------------


def test_private_parameters_stay_on_the_device_behind_a_block_too() -> None:
    from leakatlas.defenses.heuristic.model.fedkl import FedKL

    model = models.build("convnet", norm="batch", size=8, width=4)
    clients = {0: Client(torch.rand(4, 3, 8, 8), torch.arange(4))}
    federation = Federation(model, clients, FedSGD(lr=0.1), [FedKL()])
    assert federation.private_names
    block = edits.Imprint(W.float(), EDGES.float())
    record = federation.play_round(sent=TamperedModel.of(federation.model, block))
    own = dict(clients[0].private)
    built = model_state(record.received[0])
    for name in federation.private_names:
        assert f"model.{name}" not in record.states[0]
        assert f"model.{name}" not in record.updates[0].tensors
        assert f"model.{name}" in built and name in own
    federation.play_round(sent=TamperedModel.of(federation.model, block))
    assert any(not torch.equal(own[n], t) for n, t in clients[0].private.items())


# -- cheating: code in what is sent ----------------------------------------------------------------


class Recorder(nn.Module):
    """Keeps every input in a buffer, which comes back as one of the buffers after training."""

    seen: Tensor

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("seen", torch.zeros(4, 3, 8, 8, dtype=DOUBLE))

    def forward(self, x: Tensor) -> Tensor:
        self.seen.copy_(x.detach())
        logits: Tensor = self.model(x)
        return logits


@dataclass(frozen=True)
class Recording(edits.TrapBlock):
    """An edit whose layers are the adversary's own."""

    def layers(self) -> Any:
        return Recorder(nn.Identity())


class Alert(Tensor):
    """A tensor that runs code in every operation."""

    heard: list[object] = []  # noqa: RUF012  # shared on purpose: what the code got hold of

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        cls.heard.append(args)
        return super().__torch_function__(func, types, args, kwargs or {})  # type: ignore[no-untyped-call]  # torch's own has no types


@pytest.mark.parametrize("each", [False, True], ids=["all", "each"])
def test_a_live_module_is_not_sent(each: bool) -> None:
    federation = _federation(FedAVG(batch_size=4))
    heard: list[Tensor] = []
    hooked = models.build("convnet-bn", size=8, width=4).double()
    hooked.register_forward_hook(lambda module, inputs, output: heard.append(inputs[0]))
    for module in (Recorder(federation.model), hooked):
        sent: Any = {0: module} if each else module
        with pytest.raises(InvalidInput, match=r"builds itself.*got (Recorder|ConvNet)"):
            federation.play_round(sent=sent)
        with pytest.raises(InvalidInput, match="builds itself"):
            Tampering(sent=sent, key={})
    assert not heard
    record = federation.play_round(sent=TamperedModel.of(hooked))  # its values are all that travel
    assert not heard and len(record.updates) == 2


def test_a_subclass_of_an_edit_a_model_or_a_tensor_is_not_sent() -> None:
    with pytest.raises(InvalidInput, match=r"Recording is no edit .* Imprint, SplitImprint, Trap"):
        TamperedModel(edits=(Recording(**vars(_traps())),))

    class Wider(TamperedModel):
        def build(self, agreed: nn.Module, **facts: Any) -> nn.Module:
            return Recorder(agreed)

    with pytest.raises(InvalidInput, match="got Wider"):
        _federation().play_round(sent=Wider())
    alert = torch.zeros(10, dtype=DOUBLE).as_subclass(Alert)
    with pytest.raises(InvalidInput, match=r"'fc\.bias' is a Alert, expected a plain tensor"):
        TamperedModel(weights={"fc.bias": alert})
    with pytest.raises(InvalidInput, match="'w' is a Alert"):
        TamperedModel(edits=(edits.Imprint(W.clone().as_subclass(Alert), EDGES),))
    with pytest.raises(InvalidInput, match="'trap' is a Alert"):
        Tampering(sent=TamperedModel(), key={"trap": alert})


def test_what_is_hung_on_the_data_afterwards_does_not_travel() -> None:
    edit = _traps()
    object.__setattr__(edit, "layers", lambda: Recorder(nn.Identity()))
    grown = torch.zeros(10, dtype=DOUBLE, requires_grad=True)
    heard: list[Tensor] = []
    grown.register_hook(heard.append)
    sent = TamperedModel(weights={"fc.bias": grown}, edits=(edit,))
    tampering = Tampering(sent=sent, key={}).copy()
    record = _federation().play_round(sent=tampering.sent)
    assert not heard
    assert not any(isinstance(m, Recorder) for m in record.received[0].modules())
    assert all("seen" not in n for n in record.updates[0].buffers_after)


class Remembers(nn.Module):
    """An agreed architecture that grows a buffer while it trains."""

    def __init__(self) -> None:
        super().__init__()
        self.model = models.build("convnet-bn", size=8, width=4).double()

    def forward(self, x: Tensor) -> Tensor:
        if x.abs().max() > 0:
            self.register_buffer("last", x.detach().clone())
        logits: Tensor = self.model(x)
        return logits


@pytest.mark.parametrize("protocol", [FedSGD(mode="train"), FedAVG(batch_size=4)])
def test_only_agreed_buffers_come_back(protocol: Protocol) -> None:
    federation = _federation(protocol, Remembers())
    record = federation.play_round()
    agreed = {n for n, _ in federation.model.named_buffers()}
    assert agreed and not any("last" in n for n in agreed)
    for update in record.updates.values():
        assert set(update.buffers_after) == set(update.buffers_before) == agreed


# -- on disk ---------------------------------------------------------------------------------------


def _tampering() -> Tampering:
    return Tampering(
        sent={0: TamperedModel(weights=_changed(), edits=(_split(0),)),
              1: TamperedModel(edits=(_split(1),))},
        key={"edges": EDGES, "clients": torch.tensor([0, 1]), "copied": torch.tensor(True)},
        cohort=(1, 0),
        sybils=3,
    )  # fmt: skip


def test_a_round_played_from_a_file_is_the_same_bit_for_bit(tmp_path: Path) -> None:
    tampering = _tampering()
    tampering.save(tmp_path / "sent.safetensors")
    read = Tampering.load(tmp_path / "sent.safetensors")
    assert (read.cohort, read.sybils) == ((1, 0), 3)
    assert _same(read.key, tampering.key)
    here, there = (_federation().play_round(sent=t.sent) for t in (tampering, read))
    for client in (0, 1):
        assert _same(here.states[client], there.states[client])
        assert _same(here.updates[client].tensors, there.updates[client].tensors)


@pytest.mark.parametrize("edit", [IMPRINT, _split(1), _traps()], ids=lambda e: type(e).__name__)
def test_every_edit_survives_a_file(edit: edits.Edit, tmp_path: Path) -> None:
    Tampering(sent=TamperedModel(edits=(edit, edit)), key={}).save(tmp_path / "e.safetensors")
    read = Tampering.load(tmp_path / "e.safetensors").sent
    assert isinstance(read, TamperedModel) and [type(e) for e in read.edits] == [type(edit)] * 2
    for back in read.edits:
        assert _same(back.layers().state_dict(), edit.layers().state_dict())


def test_what_clients_share_is_held_once() -> None:
    shared = TamperedModel(weights=_changed())
    tensors, facts = Tampering(sent=dict.fromkeys(range(50), shared), key={}).pack()
    assert len(tensors) == len(_changed()) and len(facts["models"]) == 1
    split = {c: TamperedModel(edits=(replace(_split(0), clients=50, group=c),)) for c in range(50)}
    tensors, facts = Tampering(sent=split, key={}).pack()
    assert len(tensors) == 2 and len(facts["models"]) == 50


def _rewrite(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    with safe_open(str(path), framework="pt") as file:
        facts = json.loads(file.metadata()[METADATA])
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    change(facts)
    save_file(tensors, path, metadata={METADATA: json.dumps(facts)})


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda f: f["models"][0]["edits"][0].update(kind="Module"), "edit.*'Module'"),
        (lambda f: f["models"][0]["edits"][0].update(code="os:system"), "malformed at 'models.0"),
        (lambda f: f["models"][0]["edits"][0]["facts"].update(hook="x"), "no parameter 'hook'"),
        (lambda f: f["models"][0]["edits"][0]["facts"].pop("kappa"), "incomplete.*kappa"),
        (lambda f: f["models"][0]["edits"][0]["facts"].update(kappa="nan"), "kappa="),
        (lambda f: f["models"][0]["edits"][0]["tensors"].update(w="sent/99"), "sent/99"),
        (lambda f: f["models"][0]["weights"].update({"fc.bias": "key/none"}), "key/none"),
        (lambda f: f.update(sent=7), "not there"),
        (lambda f: f.update(sybils=-1), "malformed at 'sybils'"),
        (lambda f: f.update(cohort=["a"]), "malformed at 'cohort"),
        (lambda f: f.pop("models"), "malformed at 'models'"),
    ],
)  # fmt: skip
def test_a_hostile_file_gets_a_sentence(
    change: Callable[[dict[str, Any]], object], match: str, tmp_path: Path
) -> None:
    path = tmp_path / "sent.safetensors"
    _tampering().save(path)
    _rewrite(path, change)
    with pytest.raises(InvalidInput, match=match):
        Tampering.load(path)


def test_a_missing_foreign_or_truncated_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="does not exist"):
        Tampering.load(tmp_path / "none")
    foreign = tmp_path / "foreign.safetensors"
    save_file({"a": torch.zeros(1)}, foreign)
    with pytest.raises(InvalidInput, match="no tampering"):
        Tampering.load(foreign)
    _tampering().save(foreign)
    foreign.write_bytes(foreign.read_bytes()[:200])
    with pytest.raises(InvalidInput, match="no safetensors file"):
        Tampering.load(foreign)
