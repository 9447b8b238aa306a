"""Measures the analytic attacks on CIFAR-10 test images, and writes ``results/<key>.json``.

    python benchmarks/analytic.py [KEY ...] --data CIFAR10_FOLDER

The folder holds ``test.parquet`` of CIFAR-10 in the Hugging Face image layout. Victims are taken
from its front, the adversary's public images from rows behind them. Candidates are assigned to
originals one to one (least squared error); an original without a candidate counts as not recovered.
"""

from __future__ import annotations

import argparse
import datetime
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from leakatlas.attacks.analytic.closed_form.rgap import RGAP, rank_analysis
from leakatlas.attacks.analytic.isolation.loki import LOKI
from leakatlas.attacks.analytic.isolation.sybils import Sybils
from leakatlas.attacks.analytic.sparsification.fishing import (
    Fishing,
    find_head,
    head_names,
    survivors,
)
from leakatlas.attacks.analytic.sparsification.robbing_the_fed import RobbingTheFed
from leakatlas.attacks.api import Attack
from leakatlas.bench.harness import Trial, run_trial
from leakatlas.blocks import readout
from leakatlas.data import Box, ImageSet, parquet
from leakatlas.defenses.formal.dp.client_dp import ClientDP
from leakatlas.fl import (
    Defense,
    FedAVG,
    FedSGD,
    ModelRef,
    Protocol,
    Scenario,
    Stage,
    replay,
    stage,
    stream,
)
from leakatlas.metrics import images as image_metrics
from leakatlas.metrics.assignment import assign, pairwise_mse
from leakatlas.metrics.intervals import binomial, bootstrap
from leakatlas.threat import Vantage

EXACT = 1e-6
"""Root mean square error, in pixels of [0, 1], below which an image counts as exactly recovered."""

PUBLIC = slice(8_000, 9_000)
"""Rows of the surrogate images; victims come from before."""


class Data:
    """CIFAR-10 test images."""

    def __init__(self, folder: Path) -> None:
        self.all = parquet(folder / "test.parquet", limit=PUBLIC.stop)
        self.public = self.all.subset(range(PUBLIC.start, PUBLIC.stop))

    def victims(self, count: int, start: int = 0, size: int = 32) -> ImageSet:
        """``count`` images from row ``start`` on."""
        return self.all.subset(range(start, start + count)).resize(size)

    def of_class(self, label: int, count: int) -> ImageSet:
        """The first ``count`` images of one class."""
        front = self.all.subset(range(PUBLIC.start))
        return front.of_class(label).subset(range(count))


def play(
    data: Data,
    attack: Attack,
    victims: ImageSet,
    *,
    letter: str,
    model: str,
    settings: Mapping[str, Any],
    clients: int = 1,
    protocol: Protocol | None = None,
    vantage: Vantage = Vantage.SERVER,
    defenses: tuple[Defense, ...] = (),
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> tuple[Trial, Stage]:
    """One trial with plain pixels."""
    size = victims.size
    reference = ModelRef("builtin", model, {"size": size, "classes": 10, "seed": seed, **settings})
    scenario = Scenario(
        model=reference,
        letter=letter,
        clients=clients,
        protocol=protocol or FedSGD(),
        vantage=vantage,
        defenses=defenses,
        seed=seed,
    )
    set_up = stage(
        scenario,
        model=reference.build().to(dtype),
        victims=victims,
        surrogate=data.public.resize(size),
        box=Box.unit(3),
    )
    return run_trial(set_up, attack, seed=seed), set_up


def scores(trial: Trial) -> tuple[Tensor, Tensor]:
    """Root mean square error (infinite if missing) and SSIM (0 if missing) of every original."""
    truth = trial.truth.images.double()
    error = torch.full((len(truth),), torch.inf, dtype=torch.float64)
    similar = torch.zeros(len(truth), dtype=torch.float64)
    if len(trial.images) == 0:
        return error, similar
    candidates = trial.images.double().clamp(0, 1)
    cost = pairwise_mse(candidates, truth)
    for original, candidate in enumerate(assign(cost).of_original):
        if candidate is not None:
            error[original] = cost[candidate, original].sqrt()
            pair = candidates[candidate][None], truth[original][None]
            similar[original] = float(image_metrics.ssim(*pair))
    return error, similar


def decibels(error: Tensor) -> Tensor:
    """PSNR from root mean square errors; a missing original counts as 0 dB."""
    return image_metrics.psnr_of_mse(error.square()).where(torch.isfinite(error), 0.0)


def alone(h: Tensor, edges: Tensor) -> Tensor:
    """Which measurements have a bin to themselves, the top bin unbounded."""
    open_edges = edges.clone()
    open_edges[-1] = torch.inf
    bins = torch.bucketize(h, open_edges)
    return (bins[:, None] == bins).sum(dim=1) == 1


def mean(name: str, values: Iterable[float], unit: str, note: str) -> dict[str, Any]:
    """A mean with its bootstrap interval."""
    sample = torch.tensor(list(values), dtype=torch.float64)
    interval = bootstrap(sample, generator=stream("analytic", name))
    return {
        "name": name,
        "value": float(sample.mean()),
        "unit": unit,
        "interval": [interval.low, interval.high],
        "n": len(sample),
        "note": note,
    }


def share(name: str, hits: int, trials: int, note: str) -> dict[str, Any]:
    """A share with its Wilson interval."""
    interval = binomial(hits, trials)
    return {
        "name": name,
        "value": hits / trials,
        "unit": "share",
        "interval": [interval.low, interval.high],
        "n": trials,
        "note": note,
    }


def logit_of(logits: Tensor, y: Tensor) -> Tensor:
    """The logit of class y, whose gradient is that of an example with delta_y = +1."""
    return logits[:, int(y)].sum()


# -- one function a row ----------------------------------------------------------------------------


def rgap(data: Data) -> tuple[list[dict[str, Any]], Sequence[int]]:
    """CNN6 with each head, CNN6-d, the linear network, and the ranks."""
    seeds = (0,)
    measures = []
    for name, model, settings, count in (
        ("biased head of 10", "cnn6", {"head_bias": True}, 6),
        ("two logits without bias (logistic start)", "cnn6", {"classes": 2}, 3),
        ("linear network", "cnn6", {"head_bias": True, "act": "identity"}, 3),
        ("CNN6-d, biased head of 10", "cnn6-d", {"head_bias": True}, 3),
    ):
        found, seconds, ssim = [], [], []
        for index in range(count):
            image = data.victims(1, index)
            if settings.get("classes") == 2:
                image = replace(image, labels=image.labels % 2, classes=("even", "odd"))
            trial, _ = play(data, RGAP(), image, letter="B", model=model, settings=settings)
            error, similar = scores(trial)
            found.append(float(decibels(error)))
            ssim.append(float(similar))
            seconds.append(trial.found.seconds)
        measures.append(mean(f"psnr, {name}", found, "dB", "32x32, float64, one example"))
        measures.append(mean(f"ssim, {name}", ssim, "", "32x32, float64, one example"))
        measures.append(mean(f"seconds, {name}", seconds, "s", "one thread"))
    for model in ("cnn6", "cnn6-d"):
        reference = ModelRef("builtin", model, {"classes": 10, "head_bias": True})
        ranks = rank_analysis(reference.build(), torch.rand(1, 3, 32, 32), torch.tensor([0]))
        for layer in ranks:
            if layer.rank < layer.length or layer.name == "body.2":
                measures.append(
                    {
                        "name": f"rank over unknowns, {model}, {layer.name}",
                        "value": layer.rank / layer.length,
                        "unit": "share",
                        "interval": None,
                        "n": 1,
                        "note": f"{layer.rank} of {layer.length}, before any attack",
                    }
                )
    return measures, seeds


def robbing_the_fed(data: Data) -> tuple[list[dict[str, Any]], Sequence[int]]:
    """Exact hits against singleton bins and their expectation, in both forms."""
    seeds = (0, 1, 2, 3, 4)
    net: dict[str, Any] = {"model": "convnet", "settings": {"width": 8}, "letter": "G"}
    measures = []
    for n, k in ((32, 64), (64, 128), (64, 256), (256, 1024)):
        hits, singles, quality = [], [], []
        runs = seeds if k < 1024 else seeds[:2]
        for seed in runs:
            attack = RobbingTheFed(bins=k)
            trial, _ = play(data, attack, data.victims(n, seed * n), seed=seed, **net)
            error, _ = scores(trial)
            w, edges = trial.view.key["w"], trial.view.key["edges"]
            single = alone(trial.truth.images.double().flatten(1) @ w, edges)
            hits.append(int((error < EXACT).sum()))
            singles.append(int(single.sum()))
            quality.append(float((error[single] < EXACT).double().mean()))
        expected = readout.expected_singletons(n, k)
        setting = f"n={n}, k={k}"
        measures.append(
            mean(f"exact images, {setting}", hits, "images", f"expected {expected:.1f} for iid h")
        )
        measures.append(mean(f"singleton bins, {setting}", singles, "images", "from the true h"))
        measures.append(
            mean(f"exact share of singletons, {setting}", quality, "share", "theory: 1")
        )
    psnr, leaked = [], []
    for seed in seeds:
        trial, _ = play(
            data, RobbingTheFed(bins=128), data.victims(64, seed * 64), seed=seed,
            dtype=torch.float32, **net,
        )  # fmt: skip
        error, _ = scores(trial)
        psnr.append(float(decibels(error).mean()))
        leaked.append(float((decibels(error) > 30).double().mean()))
    note = "float32, n=64, k=128, missing counts as 0 dB"
    measures.append(mean("mean psnr of all images", psnr, "dB", note))
    measures.append(mean("share above 30 dB", leaked, "share", note))
    for form in ("cumulative", "sparse"):
        exact = []
        for seed in seeds:
            protocol = FedAVG(epochs=2, batch_size=8, lr=1e-3)
            attack = RobbingTheFed(bins=128, form=form)
            trial, _ = play(
                data, attack, data.victims(32, seed * 32), seed=seed, protocol=protocol, **net
            )
            exact.append(float((scores(trial)[0] < EXACT).double().mean()))
        measures.append(
            mean(f"exact share, FedAVG, {form} form", exact, "share", "E=2, B=8, n=32, k=128")
        )
    single_hits = 0
    for trial_number in range(40):
        attack = RobbingTheFed(one_shot=64)
        trial, _ = play(data, attack, data.victims(64, trial_number * 64), seed=trial_number, **net)
        single_hits += int((scores(trial)[0] < EXACT).any())
    measures.append(share("one-shot success, n=64", single_hits, 40, "theory: about 1/e = 0.368"))
    return measures, seeds


def fishing(data: Data) -> tuple[list[dict[str, Any]], Sequence[int]]:
    """Isolation, number of queries, inversion."""
    seeds = (0, 1, 2)
    measures = []

    def isolation(trial: Trial, set_up: Stage) -> float:
        """Relative distance of the isolated extractor gradient to the nearest example's own."""
        view = trial.view
        model = view.model
        head = find_head(model, view)
        got = survivors(view, head, len(view.rounds) - 1)
        target = int(view.rounds[-1].key["move"][1])
        parameters = {n: p.detach() for n, p in model.named_parameters()}
        best = torch.inf
        for image in set_up.box.normalize(trial.truth.images.to(got.features)):
            own = replay.gradient(
                model, parameters, {}, image[None], torch.tensor([target]),
                loss=logit_of, create_graph=False,
            )  # fmt: skip
            names = [n for n in own if n not in head_names(head)]
            left = sum(float((got.gradient[n] - own[n]).square().sum()) for n in names)
            size = sum(float(own[n].square().sum()) for n in names)
            best = min(best, (left / size) ** 0.5)
        return best

    cases: tuple[tuple[str, Callable[[int], ImageSet], int | None], ...] = (
        ("64 mixed images", lambda seed: data.victims(64, seed * 64), None),
        ("50 images of one class", lambda seed: data.of_class(3 + seed, 50), None),
        ("64 mixed images, a class with several", lambda seed: data.victims(64, seed * 64), 8),
    )
    for name, victims, target in cases:
        error, queries, done = [], [], 0
        for seed in seeds:
            trial, set_up = play(
                data, Fishing(steps=1, target_class=target), victims(seed), letter="F",
                model="convnet", settings={"width": 8}, seed=seed,
            )  # fmt: skip
            done += trial.found.status == "complete"
            queries.append(len(trial.view.rounds))
            error.append(isolation(trial, set_up))
        note = "ConvNet of width 8 at initialisation, eval mode, float64"
        measures.append(mean(f"isolation error, {name}", error, "relative", note))
        measures.append(mean(f"queries, {name}", queries, "rounds", note))
        measures.append(share(f"one example left, {name}", done, len(seeds), note))
    psnr, ratio = [], []
    for seed in seeds:
        trial, _ = play(
            data, Fishing(steps=1_500, tv_weight=0.02), data.victims(64, seed * 64), letter="F",
            model="lenet", settings={}, seed=seed, dtype=torch.float32,
        )  # fmt: skip
        psnr.append(float(decibels(scores(trial)[0]).max()))
        trial, _ = play(
            data, Fishing(), data.victims(64, seed * 64), letter="F", model="fc", settings={},
            seed=seed,
        )  # fmt: skip
        ratio.append(float(scores(trial)[0].min()))
    measures.append(
        mean("psnr of the isolated image, LeNet", psnr, "dB", "1,500 steps, TV 0.02, n=64")
    )
    measures.append(
        mean("error of the isolated image, FC network", ratio, "rms", "row ratio, n=64, float64")
    )
    return measures, seeds


def sybils(data: Data) -> tuple[list[dict[str, Any]], Sequence[int]]:
    """Recall without noise; PSNR against M under distributed DP, silent and honest."""
    seeds = (0, 1, 2)
    measures = []
    for n, scaling in ((20, 0.95), (20, None), (100, 0.95), (100, None)):
        recall = []
        for seed in seeds:
            trial, _ = play(
                data, Sybils(scaling=scaling), data.victims(n, seed * n), letter="H", model="fc",
                settings={"widths": (1_000, 64), "act": "relu"}, seed=seed, dtype=torch.float64,
            )  # fmt: skip
            recall.append(float((scores(trial)[0] < EXACT).double().mean()))
        measures.append(
            mean(
                f"exact recall without noise, n={n}, s {scaling or 'tuned'}",
                recall,
                "share",
                "1,000 rows, 32x32, float64",
            )
        )
    z = 1e-3
    for members in (10, 100, 1_000):
        silent, honest = [], []
        for seed in seeds:
            defense = ClientDP(
                noise_multiplier=z, clip_norm=1.0, unit="update", clipping="flat",
                share_of=members,
            )  # fmt: skip
            attack = Sybils(cohort_size=members)
            trial, set_up = play(
                data, attack, data.victims(20, seed * 20, size=16), letter="H", model="fc",
                settings={"widths": (200, 64), "act": "relu"}, seed=seed, dtype=torch.float32,
                vantage=Vantage.AGGREGATE, defenses=(defense,),
            )  # fmt: skip
            silent.append(float(decibels(scores(trial)[0]).median()))
            seen = trial.view.rounds[0]
            assert seen.update is not None
            generator = stream("honest noise", seed, members)
            missing = z * ((members - 1) / members) ** 0.5 / members
            tensors = {
                name: t + missing * torch.randn(t.shape, generator=generator)
                for name, t in seen.update.tensors.items()
            }
            view = trial.view.with_rounds(
                [replace(seen, update=seen.update.with_tensors(tensors))], dict(trial.view.key)
            )
            found = attack(view, seed=seed)
            shown = replace(trial, found=found, images=set_up.box.denormalize(found.images))
            honest.append(float(decibels(scores(shown)[0]).median()))
        note = f"z={z}, C=1, n=20, 16x16, 200 rows, s=0.95; missing counts as 0 dB"
        measures.append(mean(f"median psnr, silent sybils, M={members}", silent, "dB", note))
        measures.append(mean(f"median psnr, honest noise, M={members}", honest, "dB", note))
    return measures, seeds


def loki(data: Data) -> tuple[list[dict[str, Any]], Sequence[int]]:
    """The demo's setting with every scale, exactness, and the ablation of kappa."""
    seeds = (0, 1)
    measures = []
    net: dict[str, Any] = {"model": "convnet", "letter": "G", "vantage": Vantage.AGGREGATE}
    for scale in ("max", "midpoint", "anchor"):
        psnr, ssim, leaked = [], [], []
        for seed in seeds:
            attack = LOKI(scale=scale)
            trial, _ = play(
                data, attack, data.victims(640, seed * 640), clients=10, seed=seed,
                protocol=FedAVG(epochs=1, batch_size=8, lr=1e-2), settings={"width": 8},
                dtype=torch.float32, **net,
            )  # fmt: skip
            error, similar = scores(trial)
            leaked.append(float((similar > 0.5).double().mean()))
            psnr.append(float(decibels(error)[similar > 0.5].mean()))
            ssim.append(float(similar[similar > 0.5].mean()))
        note = "10 clients x 64 images, 8 local steps of 8, 256 bins, kappa 500, float32, one sum"
        measures.append(mean(f"leaked (ssim > 0.5), scale {scale}", leaked, "share", note))
        measures.append(mean(f"psnr of the leaked, scale {scale}", psnr, "dB", note))
        measures.append(mean(f"ssim of the leaked, scale {scale}", ssim, "", note))
    for kappa in (1.0, 50.0, 500.0, 1e4):
        exact, single_share = [], []
        for seed in (0, 1, 2):
            trial, _ = play(
                data, LOKI(bins=64, kappa=kappa, scale="anchor"),
                data.victims(128, seed * 128, size=16), clients=8, seed=seed,
                protocol=FedAVG(epochs=2, batch_size=4, lr=1e-2), settings={"width": 8}, **net,
            )  # fmt: skip
            error, _ = scores(trial)
            h = trial.truth.images.double().flatten(1).mean(dim=1)
            single = torch.cat([alone(p, trial.view.key["edges"]) for p in h.chunk(8)])
            exact.append(float((error < EXACT).double().mean()))
            single_share.append(float((error[single] < EXACT).double().mean()))
        note = "8 clients x 16 images, E=2, B=4, 64 bins, 16x16, float64, scale anchor"
        measures.append(mean(f"exact share, kappa {kappa:g}", exact, "share", note))
        measures.append(
            mean(f"exact share of singletons, kappa {kappa:g}", single_share, "share", note)
        )
    return measures, (0, 1, 2)


ROWS: dict[str, tuple[type[Attack], Callable[[Data], tuple[list[dict[str, Any]], Sequence[int]]]]]
ROWS = {
    "rgap": (RGAP, rgap),
    "robbing_the_fed": (RobbingTheFed, robbing_the_fed),
    "fishing": (Fishing, fishing),
    "sybils": (Sybils, sybils),
    "loki": (LOKI, loki),
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
            "command": f"python benchmarks/analytic.py {key} --data CIFAR10_FOLDER",
            "date": datetime.date.today().isoformat(),
        }
        options.results.mkdir(parents=True, exist_ok=True)
        path = options.results / f"{key}.json"
        path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
