"""What an audit will do: settings, attacks, letters, budget."""

from __future__ import annotations

import copy
import dataclasses
import functools
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from leakatlas.attacks.api import Attack
from leakatlas.audit.utility import Task
from leakatlas.bench import harness
from leakatlas.blocks.descent import EXECUTIONS
from leakatlas.blocks.watch import Execution
from leakatlas.catalogue import registry
from leakatlas.data import Box, ImageSet, strangers
from leakatlas.devices import CPU
from leakatlas.errors import (
    IncompatibleDefenses,
    InvalidInput,
    InvalidParameter,
    UnknownName,
    shown,
)
from leakatlas.fl import (
    Defense,
    ModelRef,
    Protocol,
    RoundRecord,
    Scenario,
    Stage,
    Trait,
    check_composition,
    stage,
)
from leakatlas.fl.capture import Capture
from leakatlas.fl.intake import take_in
from leakatlas.fl.state import on_device
from leakatlas.models.sizes import require_readable
from leakatlas.report import Context
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
        surrogate: Public images of the victims' population, for letters with SURROGATE and for the
            null baselines; bundled photos of a stranger's if None, see :attr:`public`.
        grants: Extra facts for the adversary.
        vantage: Where it looks; ``aggregate`` is used where a defense hides single updates, and
            where the mean of several clients was captured.
        attacks: Keys of the attacks to try here; every implemented one if None.
        notes: What was done to the model to make it a client's.
        weights: Where its weights were loaded from, for people; empty if they were not.
        weights_notes: How its checkpoint was understood.
        captured: Rounds of a real client, or means over several, attacked instead of simulated
            ones. The victims are everybody's images, in order of client, or one client's.
        known: Whether the victims are the images behind them; otherwise they stand for a shape.
        device: Where everything but the scores is computed.
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
    notes: tuple[str, ...] = ()
    weights: str = ""
    weights_notes: tuple[str, ...] = ()
    captured: Capture | None = None
    known: bool = True
    device: torch.device = CPU

    def __post_init__(self) -> None:
        # Moved and unwrapped once: every stage of this setting trains the same module.
        output = self.model_ref.output if self.model_ref.kind == "object" else None
        moved = on_device(self.model, self.device)
        object.__setattr__(self, "model", moved)
        model, notes = take_in(moved, self.victims.images[:1].to(self.device), output=output)
        if notes and not self.notes:
            object.__setattr__(self, "model", model)
            object.__setattr__(self, "notes", notes)
        if self.captured is not None:
            object.__setattr__(self, "clients", self._clients_behind(self.captured))
        if len(self.victims) < self.clients:
            raise InvalidInput(
                f"{self.name}: {len(self.victims)} images cannot be dealt to {self.clients} "
                "clients; every client needs at least one. Give a larger batch, or fewer clients "
                "(in YAML data.limit says how many images are used, 4 if left out)."
            )
        if self.box.channels != self.victims.channels:
            raise InvalidInput(
                f"{self.name}: mean and std are given for {self.box.channels} channels, the images "
                f"have {self.victims.channels}. data.channels in YAML, or "
                "ImageSet.with_channels, makes grey images of colour ones and back."
            )
        if not self.targets:
            raise InvalidInput(f"{self.name}: targets: expected at least one client, got none.")
        for target in self.targets:
            if not 0 <= target < self.clients:
                raise InvalidInput(
                    f"{self.name}: target {target} is not one of the {self.clients} clients "
                    f"(0..{self.clients - 1})."
                )
        if self.captured is not None and len(self.targets) != 1:
            raise InvalidInput(
                f"{self.name}: a capture holds what one client sent, or the mean of several; leave "
                "out targets."
            )
        if self.surrogate is not None and self.surrogate.shape != self.victims.shape:
            raise InvalidInput(
                f"{self.name}: the surrogate images have shape {self.surrogate.shape}, the victims "
                f"{self.victims.shape}; give public images of the victims' shape (a folder or file "
                "can be resized: 'folder:PATH@SIZE'; ImageSet.with_channels and data.channels in "
                "YAML make grey images of colour ones and back)."
            )

    def _clients_behind(self, captured: Capture) -> int:
        """How many clients the images are dealt to: all that were averaged, or the one at hand."""
        update = captured.update
        if self.clients not in (1, update.clients):
            raise InvalidInput(
                f"{self.name}: the capture holds the mean of {update.clients} clients, and "
                f"clients says {self.clients}; leave it out."
            )
        whole, one = update.num_examples, update.num_examples // update.clients
        if self.known and len(self.victims) not in (whole, one):
            apart = "" if whole == one else f", or {one}, those of one of its {update.clients}"
            raise InvalidInput(
                f"{self.name}: the captured update says that {whole} examples are behind it, the "
                f"batch holds {len(self.victims)}. Give all {whole}{apart}."
            )
        return update.clients if len(self.victims) == whole else 1

    @functools.cached_property
    def public(self) -> ImageSet:
        """The surrogate; without one, bundled public photos in the victims' shape.

        Everybody has some public images. Those of a stranger say less about the victims, so that
        what letters D, E, G and H reach with them is a lower bound; reports say which it was.
        """
        if self.surrogate is not None:
            return self.surrogate
        return strangers(self.victims)

    def readable(self) -> Setting:
        """Itself, after one pass of the model that says whether it takes these images.

        Raises:
            InvalidInput: If it does not, with those that it takes.
        """
        require_readable(self.model, self.victims.shape, self.device, known=self.known)
        return self

    def honest_round(self, seed: int) -> tuple[Stage, tuple[RoundRecord, ...]]:
        """The rounds of honest clients, played once for all passive attacks, and their stage.

        The stage belongs to an adversary without knowledge: see :meth:`shown_to`.
        """
        if seed not in self._played:
            live = self.stage(letter="A", seed=seed)
            count = live.scenario.rounds
            begun = time.perf_counter()
            records = tuple(
                live.federation.play_round(apply=number < count - 1) for number in range(count)
            )
            harness.learn(live.federation, records[-1], begun)
            self._took[seed] = time.perf_counter() - begun
            self._played[seed] = live, records
        return self._played[seed]

    def client_seconds(self, seed: int) -> float:
        """What one client's part of the honest rounds takes here, set-up included."""
        self.honest_round(seed)
        return self._took[seed] / self.clients

    def known_client_seconds(self, seed: int) -> float | None:
        """The same, if it is known from the honest rounds or from others; none is played for it."""
        return self._took[seed] / self.clients if seed in self._took else None

    def expect(self, seed: int, seconds: float) -> None:
        """Let rounds that were played elsewhere say what the honest ones will take."""
        self._took.setdefault(seed, seconds)

    def shown_to(self, letter: str, seed: int) -> tuple[Stage, tuple[RoundRecord, ...]]:
        """The honest rounds, and their stage under one adversary."""
        live, records = self.honest_round(seed)
        seen = copy.copy(live)
        seen.scenario = dataclasses.replace(live.scenario, letter=letter)
        return seen, records

    @functools.cached_property
    def _played(self) -> dict[int, tuple[Stage, tuple[RoundRecord, ...]]]:
        return {}

    @functools.cached_property
    def _took(self) -> dict[int, float]:
        return {}

    @property
    def hides_updates(self) -> bool:
        """Whether a defense hides single updates from the server, every entry of them."""
        traits = [defense.active_traits() for defense in self.defenses]
        return any(Trait.HIDES_UPDATES in t and Trait.SHOWS_PART not in t for t in traits)

    @property
    def effective_vantage(self) -> Vantage:
        """The vantage, or ``aggregate`` where nobody there sees single updates."""
        averaged = self.captured is not None and self.captured.update.clients > 1
        if (averaged or self.hides_updates) and self.vantage in (Vantage.WIRE, Vantage.SERVER):
            return Vantage.AGGREGATE
        return self.vantage

    @functools.cached_property
    def fingerprints(self) -> tuple[str, str]:
        """Of the private and the public images."""
        return self.victims.fingerprint(), self.public.fingerprint()

    def scenario(self, *, letter: str, seed: int) -> Scenario:
        """This setting under one adversary, as plain data."""
        victims, public = self.fingerprints
        return Scenario(
            model=self.model_ref,
            data=f"{self.victims.name}#{victims[:12]}",
            surrogate=f"{self.public.name}#{public[:12]}",
            examples=len(self.victims) // self.clients,
            clients=self.clients,
            protocol=self.protocol,
            defenses=self.defenses,
            letter=letter,
            vantage=self.effective_vantage,
            grants=self.grants,
            rounds=1 if self.captured is None else len(self.captured.rounds),
            seed=seed,
        )  # fmt: skip

    def stage(self, *, letter: str, seed: int) -> Stage:
        """The live stage of this setting under one adversary."""
        live = stage(
            self.scenario(letter=letter, seed=seed),
            model=self.model,
            victims=self.victims,
            surrogate=self.public,
            box=self.box,
            device=self.device,
        )
        public = () if self.surrogate is None else self.surrogate.notes
        recorded = () if self.captured is None else self.captured.notes
        live.notes = tuple(
            dict.fromkeys(
                (*self.victims.notes, *public, *self.weights_notes, *recorded, *self.notes)
            )
        )
        if self.captured is not None:
            live.play_back(self.captured, target=self.targets[0], known=self.known)
        return live


def stand_in(capture: Capture | None, shape: Sequence[int] | None) -> ImageSet:
    """Blank images where those behind a capture are not at hand: a shape and a number, no more.

    Raises:
        InvalidInput: If there is no capture, or nothing says which shape its images have.
    """
    if capture is None:
        raise InvalidInput("Give a batch to be attacked, or captured=, what a client sent.")
    if shape is None or len(shape) != 3:
        raise InvalidInput(
            "Without the private batch nothing says which shape its images have; give "
            "input_shape=(C, H, W) (data.shape in YAML)."
        )
    # Only one client's: nothing says how the examples are spread over the others.
    count = capture.num_examples // capture.update.clients
    return ImageSet(
        torch.zeros(count, *shape), torch.zeros(count, dtype=torch.int64), ("unknown",),
        "not at hand",
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A whole audit.

    Args:
        settings: What is attacked; the first is the one that alternatives are compared on.
        letters: Threat models, in table order.
        alternatives: Defense sets to compare, by name; each replaces the settings' own.
        attack_parameters: Changes to the presets, by attack key or alias; kept by key.
        seconds: Time budget; None runs the published presets to their end.
        seed: Of everything.
        execution: How optimisation attacks compute slopes; see
            :mod:`leakatlas.blocks.descent.execution`.
        rehearsal: Whether attacks that iterate are tried on public images first, within a budget.
        upper_bound: Whether the other of the two verdicts is run, within the budget; see
            :mod:`leakatlas.report.realism`.
        in_process: Whether attacks run in this process, within reach of the truth; for debugging.
        context: What the audit is about, for the report.
        task: The federation whose accuracy is the price of defenses; the reference task if None.
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
    rehearsal: bool = True
    upper_bound: bool = True
    in_process: bool = False
    context: Context = field(default_factory=Context)
    task: Task | None = None
    source: Mapping[str, Any] = field(default_factory=dict)
    command: str = "leakatlas audit"

    def __post_init__(self) -> None:
        names = [setting.name for setting in self.settings]
        if not names or not self.letters:
            raise InvalidParameter("A plan needs at least one setting and one letter.")
        if doubled := [name for name in names if names.count(name) > 1]:
            raise InvalidParameter(f"Two settings are called {doubled[0]!r}; rename one.")
        object.__setattr__(self, "attack_parameters", self._parameters_by_key())
        if idle := [name for name in self.context.adversaries if name not in self.letters]:
            raise InvalidParameter(
                f"context.adversaries names {shown(idle[0])}, which is not among the letters of "
                f"this audit ({', '.join(self.letters)}); add it to threat, or leave it out here."
            )
        if self.alternatives and self.settings[0].captured is not None:
            raise InvalidParameter(
                "Alternatives are other defenses on the same client, and a captured update cannot "
                "be sent again under them; leave out captured to simulate the client."
            )
        first = self.settings[0]
        for name, defenses in self.alternatives.items():
            try:
                check_composition(defenses, first.protocol, first.model)
            except IncompatibleDefenses as problem:
                raise IncompatibleDefenses(f"alternatives, {shown(name)}: {problem}") from None

    def on(self, device: torch.device) -> Plan:
        """The same audit on another device."""
        moved = tuple(replace(setting, device=device) for setting in self.settings)
        return replace(self, settings=moved)

    def _parameters_by_key(self) -> dict[str, Mapping[str, Any]]:
        """Changes by canonical key; a change without effect is an error."""
        if not self.attack_parameters:
            return {}
        chosen = {
            registry.load_attack(key).key
            for setting in self.settings
            for key in (registry.attack_keys() if setting.attacks is None else setting.attacks)
        }
        found: dict[str, Mapping[str, Any]] = {}
        for name, changes in self.attack_parameters.items():
            key = registry.load_attack(name).key
            if key not in chosen:
                raise InvalidParameter(
                    f"attack_parameters.{name}: {key} is not among the chosen attacks "
                    f"({', '.join(sorted(chosen)) or 'none'}), so it would have no effect; add it "
                    "to `attacks`, or leave it out here."
                )
            if key in found:
                raise InvalidParameter(f"attack_parameters names {key} twice; merge the two.")
            found[key] = changes
        return found


def presets(
    keys: Sequence[str] | None, parameters: Mapping[str, Mapping[str, Any]], *, published: bool
) -> list[Attack]:
    """The attacks of an audit, analytic ones first because they take seconds.

    Args:
        keys: Which; every implemented one if None.
        parameters: Changes by canonical key, as a :class:`Plan` holds them.
        published: Whether the papers' own presets are used instead of the short ones.

    Raises:
        UnknownName: If a key does not exist or is not implemented.
        InvalidParameter: If a parameter is unknown or outside its range.
    """
    chosen = registry.attack_keys() if keys is None else keys
    attacks: list[Attack] = []
    for cls in dict.fromkeys(registry.load_attack(key) for key in chosen):
        preset: Attack = cls() if published else cls.tuned()
        if changes := parameters.get(cls.key):
            preset = cls.from_json({**preset.to_json(), **changes})
        attacks.append(preset)
    return sorted(attacks, key=lambda attack: _category(attack) != "analytic")


def _category(attack: Attack) -> str:
    """Of our own attacks; empty for those of others."""
    room = type(attack).__module__.split(".")
    return room[2] if room[:2] == ["leakatlas", "attacks"] else ""


def parse_execution(text: str) -> Execution:
    """An execution by name.

    Raises:
        UnknownName: If there is none of that name.
    """
    if text not in EXECUTIONS:
        raise UnknownName("execution", text, EXECUTIONS)
    return text
