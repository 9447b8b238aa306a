"""The campaign of hostile inputs: ``python scripts/fuzz.py --inputs 30000 --seed 0``.

Every door of ``tests/doors`` gets its share of the inputs. An input must give an answer or one
message of our tree within ten seconds of processor time, change no file of the user, and start no
program. What breaks that is kept, smallest first, under ``--keep``; the exit code is 1 if anything
did.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import faulthandler
import json
import multiprocessing
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

SECONDS = 10.0
"""Of processor time that one input may take."""
DEADLY = 600
"""Seconds on the clock after which code that waits, or that no signal interrupts, is ended."""


class Enough(BaseException):
    """The inputs, or the time, are used up."""


def campaign(name: str, inputs: int, seed: int, until: float, keep: Path) -> dict[str, Any]:
    """Knock at one door.

    Args:
        name: Of the door.
        inputs: How many.
        seed: Of the first batch; the next takes the next.
        until: ``time.monotonic()`` at which it stops.
        keep: Folder for offenders.
    """
    import hypothesis
    from hypothesis import HealthCheck, Phase, settings
    from hypothesis import strategies as st
    from tests.doors.doors import DOORS
    from tests.doors.guard import Broken, check

    from leakatlas import limits

    limits.memory = lambda: 2**28
    door, answers = DOORS[name], collections.Counter[str]()
    broken: dict[str, dict[str, Any]] = {}
    slowest = 0.0
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:

        def knock(data: st.DataObject) -> None:
            nonlocal slowest
            files = data.draw(door.files)  # first: Hypothesis minds a run that draws less
            if sum(answers.values()) >= inputs or time.monotonic() > until:
                raise Enough
            faulthandler.dump_traceback_later(DEADLY, exit=True)
            begun = time.process_time()
            try:
                answers[check(files, door.open, Path(folder) / "door", seconds=SECONDS)] += 1
            except Broken as problem:
                answers[problem.kind] += 1
                size = sum(map(len, files.values()))
                known = broken.get(problem.place)
                if known is None or size < known["bytes"]:
                    broken[problem.place] = {"bytes": size, "said": str(problem)}
                    _keep(files, keep / name / problem.place.replace("/", "_"))
            finally:
                faulthandler.cancel_dump_traceback_later()
                slowest = max(slowest, time.process_time() - begun)

        while sum(answers.values()) < inputs and time.monotonic() < until:
            run = settings(
                max_examples=min(inputs - sum(answers.values()), 2000),
                deadline=None,
                database=None,
                suppress_health_check=list(HealthCheck),
                phases=(Phase.generate,),
            )(hypothesis.given(st.data())(knock))
            with contextlib.suppress(Enough):
                hypothesis.seed(seed)(run)()
            seed += 1
    return {"answers": dict(answers), "broken": broken, "slowest": round(slowest, 2)}


def _keep(files: Any, folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def _process(queue: Any, *arguments: Any) -> None:
    queue.put(campaign(*arguments))


def main() -> int:
    """Run the campaign, one process a door, and print a table."""
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    from tests.doors.doors import DOORS

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--inputs", type=int, default=30_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=60.0, help="the campaign ends by then")
    parser.add_argument("--door", action="append", choices=sorted(DOORS))
    parser.add_argument("--keep", type=Path, default=Path("fuzz-offenders"))
    parser.add_argument("--json", type=Path, help="write the table there")
    options = parser.parse_args()
    chosen = options.door or list(DOORS)
    whole = sum(DOORS[name].share for name in chosen)
    until = time.monotonic() + 60 * options.minutes
    found: dict[str, Any] = {}
    context = multiprocessing.get_context("fork")  # what is imported once serves every door
    for name in chosen:
        inputs = max(round(options.inputs * DOORS[name].share / whole), 1)
        queue = context.Queue()
        arguments = (queue, name, inputs, options.seed, until, options.keep)
        process = context.Process(target=_process, args=arguments)
        process.start()
        while process.is_alive() and queue.empty():
            process.join(0.2)
        if queue.empty():
            place = f"the process ended with {process.exitcode}"
            found[name] = {
                "answers": {"crash": 1},
                "broken": {place: {"said": place}},
                "slowest": 0,
            }
        else:
            found[name] = queue.get()
        process.join()
        row = found[name]
        print(
            f"{name:16} {sum(row['answers'].values()):6} of {inputs:6}, slowest "
            f"{row['slowest']:5.2f} s: {row['answers']}"
        )
        for problem in row["broken"].values():
            print(f"    {problem['said']}")
    total = sum(sum(row["answers"].values()) for row in found.values())
    broken = sum(len(row["broken"]) for row in found.values())
    print(f"{total} inputs, seed {options.seed}: {broken} causes of broken promises.")
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
