"""A ResNet-18 of which only the head leaves the client, or whose backbone is frozen.

Fine-tuning a head, or encrypting everything but it, is how many federations share large networks.
The head's gradient alone is 513 numbers for each class.
"""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor
from torchvision.models import ResNet, resnet18

from leakatlas import doctor
from leakatlas.blocks import labels, observed
from leakatlas.data import IMAGENET, ImageSet
from leakatlas.errors import InvalidInput
from leakatlas.fl import FedSGD, ModelRef, Protocol, Scenario, Stage, stage

SIZE, CLASSES = 32, 7
HEAD = FedSGD(shared=("fc.*",))


@functools.cache
def _resnet() -> ResNet:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(8)
        model: ResNet = resnet18(num_classes=CLASSES)
    return model.eval()


def _frozen() -> ResNet:
    with torch.random.fork_rng(devices=[]):
        model: ResNet = resnet18(num_classes=CLASSES)
    model.load_state_dict(_resnet().state_dict())
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("fc."))
    return model.eval()


def _images(labels: list[int]) -> ImageSet:
    generator = torch.Generator().manual_seed(12)
    pixels = torch.rand(len(labels), 3, SIZE, SIZE, generator=generator)
    names = tuple(f"class {k}" for k in range(CLASSES))
    return ImageSet(pixels, torch.tensor(labels), names, "batch")


def _played(model: ResNet, protocol: Protocol, labels: list[int]) -> Stage:
    scenario = Scenario(model=ModelRef("object", "resnet18"), protocol=protocol, letter="A")
    return stage(scenario, model=model, victims=_images(labels), box=IMAGENET)


def _sent(model: ResNet, protocol: Protocol, labels: list[int]) -> dict[str, Tensor]:
    federation = _played(model, protocol, labels).federation
    return dict(federation.play_round().updates[0].tensors)


def test_the_facts_are_those_of_the_head() -> None:
    found = doctor(_resnet(), _images([1, 4]), box=IMAGENET, protocol=HEAD)
    assert found.replay.consistent
    assert found.facts["shared parameters"] == 513 * CLASSES
    assert found.facts["equations per unknown"] == 513 * CLASSES / (2 * 3 * SIZE**2)
    assert any("3,591 of 11,180,103 parameters leave the client" in f for f in found.findings)
    assert any("exact recovery of the whole batch is impossible" in f for f in found.findings)
    assert any("Layers that a malicious server adds are taken to leave too" in f
               for f in found.findings)  # fmt: skip
    assert found.outlooks["robbing_the_fed"].letter == "G"


def test_a_frozen_backbone_sends_what_deleting_its_gradients_leaves_bit_for_bit() -> None:
    batch = [5, 0, 3]
    whole = _sent(_resnet(), FedSGD(), batch)
    for model, protocol in ((_frozen(), FedSGD()), (_resnet(), HEAD)):
        sent = _sent(model, protocol, batch)
        assert list(sent) == ["fc.weight", "fc.bias"]
        assert all(torch.equal(sent[name], whole[name]) for name in sent)


def _read(batch: list[int]) -> Tensor:
    """Labels that anybody at the server reads off the head alone; letter A."""
    live = _played(_resnet(), HEAD, batch)
    view = live.view([live.federation.play_round()])
    like = next(iter(view.update.tensors.values()))
    head = labels.find_head(view.model, like.new_zeros(1, 3, SIZE, SIZE))
    return labels.column_min(observed.mean_gradient(view), head, len(batch))


@pytest.mark.parametrize("batch", [[6], [2, 5], [0, 1, 3, 4, 6]])
def test_distinct_labels_are_exact_behind_a_relu(batch: list[int]) -> None:
    """Pooled ReLU features are not negative: a class's row falls below 0 only if it is there."""
    assert sorted(_read(batch).tolist()) == batch


def test_more_labels_than_classes_cannot_be_distinct() -> None:
    with pytest.raises(InvalidInput):
        _read([0, 1, 2, 3, 4, 5, 6, 0])
