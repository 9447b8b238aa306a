"""Clients as people really run them: their loss, frozen layers, attention, wrappers.

Each case is a public question of somebody who attacked or audited their own training, in other
words and numbers; what has a right value is held against it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.models.vision_transformer import VisionTransformer

import leakatlas
from leakatlas.audit import Diagnosis, doctor, read_config
from leakatlas.audit.config import make_plan
from leakatlas.blocks.labels import find_head, target_of_one
from leakatlas.errors import InvalidInput, UnsupportedModel
from leakatlas.fl import FedAVG, FedSGD, Protocol
from leakatlas.fl.losses import as_loss

SIZE = 12


def _batch(count: int = 2, classes: int = 3, seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(count, 3, SIZE, SIZE, generator=generator)
    return images, torch.arange(count) % classes


def _net(*tail: nn.Module, outputs: int = 3) -> nn.Sequential:
    torch.manual_seed(3)
    flat = 3 * SIZE * SIZE
    return nn.Sequential(
        nn.Flatten(), nn.Linear(flat, 24), nn.Tanh(), nn.Linear(24, outputs), *tail
    )


def _says(diagnosis: Diagnosis, words: str) -> bool:
    return any(words in finding for finding in diagnosis.findings)


# -- the loss --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tail", "outputs", "loss", "words"),
    [
        ((nn.Softmax(1),), 3, "cross_entropy", "outputs sum to 1"),
        ((nn.Softmax(1),), 3, "nll", "a softmax without its logarithm"),
        ((), 3, "nll", "its loss is 'cross_entropy'"),
        ((), 1, "cross_entropy", "identically zero"),
        ((nn.Sigmoid(),), 3, "bce", "from_logits: false"),
    ],
)
def test_outputs_and_loss_that_do_not_belong_together_are_pointed_out(
    tail: tuple[nn.Module, ...], outputs: int, loss: str, words: str
) -> None:
    images, labels = _batch()
    labels = labels if outputs > 1 else torch.zeros(2, dtype=torch.int64)
    found = doctor(_net(*tail, outputs=outputs), (images, labels), protocol=FedSGD(loss=loss))
    assert _says(found, words)


@pytest.mark.parametrize(
    ("tail", "outputs", "loss"),
    [((), 3, "cross_entropy"), ((nn.LogSoftmax(1),), 3, "nll"), ((), 1, "bce"), ((), 3, "mse")],
)
def test_outputs_and_loss_that_belong_together_are_left_alone(
    tail: tuple[nn.Module, ...], outputs: int, loss: str
) -> None:
    images, labels = _batch()
    labels = labels if outputs > 1 else labels % 2
    found = doctor(_net(*tail, outputs=outputs), (images, labels), protocol=FedSGD(loss=loss))
    assert found.replay.consistent
    assert not any("softmax" in f or "zero" in f or "sigmoid" in f for f in found.findings)


def test_nll_of_probabilities_is_another_client_than_cross_entropy_of_logits() -> None:
    """The mistake that made a report speak of a client that nobody had."""
    images, labels = _batch()
    model = _net(nn.Softmax(1))
    named = list(model.parameters())
    theirs = torch.autograd.grad(nn.functional.nll_loss(model(images), labels), named)
    told = leakatlas.fl.Update(
        tensors=dict(zip(dict(model.named_parameters()), theirs, strict=True)),
        kind="gradient", state_hash="", num_examples=2,
    )  # fmt: skip
    as_it_is = doctor(model, (images, labels), protocol=FedSGD(loss="nll"), captured=told)
    as_usual = doctor(model, (images, labels), captured=told)
    assert as_it_is.replay.residual is not None and as_it_is.replay.residual < 1e-6
    assert as_usual.replay.culprit == "loss" and "loss is nll" in as_usual.replay.explanation


@pytest.mark.parametrize(
    ("loss", "target"),
    [
        ("cross_entropy", 2),
        ({"name": "cross_entropy", "label_smoothing": 0.3}, 2),
        ({"name": "cross_entropy", "class_weights": [1.0, 4.0, 0.5]}, 1),
        ({"name": "focal", "gamma": 3.0}, 0),
        ("bce", [1.0, 0.0, 1.0]),
        ("bce", [0.25, 0.0, 1.0]),
        ("mse", [0.3, -2.0, 5.5]),
        (lambda z, y: nn.functional.multi_margin_loss(z, y, reduction="none"), 1),
    ],
)
def test_the_target_of_one_example_is_exact_under_every_loss(loss: Any, target: Any) -> None:
    chosen = as_loss(loss)
    model = _net().double()
    x = _batch(1)[0].double()
    y = torch.tensor([target])
    value = chosen(model(x), y.double() if y.dim() == 2 else y)
    named = dict(model.named_parameters())
    g = dict(zip(named, torch.autograd.grad(value, list(named.values())), strict=True))
    found = target_of_one(chosen, g, find_head(model, x), model)
    torch.testing.assert_close(found.double(), y.double(), atol=1e-6, rtol=0)


def test_counting_labels_of_a_batch_is_refused_where_its_identity_fails() -> None:
    images, labels = _batch(3)
    report = leakatlas.audit(
        _net(), (images, labels), protocol=FedSGD(loss="focal"), threat="B",
        attacks=["inverting_gradients"], budget="1h", rehearsal=False,
    )  # fmt: skip
    (run,) = report.runs
    assert run.status == "not applicable"
    assert "rests on plain softmax cross-entropy; this client minimises focal" in run.reason


def test_several_labels_at_once_come_out_with_the_image() -> None:
    images, _ = _batch(1)
    targets = torch.tensor([[1.0, 0.0, 1.0]])
    report = leakatlas.audit(
        _net(), (images, targets), protocol=FedSGD(loss="bce"), threat="B",
        attacks=["inverting_gradients"],
        attack_parameters={"inverting_gradients": {"steps": 300}}, budget="1h", rehearsal=False,
    )  # fmt: skip
    (run,) = report.runs
    assert run.status == "complete" and run.scores is not None
    assert run.scores.psnr.mean > 20


def test_a_loss_in_a_file_of_ones_own_serves_yaml(tmp_path: Any) -> None:
    (tmp_path / "mine.py").write_text(
        "import torch\n"
        "def net():\n"
        "    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(768, 10))\n"
        "def hinge(outputs, y):\n"
        "    return torch.nn.functional.multi_margin_loss(outputs, y, reduction='none')\n"
    )
    (tmp_path / "audit.yaml").write_text(
        "model: {python: 'mine.py:net'}\ndata: {victims: photos, limit: 2}\n"
        "protocol: {algorithm: fedsgd, loss: 'mine.py:hinge', shared: ['1.*']}\n"
    )
    text = (tmp_path / "audit.yaml").read_text().replace("photos", "photos:16")
    (tmp_path / "audit.yaml").write_text(text)
    plan = make_plan(read_config(tmp_path / "audit.yaml"), base=tmp_path, command="")
    loss = plan.settings[0].protocol.loss
    z, y = torch.randn(4, 10), torch.tensor([1, 2, 3, 4])
    torch.testing.assert_close(loss(z, y), nn.functional.multi_margin_loss(z, y))


# -- what takes part, and what leaves --------------------------------------------------------------


def test_only_the_head_of_a_network_is_sent() -> None:
    """Facts, labels and attacks are those of the head; the label of one image is still exact."""
    images, labels = _batch(1)
    whole = doctor(_net(), (images, labels))
    head = doctor(_net(), (images, labels), protocol=FedSGD(shared=("3.*",)))
    assert head.replay.consistent
    assert head.facts["shared parameters"] == 24 * 3 + 3 < whole.facts["shared parameters"]
    assert _says(head, "75 of 10,467 parameters leave the client")
    report = leakatlas.audit(
        _net(), (images, labels), protocol=FedSGD(shared=("3.*",)), threat="B",
        attacks=["idlg"], attack_parameters={"idlg": {"steps": 5}}, budget="1h", rehearsal=False,
    )  # fmt: skip
    (run,) = report.runs
    assert run.scores is not None and run.scores.labels is not None
    assert run.scores.labels.exact_batch and run.scores.psnr.mean < 30


def test_a_frozen_backbone_no_longer_breaks_the_client() -> None:
    model = _net()
    model[1].requires_grad_(False)
    for protocol in (FedSGD(), FedAVG(batch_size=1, momentum=0.9)):
        found = doctor(model, _batch(), protocol=protocol)
        assert found.replay.consistent
        assert _says(found, "constants that take no gradient")


def test_two_inputs_are_refused_in_words() -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(6, 2)

        def forward(self, left: Tensor, right: Tensor) -> Tensor:
            out: Tensor = self.fc(left.flatten(1) + right.flatten(1))
            return out

    with pytest.raises(InvalidInput, match="must take one tensor of images"):
        doctor(Pair(), _batch())


# -- attention, normalisation, draws ---------------------------------------------------------------


def _vit() -> VisionTransformer:
    torch.manual_seed(4)
    model = VisionTransformer(SIZE, 4, 2, 2, 16, 32, num_classes=3)
    nn.init.normal_(model.heads.head.weight, std=0.1)  # torchvision starts it at zero
    return model


class FusedAttention(nn.Module):
    """As in timm: the fused function, not a module, on a small map."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 8, 4, 4)
        self.qkv = nn.Linear(8, 24)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.embed(x).flatten(2).transpose(1, 2)
        q, k, v = (t.unflatten(-1, (2, 4)).transpose(1, 2) for t in self.qkv(tokens).chunk(3, -1))
        mixed = nn.functional.scaled_dot_product_attention(q, k, v)
        out: Tensor = self.head(mixed.transpose(1, 2).flatten(2).mean(1))
        return out


@pytest.mark.parametrize("make", [_vit, FusedAttention])
@pytest.mark.parametrize("protocol", [FedSGD(), FedAVG(batch_size=1, mode="eval")])
def test_attention_is_differentiated_twice(
    make: Callable[[], nn.Module], protocol: Protocol
) -> None:
    report = leakatlas.audit(
        make(), _batch(), protocol=protocol, threat="C", grants=["labels"],
        attacks=["inverting_gradients"], attack_parameters={"inverting_gradients": {"steps": 3}},
        budget="1h", rehearsal=False,
    )  # fmt: skip
    (run,) = report.runs
    assert run.status == "complete" and run.scores is not None, run.reason


def test_a_last_batch_of_one_is_refused_before_anything_runs() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, SIZE), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 3))
    with pytest.raises(
        InvalidInput,
        match=r"BatchNorm2d '1' .* batch 2 of 5 examples holds one .* batch_size=3 or 5",
    ):
        doctor(model, _batch(5), protocol=FedAVG(batch_size=4))
    assert doctor(model, _batch(5), protocol=FedAVG(batch_size=4, mode="eval")).replay.consistent


def test_normalisation_over_many_places_takes_a_single_example() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(400, 3))
    assert doctor(model, _batch(5), protocol=FedAVG(batch_size=4)).replay.consistent


def test_dropout_does_not_make_a_simulated_client_inconsistent() -> None:
    model = _net(nn.Dropout(0.5))
    found = doctor(model, _batch(5), protocol=FedAVG(batch_size=2, epochs=2))
    assert found.replay.consistent
    assert found.replay.residual is not None and found.replay.residual < 1e-5


# -- wrappers and forward passes of all kinds ------------------------------------------------------


class Slicing(nn.Module):
    """Takes parts of its Sequential, which tracing cannot follow."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = _net()

    def forward(self, x: Tensor) -> Tensor:
        count = int(len(self.layers) - (x.sum() > 1e9).int())
        out: Tensor = self.layers[:count](x)
        return out


def test_a_measure_that_cannot_look_into_a_model_is_left_out_and_the_others_are_taken() -> None:
    found = doctor(Slicing(), _batch())
    taken = {m.name: m for m in found.measures}
    assert taken["constraints_per_unknown"].value is not None
    assert any(m.value is None and m.note for m in found.measures)


def test_a_wrapped_model_is_the_model_inside() -> None:
    plain, wrapped = doctor(_net(), _batch()), doctor(nn.DataParallel(_net()), _batch())
    assert wrapped.facts == plain.facts
    assert _says(wrapped, "unwrapped Sequential from DataParallel")


def test_packed_outputs_are_selected_by_name() -> None:
    class Packed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = _net()

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"logits": self.net(x), "features": x}

    with pytest.raises(InvalidInput, match=r"'logits' \(1, 3\), 'features' .* output="):
        doctor(Packed(), _batch())
    found = doctor(Packed(), _batch(), output="logits")
    assert found.replay.consistent and _says(found, "the logits are 'logits'")


def test_attacks_of_closed_form_refuse_what_their_formula_does_not_cover() -> None:
    report = leakatlas.audit(
        _net(), _batch(1), protocol=FedSGD(loss="mse"), threat="B", attacks=["rgap"], budget="1h"
    )
    (run,) = report.runs
    assert run.status == "not applicable" and "minimises mse" in run.reason
    with pytest.raises(UnsupportedModel, match="Grant the labels"):
        leakatlas.blocks.labels.require_plain(as_loss("mse"), "X")
