"""Every way in; importing the modules registers their doors."""

from tests.doors import configurations, images, keepings, priors, records, rounds, weights
from tests.doors.registry import DOORS

__all__ = [
    "DOORS",
    "configurations",
    "images",
    "keepings",
    "priors",
    "records",
    "rounds",
    "weights",
]
