from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from leakatlas.defenses.formal.crypto.secure_aggregation import SecureAggregation
from leakatlas.defenses.heuristic.learning import fragmented_fl as ffl
from leakatlas.defenses.heuristic.learning.fragmented_fl import Exchange, FragmentedFL
from leakatlas.errors import IncompatibleDefenses, ProtocolError
from leakatlas.fl import FedAVG, FedSGD, Protocol, RoundRecord, RoundSetup, Stage, Update, stream
from leakatlas.threat import Grant
from tests.conftest import build_stage, relative_error
from tests.defenses.heuristic.probes import an_update, random_tensors, ratio

HALF = FragmentedFL()


def _stage(
    *defenses: FragmentedFL, clients: int = 4, protocol: Protocol | None = None, norm: str = "none"
) -> Stage:
    settings = {"width": 4} | ({} if norm == "none" else {"norm": norm})
    return build_stage(
        model="convnet", settings=settings, examples=1, clients=clients, protocol=protocol,
        defenses=defenses, letter="C",
        grants=frozenset({Grant.LABELS, Grant.DEFENSE_SECRETS}) if defenses else frozenset(),
    )  # fmt: skip


def _played(*defenses: FragmentedFL, **settings: object) -> tuple[RoundRecord, Stage]:
    stage = _stage(*defenses, **settings)  # type: ignore[arg-type]  # passed on as it came
    return stage.federation.play_round(), stage


def _setup(members: int = 2) -> RoundSetup:
    return RoundSetup(
        0, range(members), {m: {} for m in range(members)}, {}, FedSGD(), stream("ffl"), True
    )


def _updates(count: int) -> dict[int, Update]:
    return {m: an_update(random_tensors(m)) for m in range(count)}


@pytest.mark.parametrize("clients", [2, 3, 4, 5])
@pytest.mark.parametrize("protocol", [FedSGD(), FedAVG(lr=0.1, batch_size=1)])
def test_every_coordinate_is_one_of_the_groups_and_the_group_keeps_them_all(
    clients: int, protocol: Protocol
) -> None:
    plain, _ = _played(clients=clients, protocol=protocol)
    mixed, stage = _played(HALF, clients=clients, protocol=protocol)
    groups = stage.federation.server_memories["fragmented_fl"]["groups"]
    assert sorted(m for group in groups for m in group) == list(range(clients))
    assert {len(group) for group in groups} <= {2, 3}
    for group in groups:
        for name in plain.updates[0].tensors:
            before = torch.stack([plain.updates[m].tensors[name] for m in group]).sort(0).values
            after = torch.stack([mixed.updates[m].tensors[name] for m in group]).sort(0).values
            assert torch.equal(before, after)  # the same values at every coordinate, bit for bit


def test_the_sum_of_a_pair_is_that_of_two_clients() -> None:
    """The bypass: whoever adds the two messages attacks the sum of two undefended clients."""
    plain, _ = _played(clients=2)
    mixed, _ = _played(HALF, clients=2)
    both = {n: sum(u.tensors[n] for u in plain.updates.values()) for n in plain.updates[0].tensors}
    expected: dict[str, Tensor] = {n: torch.as_tensor(t) for n, t in both.items()}
    assert relative_error(ffl.unmixed(mixed.updates), expected) < 1e-15


@pytest.mark.parametrize("density", [0.1, 0.309, 0.5])
def test_the_mask_swaps_its_share_of_the_coordinates(density: float) -> None:
    update = an_update({"w": torch.zeros(20_000)})
    mask = ffl.coordinate_masks(update, bytes(32), density)["w"]
    spread = math.sqrt(density * (1 - density) / 20_000)
    assert abs(float(mask.double().mean()) - density) < 5 * spread


def test_the_mask_of_a_mixed_client_is_told_to_who_is_granted_secrets() -> None:
    plain, _ = _played(clients=2)
    record, stage = _played(HALF, clients=2)
    view = stage.view([record])
    for name, tensor in view.update.tensors.items():
        mask = view.secrets[f"mask/{name}"] if f"mask/{name}" in view.secrets else None
        if mask is None:  # secrets carry the name of their defense
            (mask,) = (t for n, t in view.secrets.items() if n.endswith(f"mask/{name}"))
        own, other = (plain.updates[m].tensors[name] for m in (0, 1))
        assert torch.equal(tensor, torch.where(mask.bool(), other, own))


def test_the_server_relays_letters_that_hold_no_fragment_in_the_clear() -> None:
    setup = _setup()
    exchange = Exchange((0, 1), 0.5, setup)
    updates = _updates(2)
    exchange.mixed(updates)
    content = {len(letter) for letters in exchange.letters.values() for letter in letters}
    assert content
    for (sender, _), letters in exchange.letters.items():
        masks = setup.clients[0]["mask"]
        sent = ffl.fragments(updates[sender], masks)
        assert any(len(letter) == len(sent) + 16 for letter in letters)
        assert all(sent[:64] not in letter for letter in letters)
    assert len({letter for ls in exchange.letters.values() for letter in ls}) == 3


def test_a_ring_of_three_gives_each_the_next_ones_fragment() -> None:
    updates = _updates(3)
    setup = _setup(3)
    mixed = Exchange((0, 1, 2), 0.5, setup).mixed(updates)
    for member in range(3):
        for name, tensor in mixed[member].tensors.items():
            mask = setup.clients[member]["mask"][name]
            following = updates[(member + 1) % 3].tensors[name]
            assert torch.equal(tensor, torch.where(mask, following, updates[member].tensors[name]))


def test_examples_of_a_group_are_its_mean_and_running_statistics_are_swapped_too() -> None:
    updates = {
        m: replace(u, num_examples=4 * m + 2, buffers_after={"mean": torch.full((500,), float(m)),
                   "count": torch.tensor(3)})
        for m, u in _updates(2).items()
    }  # fmt: skip
    mixed = Exchange((0, 1), 0.5, _setup()).mixed(updates)
    assert [u.num_examples for u in mixed.values()] == [4, 4]
    assert 200 < float(mixed[0].buffers_after["mean"].sum()) < 300
    assert int(mixed[0].buffers_after["count"]) == 3


def test_one_client_has_nobody_to_swap_with() -> None:
    with pytest.raises(ProtocolError, match="two clients or more"):
        _played(HALF, clients=1)


def test_the_first_layer_gives_a_mixture_of_two_images() -> None:
    stage = build_stage(
        model="fc", settings={"widths": (24, 16)}, examples=1, clients=2, defenses=(HALF,)
    )
    record = stage.federation.play_round()
    found = ratio(record.updates[0].tensors, "hidden.1")
    for client in stage.federation.clients.values():
        assert float((found - client.x.flatten()).abs().max()) > 0.1


# -- the server ----------------------------------------------------------------------------------


def test_scores_are_the_formula() -> None:
    g = [torch.tensor(v, dtype=torch.float64) for v in ([3.0, 4.0], [0.0, 1.0], [1.0, 0.0])]
    tensors = {i: {"head.weight": v} for i, v in enumerate(g)}
    found = ffl.scores(tensors)
    away = [4.0 / 4, 0.0, 0.0]  # norms 5, 1, 1 around a median of 1, over the largest
    median = torch.tensor([1.0, 1.0], dtype=torch.float64)
    cosines = [float(torch.cosine_similarity(v, median, dim=0)) for v in g]
    raw = torch.tensor(
        [0.2 * (1 - a) + 0.8 * (c + 1) / 2 for a, c in zip(away, cosines, strict=True)]
    )
    expected = raw - raw.quantile(0.25)
    assert list(found.values()) == pytest.approx(expected.tolist())


def test_the_first_rounds_take_the_median_and_later_ones_trust() -> None:
    record, _ = _played(HALF, clients=4)
    for name, tensor in record.aggregate.tensors.items():
        stacked = torch.stack([u.tensors[name] for u in record.updates.values()])
        torch.testing.assert_close(tensor, stacked.quantile(0.5, 0))
    late, stage = _played(FragmentedFL(median_rounds=0), clients=4)
    book = stage.federation.server_memories["fragmented_fl"]["reputation"]
    weights = ffl.trust(book, list(book.values()))
    total = sum(weights.values())
    assert total > 0
    for name, tensor in late.aggregate.tensors.items():
        mean = sum(weights[c] / total * u.tensors[name] for c, u in late.updates.items())
        torch.testing.assert_close(tensor, mean)
    plain, _ = _played(FragmentedFL(robust=False), clients=4)
    honest, _ = _played(clients=4)
    assert relative_error(dict(plain.aggregate.tensors), dict(honest.aggregate.tensors)) < 1e-12


def test_partners_of_bad_reputation_are_passed_over_and_nobody_is_left_alone() -> None:
    memories = {m: {"book": {3: -5.0, **{j: 1.0 for j in range(5) if j != m and j != 3}}}
                for m in range(6)}  # fmt: skip
    for seed in range(20):
        groups = ffl.partners(range(6), memories, stream("partners", seed))
        assert sorted(m for g in groups for m in g) == list(range(6))
        assert all(len(g) == 2 for g in groups)
    first = [ffl.partners(range(6), memories, stream("partners", s))[0] for s in range(60)]
    assert not any(g[1] == 3 for g in first)  # whoever chooses first never takes client 3


def test_clients_remember_how_their_partners_were_scored() -> None:
    stage = _stage(HALF, clients=4)
    federation = stage.federation
    federation.play_round()
    groups = federation.server_memories["fragmented_fl"]["groups"]
    told = dict(federation.server_memories["fragmented_fl"]["told"])
    federation.play_round()
    for a, b in groups:
        assert federation.clients[a].memories["fragmented_fl"]["book"][b] == told[a]
        assert federation.clients[b].memories["fragmented_fl"]["book"][a] == told[b]


def test_a_server_that_cannot_read_updates_cannot_score_them() -> None:
    with pytest.raises(IncompatibleDefenses, match="fragmented_fl must read"):
        build_stage(
            model="convnet", settings={"width": 4}, clients=4,
            defenses=(HALF, SecureAggregation()),
        )  # fmt: skip
    build_stage(
        model="convnet", settings={"width": 4}, clients=4,
        defenses=(FragmentedFL(robust=False), SecureAggregation()),
    ).federation.play_round()  # fmt: skip
