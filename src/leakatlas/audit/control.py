"""The other-batch control: is a picture owed to the update, or to what the attack learned before?

An attack that learned from public images what pictures look like gives recognisable pictures of
anything. So where such a prior is at work and something recognisable came out, the same attack is
run once more on the update of *other* images, photos of strangers under the same labels. What it
finds there is held against the victims as one more null baseline: a picture that does not beat it
is owed to the prior.

The control costs as much as the run: where it may be needed, each has half of the allowance.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from torch import Tensor

from leakatlas.attacks.api import Attack
from leakatlas.bench import harness
from leakatlas.data import ImageSet, strangers
from leakatlas.errors import LeakAtlasError, Unavailable
from leakatlas.metrics.score import Scores
from leakatlas.report import verdict

if TYPE_CHECKING:
    from leakatlas.audit.plan import Setting
    from leakatlas.bench.adversary import Adversary
    from leakatlas.blocks.watch import Watch
    from leakatlas.fl import Stage

BASELINE = "other_batch"
PRIOR = "the prior, not the update"


def at_work(attack: Attack) -> bool:
    """Whether the attack learned from public images what pictures look like."""
    return attack.draws_on_prior or type(attack).prepare is not Attack.prepare


def part(attack: Attack) -> float:
    """Share of an allowance that the run itself may take."""
    return 0.5 if at_work(attack) else 1.0


def wanted(attack: Attack, scores: Scores) -> bool:
    """Whether there is a picture that the prior may have made; an exact one no prior makes."""
    return at_work(attack) and verdict(scores) == "recognisable"


def other_batch(
    setting: Setting,
    live: Stage,
    attack: Attack,
    *,
    target: int,
    seed: int,
    watch: Watch,
    adversary: Adversary,
) -> Tensor:
    """What the attack finds in the update of other images, ``(M, C, H, W)`` in [0, 1].

    Args:
        setting: The set-up; of a capture, its client is simulated.
        live: Its stage.
        attack: As it ran.
        target: As in the run.
        seed: As in the run.
        watch: With the budget of the run.
        adversary: Who attacks.

    Raises:
        Unavailable: With the reason why there is no control.
    """
    try:
        others = decoys(setting.victims, setting.public)
        decoy = replace(setting, victims=others, captured=None, known=True)
        trial = harness.control_trial(
            live,
            decoy.stage(letter=live.scenario.letter, seed=seed),
            attack,
            target=target,
            seed=seed,
            watch=watch,
            adversary=adversary,
        )
    except LeakAtlasError as problem:
        raise Unavailable(f"the control could not be run: {problem}") from problem
    return trial.images


def decoys(victims: ImageSet, public: ImageSet) -> ImageSet:
    """Bundled photos of strangers under the victims' labels; none of them is public or private.

    Raises:
        Unavailable: If there are too few.
    """
    needed = len(victims)
    # Twice: many of the public images may be the first of these crops, and flat ones are left out.
    found = strangers(victims, 2 * (len(public) + needed))
    taken = {image.numpy().tobytes() for part in (victims, public) for image in part.images}
    free = [i for i, image in enumerate(found.images) if image.numpy().tobytes() not in taken]
    if len(free) < needed:
        raise Unavailable(
            f"the control on another batch takes {needed} photos of strangers, and {len(free)} "
            "are left beside the public images"
        )
    images = found.images[free[:needed]].to(victims.images)
    return ImageSet(images, victims.labels, victims.classes, f"decoys ({found.name})")
