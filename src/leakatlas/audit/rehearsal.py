"""Rehearsal: before the adversary spends its budget on the victim, it plays on public images.

No one preset serves all networks: what is best on a fresh ConvNet fails on a trained one. The
adversary need not guess. It holds the received state and can do what the client did, on images
whose reconstruction it can judge (:meth:`~leakatlas.fl.View.rehearse`). So it plays its own game
first: the declared variants of an attack (:meth:`~leakatlas.attacks.api.Attack.variants`) go
through successive halving, every variant's schedule stretched over the length of its trial, and
the last ones at the length that is planned for the victim. What rebuilds its own images best is
taken. Of the victim, a rehearsal uses what its view grants, never truth, images or scores.

The labels of the rehearsal's images are drawn from the model's own predictive distribution: a
calibrated network is then as often surprised as by its real data. How often classes repeat follows
the labels granted or recovered from the victim's update.
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

import torch
from torch import Tensor

from leakatlas import sealed
from leakatlas.attacks.api import Attack, Reconstruction, cache_folder
from leakatlas.audit.labels import Reader
from leakatlas.audit.process import Attacker, here
from leakatlas.blocks import observed
from leakatlas.blocks.watch import Watch
from leakatlas.data import ImageSet
from leakatlas.errors import LeakAtlasError, Unavailable
from leakatlas.fl import View, stream
from leakatlas.metrics.assignment import assign, pairwise_mse
from leakatlas.metrics.baselines import mean_image
from leakatlas.metrics.images import psnr_of_mse
from leakatlas.params import checked

CROPS = 96
"""Bundled crops to rehearse on, where the adversary holds no surrogate."""

CEILING = 60.0
"""PSNR in dB at which an image of the rehearsal counts as rebuilt; an exact one is infinite."""

LEAST = 20
"""Iterations below which a trial says nothing."""

LENGTHS = (1 / 4, 1.0)
"""Lengths of the trials of each stage, in units of the planned length. Short trials favour fast
variants and strong priors, so the last ones are as long as the run that they stand for."""

FIELD = (3,)
"""Variants that reach the second stage."""


@dataclass(frozen=True)
class Stage:
    """One round of successive halving.

    Args:
        variants: How many take part.
        iterations: Length of each trial.
        images: Batches for each trial.
    """

    variants: int
    iterations: int
    images: int

    @property
    def cost(self) -> int:
        """Iterations of all its trials."""
        return self.variants * self.iterations * self.images


def stages(
    variants: int, planned: int, images: int, affordable: float = math.inf
) -> tuple[Stage, ...]:
    """The rounds of a rehearsal that costs no more than it may.

    First the number of batches gives way, then the number of variants: trials much shorter than
    the run that they stand for mislead, so a few variants are tried at the planned length rather
    than all of them briefly. Where not even two are affordable so, two are compared in what time
    there is.

    Args:
        variants: V, in order of promise.
        planned: Iterations of the victim's run.
        images: Batches of public images, at most.
        affordable: Iterations that all trials may take together.

    >>> [(s.variants, s.iterations, s.images) for s in stages(8, 400, 2)]
    [(8, 100, 2), (3, 400, 2)]
    >>> [(s.variants, s.iterations, s.images) for s in stages(8, 400, 2, affordable=2_000)]
    [(8, 100, 1), (3, 400, 1)]
    >>> [(s.variants, s.iterations, s.images) for s in stages(8, 400, 2, affordable=1_700)]
    [(4, 400, 1)]
    >>> [(s.variants, s.iterations, s.images) for s in stages(8, 400, 2, affordable=500)]
    [(2, 250, 1)]
    """

    def rounds(images: int) -> tuple[Stage, ...]:
        field = [min(variants, n) for n in (variants, *FIELD)]
        lengths = [min(planned, max(LEAST, int(part * planned))) for part in LENGTHS]
        made = [Stage(n, length, images) for n, length in zip(field, lengths, strict=True)]
        return tuple(made) if variants > FIELD[0] else tuple(made[-1:])

    for fewer in range(images, 0, -1):
        if sum(stage.cost for stage in rounds(fewer)) <= affordable:
            return rounds(fewer)
    several = min(variants, max(2, int(affordable / planned)))
    length = min(planned, max(LEAST, int(affordable / several)))
    return (Stage(several, length, 1),)


@dataclass(frozen=True)
class Trial:
    """One variant in one stage.

    Args:
        variant: Its name.
        iterations: Length of the trial.
        psnr: Mean dB over the rehearsal's images, each at most :data:`CEILING`.
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


@dataclass(frozen=True)
class Game:
    """One batch of the adversary's own, and what it would see of it.

    Args:
        truth: ``(N, C, H, W)`` in [0, 1].
        view: The rehearsal's view.
        null: dB of the mean public image.
    """

    truth: Tensor
    view: View
    null: float


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
    reader: Reader | None = None,
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
        reader: Reads the labels of an update; the attack's own rule if None.
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
        _identity(view, distinct, public, planned, images, seed, reader) + ".sealed"
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
            trial = _try(name, attack, games[: stage.images], watch, seed, reader, run)
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

    A last round that the budget cut to one trial decides nothing by itself: a finalist that was
    not tried at that length may be better, so the trial must also hold in the round before.
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
    reader: Reader | None,
    run: Attacker,
) -> Trial | None:
    """The trial; None if its time ended before its schedule."""
    begun = time.perf_counter()
    quality = 0.0
    for number, game in enumerate(games):
        inner = Watch(parent=watch)
        told = attack
        if reader is not None:
            told = type(attack).from_json({**attack.to_json(), "labels": reader(game.view)})
        found = run(told, game.view, seed + number, inner)
        if found.status == "cut short" and not watch.stopped:
            return None
        quality += own_psnr(found, game)
    seconds = time.perf_counter() - begun
    return Trial(name, attack.length, quality / len(games), len(games), seconds)


def own_psnr(found: Reconstruction, game: Game) -> float:
    """Mean dB over a batch of the adversary's own, one candidate for each image.

    An image without a candidate counts as nothing learned: the null baseline.
    """
    if len(found.images) == 0:
        return game.null
    images = game.view.box.denormalize(found.images) if game.view.has("box") else found.images
    cost = pairwise_mse(images.to(game.truth).clamp(0, 1), game.truth)
    values = [
        game.null if row is None else min(float(psnr_of_mse(cost[row, column])), CEILING)
        for column, row in enumerate(assign(cost).of_original)
    ]
    return sum(values) / len(values)


# -- the adversary's own images ------------------------------------------------------------------


def own_games(view: View, public: ImageSet, count: int, *, seed: int) -> list[Game]:
    """``count`` batches of public images, labelled as the victim's seem to be, and their views."""
    repeats = multiplicity(view)
    model = view.model.eval()
    like = next(model.parameters())
    box = view.box if view.has("box") else None
    surrogate: ImageSet | None = None
    if view.has("surrogate"):
        # A prior learned on the very images that it is to rebuild would flatter its attack.
        surrogate, public = halves(public)
    pool = public.images.to(like)
    inputs = pool if box is None else box.normalize(pool)
    with torch.no_grad():
        beliefs = torch.cat([model(part).softmax(1) for part in inputs.split(64)]).double().cpu()
    generator = stream(seed, "rehearsal", "images")
    games: list[Game] = []
    for number in range(count):
        chosen, labels = labelled(beliefs, repeats, generator)
        others = torch.ones(len(pool), dtype=torch.bool)
        others[chosen] = False
        y = torch.tensor(labels, device=like.device)
        truth = pool[chosen]
        average = mean_image(pool[others]).expand(truth.shape)
        null = float(psnr_of_mse((average - truth.double()).square().flatten(1).mean(1)).mean())
        own = view.rehearse(inputs[chosen], y, seed=seed + number, surrogate=surrogate)
        games.append(Game(truth, own, null))
    return games


def halves(public: ImageSet) -> tuple[ImageSet, ImageSet]:
    """What a rehearsal's adversary holds as its surrogate, and what it attacks: no image twice."""
    return public.subset(range(1, len(public), 2)), public.subset(range(0, len(public), 2))


def multiplicity(view: View) -> tuple[int, ...]:
    """How often each class occurs in the private batch, largest first, as far as can be known.

    Granted labels say it; otherwise the rule that attacks use; distinct classes if that fails.
    """
    N = view.num_examples
    try:
        y = observed.known_labels(view)
    except LeakAtlasError:
        return (1,) * N
    if y.dim() > 1:  # several labels at once: no class to count
        return (1,) * N
    counts = torch.bincount(y)
    return tuple(sorted((int(c) for c in counts if c > 0), reverse=True))


def labelled(
    beliefs: Tensor, repeats: Sequence[int], generator: torch.Generator
) -> tuple[list[int], list[int]]:
    """Indices of images and labels for them, each class as often as ``repeats`` says.

    A class comes from the predictive distribution of a random image; the further images of that
    class are those that the model finds likeliest to belong to it.

    Args:
        beliefs: Class probabilities ``(P, K)`` of the public images.
        repeats: Occurrences of each class.
        generator: Of the draws, on the CPU.
    """
    free = torch.randperm(len(beliefs), generator=generator).tolist()
    taken: set[int] = set()
    chosen: list[int] = []
    labels: list[int] = []
    for times in repeats:
        first = free.pop(0) if free else int(torch.randint(len(beliefs), (1,), generator=generator))
        belief = beliefs[first].clone()
        belief[sorted(taken)] = 0
        if float(belief.sum()) <= 0:  # sure of a class that is taken
            belief = torch.ones_like(belief)
            belief[sorted(taken)] = 0 if len(taken) < len(belief) else 1
        label = int(torch.multinomial(belief, 1, generator=generator))
        taken.add(label)
        likeliest = sorted(free, key=lambda index: -float(beliefs[index, label]))[: times - 1]
        free = [index for index in free if index not in likeliest]
        group = [first, *likeliest]
        chosen += [group[i % len(group)] for i in range(times)]
        labels += [label] * times
    return chosen, labels


# -- what is kept --------------------------------------------------------------------------------


def _identity(
    view: View,
    variants: Mapping[str, Attack],
    public: ImageSet,
    planned: int | None,
    images: int,
    seed: int,
    reader: Reader | None,
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
        "rule": None if reader is None else reader.rule,
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
