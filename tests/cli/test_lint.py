"""``leakatlas lint``, typed as a person types it."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from leakatlas import cli, models
from leakatlas.blocks import readout
from leakatlas.data import bundled
from leakatlas.fl import FedSGD, ModelRef, Scenario, edits, model_state, stage, state_hash

FACTORY = """
from torch import nn
from leakatlas import models
from leakatlas.blocks import readout
from leakatlas.fl import edits
from torchvision.models import VisionTransformer
import torch

def honest():
    return models.build("lenet", size=16, width=4)

def inserted():
    n = 3 * 16 * 16
    block = edits.Imprint(torch.full((n,), 1 / n), readout.bin_edges("normal", 32))
    return edits.Imprinted(block.layers(), honest())

def vision():
    torch.manual_seed(0)
    return VisionTransformer(32, 16, 1, 2, 16, 32, num_classes=10)
"""


class Outcome:
    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, " ".join(out.split()), " ".join(err.split())


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """The command under the real ``main``, which turns errors into exit code 2."""
    monkeypatch.setenv("COLUMNS", "300")

    def typed(*arguments: str | Path) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["leakatlas", "lint", *map(str, arguments)])
        with pytest.raises(SystemExit) as left:
            cli.main()
        captured = capsys.readouterr()
        code = left.value.code
        assert isinstance(code, int)
        return Outcome(code, captured.out, captured.err)

    return typed


def honest() -> nn.Module:
    return models.build("lenet", size=16, width=4)


def tampered() -> nn.Module:
    n = 3 * 16 * 16
    block = edits.Imprint(torch.full((n,), 1 / n), readout.bin_edges("normal", 32))
    return edits.Imprinted(block.layers(), honest())


@pytest.fixture
def files(tmp_path: Path) -> Path:
    save_file(honest().state_dict(), tmp_path / "honest.safetensors")
    save_file(tampered().state_dict(), tmp_path / "tampered.safetensors")
    torch.save(tampered().state_dict(), tmp_path / "tampered.pt")
    (tmp_path / "factory.py").write_text(FACTORY)
    return tmp_path


def test_an_honest_file_is_fine(run: Any, files: Path) -> None:
    result = run(files / "honest.safetensors")
    assert result.code == 0
    assert "No sign of tampering" in result.out
    assert "Not checked:" in result.out and "no batch" in result.out


@pytest.mark.parametrize("name", ["tampered.safetensors", "tampered.pt"])
def test_a_tampered_file_is_an_alarm(run: Any, files: Path, name: str) -> None:
    result = run(files / name)
    assert result.code == 1
    assert "Alarm:" in result.out
    assert "block.first: " in result.out and "all 32 rows are one direction" in result.out
    assert "binning attack of the [28]/[33] kind" in result.out
    assert "Do not train on it" in result.out


def test_json_is_for_machines(run: Any, files: Path) -> None:
    result = run(files / "tampered.safetensors", "--json")
    values = json.loads(result.out)
    assert result.code == 1 and values["alarm"] and "D2" in values["checks"]
    assert values["state_sha256"] == state_hash(tampered().state_dict())
    assert values["scores"]["D2/partners"]["place"].startswith("block.")


def test_a_reference_shows_what_was_added(run: Any, files: Path) -> None:
    result = run(files / "tampered.pt", "--reference", files / "honest.safetensors")
    assert result.code == 1 and "D1/reference" in result.out
    turned = run(files / "tampered.pt", "--previous", files / "honest.safetensors")
    assert turned.code == 1 and "D17/change" in turned.out
    same = run(files / "honest.safetensors", "--reference", files / "honest.safetensors")
    assert same.code == 0


def test_a_batch_runs_the_model(run: Any, files: Path) -> None:
    good = run(f"{files}/factory.py:honest", "--batch", "patches:16:12", "--limit", "12", "--json")
    scores = json.loads(good.out)["scores"]
    assert good.code == 0 and {"D8/d_snr", "D14/hidden"} <= set(scores)
    bad = run(f"{files}/factory.py:inserted", "--batch", "patches:16:12", "--json",
              "--weights", files / "tampered.safetensors")  # fmt: skip
    assert bad.code == 1 and "D2" in json.loads(bad.out)["checks"]


def test_attention_is_read_example_by_example(run: Any, files: Path) -> None:
    found = run(f"{files}/factory.py:vision", "--batch", "patches:32:12", "--json")
    assert found.code == 0 and found.err == "" and "D8/d_snr" in json.loads(found.out)["scores"]


def test_built_in_and_shipped_models(run: Any) -> None:
    assert run("builtin:resnet8").code == 0
    assert "convnet-cifar10" in models.shipped()
    assert run("builtin:convnet-cifar10", "--batch", "photos:32").code == 0


def test_other_clients_are_compared(run: Any, files: Path) -> None:
    honest_file = files / "honest.safetensors"
    digest = state_hash(model_state(honest()))
    assert run(honest_file, "--other", honest_file, "--other", digest).code == 0
    result = run(honest_file, "--other", "0" * 64)
    assert result.code == 1 and "1 of 1 other clients received a different model" in result.out


def test_an_update_about_to_be_sent(run: Any, files: Path, tmp_path: Path) -> None:
    images = bundled.patches(16, 8)
    made = stage(
        Scenario(model=ModelRef("object", "LeNet"), examples=8, protocol=FedSGD()),
        model=honest(), victims=images,
    )  # fmt: skip
    file = tmp_path / "update.safetensors"
    made.federation.play_round().updates[0].save(file)
    model = f"{files}/factory.py:honest"
    result = run(model, "--weights", files / "honest.safetensors", "--batch", "patches:16:8",
                 "--update", file)  # fmt: skip
    assert result.code == 0
    alone = run(model, "--update", file)
    assert alone.code == 2 and "give `batch` beside `update`" in alone.err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("nowhere.safetensors",), "does not exist"),
        (("{files}/truncated.safetensors",), "may be truncated"),
        (("{files}/code.pt",), "not a file of plain tensors"),
        (("builtin:lenett",), "Unknown model 'lenett'. Did you mean 'lenet'"),
        (("nowhere.py:factory",), "does not exist"),
        (("{files}/factory.py:absent",), "Unknown model factory"),
        (
            ("{files}/honest.safetensors", "--batch", "photos:16"),
            "a state dict alone cannot be run",
        ),
        (("{files}/honest.safetensors", "--weights", "x"), "does not exist"),
        (("{files}/honest.safetensors", "--weights", "{files}/tampered.pt"), "weights already"),
        (("builtin:lenet", "--weights", "{files}/tampered.pt"), "this LeNet expects"),
        (("builtin:lenet", "--mean", "0.5"), "--mean and --std go together"),
        (("builtin:lenet", "--mean", "a", "--std", "1"), "one number for each channel"),
        (("builtin:lenet", "--limit", "0"), "--limit 0"),
        (("builtin:lenet", "--other", "abc"), "64 hexadecimal digits"),
        (("builtin:lenet", "--batch", "phots"), "Did you mean 'photos'"),
        (("{files}/factory.py:honest", "--batch", "photos:24"), "photos:16"),
        (("{files}/factory.py:vision", "--batch", "photos:16"), "photos:32"),
    ],
)
def test_bad_input_leaves_with_2_and_says_the_way_out(
    run: Any, files: Path, arguments: tuple[str, ...], words: str
) -> None:
    content = (files / "honest.safetensors").read_bytes()
    (files / "truncated.safetensors").write_bytes(content[: len(content) // 2])
    torch.save({"model": nn.Linear(2, 2)}, files / "code.pt")
    result = run(*(argument.format(files=files) for argument in arguments))
    assert result.code == 2
    assert words in result.err and result.out == ""


def test_markup_in_a_file_of_weights_is_shown_as_it_is(run: Any, tmp_path: Path) -> None:
    state = {"[red]evil[/].weight": torch.ones(64, 64), "[/].bias": torch.zeros(3)}
    save_file(state, tmp_path / "odd.safetensors")
    result = run(tmp_path / "odd.safetensors")
    assert result.code == 1 and "[red]evil[/]" in result.out
