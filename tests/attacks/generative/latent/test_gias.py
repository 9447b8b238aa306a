"""GIAS: the two searches, what each may touch, and what each is good for."""

from __future__ import annotations

import functools
import itertools
import json
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from leakatlas import models
from leakatlas.attacks.api import Reconstruction
from leakatlas.attacks.generative import prior as chosen
from leakatlas.attacks.generative.latent import gias
from leakatlas.attacks.generative.latent.gias import GIAS
from leakatlas.bench import harness
from leakatlas.blocks import latent as searches
from leakatlas.blocks import matching, watch
from leakatlas.blocks.watch import Watch
from leakatlas.data import ImageSet, bundled
from leakatlas.errors import InvalidParameter, NotGranted
from leakatlas.fl import FedAVG, ModelRef, Protocol, Scenario, Stage, stage
from leakatlas.models import Generator
from leakatlas.priors import CEILING
from leakatlas.threat import Grant
from tests.attacks.case import LENET, Case
from tests.conftest import BOX, build_stage, photos, surrogate
from tests.priors.support import SIZE, generator, held, prior

CASE = Case(
    {"latent_steps": 2, "generator_steps": 2, "restarts": 2, "prior_steps": 3, "prior_latent": 8},
    {**LENET, "size": 8},
    boxed=True,
)

SMALL: dict[str, dict[str, Any]] = {
    "fc": {"widths": (32,), "act": "tanh"}, "lenet": {"width": 6}, "convnet": {},
}  # fmt: skip


def _image(z: Tensor, G: Generator) -> ImageSet:
    with torch.no_grad():
        pixels = G(z)
    return ImageSet(pixels, torch.arange(len(z)), tuple("0123456789"), "drawn")


def _scene(
    victims: ImageSet,
    model: str = "convnet",
    *,
    protocol: Protocol | None = None,
    labels: bool = True,
    public: ImageSet | None = None,
) -> Stage:
    scenario = Scenario(
        model=ModelRef("builtin", model, {"size": victims.size, "classes": 10, **SMALL[model]}),
        letter="D",
        grants=frozenset({Grant.LABELS}) if labels else frozenset(),
        **({"protocol": protocol} if protocol else {}),  # type: ignore[arg-type]  # one key
    )
    return stage(scenario, victims=victims, box=BOX, surrogate=public)


def _psnr(images: Tensor, truth: Tensor) -> float:
    error = (images.clamp(0, 1) - truth).square().flatten(1).mean(1)
    return float(-10 * error.log10().mean())


def _run(scene: Stage, attack: GIAS, prior: Generator, patch: pytest.MonkeyPatch) -> Reconstruction:
    held(prior, patch)
    view, _ = harness.observe(scene, replace(attack, prior="held"))
    return replace(attack, prior="held")(view)


QUICK = GIAS(latent_steps=250, generator_steps=0, latent_lr=0.1, restarts=2)


# -- recovery ------------------------------------------------------------------------------------


def test_an_image_that_the_generator_can_draw_is_recovered(monkeypatch: pytest.MonkeyPatch) -> None:
    G = generator()
    victims = _image(torch.randn(1, 12, generator=torch.Generator().manual_seed(5)), G)
    scene = _scene(victims, "fc")
    found = _run(scene, replace(QUICK, latent_steps=400, latent_lr=0.03), G, monkeypatch)
    pixels = scene.box.denormalize(found.images)
    assert _psnr(pixels, victims.images) > 35
    # Another latent of the same generator is no match: the update decided, not the prior.
    other = _image(torch.randn(1, 12, generator=torch.Generator().manual_seed(6)), G)
    assert _psnr(pixels, other.images) < 20


def test_the_mean_picture_is_that_of_all_restarts_and_is_judged_itself(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    G = generator()
    victims = _image(torch.randn(1, 12, generator=torch.Generator().manual_seed(5)), G)
    scene = _scene(victims, "fc")
    kept: list[tuple[Tensor, Tensor]] = []
    search = searches.search_latent

    def noted(*given: Any, **settings: Any) -> Any:
        found = search(*given, **settings)
        kept.append((given[1], found.best["z"]))
        return found

    monkeypatch.setattr(searches, "search_latent", noted)
    near = replace(QUICK, latent_steps=20, restarts=3, spread=0.1, average=True)
    found = _run(scene, near, G, monkeypatch)
    [(start, best)] = kept
    assert start.shape[0] == 3 and float(start.std()) == pytest.approx(0.1, rel=0.4)
    with torch.no_grad():
        mean = torch.stack([G(z) for z in best]).mean(0)
    torch.testing.assert_close(scene.box.denormalize(found.images), mean, atol=1e-6, rtol=0)
    _run(scene, replace(near, average=False), G, monkeypatch)
    assert torch.equal(kept[1][1], best)
    view, _ = harness.observe(scene, near)
    g = dict(view.update.tensors)
    D = matching.cosine(view.replayer(round=-1)(found.images, victims.labels), g).detach()
    assert found.confidence is not None
    assert found.notes["matching_loss"] == pytest.approx(float(D), abs=1e-6)
    assert found.notes["matching_loss"] > found.notes["latent_loss"]


def test_a_mean_picture_leaves_no_room_for_a_generator_search() -> None:
    with pytest.raises(InvalidParameter, match="set generator_steps=0"):
        GIAS(average=True)
    assert GIAS.variants()["mean"].lasting(300).generator_steps == 0


@functools.cache
def _photo() -> tuple[Tensor, Reconstruction, Reconstruction]:
    """A real photo that the shipped generator never saw, with and without the second search."""
    victims = bundled.photos(32).subset([0])
    scene = _scene(victims)
    both = GIAS(latent_steps=60, generator_steps=120, latent_lr=0.1, restarts=1)
    view, _ = harness.observe(scene, both)
    return victims.images, replace(both, generator_steps=0)(view), both(view)


def test_the_generator_search_gains_what_the_latent_search_cannot_reach() -> None:
    truth, latent, both = _photo()
    latent_only, after = (_psnr(BOX.denormalize(r.images), truth) for r in (latent, both))
    assert after > latent_only + 4
    # The null baseline: the middle of the surrogate distribution, without any update.
    mean = surrogate(32).images.mean(0, keepdim=True)
    assert latent_only > _psnr(mean, truth)


def test_the_matching_loss_never_rises_from_one_search_to_the_next() -> None:
    _, latent, both = _photo()
    assert both.notes["latent_loss"] == latent.notes["matching_loss"]
    assert both.notes["matching_loss"] < both.notes["latent_loss"]
    assert both.confidence is not None
    assert both.confidence.tolist() == [-both.notes["matching_loss"]]


def test_the_second_search_leaves_the_latents_alone_and_gives_every_image_its_own_weights(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    G = generator()
    held(G, monkeypatch)
    before = {n: p.clone() for n, p in G.named_parameters()}
    chosen_z: list[Tensor] = []
    kept_z: list[Tensor] = []
    search, draw = searches.search_latent, searches.drawn

    def first(*arguments: Any, **options: Any) -> Any:
        found = search(*arguments, **options)
        chosen_z.append(found.best["z"][int(found.criterion.argmin())].clone())
        return found

    def last(network: Any, weights: Any, inputs: tuple[Tensor, ...]) -> Tensor:
        kept_z.append(inputs[0])
        return draw(network, weights, inputs)

    monkeypatch.setattr(searches, "search_latent", first)
    monkeypatch.setattr(searches, "drawn", last)
    two = replace(QUICK, latent_steps=5, generator_steps=10, prior="held")
    view, _ = harness.observe(_scene(photos(2, SIZE), "fc"), two)
    met = two.attack_round(view, -1, prior(G), torch.Generator().manual_seed(0), Watch())
    assert torch.equal(kept_z[-1], chosen_z[0])
    assert met.found.notes["matching_loss"] < met.found.notes["latent_loss"]
    assert all(torch.equal(before[n], p) for n, p in G.named_parameters())
    own = met.weights["stages.0.0.weight"]
    assert len(own) == 2 and not torch.equal(own[0], own[1])
    assert not torch.equal(own[0], before["stages.0.0.weight"])


def test_the_search_without_a_gradient_signal_does_not_find_the_photo() -> None:
    """The ablation of D: the same prior, the same steps, another client's update."""
    truth, latent, _ = _photo()
    scene = _scene(replace(bundled.photos(32).subset([4]), labels=torch.tensor([0])))
    attack = GIAS(latent_steps=60, generator_steps=0, latent_lr=0.1, restarts=1)
    view, _ = harness.observe(scene, attack)
    stranger = BOX.denormalize(attack(view).images)
    assert _psnr(stranger, truth) < _psnr(BOX.denormalize(latent.images), truth) - 2


# -- labels, protocols, budgets ------------------------------------------------------------------


def test_without_the_grant_labels_are_recovered(monkeypatch: pytest.MonkeyPatch) -> None:
    attack = replace(QUICK, latent_steps=1)
    ten = tuple("0123456789")
    one = replace(photos(1, SIZE), labels=torch.tensor([7]), classes=ten)
    found = _run(_scene(one, labels=False), attack, generator(), monkeypatch)
    assert found.labels is not None and found.labels.tolist() == [7]
    two = replace(photos(2, SIZE), labels=torch.tensor([8, 3]), classes=ten)
    found = _run(_scene(two, labels=False), attack, generator(), monkeypatch)
    assert found.labels is not None and found.labels.tolist() == [3, 8]
    assert found.notes["labels_granted"] == 0


def test_a_weight_delta_is_matched_through_the_local_steps(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    G = generator()
    victims = _image(torch.randn(1, 12, generator=torch.Generator().manual_seed(5)), G)
    protocol = FedAVG(epochs=3, batch_size=1, lr=0.05)
    scene = _scene(victims, "fc", protocol=protocol)
    attack = replace(QUICK, restarts=1)
    start = _run(scene, replace(attack, latent_steps=1), G, monkeypatch)
    found = _run(scene, replace(attack, latent_steps=150), G, monkeypatch)
    assert found.notes["matching_loss"] < 0.1 * start.notes["matching_loss"]
    assert _psnr(scene.box.denormalize(found.images), victims.images) > 18
    assert "protocol" in found.reads


def test_a_zero_update_has_no_direction(monkeypatch: pytest.MonkeyPatch) -> None:
    scene = _scene(photos(1, SIZE))
    view, _ = harness.observe(scene, QUICK)
    seen = view.rounds[0]
    assert seen.update is not None
    zero = seen.update.with_tensors({n: 0 * t for n, t in seen.update.tensors.items()})
    found = QUICK(view.with_rounds([replace(seen, update=zero)], {}))
    assert found.status == "failed" and "no direction" in found.reason
    assert found.images.shape == (0, 3, SIZE, SIZE)


def test_a_clipped_update_is_matched_as_well_as_a_free_one() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = ({"w": torch.randn(5, generator=generator)} for _ in range(2))
    clipped = {n: 0.01 * t for n, t in b.items()}
    assert torch.allclose(matching.cosine(a, b), matching.cosine(a, clipped), atol=1e-6)


@pytest.fixture
def paced(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that moves ten milliseconds whenever a budget looks at it, on any machine."""
    ticks = itertools.count()
    clock = SimpleNamespace(perf_counter=lambda: 0.01 * next(ticks), process_time=lambda: 0.0)
    monkeypatch.setattr(watch, "time", clock)


@pytest.mark.usefixtures("paced")
def test_a_short_budget_reaches_both_searches_and_the_second_helps(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    held(generator(), monkeypatch)
    view, _ = harness.observe(_scene(photos(1, SIZE), "lenet"), QUICK)
    both = GIAS(latent_steps=10**6, generator_steps=10**6, restarts=1, prior="held")
    found = both(view, watch=Watch(1.0))
    assert found.status == "cut short" and 20 < found.notes["iterations"] < 100
    assert found.notes["matching_loss"] < 0.5 * found.notes["latent_loss"]
    # The same budget for the first search alone does not get there.
    alone = replace(both, generator_steps=0)(view, watch=Watch(1.0))
    assert found.notes["matching_loss"] < 0.5 * alone.notes["matching_loss"]


def test_only_the_largest_tensors_count_if_so_wished(monkeypatch: pytest.MonkeyPatch) -> None:
    scene = _scene(photos(1, SIZE), "lenet")
    attack = replace(QUICK, latent_steps=3)
    every = _run(scene, attack, generator(), monkeypatch)
    one = _run(scene, replace(attack, top=1), generator(), monkeypatch)
    assert every.notes["matching_loss"] != one.notes["matching_loss"]


# -- the prior -----------------------------------------------------------------------------------


def test_the_shipped_generator_has_a_card_that_excludes_test_images() -> None:
    card = models.card(chosen.SHIPPED[(3, 32, 32)])
    assert card.model == "generator" and "no test image" in card.split
    assert card.figures[CEILING] > card.figures["held_out_psnr_db_of_mean_train_image"] + 5


def test_the_default_is_the_published_row() -> None:
    published = GIAS()
    assert (published.latent_steps, published.generator_steps) == (500, 5_000)
    assert (published.latent_lr, published.generator_lr) == (3e-2, 1e-3)
    assert (published.tv_weight, published.restarts, published.top) == (1e-6, 3, None)
    assert json.loads(json.dumps(GIAS.tuned().to_json())) == GIAS.tuned().to_json()


def test_a_letter_without_surrogate_data_is_refused() -> None:
    view, _ = harness.observe(build_stage(letter="C"), QUICK)
    with pytest.raises(NotGranted, match="GIAS needs SURROGATE"):
        QUICK(view)


# -- learned from rounds -------------------------------------------------------------------------


def test_a_reptile_step_goes_towards_the_copies() -> None:
    network = torch.nn.Linear(2, 1, bias=False)
    with torch.no_grad():
        network.weight.copy_(torch.tensor([[1.0, 0.0]]))
    copies = {"weight": torch.tensor([[[3.0, 0.0]], [[5.0, -2.0]]])}
    gias.reptile(network, copies, torch.optim.SGD(network.parameters(), lr=0.25))
    # 2 (2 w - sum of copies) = (-12, 4), a quarter of it back: the mean of the copies.
    assert network.weight.tolist() == [[4.0, -1.0]]


def test_the_meta_learned_prior_needs_rounds_and_no_public_image() -> None:
    attack = GIAS(
        prior="meta", latent_steps=6, generator_steps=12, restarts=1, prior_latent=8, meta_lr=1e-3
    )
    scene = build_stage(
        model="lenet", examples=1, letter="B", rounds=3, dtype=torch.float32, public=None
    )
    view, _ = harness.observe(scene, attack)
    assert len(view.rounds) == 3 and "3 rounds" in attack.outlook(view).reason
    found = attack(view)
    assert "surrogate" not in found.reads and "labels" not in found.reads
    assert found.notes["matching_loss"] <= found.notes["latent_loss"]
    only = view.with_rounds(view.rounds[-1:], {})
    assert not torch.equal(attack(only).images, found.images)  # earlier rounds taught something
