"""What an audit will do: settings, attacks, letters, budget."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from leakatlas.attacks.api import Attack
from leakatlas.blocks.descent import EXECUTIONS
from leakatlas.blocks.watch import Execution
from leakatlas.catalogue import registry
from leakatlas.data import Box, ImageSet
from leakatlas.errors import InvalidInput, InvalidParameter, UnknownName
from leakatlas.fl import Defense, ModelRef, Protocol, Scenario, Stage, Trait, stage
from leakatlas.threat import Grant, Vantage


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One federated set-up to be attacked.

    Args:
        name: For people.
        model: A live model with the initial global weights.
        model_ref: How it is described in recipes.
        victims: Private images, dealt evenly to the clients.
        protocol: The learning algorithm.
        clients: Number of clients.
        targets: Clients that are attacked one after the other.
        defenses: In force.
        box: Pixel space.
        surrogate: Public images for letters with SURROGATE, and for the null baselines.
        grants: Extra facts for the adversary.
        vantage: Where it looks; ``aggregate`` is used where a defense hides single updates.
        attacks: Keys of the attacks to try here; every implemented one if None.
    """

    name: str
    model: nn.Module
    model_ref: ModelRef
    victims: ImageSet
    protocol: Protocol
    clients: int = 1
    targets: tuple[int, ...] = (0,)
    defenses: tuple[Defense, ...] = ()
    box: Box
    surrogate: ImageSet | None = None
    grants: frozenset[Grant] = frozenset()
    vantage: Vantage = Vantage.SERVER
    attacks: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if len(self.victims) < self.clients:
            raise InvalidInput(
                f"{self.name}: {len(self.victims)} images cannot be dealt to {self.clients} "
                "clients; every client needs at least one."
            )
        for target in self.targets:
            if not 0 <= target < self.clients:
                raise InvalidInput(
                    f"{self.name}: target {target} is not one of the {self.clients} clients "
                    f"(0..{self.clients - 1})."
                )

    @property
    def effective_vantage(self) -> Vantage:
        """The vantage, or ``aggregate`` where a defense hides single updates from it."""
        hidden = any(Trait.HIDES_UPDATES in defense.active_traits() for defense in self.defenses)
        if hidden and self.vantage in (Vantage.WIRE, Vantage.SERVER):
            return Vantage.AGGREGATE
        return self.vantage

    def stage(self, *, letter: str, seed: int) -> Stage:
        """The live stage of this setting under one adversary."""
        scenario = Scenario(
            model=self.model_ref,
            data=f"{self.victims.name}#{self.victims.fingerprint()[:12]}",
            surrogate=None if self.surrogate is None else
            f"{self.surrogate.name}#{self.surrogate.fingerprint()[:12]}",
            examples=len(self.victims) // self.clients,
            clients=self.clients,
            protocol=self.protocol,
            defenses=self.defenses,
            letter=letter,
            vantage=self.effective_vantage,
            grants=self.grants,
            seed=seed,
        )  # fmt: skip
        return stage(
            scenario,
            model=self.model,
            victims=self.victims,
            surrogate=self.surrogate,
            box=self.box,
        )


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A whole audit.

    Args:
        settings: What is attacked; the first is the one that alternatives are compared on.
        letters: Threat models, in table order.
        alternatives: Defense sets to compare, by name; each replaces the settings' own.
        attack_parameters: Changes to the presets, by attack key.
        seconds: Time budget; None runs the published presets to their end.
        seed: Of everything.
        execution: How optimisation attacks compute slopes; see
            :mod:`leakatlas.blocks.descent.execution`.
        source: The configuration as JSON, for the report.
        command: The command that repeats this audit.
    """

    settings: tuple[Setting, ...]
    letters: tuple[str, ...]
    alternatives: Mapping[str, tuple[Defense, ...]] = field(default_factory=dict)
    attack_parameters: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    seconds: float | None = 300.0
    seed: int = 0
    execution: Execution = "auto"
    source: Mapping[str, Any] = field(default_factory=dict)
    command: str = "leakatlas audit"


def presets(
    keys: Sequence[str] | None, parameters: Mapping[str, Mapping[str, Any]], *, published: bool
) -> list[Attack]:
    """The attacks of an audit, analytic ones first because they take seconds.

    Args:
        keys: Which; every implemented one if None.
        parameters: Changes by key.
        published: Whether the papers' own presets are used instead of the short ones.

    Raises:
        UnknownName: If a key does not exist or is not implemented.
        InvalidParameter: If a parameter is unknown or outside its range.
    """
    chosen = list(registry.attack_keys() if keys is None else keys)
    attacks: list[Attack] = []
    for key in chosen:
        cls = registry.load_attack(key)
        preset: Attack = cls() if published else cls.tuned()
        if changes := parameters.get(key):
            preset = cls.from_json({**preset.to_json(), **changes})
        attacks.append(preset)
    return sorted(attacks, key=lambda attack: cost_weight(attack))


def cost_weight(attack: Attack) -> float:
    """Share of the budget that an attack asks for; closed forms need next to nothing."""
    category = type(attack).__module__.split(".")[2] if "attacks" in type(attack).__module__ else ""
    return {"analytic": 0.1, "optimization": 1.0, "generative": 1.5}.get(category, 1.0)


_DURATION = re.compile(r"(\d+(?:\.\d+)?)\s*(s|sec|seconds?|m|min|minutes?|h|hours?)?")


def parse_execution(text: str) -> Execution:
    """An execution by name.

    Raises:
        UnknownName: If there is none of that name.
    """
    if text not in EXECUTIONS:
        raise UnknownName("execution", text, EXECUTIONS)
    return text


def parse_budget(text: str | float | None) -> float | None:
    """Seconds from ``30s``, ``10m``, ``1.5h`` or a number; None for ``paper`` (no limit).

    Raises:
        InvalidParameter: If the text is none of these or not positive.
    """
    if text is None or text == "paper":
        return None
    match = _DURATION.fullmatch(str(text).strip().lower())
    if match is None or float(match.group(1)) <= 0:
        raise InvalidParameter(
            f"The budget {text!r} cannot be read; write '30s', '10m', '1.5h' or 'paper'."
        )
    unit = (match.group(2) or "s")[0]
    return float(match.group(1)) * {"s": 1, "m": 60, "h": 3600}[unit]
