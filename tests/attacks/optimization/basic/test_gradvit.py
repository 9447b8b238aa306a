from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from leakatlas.attacks.optimization.basic import gradvit
from leakatlas.attacks.optimization.basic.gradvit import GradViT
from leakatlas.bench import harness
from leakatlas.blocks import batchnorm, descent, matching
from leakatlas.blocks.watch import Watch
from leakatlas.fl import Stage, View, replay
from leakatlas.models import ViT, build
from leakatlas.threat import Grant, Knowledge
from tests.attacks.case import Case
from tests.conftest import build_stage, surrogate

SCENE = {"model": "vit", "settings": {"dim": 16, "depth": 1, "patch": 4, "heads": 2}}
CASE = Case({"steps": 3, "prior_epochs": 1}, SCENE)
SHORT = GradViT(steps=4, prior_epochs=1)
LABELS = frozenset({Grant.LABELS})


def stage_of(**changes: Any) -> Stage:
    return build_stage(**{**SCENE, "letter": "D", "public": surrogate(), **changes})


def seen(**changes: Any) -> tuple[View, Tensor, Tensor]:
    stage = stage_of(**changes)
    view, _ = harness.observe(stage, SHORT)
    client = stage.federation.clients[0]
    return view, client.x, client.y


# -- seams -----------------------------------------------------------------------------------------


def test_seams_see_borders_of_patches_and_nothing_else() -> None:
    constant = torch.full((2, 3, 8, 8), 0.7).double()
    assert float(gradvit.seam(constant, 4)) == 0
    inside = constant.clone()
    inside[:, :, 1:3, 1:3] += 5
    inside[:, :, 5:7, 5:7] -= 3
    assert float(gradvit.seam(inside, 4)) == 0
    smooth = torch.arange(8.0).double().expand(1, 1, 8, 8) / 8
    swapped = smooth.clone()
    swapped[..., :4, :4], swapped[..., :4, 4:] = smooth[..., :4, 4:], smooth[..., :4, :4]
    assert float(gradvit.seam(swapped, 4)) > float(gradvit.seam(smooth, 4)) > 0
    assert float(gradvit.seam(smooth, 8)) == 0


def test_a_seam_is_a_norm_for_each_border() -> None:
    x = torch.randn(2, 3, 8, 12, generator=torch.Generator().manual_seed(0)).double()
    expected = torch.zeros(2).double()
    for i in range(2):
        expected[i] += (x[i, :, 4] - x[i, :, 3]).norm()
        for c in (4, 8):
            expected[i] += (x[i, :, :, c] - x[i, :, :, c - 1]).norm()
    torch.testing.assert_close(gradvit.seam(x, 4), expected.mean(), rtol=1e-5, atol=1e-5)


# -- the schedule ----------------------------------------------------------------------------------


def test_the_network_counts_for_nothing_in_the_first_half() -> None:
    """Step for step as if it had no weight; different afterwards."""
    view, _, _ = seen(grants=LABELS)
    slopes: dict[float, list[Tensor]] = {0.2: [], 0.0: []}
    original = descent.descend

    def spy(objective: Any, start: dict[str, Tensor], **rest: Any) -> Any:
        x = start["x"].clone().requires_grad_()
        for t in (0.25, 0.5, 0.75):
            value = objective({"x": x}, torch.tensor(t, dtype=x.dtype))
            slopes[weight].append(torch.autograd.grad(value.total, x)[0])
        return original(objective, start, **rest)

    for weight in slopes:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(descent, "descend", spy)
            replace(SHORT, bn_weight=weight)(view)
    early, late = zip(*slopes.values(), strict=True), slopes[0.2][2]
    assert [torch.equal(a, b) for a, b in early] == [True, True, False]
    assert bool(late.isfinite().all())


# -- gradients of transformers ---------------------------------------------------------------------


def test_the_second_derivative_of_a_transformer_of_two_tokens() -> None:
    model = ViT(size=4, patch=4, dim=8, depth=1, heads=2, classes=3, seed=1).double()
    with torch.no_grad():
        model.positions.normal_(generator=torch.Generator().manual_seed(0))
    parameters = {n: p.detach() for n, p in model.named_parameters()}
    generator = torch.Generator().manual_seed(2)
    target = torch.rand(1, 3, 4, 4, generator=generator, dtype=torch.float64)
    y = torch.tensor([1])
    g = replay.gradient(model, parameters, {}, target, y, create_graph=False)

    def distance(x: Tensor) -> Tensor:
        return matching.squared_l2(replay.gradient(model, parameters, {}, x, y), g)

    x = torch.rand(1, 3, 4, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(distance, (x,), rtol=1e-4)


@pytest.mark.parametrize("positions", [False, True])
def test_without_positions_the_order_of_patches_cannot_be_seen(positions: bool) -> None:
    """Why positions matter: all other tensors are blind to the order unless they are learned."""
    model = ViT(size=8, patch=4, dim=8, depth=2, heads=2, classes=3, seed=1).double()
    with torch.no_grad():
        if positions:
            model.positions.normal_(generator=torch.Generator().manual_seed(0))
        else:
            model.positions.zero_()
    parameters = {n: p.detach() for n, p in model.named_parameters()}
    x = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(3)).double()
    moved = torch.cat([x[..., 4:], x[..., :4]], dim=3)
    y = torch.tensor([2])
    g, other = (
        replay.gradient(model, parameters, {}, image, y, create_graph=False) for image in (x, moved)
    )
    names = [n for n in g if n != "positions"]
    distance = float(matching.subset(matching.squared_l2, names)(other, g))
    assert (distance > 1e-8) if positions else (distance < 1e-20)


# -- the prior, labels, needs ----------------------------------------------------------------------


def test_the_network_is_learned_on_public_images_and_shipped_at_32_pixels() -> None:
    view, x, _ = seen()
    like = next(iter(view.update.tensors.values()))
    learned = SHORT.bn_prior(view, like, Watch())
    assert float(learned(x)) > 0
    assert float(replace(SHORT, bn_weight=0.0).bn_prior(view, like, Watch())(x)) == 0
    shipped = replace(SHORT, prior="shipped")
    assert shipped.outlook(view).verdict == "hopeless"
    assert SHORT.outlook(view).verdict == "unknown"
    assert shipped.knowledge() == Knowledge.UPDATES | Knowledge.BASIC
    large, natural, _ = seen(size=32, public=None)
    penalty = shipped.bn_prior(large, like, Watch())
    noise = torch.randn(natural.shape, generator=torch.Generator().manual_seed(0)).double()
    assert float(penalty(natural)) < float(penalty(noise))


def test_learning_lowers_the_loss_and_moves_the_statistics() -> None:
    images = surrogate()
    network = gradvit.fresh_network(images)
    before = batchnorm.running_statistics(network)
    losses = []
    for epochs in (1, 30):
        gradvit.learn(network, images, epochs=epochs, generator=torch.Generator().manual_seed(0),
                      watch=Watch())  # fmt: skip
        with torch.no_grad():
            logits = network(images.images)
        losses.append(float(nn.functional.cross_entropy(logits, images.labels)))
    assert losses[1] < losses[0]
    after = batchnorm.running_statistics(network)
    assert not torch.equal(next(iter(before.values()))[0], next(iter(after.values()))[0])


def test_labels_are_the_smallest_bias_gradients() -> None:
    for seed in range(3):
        view, _, y = seen(examples=3, settings={**SCENE["settings"], "seed": seed})  # type: ignore[dict-item]  # a dict of settings
        assert SHORT.read_labels(view).tolist() == sorted(y.tolist())
    granted, _, y = seen(grants=LABELS)
    assert torch.equal(SHORT.read_labels(granted), y)


def test_a_network_without_patches_is_no_transformer() -> None:
    view, _, _ = seen(model="lenet", settings={"width": 4})
    assert SHORT.outlook(view).verdict == "hopeless"
    assert SHORT(view).status == "failed"
    assert gradvit.patch_side(build("vit", size=8, patch=2)) == 2
    assert replace(SHORT, patch=4, bn_weight=0.0)(view).status == "complete"


def test_it_descends_and_the_seams_close() -> None:
    view, _, _ = seen(grants=LABELS)
    attack = GradViT.tuned()
    begun, found = (replace(attack, steps=steps)(view).notes for steps in (1, 80))
    assert found["matching_loss"] < 0.5 * begun["matching_loss"]
    heavy = replace(attack, steps=80, aux_weight=0.03)
    closed = heavy(view).notes["seams"]
    assert closed < replace(heavy, seams=False)(view).notes["seams"]
