"""Priors of strangers: a card with its weights and fingerprints, or a recipe with weights."""

from __future__ import annotations

import functools
import json
import tempfile
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import yaml
from hypothesis import strategies as st
from torch import nn

from leakatlas import data, priors
from leakatlas.blocks.watch import Watch
from leakatlas.priors import Prior, training
from leakatlas.priors.foreign.stylegan2 import Synthesis
from leakatlas.priors.learning import Kind
from tests.doors import hostile
from tests.doors.hostile import as_json, damaged, tampered
from tests.doors.registry import Files, door

ABOUT = {"schema": "leakatlas/prior/1", "data": "nothing", "license": "MIT", "weights": "w"}


@functools.cache
def _kept(kind: Kind) -> Files:
    recipe = training.Recipe(kind=kind, latent=4, steps=1)
    images = data.digits(8).subset(range(20))
    made = training.train(
        images, recipe, name="mine", license="MIT", command="c", watch=Watch(), measure=False
    )
    with tempfile.TemporaryDirectory() as folder:
        priors.save(made, Path(folder))
        return {file.name: file.read_bytes() for file in Path(folder).iterdir()}


def _foreign(network: nn.Module, **recipe: Any) -> tuple[dict[str, Any], bytes]:
    return {**ABOUT, **recipe}, safetensors.torch.save(
        {n: t.contiguous() for n, t in network.state_dict().items()}
    )


@functools.cache
def _recipes() -> tuple[tuple[dict[str, Any], bytes], ...]:
    stack = nn.Sequential(nn.Linear(3, 48), nn.Unflatten(1, (3, 4, 4)), nn.Tanh())
    layers = [
        {"Linear": {"in_features": 3, "out_features": 48}},
        {"Unflatten": {"dim": 1, "unflattened_size": [3, 4, 4]}},
        "Tanh",
    ]
    code = [{"os.system": {"command": f"touch {hostile.CANARY}"}}]
    torch.manual_seed(0)
    return (
        _foreign(stack, kind="layers", latent=[3], layers=layers, signed=True),
        _foreign(stack, kind="layers", latent=[3], layers=code),
        _foreign(Synthesis([4, 2], 3, 1), kind="stylegan2"),
        _foreign(stack, kind="biggan"),
        _foreign(stack, kind="unet2d", config="w", scheduler="../w"),
    )


@st.composite
def _files(draw: st.DrawFn) -> Files:
    if draw(st.booleans()):
        files = dict(_kept(draw(st.sampled_from(("vae", "ddpm")))))
        broken = draw(st.sampled_from(sorted(files)))
        card = json.loads(files["mine.json"])
        changed = tampered((card,)).map(as_json)
        ways = [damaged((files[broken],)), *([changed] * broken.endswith(".json"))]
        files[broken] = draw(st.one_of(*ways))
        return files
    recipe, weights = draw(st.sampled_from(_recipes()))
    text = yaml.safe_dump(recipe).encode()
    match draw(st.integers(0, 3)):
        case 0:
            text = draw(damaged((text,)))
        case 1:
            weights = draw(damaged((weights,)))
        case _:
            text = draw(tampered((recipe,)).map(as_json))  # JSON is YAML
    return {"prior.yaml": text, "w": weights}


@door(_files(), share=2.0, examples=100)
def prior(folder: Path) -> object:
    """A prior that an attack is to search."""
    found = priors.load(folder)
    if isinstance(found, Prior):
        y = torch.zeros(1, dtype=torch.int64) if found.classes else None
        with torch.no_grad():
            return found.decoder(y)(torch.zeros(1, *found.latent))
    return found.knows(torch.zeros(1, *found.shape))
