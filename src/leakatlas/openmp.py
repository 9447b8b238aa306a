"""How the threads of one computation wait for each other.

Between two parallel parts torch's threads spin, ready for the next one, and yield the core only
after a long while. That is fast on an idle machine. Where another program wants the same cores, the
thread that spins holds the core that the one it waits for needs, and a step of gradient matching on
a small network can take a hundred times as long. With a short spin a busy machine costs what its
other programs take, and an idle one next to nothing.
"""

from __future__ import annotations

from collections.abc import MutableMapping

SPINS = {"GOMP_SPINCOUNT": "1000"}
"""Of GNU OpenMP, which torch brings on Linux: what it takes itself where it knows that there are
more threads than cores. Of other programs it does not know."""

OWN_WISH = ("OMP_WAIT_POLICY", *SPINS)
"""Who sets one of these has chosen."""


def spin_briefly(environment: MutableMapping[str, str]) -> None:
    """Let threads give up their cores soon, in processes that load torch with this environment.

    Args:
        environment: Changed in place, unless it says how threads wait. A process that has loaded
            torch keeps what it had.
    """
    if not any(name in environment for name in OWN_WISH):
        environment.update(SPINS)
