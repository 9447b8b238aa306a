"""Who the adversary is: what it knows, what it was granted on top, and where it looks.

A threat model is a *set* of :class:`Knowledge` (the seven columns of the published table), never
a rank: F knows how to tamper but lacks the surrogate data that D has. What no column settles
(labels, the batch's own BN statistics, ...) is an explicit :class:`Grant`; where the adversary
stands is its :class:`Vantage`. A cell of any table is (letter, vantage), never a letter alone.
"""

from leakatlas.threat.grants import Grant
from leakatlas.threat.knowledge import Knowledge
from leakatlas.threat.models import LETTERS, ThreatModel, threat_model, threat_models
from leakatlas.threat.vantage import Vantage

__all__ = [
    "LETTERS",
    "Grant",
    "Knowledge",
    "ThreatModel",
    "Vantage",
    "threat_model",
    "threat_models",
]
