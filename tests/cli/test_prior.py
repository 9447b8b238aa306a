"""``leakatlas prior train``: what it writes, what it says, what it refuses."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from leakatlas import priors
from leakatlas.cli import app
from leakatlas.models import checkpoints
from leakatlas.priors import Prior, kept, learning, training
from leakatlas.priors.vae import Autoencoder
from tests.priors.support import written


def _train(*options: str) -> tuple[int, str]:
    done = CliRunner().invoke(app, ["prior", "train", "digits:8", *options])
    return done.exit_code, " ".join(done.output.split())


def test_the_card_says_what_was_made_and_the_command_that_makes_it_again(tmp_path: Path) -> None:
    options = ["--limit", "40", "--latent", "8", "--width", "2", "--batch", "16", "--name", "tiny"]
    said = ["--license", "MIT", "--source", "digits of a test", "--out", str(tmp_path)]
    code, text = _train(*options, *said, "--steps", "3", "--no-flips")
    assert code == 0 and "Prior tiny" in text and "held out inversion psnr db" in text
    assert {file.name for file in tmp_path.iterdir()} == {
        "tiny.json", "tiny.safetensors", "tiny.seen",
    }  # fmt: skip
    card = json.loads((tmp_path / "tiny.json").read_text())
    assert card["recipe"] == (
        "leakatlas prior train digits:8 --kind vae --latent 8 --width 2 --batch 16 --limit 40 "
        "--seed 0 --name tiny --no-flips --steps 3"
    )
    assert card["data"].startswith("digits of a test (") and card["device"]
    assert card["settings"]["widths"] == [192, 128, 96, 48] and card["figures"]["steps"] == 3
    found = priors.load(tmp_path)
    assert isinstance(found, Prior) and found.shape == (1, 8, 8)


def _left(folder: Path) -> set[str]:
    return {file.name for file in folder.glob(".*")}


def test_a_stopped_training_goes_on_with_its_own_images_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights that saw other images would come under a card that does not tell of them."""
    asked = ["--latent", "8", "--batch", "16", "--steps", "9", "--out", str(tmp_path)]
    step, made = Autoencoder.step, 0

    def interrupted(*given: Any) -> Any:
        nonlocal made
        made += 1
        if made == 5:
            raise KeyboardInterrupt
        return step(*given)

    def steps_of(*options: str) -> tuple[int, str]:
        nonlocal made
        made = 5  # none is interrupted any more
        code, text = _train(*options, *asked)
        assert code == 0
        return made - 5, text

    monkeypatch.setattr(Autoencoder, "step", interrupted)
    minutes = itertools.count(step=60.0)  # kept after every step
    monkeypatch.setattr(learning, "time", SimpleNamespace(perf_counter=lambda: next(minutes)))
    assert _train("--limit", "40", *asked)[0] == 3
    assert len(_left(tmp_path)) == 1
    others, text = steps_of("--limit", "48", "--name", "prior")
    assert others == 9 and "training on other images" in text and len(_left(tmp_path)) == 1
    again, text = steps_of("--limit", "40")
    assert again == 5 and "training on other" not in text and not _left(tmp_path)


def test_a_gan_that_may_stop_says_where_it_looked(tmp_path: Path) -> None:
    options = ["--limit", "40", "--latent", "8", "--batch", "8", "--kind", "gan", "--steps", "3"]
    code, text = _train(*options, "--patience", "3", "--out", str(tmp_path / "a"))
    card = json.loads((tmp_path / "a" / "prior.json").read_text())
    assert code == 0 and "--patience 3" in card["recipe"]
    assert card["figures"][training.STOPPED] == 0 and card["figures"]["weights_of_step"] == 3
    assert "on the way" in text and "after 3" in text
    code, _ = _train(*options, "--patience", "0", "--out", str(tmp_path / "b"))
    card = json.loads((tmp_path / "b" / "prior.json").read_text())
    assert code == 0 and "weights_of_step" not in card["figures"]


def test_a_prior_is_measured_on_what_it_has_not_seen(tmp_path: Path) -> None:
    _train("--limit", "40", "--latent", "8", "--steps", "2", "--out", str(tmp_path))

    def measured(*options: str) -> tuple[int, str]:
        done = CliRunner().invoke(app, ["prior", "measure", str(tmp_path), "digits:8", *options])
        return done.exit_code, " ".join(done.output.split())

    before = json.loads((tmp_path / "prior.json").read_text())
    code, text = measured("--limit", "40")
    assert code == 0 and "has not seen │ 4 │" in text
    found = re.search(r"inversion psnr db │ ([\d.]+)", text)
    kept_in_half = pytest.approx(before["figures"][priors.CEILING], abs=0.1)
    assert found is not None and float(found[1]) == kept_in_half
    assert json.loads((tmp_path / "prior.json").read_text()) == before
    code, text = measured("--limit", "36")
    assert code == 2 and "trained on every image" in text
    figures = {"steps": 2, priors.CEILING: 7.5}
    (tmp_path / "prior.json").write_text(json.dumps({**before, "figures": figures}))
    code, text = measured("--limit", "40", "--write")
    after = json.loads((tmp_path / "prior.json").read_text())
    assert code == 0 and after["figures"].items() >= figures.items()  # what it said stays
    assert after["figures"][training.STOPPED] == 0
    assert after["figures"]["feature_fid"] == pytest.approx(
        before["figures"]["feature_fid"], rel=0.05
    )
    priors.load(tmp_path)


def test_one_of_others_has_no_card_to_write_on(tmp_path: Path) -> None:
    state = {"0.weight": torch.zeros(64, 4), "0.bias": torch.zeros(64)}
    layers = [
        {"Linear": {"in_features": 4, "out_features": 64}},
        {"Unflatten": {"dim": 1, "unflattened_size": [1, 8, 8]}},
    ]
    folder = str(written(tmp_path / "p", state, kind="layers", latent=[4], layers=layers))
    asked = ["prior", "measure", folder, "digits:8", "--limit", "8"]
    done = CliRunner().invoke(app, asked)
    assert done.exit_code == 0 and "inversion psnr" in done.output
    done = CliRunner().invoke(app, [*asked, "--write"])
    assert done.exit_code == 2 and "inversion_psnr" in done.output


def test_a_diffusion_model_names_no_latent(tmp_path: Path) -> None:
    code, _ = _train("--limit", "20", "--kind", "ddpm", "--steps", "1", "--out", str(tmp_path))
    card = json.loads((tmp_path / "prior.json").read_text())
    assert code == 0 and "--latent" not in card["recipe"] and card["model"] == "denoiser"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--kind", "flow"], "kind of prior"),
        (["--size", "20"], "expected a multiple of 8"),
        (["--kind", "ddpm", "--latent", "8"], "no latent"),
        (["--kind", "vae", "--patience", "3"], "only a gan is stopped"),
        (["--kind", "vae", "--conditional"], "only a gan takes labels"),
        (["--name", "../x"], "expected lower-case letters"),
        (["--limit", "4"], "expected 8 at the least"),
        (["--device", "tpu"], "device"),
        (["--budget", "soon"], "budget"),
    ],
)
def test_what_cannot_be_is_refused_in_words(tmp_path: Path, options: list[str], words: str) -> None:
    code, text = _train("--steps", "1", "--out", str(tmp_path / "new"), *options)
    assert code == 2 and words in text
    assert not (tmp_path / "new").exists()


def test_every_shipped_prior_is_listed_with_its_ceiling() -> None:
    done = CliRunner().invoke(app, ["prior", "list"], env={"COLUMNS": "300"})
    assert done.exit_code == 0
    for name in kept.shipped():
        ceiling = checkpoints.card(name).figures.get(priors.CEILING)
        line = next(line for line in done.output.splitlines() if f" {name} " in line)
        assert ("-" if ceiling is None else f"{ceiling:.1f}") in line
