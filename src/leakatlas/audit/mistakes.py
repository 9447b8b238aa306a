"""Mistakes in the description of a client, one by one or several at once, each tried."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from leakatlas.audit.described import (
    Described,
    Residual,
    attempted,
    tolerance_of,
    with_protocol,
)
from leakatlas.data import Box
from leakatlas.data.box import CIFAR10, IMAGENET
from leakatlas.fl import FedSGD
from leakatlas.fl.losses import PLAIN, CrossEntropy, as_loss
from leakatlas.fl.state import load_into, model_state

NORMALISATIONS = {
    "that of ImageNet": IMAGENET,
    "that of CIFAR-10": CIFAR10,
    "mean 0.5, deviation 0.5": Box(mean=(0.5,) * 3, std=(0.5,) * 3),
}
"""What people normalise with, tried where none was described."""

AT_ONCE = 3
"""Mistakes that are looked for together."""

PAIRS = 5_000_000
"""Numbers in the gradients of single examples up to which any two mistakes are tried together:
some hundreds of replays."""

BETTER = 0.7
"""A change counts as part of an explanation if it brings the residual below this share."""

Mistake = tuple[str, str, Described]
"""A culprit, the finding in words, and the description without the mistake."""


def mistakes(d: Described, box: Box | None) -> Iterator[Mistake]:
    """Single changes of a description, likeliest first."""
    other = "train" if d.protocol.mode == "eval" else "eval"
    yield (
        "mode",
        f"the client ran in {other} mode, not {d.protocol.mode}",
        with_protocol(d, mode=other),
    )
    reduced: Any = "sum" if d.update.reduction == "mean" else "mean"
    if isinstance(d.protocol, FedSGD):
        yield (
            "reduction",
            f"the client's loss is the {reduced}, not the {d.update.reduction}",
            replace(d, update=replace(d.update, reduction=reduced)),
        )
    else:
        yield from _training(d)
    yield from _labels(d)
    yield from _inputs(d, box)
    yield from _losses(d)
    for defense in d.defenses:
        left = tuple(other for other in d.defenses if other is not defense)
        yield (
            "defense missing",
            f"{defense.key} is declared, but the update did not go through it",
            replace(d, defenses=left),
        )
    if d.update.kind == "delta":
        yield (
            "weights after",
            "the model holds the weights after training, not those before it",
            replace(d, model=_moved(d, -1)),
        )
        yield (
            "swapped",
            "the two states were given the wrong way round: the first is that after training",
            replace(d, model=_moved(d, 1), update=replace(d.update, sign=-d.update.sign)),
        )


def _moved(d: Described, times: int) -> nn.Module:
    """The model with the update added so many times."""
    change = d.update.quantity()
    moved = {
        n: t + times * change[n].to(t) if n in change else t
        for n, t in model_state(d.model).items()
    }
    return load_into(d.model, moved)


def _training(d: Described) -> Iterator[Mistake]:
    if d.order is not None:
        yield (
            "order",
            "the batches were taken in the order given, not in the recorded one",
            replace(d, order=None),
        )
    changes: list[tuple[str, str, dict[str, Any]]] = [
        ("optimizer", "plain SGD", {"optimizer": "sgd", "momentum": 0.0, "weight_decay": 0.0}),
        *(("momentum", f"SGD with momentum {m}", {"optimizer": "sgd", "momentum": m})
          for m in (0.9, 0.5, 0.95, 0.99)),
        ("optimizer", "Adam", {"optimizer": "adam"}),
    ]  # fmt: skip
    for culprit, words, change in changes:
        changed = with_protocol(d, **change)
        if changed.protocol != d.protocol:
            yield culprit, f"the client's optimizer was {words}", changed


def _labels(d: Described) -> Iterator[Mistake]:
    if d.y.dim() != 1 or d.y.is_floating_point():
        return
    d.model.eval()
    with torch.no_grad():
        classes = int(d.model(d.x[:1]).shape[1])
    for words, y in (
        ("one too small: they count from 1 in one place and from 0 in the other",
         (d.y + 1) % classes),
        ("one too large: they count from 1 in one place and from 0 in the other",
         (d.y - 1) % classes),
        ("numbered the other way round", classes - 1 - d.y),
    ):  # fmt: skip
        if int(y.min()) >= 0:
            yield "labels", f"the labels are {words}", replace(d, y=y)
    count = len(d.y)
    orders = (
        list(itertools.permutations(range(count)))
        if count <= 4
        else [tuple(range(count))[::-1], *((*range(s, count), *range(s)) for s in range(1, count))]
    )
    for order in orders:
        y = d.y[torch.tensor(order, device=d.y.device)]
        if not torch.equal(y, d.y):
            yield (
                "labels",
                f"the labels belong to the images in another order ({order})",
                replace(d, y=y),
            )


def _inputs(d: Described, box: Box | None) -> Iterator[Mistake]:
    plain = d.x if box is None else box.denormalize(d.x)
    given = box is not None and box != Box.unit(box.channels)
    if given:
        yield (
            "normalisation",
            "the client did not normalise its images; it trained on [0, 1]",
            replace(d, x=plain),
        )
    for words, known in NORMALISATIONS.items():
        if known.channels == plain.shape[1] and known != box:
            missing = "" if given else ", which was not described"
            yield (
                "normalisation",
                f"the client's normalisation is {words}{missing}",
                replace(d, x=known.normalize(plain)),
            )
    yield "normalisation", "the client trained on bytes, 0 to 255", replace(d, x=plain * 255)
    if d.x.shape[1] == 3:
        yield "channels", "the client's channels come as BGR", replace(d, x=d.x.flip(1))


def _losses(d: Described) -> Iterator[Mistake]:
    candidates = [
        *(as_loss(key) for key in ("cross_entropy", "nll", "bce", "mse", "focal")),
        *(CrossEntropy(label_smoothing=s) for s in (0.05, 0.1, 0.2)),
    ]
    for loss in candidates:
        if loss != d.protocol.loss and not (d.y.dim() == 2 and loss == PLAIN):
            yield "loss", f"the client's loss is {loss.describe()}", with_protocol(d, loss=loss)


# -- several at once -----------------------------------------------------------------------------


def several(d: Described, box: Box | None, first: Residual) -> str | None:
    """Mistakes together: each by how far it brings the residual down, or any two of them."""
    now, best, words = d, first.scaled, list[str]()
    for _ in range(AT_ONCE):
        found = [
            (residual.scaled, text, changed, residual)
            for _, text, changed in mistakes(now, box)
            if (residual := attempted(changed)) is not None
        ]
        scaled, text, now, residual = min(found, key=lambda f: f[0])
        if scaled > BETTER * best:
            break
        best = scaled
        words.append(text)
        if scaled <= tolerance_of(now):
            return _listed(words, residual, now)
    entries = len(d.x) * sum(t.numel() for t in d.update.tensors.values())
    if entries > PAIRS:
        return None
    for culprit, text, changed in list(mistakes(d, box)):
        for other, more, both in mistakes(changed, box):
            if other == culprit or (residual := attempted(both)) is None:
                continue
            if residual.scaled <= tolerance_of(both):
                return _listed([text, more], residual, both)
    return None


def _listed(words: list[str], residual: Residual, d: Described) -> str:
    if abs(residual.factor - 1) > tolerance_of(d):
        words = [*words, factor_in_words(residual.factor, "")[1]]
    return "; ".join(words)


def factor_in_words(factor: float, words: str) -> tuple[str, str]:
    """Culprit and finding where the update is a multiple of what the client sends.

    Args:
        factor: Of the described client's update.
        words: What is wrong besides; may be empty.
    """
    also = f", and {words}" if words else ""
    turned = factor < 0
    return (
        "sign" if turned else "scale",
        f"the update is {factor:.6g} times what the described client sends: "
        + ("the sign is reversed" if turned else "a factor is missing")
        + " (learning rate, step count, weighting, or a clip to the norm that the update has)"
        + also,
    )
