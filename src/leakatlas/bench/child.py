"""Processes that answer messages: JSON lines over pipes, so that no answer can run code.

The two sides are :class:`Child` (the parent holds it) and :func:`serve` (what the child runs). A
child ends when its parent does, however that came about: its standard input closes.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from leakatlas import openmp

Message = dict[str, Any]

GRACE = 10.0
"""Seconds that a child has to end after its output has closed."""

LAST_WORDS = 600
"""Characters kept of what a child said before it died."""


class Child:
    """One child process.

    Args:
        module: What it runs (``python -m MODULE``).
        inbox: Its messages arrive here as ``(child, message)``; None once it has ended.
        env: Its environment; that of this process if None.

    Attributes:
        folder: A temporary folder of its own, its working directory.
    """

    def __init__(
        self,
        module: str,
        inbox: queue.SimpleQueue[tuple[Child, Message | None]] | None = None,
        env: Mapping[str, str] | None = None,
    ) -> None:
        self.inbox: queue.SimpleQueue[tuple[Child, Message | None]] = inbox or queue.SimpleQueue()
        self._home = tempfile.TemporaryDirectory(prefix="leakatlas-", ignore_cleanup_errors=True)
        self.folder = Path(self._home.name)
        environment = dict(os.environ if env is None else env)
        # The same code as here, wherever it was imported from; the folder of a caller counts too.
        environment["PYTHONPATH"] = os.pathsep.join(os.path.abspath(p) for p in sys.path)
        environment["TMPDIR"] = str(self.folder)
        openmp.spin_briefly(environment)
        self._errors = (self.folder / "stderr").open("w+b")
        self._process = subprocess.Popen(
            [sys.executable, "-m", module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            cwd=self.folder,
            env=environment,
        )
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    def send(self, message: Message) -> None:
        """Send a message; a child that is gone says so through its inbox."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(message).encode() + b"\n")
            self._process.stdin.flush()

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            try:
                message = json.loads(line)
            except ValueError:
                self._process.kill()  # not ours: whoever writes there is not trusted further
                break
            self.inbox.put((self, message))
        # Its output closes a moment before it ends, and how it ends is for it to say.
        try:
            self._process.wait(GRACE)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self.inbox.put((self, None))

    def last_words(self) -> str:
        """How it ended, and the end of what it wrote to its standard error."""
        code = self._process.wait()
        how = f"killed by {_signal_name(-code)}" if code < 0 else f"exit code {code}"
        self._errors.seek(0)
        lines = self._errors.read().decode("utf-8", "replace").strip().splitlines()
        said = lines[-1][-LAST_WORDS:] if lines else ""
        return f"{said} ({how})" if said else how

    def kill(self) -> None:
        """End it now."""
        self._process.kill()
        self._process.wait()
        self.close()

    def close(self) -> None:
        """Let it end, and remove its folder."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.wait()
        self._listener.join()
        if self._process.stdout is not None:
            self._process.stdout.close()
        self._errors.close()
        self._home.cleanup()


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def serve(
    answer: Callable[[Message, Callable[[Message], None]], Message],
    *,
    interrupt: Callable[[], None] | None = None,
) -> None:
    """Answer messages until the parent is gone.

    Ctrl-C is the parent's to handle. Whatever the code that runs here prints goes to the standard
    error, and an exception ends the process: the parent reads both.

    Args:
        answer: From a message, and a function that sends a message meanwhile, to the answer.
        interrupt: Called, from another thread, when the parent sends ``{"stop": true}``.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    out = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    lock = threading.Lock()

    def send(message: Message) -> None:
        with lock:
            out.write(json.dumps(message).encode() + b"\n")
            out.flush()

    todo: queue.SimpleQueue[Message] = queue.SimpleQueue()

    def listen() -> None:
        for line in sys.stdin.buffer:
            message = json.loads(line)
            if message.get("stop"):
                if interrupt is not None:
                    interrupt()
            else:
                todo.put(message)
        os._exit(0)  # the parent is gone; nobody waits for what is being computed

    threading.Thread(target=listen, daemon=True).start()
    try:
        while True:
            send(answer(todo.get(), send))
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)  # the interpreter cannot end in order while a thread waits for input
