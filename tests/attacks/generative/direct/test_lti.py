"""LTI: what it learns from, what it is scored by, and what a defense does to it."""

from __future__ import annotations

import functools
import itertools
from pathlib import Path

import pytest
import torch
from torch import Tensor

from leakatlas.attacks.generative.direct import lti
from leakatlas.attacks.generative.direct.lti import LTI, Inverter, hashed, unordered_mse
from leakatlas.audit import control
from leakatlas.bench import harness
from leakatlas.blocks.watch import Watch
from leakatlas.data import ImageSet, bundled
from leakatlas.defenses.heuristic.perturbation.gradient_pruning import GradientPruning
from leakatlas.fl import Defense, FedAVG, Stage, View, stream
from leakatlas.threat import Grant
from tests.attacks.case import LENET, Case
from tests.conftest import BOX, build_stage, photos, surrogate

CASE = Case({"epochs": 2, "hidden": 8, "clients": 6}, {**LENET, "size": 8}, boxed=True)

QUICK = LTI(epochs=20, hidden=128, lr=1e-3, batch_size=32, scaling="entry")
PRUNED = GradientPruning(rate=0.9, largest_share=0.5, error_feedback=False)
CLIENTS, PUBLIC = 8, 500


@functools.cache
def _population() -> ImageSet:
    return bundled.patches(8, PUBLIC + CLIENTS, part="surrogate")


def _public() -> ImageSet:
    return _population().subset(range(PUBLIC))


def _victims() -> ImageSet:
    """Others of the same population, one for each client."""
    return _population().subset(range(PUBLIC, PUBLIC + CLIENTS))


@pytest.fixture(autouse=True)
def shared_lessons(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tests of one scene learn it once."""
    monkeypatch.setenv("LEAKATLAS_CACHE", str(tmp_path_factory.getbasetemp() / "lti"))


def _scene(
    *defenses: Defense, examples: int = 1, clients: int = 1, protocol: FedAVG | None = None,
    public: ImageSet | None = None, victims: ImageSet | None = None,
) -> Stage:  # fmt: skip
    return build_stage(
        model="lenet", examples=examples, clients=clients, letter="D", defenses=defenses,
        protocol=protocol, public=public or surrogate(8), victims=victims,
        dtype=torch.float32,
    )  # fmt: skip


def _view(stage: Stage) -> View:
    return stage.view([stage.federation.play_round()])


def _views(*defenses: Defense) -> list[View]:
    """Of eight clients with one image each."""
    stage = _scene(*defenses, clients=CLIENTS, public=_public(), victims=_victims())
    record = stage.federation.play_round()
    return [stage.view([record], target=i) for i in range(CLIENTS)]


def _psnr(images: Tensor, truth: Tensor) -> float:
    error = (BOX.denormalize(images).clamp(0, 1) - truth).square().flatten(1).mean(1)
    return float(-10 * error.log10().mean())


def _guess(truth: Tensor) -> float:
    mean = _public().images.mean(0, keepdim=True)
    return _psnr(BOX.normalize(mean), truth)


# -- what it is scored by ------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 4])
def test_sets_are_compared_under_their_best_assignment(count: int) -> None:
    draw = torch.Generator().manual_seed(0)
    found, wanted = (torch.rand(3, count, 5, generator=draw, dtype=torch.float64) for _ in "ab")
    expected = [
        min(
            float((f[list(order)] - w).square().mean())
            for order in itertools.permutations(range(count))
        )
        for f, w in zip(found, wanted, strict=True)
    ]
    assert unordered_mse(found, wanted).tolist() == pytest.approx(expected)


def test_the_order_of_a_batch_changes_neither_the_error_nor_its_slope() -> None:
    draw = torch.Generator().manual_seed(1)
    found = torch.rand(2, 3, 4, generator=draw, dtype=torch.float64).requires_grad_()
    wanted = torch.rand(2, 3, 4, generator=draw, dtype=torch.float64)
    slopes = []
    for order in ([0, 1, 2], [2, 0, 1]):
        error = unordered_mse(found, wanted[:, order]).sum()
        slopes.append(torch.autograd.grad(error, found)[0])
    torch.testing.assert_close(slopes[0], slopes[1])


def test_entries_are_added_up_in_the_same_bins_for_every_update() -> None:
    draw = torch.Generator().manual_seed(2)
    a, b = torch.rand(2, 50, generator=draw)
    assert torch.equal(hashed(a, None), a)
    assert torch.equal(hashed(a, 50), a)
    assert len(hashed(a, 7)) == 7
    torch.testing.assert_close(hashed(a, 7).sum(), a.sum())
    torch.testing.assert_close(hashed(a + b, 7), hashed(a, 7) + hashed(b, 7))
    where = torch.randint(7, (50,), generator=stream("lti", "bins", 50, 7))
    for index in range(7):
        torch.testing.assert_close(hashed(a, 7)[index], a[where == index].sum())


# -- what it learns from -------------------------------------------------------------------------


def test_an_imitated_client_sends_what_the_client_would_send() -> None:
    """The pairs of a lesson, against the client's own upload of the same images."""
    public = surrogate(8)
    stage = build_stage(
        model="lenet", examples=2, letter="D", victims=photos(2), public=public,
        defenses=(GradientPruning.top_k(0.5, error_feedback=False),),
    )  # fmt: skip
    view = _view(stage)
    attack = LTI(clients=3, bins=None)
    u, x = attack.imitated(view, generator=stream("test"), watch=Watch()).values()
    assert u.shape[0] == 3 and x.shape == (3, 2, 3 * 8 * 8)
    rows = public.images.flatten(1)
    for row, pair in zip(u, x, strict=True):
        chosen = [int((rows == image).all(1).nonzero()[0]) for image in pair]
        labels = lti.public_labels(view, stream("test"))[chosen]
        other = build_stage(
            model="lenet", examples=2, letter="D", victims=public.subset(chosen),
            defenses=stage.scenario.defenses,
        )  # fmt: skip
        client = other.federation.clients[0]
        client.y.copy_(labels)
        sent = other.federation.play_round().updates[0].tensors
        torch.testing.assert_close(row, torch.cat([t.flatten() for t in sent.values()]).float())
        assert 0.4 < float((row == 0).double().mean()) < 0.7  # pruned like the client's


def test_every_public_image_is_used_before_one_is_used_again() -> None:
    view = _view(_scene(examples=2))
    x = LTI(clients=16).imitated(view, generator=stream("test"), watch=Watch())["images"]
    assert len({tuple(image.tolist()) for image in x.flatten(0, 1)}) == 32  # of 32


def test_standardised_entries_have_mean_zero_and_spread_one_and_dead_ones_stay_finite() -> None:
    u = torch.rand(20, 6, generator=torch.Generator().manual_seed(0)) * 1e-4
    u[:, 2] = 0.5
    mean, scale = QUICK.standard(u)
    whitened = (u - mean) / scale
    torch.testing.assert_close(whitened.mean(0), torch.zeros(6), rtol=0, atol=1e-4)
    alive = torch.arange(6) != 2
    torch.testing.assert_close(whitened[:, alive].std(0, correction=0), torch.ones(5))
    assert bool(torch.isfinite(whitened).all())
    mean, scale = LTI(scaling="none").standard(u)
    assert torch.equal((u - mean) / scale, u)


@pytest.mark.parametrize("defenses", [(), (PRUNED,)], ids=["plain", "pruned"])
def test_it_beats_the_mean_public_image_with_and_without_a_defense(
    defenses: tuple[Defense, ...],
) -> None:
    truth = _victims().images
    found = torch.cat([QUICK(view).images for view in _views(*defenses)])
    assert _psnr(found, truth) > _guess(truth) + 2
    # Another client's update gives another image: the update decided, not the prior.
    assert _psnr(found, truth) > _psnr(found.roll(1, 0), truth) + 3


def test_a_lesson_without_the_defense_does_not_read_defended_updates() -> None:
    """The ablation of its one idea: the defense in the loop."""
    truth = _victims().images
    defended = _views(PRUNED)
    aware = torch.cat([QUICK(view).images for view in defended])
    plain = QUICK.lesson(_views()[0], generator=stream("lti", "prepare"), watch=Watch())
    u = torch.stack([hashed(lti.flat(v, v.update.tensors), QUICK.bins) for v in defended])
    with torch.no_grad():
        pixels = Inverter.of(plain)(u).reshape(truth.shape)
    assert _psnr(aware, truth) > _psnr(BOX.normalize(pixels), truth) + 1


def test_the_lesson_is_learned_once_and_anew_where_something_changes(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lessons: list[int] = []
    original = LTI.lesson

    def counted(self: LTI, view: View, **rest: object) -> dict[str, Tensor]:
        lessons.append(view.num_examples)
        return original(self, view, **rest)  # type: ignore[arg-type]  # passed on as it came

    monkeypatch.setattr(LTI, "lesson", counted)
    attack = LTI(epochs=1, hidden=4, clients=4)
    first = attack(_view(_scene()))
    assert torch.equal(attack(_view(_scene())).images, first.images)
    assert lessons == [1]
    attack(_view(_scene(GradientPruning())))
    attack(_view(_scene(examples=2)))
    attack(_view(_scene(protocol=FedAVG(epochs=2, batch_size=1, lr=0.1))))
    assert lessons == [1, 1, 2, 1]
    attack(_view(_scene()), seed=5)  # a seed of the attack is none of the lesson
    assert len(lessons) == 4


def test_audits_rehearse_it_and_hold_it_against_the_update_of_others() -> None:
    """Its length is in epochs, and what it learned may draw pictures of anything."""
    assert {v.lasting(20).length for v in LTI.variants().values()} == {20}
    assert control.at_work(LTI())


def test_what_is_imitated_is_shared_by_every_length(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[int] = []
    original = LTI.imitated

    def counted(self: LTI, view: View, **rest: object) -> dict[str, Tensor]:
        made.append(self.epochs)
        return original(self, view, **rest)  # type: ignore[arg-type]  # passed on as it came

    monkeypatch.setattr(LTI, "imitated", counted)
    for epochs in (1, 2):
        LTI(epochs=epochs, hidden=4, clients=4)(_view(_scene()))
    assert made == [1]
    LTI(epochs=1, hidden=4, clients=3)(_view(_scene()))
    assert made == [1, 1]


def test_a_lesson_that_was_cut_short_is_said_and_not_kept(cache: Path) -> None:
    view = _view(_scene())
    attack = LTI(epochs=100_000, hidden=4)
    watch = Watch(seconds=0.2)
    found = attack(view, watch=watch)
    assert found.status == "cut short"
    assert found.images.shape == (1, 3, 8, 8)
    assert not list(cache.glob("lti-*"))


def test_the_kept_epoch_is_the_best_on_clients_that_were_held_out() -> None:
    view = _views()[0]
    found = QUICK(view)
    assert 1 <= found.notes["epoch"] <= QUICK.epochs
    assert found.confidence is not None
    assert found.confidence.tolist() == [found.notes["held_out_psnr"]]
    assert found.notes["imitated_clients"] == 500


def test_batches_come_out_whole() -> None:
    stage = _scene(examples=2)
    trial = harness.run_trial(stage, LTI(epochs=2, hidden=8, clients=40))
    assert trial.images.shape == (2, 3, 8, 8)


def test_outlook_says_what_it_would_learn_from() -> None:
    assert QUICK.outlook(_view(_scene())).reason == (
        "as good as 32 imitated clients teach, from 32 public images"
    )
    assert QUICK.outlook(_view(_scene()).without("surrogate")).verdict == "hopeless"
    other = build_stage(model="lenet", size=16, letter="D", public=surrogate(8))
    assert "(3, 8, 8)" in QUICK.outlook(other.view()).reason


def test_labels_of_other_classes_are_drawn_by_the_model() -> None:
    view = _view(_scene())
    drawn = lti.public_labels(view, stream("test"))
    assert drawn.shape == (32,)
    assert len(view.surrogate.classes) != view.classes  # patches have classes of their own
    assert 0 <= int(drawn.min()) and int(drawn.max()) < view.classes
    assert Grant.LABELS not in view.grants
