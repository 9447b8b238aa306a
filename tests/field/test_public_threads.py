"""Further inputs of the same kinds, each from a public thread, as its author would bring it.

The threads, in the order of the tests: Flower 886 and 7538 (counters of batch normalisation come
back as empty arrays), SecretFlow 1056 and DeComFL 14 (another precision than the model's), vision
302 (auxiliary logits in train mode only), Opacus 436 (a layer half frozen), Opacus 315 (a frozen
batch normalisation inside a network that trains), Opacus 638 (parameters without a gradient),
Opacus 646 (spectral normalisation), and tied weights, as every state dict of such a model has them.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import leakatlas
from leakatlas.audit import Diagnosis, Setting, examine
from leakatlas.data import Box, as_images
from leakatlas.errors import InvalidInput
from leakatlas.fl import Defense, FedAVG, FedSGD, ModelRef, Protocol, Update
from leakatlas.fl.capture import Capture

SIZE, CLASSES = 6, 3


def _batch(count: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    return torch.rand(count, 3, SIZE, SIZE, generator=generator), torch.arange(count) % CLASSES


def _net() -> nn.Sequential:
    torch.manual_seed(4)
    return nn.Sequential(
        nn.Conv2d(3, 5, 3, padding=1), nn.BatchNorm2d(5), nn.Sigmoid(), nn.Flatten(),
        nn.Linear(5 * SIZE * SIZE, CLASSES),
    )  # fmt: skip


def _trained(model: nn.Module, protocol: FedAVG) -> nn.Module:
    """After plain PyTorch local steps on the whole batch."""
    after = copy.deepcopy(model).train(protocol.mode == "train")
    optimizer = torch.optim.SGD([p for p in after.parameters() if p.requires_grad], protocol.lr)
    images, labels = _batch()
    for _ in range(protocol.epochs):
        optimizer.zero_grad()
        F.cross_entropy(after(images), labels).backward()
        optimizer.step()
    return after


def _graded(model: nn.Module) -> nn.Module:
    """With the gradient of the batch in it."""
    images, labels = _batch()
    F.cross_entropy(model(images), labels).backward()
    return model


def checked(
    model: nn.Module, update: Update, protocol: Protocol, defenses: Sequence[Defense] = ()
) -> Diagnosis:
    """What the doctor says of an update of the batch, without asking any attack about it."""
    setting = Setting(
        name="thread", model=model, model_ref=ModelRef("object", "network"),
        victims=as_images(_batch()), protocol=protocol, defenses=tuple(defenses),
        box=Box.unit(3), captured=Capture.of(update),
    )  # fmt: skip
    return examine(setting.stage(letter="A", seed=0))


LOCAL = FedAVG(epochs=2, batch_size=3, lr=0.07)


@pytest.mark.parametrize("shape", [(0,), (1,), ()])
def test_a_counter_in_another_shape_or_lost_is_no_other_model(shape: tuple[int, ...]) -> None:
    def sent(model: nn.Module) -> list[np.ndarray]:
        arrays = [np.asarray(tensor) for tensor in model.state_dict().values()]
        return [a if a.ndim else np.resize(a.astype(np.float32), shape) for a in arrays]

    before = _net()
    after = _trained(before, LOCAL)
    update = Update.from_arrays(sent(before), sent(after), before, num_examples=3)
    assert checked(before, update, LOCAL).replay.consistent
    assert ("1.num_batches_tracked" in update.buffers_after) == (shape != (0,))
    assert torch.equal(update.buffers_after["1.running_mean"], after.state_dict()["1.running_mean"])


def test_two_numbers_are_no_counter() -> None:
    arrays = [np.asarray(t) if t.dim() else np.zeros(2) for t in _net().state_dict().values()]
    with pytest.raises(InvalidInput, match=r"array 6 has shape \(2,\) where '1.num_batches"):
        Update.from_arrays(arrays, arrays, _net(), num_examples=3)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("restored", [False, True])
def test_gradients_of_another_precision_are_the_clients(
    dtype: torch.dtype, *, restored: bool
) -> None:
    model = _graded(_net().eval())
    sent = [p.grad.to(dtype) for p in model.parameters() if p.grad is not None]
    sent = [g.float() for g in sent] if restored else sent
    update = Update.from_gradients(sent, model, num_examples=3)
    found = checked(model, update, FedSGD()).replay
    assert found.consistent and (found.residual or 0.0) < 5e-3
    turned = Update.from_gradients([-g for g in sent], model, num_examples=3)
    assert checked(model, turned, FedSGD()).replay.culprit == "sign"


class Two(NamedTuple):
    """As torchvision's networks with auxiliary logits return in train mode."""

    logits: Tensor
    aux_logits: Tensor


class Auxiliary(nn.Module):
    """Auxiliary logits in train mode, the logits alone in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.Sigmoid())
        self.aux = nn.Sequential(nn.Flatten(), nn.Linear(36, CLASSES))
        self.fc = nn.Sequential(nn.Conv2d(4, 4, 3, 2, 1), nn.Flatten(), nn.Linear(16, CLASSES))

    def forward(self, x: Tensor) -> Tensor | Two:
        h = self.stem(x)
        logits: Tensor = self.fc(h)
        return Two(logits, self.aux(h)) if self.training else logits


def _auxiliary() -> nn.Module:
    torch.manual_seed(8)
    return Auxiliary()


def test_logits_in_eval_mode_alone_are_refused_where_the_client_trains() -> None:
    for protocol in (LOCAL, FedSGD(mode="train")):
        with pytest.raises(InvalidInput, match=r"in train mode, a Two .* output="):
            leakatlas.doctor(_auxiliary(), _batch(), protocol=protocol)
        named = leakatlas.doctor(_auxiliary(), _batch(), protocol=protocol, output="logits")
        assert named.replay.consistent
    assert leakatlas.doctor(_auxiliary(), _batch(), protocol=FedSGD()).replay.consistent


def test_a_loss_on_auxiliary_logits_is_seen_in_the_update() -> None:
    model, (images, labels) = _auxiliary().train(), _batch()
    found = model(images)
    loss = F.cross_entropy(found.logits, labels) + 0.4 * F.cross_entropy(found.aux_logits, labels)
    loss.backward()
    update = Update.from_gradients([p.grad for p in model.parameters()], model, num_examples=3)
    replay = leakatlas.doctor(
        model, _batch(), captured=update, protocol=FedSGD(mode="train"), output="logits"
    ).replay
    assert replay.culprit == "unknown"
    assert "moves 'aux.1.weight', on which the described loss does not depend" in replay.explanation


def test_half_a_layer_may_be_frozen() -> None:
    model = _net().eval()
    model[4].weight.requires_grad_(False)
    model[0].bias.requires_grad_(False)
    _graded(model)
    update = Update.from_gradients([p.grad for p in model.parameters()], model, num_examples=3)
    assert set(update.tensors) == {"0.weight", "1.weight", "1.bias", "4.bias"}
    found = checked(model, update, FedSGD())
    assert found.replay.residual == 0.0
    assert found.facts["shared parameters"] == sum(t.numel() for t in update.tensors.values())


def test_a_frozen_normalisation_still_takes_its_statistics_from_the_batch() -> None:
    model = _net()
    for parameter in model[1].parameters():
        parameter.requires_grad_(False)
    update = Update.from_state_dicts(
        model.state_dict(), _trained(model, LOCAL).state_dict(), model, num_examples=3
    )
    assert "1.weight" not in update.tensors or not update.tensors["1.weight"].any()
    found = checked(model, update, LOCAL)
    assert found.replay.consistent and any("train mode" in words for words in found.findings)
    other = checked(model, update, FedAVG(epochs=2, batch_size=3, lr=0.07, mode="eval"))
    assert other.replay.culprit == "mode"


def test_parameters_that_no_gradient_reaches_are_left_out_of_the_update() -> None:
    class Spare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.spare = _net(), nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.net(x)
            return out

    model = _graded(Spare().eval())
    by_name = {name: p.grad for name, p in model.named_parameters()}
    update = Update.from_gradients(by_name, model, num_examples=3)
    assert not [name for name in update.tensors if name.startswith("spare")]
    assert checked(model, update, FedSGD()).replay.residual == 0.0


def _spectral() -> nn.Module:
    torch.manual_seed(3)
    head = torch.nn.utils.parametrizations.spectral_norm(nn.Linear(4 * SIZE * SIZE, CLASSES))
    return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Sigmoid(), nn.Flatten(), head)


def test_spectral_normalisation_moves_while_it_trains_and_the_doctor_says_so() -> None:
    assert leakatlas.doctor(_spectral(), _batch(), protocol=FedSGD()).replay.residual == 0.0
    several = FedAVG(epochs=2, batch_size=1, lr=0.1)
    found = leakatlas.doctor(_spectral(), _batch(), protocol=several).replay
    assert found.culprit == "moving buffers" and found.expected and not found.consistent
    assert "_u" in found.explanation
    still = FedAVG(epochs=2, batch_size=1, lr=0.1, mode="eval")
    assert leakatlas.doctor(_spectral(), _batch(), protocol=still).replay.consistent


def test_a_wrong_description_is_not_blamed_on_buffers_that_move() -> None:
    model = _spectral()
    after = _trained(model, LOCAL)
    update = Update.from_state_dicts(model.state_dict(), after.state_dict(), model, num_examples=3)
    doubled = FedAVG(epochs=2, batch_size=3, lr=0.14)
    replay = checked(model, update, doubled).replay
    assert replay.culprit != "moving buffers" and not replay.expected


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")
def test_parametrisations_by_hooks_are_refused_with_their_successor() -> None:
    for name in ("spectral_norm", "weight_norm"):
        layer = getattr(torch.nn.utils, name)(nn.Linear(3 * SIZE * SIZE, CLASSES))
        with pytest.raises(
            InvalidInput, match=rf"make it by torch.nn.utils.parametrizations.{name}"
        ):
            leakatlas.doctor(nn.Sequential(nn.Flatten(), layer), _batch())


class Tied(nn.Module):
    """One weight under two names."""

    def __init__(self) -> None:
        super().__init__()
        width = 3 * SIZE * SIZE
        self.first, self.second = nn.Linear(width, width), nn.Linear(width, width)
        self.second.weight = self.first.weight
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.sigmoid(self.second(torch.sigmoid(self.first(x.flatten(1)))))
        out: Tensor = self.head(h)
        return out


def test_tied_weights_come_under_each_of_their_names() -> None:
    torch.manual_seed(1)
    before = Tied()
    after = _trained(before, LOCAL)
    named = Update.from_state_dicts(before.state_dict(), after.state_dict(), before, num_examples=3)
    listed = Update.from_arrays(
        [t.numpy() for t in before.state_dict().values()],
        [t.numpy() for t in after.state_dict().values()],
        before, num_examples=3,
    )  # fmt: skip
    assert "first.weight" in named.tensors and "second.weight" not in named.tensors
    for update in (named, listed):
        assert checked(before, update, LOCAL).replay.consistent
    torn = after.state_dict() | {"second.weight": after.state_dict()["first.weight"] + 1}
    with pytest.raises(InvalidInput, match=r"'second.weight' and 'first.weight', which are one"):
        Update.from_state_dicts(before.state_dict(), torn, before, num_examples=3)
