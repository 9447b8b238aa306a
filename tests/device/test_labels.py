"""Every label rule on a pretended accelerator."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from leakatlas.audit.labels import Reader, Reading
from leakatlas.blocks import labels
from leakatlas.blocks.labels import METHODS, Evidence
from leakatlas.devices import CPU
from leakatlas.errors import LeakAtlasError
from tests.blocks.test_labels import gradients, inputs, network, trained
from tests.conftest import build_stage, surrogate
from tests.device.elsewhere import alike, near, pretended

CLASSES = 5


def _answer(key: str, batch: int, device: torch.device) -> tuple[str, dict[str, Tensor]]:
    model = trained(network("relu", CLASSES, seed=1), 5, CLASSES).to(device)
    x, y = inputs(batch, 3).to(device), (torch.arange(batch) % 3).to(device)
    head = labels.find_head(model)
    auxiliary = inputs(40, 7).to(device)
    sent = gradients(model, x, y)
    held = dict(model.named_parameters())
    passed = labels.head_pass(model, head, auxiliary, (torch.arange(40) % CLASSES).to(device))
    evidence = Evidence(
        gradients=sent, head=head, batch_size=batch, weight=held["2.weight"].detach(),
        bias=held["2.bias"].detach(), dummy=passed, dummy_end=passed, public=(passed, passed),
        steps=2, generator=torch.Generator().manual_seed(0),
        bridge=labels.build_bridge(
            model, head, auxiliary, shared={n: g for n, g in sent.items() if n.startswith("0.")}
        ),
    )  # fmt: skip
    try:
        found = labels.recover(key, evidence)
    except LeakAtlasError as refusal:
        return str(refusal), {}
    tensors = {n: v.cpu() for n, v in vars(found).items() if isinstance(v, Tensor)}
    return type(found).__name__, tensors | {"counts": labels.as_counts(found).cpu()}


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("key", METHODS)
def test_a_rule_reads_the_same_labels(key: str, batch: int) -> None:
    with pretended() as device:
        kind, there = _answer(key, batch, device)
    same_kind, here = _answer(key, batch, CPU)
    assert alike(kind, same_kind)
    assert there.keys() == here.keys()
    for name, tensor in here.items():
        torch.testing.assert_close(there[name], tensor, rtol=near(1e-9), atol=near(1e-9))


def test_every_rule_but_that_for_one_logit_answers_one_of_the_two_batches() -> None:
    silent = [key for key in METHODS if not (_answer(key, 1, CPU)[1] or _answer(key, 4, CPU)[1])]
    assert silent == ["rgap"]


def test_the_rule_that_was_best_on_public_images_is_the_same() -> None:
    def read(device: torch.device) -> Reading:
        live = build_stage(examples=2, public=surrogate(8), device=device)
        view = live.view([live.federation.play_round()])
        return Reader(view, surrogate(8), seed=0)(view)

    with pretended() as device:
        there = read(device)
    assert alike(there, read(CPU))
