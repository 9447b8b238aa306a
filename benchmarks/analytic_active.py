"""Measures trap weights, MANDRAKE, Scale-MIA and SEER on CIFAR-10, writes ``results/<key>.json``.

    python benchmarks/analytic_active.py [KEY ...] --data CIFAR10_FOLDER

Data, scenario and scores are those of ``benchmarks/analytic.py``: victims from the front of the
test images, public images from rows behind them, candidates assigned to originals one to one, a
missing original counted as not recovered.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from analytic import EXACT, Data, alone, decibels, mean, play, scores
from torch import Tensor, nn

from leakatlas.attacks.analytic.isolation import mandrake as mandrake_row
from leakatlas.attacks.analytic.isolation.mandrake import MANDRAKE
from leakatlas.attacks.analytic.isolation.scale_mia import ScaleMIA, decode, encode, find_parts
from leakatlas.attacks.analytic.isolation.seer import SEER
from leakatlas.attacks.analytic.sparsification.trap_weights import TrapWeights
from leakatlas.attacks.api import Attack
from leakatlas.bench.harness import Trial, run_trial
from leakatlas.blocks import readout, surgery
from leakatlas.data import Box
from leakatlas.fl import FedAVG, FedSGD, ModelRef, Protocol, Scenario, stage, stream
from leakatlas.metrics.assignment import pairwise_mse
from leakatlas.models import build
from leakatlas.threat import Vantage

Measures = list[dict[str, Any]]


def figure(name: str, value: float, unit: str, note: str) -> dict[str, Any]:
    """A value that is computed, not sampled."""
    return {"name": name, "value": value, "unit": unit, "interval": None, "n": 1, "note": note}


# -- one function a row ----------------------------------------------------------------------------


def fired(model: nn.Module, images: Tensor) -> Tensor:
    """Activations ``(N, m)`` of the first linear layer: truth, for scoring only."""
    layer = next(m for m in model.modules() if isinstance(m, nn.Linear))
    with torch.no_grad():
        active: Tensor = layer(images.to(layer.weight).flatten(1)) > 0
    return active


def rates(fires: Tensor) -> tuple[float, float]:
    """Extraction recall and precision: examples alone in a row, active rows with one example."""
    count = fires.sum(dim=0)
    recall = (fires & (count == 1)).any(dim=1).double().mean()
    precision = (count == 1).sum() / (count > 0).sum().clamp(min=1)
    return float(recall), float(precision)


def trap_spread(data: Data) -> Measures:
    """Recall and precision over many batches, from the activations: three batches say little."""
    spread = []
    for batch in range(40):
        x = data.victims(100, batch * 100).images.flatten(1)
        rows = surgery.trap_rows(
            1_000, x.shape[1], scaling=0.95, sigma=0.5, generator=stream("traps", batch), like=x
        )
        spread.append(rates(x @ rows.T > 0))
    note = "share alone in some row, 40 batches with traps of their own, n=100, s 0.95"
    deviation = float(torch.tensor([r for r, _ in spread]).std())
    return [
        mean("recall over 40 batches", [r for r, _ in spread], "share", note),
        mean("precision over 40 batches", [p for _, p in spread], "share", note),
        figure("standard deviation of the recall between batches", deviation, "share", note),
    ]


def trap_weights(data: Data) -> tuple[Measures, Sequence[int]]:
    """Recall and precision of the paper, its passive baseline, s, convolutions, FedAVG."""
    seeds = (0, 1, 2)
    measures: Measures = []

    def trials(
        attack: TrapWeights, n: int, *, model: str = "fc", rows: int = 1_000,
        protocol: Protocol | None = None, letter: str = "F", dtype: torch.dtype = torch.float32,
    ) -> list[Trial]:  # fmt: skip
        settings = {"widths": (rows, 64), "act": "relu"} if model == "fc" else {}
        return [
            play(
                data, attack, data.victims(n, seed * n), letter=letter, model=model,
                settings=settings, seed=seed, dtype=dtype, protocol=protocol,
            )[0]
            for seed in seeds
        ]  # fmt: skip

    for n, s in (
        (20, 0.95), (20, None), (100, 0.90), (100, 0.93), (100, 0.95), (100, 0.97), (100, 0.99),
        (100, None),
    ):  # fmt: skip
        played = trials(TrapWeights(scaling=s), n, letter="F" if s else "G")
        setting = f"n={n}, s {s or 'tuned'}"
        note = "1,000 rows, 32x32, float32"
        recall = [float((scores(t)[0] < 1e-4).double().mean()) for t in played]
        precision = [rates(fired(t.view.model, t.truth.images))[1] for t in played]
        measures.append(mean(f"extraction recall, {setting}", recall, "share", note))
        measures.append(mean(f"extraction precision, {setting}", precision, "share", note))
        if s == 0.95:
            sure, right = 0, 0
            for trial in played:
                cost = pairwise_mse(trial.images.double(), trial.truth.images.double())
                confidence = trial.found.confidence
                if confidence is None:
                    continue
                agreed = confidence >= 2
                sure += int(agreed.sum())
                right += int((cost.min(dim=1).values.sqrt() < 1e-4)[agreed].sum())
            measures.append(
                figure(
                    f"exact among candidates with agreeing rows, n={n}", right / max(sure, 1),
                    "share", f"{right} of {sure} candidates, decided without any truth",
                )
            )  # fmt: skip
    measures += trap_spread(data)
    for n in (20, 100):
        passive = []
        for seed in seeds:
            untouched = build("fc", widths=(1_000, 64), act="relu", seed=seed)
            passive.append(rates(fired(untouched, data.victims(n, seed * n).images)))
        note = "freshly initialised layer of 1,000 rows, nothing changed"
        measures.append(mean(f"passive recall, n={n}", [p[0] for p in passive], "share", note))
        measures.append(mean(f"passive precision, n={n}", [p[1] for p in passive], "share", note))
    played = trials(TrapWeights(), 100, rows=3_000)
    recall = [float((scores(t)[0] < 1e-4).double().mean()) for t in played]
    measures.append(
        mean("extraction recall, n=100, 3,000 rows", recall, "share", "s 0.95, float32")
    )
    played = trials(
        TrapWeights(), 20, protocol=FedAVG(epochs=2, batch_size=5, lr=1e-3), dtype=torch.float64
    )
    recall = [float((scores(t)[0] < EXACT).double().mean()) for t in played]
    note = "E=2, B=5, lr 1e-3, n=20, s 0.95, float64"
    measures.append(mean("extraction recall, FedAVG", recall, "share", note))
    played = trials(TrapWeights(block_rows=1_000), 20, model="resnet8", dtype=torch.float64)
    recall = [float((scores(t)[0] < EXACT).double().mean()) for t in played]
    note = "ResNet-8 behind a block of 1,000 rows, n=20, s 0.95, float64"
    measures.append(mean("extraction recall, inserted block", recall, "share", note))
    return measures, seeds


def mandrake(data: Data) -> tuple[Measures, Sequence[int]]:
    """The arithmetic of the paper, and leakage from one sum over ten clients."""
    seeds = (0, 1)
    measures: Measures = []
    mib = mandrake_row.MIB
    for name, shape, clients in (
        ("MNIST", (1, 28, 28), 100), ("CIFAR-100", (3, 32, 32), 100),
        ("Tiny ImageNet", (3, 64, 64), 100), ("ImageNet", (3, 256, 256), 100),
        ("CIFAR-100", (3, 32, 32), 1_000),
    ):  # fmt: skip
        note = f"{clients} clients, 256 units for each, float32, 64-bit indices"
        dense = mandrake_row.dense_bytes(shape, bins=256, clients=clients) / mib
        sparse = mandrake_row.sparse_bytes(shape, bins=256, clients=clients) / mib
        setting = f"{name}, {clients} clients"
        measures.append(figure(f"dense size added, {setting}", dense, "MiB", note))
        measures.append(figure(f"sparse size added, {setting}", sparse, "MiB", note))
        measures.append(figure(f"dense over sparse, {setting}", dense / sparse, "x", note))
    expected = readout.expected_singletons(64, 256) / 64
    for scale in ("midpoint", "max", "anchor"):
        exact, leaked, psnr, of_alone = [], [], [], []
        for seed in seeds:
            trial, _ = play(
                data, MANDRAKE(scale=scale), data.victims(640, seed * 640), clients=10, seed=seed,
                protocol=FedSGD(), settings={"width": 8}, dtype=torch.float64, letter="G",
                model="convnet", vantage=Vantage.AGGREGATE,
            )  # fmt: skip
            error, similar = scores(trial)
            h = trial.truth.images.double().flatten(1).mean(dim=1)
            single = torch.cat([alone(part, trial.view.key["edges"]) for part in h.chunk(10)])
            exact.append(float((error < EXACT).double().mean()))
            of_alone.append(float((similar[single] > 0.5).double().mean()))
            leaked.append(float((similar > 0.5).double().mean()))
            psnr.append(float(decibels(error).mean()))
        note = "10 clients x 64 images, 256 units, one step, float64, the sum alone"
        iid = f"{note}; {expected:.3f} have a bin to themselves for iid brightness"
        measures.append(mean(f"leaked (ssim > 0.5), scale {scale}", leaked, "share", iid))
        measures.append(mean(f"leaked among those alone, scale {scale}", of_alone, "share", note))
        measures.append(mean(f"mean psnr of all, scale {scale}", psnr, "dB", note))
        if scale == "anchor":
            measures.append(mean("exact, scale anchor", exact, "share", iid))
    return measures, seeds


class Victim(nn.Module):
    """The CIFAR-10 victim: convolutions 3-12-32-64, latent 1,024, linear layers 1,024-512-10."""

    def __init__(self) -> None:
        super().__init__()
        channels = (3, 12, 32, 64)
        layers: list[nn.Module] = []
        for c, d in itertools.pairwise(channels):
            layers += [nn.Conv2d(c, d, 4, stride=2, padding=1), nn.ReLU()]
        self.features = nn.Sequential(*layers)
        self.head = nn.Sequential(
            nn.Linear(1_024, 1_024), nn.ReLU(), nn.Linear(1_024, 512), nn.ReLU(), nn.Linear(512, 10)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``(N, 10)``."""
        logits: Tensor = self.head(self.features(x).flatten(1))
        return logits


def scale_mia(data: Data) -> tuple[Measures, Sequence[int]]:
    """Latents against singleton bins, images against the autoencoder's ceiling."""
    seeds = (0, 1)
    measures: Measures = []
    attack = ScaleMIA.tuned()

    def attacked(
        n: int, seed: int, *, clients: int = 1, dtype: torch.dtype = torch.float32,
        protocol: Protocol | None = None,
    ) -> Trial:  # fmt: skip
        torch.manual_seed(0)  # one global model, so that one autoencoder serves all
        scenario = Scenario(
            model=ModelRef("object", "Victim"), letter="G", clients=clients, seed=seed,
            protocol=protocol or FedSGD(),
            vantage=Vantage.AGGREGATE if clients > 1 else Vantage.SERVER,
        )  # fmt: skip
        set_up = stage(
            scenario, model=Victim().to(dtype), victims=data.victims(n, seed * n),
            surrogate=data.public, box=Box.unit(3),
        )  # fmt: skip
        return run_trial(set_up, attack, seed=seed)

    def judged(trial: Trial) -> dict[str, float]:
        model = trial.view.model
        x = trial.truth.images.to(next(model.parameters()))
        parts = find_parts(model, x[:1])
        with torch.no_grad():
            z = torch.cat([encode(parts, part) for part in x.split(256)])
        edges = trial.view.key["thresholds"]
        bins = torch.bucketize(z.mean(dim=1), edges)
        single = (bins > 0) & ((bins[:, None] == bins).sum(dim=1) == 1)
        own = decode(z, trial.view.key, Box.unit(3), (3, 32, 32))
        ceiling = decibels((own - x).double().square().flatten(1).mean(dim=1).sqrt())
        # A candidate is a singleton's latent if it is that image's own reconstruction.
        distance = pairwise_mse(trial.images.double(), own.double()).min(dim=0).values.sqrt()
        error, _ = scores(trial)
        public = data.public.images.mean(dim=0)
        null = decibels((public - x).double().square().flatten(1).mean(dim=1).sqrt())
        return {
            "singletons": float(single.double().mean()),
            "read": float((distance[single] < 1e-3).double().mean()),
            "ceiling": float(ceiling.mean()),
            "psnr": float(decibels(error).mean()),
            "psnr of singletons": float(decibels(error)[single].mean()),
            "success": float((decibels(error) > 18).double().mean()),
            "null": float(null.mean()),
            "seconds": trial.found.seconds,
        }

    for name, n, clients, protocol in (
        ("n=64", 64, 1, None), ("n=256", 256, 1, None), ("n=1024", 1_024, 1, None),
        ("8 clients x 128, one sum", 1_024, 8, None),
        ("FedAVG, 8 clients x 64, one step each", 512, 8, FedAVG(epochs=1, batch_size=64, lr=0.1)),
    ):  # fmt: skip
        found = [judged(attacked(n, seed, clients=clients, protocol=protocol)) for seed in seeds]
        note = "1,024 bins, latent 1,024, float32; autoencoder on 1,000 public images, 60 epochs"
        for key, title, unit in (
            ("singletons", "examples alone in a bin", "share"),
            ("read", "of those read", "share"),
            ("success", "success (psnr > 18)", "share"),
            ("psnr", "mean psnr of all, missing 0 dB", "dB"),
            ("psnr of singletons", "mean psnr of singletons", "dB"),
            ("ceiling", "mean psnr of the autoencoder", "dB"),
            ("null", "mean psnr of the public mean image", "dB"),
            ("seconds", "seconds of the read-out", "s"),
        ):
            measures.append(mean(f"{title}, {name}", [f[key] for f in found], unit, note))
    return measures, seeds


def seer(data: Data) -> tuple[Measures, Sequence[int]]:
    """The extreme image of batches of victims, against r(0) and the mean of the batch."""
    size, batch, trials = 8, 8, 64
    attack = SEER.tuned()
    measures: Measures = []
    for name, chosen in (
        ("", attack),
        (", without the negative term", replace(attack, negatives=0)),
    ):
        found, null, mixed, others = [], [], [], []
        for index in range(trials):
            trial, _ = play(
                data, chosen, data.victims(batch, index * batch, size), letter="G",
                model="convnet-bn", settings={"width": 4}, protocol=FedSGD(mode="train"),
                dtype=torch.float32,
            )  # fmt: skip
            x = trial.truth.images
            brightest = int(x.flatten(1).mean(dim=1).argmax())
            guess = torch.stack(
                [trial.images[0], trial.view.key["b"].reshape(x.shape[1:]), x.mean(dim=0)]
            )
            error = (guess.clamp(0, 1) - x[brightest]).double().square().flatten(1).mean(dim=1)
            psnr = decibels(error.sqrt())
            found.append(float(psnr[0]))
            null.append(float(psnr[1]))
            mixed.append(float(psnr[2]))
            left = [i for i in range(batch) if i != brightest]
            off = (guess[0].clamp(0, 1) - x[left]).double().square().flatten(1).mean(dim=1)
            others.append(float((off > error[0]).all()))
        note = (
            f"{size}x{size}, batch {batch}, ConvNet with BN of width 4, {chosen.steps} steps of "
            f"{chosen.batches} batches on 1,000 public images, float32"
        )
        measures.append(mean(f"psnr of the brightest image{name}", found, "dB", note))
        measures.append(mean(f"psnr of r(0){name}", null, "dB", note))
        measures.append(mean(f"psnr of the batch mean{name}", mixed, "dB", note))
        measures.append(mean(f"nearest to the brightest of its batch{name}", others, "share", note))
    return measures, (0,)


Row = tuple[type[Attack], Callable[[Data], tuple[Measures, Sequence[int]]]]
ROWS: dict[str, Row] = {
    "trap_weights": (TrapWeights, trap_weights),
    "mandrake": (MANDRAKE, mandrake),
    "scale_mia": (ScaleMIA, scale_mia),
    "seer": (SEER, seer),
}


def main() -> None:
    """Run the chosen rows."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("keys", nargs="*", default=list(ROWS))
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--results", type=Path, default=Path("results"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    data = Data(options.data)
    for key in options.keys:
        attack, run = ROWS[key]
        measures, seeds = run(data)
        result = {
            "schema": "leakatlas/result/1",
            "kind": "attack",
            "key": key,
            "code_version": attack.version,
            "recipe": {"defaults": attack().to_json(), "data": "CIFAR-10 test, pixels in [0, 1]"},
            "hardware": "2 CPU cores, no GPU",
            "seeds": list(seeds),
            "measures": measures,
            "command": f"python benchmarks/analytic_active.py {key} --data CIFAR10_FOLDER",
            "date": datetime.date.today().isoformat(),
        }
        options.results.mkdir(parents=True, exist_ok=True)
        path = options.results / f"{key}.json"
        path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
