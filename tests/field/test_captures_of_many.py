"""What a server keeps when it keeps means of clients, and more than one round.

Only the average of the clients was stored, or a log of several rounds of one client. Rounds and
means are made here by plain PyTorch.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

import leakatlas
from leakatlas.audit import doctor
from leakatlas.cli import app
from leakatlas.errors import InvalidInput
from leakatlas.fl import FedAVG, FedSGD, Update, model_state
from leakatlas.fl.capture import Capture, CapturedRound

PROTOCOL = FedAVG(epochs=2, batch_size=1, lr=0.1)
CLIENTS, EACH = 3, 2


def _net() -> nn.Sequential:
    torch.manual_seed(21)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, stride=2), nn.Tanh(), nn.Flatten(), nn.Linear(4 * 3 * 4, 5)
    )


def _batch(count: int = CLIENTS * EACH, seed: int = 4) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(count, 1, 7, 9, generator=generator)
    return images, torch.randint(5, (count,), generator=generator)


def _trained(before: nn.Module, images: Tensor, labels: Tensor) -> nn.Module:
    after = copy.deepcopy(before)
    optimizer = torch.optim.SGD(after.parameters(), lr=0.1)
    for _ in range(2):
        for x, y in zip(images.split(1), labels.split(1), strict=True):
            optimizer.zero_grad()
            nn.functional.cross_entropy(after(x), y).backward()
            optimizer.step()
    return after


def _mean_of_states(models: Sequence[nn.Module]) -> dict[str, Tensor]:
    states = [model.state_dict() for model in models]
    return {name: torch.stack([s[name] for s in states]).mean(0) for name in states[0]}


def _average() -> Update:
    images, labels = _batch()
    clients = [
        _trained(_net(), x, y) for x, y in zip(images.split(EACH), labels.split(EACH), strict=True)
    ]
    return Update.from_state_dicts(
        _net().state_dict(), _mean_of_states(clients), _net(),
        num_examples=CLIENTS * EACH, clients=CLIENTS,
    )  # fmt: skip


def test_the_mean_of_three_clients_is_checked_against_all_their_images() -> None:
    found = doctor(_net(), _batch(), captured=_average(), protocol=PROTOCOL).replay
    assert found.residual is not None and found.residual < 1e-6
    images, labels = _batch()
    turned = doctor(_net(), (images, labels.roll(1)), captured=_average(), protocol=PROTOCOL).replay
    assert turned.culprit == "labels" and not turned.expected


def test_it_is_attacked_as_a_mean_and_scored_against_everybody() -> None:
    report = leakatlas.audit(
        _net(), _batch(), captured=_average(), protocol=PROTOCOL, threat="C", grants=["labels"],
        attacks=["inverting_gradients"], budget="1h", rehearsal=False,
        attack_parameters={"inverting_gradients": {"steps": 3}},
    )  # fmt: skip
    (run,) = report.runs
    assert run.status == "complete", run.reason
    assert run.vantage == "aggregate"
    assert run.scores is not None and len(run.scores.images) == CLIENTS * EACH
    assert report.facts["settings"][0]["captured"]["averaged"] == CLIENTS


def test_one_clients_images_are_held_against_the_mean_but_cannot_explain_it() -> None:
    images, labels = _batch()
    own = (images[:EACH], labels[:EACH])
    found = doctor(_net(), own, captured=_average(), protocol=PROTOCOL).replay
    assert found.residual is None and "mean of 3 clients" in found.explanation
    report = leakatlas.audit(
        _net(), own, captured=_average(), protocol=PROTOCOL, threat="C",
        attacks=["inverting_gradients"], budget="1h", rehearsal=False,
        attack_parameters={"inverting_gradients": {"steps": 3, "labels": (0, 1, 2, 3, 4, 0)}},
    )  # fmt: skip
    (run,) = report.runs
    assert run.scores is not None and len(run.scores.images) == EACH, run.reason


def test_without_images_a_mean_is_attacked_and_not_scored() -> None:
    report = leakatlas.audit(
        _net(), captured=_average(), input_shape=(1, 7, 9), protocol=PROTOCOL, threat="C",
        attacks=["inverting_gradients"], budget="1h", rehearsal=False,
        attack_parameters={"inverting_gradients": {"steps": 3, "labels": (0, 1, 2, 3, 4, 0)}},
    )  # fmt: skip
    (run,) = report.runs
    assert (run.verdict, len(run.confidence)) == ("not scored", CLIENTS * EACH), run.reason


def test_a_number_of_images_that_fits_nobody_is_refused_with_those_that_do() -> None:
    with pytest.raises(InvalidInput, match=r"holds 4. Give all 6, or 2, those of one of its 3"):
        doctor(_net(), _batch(4), captured=_average(), protocol=PROTOCOL)


# -- several rounds --------------------------------------------------------------------------------


def _log(*, other_first: bool = False) -> Capture:
    """Two rounds of one client that sends a gradient; in between, the global model moved."""
    rounds = []
    model = _net()
    for index in range(2):
        images, labels = _batch(2, seed=9 if other_first and index == 0 else 4)
        loss = nn.functional.cross_entropy(model(images), labels)
        gradients = list(torch.autograd.grad(loss, list(model.parameters())))
        update = Update.from_gradients(gradients, model, num_examples=2)
        rounds.append(CapturedRound(update=update, received=model_state(model), index=index))
        with torch.no_grad():
            for parameter, g in zip(model.parameters(), gradients, strict=True):
                parameter.sub_(0.5 * g)
    return Capture(rounds=tuple(rounds))


def test_every_round_of_a_log_is_checked_at_its_own_state() -> None:
    found = doctor(_net(), _batch(2), captured=_log(), protocol=FedSGD())
    assert found.replay.residual is not None and found.replay.residual < 1e-6
    assert not any("Round 0" in finding for finding in found.findings)
    other = doctor(_net(), _batch(2), captured=_log(other_first=True), protocol=FedSGD())
    assert other.replay.consistent
    assert any("Round 0 of the capture was computed on other" in f for f in other.findings)


def test_a_log_is_made_of_single_rounds_and_attacked_whole(tmp_path: Path) -> None:
    log = _log()
    files = []
    for one in log.rounds:
        files.append(tmp_path / f"round{one.index}.safetensors")
        Capture(rounds=(one,), notes=("logged",)).save(files[-1])
    (tmp_path / "net.py").write_text(
        "from torch import nn\ndef make():\n"
        "    return nn.Sequential(nn.Conv2d(1, 4, 3, stride=2), nn.Tanh(), nn.Flatten(), "
        "nn.Linear(48, 5))\n"
    )
    arguments = [
        "capture", *map(str, files), "--model", f"{tmp_path / 'net.py'}:make", "--examples", "2",
        "--out", str(tmp_path / "log.safetensors"),
    ]  # fmt: skip
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    again = Capture.load(tmp_path / "log.safetensors")
    assert [one.index for one in again.rounds] == [0, 1] and again.notes == ("logged",)
    report = leakatlas.audit(
        _net(), _batch(2), captured=again, threat="B", attacks=["inverting_gradients"],
        budget="1h", rehearsal=False, attack_parameters={"inverting_gradients": {"steps": 3}},
    )  # fmt: skip
    (run,) = report.runs
    assert run.status == "complete" and run.rounds == 2 and run.scores is not None
    assert report.facts["settings"][0]["captured"]["rounds"] == 2


def test_files_that_are_neither_states_nor_captures_are_refused(tmp_path: Path) -> None:
    files = [tmp_path / f"{i}.pt" for i in range(3)]
    for file in files:
        torch.save(_net().state_dict(), file)
    arguments = ["capture", *map(str, files), "--model", "lenet", "--examples", "2"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 2 and "got 3 files that are no captures" in done.output
