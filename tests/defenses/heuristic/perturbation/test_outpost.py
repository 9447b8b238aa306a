from __future__ import annotations

import numpy as np
import pytest
import torch

from leakatlas.defenses.heuristic.perturbation.outpost import (
    Outpost,
    Release,
    kept,
    percentile,
    risk,
)
from leakatlas.fl import FedSGD, LocalStep
from leakatlas.threat import Grant
from tests.conftest import build_stage, relative_error
from tests.defenses.heuristic.probes import a_context, ledger, observed, readout_error, replayed

SECRET = frozenset({Grant.LABELS, Grant.DEFENSE_SECRETS})


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def sent(*defenses: Outpost, model: str = "lenet", examples: int = 3) -> dict[str, torch.Tensor]:
    stage = build_stage(model=model, defenses=defenses, examples=examples)
    return dict(stage.federation.play_round().updates[0].tensors)


@pytest.mark.parametrize("share", [0.0, 0.2, 0.613, 1.0])
@pytest.mark.parametrize("size", [1, 2, 101])
def test_percentiles_are_numpys(size: int, share: float) -> None:
    values = draw(size)
    assert float(percentile(values, share)) == pytest.approx(
        float(np.percentile(values.numpy(), 100 * share))
    )


def test_risk_is_the_variance_of_the_weights_but_at_most_one() -> None:
    found = risk({"a": 0.1 * draw(1000), "b": 9 * draw(1000), "c": torch.ones(5), "d": draw(1)})
    assert found["a"] == pytest.approx(0.01, rel=0.1)
    assert (found["b"], found["c"], found["d"]) == (1.0, 0.0, 0.0)


def test_any_noise_changes_the_upload_and_the_release_of_2024_never_does() -> None:
    """The check that the published code fails."""
    plain = sent()
    for noise in (0.1, 0.8):
        changed = sent(Outpost(noise=noise))
        assert any(not torch.equal(changed[name], t) for name, t in plain.items())
        assert ledger(changed, plain)[0] < 1 - 1e-6
    released = sent(Outpost(as_released="2024"))
    assert all(torch.equal(released[name], t) for name, t in plain.items())


def test_noise_falls_where_information_is_high_on_the_asked_share() -> None:
    stage = build_stage(model="lenet", defenses=(Outpost(prune=0.0),), examples=1)
    noisy = stage.federation.play_round().updates[0].tensors
    plain = sent(examples=1)
    moved = {name: noisy[name] != t for name, t in plain.items()}
    noise = stage.federation.clients[0].memories["outpost"]["noise"]
    flat = torch.cat([t.square().flatten() for t in plain.values()])
    threshold = percentile(flat, 0.6)
    share = 0
    for name, t in plain.items():
        assert bool((t[moved[name]].square() >= threshold).all())
        share += int((t.square() >= threshold).sum())
        assert torch.equal(noise[name] != 0, moved[name])
    assert share == pytest.approx(0.4 * len(flat), abs=2)


def test_its_size_is_lambda_times_the_risk() -> None:
    stage = build_stage(model="fc", settings={"widths": (400,)}, defenses=(Outpost(prune=0.0),))
    stage.federation.play_round()
    noise = stage.federation.clients[0].memories["outpost"]["noise"]["hidden.1.weight"]
    weights = dict(stage.federation.model.named_parameters())["hidden.1.weight"]
    drawn = noise[noise != 0]
    assert float(drawn.std()) == pytest.approx(0.8 * float(weights.detach().var()), rel=0.05)


def test_zero_variance_gets_no_noise() -> None:
    stage = build_stage(
        model="convnet", settings={"width": 4, "norm": "group"}, defenses=(Outpost(),)
    )
    stage.federation.play_round()
    noise = stage.federation.clients[0].memories["outpost"]["noise"]
    weights = {n: p.detach() for n, p in stage.federation.model.named_parameters()}
    constant = [name for name, w in weights.items() if float(w.std()) == 0]
    assert constant
    assert not any(bool(noise[name].any()) for name in constant)


def test_pruning_leaves_a_fifth_where_there_is_no_noise() -> None:
    found = sent(Outpost(informed=0.0, noise=1e-9))
    plain = sent()
    for name, t in plain.items():
        if t.numel() > 50:
            share = float(((found[name] != 0) | (t == 0)).double().mean())
            assert share == pytest.approx(0.2, abs=0.03) or bool((t == 0).any())
    assert int(kept(draw(1000), 0.8).sum()) == 200


def test_later_steps_are_perturbed_more_rarely() -> None:
    assert _perturbed_steps(Outpost(decay=0.0)) == 40
    expected = sum(1 / (1 + 0.125 * i) for i in range(40))
    assert _perturbed_steps(Outpost(decay=0.125)) == pytest.approx(expected, abs=8)


def _perturbed_steps(defense: Outpost) -> int:
    model = torch.nn.Linear(30, 3).double()
    context = a_context(model, draw(1, 30))
    g = {name: draw(*p.shape, seed=5) for name, p in model.named_parameters()}
    changed = 0
    for index in range(40):
        step = LocalStep(
            model, context.x, context.y, torch.nn.functional.cross_entropy, index, context
        )
        found = defense.local_step(step, lambda _: dict(g))
        changed += any(not torch.equal(found[name], t) for name, t in g.items())
    return changed


def test_in_the_release_of_2023_two_calls_draw_the_same_noise() -> None:
    def twice(release: Release) -> list[torch.Tensor]:
        stage = build_stage(model="lenet", defenses=(Outpost(as_released=release, decay=0),))
        memory = stage.federation.clients[0].memories
        found = []
        for _ in range(2):
            stage.federation.play_round()
            found.append(memory["outpost"]["noise"]["fc.weight"])
        return found

    one, other = twice("2023")
    assert torch.equal(one, other)
    one, other = twice("no")
    assert not torch.equal(one, other)


@pytest.mark.parametrize("model", ["lenet", "convnet-bn"])
def test_the_very_noise_makes_the_true_batch_an_exact_zero(model: str) -> None:
    view, x = observed(Outpost(), model=model, grants=SECRET, protocol=FedSGD(mode="train"))
    assert relative_error(replayed(view, x), view.update.tensors) < 1e-9


def test_without_it_the_mirror_compares_what_was_not_pruned() -> None:
    view, x = observed(Outpost(noise=0.1), model="lenet")
    g = view.update.tensors

    def residual(adaptive: bool) -> float:
        own = replayed(view, x, adaptive=adaptive)
        return sum(float((own[n] - t).square().sum()) for n, t in g.items())

    assert 0 < residual(True) < residual(False)


def test_the_readout_fails_where_rows_are_touched() -> None:
    assert readout_error(Outpost(noise=0)) < 1e-9
    assert readout_error(Outpost()) > 0.05
