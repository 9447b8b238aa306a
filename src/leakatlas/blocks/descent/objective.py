"""What is minimised: a function of the named variables of one candidate."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

from torch import Tensor

Variables = Mapping[str, Tensor]


class Value(NamedTuple):
    """An objective at one point.

    Args:
        total: Scalar to minimise.
        criterion: Scalar by which the adversary ranks iterates; smaller is better.
    """

    total: Tensor
    criterion: Tensor


Objective = Callable[[Variables, Tensor], Tensor | Value]
"""``(variables, t) -> scalar`` or :class:`Value`, with t, a scalar in [0, 1), how far the run is.

It sees one candidate, and must be a pure function of tensors (no branch on their values, no
randomness of its own): then the engine may batch candidates, trace it and compile it.
"""


def valued(objective: Objective, variables: Variables, t: Tensor) -> Value:
    """The objective's value, with the total as the criterion where it names none."""
    found = objective(variables, t)
    return found if isinstance(found, Value) else Value(found, found)
