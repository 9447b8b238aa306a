"""Every mistake that people make in describing a client is made here, and must be found out."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from leakatlas.audit.consistency import ReplayCheck, check_replay
from leakatlas.data.box import IMAGENET, Box
from leakatlas.defenses.formal.dp.client_dp import ClientDP
from leakatlas.defenses.heuristic.perturbation.clipping import Clipping
from leakatlas.fl import FedAVG, FedSGD, Protocol, Update
from leakatlas.fl.losses import CrossEntropy

N, SIZE, K = 3, 6, 5


def _net(*extra: nn.Module) -> nn.Sequential:
    torch.manual_seed(1)
    width = 3 * SIZE * SIZE
    return nn.Sequential(
        nn.Flatten(), nn.Linear(width, 10), nn.Tanh(), nn.Linear(10, 10), nn.Tanh(), *extra,
        nn.Linear(10, K),
    ).double()  # fmt: skip


def _data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    x = torch.rand(N, 3, SIZE, SIZE, generator=generator, dtype=torch.float64)
    return x, torch.tensor([2, 0, 4])


def _gradient(model: nn.Module, x: Tensor, y: Tensor, loss: Any = None) -> Update:
    loss = loss or nn.functional.cross_entropy
    named = dict(model.named_parameters())
    found = torch.autograd.grad(loss(model(x), y), list(named.values()))
    return Update(tensors=dict(zip(named, found, strict=True)), kind="gradient", state_hash="",
                  num_examples=N)  # fmt: skip


def _delta(model: nn.Module, x: Tensor, y: Tensor, steps: int = 3, **sgd: Any) -> Update:
    after = copy.deepcopy(model)
    optimizer = torch.optim.SGD(after.parameters(), **sgd)
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(after(x), y).backward()
        optimizer.step()
    before = dict(model.named_parameters())
    moved = {n: p.detach() - before[n].detach() for n, p in after.named_parameters()}
    return Update(tensors=moved, kind="delta", state_hash="", num_examples=N)


def _check(
    update: Update, protocol: Protocol | None = None, model: nn.Module | None = None, **rest: Any
) -> ReplayCheck:
    x, y = _data()
    return check_replay(model or _net(), update, x, y, protocol or FedSGD(), **rest)


LOCAL = FedAVG(epochs=3, batch_size=N, lr=0.1, mode="eval")


def test_what_is_described_rightly_is_consistent() -> None:
    x, y = _data()
    assert _check(_gradient(_net(), x, y)).consistent
    assert _check(_delta(_net(), x, y, lr=0.1), LOCAL).consistent


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda y: (y - 1) % K, "too large"),
        (lambda y: (y + 1) % K, "too small"),
        (lambda y: K - 1 - y, "other way round"),
        (lambda y: y[[1, 2, 0]], "another order"),
    ],
)
def test_labels_that_are_shifted_or_permuted(
    change: Callable[[Tensor], Tensor], words: str
) -> None:
    x, y = _data()
    found = _check(_gradient(_net(), x, change(y)))
    assert found.culprit == "labels" and words in found.explanation


def test_a_normalisation_that_was_forgotten_on_either_side() -> None:
    images, y = _data()
    theirs = _gradient(_net(), IMAGENET.normalize(images), y)
    found = check_replay(_net(), theirs, images, y, FedSGD(), box=Box.unit(3))
    assert found.culprit == "normalisation" and "ImageNet, which was not" in found.explanation
    plain = _gradient(_net(), images, y)
    given = IMAGENET.normalize(images)
    found = check_replay(_net(), plain, given, y, FedSGD(), box=IMAGENET)
    assert found.culprit == "normalisation" and "did not normalise" in found.explanation
    small = _net()
    with torch.no_grad():
        small.get_parameter("1.weight").mul_(0.01)
    found = check_replay(small, _gradient(small, images * 255, y), images, y, FedSGD())
    assert found.culprit == "normalisation" and "bytes" in found.explanation


def test_another_loss_and_channels_the_wrong_way_round() -> None:
    x, y = _data()
    smooth = CrossEntropy(label_smoothing=0.1)
    found = _check(_gradient(_net(), x, y, smooth))
    assert found.culprit == "loss" and "label_smoothing=0.1" in found.explanation
    assert _check(_gradient(_net(), x.flip(1), y)).culprit == "channels"


def test_sums_factors_and_signs() -> None:
    x, y = _data()
    total = nn.functional.cross_entropy
    summed = _gradient(_net(), x, y, lambda z, t: total(z, t, reduction="sum"))
    assert _check(summed).culprit == "reduction"
    assert _check(replace(summed, reduction="sum")).consistent
    plain = _gradient(_net(), x, y)
    half = plain.with_tensors({n: 0.5 * t for n, t in plain.tensors.items()})
    assert _check(half).culprit == "scale" and "0.5 times" in _check(half).explanation
    assert _check(half.with_tensors({n: -t for n, t in half.tensors.items()})).culprit == "sign"


@pytest.mark.parametrize(
    ("sgd", "culprit", "words"),
    [
        ({"lr": 0.1, "momentum": 0.9}, "momentum", "momentum 0.9"),
        ({"lr": 0.1, "weight_decay": 0.02}, "weight decay", "decay of 0.02"),
        ({"lr": 0.03}, "learning rate", "was 0.03, not 0.1"),
    ],
)
def test_the_optimizer_behind_a_delta(sgd: dict[str, Any], culprit: str, words: str) -> None:
    x, y = _data()
    found = _check(_delta(_net(), x, y, **sgd), LOCAL)
    assert found.culprit == culprit and words in found.explanation, found


def test_weight_decay_in_a_single_gradient() -> None:
    x, y = _data()
    plain, named = _gradient(_net(), x, y), dict(_net().named_parameters())
    decayed = plain.with_tensors(
        {n: t + 0.05 * named[n].detach() for n, t in plain.tensors.items()}
    )
    found = _check(decayed)
    assert found.culprit == "weight decay" and "0.05" in found.explanation


def test_weights_after_training_given_as_those_before() -> None:
    x, y = _data()
    model = _net()
    update = _delta(model, x, y, lr=0.1)
    moved = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in moved.named_parameters():
            parameter.add_(update.tensors[name])
    assert _check(update, LOCAL, moved).culprit == "weights after"


def test_tensors_under_each_others_names() -> None:
    x, y = _data()
    update = _gradient(_net(), x, y)
    swapped = dict(update.tensors)
    swapped["1.bias"], swapped["3.bias"] = swapped["3.bias"], swapped["1.bias"]
    found = _check(update.with_tensors(swapped))
    assert found.culprit == "parameter order" and "'1.bias' holds" in found.explanation


def test_defenses_declared_missing_or_noisy() -> None:
    x, y = _data()
    plain = _gradient(_net(), x, y)
    size = sum(float(t.square().sum()) for t in plain.tensors.values()) ** 0.5
    factor = 0.1 / (size + 1e-6)
    clipped = plain.with_tensors({n: t * factor for n, t in plain.tensors.items()})
    clipping = Clipping(max_norm=0.1)
    assert _check(clipped, defenses=(clipping,)).consistent
    found = _check(plain, defenses=(clipping,))
    assert found.culprit == "defense missing" and "clipping is declared" in found.explanation
    noise = torch.Generator().manual_seed(0)
    noisy = clipped.with_tensors(
        {n: t + 0.01 * torch.randn(t.shape, generator=noise, dtype=t.dtype)
         for n, t in clipped.tensors.items()}
    )  # fmt: skip
    dp = ClientDP(noise_multiplier=1.0, clip_norm=0.1, unit="update")
    found = _check(noisy, defenses=(dp,))
    assert found.culprit == "defense" and found.expected and "noise" in found.explanation


def test_defenses_that_nobody_declared_are_described_by_what_they_leave() -> None:
    x, y = _data()
    plain = _gradient(_net(), x, y)
    noise = torch.Generator().manual_seed(0)
    noisy = plain.with_tensors(
        {n: t + 0.02 * torch.randn(t.shape, generator=noise, dtype=t.dtype)
         for n, t in plain.tensors.items()}
    )  # fmt: skip
    assert "looks like added noise" in _check(noisy).explanation
    pruned = plain.with_tensors(
        {n: torch.where(t.abs() >= t.abs().flatten().quantile(0.8), t, 0)
         for n, t in plain.tensors.items()}
    )  # fmt: skip
    assert "looks pruned" in _check(pruned).explanation
    signs = plain.with_tensors({n: t.sign() for n, t in plain.tensors.items()})
    assert "sign-compressed" in _check(signs).explanation


def test_dropout_is_named_where_it_explains_and_only_there() -> None:
    x, y = _data()
    model = _net(nn.Dropout(0.4)).train()
    torch.manual_seed(9)
    real = _gradient(model, x, y)
    found = _check(real, FedSGD(mode="train"), model)
    assert found.culprit == "dropout" and found.expected and not found.consistent
    far = real.with_tensors({n: 30 * t for n, t in real.tensors.items()})
    assert _check(far, FedSGD(mode="train"), model).culprit != "dropout"


def test_several_mistakes_at_once_are_all_named() -> None:
    images, y = _data()
    theirs = _gradient(_net(), IMAGENET.normalize(images), (y + 1) % K)
    turned = theirs.with_tensors({n: -2 * t for n, t in theirs.tensors.items()})
    found = check_replay(_net(), turned, images, y, FedSGD(), box=Box.unit(3))
    assert found.culprit == "several", found
    for words in ("ImageNet", "too small", "-2 times"):
        assert words in found.explanation


def test_two_states_the_wrong_way_round_are_named() -> None:
    model, (x, y) = _net(), _data()
    update = _delta(model, x, y, lr=0.3)
    after = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in after.named_parameters():
            parameter.add_(update.tensors[name])
    turned = replace(update, tensors={n: -t for n, t in update.tensors.items()})
    found = check_replay(after, turned, x, y, FedAVG(epochs=3, batch_size=N, lr=0.3, shuffle=False))
    assert found.culprit == "swapped", found.explanation


@pytest.mark.parametrize(
    ("real", "said", "culprit"),
    [
        ({"lr": 0.3}, {"lr": 0.3}, "images"),
        ({"lr": 0.3, "momentum": 0.9}, {"lr": 0.3}, "momentum"),
        ({"lr": 0.3}, {"lr": 0.1}, "learning rate"),
    ],
)
def test_a_mistake_is_named_although_the_images_were_saved_with_eight_bits(
    real: dict[str, Any], said: dict[str, Any], culprit: str
) -> None:
    """The client trained on floats; who describes it holds its images rounded."""
    model, (x, y) = _net(), _data()
    rounded = (x * 255).round() / 255
    protocol = FedAVG(epochs=3, batch_size=N, shuffle=False, **said)
    found = check_replay(model, _delta(model, x, y, **real), rounded, y, protocol)
    assert found.culprit == culprit and not found.expected
    assert "saved with 8 bits" in found.explanation


def test_a_little_noise_is_not_laid_to_the_images_alone() -> None:
    model, (x, y) = _net(), _data()
    update = _gradient(model, x, y)
    size = torch.cat([t.flatten() for t in update.tensors.values()])
    generator = torch.Generator().manual_seed(3)
    sigma = 0.02 * float(size.norm()) / len(size) ** 0.5
    noisy = {
        n: t + sigma * torch.randn(t.shape, generator=generator, dtype=t.dtype)
        for n, t in update.tensors.items()
    }
    found = check_replay(model, replace(update, tensors=noisy), x, y, FedSGD())
    assert found.culprit == "images" and "looks like added noise" in found.explanation
