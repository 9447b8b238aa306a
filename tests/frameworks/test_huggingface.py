"""The Trainer callback and PEFT adapters against the real libraries: ``make test-huggingface``."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import leakatlas
from leakatlas.data import patches
from leakatlas.errors import InvalidInput, ProtocolError
from leakatlas.fl import FedAVG
from leakatlas.fl.recording import protocol_of, read_recording

transformers = pytest.importorskip(
    "transformers", reason="make test-huggingface builds an environment with transformers and peft"
)

SIZE = 16


def _vit() -> Any:
    """A tiny ViT from its configuration; nothing is fetched."""
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        image_size=SIZE, patch_size=8, num_labels=4, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0, attn_implementation="eager",
    )  # fmt: skip
    return transformers.ViTForImageClassification(config)


def _data() -> tuple[Tensor, Tensor]:
    return patches(SIZE, n=8).images.clone(), torch.arange(8) % 4


class _Images(torch.utils.data.Dataset[dict[str, Any]]):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict[str, Any]:
        images, labels = _data()
        return {"pixel_values": images[index], "labels": int(labels[index])}


def _train(model: nn.Module, folder: Path, **settings: Any) -> Any:
    from leakatlas.integrations.huggingface import CaptureCallback

    plain = {"optim": "sgd", "lr_scheduler_type": "constant", "max_grad_norm": 0.0}
    callback = CaptureCallback(folder, client="site-1")
    args = transformers.TrainingArguments(
        output_dir=str(folder / "run"), num_train_epochs=1, per_device_train_batch_size=4,
        learning_rate=0.05, report_to=[], save_strategy="no", use_cpu=True, disable_tqdm=True,
        logging_strategy="no", **(plain | settings),
    )  # fmt: skip

    class InOrder(transformers.Trainer):  # type: ignore[name-defined, misc]
        def _get_train_sampler(self, *_: Any, **__: Any) -> Any:
            return torch.utils.data.SequentialSampler(_Images())

    InOrder(model=model, args=args, train_dataset=_Images(), callbacks=[callback]).train()
    return callback


def test_a_training_is_recorded_and_replayed(tmp_path: Path) -> None:
    callback = _train(_vit(), tmp_path)
    seen = callback.seen.protocol()
    assert (seen.epochs, seen.batch_size, seen.lr, seen.optimizer) == (1, 4, 0.05, "sgd")
    recording = read_recording(tmp_path)
    given = {"epochs": 1, "shuffle": False}
    protocol = protocol_of(recording.last.settings, kind="weights", given=given)
    found = leakatlas.doctor(
        _vit(), _data(), captured=recording.capture(_vit()), protocol=protocol, threat="B",
        output="logits",
    ).replay  # fmt: skip
    assert found.residual is not None
    assert found.residual <= 1e-5


def test_the_defaults_of_the_trainer_are_no_protocol_and_said(tmp_path: Path) -> None:
    defaults = {"optim": "adamw_torch", "lr_scheduler_type": "linear", "max_grad_norm": 1.0}
    callback = _train(_vit(), tmp_path, **defaults)
    with pytest.raises(ProtocolError, match="AdamW"):
        callback.seen.protocol()
    notes = " ".join(read_recording(tmp_path).notes)
    assert "changed its settings between steps" in notes
    assert "clipped to norm 1" in notes


# -- adapters ------------------------------------------------------------------------------------


def _adapted() -> Any:
    peft = pytest.importorskip("peft")
    torch.manual_seed(1)
    config = peft.LoraConfig(
        r=2, target_modules=["q_proj", "v_proj", "query", "value"], modules_to_save=["classifier"]
    )
    return peft.get_peft_model(_vit(), config)


def _rounds(model: Any, steps: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What a client of an adapter receives and sends."""
    from leakatlas.integrations.peft import adapter_state

    received = adapter_state(model)
    images, labels = _data()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(pixel_values=images).logits, labels)
        loss.backward()
        optimizer.step()
    return received, adapter_state(model)


def test_an_adapter_is_captured_described_and_replayed() -> None:
    from leakatlas.integrations import peft

    model = _adapted().train()
    received, sent = _rounds(model, steps=1)
    assert not any("base_layer" in name for name in sent), "the base model does not travel"
    captured = peft.capture(_adapted(), received, sent, examples=8)
    (note,) = captured.notes
    assert "payload: adapter" in note
    assert "classifier" in note
    lora_a = [t for n, t in captured.update.tensors.items() if "lora_A" in n]
    lora_b = [t for n, t in captured.update.tensors.items() if "lora_B" in n]
    assert lora_a
    assert all(not t.any() for t in lora_a), "B is zero at first, so A gets no gradient"
    assert all(t.any() for t in lora_b)
    fresh = _adapted()
    protocol = FedAVG(epochs=1, batch_size=8, lr=0.05, shared=peft.shared(fresh), shuffle=False)
    found = leakatlas.doctor(
        fresh, _data(), captured=captured, protocol=protocol, threat="B", output="logits"
    ).replay
    assert found.residual is not None
    assert found.residual <= 1e-5


def test_an_attack_that_applies_runs_on_an_adapter() -> None:
    from leakatlas.integrations import peft

    received, sent = _rounds(_adapted().train(), steps=1)
    model = _adapted()
    captured = peft.capture(model, received, sent, examples=8)
    report = leakatlas.audit(
        model, _data(), captured=captured, threat="C", output="logits",
        protocol=FedAVG(
            epochs=1, batch_size=8, lr=0.05, shared=peft.shared(model), shuffle=False
        ),
        attacks=["inverting_gradients", "rgap"],
        attack_parameters={"inverting_gradients": {"steps": 2}},
        budget="20s", in_process=True,
    )  # fmt: skip
    status = {run.attack: run.status for run in report.runs}
    assert status["inverting_gradients"] in ("complete", "cut short"), report.runs
    assert status["rgap"] in ("refused", "not applicable"), "it wants all layers"


def test_arrays_of_another_adapter_are_named() -> None:
    from leakatlas.integrations import peft

    received, sent = _rounds(_adapted().train(), steps=1)
    with pytest.raises(InvalidInput, match="in one only"):
        peft.capture(_adapted(), received, dict(list(sent.items())[1:]), examples=8)
    with pytest.raises(InvalidInput, match=r"no .*other"):
        peft.capture(_adapted(), received | {"other": torch.zeros(1)}, sent, examples=8)


def test_the_example_of_a_head(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Path(__file__).parents[2] / "examples" / "huggingface"
    monkeypatch.syspath_prepend(str(folder))
    example = importlib.import_module("head_only")
    found, report = example.main(str(tmp_path))
    assert found.replay.residual <= 1e-5
    assert [run.status for run in report.runs] == ["complete"]
    captured = read_recording(tmp_path).capture(example.make_model())
    assert sorted(captured.update.tensors) == ["classifier.bias", "classifier.weight"]
