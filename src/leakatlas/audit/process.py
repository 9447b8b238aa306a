"""Where the attacks of an audit run: in one process of their own, which sees views only.

Whatever an attack does there, the victims' images are not in its memory and no path to them is
known to it. In this process (``in_process=True``) it is easier to debug, and could read them; the
recipe of such a run says so.
"""

from __future__ import annotations

import atexit
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING

from leakatlas.attacks.api import Attack, Reconstruction
from leakatlas.bench.adversary import Adversary, Here, Request
from leakatlas.bench.spawned import Spawned
from leakatlas.bench.task import code_of
from leakatlas.blocks.watch import Watch
from leakatlas.fl import Stage, View

if TYPE_CHECKING:
    from leakatlas.audit.plan import Plan

Attacker = Callable[[Attack, View, int, Watch], Reconstruction]
"""``(attack, view, seed, watch) -> reconstruction``."""


def here(attack: Attack, view: View, seed: int, watch: Watch) -> Reconstruction:
    """The attack in this process."""
    return attack(view, seed=seed, watch=watch)


def adversary(plan: Plan) -> Adversary:
    """Who attacks in an audit."""
    return Here() if plan.in_process else _shared(str(plan.settings[0].device))


def attacker(plan: Plan, live: Stage) -> Attacker:
    """Runs attacks on views of one stage, where the plan wants them."""
    chosen = adversary(plan)
    code = code_of(live) if chosen.process == "own" else None
    return lambda attack, view, seed, watch: chosen.attack(
        Request(attack=attack, view=view, seed=seed, watch=watch, code=code)
    )


@functools.cache
def _shared(device: str) -> Spawned:
    """One process for all audits of this one on a device: its imports take seconds."""
    made = Spawned(device=device)
    made.start()  # it imports while the set-up is being examined
    atexit.register(made.close)
    return made
