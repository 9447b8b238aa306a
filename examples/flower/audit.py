"""Run the app under Flower's engine, then audit what was recorded: ``python audit.py FOLDER``.

What is recorded is looked at where adversaries stand: on the wire, at the server, in the mean that
everybody gets. ``--local-dp`` puts Flower's ``LocalDpMod`` between the two places of capture at a
client: their difference is the noise, and the doctor says what the promise is worth.
"""

import argparse
import math
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from engine import engine, run
from quickstart.task import load_data, net

import leakatlas
from leakatlas.audit.promises import checked, promise_of
from leakatlas.fl.recording import protocol_of, read_recording

PLACES = ("wire", "server", "aggregate")


def clients_of(folder):
    """Names of the clients that recorded something, and which part of the data each holds."""
    names = sorted({path.stem.split("-", 1)[1] for path in Path(folder).glob("*/raw-*.json")})
    recordings = {name: read_recording(folder, place="raw", client=name) for name in names}
    return {name: int(r.last.settings["partition-id"]) for name, r in recordings.items()}


def described(folder):
    """The local training, as it was recorded, and how many images a client holds."""
    last = read_recording(folder, place="raw").last
    return protocol_of(last.settings, kind=last.kind), int(last.settings["examples"])


def diagnose(folder, *, network="quickstart", **mistakes):
    """Whether every recorded round is what the described client sends for its images.

    Args:
        folder: The captures.
        network: That was trained.
        mistakes: What the description gets wrong: ``momentum=0.9``.

    Returns:
        The doctor's diagnosis of every client's every round.
    """
    protocol, examples = described(folder)
    found = []
    for name, part in clients_of(folder).items():
        captured = read_recording(folder, place="raw", client=name).capture(net(network))
        found += [
            leakatlas.doctor(
                net(network),
                load_data(part, examples),
                captured=replace(captured, rounds=(one,)),
                protocol=replace(protocol, **mistakes),
            )
            for one in captured.rounds
        ]
    return found


def attack(folder, place, *, network="quickstart", round=1, **settings):
    """What comes out where somebody looks: a report of the first client's update, or of the mean.

    Args:
        folder: The captures.
        place: One of :data:`PLACES`.
        network: That was trained.
        round: Which is attacked.
        settings: Of the audit: attacks, their parameters, budget.
    """
    protocol, examples = described(folder)
    clients = clients_of(folder)
    first, part = next(iter(clients.items()))
    shared = place == "aggregate"
    parts = list(clients.values()) if shared else [part]
    recording = read_recording(folder, place=place, client=None if shared else first)
    recording = recording.select([round])
    images, labels = zip(*(load_data(part, examples) for part in parts), strict=True)
    return leakatlas.audit(
        net(network),
        (torch.cat(images), torch.cat(labels)),
        captured=recording.capture(net(network)),
        protocol=protocol,
        clients=len(parts),
        vantage=place,
        threat="C",
        **settings,
    )


def noise(folder):
    """What stands between the two places: its standard deviation, and all that is promised of it.

    The mod clips the change first, then adds noise to every number.
    """
    raw = read_recording(folder, place="raw").last
    wire = read_recording(folder, place="wire", client=raw.client).last
    moved = {n: (raw.sent[n] - raw.received[n]).double() for n in raw.sent}
    norm = math.sqrt(sum(float(t.square().sum()) for t in moved.values()))
    clip = min(1.0, float(raw.settings["dp-clipping-norm"]) / norm)
    left = [
        (wire.sent[n].double() - raw.received[n] - clip * t).flatten() for n, t in moved.items()
    ]
    said = checked(read_recording(folder, place="wire", client=raw.client))
    return float(torch.cat(left).std()), said


def promised(folder):
    """What ``LocalDpMod`` was told to give."""
    return promise_of(read_recording(folder, place="wire").last.settings)


def main():
    """Run, diagnose, attack."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", help="where captures go")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--local-dp", action="store_true")
    parser.add_argument("--budget", default="60s")
    options = parser.parse_args()
    folder = Path(options.folder).absolute()
    with tempfile.TemporaryDirectory() as home, engine(home) as environment:
        run(
            environment,
            leakatlas_folder=folder,
            num_server_rounds=options.rounds,
            defense="local_dp" if options.local_dp else "none",
        )
    worst = max(found.replay.residual for found in diagnose(folder))
    print(f"Residual of the replay before any mod: {worst:.1e}")
    wrong = diagnose(folder, momentum=0.9)[0]
    print(f"With a wrong optimizer the doctor says: {wrong.replay.explanation}")
    if options.local_dp:
        deviation, promises = noise(folder)
        print(f"Noise measured between the two places: {deviation:.4e}")
        print(*promises, sep="\n")
    for place in PLACES:
        attacks = ["inverting_gradients"]
        report = attack(folder, place, attacks=attacks, budget=options.budget)
        (found,) = report.verdicts()
        print(f"{place}: {found.verdict}")


if __name__ == "__main__":
    main()
