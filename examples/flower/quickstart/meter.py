"""What a round costs: processor time and bytes, for whoever compares runs with and without."""

import json
import time
from pathlib import Path


def note(folder, name, **figures):
    """Add a line to a file of measurements."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    with (Path(folder) / f"{name}.jsonl").open("a", encoding="utf-8") as lines:
        lines.write(json.dumps(figures) + "\n")


def read(folder, name):
    """What was noted in the files that a pattern names."""
    files = sorted(Path(folder).glob(f"{name}.jsonl"))
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


def meter_mod(message, context, call_next):
    """Measure a client's round, where the run configuration names a folder; first in the list."""
    folder = context.run_config["meter-folder"]
    if not folder:
        return call_next(message, context)
    received, begun = _bytes(message), time.process_time()
    reply = call_next(message, context)
    seconds = time.process_time() - begun
    sent = 0 if reply.has_error() else _bytes(reply)
    name = f"client-{context.node_id}"
    note(folder, name, round=_round(message), seconds=seconds, received=received, sent=sent)
    return reply


def _bytes(message):
    """Of everything in a message, as Flower counts them."""
    return sum(record.count_bytes() for record in message.content.values())


def _round(message):
    return message.content["config"]["server-round"]
