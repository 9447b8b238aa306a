"""The bundled audit on machines of different load: the same words, under a clock of its own.

The plan is the bundled one, set-ups, targets, letters and comparisons included; its network is
small, and its attacks are stand-ins that take what the real ones took on an idle machine.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from leakatlas.attacks.api import (
    ActiveAttack,
    Attack,
    Reconstruction,
    TamperedModel,
    Tampering,
    attack,
)
from leakatlas.audit import Diagnosis, Plan, Report, Setting, carry_out, diagnosis
from leakatlas.audit.bundled import bundled_plan
from leakatlas.audit.utility import Utility
from leakatlas.blocks.watch import Watch
from leakatlas.catalogue import registry
from leakatlas.fl import FedSGD, ModelRef, Stage, View
from leakatlas.params import PositiveInt
from leakatlas.threat import Vantage
from tests.audit.machine import MACHINE

ONE, FOUR, STEPS, MASKED = "one image", "four images", "local steps", "masked"
"""What an attack sees of the four set-ups."""

TRUTH: dict[float, Tensor] = {}
"""The images behind an update, by its fingerprint: the stand-ins give results, not surprises."""


DIAGNOSES: dict[str, Diagnosis] = {}
"""They are the same on any machine, so one is made of every set-up."""


def where(view: View) -> str:
    if view.vantage == Vantage.AGGREGATE:
        return MASKED
    if view.rounds and view.update.kind == "delta":
        return STEPS
    return ONE if view.num_examples == 1 else FOUR


def fingerprint(view: View) -> float:
    return sum(float(t.double().abs().sum()) for t in view.update.tensors.values())


@dataclass(frozen=True, kw_only=True)
class Iterates(Attack):
    """Takes so many seconds for an iteration, and needs so many iterations to show something."""

    each: ClassVar[Mapping[str, float]]
    enough: ClassVar[int] = 10_000
    promise: ClassVar[float] = 1.0
    sorts: ClassVar[int] = 1
    steps: PositiveInt = 400
    sort: PositiveInt = 1

    @classmethod
    def variants(cls) -> Mapping[str, Any]:
        return {f"sort {n}": cls(sort=n) for n in range(1, cls.sorts + 1)}

    def run(self, view: View, *, generator: torch.Generator, watch: Watch) -> Reconstruction:
        MACHINE.work(0.1)
        made = 0
        for _ in watch.steps(self.steps, stretches=True):
            MACHINE.work(self.each[where(view)])
            made += 1
        found = TRUTH.get(fingerprint(view))
        if found is None or made < self.enough:
            found = torch.full((1, *view.input_shape), 0.5)
        return Reconstruction(images=found, notes={"promise": self.promise})


@dataclass(frozen=True, kw_only=True)
class Closed(ActiveAttack):
    """Sends a model, and reads what comes back."""

    takes: ClassVar[Mapping[str, float]]

    def tamper(self, view: View, *, generator: torch.Generator, watch: Watch) -> Tampering | None:
        if view.rounds:
            return None
        MACHINE.work(self.takes[where(view)])
        return Tampering(sent=TamperedModel.of(view.model), key={})

    def run(self, view: View, *, generator: torch.Generator, watch: Watch) -> Reconstruction:
        return Reconstruction(images=torch.full((1, *view.input_shape), 0.5))


@dataclass(frozen=True, kw_only=True)
class Learns(Closed):
    """Trains before it sends."""

    takes: ClassVar[Mapping[str, float]] = {ONE: 0.0, FOUR: 0.0}
    steps: PositiveInt = 80

    def tamper(self, view: View, *, generator: torch.Generator, watch: Watch) -> Tampering | None:
        for _ in () if view.rounds else watch.steps(self.steps, stretches=True):
            MACHINE.work(0.02)
        return super().tamper(view, generator=generator, watch=watch)


def stand_in(key: str, base: type[Attack], **constants: object) -> type[Attack]:
    """An attack of a real one's key and needs."""
    needs = registry.load_attack(key).needs
    made = type(key, (base,), {"__module__": __name__, **constants})
    return attack(key, needs=needs)(dataclass(frozen=True, kw_only=True)(made))


SECONDS = {ONE: 0.3, FOUR: 0.3, STEPS: 0.3, MASKED: 0.6}
"""Of a closed form and its round, measured."""


def stand_ins() -> dict[str, type[Attack]]:
    """What the attacks of the bundled audit take on an idle machine, measured."""
    return {
        "inverting_gradients": stand_in(
            "inverting_gradients", Iterates, sorts=9, enough=40, promise=8.0,
            each={ONE: 0.0125, FOUR: 0.027, STEPS: 0.08, MASKED: 0.065},
        ),
        "gias": stand_in("gias", Iterates, sorts=2, each={ONE: 0.02, FOUR: 0.05}),
        "dlg": stand_in("dlg", Iterates, fewest=4, each={FOUR: 0.55}),
        "idlg": stand_in("idlg", Iterates, fewest=4, enough=4, each={ONE: 0.3}),
        "fishing": stand_in("fishing", Learns),
        "robbing_the_fed": stand_in("robbing_the_fed", Closed, takes=SECONDS),
        "mandrake": stand_in("mandrake", Closed, takes={**SECONDS, MASKED: 2.0}),
        "mkor": stand_in("mkor", Closed, takes=SECONDS),
        "loki": stand_in("loki", Closed, takes={**SECONDS, MASKED: 3.0}),
    }  # fmt: skip


def plays(made: type[Attack] | None, setting: Setting) -> bool:
    """Whether there is a stand-in, and the real one takes the set-up: Fishing reads gradients."""
    gradients = isinstance(setting.protocol, FedSGD)
    return made is not None and (gradients or not issubclass(made, Learns))


@pytest.fixture(scope="module")
def plan() -> Plan:
    """The bundled plan on a small network."""
    small = ModelRef("builtin", "fc", {"in_channels": 3, "size": 32, "classes": 8, "widths": [8]})
    bundled, own = bundled_plan(), stand_ins()
    settings = tuple(
        replace(
            setting, model=small.build(), model_ref=small,
            attacks=tuple(key for key in setting.attacks or () if plays(own.get(key), setting)),
        )
        for setting in bundled.settings
    )  # fmt: skip
    return replace(bundled, settings=settings, in_process=True)


@pytest.fixture
def audited(plan: Plan, monkeypatch: pytest.MonkeyPatch, cache: Any) -> Iterator[Any]:
    """Audits on a machine so many times slower than an idle one."""
    own, load, examine = stand_ins(), registry.load_attack, diagnosis.examine
    play = type(plan.settings[0].stage(letter="A", seed=0).federation).play_round

    def played(self: Any, **rest: Any) -> Any:
        masks = sum(defense.key == "secure_aggregation" for defense in self.defenses)
        MACHINE.work(0.05 + masks)
        return play(self, **rest)

    def examined(
        live: Stage, attacks: Sequence[Attack], *, letters: Sequence[str], watch: Watch
    ) -> Diagnosis:
        MACHINE.work(1.2)
        found = DIAGNOSES.get(str(live.scenario))
        if found is None:
            found = examine(live, attacks, letters=letters)
            DIAGNOSES[str(live.scenario)] = found
        return found

    def price(*arguments: Any, **named: Any) -> Utility:
        MACHINE.work(0.9)
        return Utility(0.9)

    monkeypatch.setattr(registry, "load_attack", lambda key: own.get(key) or load(key))
    monkeypatch.setattr("time.perf_counter", lambda: MACHINE.now)
    monkeypatch.setattr("signal.setitimer", MACHINE.set_alarm)
    monkeypatch.setattr("leakatlas.fl.rounds.Federation.play_round", played)
    monkeypatch.setattr("leakatlas.audit.run.examine", examined)
    monkeypatch.setattr("leakatlas.audit.compare.price_of", price)
    monkeypatch.setattr(
        "leakatlas.audit.rehearsal.own_psnr",
        lambda found, game: game.null + found.notes["promise"],
    )
    TRUTH.clear()
    for setting in plan.settings:
        for target in setting.targets:
            live, records = setting.shown_to("B", plan.seed)
            truth = live.truth(target) if setting.name[-4:] != "tion" else None
            if truth is not None:
                TRUTH[fingerprint(live.view(records, target=target))] = truth.images

    def run(slower: float) -> tuple[Report, float]:
        MACHINE.now, MACHINE.load = 0.0, lambda now: slower
        return carry_out(plan), MACHINE.now

    yield run


def words(report: Report) -> list[tuple[object, ...]]:
    """All that a reader is told of the runs, but for figures."""
    every = (*report.runs, *(run for c in report.comparisons for run in c.runs))
    return sorted(
        (run.setting, run.attack, run.target, run.status, run.verdict, str(run.defenses))
        for run in every
    )


@pytest.mark.parametrize("slower", [2.0, 3.0])
def test_a_busy_machine_ends_with_the_words_of_an_idle_one(audited: Any, slower: float) -> None:
    report, spent = audited(1.0)
    other, longer = audited(slower)
    assert words(other) == words(report)
    assert [(v.letter, v.verdict) for v in other.verdicts()] == [
        (v.letter, v.verdict) for v in report.verdicts()
    ]
    assert report.undecided() == other.undecided() == ()
    assert spent <= 300 and longer <= 300
