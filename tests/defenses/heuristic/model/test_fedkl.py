from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from leakatlas import models
from leakatlas.defenses.heuristic.model.fedkl import FedKL, KeyLock, lockable, merged
from leakatlas.errors import UnsupportedModel
from leakatlas.fl import FedAVG, FedSGD, Protocol, load_into, model_state
from leakatlas.fl import replay as replays
from leakatlas.threat import Grant
from tests.conftest import build_stage, relative_error
from tests.defenses.heuristic.probes import observed, replayed

BN: dict[str, Any] = {"width": 4, "norm": "batch"}
SMALL = FedKL(key_length=16)
STILL = FedSGD(lr=1e-15)
"""Locks that do not move, so that what a client holds after a round is what it used in it."""


def bn_model() -> nn.Module:
    return models.build("convnet", size=8, **BN).double()


def locks(model: nn.Module) -> list[KeyLock]:
    return [m for m in model.modules() if isinstance(m, KeyLock)]


@pytest.mark.parametrize("norm", ["batch", "group"])
@pytest.mark.parametrize(("share", "expected"), [(0.0, 0), (0.25, 1), (0.3, 2), (1.0, 4)])
def test_the_first_layers_are_locked(norm: str, share: float, expected: int) -> None:
    model = models.build("convnet", size=8, width=4, norm=norm)
    defended = FedKL(locked=share, key_length=16).model(model)
    assert len(locks(defended)) == expected
    assert lockable(defended) == lockable(model)[expected:]
    assert not locks(model)


def test_the_block_is_the_formula() -> None:
    torch.manual_seed(0)
    defended = SMALL.model(bn_model()).eval()
    lock = locks(defended)[0]
    x = torch.randn(2, 4, 3, 3).double()
    gamma = (lock.scale.weight @ lock.key + lock.scale.bias).relu()
    beta = (lock.shift.weight @ lock.key + lock.shift.bias).relu()
    expected = gamma[:, None, None] * (x / (1 + 1e-5) ** 0.5) + beta[:, None, None]
    torch.testing.assert_close(lock(x), expected)
    assert float(lock.key.min()) >= 0
    assert float(lock.key.max()) <= 1


def test_scale_and_shift_do_not_follow_the_image() -> None:
    defended = SMALL.model(bn_model()).train()
    before = [t.clone() for lock in locks(defended) for t in lock.affine()]
    defended(torch.randn(4, 3, 8, 8).double())
    after = [t for lock in locks(defended) for t in lock.affine()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("protocol", [FedSGD(), FedAVG(epochs=2, batch_size=2, lr=0.1)])
def test_the_upload_holds_no_lock_and_clients_hold_their_own(protocol: Protocol) -> None:
    stage = build_stage(
        model="convnet", settings=BN, clients=2, examples=3, protocol=protocol, defenses=(SMALL,)
    )
    federation = stage.federation
    record = federation.play_round()
    assert len(federation.private_names) == 4 * 5
    for update in record.updates.values():
        assert not federation.private_names & {
            *update.tensors, *update.buffers_before, *update.buffers_after,
        }  # fmt: skip
    ours, theirs = (federation.clients[i].private for i in (0, 1))
    public = model_state(federation.model)
    for name in federation.private_names:
        assert not torch.equal(ours[name], theirs[name])
        assert not torch.equal(ours[name], public[name])


def test_private_locks_are_trained_and_kept_for_the_next_round() -> None:
    stage = build_stage(
        model="convnet",
        settings=BN,
        examples=3,
        protocol=FedAVG(lr=0.5, batch_size=3),
        defenses=(FedKL(key_length=16, activation="sigmoid"),),
    )
    federation = stage.federation
    federation.play_round(apply=True)
    trained = {n: t.clone() for n, t in federation.clients[0].private.items()}
    received = federation.play_round().received[0]
    held = model_state(received)
    assert all(torch.equal(held[name], t) for name, t in trained.items())
    fresh = build_stage(
        model="convnet", settings=BN, examples=3,
        defenses=(FedKL(key_length=16, activation="sigmoid"),),
    ).federation  # fmt: skip
    fresh.play_round()
    start = fresh.clients[0].private
    name = next(n for n in trained if n.endswith("scale.weight"))
    key = next(n for n in trained if n.endswith("key"))
    assert not torch.equal(trained[name], start[name])
    assert torch.equal(trained[key], start[key])


def test_with_unit_scale_and_no_shift_the_upload_does_not_depend_on_the_key() -> None:
    uploads = []
    for seed in (0, 1):
        stage = build_stage(model="convnet", settings=BN, examples=3, defenses=(SMALL,))
        federation = stage.federation
        private = federation.clients[0].private
        held = model_state(federation.model)
        for name in federation.private_names:
            if name.endswith("key"):
                private[name] = torch.rand(
                    16, generator=torch.Generator().manual_seed(seed)
                ).double()
            else:
                one = name.endswith("scale.bias")
                private[name] = torch.full_like(held[name], 1.0 if one else 0.0)
        uploads.append(federation.play_round().updates[0].tensors)
    plain = build_stage(model="convnet", settings=BN, examples=3)
    undefended = plain.federation.play_round().updates[0].tensors
    assert all(torch.equal(uploads[0][n], uploads[1][n]) for n in uploads[0])
    for name in uploads[0].keys() & undefended.keys():
        torch.testing.assert_close(uploads[0][name], undefended[name])


def test_another_key_gives_other_logits() -> None:
    defended = SMALL.model(bn_model()).eval()
    x = torch.randn(2, 3, 8, 8).double()
    right = defended(x)
    with torch.no_grad():
        for lock in locks(defended):
            lock.key.copy_(1 - lock.key)
    assert float((defended(x) - right).detach().abs().max()) > 1e-4


def test_merging_gives_identical_logits_and_a_plain_model() -> None:
    defended = FedKL(key_length=16, activation="sigmoid").model(bn_model()).train()
    defended(torch.randn(8, 3, 8, 8).double())  # running statistics other than 0 and 1
    plain = merged(defended)
    assert not locks(plain)
    assert model_state(plain).keys() == model_state(bn_model()).keys()
    x = torch.randn(2, 3, 8, 8).double()
    torch.testing.assert_close(plain.eval()(x), defended.eval()(x))


def test_a_client_predicts_with_its_own_locks() -> None:
    stage = build_stage(
        model="convnet", settings=BN, clients=2, examples=3,
        defenses=(FedKL(key_length=16, activation="sigmoid"),),
    )  # fmt: skip
    stage.federation.play_round(apply=True)
    x = torch.randn(2, 3, 8, 8).double()
    ours, theirs = (stage.federation.evaluation_model(i) for i in (0, 1))
    assert not locks(ours)
    assert not torch.equal(ours(x), theirs(x))
    assert torch.equal(ours(x), stage.federation.evaluation_model(0)(x))


@pytest.mark.parametrize("activation", ["relu", "sigmoid"])
def test_with_the_secrets_the_true_batch_is_an_exact_zero(activation: Any) -> None:
    view, x = observed(
        FedKL(key_length=16, activation=activation),
        settings=BN,
        protocol=STILL,
        grants=frozenset({Grant.LABELS, Grant.DEFENSE_SECRETS}),
    )
    g = dict(view.update.tensors)
    assert relative_error(replayed(view, x), g) > 1e-2  # the public locks are not the client's
    model = view.model
    held = {**model_state(model), **{
        name.removeprefix("private/"): t for name, t in view.secrets.items()
    }}  # fmt: skip
    informed = load_into(model, held)
    informed.train(model.training)
    found = replays.gradient(
        informed,
        {n: p.detach() for n, p in informed.named_parameters()},
        dict(informed.named_buffers()),
        x,
        view.labels,
        create_graph=False,
    )
    assert relative_error({n: found[n].detach() for n in g}, g) < 1e-9


def test_the_secret_amounts_to_two_numbers_a_channel() -> None:
    """The bypass: with the right scale and shift, no key and no lock layer are needed."""
    view, x = observed(FedKL(key_length=16, activation="sigmoid"), settings=BN)
    stage = build_stage(
        model="convnet", settings=BN, examples=3,
        defenses=(FedKL(key_length=16, activation="sigmoid"),),
    )  # fmt: skip
    true = merged(stage.federation.play_round().received[0])
    true.train(view.model.training)
    found = replays.gradient(
        true,
        {n: p.detach() for n, p in true.named_parameters()},
        dict(true.named_buffers()),
        x,
        view.labels,
    )
    shared = {n: t for n, t in view.update.tensors.items() if n in found}
    assert relative_error({n: found[n].detach() for n in shared}, shared) < 1e-9


@pytest.mark.parametrize("name", ["convnet", "lenet", "fc"])
def test_a_model_without_normalisation_is_refused_with_a_way_out(name: str) -> None:
    with pytest.raises(UnsupportedModel, match="norm='batch'"):
        SMALL.model(models.build(name, size=8))


def test_the_first_linear_readout_is_exact_behind_locked_layers() -> None:
    """The secret scales stand before the linear layer: the ratio gives its input, features."""
    view, x = observed(
        FedKL(key_length=16, activation="sigmoid"),
        settings=BN,
        examples=1,
        grants=frozenset({Grant.LABELS, Grant.DEFENSE_SECRETS}),
    )
    g = view.update.tensors
    row = int(g["fc.bias"].abs().argmax())
    found = g["fc.weight"][row] / g["fc.bias"][row]
    stage = build_stage(
        model="convnet", settings=BN, examples=1,
        defenses=(FedKL(key_length=16, activation="sigmoid"),),
    )  # fmt: skip
    client_model = stage.federation.play_round().received[0]
    client_model.train(view.model.training)
    features = client_model.get_submodule("features")(x).flatten()
    torch.testing.assert_close(found, features.detach())
