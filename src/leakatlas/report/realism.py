"""What decides whether a laboratory result carries over, and the two verdicts that follow.

*As deployed*: the adversary holds what its letter and vantage give it against this client, and no
oracle. *Diagnostic upper bound*: labels, batch statistics and the like are granted and the client
computes in eval mode where that is possible; no such adversary need exist, and none of the same
attacks is expected to reach more.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from leakatlas.report.run import Run
from leakatlas.report.words import Verdict, rank
from leakatlas.threat import LETTERS

Side = Literal["as deployed", "diagnostic upper bound"]


@dataclass(frozen=True)
class Realism:
    """The record of one setting, and its runs on the other side.

    Args:
        setting: Name of the setting.
        record: What the laboratory held fixed: mode, weights, protocol, resolution, grants.
        cautions: Conditions under which attacks reach more than where they do not hold.
        configured: What the setting's own runs are.
        separates: What the upper bound has beyond the setting as deployed; empty if nothing does,
            and then the two coincide.
        runs: On the side that was not configured.
        reason: Why there are none; empty if there are some, or nothing separates.
    """

    setting: str
    record: Mapping[str, Any]
    cautions: tuple[str, ...] = ()
    configured: Side = "as deployed"
    separates: tuple[str, ...] = ()
    runs: tuple[Run, ...] = ()
    reason: str = ""

    def in_words(self) -> str:
        """The record as one line: client, model, data, adversary."""
        r = self.record
        local = ""
        if "epochs" in r:
            order = "shuffled" if r["shuffled"] else "in order"
            local = f" ({r['optimizer']}, {r['epochs']} x batches of {r['batch_size']}, {order})"
        drawn = [f"{r['batchnorm_layers']} BN layers"] if r["batchnorm_layers"] else []
        drawn += ["dropout"] if r["dropout"] else []
        kind = " with " + " and ".join(drawn) if drawn else ", no BN, no dropout"
        size = "x".join(str(side) for side in r["resolution"])
        augmented = f"{r['augmentation']} augmentations" if r["augmentation"] else "no augmentation"
        steps = f"{r['local_steps']} local step{'s' if r['local_steps'] > 1 else ''}"
        images = f"{r['examples']} image{'s' if r['examples'] > 1 else ''}"
        shared = "" if r["shared"] == ["*"] else f", shares {', '.join(r['shared'])}"
        return (
            f"{r['algorithm']}{local}, {steps} on {images} of {size}, {augmented}; "
            f"model in {r['mode']} mode{kind}, weights {r['weights']}{shared}; "
            f"{r['update']} update; granted: {', '.join(r['granted']) or 'nothing'}"
        )

    def cadence(self) -> str:
        """Images and local computation behind one update, in a few words."""
        r = self.record
        local = f", {r['epochs']} x batches of {r['batch_size']}" if "epochs" in r else ""
        return f"{r['algorithm']} on {r['examples']} images{local}, {r['loss']}"

    def seconds(self) -> float:
        """Wall time of the runs on the other side."""
        return sum(run.seconds for run in self.runs)

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values."""
        return {
            "setting": self.setting,
            "record": dict(self.record),
            "cautions": list(self.cautions),
            "configured": self.configured,
            "separates": list(self.separates),
            "runs": [run.to_json() for run in self.runs],
            "reason": self.reason,
        }


@dataclass(frozen=True)
class Standing:
    """The two verdicts on one adversary.

    Args:
        letter: Threat model.
        deployed: As deployed.
        deployed_run: The run that it rests on, or None.
        bound: The diagnostic upper bound.
        bound_run: The run that it rests on, or None.
        between: What separates the two, or why they are one, in a sentence.
    """

    letter: str
    deployed: Verdict
    deployed_run: Run | None
    bound: Verdict
    bound_run: Run | None
    between: str

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values; runs by what names them."""
        return {
            "as_deployed": self.deployed,
            "as_deployed_by": _name(self.deployed_run),
            "upper_bound": self.bound,
            "upper_bound_by": _name(self.bound_run),
            "between": self.between,
        }


def _name(run: Run | None) -> dict[str, str] | None:
    return None if run is None else {"attack": run.attack, "setting": run.setting}


COINCIDE = "nothing separates the two: this client grants the adversary all that an oracle would"
EXACT = "images come out exactly as deployed, so nothing is left for an upper bound to add"
EQUAL = "with all that was granted, no attack reached a stronger verdict"
NOTHING_RAN = "no attack within this adversary's reach ran"
OUT_OF_REACH = (
    "only the strongest attacks are repeated for the other verdict, and none of them is within "
    "this adversary's reach"
)


def standings(
    runs: Sequence[Run], realism: Sequence[Realism], letters: Sequence[str]
) -> tuple[Standing, ...]:
    """Both verdicts for each letter.

    As deployed count the runs of that side alone; for the upper bound all runs count, since who
    holds more can do all that the other does.

    Args:
        runs: Of the settings as configured.
        realism: The records; without any, runs count as they were deployed.
        letters: Threat models asked for.
    """
    deployed, bound = ([run for _, run in side] for side in sides(runs, realism))
    return tuple(_standing(letter, deployed, bound, realism) for letter in letters)


def sides(
    runs: Sequence[Run], realism: Sequence[Realism]
) -> tuple[list[tuple[str, Run]], list[tuple[str, Run]]]:
    """Runs as deployed, and those of upper bounds, each with the setting that it belongs to.

    Args:
        runs: Of the settings as configured.
        realism: The records.
    """
    oracle = {found.setting for found in realism if found.configured != "as deployed"}
    deployed = [(run.setting, run) for run in runs if run.setting not in oracle]
    bound = [(run.setting, run) for run in runs if run.setting in oracle]
    for found in realism:
        side = deployed if found.setting in oracle else bound
        side.extend((found.setting, run) for run in found.runs)
    return deployed, bound


def _standing(
    letter: str, deployed: Sequence[Run], bound: Sequence[Run], realism: Sequence[Realism]
) -> Standing:
    below, above = strongest(deployed, letter), strongest([*deployed, *bound], letter)
    low, high = _word(below), _word(above)
    ran = strongest(bound, letter) is not None
    apart = [found for found in realism if found.separates]
    if not apart:
        return Standing(letter, low, below, low, below, COINCIDE)
    words = "; ".join(dict.fromkeys(words for found in apart for words in found.separates))
    if not ran:
        if low == "exact leak":
            return Standing(letter, low, below, low, below, EXACT)
        reasons = [found.reason for found in apart if found.reason]
        reasons = reasons or [OUT_OF_REACH if below is not None else NOTHING_RAN]
        reason = "; ".join(dict.fromkeys(reasons))
        return Standing(letter, low, below, "not tested", None, f"not run: {reason}")
    if below is None:
        reasons = [found.reason for found in apart if found.reason]
        extra = f" (as deployed not run: {'; '.join(dict.fromkeys(reasons))})" if reasons else ""
        return Standing(letter, low, below, high, above, f"{words}{extra}")
    if rank(high) == rank(low):
        repeated = strongest(bound, letter)
        assert repeated is not None, "it ran"
        short = ""
        if repeated.seconds < below.seconds - 1:
            short = f"; it had {repeated.seconds:.0f} s, as deployed {below.seconds:.0f} s"
        return Standing(letter, low, below, high, above, f"{EQUAL} ({words}{short})")
    return Standing(letter, low, below, high, above, words)


def strongest(runs: Sequence[Run], letter: str) -> Run | None:
    """The strongest run that a letter's knowledge allows; one that is not scored if none is."""
    held = LETTERS[letter].knowledge
    within = [run for run in runs if run.tried and not LETTERS[run.letter].knowledge & ~held]
    scored = [run for run in within if run.scores is not None]
    if scored:
        return max(scored, key=strength)
    return within[0] if within else None


def strength(run: Run) -> tuple[int, float]:
    """What a run is compared by: its verdict, then its best image."""
    return rank(run.verdict), run.scores.psnr.max if run.scores is not None else 0.0


def _word(run: Run | None) -> Verdict:
    return "not tested" if run is None else run.verdict
