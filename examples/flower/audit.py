"""Run the app under Flower's engine, then audit what was recorded: ``python audit.py FOLDER``.

``--local-dp`` puts Flower's ``LocalDpMod`` between the two places of capture: their difference is
the noise, and the doctor says what the promise is worth.
"""

import argparse
import math
import subprocess
from pathlib import Path

import torch
from quickstart.task import load_data, net

import leakatlas
from leakatlas.audit.promises import checked
from leakatlas.fl.recording import protocol_of, read_recording

APP = Path(__file__).parent


def run(folder, *, rounds, local_dp):
    """The app under the engine that ``flwr run`` has at hand."""
    words = f'leakatlas-folder="{folder}" num-server-rounds={rounds}'
    if local_dp:
        words += ' defense="local_dp"'
    command = ["flwr", "run", str(APP), "local", "--stream", "--run-config", words]
    subprocess.run(command, check=True)


def diagnose(folder):
    """Whether the recorded round is what the described client sends for its images."""
    raw = read_recording(folder, place="raw")
    protocol = protocol_of(raw.last.settings, kind=raw.last.kind)
    private = load_data(int(raw.last.settings["partition-id"]))
    found = leakatlas.doctor(net(), private, captured=raw.capture(net()), protocol=protocol)
    print(f"Residual of the replay before any mod: {found.replay.residual:.1e}")


def attack(folder, budget):
    """What comes out at each place where somebody may look."""
    reports = {}
    for place in ("server", "aggregate"):
        recording = read_recording(folder, place=place)
        last = recording.last
        known = read_recording(folder, place="raw").last.settings
        protocol = protocol_of(known, kind=last.kind)
        parts = [int(known["partition-id"])] if place == "server" else range(last.cohort)
        if place == "server":
            client = read_recording(folder, place="raw").last.client
            recording = read_recording(folder, place="server", client=client)
        images, labels = zip(*(load_data(part) for part in parts), strict=True)
        reports[place] = leakatlas.audit(
            net(),
            (torch.cat(images), torch.cat(labels)),
            captured=recording.capture(net()),
            protocol=protocol,
            clients=len(parts),
            vantage=place,
            threat="C",
            attacks=["inverting_gradients"],
            budget=budget,
        )
        (found,) = reports[place].verdicts()
        print(f"{place}: {found.verdict}")
    return reports


def noise(folder):
    """Standard deviation of what stands between the two places, beside what was configured."""
    raw = read_recording(folder, place="raw").last
    wire = read_recording(folder, place="wire", client=raw.client).last
    moved = {n: (raw.sent[n] - raw.received[n]).double() for n in raw.sent}
    norm = math.sqrt(sum(float(t.square().sum()) for t in moved.values()))
    clip = min(1.0, float(raw.settings["dp-clipping-norm"]) / norm)
    left = [
        (wire.sent[n].double() - raw.received[n] - clip * t).flatten() for n, t in moved.items()
    ]
    print(f"Noise measured between the two places: {float(torch.cat(left).std()):.4e}")
    for said in checked(read_recording(folder, place="wire", client=raw.client)):
        print(said)


def main():
    """Run, diagnose, attack."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", help="where captures go")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--local-dp", action="store_true")
    parser.add_argument("--budget", default="60s")
    options = parser.parse_args()
    folder = Path(options.folder).absolute()
    run(folder, rounds=options.rounds, local_dp=options.local_dp)
    diagnose(folder)
    if options.local_dp:
        noise(folder)
    attack(folder, options.budget)


if __name__ == "__main__":
    main()
