"""An iterating attack made ready: timed on the received state, and rehearsed on public images."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from leakatlas.attacks.api import ActiveAttack, Attack
from leakatlas.audit import control, labels, process
from leakatlas.audit.games import CROPS
from leakatlas.audit.halving import LEAST, stages
from leakatlas.audit.jobs import Job, shown
from leakatlas.audit.labels import Reader, needed
from leakatlas.audit.plan import Plan, Setting
from leakatlas.audit.process import Attacker
from leakatlas.audit.rehearsal import Rehearsal, rehearse
from leakatlas.audit.schedule import LONGEST, Pace, pace
from leakatlas.blocks.watch import FILL, Watch
from leakatlas.data import ImageSet, strangers
from leakatlas.errors import InvalidParameter, LeakAtlasError
from leakatlas.fl import View
from leakatlas.threat import LETTERS, Knowledge

IMAGES = 2
"""Batches of public images for each trial, at most."""


GAMES = 0.5
"""Share of a rehearsal's time that playing the adversary's own clients may take."""

READING = 0.25
"""Share of it that finding out which rule reads labels best may take."""

GRADIENTS = 4.0
"""Client's rounds that an iteration of gradient matching takes, about: it differentiates twice."""

ROUNDS = 10.0
"""Client's rounds that a closed form takes, about, with its preparation and its reading."""


@dataclass(frozen=True)
class Timed:
    """What an iterating attack costs on one setting.

    Args:
        attack: As planned by the user.
        view: One target's, to rehearse from; None where the attack refused or crashed.
        run: Runs it.
        pace: None where it could not be timed.
        reason: Why not.
        fixed: Length that the user set, or None.
    """

    attack: Attack
    view: View | None
    run: Attacker | None
    pace: Pace | None
    reason: str
    fixed: int | None

    @property
    def least(self) -> float:
        """Seconds below which a run is no try; 0 where nothing is known."""
        return self.lasting(1)

    def lasting(self, tries: float) -> float:
        """Seconds of a run as long as so many tries; 0 where nothing is known."""
        if self.pace is None:
            return 0.0
        run = self.pace.seconds(min(round(tries * self.attack.fewest), self.fixed or LONGEST))
        return run / FILL / control.part(self.attack)


@dataclass(frozen=True)
class Readied:
    """An iterating attack on one setting, ready for its targets.

    Args:
        attack: With the parameters that the rehearsal chose; its length not yet planned.
        pace: None where it could not be timed.
        rehearsal: How it was chosen, or None.
        reason: Why there was no rehearsal.
        fixed: Length that the user set, or None.
        reader: Reads the labels of an update, where they must be read and the attack takes them.
        ruled_out: Variants that the user's settings contradict.
    """

    attack: Attack
    pace: Pace | None
    rehearsal: Rehearsal | None
    reason: str = ""
    fixed: int | None = None
    reader: Reader | None = None
    ruled_out: tuple[str, ...] = ()

    def told(self) -> dict[str, Any]:
        """The rehearsal for recipe and report."""
        if self.rehearsal is not None:
            told = self.rehearsal.to_json()
            return {**told, "ruled_out": list(self.ruled_out)} if self.ruled_out else told
        return {"refused": self.reason} if self.reason else {}

    def lasting(self, seconds: float, *, slower: float = 1.0) -> Attack:
        """The attack with as many iterations as fit, and no fewer than a try takes.

        Args:
            seconds: What the run may take.
            slower: How many times slower the machine has become since the attack was timed.
        """
        if self.pace is None:
            return self.attack
        longest = self.fixed or LONGEST
        own = control.part(self.attack) * seconds
        fit = self.pace.slower(slower).fits(own, longest)
        return self.attack.lasting(max(fit, min(self.attack.fewest, longest)))


def guessed(job: Job, seed: int) -> float | None:
    """Seconds that a bare try takes, about, where nothing but a client's round was timed.

    Args:
        job: That was not begun.
        seed: Of the audit.
    """
    one = job.setting.known_client_seconds(seed)
    if one is None:
        return None
    return (GRADIENTS * job.attack.fewest if iterates(job.attack) else ROUNDS) * one


def iterates(attack: Attack) -> bool:
    """Whether a schedule can be planned: a passive attack that counts its iterations."""
    return not isinstance(attack, ActiveAttack) and attack.length is not None


def timed(job: Job, plan: Plan, *, stop: Watch) -> Timed:
    """Time an iterating attack on a job's view.

    Args:
        job: The first of the jobs that share the result.
        plan: Seed, parameters that the user set.
        stop: Ends it early.
    """
    changes = plan.attack_parameters.get(job.attack.key, {})
    fixed = job.attack.length if set(changes) & set(job.attack.counts) else None
    try:
        live, records = shown(job, plan)
        view = live.view(records, target=job.target, others=job.attack.watches_others)
        job.attack.check(view)
        run = process.attacker(plan, live)
        at = pace(job.attack, view, watch=stop, seed=plan.seed, run=run)
    # Whatever an attack raises when it is tried out, its run will raise too, and that is the run's
    # own error; here it only means that nothing can be planned.
    except (Exception, SystemExit) as problem:
        return Timed(job.attack, None, None, None, _first_words(problem), fixed)
    return Timed(job.attack, view, run, at, "", fixed)


Readers = dict[tuple[str, str], Reader]
"""By setting and letter: attacks of one adversary on one set-up read its labels alike."""


def readied(
    at: Timed,
    job: Job,
    plan: Plan,
    *,
    seconds: float,
    allowance: float,
    stop: Watch,
    readers: Readers | None = None,
) -> Readied:
    """Rehearse an attack that was timed, if there is time for it.

    Args:
        at: What is known of it.
        job: The first of the jobs that share the result.
        plan: Seed, parameters that the user set, whether to rehearse.
        seconds: What the rehearsal may take.
        allowance: What the victim's run may take.
        stop: Ends it early.
        readers: Those that other attacks had made; a new one is added.
    """
    plain = Readied(at.attack, at.pace, None, at.reason, at.fixed)
    if at.pace is None or at.view is None or at.run is None or not plan.rehearsal:
        return plain
    public = public_images(job.setting, at.view)
    changes = plan.attack_parameters.get(job.attack.key, {})
    length = max(at.pace.fits(allowance, at.fixed or LONGEST), 1)
    if seconds < at.pace.seconds(min(LEAST, length)):
        return replace(plain, reason="the budget leaves no time for a rehearsal")
    reader: Reader | None = None
    reads = hasattr(job.attack, "labels") and "labels" not in changes and needed(at.view)
    readers = {} if readers is None else readers
    place = job.setting.name, job.letter
    learns = reads and place not in readers
    games = (IMAGES + labels.LEAST * learns) * job.setting.client_seconds(plan.seed)
    if games > GAMES * seconds:
        words = f"its own clients' rounds would take about {games:.0f} s of a rehearsal's"
        return replace(plain, reason=f"{words} {seconds:.0f} s")
    begun = time.perf_counter()
    if reads:
        try:
            if learns:
                reading = Watch(READING * seconds, parent=stop)
                readers[place] = Reader(at.view, public, seed=plan.seed, watch=reading)
            reader = readers[place]
        except LeakAtlasError as problem:
            return replace(plain, reason=str(problem))
    seconds -= time.perf_counter() - begun
    each = at.pace.seconds(length) / length
    try:
        found = rehearse(
            at.view,
            distinct_variants(job.attack, changes),
            public,
            planned=length,
            images=IMAGES,
            seconds=seconds,
            per_iteration=each,
            watch=Watch(1.5 * seconds, parent=stop),
            seed=plan.seed,
            run=at.run,
        )
    except (Exception, SystemExit) as problem:  # as above
        return replace(plain, reason=_first_words(problem), reader=reader)
    chosen = type(job.attack).from_json(dict(found.parameters))
    # A kept rehearsal was timed on a machine that may have been busier, or idler.
    own = at.pace
    if not found.cached and found.iterations:
        own = Pace(own.overhead, max(found.per_iteration - own.overhead / found.iterations, 1e-6))
    return Readied(chosen, own, found, "", at.fixed, reader, ruled_out(job.attack, changes))


def carried_over(at: Readied, others: Iterable[Readied], reason: str) -> Readied:
    """An attack that was not rehearsed on a setting, as the same one was chosen on another.

    Args:
        at: What is known of it.
        others: Those that are ready.
        reason: Why it was not rehearsed.
    """
    at = replace(at, reason=reason)
    for other in others:
        found = other.rehearsal
        if found is not None and found.attack == at.attack.key:
            words = f"{reason}; {found.variant!r}, chosen on another set-up, was taken"
            return replace(at, attack=other.attack, reason=words)
    return at


def rehearsal_cost(attack: Attack) -> float:
    """Iterations of a whole rehearsal in units of the planned length."""
    unit = 1_000
    several = len(distinct_variants(attack, {}))
    return sum(stage.cost for stage in stages(several, unit, IMAGES)) / unit


def _first_words(problem: BaseException) -> str:
    if isinstance(problem, LeakAtlasError):
        return str(problem)
    return f"{type(problem).__name__}: {problem}"


def planned_for(job: Job, attack: Attack, at: Readied, plan: Plan) -> Job:
    """The job with an attack whose length was planned, and how it was chosen.

    It takes the labels that the best rule reads from this target's update, if they must be read.
    """
    told = at.told()
    if at.reader is not None:
        live, records = shown(job, plan)
        view = live.view(records, target=job.target, others=job.attack.watches_others)
        reading = at.reader(view)
        attack = type(attack).from_json({**attack.to_json(), "labels": reading.labels})
        told = {**told, "labels": reading.to_json()}
    return replace(job, attack=attack, preset=job.attack, rehearsal=told)


def distinct_variants(attack: Attack, changes: Any) -> dict[str, Attack]:
    """The attack's variants under the user's changes, equal ones once.

    Lengths do not count: a rehearsal and a plan set them. A variant that the changes contradict is
    none of them.

    Raises:
        InvalidParameter: If the first one, which runs without a rehearsal, cannot be had so.
    """
    made: dict[str, Attack] = {}
    for name, variant in type(attack).variants().items():
        try:
            changed = type(attack).from_json({**variant.to_json(), **changes})
        except InvalidParameter:
            if not made:
                raise
            continue
        if changed.lasting(1_000) not in [other.lasting(1_000) for other in made.values()]:
            made[name] = changed
    return made


def ruled_out(attack: Attack, changes: Mapping[str, Any]) -> tuple[str, ...]:
    """Names of the attack's variants that the user's changes contradict."""
    names = []
    for name, variant in type(attack).variants().items():
        try:
            type(attack).from_json({**variant.to_json(), **changes})
        except InvalidParameter:
            names.append(name)
    return tuple(names)


def public_images(setting: Setting, view: View) -> ImageSet:
    """The surrogate images where the adversary holds them, bundled photos of strangers else."""
    if LETTERS[view.letter].knowledge & Knowledge.SURROGATE and setting.surrogate is not None:
        return setting.surrogate
    return strangers(setting.victims, CROPS)
