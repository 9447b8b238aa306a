"""The engine under every method that minimises: it takes functions, never the name of a method.

``loop`` holds the loop itself, ``optimizers`` what moves the variables, ``steps`` schedules and
hooks around a step, ``execution`` how a slope is computed and the choice among ways, ``saved``
checkpoints. An attack needs only the names below.
"""

from leakatlas.blocks.descent.execution import EXECUTIONS, slopes
from leakatlas.blocks.descent.loop import Descended, descend
from leakatlas.blocks.descent.objective import Objective, Value, Variables
from leakatlas.blocks.descent.optimizers import Factory, adam, in_turn, lbfgs, rmsprop, sgd
from leakatlas.blocks.descent.steps import (
    Hook,
    between,
    cosine_decay,
    inside,
    langevin,
    signed,
    step_decay,
)

__all__ = [
    "EXECUTIONS",
    "Descended",
    "Factory",
    "Hook",
    "Objective",
    "Value",
    "Variables",
    "adam",
    "between",
    "cosine_decay",
    "descend",
    "in_turn",
    "inside",
    "langevin",
    "lbfgs",
    "rmsprop",
    "sgd",
    "signed",
    "slopes",
    "step_decay",
]
