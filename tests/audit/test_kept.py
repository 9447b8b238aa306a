"""What an audit keeps in its folder, and when it is believed."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from leakatlas import sealed
from leakatlas.attacks.optimization.basic.inverting_gradients import InvertingGradients
from leakatlas.audit import Plan, Run, Watch, carry_out
from leakatlas.audit import kept as kept_runs
from leakatlas.audit.jobs import Job, run_job
from leakatlas.audit.listener import Silent
from leakatlas.errors import InvalidInput
from leakatlas.fl import ModelRef
from leakatlas.sealed import DamagedFile


@pytest.fixture
def quick(small_plan: Plan) -> Plan:
    """One attack of a few milliseconds."""
    setting = replace(small_plan.settings[0], attacks=("robbing_the_fed",))
    return replace(small_plan, settings=(setting,), letters=("G",), attack_parameters={})


def clock(plan: Plan, out: Path) -> list[float]:
    """The clock reading of every run: the same only if it was not made again."""
    return [run.seconds for run in carry_out(plan, out=out).runs]


def test_a_finished_run_is_not_made_again(quick: Plan, tmp_path: Path) -> None:
    assert clock(quick, tmp_path) == clock(quick, tmp_path)


def other_budget(plan: Plan) -> Iterator[Plan]:
    yield replace(plan, seconds=601.0)


def other_seed(plan: Plan) -> Iterator[Plan]:
    yield replace(plan, seed=1)


def other_execution(plan: Plan) -> Iterator[Plan]:
    yield replace(plan, execution="eager")


def other_threads(plan: Plan) -> Iterator[Plan]:
    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)
    yield plan
    torch.set_num_threads(before)


def other_victims(plan: Plan) -> Iterator[Plan]:
    setting = plan.settings[0]
    brighter = replace(setting.victims, images=(setting.victims.images * 0.99))
    yield replace(plan, settings=(replace(setting, victims=brighter),))


def other_surrogate(plan: Plan) -> Iterator[Plan]:
    yield replace(plan, settings=(replace(plan.settings[0], surrogate=None),))


def other_parameters(plan: Plan) -> Iterator[Plan]:
    yield replace(plan, attack_parameters={"robbing_the_fed": {"bins": 32}})


def other_weights(plan: Plan) -> Iterator[Plan]:
    with torch.no_grad():
        next(plan.settings[0].model.parameters()).mul_(1.01)
    yield plan


@pytest.mark.parametrize(
    "change",
    [other_budget, other_seed, other_execution, other_threads, other_victims, other_surrogate,
     other_parameters, other_weights],
    ids=lambda change: change.__name__,
)  # fmt: skip
def test_whatever_can_change_the_answer_makes_another_run(
    quick: Plan, tmp_path: Path, change: Callable[[Plan], Iterator[Plan]]
) -> None:
    first = clock(quick, tmp_path)
    changed = change(quick)
    assert clock(next(changed), tmp_path) != first
    assert next(changed, None) is None


def test_the_source_of_the_users_model_is_part_of_the_key(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    file.write_text("def make(): ...\n")
    first = kept_runs.source_hash(model, f"{file}:make")
    assert kept_runs.source_hash(model, f"{file}:make") == first
    file.write_text("def make(): return 1\n")
    assert kept_runs.source_hash(model, f"{file}:make") != first
    wider = nn.Sequential(nn.Flatten(), nn.ReLU(), nn.Linear(4, 2))
    assert kept_runs.source_hash(wider, f"{file}:make") != kept_runs.source_hash(
        model, f"{file}:make"
    )


def test_a_live_models_own_file_is_part_of_the_key(
    quick: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "code"
    folder.mkdir()
    (folder / "own_model.py").write_text(
        "from torch import nn\nclass Own(nn.Sequential):\n    scale = 1\n"
    )
    monkeypatch.syspath_prepend(str(folder))
    import own_model  # type: ignore[import-not-found]  # written a line above

    model = own_model.Own(nn.Flatten(), nn.Linear(3072, 8), nn.ReLU(), nn.Linear(8, 8))
    setting = replace(quick.settings[0], model=model, model_ref=ModelRef("object", "Own"))
    plan = replace(quick, settings=(setting,))
    first = clock(plan, tmp_path / "out")
    assert clock(plan, tmp_path / "out") == first
    (folder / "own_model.py").write_text("# another scale\n")
    assert clock(plan, tmp_path / "out") != first


def altered(content: str) -> str:
    return content.replace('"verdict": "exact leak"', '"verdict": "not demonstrated"')


def truncated(content: str) -> str:
    return content[: len(content) // 2]


def emptied(content: str) -> str:
    return ""


def without_scores(content: str) -> str:
    values = json.loads(content)
    values["run"]["scores"] = {}
    return json.dumps(values)


@pytest.mark.parametrize("damage", [altered, truncated, emptied, without_scores])
def test_a_damaged_run_is_discarded_with_a_warning_and_made_again(
    quick: Plan, tmp_path: Path, damage: Callable[[str], str]
) -> None:
    carry_out(quick, out=tmp_path)
    (file,) = (tmp_path / "runs").glob("*.json")
    whole = file.read_text()
    file.write_text(damage(whole))
    assert file.read_text() != whole
    with pytest.warns(DamagedFile, match=rf"{file.name} was discarded"):
        again = carry_out(quick, out=tmp_path)
    assert again.runs[0].verdict == "exact leak" and not again.undecided()


def test_damaged_pictures_are_noticed(quick: Plan, tmp_path: Path) -> None:
    first = clock(quick, tmp_path)
    (file,) = (tmp_path / "runs").glob("*.safetensors")
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.warns(DamagedFile, match="SHA-256"):
        assert clock(quick, tmp_path) != first
    file.unlink()
    with pytest.warns(DamagedFile, match="pictures are missing"):
        clock(quick, tmp_path)


def descending(plan: Plan, budget: float | None, allowance: float | None, out: Path | None) -> Run:
    """One descent of 40 steps, with so many seconds."""
    setting = replace(plan.settings[0], attacks=("inverting_gradients",))
    job = Job(setting, InvertingGradients(steps=40), "B", 0)
    return run_job(job, replace(plan, seconds=budget), allowance, out, Silent(), Watch())


def test_a_cut_short_run_goes_on_with_more_time(
    small_plan: Plan, tmp_path: Path, cache: Path
) -> None:
    whole = descending(small_plan, 60.0, None, None)
    assert whole.status == "complete"
    short = descending(small_plan, 1.0, 1e-9, tmp_path)
    assert short.status == "cut short" and short.scores != whole.scores
    same = descending(small_plan, 1.0, None, tmp_path)
    assert same == replace(short, pictures=same.pictures)  # the same budget: not made again
    assert list((cache / "progress").glob("*/*/*.pt"))
    longer = descending(small_plan, 60.0, None, tmp_path)
    assert longer.status == "complete" and longer.scores != short.scores
    assert not list((cache / "progress").glob("*"))


def test_a_truncated_checkpoint_gives_no_all_clear(
    small_plan: Plan, tmp_path: Path, cache: Path
) -> None:
    whole = descending(small_plan, 60.0, None, None)
    descending(small_plan, 1.0, 1e-9, tmp_path)
    (file,) = (cache / "progress").glob("*/*/0001.pt")
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.warns(DamagedFile, match=r"0001\.pt"):
        again = descending(small_plan, 60.0, None, tmp_path)
    assert (again.status, again.scores) == ("complete", whole.scores)


def test_a_second_audit_on_one_folder_is_refused_at_once_and_in_words(
    quick: Plan, tmp_path: Path
) -> None:
    class Intruder(Silent):
        words = ""

        def done(self, run: Run) -> None:
            with pytest.raises(InvalidInput) as refusal:
                carry_out(quick, out=tmp_path)
            self.words = str(refusal.value)

    listener = Intruder()
    assert carry_out(quick, out=tmp_path, listener=listener).complete
    assert "Another audit is writing to" in listener.words and "--out" in listener.words


def test_the_lock_of_a_dead_process_is_taken_over(quick: Plan, tmp_path: Path) -> None:
    program = (
        "import os, sys; from pathlib import Path; from leakatlas.audit import kept;"
        "kept.alone(Path(sys.argv[1])).__enter__(); os.kill(os.getpid(), 9)"
    )
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=False)
    assert done.returncode == -9 and (tmp_path / kept_runs.LOCK).exists()
    assert carry_out(quick, out=tmp_path).complete


def no_room(file: Path, content: bytes) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_loses_nothing_and_decides_nothing(
    quick: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sealed, "write_whole", no_room)
    report = carry_out(quick, out=tmp_path)
    assert report.runs[0].verdict == "exact leak"  # what was found is in the report object
    reasons = " ".join(report.undecided())
    assert "No space left on device" in reasons and "make room and repeat" in reasons
    monkeypatch.undo()
    assert not carry_out(quick, out=tmp_path).undecided()


def test_a_killed_audit_leaves_a_report_of_what_it_has(small_plan: Plan, tmp_path: Path) -> None:
    seen: list[bool] = []

    class Looking(Silent):
        def done(self, run: Run) -> None:
            file = tmp_path / "report.json"
            if file.exists():
                values = json.loads(file.read_text())
                seen.append(values["complete"])
                assert len([r for r in values["runs"] if r["scores"]]) >= 1

    carry_out(small_plan, out=tmp_path, listener=Looking())
    assert seen == [False]  # before the second run was over, the first was in the report
    assert json.loads((tmp_path / "report.json").read_text())["complete"] is True


def test_reconstructions_are_pictures_named_by_setting_attack_and_image(
    small_plan: Plan, tmp_path: Path
) -> None:
    from PIL import Image

    report = carry_out(small_plan, out=tmp_path)
    file = tmp_path / "reconstructions" / "one-photo" / "robbing_the_fed" / "client-0-image-0.png"
    with Image.open(file) as image:
        assert image.size == (32, 32)
        pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    truth = small_plan.settings[0].victims.images[0].permute(1, 2, 0).mul(255).round().byte()
    exact = next(run for run in report.runs if run.attack == "robbing_the_fed")
    assert exact.verdict == "exact leak"
    assert int((pixels.int() - truth.flatten().int()).abs().max()) <= 1
