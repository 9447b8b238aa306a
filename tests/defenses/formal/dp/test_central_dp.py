"""Central DP: what one client can move, what the noise is measured against, who sees what."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from leakatlas.defenses.formal.dp.central_dp import CentralDP, sensitivity, weight
from leakatlas.errors import InvalidParameter, ProtocolError
from leakatlas.fl import FedAVG, FedSGD, Message, Protocol, ServerContext, Update, average, stream
from leakatlas.threat import Vantage
from tests.conftest import build_stage

PROTOCOLS: list[Protocol] = [
    FedSGD(),
    FedSGD(reduction="sum"),
    FedAVG(epochs=2, batch_size=1, lr=0.05),
]


def an_update(values: list[float], examples: int) -> Update:
    tensor = torch.tensor(values, dtype=torch.float64)
    return Update(
        tensors={"a": tensor[:2], "b": tensor[2:]},
        kind="delta",
        state_hash="",
        num_examples=examples,
    )


def aggregate(defense: CentralDP, updates: Mapping[int, Update]) -> Update:
    """The server's side alone, on made-up updates."""
    messages = {c: Message(client=c, num_examples=0, update=u) for c, u in updates.items()}

    def combine(kept: Mapping[int, Message]) -> Update:
        return average({c: m.update for c, m in kept.items() if m.update is not None})

    context = ServerContext(0, tuple(updates), {}, FedAVG(), stream("noise"))
    return defense.aggregate(messages, combine, context)


def distance(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    return float(torch.cat([(one[n] - other[n]).detach().flatten() for n in one]).norm())


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_neutral_is_bitwise_undefended(protocol: Protocol) -> None:
    neutral = CentralDP(noise_multiplier=CentralDP.neutral, clip_norm=1e-3, clip_at="server")
    plain = build_stage(protocol=protocol, clients=3).federation.play_round()
    defended = build_stage(
        protocol=protocol, clients=3, defenses=(neutral,)
    ).federation.play_round()
    for client in plain.updates:
        sent, undefended = defended.updates[client].tensors, plain.updates[client].tensors
        assert all(torch.equal(sent[n], undefended[n]) for n in undefended)
    for name, tensor in plain.aggregate.tensors.items():
        assert torch.equal(defended.aggregate.tensors[name], tensor)
    assert neutral.active_traits() == frozenset()


def test_by_default_the_observation_differs() -> None:
    plain = build_stage(clients=3).federation.play_round()
    record = build_stage(clients=3, defenses=(CentralDP(),)).federation.play_round()
    assert distance(record.aggregate.tensors, plain.aggregate.tensors) > 0.1
    assert record.aggregate.num_examples == plain.aggregate.num_examples
    assert record.aggregate.clients == 3


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("clip_at", ["client", "server"])
@pytest.mark.parametrize("clipping", ["flat", "per_layer"])
def test_aggregate_is_the_clipped_mean_plus_the_servers_noise(
    protocol: Protocol, clip_at: str, clipping: str
) -> None:
    settings: dict[str, Any] = {"clip_norm": 0.05, "clip_at": clip_at, "clipping": clipping}
    plain = build_stage(protocol=protocol, clients=3).federation.play_round()

    def noisy(z: float) -> Mapping[str, Tensor]:
        defense = CentralDP(noise_multiplier=z, **settings)
        stage = build_stage(protocol=protocol, clients=3, defenses=(defense,))
        return stage.federation.play_round().aggregate.tensors

    one, two = noisy(1.0), noisy(2.0)
    mean = {n: 2 * one[n] - two[n] for n in one}  # same draws: the noise is linear in z
    expected = {n: torch.zeros_like(t) for n, t in one.items()}
    for update in plain.updates.values():
        whole = math.sqrt(sum(float(t.square().sum()) for t in update.tensors.values()))
        for n, t in update.tensors.items():
            size = whole if clipping == "flat" else float(t.norm())
            expected[n] += t * min(1.0, 0.05 / size) / 3
    assert distance(mean, expected) < 1e-10
    joint = 0.05 if clipping == "flat" else 0.05 * math.sqrt(len(one))
    drawn = torch.cat([(two[n] - one[n]).flatten() for n in one])
    # Thousands of coordinates: the deviation is known to a few percent. The denominator is the
    # realised weight, so the noise is measured against 2S.
    assert abs(float(drawn.std()) / (2 * joint / 3) - 1) < 0.05


@given(
    values=st.lists(st.lists(st.floats(-1e4, 1e4), min_size=4, max_size=4), min_size=2, max_size=4),
    examples=st.lists(st.integers(1, 50), min_size=4, max_size=4),
    cap=st.integers(1, 20),
)
def test_neighbouring_cohorts_differ_by_at_most_the_sensitivity(
    values: list[list[float]], examples: list[int], cap: int
) -> None:
    updates = {i: an_update(v, examples[i]) for i, v in enumerate(values)}
    fewer = {i: u for i, u in updates.items() if i > 0}
    for estimator in ("fixed", "ratio"):
        defense = CentralDP(
            noise_multiplier=1.0,
            clip_norm=2.0,
            clip_at="server",
            estimator=estimator,
            expected_weight=1.5,
            weight_cap=cap,
        )
        # The same stream draws the same noise on both sides, so it cancels in the difference.
        moved = distance(aggregate(defense, updates).tensors, aggregate(defense, fewer).tensors)
        assert moved <= sensitivity(2.0, 1.5, defense.estimator) * (1 + 1e-9)


def noiseless(updates: Mapping[int, Update], cap: int) -> tuple[dict[str, Tensor], float]:
    """The average without an expected weight, and the spread of its noise at z = 1."""
    one, two = (
        aggregate(
            CentralDP(noise_multiplier=z, clip_norm=2.0, clip_at="server", weight_cap=cap), updates
        ).tensors
        for z in (1.0, 2.0)
    )
    drawn = torch.randn(2, generator=stream("noise"), dtype=torch.float64)
    std = float(((two["a"] - one["a"]) / drawn).mean())
    return {n: 2 * one[n] - two[n] for n in one}, std


@given(
    values=st.lists(st.lists(st.floats(-1e4, 1e4), min_size=4, max_size=4), min_size=2, max_size=4),
    other=st.lists(st.floats(-1e4, 1e4), min_size=4, max_size=4),
    examples=st.lists(st.integers(1, 50), min_size=5, max_size=5),
    cap=st.integers(1, 20),
)
def test_without_an_expected_weight_the_noise_covers_who_leaves_and_who_is_replaced(
    values: list[list[float]], other: list[float], examples: list[int], cap: int
) -> None:
    updates = {i: an_update(v, examples[i]) for i, v in enumerate(values)}
    mean, std = noiseless(updates, cap)
    fewer, _ = noiseless({i: u for i, u in updates.items() if i > 0}, cap)
    replaced, _ = noiseless({**updates, 0: an_update(other, examples[4])}, cap)
    assert distance(mean, fewer) <= std * (1 + 1e-9)
    assert distance(mean, replaced) <= std * (1 + 1e-9)


def test_without_an_expected_weight_a_leaving_client_moves_the_mean_by_almost_all_of_2s() -> None:
    """Among N - 1 clients of one direction, one of the opposite: 2S / N, not the fixed S / N."""
    one, other = [2.0, 0.0, 0.0, 0.0], [-2.0, 0.0, 0.0, 0.0]
    updates = {i: an_update(one if i else other, 1) for i in range(10)}
    mean, std = noiseless(updates, 1)
    fewer, _ = noiseless({i: u for i, u in updates.items() if i}, 1)
    assert distance(mean, fewer) == pytest.approx(2 * 2.0 / 10) == pytest.approx(std)


def test_estimators_have_their_own_denominators() -> None:
    updates = {i: an_update([3.0, 4.0, 0.0, 0.0], 10 * (i + 1)) for i in range(3)}

    def mean(estimator: str, expected: float | None, cap: int) -> Tensor:
        settings: dict[str, Any] = {
            "clip_norm": 1.0,
            "clip_at": "server",
            "estimator": estimator,
            "expected_weight": expected,
            "weight_cap": cap,
        }
        one, two = (
            aggregate(CentralDP(noise_multiplier=z, **settings), updates).tensors["a"]
            for z in (1.0, 2.0)
        )
        return 2 * one - two

    direction = torch.tensor([0.6, 0.8], dtype=torch.float64)
    assert torch.allclose(mean("fixed", None, 1), direction)
    assert torch.allclose(mean("fixed", 6.0, 1), direction * 3 / 6)
    assert torch.allclose(mean("ratio", 6.0, 1), direction * 3 / 6)
    assert torch.allclose(mean("ratio", 2.0, 1), direction)  # three weighed more than expected
    assert torch.allclose(mean("fixed", 2.0, 20), direction * (0.5 + 1 + 1) / 2)
    assert [weight(u, 20) for u in updates.values()] == [0.5, 1.0, 1.0]
    assert sensitivity(1.0, 4.0, "ratio") == 2 * sensitivity(1.0, 4.0, "fixed") == 0.5


def test_server_vantage_is_not_protected_and_aggregate_is() -> None:
    def update(vantage: Vantage, *defenses: CentralDP) -> Mapping[str, Tensor]:
        stage = build_stage(clients=2, vantage=vantage, defenses=defenses)
        return stage.view([stage.federation.play_round()]).update.tensors

    defense = CentralDP(clip_norm=0.05, clip_at="server")
    seen, plain = update(Vantage.SERVER, defense), update(Vantage.SERVER)
    assert all(torch.equal(seen[n], plain[n]) for n in plain)
    louder = CentralDP(clip_norm=0.05, noise_multiplier=4.0)
    quiet = CentralDP(clip_norm=0.05, noise_multiplier=0.5)
    seen, other = update(Vantage.SERVER, louder), update(Vantage.SERVER, quiet)
    assert all(torch.equal(seen[n], other[n]) for n in seen)
    assert distance(update(Vantage.AGGREGATE, louder), update(Vantage.AGGREGATE)) > 0.01


def test_mirror_reproduces_the_clipped_upload() -> None:
    stage = build_stage(defenses=(CentralDP(clip_norm=0.05),))
    record = stage.federation.play_round()
    view = stage.view([record])
    client = stage.federation.clients[0]
    replayed = view.replay(client.x, client.y)
    assert distance(replayed, view.update.tensors) < 1e-12
    assert distance(view.replay(client.x, client.y, adaptive=False), view.update.tensors) > 0.01


def test_buffers_are_withheld() -> None:
    stage = build_stage(
        model="convnet-bn", settings={"width": 4}, clients=2, protocol=FedAVG(batch_size=2),
        defenses=(CentralDP(),),
    )  # fmt: skip
    record = stage.federation.play_round()
    assert record.updates[0].buffers_before
    assert not record.aggregate.buffers_after


def test_encoded_updates_are_refused() -> None:
    message = Message(client=4, num_examples=0, update=None, encoded_by="a test double")
    context = ServerContext(0, (4,), {}, FedSGD(), stream(0))
    with pytest.raises(ProtocolError, match="client 4"):
        CentralDP().aggregate({4: message}, lambda kept: an_update([0.0] * 4, 1), context)


def test_epsilon_and_parameters() -> None:
    assert CentralDP().epsilon(rounds=1, sampling_rate=1.0, delta=1e-5) == pytest.approx(
        4.377, abs=5e-4
    )
    assert (
        CentralDP(noise_multiplier=0.0).epsilon(rounds=1, sampling_rate=0.1, delta=1e-5) == math.inf
    )
    with pytest.raises(InvalidParameter, match="clip_norm"):
        CentralDP(clip_norm=math.inf)
    defense = CentralDP(estimator="ratio", expected_weight=3.0)
    assert CentralDP.from_json(defense.to_json()) == defense
