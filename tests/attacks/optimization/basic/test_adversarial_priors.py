from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from leakatlas.attacks.optimization.basic import adversarial_priors
from leakatlas.attacks.optimization.basic.adversarial_priors import AdversarialPriors, gram
from leakatlas.attacks.optimization.basic.inverting_gradients import InvertingGradients
from leakatlas.bench import harness
from leakatlas.blocks.watch import Watch
from leakatlas.fl import Stage, View
from leakatlas.models import build
from leakatlas.threat import Grant, Knowledge
from tests.attacks.case import Case
from tests.conftest import build_stage, photos, surrogate

SCENE = {"model": "convnet", "settings": {"width": 4}}
CASE = Case({"steps": 3, "images": 2}, SCENE, boxed=True)
SHORT = AdversarialPriors(steps=3, images=2)
LABELS = frozenset({Grant.LABELS})


def stage_of(**changes: Any) -> Stage:
    return build_stage(
        **{**SCENE, "letter": "D", "grants": LABELS, "public": surrogate(), **changes}
    )


def seen(**changes: Any) -> tuple[View, Tensor, Tensor]:
    stage = stage_of(**changes)
    view, _ = harness.observe(stage, SHORT)
    client = stage.federation.clients[0]
    return view, client.x, client.y


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_without_priors_it_is_inverting_gradients_step_for_step() -> None:
    bare = replace(SHORT, style_weight=0.0, feature_weight=0.0, tv_weight=1e-2)
    assert bare.knowledge() == Knowledge.UPDATES | Knowledge.BASIC
    view, _, _ = seen()
    images = [
        attack.run(view, generator=torch.Generator().manual_seed(0), watch=Watch()).images
        for attack in (bare, InvertingGradients(steps=3, tv_weight=1e-2))
    ]
    assert torch.equal(*images)


def test_both_terms_vanish_at_a_single_prior() -> None:
    """And so at the truth, were that the prior."""
    view, x, _ = seen(examples=1)
    for aligned in (True, False):
        attack = AdversarialPriors(style_weight=1.0, feature_weight=1.0, aligned=aligned)
        penalty = attack.penalty(view, x[:, None])
        assert penalty is not None
        assert float(penalty(x).detach()) == 0.0
        assert float(penalty(x + 0.1).detach()) > 1e-12


def test_style_is_blind_to_places_and_features_are_not() -> None:
    a = noise(2, 5, 4, 4)
    moved = a.flatten(2)[:, :, torch.randperm(16, generator=torch.Generator().manual_seed(1))]
    torch.testing.assert_close(gram(moved.reshape(a.shape)), gram(a))
    aligned, means = AdversarialPriors(aligned=True), AdversarialPriors(aligned=False)
    assert not torch.allclose(aligned.features(moved.reshape(a.shape)), aligned.features(a))
    torch.testing.assert_close(means.features(moved.reshape(a.shape)), means.features(a))
    expected = a[0].flatten(1) @ a[0].flatten(1).T / (5 * 16)
    torch.testing.assert_close(gram(a)[0], expected)


def test_the_slope_of_both_terms() -> None:
    """Finite differences, on the smooth activations of LeNet."""
    view, x, _ = seen(model="lenet", settings={"width": 2}, examples=1)
    attack = AdversarialPriors(style_weight=1.0, feature_weight=1.0)
    penalty = attack.penalty(view, (x + 0.3)[:, None])
    assert penalty is not None
    assert torch.autograd.gradcheck(penalty, (x.clone().requires_grad_(),))


def test_layers_are_the_first_of_every_resolution_and_the_last() -> None:
    style, last = adversarial_priors.read_layers(build("vgg11", size=32), (3, 32, 32))
    assert len(style) > 2 and last not in style[:-1]
    style, last = adversarial_priors.read_layers(build("fc", size=8, widths=(16, 12)), (3, 8, 8))
    assert len(style) == 2 and last == style[-1]
    style, last = adversarial_priors.read_layers(build("lenet", size=8), (3, 8, 8))
    assert last


def test_priors_are_of_the_examples_class_and_else_what_the_network_takes_for_it() -> None:
    view, _, _ = seen()
    public = view.surrogate
    y = public.labels[:2]
    attack = AdversarialPriors(images=2)
    like = next(iter(view.update.tensors.values()))
    for number, held in enumerate(attack.chosen(view, y, like)):
        own = view.box.normalize(public.images[public.labels == y[number]].to(like))
        expected = min(2, len(own))
        hits = [any(torch.equal(p, image) for image in own) for p in held]
        assert sum(hits) == expected
    absent = next(c for c in range(view.classes) if not bool((public.labels == c).any()))
    (found,) = attack.chosen(view, torch.tensor([absent]), like)
    x = view.box.normalize(public.images.to(like))
    with torch.no_grad():
        likely = view.model.eval()(x).softmax(1)[:, absent]
    assert torch.equal(found, x[likely.argsort(descending=True)[:2]])


def test_the_truth_as_a_prior_is_best_and_a_result_is_nearer_to_the_truth_than_any_prior() -> None:
    """The guard against copies: priors of a wrong class drag, but do not replace the gradient."""
    truth = photos(1, 8)
    wrong = surrogate()
    wrong = wrong.subset([i for i in range(len(wrong)) if int(wrong.labels[i]) != 0][:4])
    attack = AdversarialPriors(
        steps=60, style_weight=0.1, feature_weight=0.1, tv_weight=0.0, images=1, lr=0.1
    )  # fmt: skip
    trial = harness.run_trial(stage_of(examples=1, public=wrong, victims=truth), attack)
    # The harness lets no victim be public, so the truth is held by the attack alone.
    view, x, _ = seen(examples=1, public=wrong, victims=truth)
    held = replace(attack, start="noise")
    object.__setattr__(held, "chosen", lambda view, y, like: x[:, None])
    best = held.run(view, generator=torch.Generator().manual_seed(0), watch=Watch())
    own = attack.run(view, generator=torch.Generator().manual_seed(0), watch=Watch())
    assert own.notes["matching_loss"] >= best.notes["matching_loss"]
    reached = (trial.images - truth.images).square().mean()
    copies = (wrong.images - truth.images).square().flatten(1).mean(1)
    assert float(reached) < float(copies.min())


def test_the_nearest_prior_is_noted() -> None:
    view, _, _ = seen()
    assert "psnr_to_prior" in SHORT(view).notes
    other, _, _ = seen(public=surrogate(16))
    assert SHORT.outlook(other).verdict == "hopeless"


@pytest.mark.parametrize("start", ["noise", "prior"])
def test_either_start_runs(start: Any) -> None:
    view, _, _ = seen()
    assert replace(SHORT, start=start)(view).status == "complete"
