"""Cheating attacks succeed where the truth is within reach, and find nothing in their own process.

Code in what is sent to clients, and buffers that record, are in ``tests/fl/test_tampering.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from leakatlas.attacks.api import Attack
from leakatlas.bench import harness
from leakatlas.bench.adversary import Adversary, Here
from leakatlas.bench.spawned import Spawned
from leakatlas.fl import Stage
from tests.bench.cheats import Burglar, Scout, Snoop
from tests.conftest import build_stage

CHEATS = [Snoop(), Burglar()]


@pytest.fixture(scope="module")
def apart() -> Iterator[Spawned]:
    with Spawned() as adversary:
        yield adversary


def stolen(
    cheat: Attack,
    adversary: Adversary,
    folder: Path,
    before: Callable[[Stage], None] = lambda stage: None,
) -> bool:
    """Whether a candidate is a private image, with the originals in ``runs/`` as an audit's are."""
    stage = build_stage(examples=2)
    before(stage)
    originals = stage.truth().images.double()
    (folder / "runs").mkdir(exist_ok=True)
    held = {"originals": stage.federation.clients[0].x}
    save_file(held, folder / "runs" / "0001.safetensors")
    trial = harness.run_trial(stage, cheat, adversary=adversary)
    if not len(trial.images):
        return False
    distance = torch.cdist(originals.flatten(1), trial.images.double().flatten(1))
    return bool((distance.min(dim=1).values < 1e-6).any())


@pytest.mark.parametrize("cheat", CHEATS, ids=lambda cheat: cheat.key)
def test_beside_the_truth_a_cheat_succeeds(
    cheat: Attack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or the tests below could not fail."""
    monkeypatch.chdir(tmp_path)
    assert stolen(cheat, Here(), tmp_path)


@pytest.mark.parametrize("cheat", CHEATS, ids=lambda cheat: cheat.key)
def test_in_a_process_of_its_own_a_cheat_finds_nothing(
    cheat: Attack, apart: Spawned, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert not stolen(cheat, apart, tmp_path)


@pytest.mark.parametrize("own", [False, True], ids=["shared", "own"])
def test_what_an_attack_learns_beside_the_truth_does_not_travel_with_it(
    own: bool, apart: Spawned, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An outlook is given in the harness's process; class and parameters go to the other one."""
    monkeypatch.chdir(tmp_path)
    scout = Scout()

    def looked(stage: Stage) -> None:
        scout.outlook(stage.view())

    assert stolen(scout, apart if own else Here(), tmp_path, before=looked) != own
