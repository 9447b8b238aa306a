from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from leakatlas.attacks.analytic.isolation.seer import (
    SEER,
    best_threshold,
    decoded,
    in_own_batch,
    kept_entries,
    of_picked,
    schedule,
    seeing_the_batch,
    weighted_gradients,
)
from leakatlas.bench.harness import observe, run_trial
from leakatlas.errors import InvalidInput, NotGranted
from leakatlas.fl import FedAVG, FedSGD, Stage
from leakatlas.models import build
from leakatlas.threat import Vantage
from tests.attacks.analytic.support import crops, same_after_saving, small_stage
from tests.attacks.case import Case
from tests.conftest import BOX

CASE = Case(
    {"steps": 2, "batches": 2, "entries": 50},
    {"model": "convnet-bn", "settings": {"width": 2}},
    boxed=True,
)

SHORT = SEER(steps=120, batches=4, lr=3e-3, entries=300, batch_size=4)


@pytest.fixture(autouse=True, scope="module")
def shared_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Model and decoder are learned once for the whole file."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LEAKATLAS_CACHE", str(tmp_path_factory.mktemp("artefacts")))
        yield


def _stage(**settings: Any) -> Stage:
    chosen = {
        "letter": "G", "model": "convnet-bn", "settings": {"width": 2}, "size": 8, "examples": 4,
        "box": BOX, "dtype": torch.float32, "protocol": FedSGD(mode="train"), **settings,
    }  # fmt: skip
    return small_stage(**chosen)


def _batches(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    images = crops(8, 256, "surrogate")
    chosen = torch.randint(len(images), (count, 4), generator=generator)
    return images.images[chosen], images.labels[chosen]


def _learned(attack: SEER) -> tuple[nn.Module, dict[str, Tensor]]:
    """The model that was sent and the server's secrets."""
    view, _ = observe(_stage(), attack)
    return view.model, dict(view.key)


def _sum(model: nn.Module, x: Tensor, y: Tensor, weight: Tensor) -> dict[str, Tensor]:
    model = seeing_the_batch(model)
    found = weighted_gradients(model, dict(model.named_parameters()), BOX.normalize(x), y, weight)
    return {f"1.{n}": g.detach() for n, g in found.items()}


def test_gradients_of_many_batches_are_those_of_each() -> None:
    model = build("convnet-bn", size=8, width=2, classes=10)
    x, y = _batches(3, torch.Generator().manual_seed(0))
    weight = torch.rand(3, 4)
    copied = seeing_the_batch(model)
    together = weighted_gradients(copied, dict(copied.named_parameters()), x, y, weight)
    model.train()
    named = dict(model.named_parameters())
    for k in range(3):
        loss = (F.cross_entropy(model(x[k]), y[k], reduction="none") * weight[k]).sum()
        own = dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))
        for name in named:
            assert torch.allclose(together[name][k], own[name], atol=1e-5)


def test_training_follows_how_the_batch_statistics_move() -> None:
    """The gradient in the weights of a decoded gradient, against finite differences."""
    model = seeing_the_batch(build("convnet-bn", size=8, width=2, classes=10)).double()
    x, y = _batches(2, torch.Generator().manual_seed(0))
    weight = torch.rand(2, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    theta = {n: p.detach().requires_grad_() for n, p in model.named_parameters()}

    def decoded_square(theta: dict[str, Tensor]) -> Tensor:
        found = weighted_gradients(model, theta, x.double(), y, weight)
        return torch.stack([g.square().sum() for g in found.values()]).sum()

    slopes = torch.autograd.grad(decoded_square(theta), list(theta.values()))
    generator = torch.Generator().manual_seed(2)
    along = [torch.randn(g.shape, generator=generator, dtype=torch.float64) for g in slopes]
    step = 1e-6
    ends = [
        decoded_square(
            {n: p + side * step * d for (n, p), d in zip(theta.items(), along, strict=True)}
        )
        for side in (1, -1)
    ]
    measured = float(ends[0].detach() - ends[1].detach()) / (2 * step)
    assert measured == pytest.approx(
        float(sum((g * d).sum() for g, d in zip(slopes, along, strict=True))), rel=1e-5
    )


def test_the_picked_image_is_the_extreme_of_its_own_batch() -> None:
    x = torch.rand(5, 4, 3, 8, 8)
    bright, dark = SHORT.picked(x), replace(SHORT, property="dark").picked(x)
    means = x.flatten(2).mean(dim=2)
    assert torch.equal(bright.argmax(dim=1), means.argmax(dim=1))
    assert torch.equal(dark.argmax(dim=1), means.argmin(dim=1))
    assert torch.equal(of_picked(x, bright)[2], x[2, int(means[2].argmax())].flatten())


def test_the_decoder_is_linear_and_no_gradient_gives_its_constant() -> None:
    _, key = _learned(SHORT)
    shapes = {n.removeprefix("index/"): t for n, t in key.items() if n.startswith("index/")}
    generator = torch.Generator().manual_seed(0)
    sizes = {n: 1 + int(index.max()) for n, index in shapes.items()}
    g, h = (
        {n: torch.randn(1, size, generator=generator) for n, size in sizes.items()}
        for _ in range(2)
    )
    nothing = decoded({n: torch.zeros(1, size) for n, size in sizes.items()}, key)
    assert torch.equal(nothing[0], key["b"])
    both = decoded({n: g[n] + h[n] for n in g}, key) - nothing
    apart = decoded(g, key) - nothing + decoded(h, key) - nothing
    assert torch.allclose(both, apart, atol=1e-4)


def test_the_schedule_is_the_published_one() -> None:
    assert schedule(0.0, 64) == 0.25
    assert schedule(0.25, 64) == 4.0
    assert schedule(0.5, 64) == schedule(1.0, 64) == 64.0


def test_the_attack_is_the_decoder_on_the_clients_gradient() -> None:
    stage = _stage()
    trial = run_trial(stage, SHORT)
    x, y = trial.truth.images[None], trial.truth.labels[None]
    summed = _sum(trial.records[0].received[0], x, y, torch.ones(1, 4))
    expected = decoded(summed, dict(trial.view.key)).clamp(0, 1).reshape(1, 3, 8, 8)
    assert torch.allclose(trial.images, expected, atol=1e-4)
    assert len(trial.images) == 1


def test_a_weight_change_of_one_step_reads_the_same() -> None:
    gradient = run_trial(_stage(), SHORT)
    change = run_trial(_stage(protocol=FedAVG(epochs=1, batch_size=4, lr=0.1)), SHORT)
    assert torch.allclose(gradient.images, change.images, atol=1e-2)


# -- the form for a sum over clients ---------------------------------------------------------------

SUMMED = replace(SHORT, form="thresh")


def test_batches_normalise_their_own_measurements() -> None:
    measured = torch.tensor([[1.0, 2.0, 3.0, 6.0], [5.0, 5.0, 5.0, 5.0]])
    p = in_own_batch(measured)
    assert torch.allclose(p[0], torch.tensor([-2.0, -1.0, 0.0, 3.0]) / 3.5**0.5, atol=1e-5)
    assert torch.equal(p[1], torch.zeros(4))
    assert torch.allclose(in_own_batch(7 * measured[:1] + 3), p[:1], atol=1e-5)


@pytest.mark.parametrize("clients", [1, 4, 16])
def test_the_threshold_maximises_the_chance_that_exactly_one_image_passes(clients: int) -> None:
    """Uniform measurements: F1 = t^B, F2 = t^B + B t^(B-1) (1 - t), in closed form."""
    size = 4
    generator = torch.Generator().manual_seed(0)
    p = torch.rand(40_000, size, generator=generator, dtype=torch.float64)
    t = torch.linspace(0.001, 0.999, 5_000, dtype=torch.float64)
    f1 = t**size
    f2 = f1 + size * t ** (size - 1) * (1 - t)
    chance = (f2 - f1) * f1 ** (clients - 1)
    found = best_threshold(p, clients)
    at = chance[int((t - found).abs().argmin())]
    assert float(at) == pytest.approx(float(chance.max()), rel=0.01)
    # as the formula says, over a real cohort: one client passes with one image, the others pass not
    top = p.topk(2, dim=1).values
    rounds = top[: 40_000 // clients * clients].unflatten(0, (-1, clients))
    exactly = ((rounds[..., 0] > found).sum(1) == 1) & ((rounds[..., 1] > found).sum(1) == 0)
    assert float(exactly.double().mean()) == pytest.approx(clients * float(at), abs=0.02)


def test_half_of_the_training_batches_hold_one_image_that_passes() -> None:
    images = crops(8, 256, "surrogate")
    attack = replace(SUMMED, clients=3)
    generator = torch.Generator().manual_seed(0)
    tau = attack.threshold(images, generator)
    chosen = attack.batches_of(attack.measured(images), 9, tau, generator)
    assert all(len(batch.unique()) == 4 for batch in chosen)
    positive = attack.picked(images.images[chosen], tau)
    assert positive.sum(dim=1).tolist() == [1.0] * 5 + [0.0] * 4
    with pytest.raises(InvalidInput, match="too few have none or one"):
        attack.batches_of(attack.measured(images), 4, 50.0, generator)


def test_the_sum_over_clients_is_decoded_and_beats_the_constant_where_one_image_passes() -> None:
    """Rounds of three clients: the sum of their gradients, as secure aggregation opens it."""
    stage = _stage(clients=3, vantage=Vantage.AGGREGATE)
    view, _ = observe(stage, SUMMED)
    model, key = view.model, dict(view.key)
    x, y = _batches(3 * 64, torch.Generator().manual_seed(5))
    p = in_own_batch(x.flatten(2).mean(dim=2))
    own = decoded(_sum(model, x, y, torch.ones(192, 4)), key) - key["b"]
    rounds = own.unflatten(0, (64, 3)).sum(dim=1) + key["b"]
    passing = (p > key["threshold"]).unflatten(0, (64, 3)).flatten(1)
    one = passing.sum(dim=1) == 1
    assert 5 < int(one.sum()) < 64
    wanted = x.unflatten(0, (64, 3)).flatten(1, 2).flatten(2)[one, passing[one].int().argmax(dim=1)]
    error = (rounds[one] - wanted).square().mean()
    assert float(error) < 0.95 * float((key["b"] - wanted).square().mean())
    trial = run_trial(stage, SUMMED)
    batches = [(stage.victims[c].images[None], stage.victims[c].labels[None]) for c in range(3)]
    summed = [_sum(model, *batch, torch.ones(1, 4)) for batch in batches]
    total = {n: torch.stack([part[n] for part in summed]).sum(dim=0) for n in summed[0]}
    expected = decoded(total, key).clamp(0, 1).reshape(1, 3, 8, 8)
    assert torch.allclose(trial.images, expected, atol=1e-4)
    assert trial.found.notes["threshold"] == pytest.approx(float(key["threshold"]))
    assert SUMMED.outlook(view).verdict == "unknown"


def _fidelity(attack: SEER) -> tuple[float, float, float]:
    """On 64 batches: errors of the read-out and of r(0), and what the others add to it."""
    model, key = _learned(attack)
    x, y = _batches(64, torch.Generator().manual_seed(5))
    positive = attack.picked(x)
    truth = of_picked(x, positive)
    everything = decoded(_sum(model, x, y, torch.ones(64, 4)), key)
    others = decoded(_sum(model, x, y, 1 - positive), key) - key["b"]
    return (
        float((everything - truth).square().mean()),
        float((key["b"] - truth).square().mean()),
        float(others.square().mean()),
    )


def test_it_reads_more_than_the_constant_and_says_how_much() -> None:
    error, constant, _ = _fidelity(SHORT)
    assert error < 0.9 * constant
    notes = run_trial(_stage(), SHORT).found.notes
    assert notes["public_psnr"] > notes["null_psnr"]


def test_without_the_negative_term_the_others_come_through() -> None:
    with_term, without = _fidelity(SHORT), _fidelity(replace(SHORT, negatives=0.0))
    assert without[2] > 3 * with_term[2]
    assert without[0] > 1.2 * with_term[0]


def test_the_picked_image_moves_the_output_and_the_others_hardly_do() -> None:
    model, key = _learned(SHORT)
    x, y = _batches(32, torch.Generator().manual_seed(7))
    positive = SHORT.picked(x)
    ones = torch.ones(32, 4)
    whole = decoded(_sum(model, x, y, ones), key)
    without_it = decoded(_sum(model, x, y, 1 - positive), key)
    least = F.one_hot(x.flatten(2).mean(dim=2).argmin(dim=1), 4).float()
    without_other = decoded(_sum(model, x, y, 1 - least), key)
    moved = float((whole - without_it).norm()) / float((whole - without_other).norm())
    assert moved > 2


def test_kept_entries_are_a_fixed_secret_subset() -> None:
    _, key = _learned(SHORT)
    index = {n: t for n, t in key.items() if n.startswith("index/")}
    for kept in index.values():
        assert len(kept) == len(kept.unique()) <= 300
    gradients = {n.removeprefix("index/"): torch.arange(3_000.0)[None] for n in index}
    chosen = {n.removeprefix("index/"): t for n, t in index.items()}
    backwards = dict(reversed(list(chosen.items())))
    assert torch.equal(kept_entries(gradients, chosen), kept_entries(gradients, backwards))
    assert SEER().kept(5_000) == 5_000 and SEER().kept(20_000_000) == 20_000


def test_only_parameters_and_statistics_change() -> None:
    stage = _stage()
    _, records = observe(stage, SHORT)
    before = stage.view().model.state_dict()
    assert {n: t.shape for n, t in records[0].states[0].items()} == {
        n: t.shape for n, t in before.items()
    }


def test_too_few_public_images_and_weak_letters_are_refused() -> None:
    with pytest.raises(InvalidInput, match="batches of that many"):
        run_trial(_stage(), replace(SHORT, batch_size=500))
    with pytest.raises(NotGranted, match="SURROGATE"):
        run_trial(_stage(letter="F"), SHORT)


def test_outlook_knows_what_it_rests_on() -> None:
    attack = SEER()
    assert attack.outlook(_stage().view()).verdict == "applicable"
    assert "eval mode" in attack.outlook(_stage(protocol=FedSGD()).view()).reason
    plain = _stage(model="convnet").view()
    assert "batch normalisation" in attack.outlook(plain).reason
    several = _stage(clients=2, vantage=Vantage.AGGREGATE).view()
    assert attack.outlook(several).verdict == "hopeless"
    steps = _stage(protocol=FedAVG(epochs=2, batch_size=2)).view()
    assert "local step" in attack.outlook(steps).reason
    assert attack.outlook(_stage().view().without("surrogate")).verdict == "hopeless"


def test_the_same_from_a_saved_view(tmp_path: Path) -> None:
    view, _ = observe(_stage(), SHORT)
    same_after_saving(SHORT, view, tmp_path)
