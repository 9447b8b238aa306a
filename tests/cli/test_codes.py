"""Exit codes: nothing ends as "fine" by accident."""

from __future__ import annotations

import errno
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from leakatlas import cli
from leakatlas.cli import codes
from leakatlas.errors import InvalidInput, Undecided

Typed = Callable[..., tuple[int, str]]

MODEL = {"builtin": "fc", "kwargs": {"in_channels": 3, "size": 32, "classes": 8, "widths": [8]}}
QUICK: dict[str, Any] = {
    "model": MODEL,
    "data": {"victims": "photos", "limit": 1},
    "attacks": ["robbing_the_fed"],
    "threat": "G",
    "budget": "10m",
}


@pytest.fixture
def typed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Typed:
    """Types a command; its exit code, and what it said on standard error."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "400")

    def run(*arguments: str, **changes: Any) -> tuple[int, str]:
        if changes or arguments[:1] == ("audit",):
            (tmp_path / "audit.yaml").write_text(yaml.safe_dump(QUICK | changes))
        monkeypatch.setattr(sys, "argv", ["leakatlas", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert isinstance(ended.value.code, int)
        return ended.value.code, capsys.readouterr().err

    return run


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Callable[[BaseException], None]:
    """Makes the next command raise something."""

    def make(problem: BaseException) -> None:
        def raise_it(self: Any, ctx: Any) -> None:
            raise problem

        monkeypatch.setattr(typer.core.TyperGroup, "invoke", raise_it)

    return make


@pytest.mark.parametrize(
    ("problem", "code", "words"),
    [
        (InvalidInput("no such file"), 2, "InvalidInput: no such file"),
        (Undecided("nothing ran"), 3, "Undecided: nothing ran"),
        (SystemExit(0), 3, "ended the process with sys.exit(0)"),
        (KeyboardInterrupt(), 3, "the same command continues"),
        (OSError(errno.ENOSPC, "No space left on device"), 2, "No room to write"),
        (ZeroDivisionError("division by zero"), 4, "A defect of LeakAtlas: ZeroDivisionError"),
        (OSError(errno.EIO, "I/O error"), 4, "A defect of LeakAtlas"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else None,
)
def test_every_end_has_its_code(
    typed: Typed,
    failing: Callable[[BaseException], None],
    problem: BaseException,
    code: int,
    words: str,
) -> None:
    failing(problem)
    ended, said = typed("list")
    assert ended == code and words in said
    assert "Traceback" not in said


def test_a_reader_that_went_away_is_no_code_under_audit(
    typed: Typed, failing: Callable[[BaseException], None]
) -> None:
    """What rich raises where nobody reads standard output any more."""
    end = SystemExit(1)
    end.__context__ = BrokenPipeError()
    failing(end)
    assert typed("list") == (3, "")


def test_a_defect_leaves_a_file_to_attach(
    typed: Typed, failing: Callable[[BaseException], None], tmp_path: Path
) -> None:
    failing(RuntimeError("unexpected [/bold]"))
    _, said = typed("list", "--json")
    (file,) = tmp_path.glob("leakatlas-defect-*.txt")
    assert file.name in said and "attach" in said and "unexpected [/bold]" in said
    text = file.read_text()
    assert "RuntimeError: unexpected" in text and "raise_it" in text
    assert "LeakAtlas 0" in text and "leakatlas list --json" in text


def test_a_defect_in_a_folder_that_cannot_be_written_is_still_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(self: Path, *arguments: Any, **more: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_text", full)
    assert "nowhere" in str(codes.write_trace(ValueError()))


def test_mistyped_commands_are_bad_input(typed: Typed) -> None:
    assert typed("audit", "--no-such-option")[0] == 2
    assert typed("no-such-command")[0] == 2


def test_a_letter_without_an_attack_is_undecided_until_it_is_allowed(typed: Typed) -> None:
    ended, said = typed("audit", "audit.yaml", "--out", "out", threat="A,G")
    assert ended == 3 and "Undecided: nothing was tried for letter A." in said
    assert "not tested" in said
    ended, said = typed("audit", "audit.yaml", "--out", "out", "--allow-undecided", threat="A,G")
    assert ended == 0 and "Undecided: nothing was tried for letter A." in said  # still said
    ended, _ = typed("audit", "audit.yaml", "--out", "out", threat="G")
    assert ended == 0


def test_a_condition_that_holds_outweighs_what_is_undecided(typed: Typed) -> None:
    ended, said = typed(
        "audit", "audit.yaml", "--out", "out", "--fail-on", "exact > 0", threat="A,G"
    )
    assert ended == 1 and "Failed: exact > 0 (it is 1)." in said


@pytest.mark.parametrize("attacks", [[], ["rgap"]], ids=["none", "none that fits"])
def test_attacks_that_do_not_run_are_no_pass(typed: Typed, attacks: list[str]) -> None:
    ended, said = typed(
        "audit", "audit.yaml", "--out", "out", "--fail-on", "P(psnr > 20 dB) > 0.05",
        threat="A", attacks=attacks,
    )  # fmt: skip
    assert ended == 3 and "nothing was tried for letter A" in said


@pytest.mark.parametrize("call", ["sys.exit(0)", "os._exit(0)"])
@pytest.mark.parametrize("place", ["import", "factory", "forward"])
def test_a_model_file_that_ends_the_process_is_never_a_pass(
    typed: Typed, tmp_path: Path, place: str, call: str
) -> None:
    ending = {name: call if name == place else "pass"
              for name in ("import", "factory", "forward")}  # fmt: skip
    (tmp_path / "mine.py").write_text(
        "import os, sys\n"
        "from torch import nn\n"
        f"{ending['import']}\n"
        "class Mine(nn.Sequential):\n"
        "    def forward(self, x):\n"
        f"        {ending['forward']}\n"
        "        return super().forward(x)\n"
        "def make():\n"
        f"    {ending['factory']}\n"
        "    return Mine(nn.Flatten(), nn.Linear(3072, 8), nn.ReLU(), nn.Linear(8, 8))\n"
    )
    ended, said = typed("audit", "audit.yaml", "--out", "out", model={"python": "mine.py:make"})
    assert ended in (2, 3) and call in said


def test_a_child_that_was_forked_ends_as_ever(typed: Typed, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "import os, warnings\n"
        "from torch import nn\n"
        "warnings.simplefilter('ignore')  # of forks beside threads\n"
        "child = os.fork()\n"
        "if not child:\n"
        "    os._exit(7)\n"
        "assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7\n"
        "def make():\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(3072, 8), nn.ReLU(), nn.Linear(8, 8))\n"
    )
    assert typed("doctor", "audit.yaml", model={"python": "mine.py:make"})[0] == 0


def test_an_attack_that_crashes_is_named_and_makes_the_audit_undecided(
    typed: Typed, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from leakatlas.attacks.optimization.basic.dlg import DLG

    def crash(self: object, view: object, *, generator: object, watch: object) -> None:
        raise RuntimeError("derivative of [attention] is not implemented")

    monkeypatch.setattr(DLG, "run", crash)
    ended, said = typed("audit", "audit.yaml", "--out", "out", attacks=["dlg", "robbing_the_fed"])
    assert ended == 3
    assert "error: RuntimeError: derivative of [attention] is not implemented" in said
    assert "exact leak" in said  # the other one went on
    runs = json.loads((tmp_path / "out" / "report.json").read_text())["runs"]
    (crashed,) = (run for run in runs if run["attack"] == "dlg")
    assert crashed["status"] == "error" and "in crash" in crashed["trace"]
    page = (tmp_path / "out" / "report.html").read_text()
    assert "derivative of [attention] is not implemented" in page and "Undecided" in page


def test_with_and_without_a_surrogate_the_same_letters_are_tested(
    typed: Typed, tmp_path: Path
) -> None:
    """A surrogate changes what an adversary knows of the population, never whether it is tried."""
    found = {}
    for surrogate in (None, "patches:32:64:surrogate"):
        out = "given" if surrogate else "strangers"
        ended, _ = typed(
            "audit", "audit.yaml", "--out", out,
            data={"victims": "photos", "limit": 1, "surrogate": surrogate},
            attacks=["robbing_the_fed", "loki", "inverting_gradients"],
            attack_parameters={"inverting_gradients": {"steps": 3}},
            threat="B-H",
            fail_on=["P(psnr > 20 dB) > 0.05"],
        )  # fmt: skip
        values = json.loads((tmp_path / out / "report.json").read_text())
        tested = {v["letter"]: v["verdict"] != "not tested" for v in values["verdicts"]}
        statuses = {run["attack"]: run["status"] for run in values["runs"]}
        found[surrogate] = ended, tested, statuses
        page = (tmp_path / out / "report.html").read_text()
        assert ("whose population is a stranger" in page) == (surrogate is None)
    assert len({str(value) for value in found.values()}) == 1
    assert found[None][0] == 1 and all(found[None][1].values())
