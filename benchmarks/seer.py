"""Measures SEER at 16x16, on one client and through a sum; writes ``results/seer_16x16.json``.

    python benchmarks/seer.py [max thresh] --data CIFAR10_FOLDER [--steps 1000]

Public images come from CIFAR-10's training file, victims from its test file. What was not asked for
keeps the figures that the result already holds. The image wanted is the brightest of the batch; in
a sum, the one that is brightest in standard deviations of its own client's batch. A round in which
no image or several pass the threshold counts like any other.
"""

from __future__ import annotations

import argparse
import datetime
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from analytic import decibels, mean, share
from torch import Tensor

from leakatlas.attacks.analytic.isolation.seer import SEER, in_own_batch
from leakatlas.blocks.watch import Watch
from leakatlas.data import Box, ImageSet, parquet
from leakatlas.fl import FedSGD, ModelRef, Scenario, Stage, stage, stream
from leakatlas.threat import Vantage

SIZE, BATCH, CLIENTS, ROUNDS = 16, 8, 4, 100
SUCCESS = 19.0
"""PSNR in dB above which the paper calls an image recovered."""


def dealt(public: ImageSet, victims: ImageSet, clients: int) -> Stage:
    """One round's clients, and the public images."""
    settings = {"size": SIZE, "classes": 10, "width": 8}
    reference = ModelRef("builtin", "convnet-bn", settings)
    scenario = Scenario(
        model=reference, letter="G", clients=clients, protocol=FedSGD(mode="train"),
        vantage=Vantage.AGGREGATE if clients > 1 else Vantage.SERVER,
    )  # fmt: skip
    return stage(
        scenario, model=reference.build(), victims=victims, surrogate=public, box=Box.unit(3)
    )


def psnr(guess: Tensor, wanted: Tensor) -> float:
    """In dB, the guess clipped to [0, 1]."""
    error = (guess.clamp(0, 1) - wanted).double().square().mean().sqrt()
    return float(decibels(error[None])[0])


def measured(
    form: str, attack: SEER, public: ImageSet, test: ImageSet
) -> tuple[list[dict[str, Any]], float]:
    """Train once, then read :data:`ROUNDS` rounds of other victims."""
    clients = CLIENTS if form == "thresh" else 1
    count = clients * BATCH
    first = dealt(public, test.subset(range(count)), clients)
    begun = time.perf_counter()
    tampering = attack.tamper(first.view(), generator=stream("seer", "tamper"), watch=Watch())
    trained = time.perf_counter() - begun
    assert tampering is not None
    found, null, mixed, unique, nearest = [], [], [], [], 0
    for index in range(ROUNDS):
        scene = dealt(
            public.subset(range(BATCH)), test.subset(range(index * count, (index + 1) * count)),
            clients,
        )  # fmt: skip
        record = scene.federation.play_round(sent=tampering.sent)
        view = scene.view([record], keys=[tampering.key])
        images = attack(view).images
        x = torch.stack([scene.victims[c].images for c in range(clients)])
        p = in_own_batch(x.flatten(2).mean(dim=2))
        every = x.flatten(0, 1)
        wanted = every[int(p.argmax())]
        found.append(psnr(images[0], wanted))
        null.append(psnr(tampering.key["b"].reshape(wanted.shape), wanted))
        mixed.append(psnr(every.mean(dim=0), wanted))
        gaps = (images[0].clamp(0, 1) - every).square().flatten(1).sum(dim=1)
        nearest += int(gaps.argmin()) == int(p.argmax())
        if form == "thresh":
            unique.append(int((p > tampering.key["threshold"]).sum()) == 1)
    who = f"{clients} clients x {BATCH}, one sum" if clients > 1 else f"one client x {BATCH}"
    note = (
        f"{SIZE}x{SIZE}, {who}, ConvNet with BN of width 8, {attack.steps} steps of "
        f"{attack.batches} batches on {len(public)} public images, float32"
    )
    rows = [
        mean(f"psnr of the image wanted, {who}", found, "dB", note),
        mean(f"psnr of r(0), {who}", null, "dB", f"null baseline; {note}"),
        mean(f"psnr of the mean of all images, {who}", mixed, "dB", f"null baseline; {note}"),
        mean(f"psnr over r(0), {who}", [a - b for a, b in zip(found, null, strict=True)], "dB",
             note),
        share(f"success (psnr > 19), {who}", sum(v > SUCCESS for v in found), ROUNDS, note),
        share(f"success of r(0), {who}", sum(v > SUCCESS for v in null), ROUNDS, note),
        share(f"nearest to the image wanted of all {count}, {who}", nearest, ROUNDS, note),
    ]  # fmt: skip
    if unique:
        alone = [v for v, only in zip(found, unique, strict=True) if only]
        rows.append(share(f"exactly one image passes the threshold, {who}", sum(unique), ROUNDS,
                          f"tau {float(tampering.key['threshold']):.2f}; {note}"))  # fmt: skip
        if alone:
            rows.append(mean(f"psnr where exactly one passes, {who}", alone, "dB", note))
            hits = sum(v > SUCCESS for v in alone)
            rows.append(share(f"success where exactly one passes, {who}", hits, len(alone), note))
    return rows, trained


def main() -> None:
    """Run the chosen forms."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("forms", nargs="*", default=["max", "thresh"])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=1_000)
    parser.add_argument("--results", type=Path, default=Path("results"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    public = parquet(options.data / "train.parquet", limit=4_000).resize(SIZE)
    test = parquet(options.data / "test.parquet", limit=ROUNDS * CLIENTS * BATCH).resize(SIZE)
    path = options.results / "seer_16x16.json"
    held: dict[str, Any] = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    parts: dict[str, Any] = held.get("recipe", {}).get("forms", {})
    kept = {m["name"]: m for m in held.get("measures", [])}
    for form in options.forms:
        attack = replace(
            SEER.tuned(), steps=options.steps, form=form, clients=CLIENTS * (form == "thresh")
        )
        rows, seconds = measured(form, attack, public, test)
        kept |= {row["name"]: row for row in rows}
        parts[form] = {
            "attack": attack.to_json(), "seconds of training": seconds,
            "measures": [row["name"] for row in rows],
        }  # fmt: skip
        result = {
            "schema": "leakatlas/result/1",
            "kind": "attack",
            "key": "seer",
            "code_version": SEER.version,
            "recipe": {"data": "CIFAR-10, pixels in [0, 1]", "forms": parts},
            "hardware": "2 CPU cores shared with other work, one thread, no GPU",
            "seeds": [0],
            "measures": [kept[name] for part in parts.values() for name in part["measures"]],
            "command": f"python benchmarks/seer.py --data CIFAR10_FOLDER --steps {options.steps}",
            "date": datetime.date.today().isoformat(),
        }
        options.results.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
