"""Rehearsal: before the adversary spends its budget on the victim, it plays on public images.

No one preset serves all networks: what is best on a fresh ConvNet fails on a trained one. The
adversary need not guess. It holds the received state and can do what the client did, on images
whose reconstruction it can judge (:meth:`~leakatlas.fl.View.rehearse`). So it plays its own game
first: the declared variants of an attack (:meth:`~leakatlas.attacks.api.Attack.variants`) go
through successive halving, every variant's schedule stretched over the length of its trial, and
the last ones at the length that is planned for the victim. What rebuilds its own images best is
taken. Of the victim, a rehearsal uses what its view grants, never truth, images or scores.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from leakatlas import sealed
from leakatlas.attacks.api import Attack, cache_folder
from leakatlas.audit.games import Game, multiplicity, own_games, own_psnr
from leakatlas.audit.halving import LEAST, stages
from leakatlas.audit.process import Attacker, here
from leakatlas.blocks.watch import Watch
from leakatlas.data import ImageSet
from leakatlas.errors import Unavailable
from leakatlas.fl import View
from leakatlas.params import checked


@dataclass(frozen=True)
class Trial:
    """One variant in one stage.

    Args:
        variant: Its name.
        iterations: Length of the trial.
        psnr: Mean dB over the rehearsal's images, each at most
            :data:`~leakatlas.audit.games.CEILING`.
        images: How many batches were tried.
        seconds: Wall time of all of them.
    """

    variant: str
    iterations: int | None
    psnr: float
    images: int
    seconds: float


@dataclass(frozen=True)
class Rehearsal:
    """What the adversary learned by playing against itself.

    Args:
        attack: Catalogue key.
        variant: Name of the variant taken.
        parameters: Its parameters, its length not yet planned.
        psnr: What it reached on the adversary's own images, mean dB.
        null: What the mean public image reaches on them.
        iterations: Length of the decisive trials.
        planned: Length that was planned for the victim.
        per_iteration: Seconds of an iteration of the variant taken; of a whole run where none is
            counted.
        images: Whose images were used.
        trials: Everything tried, in order.
        seconds: Wall time.
        cached: Whether the result was kept from before.
    """

    attack: str
    variant: str
    parameters: Mapping[str, Any]
    psnr: float
    null: float
    iterations: int | None
    planned: int | None
    per_iteration: float
    images: str
    trials: tuple[Trial, ...]
    seconds: float
    cached: bool = False

    @property
    def gain(self) -> float:
        """DB above the null baseline; below 0 where the attack rebuilt nothing."""
        return self.psnr - self.null

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values."""
        return {**vars(self), "parameters": dict(self.parameters),
                "trials": [vars(trial).copy() for trial in self.trials]}  # fmt: skip

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Rehearsal:
        """The rehearsal whose :meth:`to_json` is ``values``."""
        return cls(**checked(cls, values))


def rehearse(
    view: View,
    variants: Mapping[str, Attack],
    public: ImageSet,
    *,
    planned: int | None = None,
    images: int = 2,
    seconds: float | None = None,
    per_iteration: float | None = None,
    watch: Watch | None = None,
    seed: int = 0,
    cache: Path | None = None,
    run: Attacker = here,
) -> Rehearsal:
    """Choose among variants of one attack.

    Args:
        view: The adversary's side of the real game.
        variants: By name, all of one attack, what comes first preferred where few are affordable;
            equal ones are tried once.
        public: Images for the adversary's own game, in the shape of the victims'.
        planned: Iterations that the victim's run will have; the first variant's if None.
        images: Batches of public images for each trial, at most.
        seconds: What the trials may take together, given ``per_iteration``; no limit if None.
        per_iteration: Seconds of an iteration, as measured.
        watch: Its stop switch ends the rehearsal; the best of the longest trials is taken. So does
            its deadline, between two trials.
        seed: Of images, labels and starts.
        cache: Folder for results; that of learned artefacts if None.
        run: Runs an attack on a view; in this process if not given.

    Raises:
        NotGranted: If the view holds too little to imitate the client.
        LeakAtlasError: What the attack refuses.
    """
    watch = watch or Watch()
    distinct: dict[str, Attack] = {}
    for name, attack in variants.items():
        if attack not in distinct.values():
            distinct[name] = attack
    planned = planned or next(iter(distinct.values())).length
    file = (cache or cache_folder()) / "rehearsals" / (
        _identity(view, distinct, public, planned, images, seed) + ".sealed"
    )  # fmt: skip
    if (kept := _kept(file)) is not None:
        return replace(kept, cached=True)
    begun = time.perf_counter()
    games = own_games(view, public, images, seed=seed)
    affordable = math.inf
    if seconds is not None and per_iteration is not None:
        affordable = seconds / per_iteration
    rounds = stages(len(distinct), planned or LEAST, images, affordable)
    left = list(distinct)
    trials: list[Trial] = []
    whole = rounds == stages(len(distinct), planned or LEAST, images)
    for stage in rounds:
        tried: list[Trial] = []
        for name in left[: stage.variants]:
            if (trials or tried) and (watch.stopped or _over(watch)):
                whole = False
                break
            attack = distinct[name].lasting(stage.iterations)
            trial = _try(name, attack, games[: stage.images], watch, seed, run)
            if trial is None:  # cut: it stands for nothing
                whole = False
                break
            tried.append(trial)
        trials += tried
        if len(tried) < min(len(left), stage.variants):
            break
        left = [t.variant for t in sorted(tried, key=lambda trial: -trial.psnr)]
    view.forget_reads()  # an attack's own reads are counted when it runs
    if not trials:
        raise Unavailable("The budget ended within the first trial of the rehearsal.")
    best = _decisive(trials)
    found = Rehearsal(
        attack=distinct[best.variant].key,
        variant=best.variant,
        parameters=distinct[best.variant].to_json(),
        psnr=best.psnr,
        null=sum(game.null for game in games[: best.images]) / best.images,
        iterations=best.iterations,
        planned=planned,
        per_iteration=best.seconds / best.images / (best.iterations or 1),
        images=public.name,
        trials=tuple(trials),
        seconds=time.perf_counter() - begun,
    )
    if whole:
        _keep(file, found)
    return found


def _decisive(trials: Sequence[Trial]) -> Trial:
    """The best of the longest trials.

    A last round that the budget cut to one trial takes what led the round before: finalists are
    tried in that order.
    """
    longest = max(trial.iterations or 0 for trial in trials)
    last = [trial for trial in trials if (trial.iterations or 0) == longest]
    return max(last, key=lambda trial: trial.psnr)


def _over(watch: Watch) -> bool:
    left = watch.remaining()
    return left is not None and left <= 0


def _try(
    name: str,
    attack: Attack,
    games: Sequence[Game],
    watch: Watch,
    seed: int,
    run: Attacker,
) -> Trial | None:
    """The trial; None if its time ended before its schedule."""
    begun = time.perf_counter()
    quality = 0.0
    for number, game in enumerate(games):
        inner = Watch(parent=watch)
        found = run(attack, game.view, seed + number, inner)
        if found.status == "cut short" and not watch.stopped:
            return None
        quality += own_psnr(found, game)
    seconds = time.perf_counter() - begun
    return Trial(name, attack.length, quality / len(games), len(games), seconds)


# -- what is kept --------------------------------------------------------------------------------


def _identity(
    view: View,
    variants: Mapping[str, Attack],
    public: ImageSet,
    planned: int | None,
    images: int,
    seed: int,
) -> str:
    """State, protocol, defenses, shapes, multiplicity of labels, variants: what a choice rests on.

    Plans of about the same length share a choice: they are rounded to powers of two.
    """
    attack = next(iter(variants.values()))
    facts = {
        **view.circumstances(),
        "adversary": view.describe(),
        "labels": multiplicity(view),
        "attack": [attack.key, attack.version],
        "variants": {name: variant.to_json() for name, variant in variants.items()},
        "public": public.fingerprint(),
        "length": None if planned is None else round(math.log2(planned)),
        "images": images,
        "seed": seed,
    }
    view.forget_reads()
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _keep(file: Path, found: Rehearsal) -> None:
    try:
        sealed.seal(file, json.dumps(found.to_json()).encode())
    except OSError as problem:  # the choice serves this audit all the same
        warnings.warn(f"{file} cannot be written ({problem.strerror}).", stacklevel=2)


def _kept(file: Path) -> Rehearsal | None:
    """A kept rehearsal, or None if there is none or it is damaged (it is then made again)."""
    content = sealed.unseal(file)
    if content is None:
        return None
    try:
        return Rehearsal.from_json(json.loads(content))
    except sealed.MALFORMED:
        sealed.discard(file, "it is no rehearsal as they are kept here")
        return None
