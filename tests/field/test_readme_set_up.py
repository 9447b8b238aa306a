"""The YAML that the README shows, carried out as it stands there, with and without public images.

It once went through green without ``surrogate``, since what needs public images was left out
without a word; one more key made the same set-up fail its gate.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from typer.testing import CliRunner

from leakatlas.cli import app

README = Path(__file__).parents[2] / "README.md"
PARTS = "nn.Conv2d(3, 4, 5, stride=3), nn.ReLU(), nn.Flatten(), nn.Linear(400, 10)"

SHORT: dict[str, Any] = {
    "attacks": ["inverting_gradients", "gias", "robbing_the_fed"],
    "attack_parameters": {
        "inverting_gradients": {"steps": 2},
        "gias": {
            "latent_steps": 2,
            "generator_steps": 2,
            "restarts": 1,
            "prior_steps": 3,
            "prior_latent": 8,
        },
    },
    "budget": "1h",
    "rehearsal": False,
    "upper_bound": False,
}
"""One attack for each of the letters C, D and G, so short that nobody waits."""


def _written(folder: Path, **more: Any) -> Path:
    """The README's block beside the files that it names."""
    (block,) = [
        part.partition("```")[0]
        for part in README.read_text(encoding="utf-8").split("```yaml\n")[1:]
        if "audit.yaml" in part.partition("\n")[0]
    ]
    config = yaml.safe_load(block)
    location, _, factory = config["model"]["python"].partition(":")
    (folder / location).write_text(
        f"from torch import nn\ndef {factory}():\n    return nn.Sequential({PARTS})\n"
    )
    torch.manual_seed(5)
    net: nn.Module = eval(f"nn.Sequential({PARTS})", {"nn": nn})
    save_file(net.state_dict(), folder / config["model"]["weights"])
    for name, count, seed in (("client-images", config["data"]["limit"], 1), ("public", 40, 2)):
        generator = torch.Generator().manual_seed(seed)
        for index in range(count):
            place = folder / name / str(index % 10)
            place.mkdir(parents=True, exist_ok=True)
            coarse = torch.rand(1, 3, 4, 4, generator=generator)
            pixels = nn.functional.interpolate(coarse, size=32, mode="bilinear")[0]
            bytes_ = (pixels * 255).byte().permute(1, 2, 0).numpy()
            Image.fromarray(bytes_).save(place / f"{index}.png")
    config |= SHORT
    config["data"] |= more
    file = folder / "audit.yaml"
    file.write_text(yaml.safe_dump(config))
    return file


def _audited(folder: Path, **more: Any) -> tuple[int, dict[str, Any]]:
    folder.mkdir()
    file = _written(folder, **more)
    done = CliRunner().invoke(app, ["audit", str(file), "--out", str(folder / "out")])
    report = folder / "out" / "report.json"
    assert report.is_file(), done.output
    return done.exit_code, json.loads(report.read_text())


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LEAKATLAS_CACHE", str(tmp_path / "cache"))


def test_with_and_without_public_images_the_same_letters_are_tested(tmp_path: Path) -> None:
    code, without = _audited(tmp_path / "without")
    same, given = _audited(tmp_path / "given", surrogate="folder:public@32")
    assert code == same
    tested = [
        {run["attack"]: (run["letter"], run["status"]) for run in report["runs"]}
        for report in (without, given)
    ]
    assert tested[0] == tested[1]
    assert {letter for letter, _ in tested[0].values()} == {"C", "D", "G"}
    assert all(status == "complete" for _, status in tested[0].values()), tested[0]
    strangers = [report["facts"]["settings"][0]["strangers"] for report in (without, given)]
    assert strangers == [True, False]
