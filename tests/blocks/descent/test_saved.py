"""A run that was killed goes on as if nothing had happened."""

from __future__ import annotations

import errno
import io
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from leakatlas import data
from leakatlas.attacks.optimization.basic.inverting_gradients import InvertingGradients
from leakatlas.blocks import descent
from leakatlas.blocks.descent import Descended, Factory, Variables, saved
from leakatlas.blocks.watch import Conduct, Watch
from leakatlas.sealed import DamagedFile, seal
from leakatlas.threat import Grant
from tests.conftest import build_stage

START = {"x": torch.linspace(-1, 1, 12).reshape(2, 6)}


def wave(variables: Variables, t: Tensor) -> Tensor:
    x = variables["x"]
    return (x.square() + 0.3 * torch.sin(9 * x + t)).sum()


def search(
    folder: Path | None, *, optimizer: Factory, steps: int = 60, stop_at: int | None = None
) -> Descended:
    generator = torch.Generator().manual_seed(3)
    watch = Watch(conduct=Conduct(checkpoints=folder, save_every=0.0))

    def objective(variables: Variables, t: Tensor) -> Tensor:
        if stop_at is not None and float(t) * steps >= stop_at:
            watch.stop()
        return wave(variables, t)

    return descent.descend(
        objective, START, candidates=2, optimizer=optimizer, steps=steps, watch=watch,
        schedule=descent.cosine_decay(), generators=(generator,), report_every=10,
        after=(descent.langevin(0.5, "x", generator=generator),),
    )  # fmt: skip


@pytest.mark.parametrize(
    "optimizer",
    [
        descent.adam(0.05),
        descent.sgd(0.02, momentum=0.9),
        descent.lbfgs(0.1, inner=2),
        descent.lbfgs(0.1, inner=2, line_search=True),
    ],
    ids=["adam", "sgd", "batched lbfgs", "line search"],
)
@pytest.mark.parametrize("stop_at", [20, 37])
def test_a_stopped_run_ends_bit_for_bit_like_an_uninterrupted_one(
    tmp_path: Path, optimizer: Factory, stop_at: int
) -> None:
    whole = search(None, optimizer=optimizer)
    search(tmp_path, optimizer=optimizer, stop_at=stop_at)
    resumed = search(tmp_path, optimizer=optimizer)
    for name in START:
        assert torch.equal(resumed.best[name], whole.best[name])
        assert torch.equal(resumed.last[name], whole.last[name])
    assert torch.equal(resumed.criterion, whole.criterion)
    assert resumed.steps == whole.steps


def test_a_finished_descent_is_not_run_again(tmp_path: Path) -> None:
    first = search(tmp_path, optimizer=descent.adam(0.05))
    again = search(tmp_path, optimizer=descent.adam(0.05), stop_at=0)
    assert torch.equal(first.best["x"], again.best["x"])
    assert torch.equal(first.trace, again.trace)


def test_a_checkpoint_of_another_run_is_discarded(tmp_path: Path) -> None:
    search(tmp_path, optimizer=descent.adam(0.05))
    with pytest.warns(DamagedFile, match="belongs to another run"):
        again = search(tmp_path, optimizer=descent.adam(0.05), steps=61)
    assert torch.equal(
        again.best["x"], search(None, optimizer=descent.adam(0.05), steps=61).best["x"]
    )


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"cos\nsystem\n(S'true'\ntR."])
def test_a_damaged_or_evil_checkpoint_is_discarded_by_name(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "0001.pt").write_bytes(content)
    with pytest.warns(DamagedFile, match=r"0001\.pt was discarded: it fails its SHA-256"):
        again = search(tmp_path, optimizer=descent.adam(0.05))
    assert torch.equal(again.best["x"], search(None, optimizer=descent.adam(0.05)).best["x"])


@pytest.mark.parametrize("kept", [0.5, 0.999])
def test_a_truncated_checkpoint_is_not_gone_on_from(tmp_path: Path, kept: float) -> None:
    search(tmp_path, optimizer=descent.adam(0.05), stop_at=20)
    content = (tmp_path / "0001.pt").read_bytes()
    (tmp_path / "0001.pt").write_bytes(content[: int(kept * len(content))])
    with pytest.warns(DamagedFile):
        again = search(tmp_path, optimizer=descent.adam(0.05))
    assert torch.equal(again.best["x"], search(None, optimizer=descent.adam(0.05)).best["x"])


def test_every_flipped_bit_is_noticed(tmp_path: Path) -> None:
    search(tmp_path, optimizer=descent.adam(0.05), stop_at=20)
    content = (tmp_path / "0001.pt").read_bytes()
    generator = torch.Generator().manual_seed(0)
    for place in torch.randint(len(content), (25,), generator=generator).tolist():
        flipped = bytearray(content)
        flipped[place] ^= 1 << (place % 8)
        (tmp_path / "0001.pt").write_bytes(flipped)
        with pytest.warns(DamagedFile):
            assert saved.load(tmp_path / "0001.pt", "", [], START, 2) is None
        assert not (tmp_path / "0001.pt").exists()


def test_a_foreign_file_is_discarded(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    torch.save({"weights": torch.zeros(1)}, buffer)
    seal(tmp_path / "0001.pt", buffer.getvalue())
    with pytest.warns(DamagedFile, match="not a checkpoint of a descent"):
        search(tmp_path, optimizer=descent.adam(0.05))


def test_a_descent_that_the_clock_ended_goes_on_with_more_time(tmp_path: Path) -> None:
    def descended(seconds: float | None) -> Descended:
        watch = Watch(seconds, conduct=Conduct(checkpoints=tmp_path, save_every=1e9))
        return descent.descend(
            wave_of, {"x": START["x"][0]}, optimizer=descent.adam(0.05), steps=40, watch=watch
        )

    def wave_of(variables: Variables, t: Tensor) -> Tensor:
        return wave(variables, torch.zeros(()))

    short = descended(1e-9)  # a single step, however fast the machine is
    assert short.steps == 1
    whole = descended(None)
    assert whole.steps == 40
    direct = descent.descend(
        wave_of, {"x": START["x"][0]}, optimizer=descent.adam(0.05), steps=40, watch=Watch()
    )
    assert torch.equal(whole.best["x"], direct.best["x"])


def test_without_room_for_a_checkpoint_the_descent_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("leakatlas.sealed.write_whole", full)
    with pytest.warns(UserWarning, match="No space left on device"):
        found = search(tmp_path, optimizer=descent.adam(0.05))
    assert torch.equal(found.best["x"], search(None, optimizer=descent.adam(0.05)).best["x"])


def test_views_that_differ_do_not_share_a_checkpoint(tmp_path: Path) -> None:
    """Same attack, same seed, same folder: only the private image differs."""
    attack = InvertingGradients(steps=5)
    found = []
    for index in (0, 1):
        stage = build_stage(
            model="lenet", settings={"width": 4}, letter="B", examples=1,
            victims=data.photos(8).subset([index]), grants=frozenset({Grant.LABELS}),
        )  # fmt: skip
        view = stage.view([stage.federation.play_round()])
        conduct = Conduct(checkpoints=tmp_path)
        found.append(attack(view, watch=Watch(conduct=conduct)).notes["matching_loss"])
        again = attack(view, watch=Watch(conduct=Conduct(checkpoints=tmp_path)))
        assert again.notes["matching_loss"] == found[-1]
    assert found[0] != found[1]
    assert len(list(tmp_path.glob("*/0001.pt"))) == 2


PROGRAM = """
import os
import signal
import sys
from pathlib import Path
import torch
from leakatlas.attacks.optimization.basic.inverting_gradients import InvertingGradients
from leakatlas.blocks.descent import saved
from leakatlas.blocks.watch import Conduct, Watch
from leakatlas.fl import View

folder, out, killed = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3] == "killed"
if killed:  # in the middle, after the third checkpoint
    save, kept = saved.save, []
    def save_and_die(*args, **kwargs):
        save(*args, **kwargs)
        kept.append(1)
        if len(kept) == 3:
            os.kill(os.getpid(), signal.SIGKILL)
    saved.save = save_and_die
torch.set_num_threads(1)
attack = InvertingGradients(steps=75, restarts=2)
conduct = Conduct(checkpoints=folder / "progress", save_every=0.0)
found = attack(View.load(folder), seed=1, watch=Watch(conduct=conduct))
torch.save(found.images, out)
"""


def test_kill_9_in_the_middle_loses_nothing(tmp_path: Path) -> None:
    stage = build_stage(
        model="lenet", settings={"width": 4}, letter="B", grants=frozenset({Grant.LABELS})
    )
    view = stage.view([stage.federation.play_round()])
    view.save(tmp_path)
    (tmp_path / "whole").mkdir()
    view.save(tmp_path / "whole")

    def command(folder: Path, out: str, how: str) -> list[str]:
        return [sys.executable, "-c", PROGRAM, str(folder), str(tmp_path / out), how]

    subprocess.run(command(tmp_path / "whole", "whole.pt", "whole"), check=True)
    victim = subprocess.run(command(tmp_path, "killed.pt", "killed"), check=False)
    assert victim.returncode == -signal.SIGKILL
    assert list((tmp_path / "progress").glob("*/0001.pt"))
    assert not (tmp_path / "killed.pt").exists()
    subprocess.run(command(tmp_path, "resumed.pt", "resumed"), check=True)
    whole = torch.load(tmp_path / "whole.pt", weights_only=True)
    assert torch.equal(torch.load(tmp_path / "resumed.pt", weights_only=True), whole)
