"""What a label rule must hold, and the threat letters that follow from it.

The letter of a label stage is computed, not asserted: each requirement is mapped to the knowledge
that gives it, and the least threat models that hold all of it are listed.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable

from leakatlas.threat import LETTERS, Knowledge


class Requirement(enum.Enum):
    """One thing that a rule reads or presupposes."""

    BIAS = "bias"
    """The head has a bias, so its gradient is in the update."""
    NONNEG_FEATURES = "nonneg_features"
    """The features that enter the head are not negative (ReLU, sigmoid)."""
    WEIGHTS = "weights"
    """The global model's weights."""
    ARCHITECTURE = "architecture"
    """The forward pass, to run inputs of one's own through the model."""
    BATCH_SIZE = "batch_size"
    """The number of samples behind the update."""
    AUX_DATA = "aux_data"
    """Public data from the client's population."""
    BRIDGE = "bridge"
    """A layer below the head sends a bias gradient, or is linear and sends its weight's; the
    head's own is not read."""
    TRAINING = "training"
    """Learning rate, epochs and local batch size."""


GIVEN_BY = {
    # properties of the model: nobody gives them, the rule is inapplicable without them
    Requirement.BIAS: Knowledge(0),
    Requirement.NONNEG_FEATURES: Knowledge(0),
    Requirement.BRIDGE: Knowledge(0),
    # the shared model and the example count travel with the updates
    Requirement.WEIGHTS: Knowledge.UPDATES,
    Requirement.ARCHITECTURE: Knowledge.UPDATES,
    Requirement.BATCH_SIZE: Knowledge.UPDATES,
    Requirement.AUX_DATA: Knowledge.SURROGATE,
    Requirement.TRAINING: Knowledge.TRAINING,
}
"""The column of the threat model table that grants each requirement."""


def knowledge_for(requirements: Iterable[Requirement]) -> Knowledge:
    """The union of knowledge that the requirements need; updates always."""
    needed = Knowledge.UPDATES
    for requirement in requirements:
        needed |= GIVEN_BY[requirement]
    return needed


def minimal_letters(requirements: Iterable[Requirement]) -> tuple[str, ...]:
    """The threat models that hold everything needed and of which no smaller one does."""
    needed = knowledge_for(requirements)
    able = [model for model in LETTERS.values() if needed in model.knowledge]
    return tuple(
        model.letter
        for model in able
        if not any(
            other.knowledge in model.knowledge and other.knowledge != model.knowledge
            for other in able
        )
    )
