"""Priors in files, and which of them an attack takes."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from leakatlas import priors
from leakatlas.attacks.generative import prior as chosen
from leakatlas.attacks.generative.latent.gias import GIAS
from leakatlas.bench import harness
from leakatlas.blocks.watch import Watch
from leakatlas.data import digits
from leakatlas.errors import InvalidInput, InvalidParameter
from leakatlas.models import checkpoints
from leakatlas.priors import Prior, kept, learning, training
from tests.conftest import build_stage, photos, surrogate
from tests.priors.support import generator, prior

FREE = {"Apache-2.0", "MIT", "BSD-3-Clause", "BSD-2-Clause", "CC0-1.0", "CC-BY-4.0"}
"""Licences under which weights may be passed on for any purpose."""


def _trained(folder: Path, **more: object) -> Prior:
    recipe = training.Recipe(latent=8, steps=2, **more)  # type: ignore[arg-type]  # passed through
    made = training.train(
        digits(8).subset(range(40)), recipe, name="mine", license="MIT", command="c", watch=Watch()
    )
    priors.save(made, folder)
    assert isinstance(made, Prior)
    return made


def test_nothing_non_commercial_is_shipped() -> None:
    """The cards are walked: licence, source and recipe of everything in the package."""
    names = checkpoints.shipped()
    assert names
    for name in names:
        card = checkpoints.card(name)
        assert card.license in FREE, name
        words = f"{card.data} {card.split} {card.license}".lower()
        assert not any(
            w in words for w in ("non-commercial", "noncommercial", "research only", "-nc")
        )
        assert card.data and card.recipe and card.seed >= 0


@pytest.mark.parametrize("name", kept.shipped())
def test_a_shipped_prior_says_what_it_was_trained_on(name: str) -> None:
    found = kept.load(name)
    trained = re.search(r"first ([\d,]+)", found.card.split)
    assert trained is not None and found.seen is not None
    assert len(found.seen) > 0.95 * int(trained[1].replace(",", ""))
    assert "no test image" in found.card.split or "held out" in found.card.split
    figures = found.card.figures
    assert training.STOPPED in figures
    if isinstance(found, Prior):
        assert found.ceiling is not None and found.ceiling > 15
        assert figures["feature_fid"] > figures["feature_fid_of_other_images"] > 0


def test_the_shipped_priors_are_small() -> None:
    files = [f for n in kept.shipped() for f in checkpoints.WEIGHTS.glob(f"{n}.*")]
    assert sum(file.stat().st_size for file in files) < 12e6


def test_a_prior_survives_its_files(tmp_path: Path) -> None:
    made = _trained(tmp_path)
    found = kept.decoder(tmp_path)
    z = torch.randn(2, 8, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(found.decoder()(z), made.decoder()(z), atol=2e-2)  # kept in float16
    assert found.seen is not None and made.seen is not None
    assert torch.equal(found.seen, made.seen)
    assert found.card.figures == made.card.figures
    assert kept.decoder(tmp_path / "mine.json").shape == (1, 8, 8)


def test_files_that_are_no_prior_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="There is no prior 'nobody'"):
        kept.load("nobody")
    with pytest.raises(InvalidInput, match="holds 0 cards"):
        kept.load(tmp_path)
    _trained(tmp_path)
    card = tmp_path / "mine.json"
    values = json.loads(card.read_text())
    card.write_text(json.dumps({**values, "model": "convnet"}))
    with pytest.raises(InvalidInput, match="a prior is one of generator, denoiser"):
        kept.load(tmp_path)
    card.write_text(json.dumps({**values, "settings": {**values["settings"], "latent": 9}}))
    with pytest.raises(InvalidInput, match="shape"):
        kept.load(tmp_path)
    card.write_text(json.dumps({**values, "surprise": 1}))
    with pytest.raises(InvalidInput, match="surprise"):
        kept.load(tmp_path)


def test_a_victim_inside_the_training_split_is_refused(tmp_path: Path) -> None:
    _trained(tmp_path)
    attack = GIAS(prior=str(tmp_path), latent_steps=1, generator_steps=0, restarts=1)
    images = digits(8).with_channels(3)
    public = images.subset(range(60, 100))
    for index, seen in ((3, True), (50, False)):
        scene = build_stage(
            victims=images.subset([index]), public=public, examples=1, letter="D",
        )  # fmt: skip
        if seen:
            with pytest.raises(InvalidInput, match="was trained on 1 of the victims"):
                harness.run_trial(scene, attack)
        else:
            assert len(harness.run_trial(scene, attack).images) == 1


# -- which one an attack takes -------------------------------------------------------------------


def test_auto_learns_from_the_surrogate_where_no_prior_is_shipped(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    attack = GIAS(latent_steps=2, generator_steps=2, restarts=1, prior_steps=2, prior_latent=8)
    lessons: list[int] = []
    original = learning.teach

    def counted(*given: object, **more: object) -> int:
        lessons.append(1)
        return original(*given, **more)  # type: ignore[arg-type]  # passed through

    monkeypatch.setattr(training, "teach", counted)
    scene = build_stage(
        model="lenet", examples=1, letter="D", public=surrogate(8), dtype=torch.float32
    )
    view, _ = harness.observe(scene, attack)
    assert attack.outlook(view).verdict == "unknown"
    first, second = attack(view), attack(view)
    assert lessons == [1] and len(list(cache.iterdir())) == 1
    assert torch.equal(first.images, second.images)
    assert "surrogate" in first.reads


def test_auto_takes_the_shipped_prior_unless_the_population_is_another(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the PSNR of its own pictures of the surrogate images."""
    scene = build_stage(model="lenet", size=32, examples=1, letter="D", public=surrogate(32))
    view, _ = harness.observe(scene, GIAS())
    monkeypatch.setattr(chosen, "FEWEST", 8)
    for psnr, expected in ((24.0, "generator-cifar10"), (15.0, chosen.SURROGATE)):
        monkeypatch.setattr(chosen, "inversion_psnr", lambda *a, psnr=psnr, **k: psnr)
        monkeypatch.setattr(chosen, "PROBE_STEPS", int(psnr))  # another probe, not the cached one
        assert chosen._chosen(view, Watch()) == expected
    monkeypatch.setattr(chosen, "FEWEST", 10_000)
    assert chosen._chosen(view, Watch()) == "generator-cifar10"


def test_without_public_images_of_another_size_nothing_can_be_learned() -> None:
    view, _ = harness.observe(build_stage(letter="D"), GIAS())
    outlook = GIAS().outlook(view)
    assert outlook.verdict == "hopeless" and "leakatlas prior train" in outlook.reason
    text = GIAS(prior="generator-cifar10").outlook(view)
    assert "24.1 dB" in text.reason and "leaves the prior" in text.reason


def test_a_prior_of_other_labels_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    conditional = prior(generator(classes=3))
    monkeypatch.setattr(kept, "decoder", lambda name: conditional)
    view, _ = harness.observe(build_stage(letter="D", examples=1, size=16), GIAS())
    with pytest.raises(InvalidParameter, match="3 labels, the model has 10"):
        chosen.prior_of("held", view, steps=1, watch=Watch())
    with pytest.raises(InvalidParameter, match="needs the label"):
        conditional.decoder(None)(torch.zeros(1, 12))


def test_images_of_the_held_out_photos_are_not_known() -> None:
    made = replace(
        prior(generator()), seen=priors.prior.fingerprints(photos(2, 16).images, (3, 16, 16))
    )
    assert made.knows(photos(2, 16).images).tolist() == [True, True]
    assert made.knows(photos(4, 16).images).tolist() == [True, True, False, False]
