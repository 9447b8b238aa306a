"""Holds one input against the promise: an answer or one message, in time, and nothing touched."""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from leakatlas.errors import LONGEST, LeakAtlasError
from tests.doors.hostile import CANARY

PROGRAMS = (
    "os.system",
    "subprocess.Popen",
    "os.exec",
    "os.posix_spawn",
    "os.startfile",
    "pty.spawn",
)
"""Audit events of a program that is started."""

Files = Mapping[str, bytes]

_armed: list[str] | None = None


def _listen(event: str, arguments: tuple[object, ...]) -> None:
    if _armed is not None and (
        event in PROGRAMS or (event in ("os.mkdir", "open") and CANARY in str(arguments[0]))
    ):
        _armed.append(f"{event}{arguments}"[:200])


sys.addaudithook(_listen)  # it cannot be taken off again, so it listens only while it is armed


class Hang(BaseException):
    """An input that took longer than it may."""


class Broken(AssertionError):
    """An input that broke the promise.

    Args:
        kind: "traceback", "hang", "canary", "message" or "files".
        place: Where, so that two inputs with one cause count once.
        detail: For people.
    """

    def __init__(self, kind: str, place: str, detail: str) -> None:
        super().__init__(f"{kind} at {place}: {detail}")
        self.kind, self.place = kind, place


def check(
    files: Files, open_door: Callable[[Path], object], folder: Path, *, seconds: float | None = None
) -> str:
    """Put ``files`` into an empty ``folder`` and open the door on them.

    Args:
        files: Content by path, relative to the folder.
        open_door: What a user would call.
        folder: Emptied first.
        seconds: Of processor time that it may take; no limit if None (tests depend on no clock).

    Returns:
        "answer", or the name of the error.

    Raises:
        Broken: If something else than an answer or one of our errors came out.
    """
    global _armed
    shutil.rmtree(folder, ignore_errors=True)
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    folder.mkdir(parents=True, exist_ok=True)
    before = _fingerprint(folder)
    here = Path.cwd()
    os.chdir(folder)
    _armed = []
    try:
        with _limited(seconds):
            open_door(folder)
        answer = "answer"
    except LeakAtlasError as problem:
        answer = _message(problem)
    except Hang as hang:
        raise Broken("hang", _place(hang), f"more than {seconds} s") from hang
    except Exception as problem:
        detail = f"{type(problem).__name__}: {str(problem)[:200]}"
        raise Broken("traceback", _place(problem), detail) from problem
    finally:
        programs, _armed = _armed, None
        os.chdir(here)
    if programs:
        raise Broken("canary", "a program was started", programs[0])
    if _fingerprint(folder) != before:
        raise Broken("files", "the user's folder", "a file of the user was changed or added")
    return answer


def _message(problem: LeakAtlasError) -> str:
    text = str(problem)
    name = type(problem).__name__
    if not text or len(text) > LONGEST + 100:
        raise Broken("message", name, f"{len(text)} characters")
    if any(not (c.isprintable() or c == "\n") for c in text):
        raise Broken("message", name, "unprintable characters")
    return name


def _place(problem: BaseException) -> str:
    frames = traceback.extract_tb(problem.__traceback__)
    own = [f for f in frames if "/leakatlas/" in f.filename]
    last = (own or frames)[-1]
    return f"{Path(last.filename).name}:{last.lineno} {type(problem).__name__}"


def _fingerprint(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        digest.update(str(path.relative_to(folder)).encode("utf-8", "surrogateescape"))
        if path.is_file():
            digest.update(path.read_bytes())
    return digest.hexdigest()


@contextmanager
def _limited(seconds: float | None) -> Iterator[None]:
    if seconds is None:
        yield
        return

    def ring(number: int, frame: FrameType | None) -> None:
        raise Hang

    # Seconds of this process, so that a busy machine makes no input slow; it rings on, since an
    # exception that a callback of the garbage collector meets is lost.
    previous = signal.signal(signal.SIGPROF, ring)
    signal.setitimer(signal.ITIMER_PROF, seconds, 1.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, previous)
