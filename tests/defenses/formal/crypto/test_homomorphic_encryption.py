from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from leakatlas.defenses.formal.crypto._ckks import Adder, Key, Ring, packed, unpacked
from leakatlas.defenses.formal.crypto.homomorphic_encryption import (
    HomomorphicEncryption,
    sensitivity,
)
from leakatlas.defenses.formal.dp.central_dp import CentralDP
from leakatlas.errors import IncompatibleDefenses, InvalidParameter, NotGranted, ProtocolError
from leakatlas.fl import FedAVG, FedSGD, Protocol, Stage, Trait
from leakatlas.threat import Grant, Vantage
from tests.conftest import build_stage, relative_error
from tests.defenses.heuristic.probes import a_context, an_update

LEAN: dict[str, Any] = {"degree": 4096, "moduli": (60, 40)}
FULL = HomomorphicEncryption(**LEAN)
HALF = HomomorphicEncryption(encrypted=0.5, **LEAN)
DRAWN = HomomorphicEncryption(encrypted=0.5, order="drawn", **LEAN)
MEMBERS = {"full": FULL, "half": HALF, "half, drawn": DRAWN}
ROUNDS: dict[str, Protocol] = {
    "fedsgd": FedSGD(), "fedavg": FedAVG(epochs=2, batch_size=2, lr=0.1, mode="train")
}  # fmt: skip


def three(defense: HomomorphicEncryption | None, **settings: Any) -> Stage:
    given = {"model": "convnet-bn", "settings": {"width": 4}, "clients": 3, **settings}
    return build_stage(defenses=() if defense is None else (defense,), **given)


def draw(size: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("ring", [Ring(), Ring(degree=4096, moduli=(60, 40))])
@pytest.mark.parametrize("size", [1, 2048, 2049, 10_000])
def test_the_sum_of_ciphertexts_is_the_sum_within_the_bound(ring: Ring, size: int) -> None:
    key = Key(ring)
    vectors = [100 * draw(size, seed) for seed in range(3)]
    total = Adder(key.public()).add([key.encrypt(v) for v in vectors])
    opened = key.open(total)
    assert opened.shape == (size,)
    error = float((opened - torch.stack(vectors).sum(0)).abs().max())
    assert 0 < error <= ring.error_bound(3)
    assert ring.error_bound(3) < 3e-6  # and the bound says something


def test_no_two_encryptions_are_alike_and_packing_loses_nothing() -> None:
    key, v = Key(FULL.ring), draw(5000)
    one, other = key.encrypt(v), key.encrypt(v)
    assert all(a != b for a, b in zip(one, other, strict=True))
    assert unpacked(packed(one)) == one


def test_what_the_server_holds_opens_nothing() -> None:
    key = Key(FULL.ring)
    adder = Adder(key.public())
    assert not adder.context.is_private()
    assert not adder.context.has_secret_key()
    import tenseal

    with pytest.raises(ValueError, match="secret_key"):
        tenseal.ckks_vector_from(adder.context, key.encrypt(draw(10))[0]).decrypt()


def test_after_a_round_the_servers_memory_holds_no_line_and_no_key() -> None:
    stage = three(FULL)
    stage.federation.play_round()
    server = stage.federation.server_memories["homomorphic_encryption"]
    assert "line" not in server
    assert not server["adder"].context.has_secret_key()
    assert all(client.memories["homomorphic_encryption"]["key"].context.has_secret_key()
               for client in stage.federation.clients.values())  # fmt: skip


@pytest.mark.parametrize("protocol", ROUNDS.values(), ids=ROUNDS)
@pytest.mark.parametrize("defense", MEMBERS.values(), ids=MEMBERS)
def test_the_aggregate_is_that_without_it(
    defense: HomomorphicEncryption, protocol: Protocol
) -> None:
    plain = three(None, protocol=protocol).federation.play_round().aggregate
    made = three(defense, protocol=protocol).federation.play_round().aggregate
    bound = defense.ring.error_bound(3)
    for name, tensor in plain.tensors.items():
        assert float((made.tensors[name] - tensor).abs().max()) <= bound
    for name, buffer in plain.buffers_after.items():
        if not buffer.is_floating_point():
            continue  # counters would tell how many examples there are
        assert float((made.buffers_after[name] - buffer).double().abs().max()) <= bound
    assert (made.num_examples, made.clients) == (plain.num_examples, plain.clients)


@pytest.mark.parametrize("vantage", [Vantage.WIRE, Vantage.SERVER, Vantage.AGGREGATE])
def test_without_the_key_there_is_nothing_to_attack(vantage: Vantage) -> None:
    stage = three(FULL, vantage=vantage)
    view = stage.view([stage.federation.play_round()])
    with pytest.raises(NotGranted, match="homomorphic_encryption"):
        _ = view.update


def test_a_client_reads_the_sum() -> None:
    stage = three(FULL, vantage=Vantage.PEER)
    record = stage.federation.play_round()
    assert relative_error(stage.view([record]).update.tensors, record.aggregate.tensors) == 0


def test_granted_the_key_every_upload_is_open() -> None:
    for defense in MEMBERS.values():
        stage = three(defense, grants=frozenset({Grant.DEFENSE_SECRETS}))
        record = stage.federation.play_round()
        view = stage.view([record])
        assert relative_error(view.update.tensors, record.updates[0].tensors) < 1e-6
        assert view.num_examples == len(stage.federation.clients[0].x)
        assert len(view.secrets["homomorphic_encryption/key"])


def test_a_sybil_opens_its_victims_upload() -> None:
    """One key for all: the server needs a single device of its own."""
    stage = three(FULL, letter="H", clients=1)
    record = stage.federation.play_round(sybils=[7])
    seen = stage.view([record]).update
    assert relative_error(seen.tensors, record.updates[0].tensors) < 1e-6


@pytest.mark.parametrize("defense", [HALF, DRAWN], ids=["map", "drawn"])
def test_of_a_part_the_server_sees_the_rest_and_no_buffer(defense: HomomorphicEncryption) -> None:
    stage = three(defense)
    record = stage.federation.play_round()
    message, own = record.messages[0], record.updates[0]
    assert message.update is not None
    assert message.update.buffers_after == {}
    assert own.buffers_after
    sent = torch.cat([t.flatten() for t in message.update.tensors.values()])
    whole = torch.cat([t.flatten() for t in own.tensors.values()])
    chosen = stage.federation.server_memories["homomorphic_encryption"]["chosen"]
    assert int(chosen.sum()) == round(0.5 * len(whole))
    assert bool((sent[chosen] == 0).all())
    assert torch.equal(sent[~chosen], whole[~chosen])
    assert record.broadcast is not None
    shown = torch.cat([t.flatten() for t in record.broadcast.tensors.values()])
    assert bool((shown[chosen] == 0).all())
    assert bool(shown[~chosen].any())


def test_the_map_takes_what_tells_most_and_is_the_mean_over_clients() -> None:
    stage = three(HALF)
    stage.federation.play_round()
    plain = three(None)
    federation = plain.federation
    total: Tensor | None = None
    for client in federation.clients.values():
        for x, y in zip(client.x.split(1), client.y.split(1), strict=True):
            logits = federation.model.eval()(x)
            loss = torch.nn.functional.cross_entropy(logits, y)
            parts = torch.autograd.grad(loss, list(federation.model.parameters()))
            flat = torch.cat([p.abs().flatten() for p in parts])
            total = flat if total is None else total + flat
    assert total is not None
    chosen = stage.federation.server_memories["homomorphic_encryption"]["chosen"]
    assert float(total[chosen].min()) >= float(total[~chosen].max()) - 1e-6


def test_the_true_batch_matches_on_what_is_in_the_clear() -> None:
    stage = three(HALF, clients=1, model="lenet", grants=frozenset({Grant.LABELS}))
    view = stage.view([stage.federation.play_round()])
    x = stage.federation.clients[0].x
    assert relative_error(view.replay(x, view.labels), view.update.tensors) < 1e-9
    assert relative_error(
        view.replay(x, view.labels, adaptive=False), view.update.tensors
    ) > 0.1  # fmt: skip


def test_sensitivity_of_one_example_is_its_gradients_magnitude() -> None:
    model = build_stage(model="fc").federation.model
    context = a_context(model, torch.rand(1, 3, 8, 8).double())
    leaves = list(model.parameters())
    loss = torch.nn.functional.cross_entropy(model(context.x), context.y)
    found = torch.autograd.grad(loss, leaves)
    update = an_update(dict(zip(dict(model.named_parameters()), found, strict=True)))
    expected = torch.cat([g.abs().flatten() for g in found])
    torch.testing.assert_close(sensitivity(update, context), expected)


def test_values_that_would_wrap_around_are_refused() -> None:
    assert FULL.ring.largest == 2.0**19
    with pytest.raises(InvalidParameter, match="does not fit"):
        Key(FULL.ring).encrypt(torch.tensor([2.0**19]))
    stage = three(HomomorphicEncryption(degree=4096, moduli=(42, 40)))
    with pytest.raises(ProtocolError, match="larger moduli"):
        stage.federation.play_round()


def test_insecure_or_useless_parameters_are_refused() -> None:
    with pytest.raises(InvalidParameter, match="128-bit security"):
        Key(Ring(degree=4096, moduli=(60, 60, 60)))
    with pytest.raises(InvalidParameter, match="no effect"):
        HomomorphicEncryption(order="drawn")


def test_the_server_cannot_clip_or_score_what_it_cannot_read() -> None:
    for defense in (FULL, HALF):
        with pytest.raises(IncompatibleDefenses, match="homomorphic_encryption"):
            build_stage(clients=3, defenses=(CentralDP(expected_weight=6.0), defense))


def test_traits_follow_the_share() -> None:
    assert HomomorphicEncryption(encrypted=0).active_traits() == frozenset()
    assert FULL.active_traits() == {Trait.HIDES_UPDATES}
    assert DRAWN.active_traits() == {Trait.HIDES_UPDATES, Trait.SHOWS_PART}
    assert HALF.active_traits() == {Trait.HIDES_UPDATES, Trait.SHOWS_PART, Trait.READS_BATCH}
