from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from typing import Literal

import pytest

from leakatlas.errors import InvalidParameter
from leakatlas.params import (
    Configured,
    Fraction,
    NonNegative,
    NonNegativeInt,
    OpenFraction,
    Positive,
    PositiveInt,
    PositiveOrInf,
    Real,
)


@dataclass(frozen=True, kw_only=True)
class Sample(Configured):
    steps: PositiveInt = 10
    skip: NonNegativeInt = 0
    lr: Positive = 0.1
    weight: NonNegative = 0.0
    clip: PositiveOrInf = 1.0
    keep: Fraction = 0.5
    inside: OpenFraction = 0.5
    shift: Real = -1.0
    order: Literal["up", "down"] = "up"
    sizes: tuple[int, ...] = (1, 2)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("steps", 0),
        ("steps", 1.5),
        ("steps", "many"),
        ("skip", -1),
        ("lr", 0.0),
        ("lr", math.inf),
        ("lr", math.nan),
        ("weight", -1e-9),
        ("weight", math.nan),
        ("clip", 0.0),
        ("clip", math.nan),
        ("keep", 1.0001),
        ("keep", math.nan),
        ("inside", 0.0),
        ("inside", 1.0),
        ("shift", math.inf),
        ("order", "sideways"),
        ("sizes", "no"),
        ("sizes", None),
    ],
)
def test_each_constraint_names_class_field_and_value(name: str, value: object) -> None:
    with pytest.raises(InvalidParameter) as caught:
        Sample(**{name: value})  # type: ignore[arg-type]  # invalid on purpose
    assert str(caught.value).startswith(f"Sample({name}={value!r}): ")
    assert str(caught.value).endswith(".")


@pytest.mark.parametrize(
    ("name", "value"), [("skip", 0), ("weight", 0.0), ("clip", math.inf), ("keep", 1.0)]
)
def test_the_ends_that_belong_to_a_range_are_taken(name: str, value: float) -> None:
    assert getattr(Sample(**{name: value}), name) == value  # type: ignore[arg-type]  # by name


def test_values_take_the_declared_type() -> None:
    sample = Sample(lr=1, sizes=[3, 4])  # type: ignore[arg-type]  # what YAML gives
    assert isinstance(sample.lr, float)
    assert sample.sizes == (3, 4)


def test_round_trip_through_real_json_keeps_infinity() -> None:
    sample = Sample(clip=math.inf, order="down", sizes=())
    assert Sample.from_json(json.loads(json.dumps(sample.to_json(), allow_nan=False))) == sample


def test_replace_checks_again() -> None:
    with pytest.raises(InvalidParameter, match=r"Sample\(steps=-3\)"):
        replace(Sample(), steps=-3)


def test_an_unknown_key_is_refused_with_the_known_ones() -> None:
    with pytest.raises(InvalidParameter, match=r"no parameter 'stepz'; it has: steps, skip"):
        Sample.from_json({"stepz": 1})
