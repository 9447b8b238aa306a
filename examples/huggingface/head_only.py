"""Head-only fine-tuning of a ViT with Hugging Face's Trainer: captured, diagnosed, audited.

The network comes from its configuration, tiny and with random weights: nothing is downloaded. Only
the classifier takes gradients, so only it leaves the client.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch
from torch.utils.data import Dataset, SequentialSampler
from transformers import Trainer, TrainingArguments, ViTConfig, ViTForImageClassification

import leakatlas
from leakatlas.data import patches
from leakatlas.fl.recording import protocol_of, read_recording
from leakatlas.integrations.huggingface import CaptureCallback

SIZE, EXAMPLES, CLASSES = 32, 4, 4


def make_model():
    """A small ViT whose classifier alone is trained."""
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        image_size=SIZE,
        patch_size=8,
        num_labels=CLASSES,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        attn_implementation="eager",
    )
    model = ViTForImageClassification(config)
    model.vit.requires_grad_(False)
    return model


def client_data():
    """The client's images and labels."""
    return patches(SIZE, n=EXAMPLES).images, torch.arange(EXAMPLES) % CLASSES


class Images(Dataset):
    """What the Trainer wants."""

    def __len__(self):
        return EXAMPLES

    def __getitem__(self, index):
        images, labels = client_data()
        return {"pixel_values": images[index], "labels": int(labels[index])}


class InOrder(Trainer):
    """Batches as they come, so that the round can be checked to the last digit."""

    def _get_train_sampler(self, *_):
        return SequentialSampler(Images())


def train(folder):
    """One local round, recorded into a folder."""
    args = TrainingArguments(
        output_dir=str(Path(folder) / "run"),
        num_train_epochs=1,
        per_device_train_batch_size=2,
        learning_rate=0.1,
        optim="sgd",
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
    )
    callback = CaptureCallback(folder, client="hospital-1")
    InOrder(model=make_model(), args=args, train_dataset=Images(), callbacks=[callback]).train()


def main(folder, budget="20s"):
    """Train, diagnose, audit."""
    train(folder)
    recording = read_recording(folder)
    given = {"epochs": 1, "shuffle": False, "shared": ["classifier.*"]}
    protocol = protocol_of(recording.last.settings, kind=recording.last.kind, given=given)
    captured = recording.capture(make_model())
    found = leakatlas.doctor(
        make_model(), client_data(), captured=captured, protocol=protocol, output="logits"
    )
    print(f"{len(captured.update.tensors)} tensors left; residual {found.replay.residual:.1e}")
    report = leakatlas.audit(
        make_model(),
        client_data(),
        captured=captured,
        protocol=protocol,
        output="logits",
        threat="C",
        attacks=["inverting_gradients"],
        attack_parameters={"inverting_gradients": {"steps": 50}},
        budget=budget,
    )
    for verdict in report.verdicts():
        print(f"{verdict.letter}: {verdict.verdict}")
    return found, report


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp())
