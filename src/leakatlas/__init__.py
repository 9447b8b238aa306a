"""LeakAtlas: what leaks from a federated learning set-up, to whom, and what would stop it."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from leakatlas.audit import Report as Report
    from leakatlas.audit import audit as audit
    from leakatlas.audit import doctor as doctor
    from leakatlas.catalogue.registry import attack as attack
    from leakatlas.catalogue.registry import defense as defense
    from leakatlas.fl import FedAVG as FedAVG
    from leakatlas.fl import FedSGD as FedSGD
    from leakatlas.fl import Scenario as Scenario
    from leakatlas.fl import View as View
    from leakatlas.integrations.loops import capture as capture
    from leakatlas.lint import lint as lint

__version__ = "0.1.0"

# Public name -> where it lives. Loaded on first use, so that the catalogue and `--help` do not
# pay for torch.
_PUBLIC = {
    "audit": ("leakatlas.audit", "audit"),
    "doctor": ("leakatlas.audit", "doctor"),
    "Report": ("leakatlas.audit", "Report"),
    "FedAVG": ("leakatlas.fl", "FedAVG"),
    "FedSGD": ("leakatlas.fl", "FedSGD"),
    "Scenario": ("leakatlas.fl", "Scenario"),
    "View": ("leakatlas.fl", "View"),
    "attack": ("leakatlas.catalogue.registry", "attack"),
    "defense": ("leakatlas.catalogue.registry", "defense"),
    "capture": ("leakatlas.integrations.loops", "capture"),
    "lint": ("leakatlas.lint", "lint"),
}

__all__ = sorted([*_PUBLIC, "__version__"])


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'leakatlas' has no attribute {name!r}")
    module, attribute = _PUBLIC[name]
    return getattr(importlib.import_module(module), attribute)


def __dir__() -> list[str]:
    return __all__
