"""The protocol: exact sums for any survivors above the threshold, and nothing else learnt."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import combinations
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from leakatlas.defenses.formal.crypto._header import Header
from leakatlas.defenses.formal.crypto.secure_aggregation import SecureAggregation
from leakatlas.defenses.formal.crypto.secure_aggregation._device import Device
from leakatlas.defenses.formal.crypto.secure_aggregation._masking import agree, public_of, seal
from leakatlas.defenses.formal.crypto.secure_aggregation._opening import open_secrets, remove_masks
from leakatlas.defenses.formal.crypto.secure_aggregation._quantization import tensor_words
from leakatlas.defenses.formal.crypto.secure_aggregation._shamir import PRIME
from leakatlas.errors import InvalidInput, InvalidParameter, NotGranted, ProtocolError
from leakatlas.fl import (
    Client,
    ClientContext,
    FedAVG,
    Federation,
    FedSGD,
    Message,
    Protocol,
    RoundRecord,
    RoundSetup,
    ServerContext,
    Update,
    stream,
)
from leakatlas.models import build
from leakatlas.threat import Grant, Vantage
from tests.conftest import build_stage

CLIENTS = 5
PROTOCOLS: list[Protocol] = [
    FedSGD(),
    FedSGD(reduction="sum"),
    FedAVG(epochs=2, batch_size=2, lr=0.05),
]
SETTINGS: list[dict[str, Any]] = [
    {},
    {"ring_bits": 64},
    {"signed": True},
    {"levels": 2**12, "clip_range": 20.0},
]


def a_federation(
    defense: SecureAggregation | None,
    protocol: Protocol | None = None,
    *,
    clients: int = CLIENTS,
    dtype: torch.dtype = torch.float64,
    model: str = "fc",
) -> Federation:
    """Clients with 1, 2, 3 ... examples of noise."""
    settings: dict[str, Any] = {"widths": (6,)} if model == "fc" else {"width": 4}
    net = build(model, classes=10, size=8, seed=0, **settings).to(dtype)
    data = {
        i: Client(
            torch.randn(1 + i, 3, 8, 8, generator=stream("data", i), dtype=dtype),
            torch.arange(1 + i),
        )
        for i in range(clients)
    }
    return Federation(net, data, protocol or FedSGD(), [defense] if defense else [], seed=3)


def inputs(
    defense: SecureAggregation, federation: Federation, record: RoundRecord
) -> dict[int, np.ndarray[Any, Any]]:
    """x_u of every client, quantised again from its update in the clear."""
    found = {}
    for member in record.cohort:
        context = ClientContext(
            member, record.index, federation.model, torch.empty(0), torch.empty(0),
            federation.protocol,
            stream(federation.seed, "client", member, defense.key, record.index), {},
        )  # fmt: skip
        update = record.updates[member]
        found[member] = defense.encode(update, Header.of(update), len(record.cohort), context)
    return found


def masked(record: RoundRecord, defense: SecureAggregation) -> dict[int, np.ndarray[Any, Any]]:
    return {c: tensor_words(m.payload["masked"], defense.ring) for c, m in record.messages.items()}


def flat(update: Update) -> Tensor:
    return torch.cat([t.flatten() for t in update.tensors.values()])


# -- the sum ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", SETTINGS)
def test_every_set_of_survivors_opens_exactly_its_sum_or_raises(settings: dict[str, Any]) -> None:
    # t = 3 of 5, or floor(10 / 3) + 1 = 4
    defense = SecureAggregation(threshold=2 / 3 if settings.get("signed") else 0.6, **settings)
    least = 4 if defense.signed else 3
    federation = a_federation(defense)
    for size in range(CLIENTS):
        for gone in combinations(range(CLIENTS), size):
            survivors = [c for c in range(CLIENTS) if c not in gone]
            if len(survivors) < least:
                with pytest.raises(ProtocolError, match=f"secure aggregation needs {least}"):
                    federation.play_round(dropouts=gone)
                continue
            record = federation.play_round(dropouts=gone)
            x = inputs(defense, federation, record)
            signed = defense.ring.signed
            # Plain integers of any size: no ring, no wrap.
            total = np.sum([x[c].view(signed).astype(object) for c in survivors], axis=0)
            examples = sum(1 + c for c in survivors)
            assert total[-1] == examples == record.aggregate.num_examples
            step = 2 * defense.clip_range / defense.levels_for(CLIENTS)
            mean = torch.tensor(total[:-1].astype(np.float64) * (step / examples))
            assert torch.equal(flat(record.aggregate), mean)
            assert record.aggregate.clients == len(survivors)


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("settings", SETTINGS)
def test_aggregate_is_within_one_step_of_the_plain_one(
    protocol: Protocol, dtype: torch.dtype, settings: dict[str, Any]
) -> None:
    defense = SecureAggregation(**settings)
    plain = a_federation(None, protocol, dtype=dtype).play_round().aggregate
    hidden = a_federation(defense, protocol, dtype=dtype).play_round().aggregate
    weighted = plain.reduction == "mean"
    step = 2 * defense.clip_range / defense.levels_for(CLIENTS, weighted=weighted)
    rounding = 1e-6 if dtype == torch.float32 else 1e-12
    assert float((flat(plain) - flat(hidden)).abs().max()) <= step + rounding
    assert flat(hidden).dtype == dtype
    for name in ("kind", "sign", "scale", "reduction", "num_examples", "clients", "state_hash"):
        assert getattr(plain, name) == getattr(hidden, name)


def test_values_beyond_the_range_are_clipped_and_counted() -> None:
    defense = SecureAggregation(clip_range=1e-3, ring_bits=64)
    federation = a_federation(defense)
    record = federation.play_round()
    bound = 1e-3 * (1 + 1e-9)
    assert float(flat(record.aggregate).abs().max()) <= bound
    assert 0 < federation.clients[0].memories[defense.key]["clipped"] < 1


def test_training_with_buffers_goes_on() -> None:
    defense = SecureAggregation(ring_bits=64)
    protocol = FedAVG(batch_size=2, lr=0.05)
    hidden = a_federation(defense, protocol, model="convnet-bn", dtype=torch.float32)
    plain = a_federation(None, protocol, model="convnet-bn", dtype=torch.float32)
    for _ in range(2):
        one, other = hidden.play_round(apply=True), plain.play_round(apply=True)
    assert not one.messages[0].payload.keys() - {"masked"}
    for name, buffer in other.aggregate.buffers_after.items():
        if buffer.is_floating_point():
            assert torch.allclose(one.aggregate.buffers_after[name], buffer, atol=1e-5)
    assert torch.allclose(flat(one.aggregate), flat(other.aggregate), atol=1e-5)


def test_sybils_join_and_a_lone_client_is_its_own_sum() -> None:
    defense = SecureAggregation(ring_bits=64, signed=True)
    federation = a_federation(defense)
    record = federation.play_round(cohort=[3], sybils=range(100, 104))
    assert record.aggregate.clients == 5
    alone = record.updates[3]
    # Four sybils sent zeros with the victim's weight: the sum is the victim's, five times thinner.
    assert float((5 * flat(record.aggregate) - flat(alone)).abs().max()) < 1e-12
    with pytest.raises(ProtocolError, match=r"Client 2 joins no cohort of 1.*least_cohort"):
        federation.play_round(cohort=[2])
    willing = a_federation(SecureAggregation(ring_bits=64, least_cohort=1))
    single = willing.play_round(cohort=[2])
    assert float((flat(single.aggregate) - flat(single.updates[2])).abs().max()) < 1e-12
    assert not torch.equal(
        single.messages[2].payload["masked"], record.messages[3].payload["masked"]
    )


# -- the masks -------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"ring_bits": 64}])
def test_message_minus_input_is_the_recomputed_mask(settings: dict[str, Any]) -> None:
    defense = SecureAggregation(**settings)
    federation = a_federation(defense)
    record = federation.play_round()
    x, y = inputs(defense, federation, record), masked(record, defense)
    for client in record.cohort:
        memory = federation.clients[client].memories[defense.key]
        mask = memory["device"].mask(len(x[client]))
        assert (y[client] - x[client] == mask).all()
        # The oracle grant hands over the same mask.
        assert (tensor_words(defense.secrets(memory)["mask"], defense.ring) == mask).all()
        # A masked vector is uniform: its mean is that of the ring, its bits are fair.
        bits = np.unpackbits(y[client].view(np.uint8))
        assert abs(bits.mean() - 0.5) < 5 * 0.5 / np.sqrt(len(bits))


def test_changing_one_input_changes_only_its_message_and_the_sum() -> None:
    defense = SecureAggregation()

    def play(change: float) -> RoundRecord:
        federation = a_federation(defense)
        federation.clients[2].x = federation.clients[2].x + change
        return federation.play_round()

    one, other = play(0.0), play(0.5)
    for client in range(CLIENTS):
        same = torch.equal(
            one.messages[client].payload["masked"], other.messages[client].payload["masked"]
        )
        assert same == (client != 2)
    assert not torch.equal(flat(one.aggregate), flat(other.aggregate))


def test_rounds_and_seeds_have_their_own_masks_and_a_seed_repeats_them() -> None:
    defense = SecureAggregation()
    federation = a_federation(defense)
    first, second = federation.play_round(), federation.play_round()
    again = a_federation(defense).play_round()
    y = [r.messages[0].payload["masked"] for r in (first, second, again)]
    assert torch.equal(y[0], y[2])
    assert float((y[0] == y[1]).double().mean()) < 0.01
    system = SecureAggregation(entropy="system")
    one, two = (a_federation(system).play_round() for _ in range(2))
    assert not torch.equal(one.messages[0].payload["masked"], two.messages[0].payload["masked"])
    assert torch.equal(flat(one.aggregate), flat(two.aggregate))


# -- what others learn -----------------------------------------------------------------------------


def arrays(found: object, seen: set[int]) -> Iterator[np.ndarray[Any, Any]]:
    """Every array or tensor reachable from an object."""
    if id(found) in seen:
        return
    seen.add(id(found))
    if isinstance(found, Tensor):
        if not found.is_meta:
            yield found.detach().numpy()
    elif isinstance(found, np.ndarray):
        yield found
    elif isinstance(found, Mapping):
        for key, value in found.items():
            yield from arrays(key, seen)
            yield from arrays(value, seen)
    elif isinstance(found, (list, tuple, set, frozenset)):
        for value in found:
            yield from arrays(value, seen)
    elif callable(found) and hasattr(found, "__self__"):
        yield from arrays(found.__self__, seen)
    elif hasattr(found, "__dict__"):
        yield from arrays(vars(found), seen)


def test_server_memory_opens_no_single_input() -> None:
    defense = SecureAggregation(threshold=0.6)
    federation = a_federation(defense)
    record = federation.play_round(dropouts=[1, 4])
    server = federation.server_memories[defense.key]
    x, y = inputs(defense, federation, record), masked(record, defense)
    held = [a for a in arrays(server, set()) if a.size >= len(x[0]) - 1]
    assert len(held) == 3  # the survivors' masked vectors: the walk does find what is there
    for client in range(CLIENTS):
        for array in held:
            as_words = array.view(defense.ring.unsigned)
            assert float((as_words[: len(x[0])] == x[client]).mean()) < 0.01
    # Exactly one of the two secrets of everyone.
    assert set(server["seeds"]) == {0, 2, 3} and set(server["mask_secrets"]) == {1, 4}
    assert "lines" not in server
    # With all that the server holds, one mask less than needed is still in every vector.
    plan, adverts = server["plan"], server["adverts"]
    for survivor in (0, 2, 3):
        opened = remove_masks(
            plan, y[survivor], adverts, {survivor: server["seeds"][survivor]},
            server["mask_secrets"],
        )  # fmt: skip
        assert float((opened == x[survivor]).mean()) < 0.01


def test_after_a_failed_round_the_server_holds_no_line_and_the_next_round_works() -> None:
    defense = SecureAggregation()
    federation = a_federation(defense)
    with pytest.raises(ProtocolError, match="2 of 5 clients survived"):
        federation.play_round(dropouts=[0, 1, 2])
    assert "lines" not in federation.server_memories[defense.key]
    assert federation.play_round().aggregate.clients == CLIENTS


def test_views_show_the_masked_vector_or_the_sum() -> None:
    def view(vantage: Vantage, *grants: Grant) -> Any:
        stage = build_stage(
            clients=3, defenses=(SecureAggregation(),), vantage=vantage, grants=frozenset(grants)
        )
        return stage.view([stage.federation.play_round()])

    for vantage in (Vantage.WIRE, Vantage.SERVER):
        hidden = view(vantage, Grant.DEFENSE_SECRETS)
        assert hidden.rounds[0].payload.keys() == {"masked"}
        with pytest.raises(NotGranted, match="secure_aggregation encodes"):
            _ = hidden.update
        assert hidden.secrets.keys() == {"secure_aggregation/mask"}
    assert view(Vantage.AGGREGATE).update.clients == 3


def test_message_hides_weight_and_buffers() -> None:
    record = a_federation(SecureAggregation()).play_round()
    for message in record.messages.values():
        assert message.update is None and message.num_examples == 0
        assert message.encoded_by == "secure_aggregation"


# -- the knob --------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_neutral_is_bitwise_undefended(protocol: Protocol) -> None:
    neutral = SecureAggregation(threshold=SecureAggregation.neutral)
    plain = a_federation(None, protocol).play_round()
    open_ = a_federation(neutral, protocol).play_round()
    assert neutral.active_traits() == frozenset()
    for client in plain.messages:
        sent, undefended = open_.messages[client].update, plain.messages[client].update
        assert sent is not None and undefended is not None
        assert torch.equal(flat(sent), flat(undefended))
        assert open_.messages[client].num_examples == plain.messages[client].num_examples
    assert torch.equal(flat(open_.aggregate), flat(plain.aggregate))


def test_overflow_is_refused_before_anyone_trains() -> None:
    federation = a_federation(SecureAggregation(levels=2**22, max_examples=1000))
    with pytest.raises(InvalidParameter, match="overflow"):
        federation.play_round()
    with pytest.raises(ProtocolError, match="max_examples=3"):
        a_federation(SecureAggregation(max_examples=3)).play_round()


def test_updates_that_are_not_finite_are_refused() -> None:
    federation = a_federation(SecureAggregation())
    with torch.no_grad():
        next(iter(federation.model.parameters())).fill_(float("inf"))
    with pytest.raises(InvalidInput, match="non-finite"):
        federation.play_round()


def test_parameters() -> None:
    with pytest.raises(InvalidParameter, match="threshold"):
        SecureAggregation(threshold=1.5)
    with pytest.raises(InvalidParameter, match="at least 2/3"):
        SecureAggregation(signed=True, threshold=0.6)
    signed = SecureAggregation(signed=True)
    assert [signed.threshold_for(n) for n in (1, 2, 3, 4, 5, 6, 9)] == [1, 2, 3, 3, 4, 5, 7]
    assert SecureAggregation(signed=True, threshold=1).threshold_for(9) == 9
    defense = SecureAggregation(signed=True, ring_bits=64, levels=2**20)
    assert SecureAggregation.from_json(defense.to_json()) == defense


# -- a server that does not play by the rules ------------------------------------------------------


def devices(defense: SecureAggregation, members: int = 5) -> tuple[RoundSetup, dict[int, Device]]:
    setup = RoundSetup(
        0, range(members), {c: {} for c in range(members)}, {}, FedSGD(), stream("setup"),
        simulated=True,
    )  # fmt: skip
    defense.setup(setup)
    return setup, {c: setup.clients[c]["device"] for c in range(members)}


def shared(defense: SecureAggregation, members: int = 5) -> dict[int, Device]:
    setup, found = devices(defense, members)
    defense.peer({}, setup)
    return found


def test_a_device_answers_for_one_list_of_survivors_only() -> None:
    device = shared(SecureAggregation(threshold=0.6))[0]
    first = device.reveal([0, 1, 2, 3], {})
    assert set(first.seeds) == {0, 1, 2, 3} and set(first.keys) == {4}
    assert device.reveal([3, 2, 1, 0], {}).seeds == first.seeds
    with pytest.raises(ProtocolError, match="second list"):
        device.reveal([0, 1, 2, 4], {})


@pytest.mark.parametrize("signed", [False, True])
def test_a_device_confirms_one_list_only_and_one_that_it_is_on(signed: bool) -> None:
    """Two confirmed lists, one with a client and one without, would open its input."""
    found = shared(SecureAggregation(signed=signed))
    everyone = [0, 1, 2, 3, 4]
    found[0].confirm(everyone)
    assert found[0].confirm(reversed(everyone)) == found[0].confirm(everyone)  # type: ignore[arg-type]  # any order of one list
    with pytest.raises(ProtocolError, match="second list"):
        found[0].confirm([0, 1, 2, 3])
    with pytest.raises(ProtocolError, match="second list"):
        found[0].reveal([0, 1, 2, 3], {})
    with pytest.raises(ProtocolError, match="Client 4 was left off"):
        found[4].confirm([0, 1, 2, 3])
    with pytest.raises(ProtocolError, match="Client 4 was left off"):
        found[4].reveal([0, 1, 2, 3], {})


def opens_client_0(found: dict[int, Device], corrupted: set[int]) -> bool:
    """A server tells half of the honest clients that client 0 dropped out, and asks everyone.

    Corrupted devices belong to the server: they forget what they confirmed.
    """
    plan = found[0].plan
    honest = [c for c in found if c not in corrupted and c != 0]
    others = [c for c in found if c != 0]
    told = {
        c: sorted(found) if c == 0 or place < plan.threshold - len(corrupted) - 1 else others
        for place, c in enumerate(honest, start=0)
    } | {0: sorted(found)}  # fmt: skip
    shares: dict[str, set[int]] = {"seed": set(), "mask key": set()}
    confirmed: dict[tuple[int, ...], dict[int, bytes]] = {}

    def lists_of(member: int) -> list[list[int]]:
        return [sorted(found), others] if member in corrupted else [told[member]]

    for member, device in found.items():
        for shown in lists_of(member):
            if member in corrupted:
                device._listed = None
            try:
                confirmed.setdefault(tuple(shown), {})[member] = device.confirm(shown)
            except ProtocolError:
                continue
    for member, device in found.items():
        for shown in lists_of(member):
            if member in corrupted:
                device._listed = None
            try:
                answer = device.reveal(shown, confirmed.get(tuple(shown), {}))
            except ProtocolError:
                continue
            shares["seed"] |= {member} if 0 in answer.seeds else set()
            shares["mask key"] |= {member} if 0 in answer.keys else set()
    return all(len(answers) >= plan.threshold for answers in shares.values())


def test_collusion_opens_an_input_exactly_from_2t_minus_n_clients_on() -> None:
    for members in (6, 9):
        defense = SecureAggregation(signed=True)
        t = defense.threshold_for(members)
        for count in range(members - 1):
            corrupted = set(range(members - count, members))
            opened = opens_client_0(shared(defense, members), corrupted)
            assert opened == (count >= 2 * t - members), (members, count)


@pytest.mark.parametrize("survivors", [[0, 1], [0, 1, 9], []])
def test_a_device_opens_no_small_or_foreign_crowd(survivors: list[int]) -> None:
    device = shared(SecureAggregation(threshold=0.6))[0]
    with pytest.raises(ProtocolError, match="opens no sum"):
        device.reveal(survivors, {})


def test_changed_letters_and_missing_keys_are_noticed() -> None:
    setup, found = devices(SecureAggregation())
    adverts = setup.server["adverts"]
    with pytest.raises(ProtocolError, match="no keys of client 4"):
        found[0].share({c: adverts[c] for c in range(4)})
    letters = {c: found[c].share(adverts) for c in (0, 1)}
    letter = letters[0][1]
    found[1].receive(0, letter)
    with pytest.raises(ProtocolError, match="changed on the way"):
        found[1].receive(0, letter[:-1] + bytes([letter[-1] ^ 1]))
    with pytest.raises(ProtocolError, match="changed on the way"):
        found[1].receive(2, letter)  # from 0, passed off as from 2


def test_signed_keys_cannot_be_replaced_and_unsigned_ones_can() -> None:
    for signed in (True, False):
        setup, found = devices(SecureAggregation(signed=signed))
        adverts = dict(setup.server["adverts"])
        # The server in the middle, with keys of its own.
        letter, mask = (public_of(bytes([n]) * 32) for n in (1, 2))
        adverts[3] = replace(adverts[3], letter_key=letter, mask_key=mask)
        if signed:
            with pytest.raises(ProtocolError, match="client 3 do not carry its signature"):
                found[0].share(adverts)
        else:
            assert set(found[0].share(adverts)) == {1, 2, 3, 4}


def test_signed_survivor_lists_must_agree() -> None:
    found = shared(SecureAggregation(signed=True))
    told = [0, 1, 2, 3]
    honest = {c: found[c].confirm(told) for c in told if c != 3}
    with pytest.raises(ProtocolError, match="list of survivors of client 3"):
        found[0].reveal(told, {**honest, 3: found[3].confirm([0, 1, 3, 4])})
    with pytest.raises(ProtocolError, match="2 survivors confirmed"):
        found[0].reveal(told, {c: honest[c] for c in (0, 1)})
    found = shared(SecureAggregation(signed=True))
    honest = {c: found[c].confirm(told) for c in told}
    assert set(found[0].reveal(told, honest).keys) == {4}


def test_a_confirmation_is_good_for_its_own_session_round_cohort_and_threshold() -> None:
    told = [0, 1, 2, 3]
    here = shared(SecureAggregation(signed=True))
    stale = {c: here[c].confirm(told) for c in told}
    for change in (
        {"session": b"another"}, {"round": 7}, {"cohort": (0, 1, 2, 3, 4, 5)}, {"threshold": 3},
    ):  # fmt: skip
        device = shared(SecureAggregation(signed=True))[0]
        device.plan = replace(device.plan, **change)
        with pytest.raises(ProtocolError, match="do not carry its signature"):
            device.reveal(told, stale)


def test_a_client_has_terms_of_its_own() -> None:
    defense = SecureAggregation(signed=True, least_cohort=4)
    setup, found = devices(defense)
    plan, memory = found[0].plan, dict[str, Any]()
    identity = setup.clients[0]["identity"]
    for change, word in (
        ({"threshold": 3}, "a threshold of 4"),
        ({"cohort": (0, 1, 2)}, "at least 4 members"),
        ({"cohort": (1, 2, 3, 4, 5)}, "not one of the cohort"),
        ({"cohort": (0, 0, 1, 2, 3)}, "not one of the cohort"),
        ({"directory": dict.fromkeys(range(5), plan.directory[0])}, "same signing key"),
    ):
        with pytest.raises(ProtocolError, match=word):
            defense.join(0, replace(plan, **change), bytes(32), identity, memory)
    defense.join(0, plan, bytes(32), identity, memory)
    with pytest.raises(ProtocolError, match="took part in this session before"):
        defense.join(0, plan, bytes(32), identity, memory)


def test_a_key_that_is_shown_twice_is_refused() -> None:
    setup, found = devices(SecureAggregation())
    adverts = dict(setup.server["adverts"])
    for name in ("letter_key", "mask_key"):
        for double in (adverts[4].letter_key, adverts[0].mask_key):
            shown = {**adverts, 3: replace(adverts[3], **{name: double})}
            with pytest.raises(ProtocolError, match="shown twice"):
                found[0].share(shown)
    found[0].share(adverts)
    with pytest.raises(ProtocolError, match="once a round"):
        found[0].share(adverts)


@pytest.mark.parametrize("public", [bytes(32), b"\1" + bytes(31), b"short"])
def test_a_key_of_low_order_is_refused_by_name(public: bytes) -> None:
    setup, found = devices(SecureAggregation())
    adverts = dict(setup.server["adverts"])
    letters = {**adverts, 3: replace(adverts[3], letter_key=public)}
    with pytest.raises(ProtocolError, match="public key of client 3"):
        found[0].share(letters)
    found[1].share({**adverts, 3: replace(adverts[3], mask_key=public)})
    with pytest.raises(ProtocolError, match="public key of client 3"):
        found[1].mask(5)


def test_a_device_sends_once() -> None:
    """Two vectors under one mask would show the difference of two inputs."""
    device = shared(SecureAggregation())[0]
    update = Update(tensors={"w": torch.ones(3)}, kind="delta", state_hash="", num_examples=1)
    words = np.zeros(4, dtype=np.uint32)
    device.send(words, Header.of(update))
    with pytest.raises(ProtocolError, match="one masked input a round"):
        device.send(words + 1, Header.of(update))


def test_wrong_missing_and_foreign_shares_are_noticed() -> None:
    setup, found = devices(SecureAggregation(threshold=0.6))
    SecureAggregation(threshold=0.6).peer({}, setup)
    plan, adverts = found[0].plan, setup.server["adverts"]
    told = [0, 1, 2, 3]
    answers = {c: found[c].reveal(told, {}) for c in told}
    seeds, keys = open_secrets(plan, answers, adverts)
    assert set(seeds) == set(told) and set(keys) == {4}
    first = answers[0]
    for changed, word in (
        (replace(first, seeds={**first.seeds, 2: first.seeds[2] + 1}), "client 2's seed do not"),
        (replace(first, keys={4: first.keys[4] ^ 1}), "client 4's mask key do not"),
        (replace(first, keys={4: PRIME - 1}), "client 4's mask key do not"),
        (replace(first, keys={}), "Client 0 gave no share of client 4's mask key"),
        (replace(first, seeds={0: first.seeds[0]}), "Client 0 gave no share of client 1's seed"),
    ):
        with pytest.raises(ProtocolError, match=word):
            open_secrets(plan, {**answers, 0: changed}, adverts)


def test_shares_that_never_came_or_are_none_are_noticed() -> None:
    setup, found = devices(SecureAggregation(threshold=0.6))
    adverts = setup.server["adverts"]
    letters = {c: found[c].share(adverts) for c in range(5)}
    for sender in (1, 2, 3):
        found[0].receive(sender, letters[sender][0])
    with pytest.raises(ProtocolError, match="never got shares from client 4"):
        found[0].reveal([0, 1, 2, 3], {})
    with pytest.raises(ProtocolError, match="client 9 is not of this round"):
        found[0].receive(9, letters[4][0])
    plan = found[0].plan
    key = agree(found[4]._letters, adverts[0].letter_key, "letter", plan.round)
    short = seal(key, bytes(12), b"one", plan.text("shares", 4, 0))
    with pytest.raises(ProtocolError, match="client 4 holds no two shares"):
        found[0].receive(4, short)


def test_a_seed_opens_everything_and_is_refused_outside_of_simulations() -> None:
    def setup(simulated: bool) -> RoundSetup:
        return RoundSetup(
            0, range(3), {c: {} for c in range(3)}, {}, FedSGD(), stream("known"),
            simulated=simulated,
        )  # fmt: skip

    with pytest.raises(ProtocolError, match="two-time pad"):
        SecureAggregation().setup(setup(simulated=False))
    SecureAggregation(entropy="system").setup(setup(simulated=False))
    masks = []
    for _ in range(2):
        round_ = setup(simulated=True)
        SecureAggregation().setup(round_)
        SecureAggregation().peer({}, round_)
        masks.append(round_.clients[0]["device"].mask(8))
    assert (masks[0] == masks[1]).all()


def test_identities_last_over_rounds() -> None:
    defense = SecureAggregation(signed=True)
    federation = a_federation(defense)
    federation.play_round()
    first = dict(federation.server_memories[defense.key]["plan"].directory)
    federation.play_round()
    assert first == federation.server_memories[defense.key]["plan"].directory


def test_updates_that_do_not_fit_together_are_refused() -> None:
    defense = SecureAggregation()
    setup, found = devices(defense)
    defense.peer({}, setup)
    messages = {}
    for client in range(5):
        update = Update(
            tensors={"w": torch.ones(3)},
            kind="delta" if client == 2 else "gradient",
            state_hash="",
            num_examples=1,
        )
        context = ClientContext(
            client, 0, torch.nn.Identity(), torch.empty(0), torch.empty(0), FedSGD(),
            stream(client), setup.clients[client],
        )  # fmt: skip
        message = Message(client=client, num_examples=1, update=update)
        messages[client] = defense.wire(message, context)
    context_of_server = ServerContext(0, range(5), setup.server, FedSGD(), stream(0))
    with pytest.raises(ProtocolError, match="another layout"):
        defense.aggregate(messages, lambda kept: update, context_of_server)
    assert found[0].header is not None
    with pytest.raises(ProtocolError, match="cannot mask"):
        defense.wire(messages[0], context)
