"""Whether an attack can start: the one question that doctor and audit ask of every attack."""

from __future__ import annotations

import copy
import traceback
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from leakatlas.attacks.api import ActiveAttack, Attack, Outlook
from leakatlas.errors import InvalidParameter, LeakAtlasError, NotGranted
from leakatlas.fl import RoundRecord, Stage, View, unrolled
from leakatlas.fl.capture import Replayed
from leakatlas.fl.draws import is_large
from leakatlas.fl.granted import SOURCES
from leakatlas.report import Status
from leakatlas.threat import threat_model


@dataclass(frozen=True)
class Start:
    """Under which of the chosen letters an attack starts, or why it does not.

    Args:
        letter: The weakest chosen letter under which it starts; without any, the weakest one that
            gives what it needs, empty if none does.
        outlook: What the attack expects there.
        obstacle: ``refused`` (no chosen letter gives what it needs, or a grant is missing), ``not
            applicable`` (theory) or ``error`` (it crashed when it was asked); None if it starts.
        wants: What the user could do so that it starts; empty where the choice of letters leaves
            it out.
        trace: Where it crashed.
    """

    letter: str
    outlook: Outlook
    obstacle: Status | None = None
    wants: str = ""
    trace: str = ""

    @property
    def word(self) -> str:
        """``applicable``, ``unknown``, or what stands in the way."""
        return self.obstacle or self.outlook.verdict


MOST = 3
"""Views of a large network that are held at once: each is two copies of it."""


@dataclass(frozen=True)
class Adversaries:
    """Those of one stage, by letter: a view of a large model takes seconds, so each is made once.

    Args:
        stage: The set-up.
        record: A round of honest clients, which a passive attack is shown.
    """

    stage: Stage
    record: RoundRecord | None = None
    _views: dict[tuple[str, bool, bool], View] = field(default_factory=dict, repr=False)
    _replays: dict[str, tuple[LeakAtlasError | None, frozenset[str]]] = field(
        default_factory=dict, repr=False
    )

    def view(self, letter: str, *, passive: bool, others: bool = False) -> View:
        """What one of them holds, nothing of it read yet; before any round, if it is active."""
        records = [self.record] if passive and self.record is not None else []
        place = letter, bool(records), others
        if place not in self._views:
            if is_large(self.stage.federation.model):
                for oldest in [*self._views][: 1 - MOST]:
                    del self._views[oldest]
            seen = copy.copy(self.stage)
            seen.scenario = replace(self.stage.scenario, letter=letter)
            self._views[place] = seen.view(records, target=min(self.stage.victims), others=others)
        self._views[place].forget_reads()
        return self._views[place]

    def replays(self, letter: str) -> frozenset[str]:
        """Ask whether one of them can repeat the client's computation.

        Returns:
            The fields that the answer rests on.

        Raises:
            LeakAtlasError: Why not.
        """
        if letter not in self._replays:
            view, problem = self.view(letter, passive=True), None
            try:
                view.replayer()
            except LeakAtlasError as refusal:
                problem = refusal
            self._replays[letter] = problem, view.touched
        refused, rests_on = self._replays[letter]
        if refused is not None:
            raise refused
        return rests_on

    def alike(self, letter: str, other: str, fields: Iterable[str]) -> bool:
        """Whether two of them hold the same of some fields."""
        held = [threat_model(one).knowledge for one in (letter, other)]
        return all(
            grant in self.stage.scenario.grants or bool(held[0] & source) == bool(held[1] & source)
            for source, grant in (SOURCES[name] for name in fields)
        )


def can_start(adversaries: Adversaries, attack: Attack, letters: Sequence[str]) -> Start:
    """Ask an attack under each letter, weakest first, until it may start.

    Args:
        adversaries: Of the set-up.
        attack: With its parameters.
        letters: Threat models to choose from, weakest first.
    """
    stage = adversaries.stage
    if isinstance(attack, ActiveAttack) and isinstance(stage.federation, Replayed):
        over = "the captured round is over: nothing can be sent to its client any more"
        return Start("", Outlook("hopeless", over), "not applicable")
    refusals: list[Start] = []
    ruled_out: Start | None = None
    no: tuple[str, frozenset[str]] | None = None

    def lack(letter: str) -> int:
        held = threat_model(letter).knowledge
        return len(attack.lacks(held, stage.scenario.grants).names())

    # Letters that hold too little are not asked, unless all do; the one that lacks least gives the
    # most useful reason. Nor is one that holds the same of what the last answer rested on.
    for letter in [one for one in letters if not lack(one)] or [min(letters, key=lack)]:
        if no is not None and adversaries.alike(no[0], letter, no[1]):
            continue
        passive, rests_on = not isinstance(attack, ActiveAttack), frozenset[str]()
        view = adversaries.view(letter, passive=passive, others=attack.watches_others)
        shown = passive and adversaries.record is not None
        try:
            attack.check(view)
            if shown and view.update.kind == "delta":
                _ = view.protocol
            if shown and attack.replays:
                rests_on = adversaries.replays(letter)
            outlook = attack.outlook(view)
        except NotGranted as problem:
            outlook = Outlook("hopeless", str(problem))
            missing, ungranted = attack.missing(view), attack.grants() - view.grants
            if ungranted and not missing:
                wants = f"give the grant {', '.join(sorted(ungranted))}"
                return Start(letter, outlook, "refused", wants)
            refusals.append(Start("", outlook, "refused"))
            continue
        except InvalidParameter as problem:  # this machine lacks the memory
            outlook = Outlook("hopeless", str(problem))
            return Start(letter, outlook, "refused", unrolled.WAY_OUT)
        except LeakAtlasError as problem:
            outlook = Outlook("hopeless", str(problem))
        # An attack may come from anywhere: its mistakes are its own result and end nothing else.
        except Exception as crash:
            outlook = Outlook("unknown", f"{type(crash).__name__}: {crash}")
            return Start(letter, outlook, "error", trace=traceback.format_exc())
        if outlook.verdict != "hopeless":
            return Start(letter, outlook)
        no = letter, rests_on | view.touched
        ruled_out = ruled_out or Start(letter, outlook, "not applicable")
    return ruled_out or refusals[0]
