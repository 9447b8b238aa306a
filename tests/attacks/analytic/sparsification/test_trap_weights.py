from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from leakatlas.attacks.analytic.sparsification.trap_weights import TrapWeights, agreeing
from leakatlas.bench.harness import Trial, observe, run_trial
from leakatlas.blocks.surgery import trap_rows
from leakatlas.data import Box
from leakatlas.errors import NotGranted, UnsupportedModel
from leakatlas.fl import FedAVG, Stage
from leakatlas.fl.edits import TrapBlock
from leakatlas.threat import Vantage
from tests.attacks.analytic.support import UNIT, crops, errors, same_after_saving, small_stage
from tests.attacks.case import Case
from tests.conftest import BOX

CASE = Case({}, {"settings": {"widths": (32,), "act": "relu"}}, boxed=True)

FC = {"widths": (160, 32), "act": "relu"}


def _stage(**settings: Any) -> Stage:
    chosen = {
        "letter": "F", "model": "fc", "settings": FC, "size": 8, "examples": 8, **settings,
    }  # fmt: skip
    return small_stage(**chosen)


def _alone(fires: Tensor) -> Tensor:
    """Who fires some row alone, from activations ``(N, m)``: ``(N,)``."""
    sole: Tensor = (fires & (fires.sum(dim=0) == 1)).any(dim=1)
    return sole


def _fires(trial: Trial, box: Box) -> Tensor:
    """The true activations ``(N, m)`` of the trapped layer, which the attack never sees."""
    seen: list[Tensor] = []
    model = trial.records[-1].received[0]
    layer = next(m for m in model.modules() if isinstance(m, nn.Linear))
    handle = layer.register_forward_hook(lambda module, inputs, output: seen.append(output > 0))
    model(box.normalize(trial.truth.images.double()))
    handle.remove()
    return seen[0]


class _Convolutional(nn.Module):
    def __init__(self, *, bias: bool = True, pool: int = 1) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 5, 3, padding=1, bias=bias), nn.ReLU(), nn.Conv2d(5, 4, 5, padding=2),
            nn.ReLU(), nn.MaxPool2d(pool), nn.Flatten(), nn.Linear(4 * (8 // pool) ** 2, 160),
            nn.ReLU(), nn.Linear(160, 10),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.body(x)
        return logits


def _live(kind: str) -> nn.Module | None:
    torch.manual_seed(0)
    return _Convolutional() if kind == "convolutions" else None


@pytest.mark.parametrize("box", [UNIT, BOX], ids=["plain", "normalised"])
@pytest.mark.parametrize("kind", ["layer", "convolutions", "block"])
def test_exactly_the_sole_activators_come_back(kind: str, box: Box) -> None:
    stage = _stage(live=_live(kind), box=box)
    trial = run_trial(stage, TrapWeights(block_rows=160 if kind == "block" else 0))
    alone = _alone(_fires(trial, box))
    assert 0 < int(alone.sum()) < 8
    wrong = errors(trial)
    assert float(wrong[alone].max()) < 1e-6
    assert float(wrong[~alone].min()) > 1e-6
    assert box.contains(trial.found.images)


def test_letters_without_surrogate_data_suffice() -> None:
    trial = run_trial(_stage(letter="F"), TrapWeights())
    assert "surrogate" not in trial.found.reads
    with pytest.raises(NotGranted, match="surrogate"):
        run_trial(_stage(letter="F"), TrapWeights(scaling=None))
    tuned = run_trial(_stage(letter="G"), TrapWeights(scaling=None))
    assert int((errors(tuned) < 1e-6).sum()) > 0


def test_a_constant_factor_on_the_traps_changes_nothing_about_who_leaks() -> None:
    hits = [
        errors(run_trial(_stage(), TrapWeights(sigma=sigma))) < 1e-6 for sigma in (0.05, 0.5, 5.0)
    ]
    assert bool(hits[0].any())
    assert torch.equal(hits[0], hits[1]) and torch.equal(hits[1], hits[2])


def _rates(x: Tensor, rows: Tensor) -> tuple[float, float]:
    """Over batches of 32: examples that fire a row alone, and active rows with one example."""
    recall, precision = [], []
    for batch in x.split(32):
        fires = batch @ rows.T > 0
        count = fires.sum(dim=0)
        recall.append(_alone(fires).double().mean())
        precision.append((count == 1).sum() / (count > 0).sum().clamp(min=1))
    return float(torch.stack(recall).mean()), float(torch.stack(precision).mean())


def _traps(scaling: float, like: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return trap_rows(400, like.shape[1], scaling=scaling, sigma=0.5, generator=generator, like=like)


def test_leakage_is_peaked_in_s_and_above_the_passive_rate() -> None:
    x = crops(16, 128, "surrogate").images.double().flatten(1)
    generator = torch.Generator().manual_seed(1)
    recall, precision = _rates(x, torch.randn(400, 768, generator=generator, dtype=x.dtype))
    at = {s: _rates(x, _traps(s, x)) for s in (0.7, 0.9, 0.95, 0.99)}
    assert at[0.95][0] > 1.2 * recall and at[0.95][1] > 2 * precision
    assert at[0.9][1] > 5 * precision  # most active rows then hold one image
    assert at[0.7][0] < 0.5 * at[0.95][0] and at[0.99][0] < 0.5 * at[0.95][0]


def test_s_of_one_reduces_to_passive_rows_without_a_mean() -> None:
    x = crops(16, 128, "surrogate").images.double().flatten(1)
    rows = _traps(1.0, x)
    assert float(rows.sum(dim=1).abs().max()) < 1e-12
    generator = torch.Generator().manual_seed(1)
    passive = torch.randn(400, 768, generator=generator, dtype=x.dtype)
    passive -= passive.mean(dim=1, keepdim=True)
    assert float((x @ rows.T > 0).double().mean()) == pytest.approx(0.5, abs=0.05)
    assert _rates(x, rows) == pytest.approx(_rates(x, passive), abs=0.05)


def test_inputs_that_are_not_pixels_in_0_1_destroy_it() -> None:
    x = crops(16, 128, "surrogate").images
    rows = _traps(0.95, x.double().flatten(1))
    standardised = Box(mean=(0.5,) * 3, std=(0.25,) * 3).normalize(x)
    recall, precision = _rates(standardised.double().flatten(1), rows)
    plain = _rates(x.double().flatten(1), rows)
    assert recall < 0.5 * plain[0] and precision < 0.5 * plain[1]


def test_agreeing_rows_are_images_and_lone_rows_may_be_mixtures() -> None:
    trial = run_trial(_stage(settings={"widths": (600, 32), "act": "relu"}), TrapWeights())
    confidence = trial.found.confidence
    assert confidence is not None
    assert bool((confidence.diff() <= 0).all())
    flat = trial.images.flatten(1)
    truth = trial.truth.images.double().flatten(1)
    nearest = (flat[:, None] - truth).square().mean(dim=2).sqrt().min(dim=1).values
    pure = nearest < 1e-6
    assert 2 <= int(pure.sum()) and bool(pure[confidence >= 2].all())
    assert not bool(pure.all())


def test_agreement_counts_copies_and_keeps_the_strongest() -> None:
    a, b = torch.rand(2, 30, dtype=torch.float64)
    x = torch.stack([a, b, a * (1 + 1e-9), (a + b) / 2, a])
    kept, counts = agreeing(x, torch.tensor([0.1, 0.5, 0.9, 0.2, 0.3]), 1e-6)
    assert kept.tolist() == [2, 1, 3] and counts.tolist() == [3, 1, 1]


@pytest.mark.parametrize("epochs", [1, 3])
def test_a_weight_change_shows_rows_that_nobody_else_ever_fired(epochs: int) -> None:
    """The step is small, so who fires which row stays as it was in the model that was sent."""
    stage = _stage(protocol=FedAVG(epochs=epochs, batch_size=2, lr=1e-5))
    trial = run_trial(stage, TrapWeights())
    alone = _alone(_fires(trial, UNIT))
    assert bool(alone.any())
    assert float(errors(trial)[alone].max()) < 1e-6


def test_being_alone_in_a_step_is_not_enough() -> None:
    """One example a step: what another step adds to the row mixes all the same."""
    stage = _stage(protocol=FedAVG(epochs=1, batch_size=1, lr=1e-5))
    trial = run_trial(stage, TrapWeights())
    alone = _alone(_fires(trial, UNIT))
    assert bool(alone.any()) and not bool(alone.all())
    assert float(errors(trial)[alone].max()) < 1e-6
    assert float(errors(trial)[~alone].min()) > 1e-4


def test_a_sum_over_clients_takes_rows_from_everyone() -> None:
    settings = {"clients": 4, "examples": 6, "vantage": Vantage.AGGREGATE}
    trial = run_trial(_stage(**settings), TrapWeights())
    x = UNIT.normalize(trial.truth.images.double())
    first = next(m for m in trial.view.model.modules() if isinstance(m, nn.Linear))
    alone = _alone(first(x.flatten(1)) > 0)  # alone among all clients' examples
    assert bool(alone.any())
    assert float(errors(trial)[alone].max()) < 1e-6
    assert float(errors(trial)[~alone].min()) > 1e-6


def test_pooling_only_shrinks_what_leaks() -> None:
    torch.manual_seed(0)
    trial = run_trial(_stage(live=_Convolutional(pool=2)), TrapWeights())
    assert trial.view.key["carried"].tolist() == [3, 4, 4]
    assert trial.images.shape[1:] == (3, 8, 8)
    assert float(errors(trial).min()) < 0.3


def test_without_a_bias_there_is_no_ratio() -> None:
    stage = _stage(settings={**FC, "bias": False})
    with pytest.raises(UnsupportedModel, match="without bias"):
        run_trial(stage, TrapWeights())
    assert TrapWeights().outlook(stage.view()).verdict == "hopeless"


def test_a_block_serves_any_model() -> None:
    trial = run_trial(_stage(model="resnet8", settings={}), TrapWeights(block_rows=160))
    alone = _alone(_fires(trial, UNIT))
    assert bool(alone.any())
    assert float(errors(trial)[alone].max()) < 1e-6


def test_a_block_starts_close_to_the_identity_and_takes_odd_sizes() -> None:
    generator = torch.Generator().manual_seed(0)
    like = torch.empty(0, dtype=torch.float64)
    weight = trap_rows(9, 75, scaling=0.9, sigma=0.5, generator=generator, like=like)
    block = TrapBlock(weight, torch.zeros(9).double(), torch.zeros(75, 9).double()).layers()
    x = torch.rand(2, 3, 5, 5, dtype=torch.float64)
    assert torch.equal(block(x), x)
    assert bool(((weight == 0).sum(dim=1) == 1).all())


def test_when_no_row_fires_the_attack_says_so() -> None:
    trial = run_trial(_stage(), TrapWeights(scaling=0.05))
    assert trial.found.status == "failed" and len(trial.images) == 0
    assert "no example fired" in trial.found.reason


def test_outlook_says_what_stands_in_the_way() -> None:
    good = TrapWeights().outlook(_stage().view())
    assert good.verdict == "applicable" and "160 trap rows for 8" in good.reason
    several = _stage(clients=2, vantage=Vantage.AGGREGATE).view()
    assert TrapWeights().outlook(several).verdict == "unknown"
    sigmoid = TrapWeights().outlook(_stage(model="lenet", settings={}).view())
    assert sigmoid.verdict == "hopeless" and "block_rows" in sigmoid.reason
    assert TrapWeights(block_rows=50).outlook(
        _stage(model="lenet", settings={}).view()
    ).verdict == ("applicable")
    assert TrapWeights(scaling=None).outlook(_stage().view()).verdict == "hopeless"
    no_bias = _stage(live=_Convolutional(bias=False), box=BOX).view()
    assert "no bias" in TrapWeights().outlook(no_bias).reason


@pytest.mark.parametrize("block_rows", [0, 100])
def test_the_same_from_a_saved_view(block_rows: int, tmp_path: Path) -> None:
    attack = TrapWeights(block_rows=block_rows)
    view, _ = observe(_stage(), attack)
    same_after_saving(attack, view, tmp_path)
