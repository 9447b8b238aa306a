"""GIAS: the two searches, what each may touch, and what each is good for."""

from __future__ import annotations

import functools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from leakatlas import data, models
from leakatlas.attacks.api import Reconstruction
from leakatlas.attacks.generative.latent import gias
from leakatlas.attacks.generative.latent.gias import GIAS
from leakatlas.bench import harness
from leakatlas.blocks import descent, matching
from leakatlas.blocks.watch import Watch
from leakatlas.data import Box, ImageSet, bundled
from leakatlas.errors import InvalidInput, NotGranted
from leakatlas.fl import FedAVG, ModelRef, Protocol, Scenario, Stage, stage
from leakatlas.models import Generator
from leakatlas.threat import Grant
from tests.attacks.case import LENET, Case
from tests.conftest import BOX, build_stage, photos, surrogate

CASE = Case(
    {"latent_steps": 2, "generator_steps": 2, "restarts": 2}, {**LENET, "size": 8}, boxed=True
)

SIZE = 16
SMALL: dict[str, dict[str, Any]] = {
    "fc": {"widths": (32,), "act": "tanh"}, "lenet": {"width": 6}, "convnet": {},
}  # fmt: skip


def _generator(seed: int = 0) -> Generator:
    """Untrained, small, and with outputs that fill the pixel range."""
    G = Generator(latent=12, size=SIZE, widths=(24, 16, 12), seed=seed)
    with torch.no_grad():
        last = G.stages[-1]
        assert isinstance(last, torch.nn.Sequential)
        last[0].weight.mul_(4)  # type: ignore[operator]  # a convolution's weight
    return G.eval().requires_grad_(False)


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
    patch.setattr(models, "pretrained", lambda name: prior)
    view, _ = harness.observe(scene, attack)
    return attack(view)


QUICK = GIAS(latent_steps=250, generator_steps=0, latent_lr=0.1, restarts=2)


# -- recovery ------------------------------------------------------------------------------------


def test_an_image_that_the_generator_can_draw_is_recovered(monkeypatch: pytest.MonkeyPatch) -> None:
    G = _generator()
    victims = _image(torch.randn(1, 12, generator=torch.Generator().manual_seed(5)), G)
    scene = _scene(victims, "fc")
    found = _run(scene, replace(QUICK, latent_steps=400, latent_lr=0.03), G, monkeypatch)
    pixels = scene.box.denormalize(found.images)
    assert _psnr(pixels, victims.images) > 35
    # Another latent of the same generator is no match: the update decided, not the prior.
    other = _image(torch.randn(1, 12, generator=torch.Generator().manual_seed(6)), G)
    assert _psnr(pixels, other.images) < 20


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


def test_the_search_without_a_gradient_signal_does_not_find_the_photo() -> None:
    """The ablation of D: the same prior, the same steps, another client's update."""
    truth, latent, _ = _photo()
    scene = _scene(replace(bundled.photos(32).subset([4]), labels=torch.tensor([0])))
    attack = GIAS(latent_steps=60, generator_steps=0, latent_lr=0.1, restarts=1)
    view, _ = harness.observe(scene, attack)
    stranger = BOX.denormalize(attack(view).images)
    assert _psnr(stranger, truth) < _psnr(BOX.denormalize(latent.images), truth) - 2


# -- what the searches touch ---------------------------------------------------------------------


def _searched() -> tuple[Generator, Tensor, Tensor, descent.Descended, list[float]]:
    G = _generator()
    generator = torch.Generator().manual_seed(1)
    z = torch.randn(2, 12, generator=generator)
    target = photos(2, SIZE).images
    history: list[float] = []

    def value(pixels: Tensor) -> descent.Value:
        D = (pixels - target).square().mean()
        history.append(float(D.detach()))
        return descent.Value(D, D)

    kept = z.clone()
    found = gias.search_generators(G, z, value, steps=15, lr=1e-2, watch=Watch())
    return G, z, kept, found, history


def test_the_second_search_leaves_latents_and_generator_bit_for_bit() -> None:
    reference = {n: p.clone() for n, p in _generator().named_parameters()}
    G, z, kept, _, _ = _searched()
    assert torch.equal(z, kept)
    assert all(torch.equal(p, reference[n]) for n, p in G.named_parameters())


def test_the_copies_part_from_each_other_and_from_the_original() -> None:
    G, _, _, found, history = _searched()
    named = dict(G.named_parameters())
    moved = {n: (stack[0] - stack[1]).abs().max() for n, stack in found.best.items()}
    assert moved.keys() == named.keys()
    assert all(float(distance) > 0 for distance in moved.values())
    assert all(not torch.equal(stack[0], named[n]) for n, stack in found.best.items())
    assert float(found.criterion) == pytest.approx(min(history))
    assert min(history) < 0.8 * history[0]


def test_the_copies_start_as_the_generator_and_draw_what_it_draws() -> None:
    G = _generator()
    z = torch.randn(3, 12, generator=torch.Generator().manual_seed(2))
    assert torch.allclose(gias.draw(G, gias.copies(G, 3), z), G(z), atol=1e-6)


def test_each_image_is_drawn_by_its_own_copy() -> None:
    first, second = _generator(0), _generator(1)
    z = torch.randn(2, 12, generator=torch.Generator().manual_seed(2))
    named = dict(second.named_parameters())
    stacks = {n: torch.stack([p, named[n]]) for n, p in first.named_parameters()}
    drawn = gias.draw(first, stacks, z)
    assert torch.allclose(drawn[:1], first(z[:1]), atol=1e-6)
    assert torch.allclose(drawn[1:], second(z[1:]), atol=1e-6)


def test_restarts_are_searched_independently_and_ranked_by_their_own_criterion() -> None:
    G = _generator()
    starts = torch.randn(3, 1, 12, generator=torch.Generator().manual_seed(3))
    target = photos(1, SIZE).images

    def value(pixels: Tensor) -> descent.Value:
        D = (pixels - target).square().mean()
        return descent.Value(D, D)

    def search(start: Tensor) -> descent.Descended:
        return gias.search_latent(G, start, value, steps=10, lr=0.1, weight=0.0, watch=Watch())

    together = search(starts)
    for r in range(3):
        alone = search(starts[r : r + 1])
        assert torch.allclose(together.best["z"][r], alone.best["z"][0], atol=1e-5)
        assert float(together.criterion[r]) == pytest.approx(float(alone.criterion), rel=1e-4)


def test_the_latent_weight_pulls_latents_to_the_origin() -> None:
    G = _generator()
    start = torch.randn(1, 1, 12, generator=torch.Generator().manual_seed(3))

    def value(pixels: Tensor) -> descent.Value:
        return descent.Value(pixels.sum() * 0, pixels.square().mean())

    found = gias.search_latent(G, start, value, steps=20, lr=0.1, weight=1.0, watch=Watch())
    assert found.last["z"].norm() < 0.5 * start.norm()


# -- labels, protocols, budgets ------------------------------------------------------------------


def test_without_the_grant_labels_are_recovered(monkeypatch: pytest.MonkeyPatch) -> None:
    attack = replace(QUICK, latent_steps=1)
    ten = tuple("0123456789")
    one = replace(photos(1, SIZE), labels=torch.tensor([7]), classes=ten)
    found = _run(_scene(one, labels=False), attack, _generator(), monkeypatch)
    assert found.labels is not None and found.labels.tolist() == [7]
    two = replace(photos(2, SIZE), labels=torch.tensor([8, 3]), classes=ten)
    found = _run(_scene(two, labels=False), attack, _generator(), monkeypatch)
    assert found.labels is not None and found.labels.tolist() == [3, 8]
    assert found.notes["labels_granted"] == 0


def test_a_weight_delta_is_matched_through_the_local_steps(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    G = _generator()
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


def test_a_short_budget_reaches_both_searches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "pretrained", lambda name: _generator())
    view, _ = harness.observe(_scene(photos(1, SIZE), "lenet"), QUICK)
    attack = GIAS(latent_steps=10**6, generator_steps=10**6, restarts=1)
    found = attack(view, watch=Watch(1.0))
    assert found.status in ("complete", "cut short")  # how many steps fit depends on the machine
    assert found.notes["matching_loss"] <= found.notes["latent_loss"]


def test_only_the_largest_tensors_count_if_so_wished(monkeypatch: pytest.MonkeyPatch) -> None:
    scene = _scene(photos(1, SIZE), "lenet")
    attack = replace(QUICK, latent_steps=3)
    every = _run(scene, attack, _generator(), monkeypatch)
    one = _run(scene, replace(attack, top=1), _generator(), monkeypatch)
    assert every.notes["matching_loss"] != one.notes["matching_loss"]


# -- pixels --------------------------------------------------------------------------------------


def test_pixels_become_model_inputs_of_the_clients_size_and_channels() -> None:
    pixels = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    unit3, unit1 = Box.unit(3), Box.unit(1)
    assert torch.equal(gias.to_model_space((3, 8, 8), BOX)(pixels), BOX.normalize(pixels))
    halved = gias.to_model_space((3, 4, 4), unit3)(pixels)
    assert torch.allclose(halved, torch.nn.functional.avg_pool2d(pixels, 2))
    grey = gias.to_model_space((1, 8, 8), unit1)(pixels)
    assert torch.allclose(grey, pixels.mean(1, keepdim=True))
    assert gias.to_model_space((3, 12, 12), unit3)(pixels).shape == (2, 3, 12, 12)
    colours = gias.to_model_space((3, 8, 8), unit3)(pixels[:, :1])
    assert torch.equal(colours, pixels[:, :1].expand(-1, 3, -1, -1))


def test_inputs_that_are_no_images_are_refused() -> None:
    with pytest.raises(InvalidInput, match=r"GIAS draws images.*\(7,\)"):
        gias.to_model_space((7,), BOX)


# -- the prior -----------------------------------------------------------------------------------


def test_the_shipped_generator_has_a_card_that_excludes_test_images() -> None:
    card = models.card(gias.SHIPPED)
    assert card.model == "generator" and "no test image" in card.split
    held_out = card.figures["held_out_psnr_db_of_searched_latent_first_64"]
    assert held_out > card.figures["held_out_psnr_db_of_mean_train_image"] + 5


def test_a_generator_is_learned_on_the_surrogate_once(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    attack = GIAS(
        latent_steps=2, generator_steps=2, restarts=1, prior="surrogate", prior_epochs=2,
        prior_latent=8,
    )  # fmt: skip
    lessons: list[int] = []
    original = gias.learn

    def counted(G: Generator, images: Tensor, **more: object) -> None:
        lessons.append(len(images))
        original(G, images, **more)  # type: ignore[arg-type]  # passed through

    monkeypatch.setattr(gias, "learn", counted)
    scene = _scene(photos(1, 8), "lenet", public=surrogate(8))
    view, _ = harness.observe(scene, attack)
    first, second = attack(view), attack(view)
    assert lessons == [32] and len(list(cache.iterdir())) == 1
    assert torch.equal(first.images, second.images)
    assert "surrogate" in first.reads
    assert "surrogate" not in replace(attack, prior="shipped")(view).reads


def test_learning_makes_latents_draw_the_surrogate_images() -> None:
    images = data.digits(8).images[:256].expand(-1, 1, -1, -1)
    G = gias.fresh_generator((1, 8, 8), 8)
    null = float((images - images.mean(0)).square().mean())
    torch.manual_seed(0)
    gias.learn(
        G, images, epochs=25, generator=torch.Generator().manual_seed(0), watch=Watch(),
        batch=32, kl_weight=0.1,
    )  # fmt: skip
    z = torch.zeros(16, 8, requires_grad=True)
    optimizer = torch.optim.Adam([z], lr=0.1)
    for _ in range(60):
        optimizer.zero_grad()
        torch.autograd.backward((G(z) - images[:16]).square().mean())
        optimizer.step()
    fitted = float((G(z.detach()) - images[:16]).square().mean().detach())
    assert fitted < 0.5 * null


def test_odd_sizes_get_a_generator_that_covers_them() -> None:
    assert gias.fresh_generator((3, 28, 28), 8).size == 32
    assert gias.fresh_generator((1, 8, 8), 8).size == 8


def test_the_terms_of_the_recipe() -> None:
    x = torch.zeros(2, 1, 2, 2, dtype=torch.float64)
    x_hat = torch.full_like(x, 0.1)
    assert float(gias.likelihood(x, x_hat)) == pytest.approx(0.5 * 4 * -4.605170185988091)
    standard = gias.divergence(torch.zeros(3, 5), torch.zeros(3, 5))
    assert float(standard) == 0
    # One unit of mean in each of five latents: 5/2 nats.
    assert float(gias.divergence(torch.ones(3, 5), torch.zeros(3, 5))) == pytest.approx(2.5)
    assert gias.one_cycle(0.0) == pytest.approx(1 / 25)
    assert gias.one_cycle(0.3) == pytest.approx(1.0)
    assert gias.one_cycle(1.0) == pytest.approx(0.0)


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
