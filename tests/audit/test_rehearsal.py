"""Rehearsals: what they may know, what they choose, what they cost."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from leakatlas import data
from leakatlas.attacks.api import Attack, Reconstruction
from leakatlas.attacks.generative import prior
from leakatlas.attacks.generative.latent.gias import GIAS
from leakatlas.attacks.optimization.basic.inverting_gradients import InvertingGradients
from leakatlas.audit.games import halves, labelled, multiplicity, own_games
from leakatlas.audit.halving import LEAST, stages
from leakatlas.audit.ready import Readied, distinct_variants, ruled_out
from leakatlas.audit.rehearsal import Rehearsal, rehearse
from leakatlas.blocks.watch import Watch
from leakatlas.errors import InvalidParameter, NotGranted, Unavailable
from leakatlas.fl import FedAVG, View
from leakatlas.report import write
from leakatlas.sealed import DamagedFile
from leakatlas.threat import Grant
from tests.conftest import build_stage

LABELS = frozenset({Grant.LABELS})
VARIANTS: Mapping[str, Attack] = {
    "does not move": InvertingGradients(lr=1e-9, steps=60),
    "tuned": InvertingGradients.tuned(steps=60),
    "tuned again": InvertingGradients.tuned(steps=60),
}


def test_a_variant_that_the_users_changes_contradict_is_left_out() -> None:
    # A mean picture leaves no room for the generator search that is asked for here.
    made = distinct_variants(GIAS.tuned(), {"generator_steps": 50})
    assert made.keys() == {"tuned", "published"}
    assert "mean" in distinct_variants(GIAS.tuned(), {"tv_weight": 0.01})
    assert ruled_out(GIAS.tuned(), {"generator_steps": 50}) == ("mean",)
    assert ruled_out(GIAS.tuned(), {"tv_weight": 0.01}) == ()
    with pytest.raises(InvalidParameter, match="set generator_steps=0"):
        distinct_variants(GIAS.tuned(), {"average": True})


def test_the_report_names_what_was_ruled_out() -> None:
    found = Rehearsal("gias", "tuned", {}, 12.0, 10.0, 30, 30, 0.1, "photos", (), 1.0)
    told = Readied(GIAS.tuned(), None, found, ruled_out=("mean", "other")).told()
    words = write.rehearsal_in_words(told)
    assert words.endswith("; the settings given rule out 'mean', 'other'")
    assert "rule out" not in write.rehearsal_in_words(Readied(GIAS.tuned(), None, found).told())


def _view(seed: int = 0, **scene: Any) -> View:
    """Of the ``seed``-th pair of photos."""
    photos = data.photos(8).subset([2 * seed, 2 * seed + 1])
    photos = replace(photos, labels=torch.tensor([0, 1]))
    stage = build_stage(
        **{
            "letter": "B", "grants": LABELS, "victims": photos, "dtype": torch.float32, **scene
        }
    )  # fmt: skip
    return stage.view([stage.federation.play_round()])


def _public() -> data.ImageSet:
    return data.strangers(data.photos(8), 96)


def _choice(found: Rehearsal) -> list[object]:
    return [found.variant, found.null, [(t.variant, t.iterations, t.psnr) for t in found.trials]]


def test_it_takes_what_rebuilds_its_own_images(cache: Path) -> None:
    found = rehearse(_view(), VARIANTS, _public(), planned=40)
    assert found.variant == "tuned"
    assert found.gain > 3
    assert found.parameters == VARIANTS["tuned"].to_json()
    assert {trial.variant for trial in found.trials} == {"does not move", "tuned"}
    assert found.iterations == found.planned == 40
    assert Rehearsal.from_json(json.loads(json.dumps(found.to_json()))) == found


def test_ten_victims_pay_once_and_none_of_them_enters(cache: Path) -> None:
    first = rehearse(_view(0), VARIANTS, _public(), planned=10)
    second = rehearse(_view(1), VARIANTS, _public(), planned=10)
    assert not first.cached and second.cached
    assert _choice(first) == _choice(second)
    for file in (cache / "rehearsals").iterdir():
        file.unlink()
    afresh = rehearse(_view(1), VARIANTS, _public(), planned=10)
    assert not afresh.cached and _choice(afresh) == _choice(first)


def test_another_state_protocol_or_multiplicity_is_rehearsed_anew(cache: Path) -> None:
    scenes: list[dict[str, Any]] = [
        {},
        {"letter": "C"},
        {"letter": "C", "protocol": FedAVG(epochs=1, batch_size=2, lr=0.1)},
        {"letter": "C", "protocol": FedAVG(epochs=1, batch_size=2, lr=0.2)},
        {"settings": {"widths": (12,), "act": "sigmoid"}},
        {"victims": replace(data.photos(8).subset([0, 1]), labels=torch.tensor([1, 1]))},
    ]
    for scene in scenes:
        assert not rehearse(_view(**scene), VARIANTS, _public(), planned=10, images=1).cached
    assert rehearse(_view(), VARIANTS, _public(), planned=10, images=1).cached


def test_a_damaged_result_is_made_again(cache: Path) -> None:
    first = rehearse(_view(), VARIANTS, _public(), planned=10, images=1)
    (file,) = (cache / "rehearsals").iterdir()
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.warns(DamagedFile, match="SHA-256"):
        again = rehearse(_view(), VARIANTS, _public(), planned=10, images=1)
    assert not again.cached and _choice(again) == _choice(first)


def test_a_saved_view_gives_the_same_choice_in_a_fresh_process(cache: Path, tmp_path: Path) -> None:
    view = _view()
    view.save(tmp_path / "view")
    here = rehearse(view, VARIANTS, _public(), planned=10, images=1)
    script = (
        "import json, sys, torch; torch.set_num_threads(1)\n"
        "from pathlib import Path\n"
        "from leakatlas import data\n"
        "from leakatlas.audit.rehearsal import rehearse\n"
        "from leakatlas.attacks.optimization.basic.inverting_gradients import *\n"
        "from leakatlas.fl import View\n"
        "variants = {name: InvertingGradients.from_json(values)\n"
        "    for name, values in json.loads(sys.argv[2]).items()}\n"
        "found = rehearse(View.load(Path(sys.argv[1])), variants,\n"
        "    data.strangers(data.photos(8), 96), planned=10, images=1)\n"
        "print(json.dumps([found.variant, found.null,\n"
        "    [(t.variant, t.iterations, t.psnr) for t in found.trials]]))\n"
    )
    parameters = json.dumps({name: attack.to_json() for name, attack in VARIANTS.items()})
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "view"), parameters],
        env={**os.environ, "LEAKATLAS_CACHE": str(tmp_path / "elsewhere")},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert json.loads(done.stdout) == json.loads(json.dumps(_choice(here)))


def test_what_a_rehearsal_reads_is_no_read_of_the_attack(cache: Path) -> None:
    view = _view()
    rehearse(view, VARIANTS, _public(), planned=10, images=1)
    assert view.reads == frozenset()


def test_a_stopped_rehearsal_says_what_it_has_and_keeps_nothing(cache: Path) -> None:
    stop = Watch()
    stop.stop()
    found = rehearse(_view(), VARIANTS, _public(), planned=40, watch=stop)
    assert len(found.trials) == 1
    assert not (cache / "rehearsals").exists()


def test_an_update_that_cannot_be_imitated_is_refused(cache: Path) -> None:
    view = _view(letter="B", protocol=FedAVG(epochs=1, batch_size=2, lr=0.1))
    with pytest.raises(NotGranted, match="without the protocol"):
        rehearse(view, VARIANTS, _public(), planned=10)


@given(st.integers(1, 12), st.integers(1, 5_000), st.integers(1, 4), st.floats(1, 1e6))
def test_a_rehearsal_fits_what_it_may_cost(
    variants: int, planned: int, images: int, affordable: float
) -> None:
    made = stages(variants, planned, images, affordable)
    least = min(variants, 2) * min(planned, LEAST)
    assert sum(stage.cost for stage in made) <= max(affordable, least)
    fields = [stage.variants for stage in made]
    assert fields == sorted(fields, reverse=True)
    assert all(1 <= stage.iterations <= planned for stage in made)


def test_the_last_trials_are_as_long_as_the_run_that_they_stand_for() -> None:
    assert stages(9, 400, 2)[-1].iterations == 400
    (only,) = stages(1, 400, 2)
    assert (only.variants, only.iterations, only.images) == (1, 400, 2)


def test_labels_repeat_as_the_victims_do() -> None:
    beliefs = torch.softmax(
        3 * torch.randn(40, 5, generator=torch.Generator().manual_seed(0)), dim=1
    ).double()
    for repeats in ((1, 1, 1), (3, 1), (2, 2), (5,), (1,) * 5):
        chosen, labels = labelled(beliefs, repeats, torch.Generator().manual_seed(1))
        assert len(set(chosen)) == len(chosen) == sum(repeats)
        counts = sorted((labels.count(label) for label in set(labels)), reverse=True)
        assert counts == sorted(repeats, reverse=True)


def test_labels_are_drawn_as_often_as_the_model_believes_in_them() -> None:
    beliefs = torch.tensor([[0.8, 0.2]]).repeat(4, 1).double()
    draws = torch.Generator().manual_seed(0)
    drawn = [labelled(beliefs, (1,), draws)[1][0] for _ in range(2_000)]
    assert sum(drawn) / 2_000 == pytest.approx(0.2, abs=0.03)


def test_multiplicity_is_granted_or_recovered() -> None:
    assert multiplicity(_view()) == (1, 1)
    twice = replace(data.photos(8).subset([0, 1]), labels=torch.tensor([3, 3]))
    assert multiplicity(_view(victims=twice)) == (2,)


def test_own_images_are_public_ones_under_the_mean_image_as_null() -> None:
    public = _public()
    for game in own_games(_view(), public, 2, seed=3):
        for image in game.truth:
            assert any(torch.equal(image, other) for other in public.images)
        assert 5 < game.null < 40


def test_strangers_share_no_pixel_with_bundled_victims() -> None:
    for size in (8, 32):
        public = data.strangers(data.photos(size), 96)
        assert set(public.classes).isdisjoint(data.photos(size).classes)
        assert public.shape == (3, size, size)
    grey = data.digits()
    assert data.strangers(grey, 96).shape == grey.shape


def test_a_learned_prior_never_meets_the_images_that_it_is_to_rebuild(cache: Path) -> None:
    """Else a prior that memorised its surrogate would rebuild its own images best."""
    surrogate = data.patches(8, 48, part="surrogate")
    view = _view(letter="D", public=surrogate)
    for game in own_games(view, surrogate, 2, seed=3):
        held = {image.numpy().tobytes() for image in game.view.surrogate.images}
        assert len(held) > 10
        assert not held & {image.numpy().tobytes() for image in game.truth}
    first, second = halves(surrogate)
    assert len(first) + len(second) == len(surrogate)
    # One prior for all games: it is learned once.
    games = own_games(view, surrogate, 2, seed=3)
    assert games[0].view.surrogate.fingerprint() == games[1].view.surrogate.fingerprint()


def test_a_trial_that_was_cut_decides_nothing(cache: Path) -> None:
    """The better variant is cut, and the other one is taken: half a schedule misleads."""

    def run(attack: Attack, view: View, seed: int, watch: Watch) -> Reconstruction:
        found = attack(view, seed=seed)
        tuned = attack.to_json()["lr"] > 1e-6
        return replace(found, status="cut short") if tuned else found

    found = rehearse(_view(), VARIANTS, _public(), planned=10, images=1, run=run)
    assert found.variant == "does not move"
    assert not (cache / "rehearsals").exists()
    only = {"tuned": VARIANTS["tuned"]}
    with pytest.raises(Unavailable, match="within the first trial"):
        rehearse(_view(), only, _public(), planned=10, images=1, run=run)


def test_one_prior_serves_runs_of_any_length(cache: Path) -> None:
    surrogate = data.patches(8, 32, part="surrogate")
    for latent, files in ((8, 1), (8, 1), (9, 2)):
        prior.taught(surrogate, steps=2, latent=latent, watch=Watch())
        assert len(list(cache.glob("prior-*"))) == files
