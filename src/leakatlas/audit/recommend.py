"""Which defenses keep the user's conditions on this set-up, and at what price.

What the frontier measured elsewhere comes first: it says what to expect, and in which order to try.
The set-up is attacked as it is; the strongest attacks then meet every defense that can take part,
at its strongest, and the weaker strengths of those that held. All meet the same attacker, who knows
the defense: one that was only tried against somebody ignorant of it would look better than it is.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from leakatlas.audit import kept
from leakatlas.audit.budget import REPORT
from leakatlas.audit.compare import compare
from leakatlas.audit.deadline import Deadline
from leakatlas.audit.listener import Listener, Silent
from leakatlas.audit.plan import Plan
from leakatlas.audit.run import carry_out
from leakatlas.audit.utility import REFERENCE, Utility, price_of
from leakatlas.bench.study import strength
from leakatlas.blocks.watch import Watch
from leakatlas.catalogue import frontier, registry, results
from leakatlas.catalogue.frontier import Expectation
from leakatlas.errors import InvalidParameter, LeakAtlasError
from leakatlas.fl import Defense, FedSGD
from leakatlas.fl.view import defense_json
from leakatlas.models.structure import has_batchnorm
from leakatlas.report import TRIED, Comparison, Gate, Report, Run
from leakatlas.report.data import worst_case

AS_IT_IS = 0.35
"""Part of the budget for attacking the set-up as it is, which finds the strongest attacks."""

STRONGEST = 0.5
"""Of the rest, the part for every defense at its strongest."""

WEAKER = 0.6
"""Of what is left then, the part for the weaker strengths of those that kept the conditions; prices
in accuracy are measured last, first of what keeps them."""

KNOWING = "C"
"""The weakest adversary that knows which defenses are in force."""

UNREACHED = "the budget ended before it was reached"
UNPRICED = Utility(None, "the budget ended before its price was measured")

UNKNOWN = (0.5, math.inf)
"""Place of a defense of which the frontier says nothing: behind what mostly holds."""

Finding = Literal["keeps", "breaks", "undecided"]


@dataclass(frozen=True)
class Advice:
    """One defense at one strength.

    Args:
        name: Key, knob and value, for people.
        defenses: All that would be in force, as JSON.
        finding: ``keeps`` if no condition holds on what was tried, ``breaks`` if one does,
            ``undecided`` if none does and something of the battery did not run to its end.
        values: Left-hand side of every condition; None without a figure.
        images: How many images the figures are over.
        accuracy: On the task of the plan; None if it was not measured.
        points: What that costs in percentage points beside the set-up as it is.
        reason: Why it is undecided, or why no accuracy is known.
        expected: What the frontier found of it on networks of its own; empty if nothing.
    """

    name: str
    defenses: tuple[Mapping[str, Any], ...]
    finding: Finding
    values: tuple[float | None, ...] = ()
    images: int = 0
    accuracy: float | None = None
    points: float | None = None
    reason: str = ""
    expected: str = ""


@dataclass(frozen=True)
class Recommendation:
    """What was found out.

    Args:
        conditions: As written.
        as_it_is: The set-up under the defenses that it has.
        advice: What was tried, the cheapest that keeps the conditions first.
        left_out: By name of a defense, why it cannot take part here, or was not reached.
        report: The audit behind it, with the comparisons.
        task: Whose accuracy is meant.
    """

    conditions: tuple[str, ...]
    as_it_is: Advice
    advice: tuple[Advice, ...]
    left_out: Mapping[str, str]
    report: Report
    task: str = REFERENCE

    @property
    def kept(self) -> tuple[Advice, ...]:
        """What keeps every condition, cheapest first."""
        return tuple(advice for advice in self.advice if advice.finding == "keeps")

    @property
    def undecided(self) -> bool:
        """Whether something was not tried to its end, or not at all for want of time."""
        judged = (self.as_it_is, *self.advice)
        return UNREACHED in self.left_out.values() or any(a.finding == "undecided" for a in judged)

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "conditions": list(self.conditions),
            "as_it_is": dataclasses.asdict(self.as_it_is),
            "advice": [dataclasses.asdict(advice) for advice in self.advice],
            "left_out": dict(self.left_out),
            "task": self.task,
            "notes": list(self.report.spared()),
        }


def recommend(
    plan: Plan,
    conditions: Sequence[Gate],
    *,
    out: Path,
    listener: Listener | None = None,
    stop: Watch | None = None,
    begun: float | None = None,
) -> Recommendation:
    """Try the implemented defenses on the first setting of a plan, on top of those it has.

    Args:
        plan: The set-up; its alternatives are not used.
        conditions: What must not hold, such as ``P(psnr > 20 dB) > 0.05``.
        out: Folder that keeps finished runs and gets the report.
        listener: Told about progress.
        stop: Ends it early.
        begun: From when on the budget counts, by ``time.perf_counter``; from now if None.

    Raises:
        InvalidParameter: If there is no condition, or the update was captured.
        InvalidInput: As :func:`~leakatlas.audit.run.carry_out`.
    """
    _require_possible(plan, conditions)
    first = plan.settings[0]
    begun = time.perf_counter() if begun is None else begun
    deadline = Deadline(begun, plan.seconds)
    listener, stop = listener or Silent(), stop or Watch()
    seconds = plan.seconds
    passive = any(letter in "AB" for letter in plan.letters)
    letters = tuple(sorted({*plan.letters, *(KNOWING if passive else "")}))
    plan = replace(plan, settings=(first,), letters=letters, alternatives={}, upper_bound=False)
    bare = replace(plan, seconds=None if seconds is None else AS_IT_IS * seconds)
    report = carry_out(bare, out=out, listener=listener, stop=stop, begun=begun)
    as_it_is = _judged("as it is", first.defenses, report.runs, conditions)
    local = not isinstance(first.protocol, FedSGD)
    expected = frontier.expectations(
        results.load(results.default_folder()),
        local=local,
        batch_norm=has_batchnorm(first.model),
    )
    menu: dict[str, Ladder] = {}
    left_out: dict[str, str] = {}
    if as_it_is.finding != "keeps":
        left_out = dict.fromkeys(registry.defense_keys(), UNREACHED)
        with deadline.ends():
            menu, left_out = menu_of(plan, expected)
    sets = {"as configured": first.defenses}
    met: dict[str, Comparison] = {}

    def part(share: float) -> Watch:
        left = None if seconds is None else seconds - deadline.spent
        return Watch(None if left is None else max(share * left, 0.0), parent=stop)

    def meet(alternatives: Mapping[str, tuple[Defense, ...]], share: float) -> None:
        sets.update(alternatives)
        asked = replace(plan, alternatives=alternatives)
        tried = compare(
            asked, report.runs, part(share), out, listener, stop, priced=False, deadline=deadline
        )
        met.update((found.name, found) for found in tried)

    with kept.alone(out):
        if menu:
            meet(dict(ladder[-1] for ladder in menu.values()), STRONGEST)
        weaker = {
            name: defenses
            for ladder in menu.values()
            for name, defenses in ladder[:-1]
            if _holds(met.get(ladder[-1][0]), conditions)
        }
        if weaker:
            meet(weaker, WEAKER)
    prices = _prices(plan, met, sets, conditions, watch=part(1 - REPORT), deadline=deadline)
    for name, price in prices.items():
        met[name] = replace(met[name], accuracy=price.accuracy, reason=price.reason)
    report = replace(
        report,
        comparisons=tuple(met.values()),
        complete=report.complete and not stop.stopped,
        seconds=deadline.spent,
    )
    report.save(out)
    base = met.pop("as configured", None)
    whole = None if base is None else base.accuracy
    advice = [
        replace(
            _judged(c.name, c.defenses, c.runs, conditions, c.accuracy, whole, c.reason),
            expected=expected[_label(c.name)].words if _label(c.name) in expected else "",
        )
        for c in met.values()
    ]
    return Recommendation(
        conditions=tuple(gate.text for gate in conditions),
        as_it_is=replace(as_it_is, accuracy=whole),
        advice=tuple(sorted(advice, key=_order)),
        left_out=left_out,
        report=report,
        task=plan.task.name if plan.task else REFERENCE,
    )


def _require_possible(plan: Plan, conditions: Sequence[Gate]) -> None:
    """Refuse without an aim, or where defenses cannot be put before the update."""
    if not conditions:
        raise InvalidParameter(
            "Nothing says what a defense must achieve; give fail_on in the file or --fail-on, "
            "such as 'P(psnr > 20 dB) > 0.05'."
        )
    if plan.settings[0].captured is not None:
        raise InvalidParameter(
            "A captured update cannot be sent again under other defenses; leave out captured to "
            "simulate the client."
        )


def _prices(
    plan: Plan,
    met: Mapping[str, Comparison],
    sets: Mapping[str, tuple[Defense, ...]],
    conditions: Sequence[Gate],
    *,
    watch: Watch,
    deadline: Deadline,
) -> dict[str, Utility]:
    """By name what each costs in accuracy: first the reference, then what keeps the conditions."""
    prices = dict.fromkeys(met, UNPRICED)
    local = not isinstance(plan.settings[0].protocol, FedSGD)
    with deadline.ends():
        for name in sorted(
            met, key=lambda n: (n != "as configured", not _holds(met[n], conditions))
        ):
            prices[name] = price_of(
                sets[name], local=local, seed=plan.seed, watch=watch, task=plan.task
            )
    return prices


Ladder = tuple[tuple[str, tuple[Defense, ...]], ...]
"""One defense at its strengths, weakest first: name, and all that is in force with it."""


def menu_of(
    plan: Plan, expected: Mapping[str, Expectation]
) -> tuple[dict[str, Ladder], dict[str, str]]:
    """Every implemented defense on top of the configured ones, and those that do not fit, why.

    A defense that is configured already is tried at its other strengths. Those of which the
    frontier expects most come first; those that were measured to fail stand last.
    """
    setting = plan.settings[0]
    menu: dict[str, Ladder] = {}
    left_out: dict[str, str] = {}
    for key in registry.defense_keys():
        present = next((d for d in setting.defenses if d.key == key), None)
        others = tuple(d for d in setting.defenses if d.key != key)
        steps: list[tuple[str, tuple[Defense, ...]]] = []
        try:
            plain = present or registry.load_defense(key)()
            for value in plain.strengths:
                strong = replace(plain, **{plain.knob: value})
                if strong != present:
                    defended = replace(setting, defenses=(*others, strong))
                    defended.stage(letter=KNOWING, seed=plan.seed)
                    name = strength(key, plain.knob, value).replace("=", " = ")
                    steps.append((name, (*others, strong)))
        except LeakAtlasError as problem:
            left_out[key] = str(problem)
            continue
        if steps:
            menu[key] = tuple(steps)

    def hope(key: str) -> tuple[float, float]:
        found = expected.get(_label(menu[key][-1][0]))
        return UNKNOWN if found is None else found.order

    return {key: menu[key] for key in sorted(menu, key=hope)}, left_out


def _label(name: str) -> str:
    """How the frontier calls what is called ``key, knob = value`` here."""
    return name.replace(" = ", "=")


def _holds(found: Comparison | None, conditions: Sequence[Gate]) -> bool:
    """Whether a weaker form of it is worth trying."""
    return found is not None and _findings(found.runs, conditions)[0] == "keeps"


def _findings(runs: Sequence[Run], conditions: Sequence[Gate]) -> tuple[Finding, str]:
    """What the runs say, and why they say nothing.

    A condition that holds on what ran is broken, whatever else did not run.
    """
    scores = worst_case(runs)
    if any(gate.holds(scores) for gate in conditions):
        return "breaks", ""
    open_ = [run for run in runs if run.status not in TRIED or run.status == "cut short"]
    ran = [run for run in runs if run.status in TRIED]
    open_ = [run for run in open_ if run.status != "not applicable"]
    if open_:
        return "undecided", f"{open_[0].attack}: {open_[0].status}, {open_[0].reason}"
    if not ran:
        return "undecided", runs[
            0
        ].reason if runs else "no attack was scored on the set-up as it is"
    return "keeps", ""


def _judged(
    name: str,
    defenses: Sequence[Defense | Mapping[str, Any]],
    runs: Sequence[Run],
    conditions: Sequence[Gate],
    accuracy: float | None = None,
    whole: float | None = None,
    reason: str = "",
) -> Advice:
    scores = worst_case(runs)
    finding, why = _findings(runs, conditions)
    points = None if accuracy is None or whole is None else 100 * (whole - accuracy)
    return Advice(
        name=name,
        defenses=tuple(defense_json(d) if isinstance(d, Defense) else d for d in defenses),
        finding=finding,
        values=tuple(gate.value(scores) for gate in conditions),
        images=len(scores["psnr"]),
        accuracy=accuracy,
        points=points,
        reason="; ".join(dict.fromkeys(filter(None, (why, reason)))),
    )


def _order(advice: Advice) -> tuple[int, float]:
    """What keeps the conditions first, the cheapest of it first."""
    rank = ("keeps", "undecided", "breaks").index(advice.finding)
    return rank, math.inf if advice.points is None else advice.points
