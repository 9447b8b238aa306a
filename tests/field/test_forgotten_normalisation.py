"""A normalisation that was forgotten is noticed by what a trained model remembers."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from leakatlas import models
from leakatlas.audit import doctor
from leakatlas.audit.inputs import about_the_inputs
from leakatlas.data import CIFAR10, Box, patches, photos

HALF = Box((0.5,) * 3, (0.5,) * 3)


def _warned(model: nn.Module, images: Tensor, labels: Tensor, box: Box) -> list[str]:
    return about_the_inputs(model, box.normalize(images), labels, box)[1]


def test_the_statistics_of_a_shipped_model_tell_pixels_from_normalised_inputs() -> None:
    model = models.pretrained("convnet-bn-cifar10")
    found = photos(32)
    labels = torch.zeros(len(found), dtype=torch.int64)
    assert _warned(model, found.images, labels, CIFAR10) == []
    (said,) = _warned(model, found.images, labels, Box.unit(3))
    assert "running statistics" in said and "data.mean" in said


def test_an_untrained_model_says_nothing() -> None:
    model = models.build("convnet-bn", width=2, seed=1)
    found = patches(32, 16)
    for box in (CIFAR10, Box.unit(3), HALF):
        assert _warned(model, found.images, torch.arange(16) % 10, box) == []


def _by_brightness() -> nn.Module:
    """Class 1 where the inputs are positive on average: right for pixels of [-1, 1]."""
    head = nn.Linear(3 * 4 * 4, 2, bias=False)
    with torch.no_grad():
        head.weight.copy_(torch.tensor([[-1.0], [1.0]]).expand(2, 48))
    return nn.Sequential(nn.Flatten(), head)


def test_labels_tell_it_where_there_is_no_batch_normalisation() -> None:
    labels = torch.arange(20) % 2
    spread = 0.2 * torch.rand(20, 3, 4, 4, generator=torch.Generator().manual_seed(6))
    images = spread + 0.1 + 0.6 * labels.view(-1, 1, 1, 1)
    assert _warned(_by_brightness(), images, labels, HALF) == []
    (said,) = _warned(_by_brightness(), images, labels, Box.unit(3))
    assert "recognises 10 of 20 images, and 20 as pixels of [-1, 1]" in said
    # A model that always says one class recognises a batch of that class, and means nothing.
    assert _warned(_by_brightness(), images[1::2] * 0.3, labels[1::2], HALF) == []
    # Of six images it recognises three more, which a coin does too.
    assert _warned(_by_brightness(), images[:6], labels[:6], Box.unit(3)) == []


def test_the_doctor_warns_and_states_both_figures() -> None:
    generator = torch.Generator().manual_seed(8)
    images = torch.rand(6, 3, 5, 5, generator=generator)
    norm = nn.BatchNorm2d(3)
    assert norm.running_mean is not None and norm.running_var is not None
    seen = HALF.normalize(images)
    norm.running_mean.copy_(seen.mean((0, 2, 3)))
    norm.running_var.copy_(seen.var((0, 2, 3)))
    torch.manual_seed(4)
    model = nn.Sequential(norm, nn.Flatten(), nn.Linear(75, 3))
    labels = torch.tensor([0, 1, 2, 0, 1, 2])
    right = doctor(model, (images, labels), box=HALF, threat="B")
    assert right.facts["misfit of the running statistics (nats)"] < 1e-2
    assert 0 <= right.facts["accuracy on the batch"] <= 1
    assert not any("normalised otherwise" in finding for finding in right.findings)
    wrong = doctor(model, (images, labels), threat="B")
    assert any("as pixels of [-1, 1]" in finding for finding in wrong.findings)
