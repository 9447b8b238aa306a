"""Updates that a real system recorded: arrays, state dicts, files; with and without the images.

Each case is a public question of somebody who held what a server had received, in other words and
numbers. The updates are made here by plain PyTorch, not by LeakAtlas.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from typer.testing import CliRunner

import leakatlas
from leakatlas.audit import doctor
from leakatlas.audit.intake import read_capture
from leakatlas.cli import app
from leakatlas.errors import InvalidInput, ProtocolError
from leakatlas.fl import FedAVG, FedSGD, Update, model_state
from leakatlas.fl.capture import Capture, CapturedRound

SIZE, CLASSES = 8, 4


def _net() -> nn.Sequential:
    torch.manual_seed(11)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.Sigmoid(), nn.Flatten(),
        nn.Linear(6 * SIZE * SIZE, CLASSES),
    )  # fmt: skip


def _batch(count: int = 4) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    return torch.rand(count, 3, SIZE, SIZE, generator=generator), torch.arange(count) % CLASSES


PROTOCOL = FedAVG(epochs=2, batch_size=2, lr=0.05)


def _round() -> tuple[nn.Module, nn.Module]:
    """A model before and after a client's plain PyTorch training."""
    images, labels = _batch()
    before = _net()
    after = copy.deepcopy(before).train()
    optimizer = torch.optim.SGD(after.parameters(), lr=0.05)
    for _ in range(2):
        for part in torch.arange(4).split(2):
            optimizer.zero_grad()
            nn.functional.cross_entropy(after(images[part]), labels[part]).backward()
            optimizer.step()
    return before, after


def _arrays(model: nn.Module) -> list[Any]:
    """What Flower clients send: one array for each entry of the state, counters among them."""
    return [tensor.numpy() for tensor in model.state_dict().values()]


def _three_ways(tmp_path: Path) -> dict[str, Capture]:
    before, after = _round()
    by_arrays = Update.from_arrays(_arrays(before), _arrays(after), before, num_examples=4)
    by_names = Update.from_state_dicts(
        before.state_dict(), after.state_dict(), before, num_examples=4
    )
    kept = Capture(rounds=(CapturedRound(update=by_names, received=model_state(before)),))
    kept.save(tmp_path / "round.safetensors")
    return {
        "arrays": Capture.of(by_arrays),
        "names": Capture.of(by_names),
        "file": Capture.load(tmp_path / "round.safetensors"),
    }


def test_a_round_given_three_ways_is_one_round(tmp_path: Path) -> None:
    found = {}
    for way, capture in _three_ways(tmp_path).items():
        check = doctor(_net(), _batch(), captured=capture, protocol=PROTOCOL).replay
        report = leakatlas.audit(
            _net(), _batch(), captured=capture, protocol=PROTOCOL, threat="C",
            attacks=["inverting_gradients"], budget="1h", rehearsal=False,
            attack_parameters={"inverting_gradients": {"steps": 5}},
        )  # fmt: skip
        (run,) = report.runs
        assert run.scores is not None and run.pictures is not None, run.reason
        found[way] = (check.residual, run.pictures)
        assert check.residual is not None and check.residual < 1e-6
    assert all(torch.equal(found["arrays"][1], pictures) for _, pictures in found.values())


def test_buffers_and_counters_are_sorted_out_by_the_models_own_names() -> None:
    before, after = _round()
    update = Update.from_arrays(_arrays(before), _arrays(after), before, num_examples=4)
    assert list(update.tensors) == [name for name, _ in before.named_parameters()]
    assert float(update.buffers_after["1.num_batches_tracked"]) == 4
    without_counters = [t.numpy() for n, t in before.state_dict().items() if "num" not in n]
    again = Update.from_arrays(
        without_counters, [t.numpy() for n, t in after.state_dict().items() if "num" not in n],
        before, num_examples=4,
    )  # fmt: skip
    assert all(torch.equal(update.tensors[n], again.tensors[n]) for n in update.tensors)


def test_weights_are_the_change_that_they_are_wherever_they_are_read() -> None:
    before, after = _round()
    weights = Update(
        tensors={n: p.detach() for n, p in after.named_parameters()},
        kind="weights", state_hash="", num_examples=4,
    )  # fmt: skip
    check = doctor(before, _batch(), captured=weights, protocol=PROTOCOL).replay
    assert check.residual is not None and check.residual < 1e-5
    with pytest.raises(InvalidInput, match="without the state before"):
        weights.as_delta({})


def test_without_the_images_nothing_is_scored_and_the_adversarys_own_confidence_is_shown(
    tmp_path: Path,
) -> None:
    capture = _three_ways(tmp_path)["file"]
    report = leakatlas.audit(
        _net(), None, captured=capture, input_shape=(3, SIZE, SIZE), protocol=PROTOCOL,
        threat="C", grants=["labels"], attacks=["inverting_gradients", "seer"],
        attack_parameters={"inverting_gradients": {"steps": 5}}, budget="1h", rehearsal=False,
    )  # fmt: skip
    runs = {run.attack: run for run in report.runs}
    tried = runs["inverting_gradients"]
    assert tried.verdict == "not scored" and tried.scores is None
    assert "labels" not in tried.reads  # nobody at hand could grant them
    assert len(tried.confidence) == 4 and tried.pictures is not None
    assert runs["seer"].status == "not applicable" and "is over" in runs["seer"].reason
    assert any("cannot be scored" in reason for reason in report.undecided())
    page = report.save(tmp_path / "report").read_text()
    assert "adversary's own confidence" in page and "was not checked" in page
    (diagnosis,) = report.diagnoses.values()
    assert diagnosis["replay"]["residual"] is None and diagnosis["outlooks"]
    with pytest.raises(InvalidInput, match="input_shape="):
        leakatlas.audit(_net(), captured=capture)


def test_yaml_attacks_what_was_captured(tmp_path: Path) -> None:
    """The key was once ignored without a word, and a simulated update attacked instead."""
    before, _ = _round()
    save_file(
        {n: t.contiguous() for n, t in before.state_dict().items()}, tmp_path / "w.safetensors"
    )
    _three_ways(tmp_path)
    (tmp_path / "net.py").write_text(
        "import torch\nfrom torch import nn\n"
        "def make():\n    return nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), "
        f"nn.Sigmoid(), nn.Flatten(), nn.Linear({6 * SIZE * SIZE}, {CLASSES}))\n"
    )
    (tmp_path / "audit.yaml").write_text(
        f"model: {{python: 'net.py:make', weights: w.safetensors}}\n"
        f"data: {{victims: none, shape: [3, {SIZE}, {SIZE}]}}\n"
        "protocol: {algorithm: fedavg, epochs: 2, batch_size: 2, lr: 0.05}\n"
        "captured: round.safetensors\nthreat: C\nattacks: [inverting_gradients]\n"
        "attack_parameters: {inverting_gradients: {steps: 5}}\nbudget: 1h\nrehearsal: false\n"
    )
    out = tmp_path / "out"
    done = CliRunner().invoke(app, ["audit", str(tmp_path / "audit.yaml"), "--out", str(out)])
    assert done.exit_code in (0, 3), done.output
    values = json.loads((out / "report.json").read_text())
    assert values["facts"]["settings"][0]["captured"]["examples"] == 4
    assert [run["verdict"] for run in values["runs"]] == ["not scored"]


def test_a_round_that_is_over_cannot_be_tampered_with() -> None:
    before, after = _round()
    update = Update.from_arrays(_arrays(before), _arrays(after), before, num_examples=4)
    from leakatlas.audit import Setting
    from leakatlas.data import Box, ImageSet
    from leakatlas.fl import ModelRef, TamperedModel

    images, labels = _batch()
    setting = Setting(
        name="real", model=before, model_ref=ModelRef("object", "net"), protocol=PROTOCOL,
        victims=ImageSet(images, labels, tuple("abcd"), "batch"), box=Box.unit(3),
        captured=Capture.of(update),
    )  # fmt: skip
    live = setting.stage(letter="F", seed=0)
    with pytest.raises(ProtocolError, match="captured from a round that is over"):
        live.federation.play_round(sent=TamperedModel())
    with pytest.raises(InvalidInput, match=r"says that 4 examples .* the batch holds 3"):
        doctor(before, _batch(3), captured=update, protocol=PROTOCOL)


# -- files -----------------------------------------------------------------------------------------


def _gradients() -> list[Tensor | None]:
    images, labels = _batch()
    model = _net().eval()
    nn.functional.cross_entropy(model(images), labels).backward()
    return [p.grad for p in model.parameters()]


@pytest.mark.parametrize("form", ["torch list", "torch dict", "npz", "safetensors", "nested"])
def test_gradients_come_in_from_files_of_every_kind(form: str, tmp_path: Path) -> None:
    gradients = [g for g in _gradients() if g is not None]
    named = dict(zip(dict(_net().named_parameters()), gradients, strict=True))
    path = tmp_path / {"npz": "g.npz", "safetensors": "g.safetensors"}.get(form, "g.pt")
    if form == "torch list":
        torch.save(gradients, path)
    elif form == "torch dict":
        torch.save({f"module.{n}": t for n, t in named.items()}, path)
    elif form == "nested":
        torch.save({"round": 3, "grads": named}, path)
    elif form == "npz":
        np.savez(path, *[g.numpy() for g in gradients])
    else:
        save_file(named, path)
    capture = read_capture([path], _net(), num_examples=4, kind="gradient")
    check = doctor(_net(), _batch(), captured=capture, protocol=FedSGD()).replay
    assert check.residual is not None and check.residual < 1e-6, capture.notes


def test_an_entry_that_is_no_array_is_named_with_its_place(tmp_path: Path) -> None:
    gradients: list[Any] = list(_gradients())
    gradients[1] = 0.5
    torch.save(gradients, tmp_path / "g.pt")
    with pytest.raises(InvalidInput, match=r"array 1 has shape \(\) where '0\.bias' has \(6,\)"):
        read_capture([tmp_path / "g.pt"], _net(), num_examples=4, kind="gradient")
    with pytest.raises(InvalidInput, match=r"list of 2 arrays; .*Make it as .p\.grad"):
        Update.from_gradients(gradients[:2], _net(), num_examples=4)
    with pytest.raises(InvalidInput, match=r"lacks 'conv\.weight'"):
        Update.from_gradients({"conv.weight": torch.zeros(1)}, _net(), num_examples=4)
    (tmp_path / "junk.pt").write_bytes(b"no torch file")
    with pytest.raises(InvalidInput, match="captured file"):
        read_capture([tmp_path / "junk.pt"], _net(), num_examples=4)


def test_the_command_says_what_it_understood(tmp_path: Path) -> None:
    before, after = _round()
    (tmp_path / "net.py").write_text(
        "from torch import nn\n"
        "def make():\n    return nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), "
        f"nn.Sigmoid(), nn.Flatten(), nn.Linear({6 * SIZE * SIZE}, {CLASSES}))\n"
    )
    np.savez(tmp_path / "before.npz", *_arrays(before))
    torch.save(after.state_dict(), tmp_path / "after.pt")
    arguments = [
        "capture", str(tmp_path / "before.npz"), str(tmp_path / "after.pt"),
        "--model", f"{tmp_path / 'net.py'}:make", "--examples", "4",
        "--out", str(tmp_path / "c.safetensors"),
    ]  # fmt: skip
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert "in the order of state_dict()" in done.output and "kind delta" in done.output
    capture = Capture.load(tmp_path / "c.safetensors")
    check = doctor(_net(), _batch(), captured=capture, protocol=PROTOCOL).replay
    assert check.residual is not None and check.residual < 1e-6
    unclear = CliRunner().invoke(app, [*arguments[:1], *arguments[2:]])
    assert unclear.exit_code == 0 and "kind weights (found out" in unclear.output.replace("\n", " ")
