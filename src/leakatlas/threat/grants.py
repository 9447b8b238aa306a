"""Knowledge that no column of the threat model table settles."""

from __future__ import annotations

import enum

from leakatlas.errors import UnknownName


class Grant(enum.StrEnum):
    """One fact handed to the adversary by the scenario; recorded with every result.

    A grant that gives away the answer to a sub-problem is an *oracle*: useful as an upper bound
    and as a correctness test, never silently part of a threat model.
    """

    LABELS = "labels"
    """The labels of the private batch, in its order."""
    BATCH_BN = "batch_bn"
    """Per-channel mean and biased variance of every BN layer's input on the private batch."""
    BATCH_ORDER = "batch_order"
    """Which examples met in which local step."""
    DROPOUT_MASKS = "dropout_masks"
    """What the model drew in every local step: masks of dropout and stochastic depth."""
    AUGMENTATION = "augmentation"
    """What the client drew to transform its images in every local step."""
    PIXEL_RANGE = "pixel_range"
    """The pixel space, for letters without basic knowledge."""
    DEFENSE_SECRETS = "defense_secrets"
    """Secret state of the defenses: private weights, keys, drawn masks."""

    @classmethod
    def named(cls, name: str) -> Grant:
        """The grant with this name.

        Raises:
            UnknownName: If there is none.
        """
        try:
            return cls(name)
        except ValueError:
            raise UnknownName("grant", name, map(str, cls)) from None
