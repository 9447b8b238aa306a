"""Helpers and probes that the rows share."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from leakatlas.fl import ClientContext, Defense, FedSGD, Protocol, Update, View, stream
from leakatlas.threat import Grant
from tests.conftest import build_stage


def an_update(tensors: Mapping[str, Tensor]) -> Update:
    return Update(tensors=tensors, kind="gradient", state_hash="", num_examples=1)


def a_context(
    model: torch.nn.Module | None = None, x: Tensor | None = None, seed: int = 0
) -> ClientContext:
    x = torch.zeros(1, 3, 8, 8) if x is None else x
    y = torch.arange(len(x))
    return ClientContext(
        0, 0, model or torch.nn.Identity(), x, y, FedSGD(), stream("test", seed), {}
    )


def random_tensors(seed: int = 0) -> dict[str, Tensor]:
    """Several shapes, ties, an all-zero tensor and a single number among them."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return {
        "weight": draw(20, 30),
        "conv": draw(4, 3, 3, 3),
        "bias": draw(20),
        "ties": draw(50).sign(),
        "zeros": torch.zeros(10, dtype=torch.float64),
        "one": draw(1),
    }


def ledger(sent: Mapping[str, Tensor], plain: Mapping[str, Tensor]) -> tuple[float, float]:
    """Cosine and ratio of norms over the tensors of ``plain``."""
    a = torch.cat([sent[name].flatten() for name in plain])
    b = torch.cat([plain[name].flatten() for name in plain])
    return float(a @ b / (a.norm() * b.norm())), float(a.norm() / b.norm())


def replayed(view: View, x: Tensor, *, adaptive: bool = True) -> dict[str, Tensor]:
    """The adversary's replay as plain numbers, with the granted labels."""
    found = view.replay(x, view.labels, adaptive=adaptive)
    return {name: tensor.detach() for name, tensor in found.items()}


def ratio(update: Mapping[str, Tensor], layer: str) -> Tensor:
    """The closed form: a weight row over its bias entry, at the bias of largest magnitude."""
    weight, bias = update[f"{layer}.weight"], update[f"{layer}.bias"]
    row = int(bias.abs().argmax())
    return weight[row] / bias[row]


def first_layer_readout(
    defense: Defense | None, *, act: str = "relu", **settings: Any
) -> tuple[Tensor, Tensor]:
    """What the ratio gives for one photo on a fully connected network, and the photo."""
    stage = build_stage(
        model="fc",
        settings={"widths": (24, 16), "act": act},
        examples=1,
        defenses=() if defense is None else (defense,),
        **settings,
    )
    record = stage.federation.play_round()
    return ratio(record.updates[0].tensors, "hidden.1"), stage.federation.clients[0].x.flatten()


def readout_error(defense: Defense | None, **settings: Any) -> float:
    found, x = first_layer_readout(defense, **settings)
    error = float((found - x).abs().max())
    return error if math.isfinite(error) else math.inf


def observed(
    defense: Defense | None,
    *,
    model: str = "convnet",
    settings: Mapping[str, Any] | None = None,
    protocol: Protocol | None = None,
    examples: int = 3,
    letter: str = "C",
    grants: frozenset[Grant] = frozenset({Grant.LABELS}),
    **more: Any,
) -> tuple[View, Tensor]:
    """An adversary's view of one round, and (for the tests alone) the private batch."""
    stage = build_stage(
        model=model,
        settings={"width": 4} if settings is None else settings,
        protocol=protocol,
        examples=examples,
        letter=letter,
        grants=grants,
        defenses=() if defense is None else (defense,),
        **more,
    )
    record = stage.federation.play_round()
    return stage.view([record]), stage.federation.clients[0].x
