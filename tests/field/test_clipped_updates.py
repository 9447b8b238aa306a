"""Clipped updates, with and without noise: what the doctor can say, and what nobody can."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from leakatlas.audit import ReplayCheck
from leakatlas.catalogue import registry
from leakatlas.fl import Defense, FedSGD, Update
from tests.field.test_public_threads import LOCAL, _batch, _net, _trained, checked


def _defense(key: str, **values: object) -> Defense:
    made: Defense = registry.load_defense(key).from_json(values)
    return made


def _norm(tensors: list[Tensor]) -> float:
    return float(torch.cat([t.flatten() for t in tensors]).norm())


def _gradients(images: Tensor, labels: Tensor) -> list[Tensor]:
    model = _net().eval()
    return list(torch.autograd.grad(F.cross_entropy(model(images), labels), [*model.parameters()]))


def _found(sent: list[Tensor], *declared: Defense) -> ReplayCheck:
    update = Update.from_gradients(sent, _net(), num_examples=3)
    return checked(_net(), update, FedSGD(), declared).replay


CLIP = 0.21


def test_a_clip_of_the_whole_gradient_is_replayed_to_the_last_digit() -> None:
    plain = _gradients(*_batch())
    assert _norm(plain) > CLIP
    clipped = [g * CLIP / (_norm(plain) + 1e-6) for g in plain]
    right = _found(clipped, _defense("clipping", max_norm=CLIP))
    assert right.consistent and right.residual is not None and right.residual < 1e-5
    missing = _found(clipped)
    assert missing.culprit == "scale" and "a clip to the norm that the update has" in (
        missing.explanation
    )
    loose = _found(clipped, _defense("clipping", max_norm=2 * CLIP))
    assert loose.culprit == "scale" and "0.5 times" in loose.explanation
    undone = _found(plain, _defense("clipping", max_norm=CLIP))
    assert undone.culprit == "defense missing" and "did not go through it" in undone.explanation


@pytest.mark.parametrize("share", [0.4, 0.9])
def test_a_clip_of_every_example_is_named_with_its_norm(share: float) -> None:
    each = [_gradients(x, y) for x, y in zip(*(part.split(1) for part in _batch()), strict=True)]
    bound = share * max(_norm(g) for g in each)
    sent = [
        torch.stack([g[i] * min(1.0, bound / _norm(g)) for g in each]).mean(0)
        for i in range(len(each[0]))
    ]
    found = _found(sent)
    assert found.culprit == "example clipping", found.explanation
    assert f"norm {bound:.4g} before" in found.explanation and not found.expected


@pytest.mark.parametrize("clip", [0.02, 1e6])
def test_local_differential_privacy_is_named_as_far_as_noise_allows(clip: float) -> None:
    """The whole change clipped, then Gaussian noise, as Flower's LocalDpMod sends it."""
    before = _net()
    after = _trained(before, LOCAL)
    names = [name for name, _ in before.named_parameters()]
    delta = [after.state_dict()[n] - before.state_dict()[n] for n in names]
    factor = min(1.0, clip / _norm(delta))
    noise = 0.3 * factor * _norm(delta) / sum(t.numel() for t in delta) ** 0.5
    generator = torch.Generator().manual_seed(2)
    noisy = {
        n: before.state_dict()[n] + factor * t + noise * torch.randn(t.shape, generator=generator)
        for n, t in zip(names, delta, strict=True)
    }
    update = Update.from_state_dicts(
        before.state_dict(), after.state_dict() | noisy, before, num_examples=3
    )

    def found(*declared: Defense) -> ReplayCheck:
        return checked(before, update, LOCAL, declared).replay

    silent = found()
    assert silent.culprit == "unknown" and "looks like added noise" in silent.explanation
    assert ("times what the client sends" in silent.explanation) == (factor < 0.9)
    private = _defense(
        "client_dp", unit="update", clip_norm=clip, noise_multiplier=noise / clip, clipping="flat"
    )
    told = found(private)
    assert told.culprit == "defense" and told.expected and not told.consistent
    assert "compare yours" in told.explanation
    deviation = float(told.explanation.split("the deviation ")[1].split()[0])
    assert deviation == pytest.approx(noise, rel=0.2)
