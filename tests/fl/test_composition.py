"""Which defenses may stand together: refused before a round, allowed where nothing breaks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from leakatlas.catalogue.registry import load_defense
from leakatlas.errors import IncompatibleDefenses
from leakatlas.fl import (
    ActsOn,
    ClientContext,
    Defense,
    FedAVG,
    Federation,
    FedSGD,
    Message,
    ServerContext,
    Trait,
    Update,
    check_composition,
)
from leakatlas.fl.composition import ordered
from leakatlas.fl.rounds import Client
from leakatlas.lint.guard import LintGuard
from leakatlas.models import build
from leakatlas.params import NonNegative


@dataclass(frozen=True, kw_only=True)
class Double(Defense):
    """A defense that is nothing but its declarations."""

    key: ClassVar[str] = "double"
    knob: ClassVar[str] = "strength"
    neutral: ClassVar[float] = 0.0

    strength: NonNegative = 1.0


def double(name: str, stage: int = 50, **declared: Any) -> Defense:
    """A double with its own key and declarations."""
    cls: type[Double] = type(name, (Double,), {"key": name, "stage": stage, **declared})
    return cls()


def dp(*more: Trait) -> Defense:
    return double("noise", 60, traits=frozenset({Trait.DP_NOISE, *more}))


FEEDBACK = double("pruning", traits=frozenset({Trait.ERROR_FEEDBACK}))
READING = double("median", traits=frozenset({Trait.READS_UPDATES}))
CENTRAL = double("central", 80, traits=frozenset({Trait.DP_NOISE, Trait.READS_UPDATES}))
HIDING = double("masks", 90, traits=frozenset({Trait.HIDES_UPDATES}))
ENCRYPTING = double("encryption", 90, traits=frozenset({Trait.HIDES_UPDATES}))
EXAMPLES = dp(Trait.EXAMPLE_DP)


@dataclass(frozen=True, kw_only=True)
class Mixing(Double):
    """Changes the batch."""

    key: ClassVar[str] = "mixing"
    stage: ClassVar[int] = 10

    def batch(self, x: Tensor, y: Tensor, context: ClientContext) -> tuple[Tensor, Tensor]:
        return x.flip(0), y.flip(0)


@pytest.mark.parametrize(
    ("pair", "reason"),
    [
        ((dp(), FEEDBACK), "pruning keeps unprotected residuals"),
        ((EXAMPLES, FEEDBACK), "error_feedback=False"),
        ((CENTRAL, FEEDBACK), "voids the accounting of central"),
        ((HIDING, READING), "median must read each client's update"),
        ((HIDING, CENTRAL), "move it to the clients"),
        ((HIDING, ENCRYPTING), "both encode the message"),
        ((CENTRAL, READING), "whose sensitivity is not that of what median"),
        ((EXAMPLES, Mixing()), "mixing changes the batch"),
        ((dp(), dp()), "noise appears 2 times"),
    ],
)
def test_refused_in_any_order(pair: tuple[Defense, Defense], reason: str) -> None:
    for defenses in (pair, pair[::-1]):
        with pytest.raises(IncompatibleDefenses, match=reason):
            check_composition(defenses, FedSGD())


@pytest.mark.parametrize(
    "pair",
    [
        (dp(), double("pruning")),
        (dp(), HIDING),
        (dp(), READING),
        (dp(), Mixing()),
        (FEEDBACK, HIDING),
        (EXAMPLES, Mixing(strength=0.0)),
        (CENTRAL, double("quantisation", 70)),
    ],
)
def test_allowed(pair: tuple[Defense, Defense]) -> None:
    for defenses in (pair, pair[::-1]):
        check_composition(defenses, FedSGD())
        check_composition(defenses, FedAVG())


def test_batch_normalisation_is_refused_for_examples_only() -> None:
    model = build("convnet-bn", classes=10, size=8, width=4)
    with pytest.raises(IncompatibleDefenses, match="norm='group'"):
        check_composition([EXAMPLES], FedSGD(), model)
    check_composition([dp()], FedSGD(), model)
    check_composition([EXAMPLES], FedSGD(), build("convnet", classes=10, size=8, norm="group"))
    with pytest.raises(IncompatibleDefenses, match="batch normalisation"):
        Federation(model, {0: Client(torch.rand(1, 3, 8, 8), torch.tensor([0]))}, FedSGD(),
                   [EXAMPLES])  # fmt: skip


def test_single_batch_defenses_are_refused_under_fedavg() -> None:
    single = double("mask", modes=frozenset({ActsOn.SINGLE_BATCH}))
    check_composition([single], FedSGD())
    with pytest.raises(IncompatibleDefenses, match="Use FedSGD"):
        check_composition([single], FedAVG())


def test_order_is_that_of_the_stages() -> None:
    pipeline = [HIDING, dp(), FEEDBACK, Mixing()]
    assert [d.key for d in ordered(pipeline)] == ["mixing", "pruning", "noise", "masks"]


def test_real_rows_follow_the_rules() -> None:
    rows = {key: load_defense(key) for key in ("central_dp", "client_dp", "secure_aggregation")}
    central, client, masks = (rows[key] for key in rows)
    refused = [
        ([central(), masks()], "must read each client's update"),
        ([central(clip_at="server"), masks()], "must read each client's update"),
        ([client(), FEEDBACK], "error_feedback"),
        ([client(unit="update"), FEEDBACK], "error_feedback"),
        ([central(), FEEDBACK], "error_feedback"),
        ([masks(), ENCRYPTING], "both encode"),
        ([masks(), READING], "median must read"),
        ([client(), Mixing()], "changes the batch"),
    ]
    for defenses, reason in refused:
        with pytest.raises(IncompatibleDefenses, match=reason):
            check_composition(defenses, FedSGD())
    neutral = [row.neutral for row in rows.values()]
    off = [row(**{row.knob: value}) for row, value in zip(rows.values(), neutral, strict=True)]
    model = build("convnet-bn", classes=10, size=8, width=4)
    check_composition([*off, FEEDBACK, Mixing()], FedSGD(), model)
    check_composition([client(unit="update", share_of=5), masks()], FedAVG(), model)
    with pytest.raises(IncompatibleDefenses, match="batch normalisation"):
        check_composition([client()], FedSGD(), model)


@dataclass(frozen=True, kw_only=True)
class Halving(Double):
    """Does something to what the server aggregated."""

    key: ClassVar[str] = "halving"

    def aggregate(
        self,
        messages: Mapping[int, Message],
        combine: Callable[[Mapping[int, Message]], Update],
        context: ServerContext,
    ) -> Update:
        mean = combine(messages)
        return mean.with_tensors({n: t / 2 for n, t in mean.tensors.items()})


def test_distributed_noise_under_masks_and_a_server_step_behind_them() -> None:
    masks = load_defense("secure_aggregation")(ring_bits=64)
    share = load_defense("client_dp")(
        unit="update", share_of=3, clipping="flat", clip_norm=1.0, noise_multiplier=0.1
    )
    clients = {i: Client(torch.rand(2, 3, 8, 8), torch.tensor([0, i])) for i in range(3)}
    model = build("fc", classes=10, size=8, widths=(4,), seed=0).double()
    for client in clients.values():
        client.x = client.x.double()

    def play(*defenses: Defense) -> Update:
        return Federation(model, clients, FedSGD(), defenses, seed=0).play_round().aggregate

    open_, hidden = play(share, Halving()), play(share, Halving(), masks)
    assert hidden.clients == open_.clients == 3
    assert hidden.num_examples == open_.num_examples == 6
    for name, tensor in open_.tensors.items():
        assert torch.allclose(hidden.tensors[name], tensor, atol=1e-12, rtol=0)


def test_a_defense_that_reads_the_batch_after_example_noise_is_refused() -> None:
    with pytest.raises(IncompatibleDefenses, match="soteria looks at the batch again"):
        check_composition([load_defense("client_dp")(), load_defense("soteria")()], FedSGD())


def test_a_client_that_may_refuse_does_not_change_the_batch() -> None:
    check_composition([load_defense("client_dp")(), LintGuard()], FedSGD())
