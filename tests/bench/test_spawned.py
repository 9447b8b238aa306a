"""An attack in a process of its own gives what it gives here, and breaks nothing."""

from __future__ import annotations

import importlib
import os
import select
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from leakatlas.attacks.analytic.sparsification.robbing_the_fed import RobbingTheFed
from leakatlas.attacks.api import Attack
from leakatlas.attacks.optimization.basic.inverting_gradients import InvertingGradients
from leakatlas.bench import harness, machine, task
from leakatlas.bench.spawned import Spawned
from leakatlas.blocks.watch import Watch
from leakatlas.data import Box
from leakatlas.errors import AttackCrashed, InvalidInput, NotGranted
from leakatlas.fl import ModelRef, Scenario, Stage, stage
from tests.bench.villains import Villain
from tests.conftest import build_stage, photos, surrogate


@pytest.fixture(scope="module")
def other() -> Iterator[Spawned]:
    """One process for the whole module: starting one takes seconds."""
    with Spawned(memory=2.0) as adversary:
        yield adversary


def same(a: harness.Trial, b: harness.Trial) -> bool:
    return torch.equal(a.found.images, b.found.images) and (
        a.found.status, a.found.notes, a.found.reads, a.found.recipe, len(a.records),
    ) == (b.found.status, b.found.notes, b.found.reads, b.found.recipe, len(b.records))  # fmt: skip


def test_a_passive_attack_finds_the_same_there(other: Spawned) -> None:
    attack = InvertingGradients(steps=3, restarts=2)
    here = harness.run_trial(build_stage(model="lenet"), attack, seed=1)
    there = harness.run_trial(build_stage(model="lenet"), attack, seed=1, adversary=other)
    assert same(here, there)
    assert other.costs()["cpu_seconds"] > 0


def test_an_active_attack_tampers_from_there(other: Spawned) -> None:
    def scene() -> Stage:
        return build_stage(model="lenet", letter="G", examples=3, public=surrogate(8))

    attack = RobbingTheFed(bins=8)
    here = harness.run_trial(scene(), attack, seed=1)
    assert same(here, harness.run_trial(scene(), attack, seed=1, adversary=other))


def test_the_attack_runs_in_another_process(other: Spawned) -> None:
    trial = harness.run_trial(build_stage(), Villain(), adversary=other)
    assert trial.found.notes["pid"] != os.getpid()


class Own(nn.Module):
    """A user's own architecture, which no registry knows."""

    def __init__(self, memory: Tensor | None = None) -> None:
        super().__init__()
        self.memory = memory
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Sigmoid(), nn.Flatten())
        self.head = nn.Linear(4 * 36, 10)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.body(x))
        return out


def live(model: nn.Module) -> Stage:
    scenario = Scenario(model=ModelRef("object", type(model).__name__), examples=2)
    return stage(scenario, model=model, victims=photos(2), box=Box.unit(3))


def test_a_users_own_model_travels_without_its_weights(other: Spawned) -> None:
    torch.manual_seed(0)
    model = Own()
    blob = task.code_of(live(model))
    assert blob is not None
    weight = model.head.weight.detach()
    assert not any(row.numpy().tobytes() in blob for row in weight)
    attack = InvertingGradients(steps=3)
    here = harness.run_trial(live(model), attack)
    assert same(here, harness.run_trial(live(model), attack, adversary=other))


def test_classes_of_files_that_nobody_over_there_can_import_travel(
    other: Spawned, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model file that imports from a file beside itself, and a class that a script imported."""
    (tmp_path / "beside_it.py").write_text(
        "from torch import nn\n"
        "class Body(nn.Sequential):\n"
        "    def __init__(self):\n"
        "        super().__init__(nn.Conv2d(3, 4, 3), nn.Sigmoid(), nn.Flatten())\n"
    )
    (tmp_path / "its_own.py").write_text(
        "from torch import nn\n"
        "from beside_it import Body\n"
        "class Net(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.body, self.head = Body(), nn.Linear(144, 10)\n"
        "    def forward(self, x):\n"
        "        return self.head(self.body(x))\n"
    )
    for name in ("beside_it", "its_own"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(str(tmp_path))
    described = ModelRef("python", f"{tmp_path / 'its_own.py'}:Net")
    torch.manual_seed(0)
    by_file, imported = described.build(trust_code=True), importlib.import_module("its_own").Net()
    scenario = Scenario(model=described, examples=2, letter="G")
    public = surrogate(8)

    def played(model: nn.Module, attack: Attack, adversary: Spawned | None) -> harness.Trial:
        live = stage(scenario, model=model, victims=photos(2), surrogate=public, box=Box.unit(3))
        return harness.run_trial(live, attack, adversary=adversary)

    for model in (by_file, imported):
        for attack in (InvertingGradients(steps=2), RobbingTheFed(bins=8)):
            assert same(played(model, attack, None), played(model, attack, other))


def test_a_model_that_remembers_a_private_image_does_not_travel() -> None:
    with pytest.raises(InvalidInput, match="holds one of the private images"):
        task.code_of(live(Own(memory=photos(1).images)))


class Stubborn(nn.Module):
    """Can be copied, but not sent."""

    def __deepcopy__(self, memo: object) -> Stubborn:
        return self

    def __reduce__(self) -> str:
        raise TypeError("it stays here")


def test_a_model_that_cannot_travel_says_the_way_out() -> None:
    model = Own()
    model.body.append(Stubborn())
    model.body[-1].forward = lambda x: x
    with pytest.raises(InvalidInput, match=r"it stays here.*in_process=True"):
        task.code_of(live(model))


def test_a_refusal_comes_back_as_the_error_that_it_was(other: Spawned) -> None:
    with pytest.raises(NotGranted, match="BASIC") as there:
        harness.run_trial(build_stage(letter="A"), Villain(), adversary=other)
    with pytest.raises(NotGranted) as here:
        harness.run_trial(build_stage(letter="A"), Villain())
    assert str(there.value) == str(here.value)


@pytest.mark.parametrize(
    ("deed", "words"),
    [
        ("crash", "ZeroDivisionError: a mistake in the attack"),
        ("die", "SIGKILL"),
        ("eat", "memory"),
    ],
)
def test_an_attack_that_goes_down_is_named_and_the_next_one_runs(
    other: Spawned, deed: str, words: str
) -> None:
    with pytest.raises(AttackCrashed, match=words):
        harness.run_trial(build_stage(), Villain(deed=deed), adversary=other)
    assert harness.run_trial(build_stage(), Villain(), adversary=other).found.status == "complete"


@pytest.mark.skipif(not machine.MEMORY.is_file(), reason="this system does not tell its memory")
def test_without_a_limit_an_attack_takes_what_is_there_and_is_ended_first() -> None:
    with Spawned() as adversary:
        harness.run_trial(build_stage(), Villain(), adversary=adversary)
        assert adversary._child is not None
        told = Path(f"/proc/{adversary._child.pid}")
        limits = (told / "limits").read_text(encoding="ascii").splitlines()
        allowed = next(line.split()[3] for line in limits if line.startswith("Max data size"))
        assert 2**28 < int(allowed) < 2 * machine.facts()["memory_gib"] * 2**30
        assert int((told / "oom_score_adj").read_text(encoding="ascii")) == 1000


def test_an_attack_that_keeps_no_budget_is_killed(other: Spawned) -> None:
    other.seconds = 0.1
    try:
        with pytest.raises(AttackCrashed, match="limit of its time"):
            harness.run_trial(build_stage(), Villain(deed="hang"), adversary=other)
    finally:
        other.seconds = None


def test_an_attack_that_overruns_its_budget_is_killed(
    other: Spawned, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("leakatlas.bench.spawned.OVERRUN", (0.1, 0.25))
    with pytest.raises(AttackCrashed, match="after the end of its time"):
        harness.run_trial(build_stage(), Villain(deed="hang"), watch=Watch(0.1), adversary=other)
    assert harness.run_trial(build_stage(), Villain(), adversary=other).found.status == "complete"


def test_a_stopped_run_gives_what_it_has(other: Spawned) -> None:
    watch = Watch()
    watch.stop()
    trial = harness.run_trial(build_stage(), Villain(deed="linger"), watch=watch, adversary=other)
    assert trial.found.status == "cut short" and len(trial.images) == 2


def test_what_an_attack_prints_is_no_answer(other: Spawned) -> None:
    trial = harness.run_trial(build_stage(), Villain(deed="print"), adversary=other)
    assert len(trial.images) == 2


FINE = {"status": "complete", "reason": "", "notes": {}, "seconds": 0.0, "execution": "",
        "reads": [], "cut_short": False, "planned": None}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "tensors", "word"),
    [
        ({"status": "splendid"}, {"images": torch.zeros(1, 3, 8, 8)}, "status"),
        ({"extra": 1}, {"images": torch.zeros(1, 3, 8, 8)}, "extra"),
        ({}, {"images": torch.zeros(1, 3, 9, 8)}, "shape"),
        ({}, {"pictures": torch.zeros(1, 3, 8, 8)}, "pictures"),
    ],
)
def test_an_answer_that_is_none_is_an_error_of_the_attack(
    tmp_path: Path, changes: dict[str, object], tensors: dict[str, Tensor], word: str
) -> None:
    save_file(tensors, tmp_path / task.FOUND)
    view = build_stage().view()
    with pytest.raises(AttackCrashed, match=word):
        task.found_of({**FINE, **changes}, tmp_path, view, Watch())


PARENT = """
import sys, time
from leakatlas.bench.child import Child
child = Child("leakatlas.bench.worker")
print(child.pid, flush=True)
sys.stdin.read()
"""


def test_a_process_ends_with_its_harness_even_if_that_is_killed() -> None:
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None
    handle = os.pidfd_open(int(parent.stdout.readline()))
    parent.kill()
    parent.communicate()
    select.select([handle], [], [])  # readable once the process has ended
    os.close(handle)
