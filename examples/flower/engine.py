"""A superlink of one's own for a run on this machine, which ends with it.

``flwr run`` finds a superlink in the user's configuration, or starts one that stays. Tests and
measurements want neither: they get a free port and a home of their own.
"""

import os
import signal
import socket
import subprocess
import sys
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

APP = Path(__file__).parent
HERE = '[superlink]\ndefault = "local"\n\n[superlink.local]\naddress = ":local-in-memory:"\n'
OLDEST = (1, 42)
"""Releases before it start their superlink otherwise, or have none; some then run nothing."""


def too_old():
    """Why this Flower cannot be started from here; empty if it can."""
    installed = version("flwr")
    if tuple(int(part) for part in installed.split(".")[:2]) >= OLDEST:
        return ""
    return (
        f"Flower {installed} starts its superlink otherwise than {'.'.join(map(str, OLDEST))}: "
        "take a newer one, or run the app with `flwr run` in a federation of your own"
    )


@contextmanager
def engine(home):
    """The environment in which ``flwr`` runs apps; the folder is where it keeps its own things.

    Raises:
        RuntimeError: If Flower is too old.
    """
    if why := too_old():
        raise RuntimeError(why)
    home = Path(home)
    home.mkdir(parents=True, exist_ok=True)
    (home / "config.toml").write_text(HERE, encoding="utf-8")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    # Where LeakAtlas and this app's modules come from is where they came from here.
    paths = [str(APP), *filter(None, [os.environ.get("PYTHONPATH")])]
    try:
        yield {
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONPATH": os.pathsep.join(paths),
            "FLWR_HOME": str(home),
            "FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": port,
            "FLWR_TELEMETRY_ENABLED": "0",
            # The app runs in this environment; nothing is fetched for it.
            "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
            "RAY_USAGE_STATS_ENABLED": "0",
            "OMP_NUM_THREADS": "1",
            # Ray makes its workers wait for everybody else (nice 15), which on a busy machine is
            # for ever: Flower then gives the client up.
            "RAY_worker_niceness": "0",
            # Nor does it end workers because others fill the memory.
            "RAY_memory_monitor_refresh_ms": "0",
        }
    finally:
        for process in _superlinks(port):
            os.kill(process, signal.SIGTERM)


def run(environment, *, app=APP, **config):
    """Run the app with these settings; what it said.

    Raises:
        RuntimeError: If it failed, with the end of what it said.
    """
    command = ["flwr", "run", str(app), "local", "--stream", "--run-config", _toml(config)]
    for _ in range(10):  # Flower gives its superlink 15 seconds, which a busy machine has not
        done = subprocess.run(command, env=environment, text=True, capture_output=True, check=False)
        said = done.stdout + done.stderr
        if "Failed to start local SuperLink" not in said:
            break
    if done.returncode:
        raise RuntimeError(f"flwr run failed: {said[-4000:]}")
    return done.stdout


def _toml(config):
    def value(one):
        return f'"{one}"' if isinstance(one, str | Path) else str(one).lower()

    return " ".join(f"{name.replace('_', '-')}={value(one)}" for name, one in config.items())


def _superlinks(port):
    """The process that flwr started on this port, and no other."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if any(b"flower-superlink" in word for word in words) and port.encode() in words:
            yield int(folder.name)
