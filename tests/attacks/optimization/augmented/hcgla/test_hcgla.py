from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from leakatlas.attacks.optimization.augmented import hcgla
from leakatlas.attacks.optimization.augmented.hcgla import HCGLA
from leakatlas.attacks.optimization.augmented.hcgla._generator import RowGenerator
from leakatlas.bench import harness
from leakatlas.blocks import descent, init
from leakatlas.blocks.watch import Watch
from leakatlas.data import bundled
from leakatlas.defenses.heuristic.perturbation.gradient_pruning import GradientPruning, kept
from leakatlas.fl import FedSGD, Stage, View
from leakatlas.threat import Grant, Knowledge
from tests.attacks.case import Case
from tests.conftest import build_stage, surrogate

SCENE = {"model": "lenet", "settings": {"width": 4}}
LITTLE: dict[str, Any] = {
    "steps": 3, "inner": 3, "filter_every": 2, "lessons": 4, "generator_epochs": 1,
    "generator_width": 2, "pairs": 2, "epochs": 1, "width": 2,
}  # fmt: skip
CASE = Case(LITTLE, SCENE)
SHORT = HCGLA(**LITTLE)
PLAIN = replace(SHORT, start="noise", filter_every=0)
LABELS = frozenset({Grant.LABELS})
NOW = torch.tensor(0.0)


@pytest.fixture(autouse=True)
def own_cache(cache: Path) -> None:
    del cache


def stage_of(*, rate: float = 0.9, **changes: Any) -> Stage:
    given = {
        **SCENE, "letter": "D", "grants": LABELS, "public": surrogate(), "examples": 1,
        "defenses": (GradientPruning.top_k(rate),) if rate else (),
    }  # fmt: skip
    return build_stage(**{**given, **changes})


def seen(**changes: Any) -> tuple[View, Tensor, Tensor]:
    stage = stage_of(**changes)
    view, _ = harness.observe(stage, PLAIN)
    client = stage.federation.clients[0]
    return view, client.x, client.y


def total(value: Tensor | descent.Value) -> Tensor:
    return value.criterion if isinstance(value, descent.Value) else value


# -- the masked distance ---------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [0.0, 0.5, 0.9, 0.99])
def test_the_masked_distance_is_zero_at_the_truth_whatever_is_withheld(rate: float) -> None:
    view, x, y = seen(rate=rate)
    assert float(total(PLAIN.objective(view, y)({"x": x}, NOW)).detach()) < 1e-20


def test_the_unmasked_distance_at_the_truth_is_what_was_withheld() -> None:
    view, x, y = seen()
    whole = view.replay(x, y, adaptive=False)
    sent = view.update.tensors
    dropped = sum(float((whole[n].detach() - t).square().sum()) for n, t in sent.items())
    norm = sum(float(t.square().sum()) for t in sent.values())
    blind = replace(PLAIN, masked=False).objective(view, y)
    assert float(total(blind({"x": x}, NOW)).detach()) == pytest.approx(dropped / norm)


def test_the_head_alone_can_be_matched() -> None:
    view, x, y = seen()
    head = replace(PLAIN, tensors="head").objective(view, y)
    assert float(total(head({"x": x}, NOW)).detach()) < 1e-20
    assert float(total(head({"x": x + 0.1}, NOW)).detach()) > 1e-6


def test_its_slope_ignores_masked_entries(monkeypatch: pytest.MonkeyPatch) -> None:
    """The candidate's gradient is changed where the upload holds nothing: no difference."""
    view, x, y = seen()
    start = (x + 0.1).requires_grad_()
    replay = view.replayer(adaptive=False)

    def slope(shift: float) -> Tensor:
        masks = {n: t == 0 for n, t in view.update.tensors.items()}
        # Multiplied, so that what reaches x through masked entries changes, too.
        moved = lambda x, y: {n: t * (1 + shift * masks[n]) for n, t in replay(x, y).items()}  # noqa: E731
        monkeypatch.setattr(view, "replayer", lambda **_: moved)
        value = total(PLAIN.objective(view, y)({"x": start}, NOW))
        return torch.autograd.grad(value, start)[0]

    assert torch.equal(slope(0.0), slope(3.0))


def test_the_channel_keeps_exactly_so_many_entries() -> None:
    v = torch.randn(1_000, generator=torch.Generator().manual_seed(0)).double()
    for share in (0.1, 0.01, 0.001):
        assert int(kept(v, 1 - share, 0.0).sum()) == int(share * 1_000)


def test_unmasked_matching_is_worse_where_most_is_withheld() -> None:
    """Ablation over ten images at 1 %: the mask is what makes the difference."""
    errors = {True: 0.0, False: 0.0}
    for start in range(10):
        stage = stage_of(
            rate=0.99, victims=bundled.patches(8, 10).subset([start]), letter="B", public=None,
            model="lenet", settings={"width": 8},
        )  # fmt: skip
        for masked in errors:
            attack = replace(
                PLAIN, steps=2, inner=12, line_search=True, lr=1.0, masked=masked, start="grey"
            )
            trial = harness.run_trial(stage, attack)
            errors[masked] += float((trial.images.clamp(0, 1) - trial.truth.images).square().mean())
    assert errors[True] < errors[False]


# -- start and filter ------------------------------------------------------------------------------


def test_generated_starts_are_nearer_than_noise_and_than_grey() -> None:
    crops = bundled.patches(16, 200)
    view, _, _ = seen(
        size=16, public=crops.subset(list(range(192))), rate=0.5, settings={"width": 8}
    )
    attack = replace(
        SHORT, filter_every=0, lessons=192, generator_epochs=30, generator_lr=5e-3,
        generator_width=4,
    )  # fmt: skip
    learned, _ = attack.learned(view, Watch())
    generator = torch.Generator().manual_seed(0)
    error = torch.zeros(3, dtype=torch.float64)
    for image, label in zip(crops.images[192:], crops.labels[192:], strict=True):
        x = view.box.normalize(image[None].double())
        y = label[None] % view.classes
        own = view.rehearse(x, y)
        made = attack.first(own, y, learned, generator, x)
        grey = init.grey(view.batch_shape, like=x, box=view.box)
        noise = init.normal(view.batch_shape, generator=generator, like=x)
        error += torch.stack([(t - x).square().mean() for t in (made, grey, noise)])
    assert error[0] < error[1] < error[2]


def test_filtering_rounds_clips_and_begins_l_bfgs_anew() -> None:
    assert hcgla.stretches(42, 5) == [5] * 8 + [2]
    assert hcgla.stretches(10, 5) == [5, 5]
    assert hcgla.stretches(42, 0) == [42]
    view, x, _ = seen()
    kept_as_is = torch.nn.Identity()
    pixels = view.box.denormalize(SHORT.filtered(view, 3 * x, kept_as_is))
    assert float(pixels.min()) >= -1e-12 and float(pixels.max()) <= 1 + 1e-12
    torch.testing.assert_close(pixels * 255, (pixels * 255).round())


def test_generators_fit_other_shapes() -> None:
    for shape in ((1, 28, 28), (3, 32, 32), (3, 64, 48)):
        assert RowGenerator(7, 1, shape)(torch.randn(2, 7)).shape == (2, *shape)


def test_the_private_image_is_read_by_nothing_once_the_update_is_there() -> None:
    """The release starts from the private image; here another truth gives the same answer."""
    stage = stage_of()
    view, _ = harness.observe(stage, SHORT)
    before = SHORT(view).images
    stage.federation.clients[0].x.add_(1.0)
    assert torch.equal(SHORT(view).images, before)


# -- labels and needs ------------------------------------------------------------------------------


def test_labels_survive_sparsification() -> None:
    view, _, y = seen(letter="B", grants=frozenset(), public=None, settings={"width": 12}, rate=0.9)
    assert torch.equal(PLAIN.read_labels(view), y)
    two, _, y = seen(
        letter="B", grants=frozenset(), public=None, settings={"width": 12}, rate=0.9, examples=2
    )
    assert torch.equal(PLAIN.read_labels(two).sort().values, y.sort().values)


def test_public_images_are_needed_for_the_learned_parts_alone() -> None:
    assert PLAIN.knowledge() == Knowledge.UPDATES
    assert replace(PLAIN, start="grey").knowledge() == Knowledge.UPDATES | Knowledge.BASIC
    assert SHORT.knowledge() & Knowledge.SURROGATE
    view, _, _ = seen()
    assert "of" in SHORT.outlook(view).reason
    other, _, _ = seen(public=surrogate(16))
    assert SHORT.outlook(other).verdict == "hopeless"


def test_nothing_withheld_makes_the_mask_idle() -> None:
    """At rho = 1 there is no difference from matching all entries, dead units apart."""
    view, x, y = seen(rate=0.0, protocol=FedSGD())
    with_mask, without = (
        float(total(replace(PLAIN, masked=on).objective(view, y)({"x": x + 0.1}, NOW)).detach())
        for on in (True, False)
    )
    assert with_mask == pytest.approx(without)
