"""What capture and guard cost a round under Flower's engine: ``python costs.py FOLDER``.

The same run again and again: plain, captured at both places and the server, guarded by the weights
that arrive, guarded with the client's images and training.
"""

import statistics
import sys
from pathlib import Path

from engine import engine, run
from quickstart.meter import read

ROUNDS = 5
LIMIT_MB = 8192.0
"""Room for every exchange of ResNet-18: what is left out costs nothing."""

WAYS = {
    "plain": {"capture": False},
    "captured": {},
    "guarded, weights": {"capture": False, "guard": "refuse", "guard_sees": "weights"},
    "guarded, all checks": {"capture": False, "guard": "refuse"},
}


def costs(environment, folder, network):
    """Figures of a network, by name.

    Processor time of a client's app is the median over clients and rounds after the first, in which
    everything is loaded; that of the server is of its strategy's thread.
    """
    folder, spent, server, wire = Path(folder), {}, {}, {}
    for way, config in WAYS.items():
        meter = folder / f"{way}, metered"
        settings = {"leakatlas_folder": folder / way, "meter_folder": meter, "network": network}
        run(
            environment, num_server_rounds=ROUNDS, leakatlas_limit_mb=LIMIT_MB, **settings, **config
        )
        lines = [line for line in read(meter, "client-*") if line["round"] > 1]
        if not all(line["sent"] for line in lines):
            raise RuntimeError(f"a client refused an honest round: {way}, {network}")
        spent[way] = statistics.median(line["seconds"] for line in lines)
        wire[way] = statistics.median(line["received"] + line["sent"] for line in lines)
        server[way] = read(meter, "server")[0]["seconds"] / ROUNDS
    for facts in (folder / "captured").glob("*/*.json"):
        if not facts.with_suffix(".safetensors").exists():
            raise RuntimeError(f"{facts.name} was left out, and cost nothing: {network}")
    files = list((folder / "captured").glob("*/wire-*"))
    exchanges = len(list((folder / "captured").glob("*/wire-*.json")))
    plain = spent.pop("plain")
    return {
        "plain round, CPU ms": 1e3 * plain,
        **{f"{way} over plain": value / plain for way, value in spent.items()},
        "server, plain, CPU ms": 1e3 * server["plain"],
        "server, captured over plain": server["captured"] / server["plain"],
        "wire, MB": wire["plain"] / 1e6,
        "wire, captured over plain": wire["captured"] / wire["plain"],
        "disk over wire, a place": sum(f.stat().st_size for f in files) / exchanges / wire["plain"],
    }


def main():
    """Both networks."""
    folder = Path(sys.argv[1]).absolute()
    with engine(folder / "flwr") as environment:
        for network in ("quickstart", "resnet18"):
            for name, value in costs(environment, folder / network, network).items():
                print(f"{network}, {name}: {value:.4g}")


if __name__ == "__main__":
    main()
