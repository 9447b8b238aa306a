from __future__ import annotations

import pytest
from torch import nn

from leakatlas import data, models
from leakatlas.audit import Plan, Setting
from leakatlas.data import Box
from leakatlas.fl import FedSGD, ModelRef


@pytest.fixture
def small_plan() -> Plan:
    """Two cheap attacks on one photo and a linear network: about a second."""
    reference = ModelRef("builtin", "fc", {"in_channels": 3, "size": 32, "classes": 8,
                                           "widths": [16]})  # fmt: skip
    setting = Setting(
        name="one photo",
        model=reference.build(),
        model_ref=reference,
        victims=data.photos(32).subset([0]),
        protocol=FedSGD(),
        box=Box.unit(3),
        surrogate=data.patches(32, 32, part="surrogate"),
        attacks=("inverting_gradients", "robbing_the_fed"),
    )
    return Plan(
        settings=(setting,),
        letters=("A", "B", "G"),
        attack_parameters={"inverting_gradients": {"steps": 5}},
        seconds=600.0,  # more than it needs on any machine
    )


@pytest.fixture
def small_model() -> nn.Module:
    return models.build("fc", in_channels=3, size=32, classes=8, widths=[16])
