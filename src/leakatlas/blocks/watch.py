"""What surrounds a loop without being part of the method: budget, progress, checkpoints."""

from __future__ import annotations

import itertools
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from torch import Tensor

from leakatlas.errors import InvalidParameter, Unavailable

Execution = Literal["auto", "eager", "channels_last", "vmap", "traced", "compiled", "finite"]
"""How slopes are computed; see :mod:`leakatlas.blocks.descent.execution`."""


@dataclass(frozen=True)
class Step:
    """One iteration.

    Args:
        index: From 0.
        progress: How far the schedule is, in [0, 1): by steps, or by time if the budget ends
            sooner, so that a schedule written in ``progress`` completes either way.
    """

    index: int
    progress: float


SPACING = 1.15
"""From one kept report to the next: the factor between their numbers."""


MOST_KEPT = 2**24
"""Numbers that the iterates of a run take together, 64 MiB in float32; beyond it, every second one
is let go."""


class Trail:
    """The best iterates of a run so far, each kept with the CPU seconds that it took.

    Reports are kept ever more rarely, so that long runs stay small: their numbers grow by
    :data:`SPACING`, and the last iterate is what came out. An attack that makes several descents
    one after the other leaves the reports of all of them.

    Attributes:
        points: CPU seconds of this process since :meth:`begin`, and images ``(N, C, H, W)`` in the
            model's input space.
    """

    def __init__(self) -> None:
        self.points: list[tuple[float, Tensor]] = []
        self.begin()

    def begin(self) -> None:
        """From now on."""
        self.points.clear()
        self._begun, self._reports, self._next = time.process_time(), 0, 1.0

    def add(self, best: Tensor) -> None:
        """Hear of a report."""
        self._reports += 1
        if self._reports >= self._next:
            self._next = max(self._reports + 1.0, SPACING * self._reports)
            self._keep(best)

    def end(self, images: Tensor) -> None:
        """What came out; without any report there was no way to it, and nothing is kept."""
        self.points = [point for point in self.points if point[1].shape == images.shape]
        if self.points:
            self._keep(images.to(self.points[-1][1]))

    def _keep(self, images: Tensor) -> None:
        self.points.append((time.process_time() - self._begun, images.detach().cpu().clone()))
        while len(self.points) * images.numel() > MOST_KEPT and len(self.points) > 3:
            self.points = [*self.points[:-1:2], self.points[-1]]


@dataclass
class Conduct:
    """How the descents of one run are carried out; shared by all its watches.

    Args:
        execution: How slopes are computed.
        checkpoints: Folder for checkpoints; a run started again with the same folder goes on
            where it was. Nothing is kept if None.
        save_every: Seconds between two checkpoints.
        trail: Told of the best iterate at every report.
        executions: What each descent used, in words; filled while running.
    """

    execution: Execution = "auto"
    checkpoints: Path | None = None
    save_every: float = 30.0
    trail: Trail | None = None
    executions: list[str] = field(default_factory=list)
    _run: str = ""
    _descents: int = 0

    def begin(self, run: str) -> None:
        """The descents that follow belong to ``run``, which names a folder of its own."""
        self._run, self._descents = run, 0

    def next_file(self) -> Path | None:
        """The checkpoint of the next descent: a run makes its descents in a fixed order."""
        self._descents += 1
        if self.checkpoints is None:
            return None
        return self.checkpoints / self._run / f"{self._descents:04d}.pt"


PACED = 3
"""Iterations of a loop after which its pace is known."""

FILL = 0.85
"""Share of an allowance that is planned; the rest is for a machine that becomes slower."""

FEWEST = 20
"""Planned iterations below which a loop that asked for more is no try of its method."""

ENOUGH = 0.5
"""Share of its planned iterations with which a schedule that was hurried to its end counts as made:
on a machine that slows down, its later steps stand for several."""


MORE_TIME = "give it more time, as with --budget"


class Watch:
    """A deadline, a stop switch and a listener.

    Args:
        seconds: Time budget from now, within that of ``parent``; None for no limit of its own.
        listen: Called with ``(fraction done, note)`` a few times a second.
        parent: Stopping it stops this one too, and its deadline is one for this one.
        conduct: How descents are carried out; the parent's if None.
    """

    def __init__(
        self,
        seconds: float | None = None,
        listen: Callable[[float, str], None] | None = None,
        *,
        parent: Watch | None = None,
        conduct: Conduct | None = None,
    ) -> None:
        self.seconds = seconds
        self.start = time.perf_counter()
        self.deadline = None if seconds is None else self.start + seconds
        self.listen = listen
        self.parent = parent
        inherited = Conduct() if parent is None else parent.conduct
        self.conduct: Conduct = inherited if conduct is None else conduct
        self.within = parent
        """Whose deadline holds too."""
        self.note = ""
        self._stopped = False
        self.cut_short = False
        """Whether a loop ended before the end of its schedule."""
        self.planned: tuple[int, int] | None = None
        """Iterations made, and asked for, of a schedule that was stretched to fit its time."""

    def stop(self) -> None:
        """End every loop at its next step; what was computed is kept."""
        self._stopped = True

    def interrupt(self) -> None:
        """Ctrl-C reached a loop: stop the whole run, at the top."""
        top = self
        while top.parent is not None:
            top = top.parent
        top.stop()
        self.cut()

    @property
    def stopped(self) -> bool:
        """Whether :meth:`stop` was called here or above."""
        return self._stopped or (self.parent is not None and self.parent.stopped)

    def remaining(self) -> float | None:
        """Seconds left here and above, or None without a budget."""
        above = None if self.within is None else self.within.remaining()
        if self.deadline is None:
            return above
        own = self.deadline - time.perf_counter()
        return own if above is None else min(own, above)

    @property
    def over(self) -> bool:
        """Whether its time has ended."""
        left = self.remaining()
        return left is not None and left <= 0

    def again(self) -> Watch:
        """A watch with the same budget, from now; stopping this one stops it too.

        What was cut short before it stays cut short: an attack whose preparation was cut is cut.
        """
        watch = Watch(self.seconds, self.listen, parent=self)
        watch.within = self.within
        watch.cut_short, watch.planned = self.cut_short, self.planned
        return watch

    def steps(
        self, total: int, *, first: int = 0, stretches: bool = False, fewest: int = 1
    ) -> Iterator[Step]:
        """Iterations ``first`` to ``total``, at least one if there is any, within the budget.

        Args:
            total: Iterations asked for.
            first: Where a resumed loop goes on.
            stretches: Whether fewer iterations under the whole schedule are the same method. Then
                the first few are timed, as many as fit are planned, and :attr:`planned` says so if
                they are fewer; on a machine that slows down afterwards, the schedule is hurried to
                its end. A loop that searches does not stretch: it is cut.
            fewest: Iterations below which what stretches is of no use: it is given up at once.

        Raises:
            Unavailable: If fewer than ``fewest`` fit.
        """
        begun = time.perf_counter()
        allowance = self.remaining()
        heard, last = begun, total
        for index in itertools.count(first):
            now = time.perf_counter()
            if stretches and allowance is not None and index - first == PACED:
                last = self._plan(index, first, total, (now - begun) / PACED, allowance)
                if last - first < min(fewest, total - first):
                    raise Unavailable(
                        f"Would not fit: {fewest} of {total:,} iterations take about "
                        f"{fewest * (now - begun) / PACED:.0f} s here, and "
                        f"{max(allowance, 0.0):.0f} s were left; {MORE_TIME}."
                    )
            progress = index / max(last, 1)
            if allowance is not None:
                progress = max(progress, (now - begun) / max(allowance, 1e-9))
            if index >= last or (index > first and (progress >= 1 or self.stopped)):
                made, due = index - first, last - first
                enough = ENOUGH * due if stretches else due
                if index < last and (self.stopped or made < enough):
                    self.cut()
                if stretches and made < total - first:
                    self.shortened(index, total)
                return
            if self.listen is not None and now - heard > 0.25:
                heard = now
                self.listen(min(progress, 1.0), self.note)
            yield Step(index, min(progress, 1.0))

    def _plan(self, index: int, first: int, total: int, pace: float, allowance: float) -> int:
        """The last iteration that fits, given seconds for each."""
        fit = first + int(FILL * allowance / max(pace, 1e-9))
        last = max(min(total, fit), index)
        if last - first < min(FEWEST, total - first):
            self.cut()  # too few to be the method
        return last

    def shortened(self, made: int, asked: int) -> None:
        """Note, here and above, that a loop made fewer iterations than asked for, as planned."""
        self.planned = (made, asked)
        if self.parent is not None:
            self.parent.shortened(made, asked)

    def share(self, parts: int | Sequence[float]) -> Iterator[Watch]:
        """One watch for each piece of work, each with its fair part of what is left.

        Args:
            parts: How many equal pieces, or the weight of each.
        """
        weights = [1.0] * parts if isinstance(parts, int) else list(parts)
        total = sum(weights)
        for part, weight in enumerate(weights):
            if part > 0 and (self.stopped or (self.remaining() or 1.0) <= 0):
                self.cut()
                return
            left = self.remaining()
            listen = None
            if self.listen is not None:
                listen = _scaled(self.listen, sum(weights[:part]) / total, weight / total)
            allowance = None if left is None else left * weight / sum(weights[part:])
            yield Watch(allowance, listen, parent=self)

    def cut(self) -> None:
        """Note, here and above, that a loop ended before the end of its schedule."""
        self.cut_short = True
        if self.parent is not None:
            self.parent.cut()


def _scaled(
    listen: Callable[[float, str], None], offset: float, width: float
) -> Callable[[float, str], None]:
    return lambda fraction, note: listen(offset + width * fraction, note)


_DURATION = re.compile(r"(\d+(?:\.\d+)?)\s*(s|sec|seconds?|m|min|minutes?|h|hours?)?")


def parse_budget(text: str | float | None) -> float | None:
    """Seconds from ``30s``, ``10m``, ``1.5h`` or a number; None for ``paper`` (no limit).

    Raises:
        InvalidParameter: If the text is none of these or not positive.
    """
    if text is None or text == "paper":
        return None
    match = _DURATION.fullmatch(str(text).strip().lower())
    if match is None or float(match.group(1)) <= 0:
        raise InvalidParameter(
            f"The budget {text!r} cannot be read; write '30s', '10m', '1.5h' or 'paper'."
        )
    unit = (match.group(2) or "s")[0]
    return float(match.group(1)) * {"s": 1, "m": 60, "h": 3600}[unit]
