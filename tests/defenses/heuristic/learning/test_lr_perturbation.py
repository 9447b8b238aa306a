from __future__ import annotations

import pytest
import torch
from torch import nn

from leakatlas.defenses.heuristic.learning.lr_perturbation import (
    LRPerturbation,
    fitted_factor,
    perturbed,
)
from leakatlas.errors import IncompatibleDefenses
from leakatlas.fl import FedAVG, FedSGD, LocalStep, Protocol
from leakatlas.threat import Grant
from tests.conftest import build_stage, relative_error
from tests.defenses.heuristic.probes import (
    a_context,
    ledger,
    observed,
    random_tensors,
    readout_error,
    replayed,
)

STRONG = LRPerturbation(amplitude=0.9)
ONE_STEP = FedAVG(epochs=1, batch_size=3, lr=0.05)


def _uploads(defense: LRPerturbation | None, protocol: Protocol) -> list[dict[str, torch.Tensor]]:
    stage = build_stage(
        model="convnet", settings={"width": 4}, examples=3, clients=2, protocol=protocol,
        defenses=() if defense is None else (defense,),
    )  # fmt: skip
    return [dict(u.tensors) for u in stage.federation.play_round().updates.values()]


@pytest.mark.parametrize("protocol", [FedSGD(), ONE_STEP], ids=["fedsgd", "fedavg"])
def test_one_step_keeps_its_direction_and_loses_its_size(protocol: Protocol) -> None:
    plain, sent = _uploads(None, protocol), _uploads(STRONG, protocol)
    sizes = []
    for a, b in zip(sent, plain, strict=True):
        cosine, size = ledger(a, b)
        assert cosine == pytest.approx(1, abs=1e-12)
        assert 0.1 < size < 1.9
        sizes.append(size)
    assert abs(sizes[0] - sizes[1]) > 1e-3  # each client draws its own


def test_several_steps_at_another_rate_are_that_rate() -> None:
    """The factor on the gradient is the client's run at ``(1 + u) lr``, decay and momentum too."""

    def protocol(lr: float) -> FedAVG:
        return FedAVG(epochs=3, batch_size=3, lr=lr, momentum=0.5, weight_decay=0.1)

    defended = build_stage(
        model="convnet", settings={"width": 4}, examples=3, defenses=(STRONG,),
        protocol=protocol(0.05),
    )  # fmt: skip
    sent = defended.federation.play_round().updates[0].tensors
    factor = defended.federation.clients[0].memories["lr_perturbation"]["factor"]
    direct = build_stage(
        model="convnet", settings={"width": 4}, examples=3,
        protocol=protocol(0.05 * factor),
    )  # fmt: skip
    plain = direct.federation.play_round().updates[0].tensors
    assert abs(factor - 1) > 0.01
    assert relative_error(dict(sent), dict(plain)) < 1e-12


def test_over_a_symmetric_grid_of_rates_the_mean_is_the_undefended_step() -> None:
    g = random_tensors()
    grid = [1 + STRONG.amplitude * u for u in (-1, -0.5, 0, 0.5, 1)]
    sent = [perturbed(g, factor, {}, 0.0) for factor in grid]
    mean = {n: torch.stack([s[n] for s in sent]).mean(0) for n in g}
    assert relative_error(mean, g) < 1e-15


def test_factors_fill_the_interval_evenly() -> None:
    found = []
    for seed in range(200):
        context = a_context(nn.Linear(2, 2), seed=seed)
        step = LocalStep(context.model, context.x, context.y, nn.functional.mse_loss, 0, context)
        sent = STRONG.local_step(step, lambda _: {"w": torch.ones(1)})
        found.append(float(sent["w"]))
    values = torch.tensor(found)
    assert float(values.min()) >= 0.1 and float(values.max()) <= 1.9
    # Mean 1 and standard deviation a / sqrt(3) of a uniform law, within five standard errors.
    assert abs(float(values.mean()) - 1) < 5 * 0.52 / 200**0.5
    assert float(values.std()) == pytest.approx(0.9 / 3**0.5, rel=0.15)


def test_a_rate_holds_for_the_round_or_for_a_step() -> None:
    context = a_context(nn.Linear(2, 2))
    for per, distinct in (("round", 1), ("step", 4)):
        defense = LRPerturbation.from_json({"amplitude": 0.9, "per": per})
        sent = {
            float(
                defense.local_step(
                    LocalStep(
                        context.model, context.x, context.y, nn.functional.mse_loss, i, context
                    ),
                    lambda _: {"w": torch.ones(1)},
                )["w"]
            )
            for i in range(4)
        }
        assert len(sent) == distinct


def test_the_ratio_of_a_first_layer_is_exact_as_if_nothing_were_done() -> None:
    assert readout_error(STRONG) < 1e-9


def test_to_an_adversary_that_fits_the_factor_one_step_hides_nothing() -> None:
    for protocol in (FedSGD(), ONE_STEP):
        view, x = observed(STRONG, protocol=protocol)
        g = dict(view.update.tensors)
        assert relative_error(replayed(view, x), g) < 1e-9
        assert relative_error(replayed(view, x, adaptive=False), g) > 1e-3


def test_over_several_steps_what_is_left_of_the_path_is_small() -> None:
    view, x = observed(STRONG, protocol=FedAVG(epochs=4, batch_size=3, lr=0.05))
    g = dict(view.update.tensors)
    fitted = relative_error(replayed(view, x), g)
    assert 1e-6 < fitted < 0.2 * relative_error(replayed(view, x, adaptive=False), g)


def test_the_factor_is_told_to_who_is_granted_secrets() -> None:
    view, _ = observed(STRONG, grants=frozenset({Grant.LABELS, Grant.DEFENSE_SECRETS}))
    (factor,) = view.secrets.values()
    assert 0.1 < float(factor) < 1.9


def test_the_fitted_factor_stays_in_its_interval() -> None:
    g = random_tensors()
    far = {n: 5 * t for n, t in g.items()}
    assert float(fitted_factor(g, far, 0.5)) == 1.5
    assert float(fitted_factor(g, {n: -t for n, t in g.items()}, 0.5)) == 0.5
    nothing = {n: torch.zeros_like(t) for n, t in g.items()}
    assert float(fitted_factor(nothing, g, 0.5)) == 0.5


@pytest.mark.parametrize(
    ("defense", "protocol"),
    [
        (STRONG, FedAVG(optimizer="adam")),
        (LRPerturbation(per="step"), FedAVG(momentum=0.9)),
    ],
)
def test_where_a_factor_is_no_rate_it_is_refused(defense: LRPerturbation, protocol: FedAVG) -> None:
    with pytest.raises(IncompatibleDefenses, match="use SGD"):
        _uploads(defense, protocol)
