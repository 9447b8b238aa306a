from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from leakatlas.attacks.analytic.sparsification.robbing_the_fed import WEIGHT, RobbingTheFed
from leakatlas.bench.harness import Trial, observe, run_trial
from leakatlas.blocks import readout
from leakatlas.errors import InvalidInput, NotGranted
from leakatlas.fl import FedAVG, FedSGD
from leakatlas.fl.edits import Imprint, ImprintLayers
from leakatlas.threat import Vantage
from tests.attacks.analytic.support import alone_in_bin, errors, same_after_saving, small_stage
from tests.attacks.case import LENET, Case
from tests.conftest import BOX

CASE = Case({"bins": 8}, {**LENET, "examples": 3})


def _alone(trial: Trial, box: Any) -> Tensor:
    """From the true images: who has a bin to itself, top bin unbounded."""
    key = trial.view.key
    h = box.normalize(trial.truth.images.to(key["w"])).flatten(1) @ key["w"]
    edges = key["edges"].clone()
    edges[-1] = torch.inf
    return alone_in_bin(h, edges)


@pytest.mark.parametrize("form", ["cumulative", "sparse"])
@pytest.mark.parametrize("direction", ["random", "mean", "dct"])
def test_every_singleton_is_exact_and_collisions_are_not(form: str, direction: str) -> None:
    attack = RobbingTheFed(bins=64, form=form, direction=direction)  # type: ignore[arg-type]  # parametrised literals
    trial = run_trial(small_stage(letter="G", examples=24, box=BOX), attack)
    alone = _alone(trial, BOX)
    assert 0 < int(alone.sum()) < 24
    wrong = errors(trial)
    assert float(wrong[alone].max()) < 1e-6
    assert float(wrong[~alone].min()) > 1e-6
    assert len(trial.images) <= 24


def test_the_top_bin_is_read_and_no_batch_average_appears() -> None:
    stage = small_stage(letter="G", examples=12)
    trial = run_trial(stage, RobbingTheFed(bins=16, direction="mean"))
    h = trial.truth.images.double().flatten(1).mean(dim=1)
    edges = trial.view.key["edges"]
    bins = torch.bucketize(h, edges)
    top = bins == bins.max()
    if int(top.sum()) == 1:
        assert float(errors(trial)[top].max()) < 1e-6
    average = trial.truth.images.double().mean(dim=0)
    nearest = (trial.images - average).square().flatten(1).mean(dim=1).min()
    assert float(nearest) > 1e-6


def test_hits_agree_with_the_expected_count() -> None:
    """n (1 - 1/k)^(n-1) for uniform measurements, within three standard deviations."""
    n, k, repeats = 24, 48, 400
    generator = torch.Generator().manual_seed(5)
    counts = []
    for _ in range(repeats):
        h = torch.rand(n, generator=generator, dtype=torch.float64)
        edges = torch.linspace(0, 1, k + 1, dtype=torch.float64)
        x = torch.stack([h, torch.rand(n, generator=generator, dtype=torch.float64)], dim=1)
        fires = (h[None, :] > edges[:-1, None]).double()  # rows of the cumulative layer
        delta = torch.rand(n, generator=generator, dtype=torch.float64) + 0.1
        read = readout.cumulative_readout((fires * delta) @ x, fires @ delta, edges[:-1])
        counts.append(float((torch.cdist(x, read.x).min(dim=1).values < 1e-9).sum()))
    got = torch.tensor(counts)
    expected = readout.expected_singletons(n, k)
    assert abs(float(got.mean()) - expected) < 3 * float(got.std()) / repeats**0.5


def test_a_sum_over_clients_reads_like_one_batch() -> None:
    together = small_stage(letter="G", examples=4, clients=3, vantage=Vantage.AGGREGATE)
    trial = run_trial(together, RobbingTheFed(bins=64))
    alone = _alone(trial, together.box)
    assert len(trial.truth.images) == 12
    assert float(errors(trial)[alone].max()) < 1e-6


def test_fedavg_is_read_through_the_sparse_form() -> None:
    protocol = FedAVG(epochs=1, batch_size=4, lr=1e-3)
    stage = small_stage(letter="G", examples=16, protocol=protocol)
    sparse = run_trial(stage, RobbingTheFed(bins=64, form="sparse"))
    exact = errors(sparse)[_alone(sparse, stage.box)] < 1e-6
    assert float(exact.double().mean()) > 0.8
    cumulative = run_trial(
        small_stage(letter="G", examples=16, protocol=protocol), RobbingTheFed(bins=64)
    )
    hits = errors(cumulative)[_alone(cumulative, stage.box)] < 1e-6
    assert int(hits.sum()) < int(exact.sum())


def test_many_local_epochs_drift_away_from_exactness() -> None:
    """With E > 1 and a large step, rows leave their bins and other examples enter them."""
    found = [
        int((errors(run_trial(
            small_stage(letter="G", examples=16, protocol=FedAVG(epochs=e, batch_size=4, lr=lr)),
            RobbingTheFed(bins=64, form="sparse"))) < 1e-6).sum())
        for e, lr in ((1, 1e-3), (4, 3.0))
    ]  # fmt: skip
    assert found[1] < found[0]


def test_label_and_model_behind_do_not_matter() -> None:
    stage = small_stage(letter="G", examples=12)
    one = run_trial(stage, RobbingTheFed(bins=64))
    other_stage = small_stage(letter="G", model="lenet", settings={}, examples=12)
    for client in other_stage.federation.clients.values():
        client.y = client.y.flip(0)
    two = run_trial(other_stage, RobbingTheFed(bins=64))
    alone = _alone(one, stage.box)
    assert torch.equal(alone, _alone(two, stage.box))
    assert float(errors(one)[alone].max()) < 1e-6 and float(errors(two)[alone].max()) < 1e-6


def test_row_order_does_not_matter() -> None:
    generator = torch.Generator().manual_seed(0)
    g_w = torch.randn(9, 5, generator=generator, dtype=torch.float64)
    g_b = torch.rand(9, generator=generator, dtype=torch.float64)
    thresholds = torch.linspace(-1, 1, 9, dtype=torch.float64)
    order = torch.randperm(9, generator=generator)
    straight = readout.cumulative_readout(g_w, g_b, thresholds)
    shuffled = readout.cumulative_readout(g_w[order], g_b[order], thresholds[order])
    assert torch.equal(straight.x, shuffled.x) and torch.equal(straight.rows, shuffled.rows)


def _with_block(change: Callable[[ImprintLayers], None], monkeypatch: pytest.MonkeyPatch) -> Trial:
    """The attack with something done to its block when a client builds it."""
    build = Imprint.layers

    def changed(edit: Imprint) -> ImprintLayers:
        layers = build(edit)
        change(layers)
        return layers

    with monkeypatch.context() as patch:
        patch.setattr(Imprint, "layers", changed)
        return run_trial(small_stage(letter="G", examples=16), RobbingTheFed(bins=64))


def test_unequal_columns_of_w2_break_the_differences(monkeypatch: pytest.MonkeyPatch) -> None:
    def unequal(block: ImprintLayers) -> None:
        with torch.no_grad():
            weight = block.second.weight
            weight.mul_(1 + 0.3 * torch.rand(1, weight.shape[1], dtype=weight.dtype))

    plain = _with_block(lambda block: None, monkeypatch)
    broken = _with_block(unequal, monkeypatch)
    assert int((errors(plain) < 1e-6).sum()) > 5
    assert int((errors(broken) < 1e-6).sum()) <= 1


def test_dropout_between_the_two_layers_breaks_the_differences(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Leaky(ImprintLayers):
        def forward(self, x: Tensor) -> Tensor:
            hidden = torch.relu(self.first(x.flatten(1)))
            y: Tensor = self.second(nn.functional.dropout(hidden, 0.5, training=True))
            return y.reshape(x.shape)

    def drop(block: ImprintLayers) -> None:
        block.__class__ = Leaky

    assert int((errors(_with_block(drop, monkeypatch)) < 1e-6).sum()) <= 1


def test_normalisation_behind_the_block_is_harmless() -> None:
    stage = small_stage(
        letter="G", examples=12, model="convnet-bn", settings={}, protocol=FedSGD(mode="train")
    )
    trial = run_trial(stage, RobbingTheFed(bins=64))
    assert float(errors(trial)[_alone(trial, stage.box)].max()) < 1e-6


def test_an_update_without_the_bias_is_refused() -> None:
    attack = RobbingTheFed(bins=16)
    view, _ = observe(small_stage(letter="G", examples=4), attack)
    seen = view.rounds[0]
    assert seen.update is not None
    kept = {n: t for n, t in seen.update.tensors.items() if n != "block.first.bias"}
    bare = view.with_rounds([replace(seen, update=seen.update.with_tensors(kept))], dict(view.key))
    with pytest.raises(InvalidInput, match=r"block\.first\.bias"):
        attack(bare)


def test_noise_raises_the_floor_and_large_bins_survive() -> None:
    attack = RobbingTheFed(bins=128)
    view, _ = observe(small_stage(letter="G", examples=8), attack)
    seen = view.rounds[0]
    assert seen.update is not None
    generator = torch.Generator().manual_seed(1)
    size = 1e-3 * float(seen.update.tensors["block.first.bias"].abs().max())
    noisy = {
        n: t + size * torch.randn(t.shape, generator=generator, dtype=t.dtype)
        for n, t in seen.update.tensors.items()
    }
    found = attack(
        view.with_rounds([replace(seen, update=seen.update.with_tensors(noisy))], dict(view.key))
    )
    assert found.notes["noise_floor"] > 0
    assert found.notes["bins_hit"] == 128  # every bin shows something now
    assert 0 < len(found.images) <= 8  # and hardly any of it is offered


def test_one_shot_cuts_a_bin_of_the_asked_mass() -> None:
    attack = RobbingTheFed(one_shot=16, direction="mean")
    stage = small_stage(letter="G", examples=16)
    trial = run_trial(stage, attack)
    edges = trial.view.key["edges"]
    assert len(edges) == 3
    assert stage.surrogate is not None
    h = stage.surrogate.images.double().flatten(1).mean(dim=1)
    inside = (h >= edges[0]) & (h < edges[1])
    assert abs(float(inside.double().mean()) - 1 / 16) < 0.02
    assert len(trial.images) <= 1


def test_weights_instead_of_gradients_are_read_too() -> None:
    """Whoever sees the weights after training subtracts those before."""
    attack = RobbingTheFed(bins=64, form="sparse")
    stage = small_stage(letter="G", examples=6, protocol=FedAVG(batch_size=6, lr=1e-3))
    view, _ = observe(stage, attack)
    seen = view.rounds[0]
    assert seen.update is not None
    after = {n: seen.state[n] + t for n, t in seen.update.tensors.items()}
    weights = replace(seen.update, tensors=after, kind="weights")
    found = attack(view.with_rounds([replace(seen, update=weights)], dict(view.key)))
    straight = attack(view)
    assert found.images.shape == straight.images.shape
    # The weights carry 1, the change 1e-6: ten digits of the ratio are gone.
    assert torch.allclose(found.images, straight.images, atol=1e-5)


def test_needs_public_images() -> None:
    stage = small_stage(letter="F", examples=2)
    with pytest.raises(NotGranted, match="SURROGATE"):
        run_trial(stage, RobbingTheFed())


def test_the_same_from_a_saved_view(tmp_path: Path) -> None:
    attack = RobbingTheFed(bins=32)
    view, _ = observe(small_stage(letter="G", examples=8), attack)
    assert WEIGHT in view.update.tensors
    same_after_saving(attack, view, tmp_path)
