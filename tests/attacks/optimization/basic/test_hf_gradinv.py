from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from leakatlas.attacks.optimization.basic import hf_gradinv
from leakatlas.attacks.optimization.basic.hf_gradinv import HFGradInv, Shaping
from leakatlas.bench import harness
from leakatlas.blocks import batchnorm, labels, matching, priors
from leakatlas.blocks.labels import Profile
from leakatlas.blocks.labels.profiles import enumerate_counts, evolve_counts, fitness
from leakatlas.fl import Stage, View
from leakatlas.threat import Grant, Knowledge
from tests.attacks.case import Case
from tests.conftest import build_stage, surrogate

SCENE = {"model": "convnet-bn", "settings": {"width": 4}}
CASE = Case({"steps": 3, "restarts": 2}, SCENE, boxed=True)
SHORT = HFGradInv(steps=3)


def stage_of(**changes: Any) -> Stage:
    return build_stage(**{**SCENE, "letter": "D", "public": surrogate(), **changes})


def seen(**changes: Any) -> tuple[View, Tensor, Tensor]:
    stage = stage_of(**changes)
    view, _ = harness.observe(stage, SHORT)
    client = stage.federation.clients[0]
    return view, client.x, client.y


def noise(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


# -- the quantised slope ---------------------------------------------------------------------------


def test_a_quantised_slope_has_three_magnitudes_is_odd_and_has_no_scale() -> None:
    slope = noise(2, 3, 8, 8)
    shaped = hf_gradinv.quantised(slope)
    levels = torch.tensor([0.2, 0.6, 1.0], dtype=torch.float64)
    assert float((shaped.abs().flatten()[:, None] - levels).abs().amin(1).max()) < 1e-12
    assert {round(v, 6) for v in shaped.abs().unique().tolist()} == {0.2, 0.6, 1.0}
    torch.testing.assert_close(hf_gradinv.quantised(-slope), -shaped)
    torch.testing.assert_close(hf_gradinv.quantised(37.0 * slope), shaped)
    assert float(hf_gradinv.quantised(torch.zeros(1, 4)).abs().max()) == 0


def test_candidates_are_quantised_by_their_own_median() -> None:
    slope = noise(2, 3, 8, 8)
    both = torch.stack([slope[0], 1_000 * slope[1]])
    torch.testing.assert_close(hf_gradinv.quantised(both), hf_gradinv.quantised(slope))


def test_only_the_first_steps_are_doubled() -> None:
    shaping = Shaping("quantised", doubled=2)
    slope = noise(1, 5)
    shaping.step = 1
    assert torch.equal(shaping(slope), 2 * hf_gradinv.quantised(slope))
    shaping.step = 2
    assert torch.equal(shaping(slope), hf_gradinv.quantised(slope))
    assert torch.equal(Shaping("sign", doubled=2)(slope), slope.sign())
    assert Shaping("none", doubled=2)(slope) is slope


# -- the window ------------------------------------------------------------------------------------


def test_the_window_is_the_published_one_at_its_own_size() -> None:
    """Evaluations count from 1: 90 from the 500th on, 25 from the 4,000th."""
    starts = [hf_gradinv.window_start(index, 110, 15_000) for index in range(15_000)]
    assert starts[:499] == [100] * 499
    for step, value in enumerate((90, 80, 70, 60, 50, 40, 30)):
        assert starts[499 + 500 * step] == value == starts[998 + 500 * step]
    assert set(starts[3_999:]) == {25}


@pytest.mark.parametrize("tensors", [1, 2, 8, 20, 110, 161])
def test_a_window_never_leaves_the_tensors(tensors: int) -> None:
    starts = [hf_gradinv.window_start(index, tensors, 300) for index in range(300)]
    assert 1 <= min(starts) and max(starts) <= tensors
    assert starts == sorted(starts, reverse=True)
    assert starts[-1] == max(1, round(25 * tensors / 110))


def test_with_everything_kept_the_masked_cosine_is_the_joint_one() -> None:
    view, x, y = seen()
    g = dict(view.update.tensors)
    mine = view.replay(x + 0.1, y)
    whole = replace(SHORT, keep=1.0, windowed=False)
    masks = whole.masks(g, view.trained_names, 0, torch.Generator())
    picked = matching.masked(matching.cosine, {n: masks[f"mask/{n}"] for n in g})
    joint = matching.cosine(mine, g)
    torch.testing.assert_close(picked(mine, g), joint)
    torch.testing.assert_close(picked(view.replay(x, y), g), torch.zeros_like(joint), atol=1e-12,
                               rtol=0)  # fmt: skip


def test_masks_are_drawn_anew_and_spare_what_lies_below_the_window() -> None:
    view, _, _ = seen()
    g, order = dict(view.update.tensors), view.trained_names
    generator = torch.Generator().manual_seed(0)
    attack = replace(SHORT, steps=100)
    first, second = (attack.masks(g, order, 0, generator) for _ in range(2))
    begun = hf_gradinv.window_start(0, len(order), 100)
    assert begun > 1
    for place, name in enumerate(order, start=1):
        mask = first[f"mask/{name}"]
        assert set(mask.unique().tolist()) <= ({0.0} if place < begun else {0.0, 1.0})
    last = f"mask/{order[-2]}"
    assert not torch.equal(first[last], second[last])
    shares = torch.cat([first[f"mask/{n}"].flatten() for n in order[begun - 1 :]])
    assert float(shares.mean()) == pytest.approx(0.7, abs=0.1)


# -- the priors ------------------------------------------------------------------------------------


def test_padded_variation_equals_a_convolution_over_a_padded_image() -> None:
    x = noise(2, 3, 5, 6)
    a = np.pad(x.numpy(), ((0, 0), (0, 0), (0, 1), (0, 1)))
    here = a[..., :-1, :-1]
    expected = (np.abs(a[..., :-1, 1:] - here) + np.abs(a[..., 1:, :-1] - here)).mean()
    assert float(priors.tv_padded(x)) == pytest.approx(expected)
    assert float(priors.tv_padded(torch.ones(1, 1, 4, 4))) == pytest.approx(0.5)


def test_the_first_two_layers_weigh_more() -> None:
    view, x, _ = seen()
    target = batchnorm.running_statistics(view.model)
    names = list(target)
    parts = [float(batchnorm.prior(view.model, {name: target[name]})(x).detach()) for name in names]
    expected = 1.3 * parts[0] + 3.0 * parts[1] + sum(parts[2:])
    assert float(SHORT.bn_prior(view.model)(x).detach()) == pytest.approx(expected)
    plain, y, _ = seen(model="convnet")
    assert float(SHORT.bn_prior(plain.model)(y)) == 0


def test_a_prior_does_nothing_before_its_start() -> None:
    """Step for step the same as without it, and different as soon as it counts."""
    stage = stage_of(grants=frozenset({Grant.LABELS}))
    late = replace(SHORT, steps=5, tv_from=1.0, bn_from=1.0, tv_weight=10.0)
    never = replace(late, tv_weight=0.0, bn_weight=0.0)
    early = replace(late, tv_from=0.0)
    images = [harness.run_trial(stage, attack).images for attack in (late, never, early)]
    assert torch.equal(images[0], images[1])
    assert not torch.equal(images[0], images[2])


# -- labels ----------------------------------------------------------------------------------------


def test_the_true_counts_fit_best_and_evolution_finds_what_enumeration_does() -> None:
    """Rows -n_c a / B of a synthetic gradient: fitness 1 up to the profile's common factor."""
    profile = torch.rand(12, generator=torch.Generator().manual_seed(0)).double().sort().values
    counts = torch.tensor([3, 1, 2, 2])
    weight = -counts[:, None] * profile / 8
    fit = weight.abs() @ profile
    every = enumerate_counts(fit, 8)
    assert torch.equal(every, counts)
    cosine = float(fitness(counts[None], fit)) / float(fit.norm())
    assert cosine == pytest.approx(1)
    evolved = evolve_counts(fit, 8, generator=torch.Generator().manual_seed(1))
    assert torch.equal(evolved, counts)
    whole = torch.zeros(6, 12).double() + 0.1
    whole[[5, 0, 3, 1]] = weight
    known = Profile(ranks=torch.arange(12), values=profile)
    found = labels.hf_gradinv(whole, known, 8, generator=torch.Generator())
    assert found.tolist() == [1, 2, 0, 2, 0, 3]


def test_labels_are_counted_granted_or_given_and_need_what_they_need() -> None:
    view, _, y = seen(examples=3)
    found = SHORT(view)
    assert found.labels is not None
    assert sorted(found.labels.tolist()) == sorted(y.tolist())
    assert "surrogate" in found.reads
    uniform = replace(SHORT, count_by="uniform")
    assert uniform.knowledge() == Knowledge.UPDATES | Knowledge.BASIC
    assert "surrogate" not in uniform(view).reads
    bare, _, _ = seen(letter="B", public=None)
    assert SHORT.missing(bare) == Knowledge.SURROGATE
    assert uniform(bare).status == "complete"
    given = replace(SHORT, labels=(1, 1, 2))(view)
    assert given.labels is not None and given.labels.tolist() == [1, 1, 2]


# -- the whole attack ------------------------------------------------------------------------------


def test_the_choice_does_not_depend_on_the_masks() -> None:
    view, _, y = seen(grants=frozenset({Grant.LABELS}))
    found = HFGradInv(steps=30, restarts=2)(view)
    matched = matching.cosine(view.replay(found.images, y), dict(view.update.tensors))
    assert found.notes["matching_loss"] == pytest.approx(float(matched.detach()), rel=1e-9)


def test_it_descends() -> None:
    view, _, _ = seen(grants=frozenset({Grant.LABELS}))
    attack = replace(HFGradInv.tuned(), tv_weight=0.0)
    losses = [replace(attack, steps=steps)(view).notes["matching_loss"] for steps in (1, 60)]
    assert losses[1] < 0.5 * losses[0]
    assert attack.outlook(view).verdict == "unknown"
