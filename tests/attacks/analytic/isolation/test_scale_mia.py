from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from leakatlas.attacks.analytic.isolation.scale_mia import (
    Decoder,
    ScaleMIA,
    decode,
    encode,
    find_parts,
    rounded_readout,
    thresholds,
)
from leakatlas.bench.harness import Trial, observe, run_trial
from leakatlas.blocks import readout
from leakatlas.blocks.surgery import Normalise
from leakatlas.blocks.watch import Watch
from leakatlas.data import Box
from leakatlas.errors import NotGranted, UnsupportedModel
from leakatlas.fl import FedAVG, Stage, TamperedModel, View
from leakatlas.threat import Vantage
from tests.attacks.analytic.support import UNIT, crops, errors, same_after_saving, small_stage
from tests.attacks.case import Case
from tests.conftest import BOX

CASE = Case({"epochs": 1}, {"settings": {"widths": (32,), "act": "relu"}}, boxed=True)

FAST = ScaleMIA(epochs=4, quantiles="empirical")
FC = {"widths": (160, 32), "act": "relu"}


@pytest.fixture(autouse=True, scope="module")
def shared_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """An autoencoder is learned once for the whole file."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LEAKATLAS_CACHE", str(tmp_path_factory.mktemp("artefacts")))
        yield


class _Victim(nn.Module):
    """Two convolutions that halve, and linear layers with 160 bins."""

    def __init__(self, *, dropout: float = 0.0) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.ReLU(),
            nn.Conv2d(8, 16, 3, stride=2, padding=1), nn.ReLU(),
        )  # fmt: skip
        hidden: list[nn.Module] = [nn.Linear(256, 160), nn.ReLU()]
        if dropout:
            hidden.append(nn.Dropout(dropout))
        self.head = nn.Sequential(*hidden, nn.Linear(160, 32), nn.ReLU(), nn.Linear(32, 10))

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.features(x).flatten(1))
        return logits


def _victim(**settings: Any) -> _Victim:
    torch.manual_seed(0)
    return _Victim(**settings)


def _stage(**settings: Any) -> Stage:
    chosen: dict[str, Any] = {"letter": "G", "size": 16, "examples": 12, **settings}
    if "model" not in chosen:
        chosen.setdefault("live", _victim())
    return small_stage(**chosen)


def _latents(trial: Trial, box: Box) -> Tensor:
    """Of the private images, with the encoder that was sent."""
    model = trial.records[-1].received[0].eval()
    x = box.normalize(trial.truth.images.to(next(model.parameters()).dtype))
    with torch.no_grad():
        return encode(find_parts(model, x[:1]), x)


def _alone(trial: Trial, box: Box) -> Tensor:
    """Who has a bin to themselves, from the true latents: what the released code looks at."""
    q = _latents(trial, box).mean(dim=1)
    bins = torch.bucketize(q, trial.view.key["thresholds"])
    seen = bins > 0  # darker than the lowest threshold: no row fires
    return seen & ((bins[:, None] == bins).sum(dim=1) == 1)


def _through_the_autoencoder(trial: Trial, box: Box) -> Tensor:
    """``d(e(x))`` of the private images, in [0, 1]."""
    z = _latents(trial, box)
    return box.denormalize(decode(z, trial.view.key, box, tuple(trial.view.input_shape)))


def _distance(expected: Tensor, trial: Trial) -> Tensor:
    """Of each expected image to its nearest candidate, root mean square, ``(N,)``."""
    pairs = expected[:, None].flatten(2) - trial.images.to(expected)[None].flatten(2)
    nearest: Tensor = pairs.square().mean(dim=2).sqrt().min(dim=1).values
    return nearest


@pytest.mark.parametrize("box", [UNIT, BOX], ids=["plain", "normalised"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_alone_in_a_bin_is_what_the_autoencoder_makes_of_the_image(
    box: Box, dtype: torch.dtype
) -> None:
    trial = run_trial(_stage(box=box, dtype=dtype), FAST)
    alone = _alone(trial, box)
    assert 0 < int(alone.sum()) < len(alone)
    distance = _distance(_through_the_autoencoder(trial, box), trial)
    if dtype == torch.float64:
        assert float(distance[alone].max()) < 1e-9
        assert float(distance[~alone].min()) > 1e-6
    else:
        assert float(distance[alone].max()) < 1e-3
    assert trial.images.dtype == dtype and box.contains(trial.found.images)


@pytest.mark.parametrize("widths", [(160, 32), (160, 32, 16), (160,)])
@pytest.mark.parametrize("box", [UNIT, BOX], ids=["plain", "normalised"])
def test_without_an_encoder_the_latent_is_the_image(widths: tuple[int, ...], box: Box) -> None:
    stage = _stage(model="fc", settings={**FC, "widths": widths}, box=box)
    trial = run_trial(stage, FAST)
    alone = _alone(trial, box)
    assert 0 < int(alone.sum()) < len(alone)
    assert float(errors(trial)[alone].max()) < 1e-6
    assert float(errors(trial)[~alone].min()) > 1e-6
    assert int((errors(trial) < 1e-6).sum()) == int(alone.sum())


def test_the_oracle_of_the_released_code_finds_nothing_more() -> None:
    """Bins located by the true activations, against bins located by the bias gradient."""
    trial = run_trial(_stage(), FAST)
    view, edges = trial.view, trial.view.key["thresholds"]
    name = find_parts(view.model, torch.zeros(1, 3, 16, 16).double()).names[0]
    g_w, g_b = (view.update.tensors[f"{name}.{part}"] for part in ("weight", "bias"))
    blind = readout.cumulative_readout(g_w, g_b, edges)
    z = _latents(trial, UNIT)
    alone = _alone(trial, UNIT)
    located = torch.bucketize(z.mean(dim=1), edges) - 1
    for latent, row in zip(z[alone], located[alone].tolist(), strict=True):
        last = row == len(edges) - 1
        step_w = g_w[row] - (0 if last else g_w[row + 1])
        step_b = g_b[row] - (0 if last else g_b[row + 1])
        oracle = step_w / step_b
        at = torch.nonzero(blind.rows == row).flatten()
        assert len(at) == 1
        assert torch.allclose(oracle, blind.x[at[0]], rtol=1e-12, atol=0)
        assert torch.allclose(oracle, latent, atol=1e-9)


def test_a_sum_over_clients_is_the_pooled_batch() -> None:
    together = run_trial(_stage(clients=4, examples=3, vantage=Vantage.AGGREGATE), FAST)
    pooled = run_trial(_stage(examples=12), FAST)
    assert len(together.images) == len(pooled.images)
    assert float(_distance(pooled.images, together).max()) < 1e-8


def _with_tampered_head(stage: Stage, attack: ScaleMIA, change: Any) -> Trial:
    """A round in which ``change(parts)`` spoils what the attack wrote."""
    clean = run_trial(stage, attack)
    tampering = attack.tamper(
        stage.view(), generator=torch.Generator().manual_seed(0), watch=Watch()
    )
    assert tampering is not None and isinstance(tampering.sent, TamperedModel)
    model = tampering.sent.build(stage.federation.model, pixels=3 * 16 * 16)
    with torch.no_grad():
        change(find_parts(model, torch.zeros(1, 3, 16, 16).double()))
    record = stage.federation.play_round(sent=TamperedModel.of(model))
    view = stage.view([record], keys=[tampering.key])
    found = attack(view)
    return Trial(view, clean.truth, (record,), found, stage.box.denormalize(found.images))


def test_unequal_columns_hurt() -> None:
    def uneven(parts: Any) -> None:
        columns = torch.linspace(0.5, 1.5, parts.second.in_features, dtype=torch.float64)
        parts.second.weight.mul_(columns)

    stage = _stage(model="fc", settings=FC)
    clean = run_trial(stage, FAST)
    spoiled = _with_tampered_head(_stage(model="fc", settings=FC), FAST, uneven)
    exact = [int((errors(t) < 1e-6).sum()) for t in (clean, spoiled)]
    assert exact[0] > 3 and exact[1] <= exact[0] // 2


def test_a_head_with_equal_rows_would_send_rounding_only() -> None:
    """The deltas of a softmax add up to zero."""

    def even(parts: Any) -> None:
        parts.second.weight.fill_(1 / 160)

    settings = {**FC, "widths": (160,)}
    clean = run_trial(_stage(model="fc", settings=settings), FAST)
    spoiled = _with_tampered_head(_stage(model="fc", settings=settings), FAST, even)
    sizes = [float(t.view.update.tensors["hidden.1.bias"].abs().max()) for t in (clean, spoiled)]
    assert sizes[0] > 1e-5 and sizes[1] < 1e-15


def test_longer_training_raises_the_ceiling_and_with_it_the_images() -> None:
    ceiling, quality = [], []
    for epochs in (1, 30):
        trial = run_trial(_stage(), ScaleMIA(epochs=epochs, quantiles="empirical"))
        alone = _alone(trial, UNIT)
        own = (_through_the_autoencoder(trial, UNIT) - trial.truth.images).square()
        own = own.flatten(1).mean(dim=1).sqrt()
        assert bool((errors(trial)[alone] <= own[alone] + 1e-6).all())
        ceiling.append(trial.found.notes["autoencoder_psnr"])
        quality.append(float(errors(trial)[alone].mean()))
    assert ceiling[1] > ceiling[0] + 1
    assert quality[1] < quality[0]


def test_a_single_local_step_is_a_gradient_and_many_drift() -> None:
    exact = []
    for protocol in (
        FedAVG(epochs=1, batch_size=12, lr=0.1),
        FedAVG(epochs=5, batch_size=3, lr=0.1),
    ):
        trial = run_trial(_stage(model="fc", settings=FC, protocol=protocol), FAST)
        exact.append(int((errors(trial) < 1e-6).sum()))
        if len(exact) == 1:
            assert exact[0] == int(_alone(trial, UNIT).sum()) > 0
    assert exact[1] < exact[0]


def test_a_rounded_weight_change_is_read_by_the_size_of_the_bin() -> None:
    protocol = FedAVG(epochs=1, batch_size=12, lr=0.01)
    trial = run_trial(_stage(protocol=protocol, dtype=torch.float32), FAST)
    alone = _alone(trial, UNIT)
    distance = _distance(_through_the_autoencoder(trial, UNIT), trial)
    assert bool(alone.any()) and float(distance[alone].max()) < 0.01
    edges = torch.linspace(0.1, 0.9, 41, dtype=torch.float64)
    latents = torch.tensor([[0.2, 0.6, 0.4], [0.9, 0.7, 0.5]], dtype=torch.float64)
    delta = torch.tensor([1.0, -2.0], dtype=torch.float64)
    fires = (latents.mean(dim=1) > edges[:, None]).double()
    read = rounded_readout((fires * delta) @ latents, edges)
    assert len(read.rows) == 2 and read.strength[0] == 1
    found = read.x[read.x.mean(dim=1).argsort()]
    assert torch.allclose(found, latents, rtol=0.05)
    direction = F.normalize(found) - F.normalize(latents)
    assert float(direction.abs().max()) < 1e-12


def test_the_artefact_is_learned_once(cache: Path) -> None:
    attack = ScaleMIA(epochs=1)
    model = nn.Sequential(Normalise(UNIT), _victim())
    images = crops(16, 64, "surrogate")
    first = attack.artefact(images, model)
    files = list(cache.iterdir())
    assert len(files) == 1
    stamp = files[0].stat().st_mtime_ns
    again = attack.artefact(images, model)
    assert files[0].stat().st_mtime_ns == stamp
    assert first.keys() == again.keys()
    assert all(torch.equal(first[n], again[n]) for n in first)
    other = attack.artefact(images, nn.Sequential(Normalise(BOX), _victim()))
    assert len(list(cache.iterdir())) == 2
    assert float(other["psnr"]) != float(first["psnr"])


def test_thresholds_follow_the_published_quantiles() -> None:
    generator = torch.Generator().manual_seed(0)
    q = 0.3 + 0.05 * torch.randn(20_000, generator=generator, dtype=torch.float64)
    for kind in ("normal", "empirical"):
        found = thresholds(q, 100, kind)
        assert len(found) == 100 and bool((found.diff() > 0).all())
        assert float(found.median()) == pytest.approx(0.3, abs=0.01)
    normal = thresholds(q, 100, "normal")
    assert float((q < normal[0]).double().mean()) == pytest.approx(0.001, abs=5e-4)
    assert float((q > normal[-1]).double().mean()) == pytest.approx(0.001, abs=5e-4)


def test_only_parameters_change() -> None:
    stage = _stage(box=BOX)
    view, records = observe(stage, FAST)
    sent = records[0].states[0]
    before = stage.view().model.state_dict()
    assert {n: t.shape for n, t in sent.items()} == {n: t.shape for n, t in before.items()}
    parts = find_parts(view.model, torch.zeros(1, 3, 16, 16).double())
    assert bool((parts.first.weight == 1 / 256).all())
    assert bool((parts.second.weight == 1 / 160).all())
    assert parts.third is not None
    assert bool(((parts.third.weight >= 0) & (parts.third.weight < 1)).all())


def test_a_decoder_reaches_every_size() -> None:
    for latent, shape in (((4, 2, 2), (3, 7, 7)), ((4, 1, 1), (1, 6, 6)), ((4, 8, 8), (3, 8, 8))):
        z = torch.rand(2, latent[0] * latent[1] * latent[2])
        assert Decoder(latent, shape)(z).shape == (2, *shape)


def test_models_without_a_place_for_bins_are_refused() -> None:
    with pytest.raises(UnsupportedModel, match="at least two linear layers"):
        run_trial(_stage(model="convnet", settings={"width": 4}), FAST)
    with pytest.raises(UnsupportedModel, match="not followed by a ReLU"):
        run_trial(_stage(model="fc", settings={**FC, "act": "tanh"}), FAST)
    with pytest.raises(UnsupportedModel, match="without bias"):
        run_trial(_stage(model="fc", settings={**FC, "bias": False}), FAST)
    with pytest.raises(NotGranted, match="SURROGATE"):
        run_trial(_stage(letter="F"), FAST)


def test_outlook_says_what_to_expect() -> None:
    attack = ScaleMIA()
    good = attack.outlook(_stage().view())
    assert good.verdict == "applicable" and "one of 160 bins" in good.reason
    assert "autoencoder" in good.reason
    assert "autoencoder" not in attack.outlook(_stage(model="fc", settings=FC).view()).reason
    steps = _stage(protocol=FedAVG(epochs=2, batch_size=4)).view()
    assert attack.outlook(steps).verdict == "unknown"
    dropping = _stage(live=_victim(dropout=0.5), protocol=FedAVG(batch_size=12)).view()
    assert "dropout" in attack.outlook(dropping).reason
    assert attack.outlook(_stage(model="convnet").view()).verdict == "hopeless"
    assert attack.outlook(_stage().view().without("surrogate")).verdict == "hopeless"


def test_the_same_from_a_saved_view(tmp_path: Path) -> None:
    view, _ = observe(_stage(box=BOX), FAST)
    same_after_saving(FAST, view, tmp_path / "conv", model=_victim().double())
    view, _ = observe(_stage(model="fc", settings=FC), FAST)
    same_after_saving(FAST, view, tmp_path / "fc")
    assert isinstance(View.load(tmp_path / "fc"), View)
