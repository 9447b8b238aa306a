"""What a defense costs, what noise of equal size would stop, and attacks on its own secrets.

Utility: eight clients train the network on digits by FedSGD; test accuracy of the models that they
predict with, at the server's step size that validates best. PRECODE and FedKL, whose mirror alone
does not undo them, are also attacked by fitting their secrets together with the image.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from leakatlas import data
from leakatlas.attacks.optimization.basic.inverting_gradients import InvertingGradients
from leakatlas.bench import harness, scene, secrets
from leakatlas.bench.cells import Cell
from leakatlas.bench.harness import Trial
from leakatlas.data import ImageSet
from leakatlas.fl import (
    Client,
    ClientContext,
    Defense,
    Federation,
    FedSGD,
    Stage,
    Update,
)
from leakatlas.fl import stage as staged
from leakatlas.fl.view import defense_from_json

CLIENTS, EXAMPLES, TEST, ROUNDS = 8, 40, 300, 25
RATES = (0.5, 0.15)
"""Server step sizes tried; clipping, noise and added layers change the right one."""

SUCCESS, STEPS = 19.0, 200


@dataclass(frozen=True, kw_only=True)
class EqualNoise(Defense):
    """The control: Gaussian noise whose norm is a fixed share of the update's norm."""

    key: ClassVar[str] = "equal_noise"
    knob: ClassVar[str] = "ratio"
    neutral: ClassVar[float] = 0.0
    ratio: float

    def update(self, update: Update, context: ClientContext) -> Update:
        """Add it."""
        noise = {
            name: torch.randn(t.shape, generator=context.generator, dtype=t.dtype)
            for name, t in update.tensors.items()
        }
        factor = self.ratio * _flat(update.tensors).norm() / _flat(noise).norm()
        return update.with_tensors({n: t + factor * noise[n] for n, t in update.tensors.items()})


def _flat(tensors: Mapping[str, Tensor]) -> Tensor:
    return torch.cat([t.flatten() for t in tensors.values()])


# -- around an attack ----------------------------------------------------------------------------


def examine(trial: Trial, stage: Stage) -> dict[str, Any]:
    """The worst attack that knows the defense; else the upload, and the control of equal noise."""
    psnr = _psnr(trial, stage)
    if stage.scenario.letter == "C":
        around = _around(trial, stage)
        worst = [max(pair) for pair in zip(psnr, around or psnr, strict=True)]
        return {"psnr_worst": worst, "success_rate": [float(v >= SUCCESS) for v in worst]}
    nothing: dict[str, Any] = {n: [] for n in ("error", "cosine", "size", "psnr_equal_noise")}
    if not stage.scenario.defenses:
        return nothing
    plain = _with(stage, ())
    b = plain.view([plain.federation.play_round()]).update.tensors
    a = trial.view.update.tensors
    if a.keys() != b.keys():
        return nothing
    u, v = _flat({name: a[name] for name in b}), _flat(b)
    ratio = float((u - v).norm() / v.norm())
    noisy = _with(stage, (EqualNoise(ratio=ratio),))
    attack = InvertingGradients.tuned(steps=STEPS)
    control = harness.run_trial(noisy, attack, seed=stage.scenario.seed)
    return {
        "error": ratio,
        "cosine": float(torch.cosine_similarity(u, v, dim=0)),
        "size": float(u.norm() / v.norm()),
        "psnr_equal_noise": _psnr(control, noisy),
    }


def _with(stage: Stage, defenses: tuple[Defense, ...]) -> Stage:
    """The same clients and weights under other defenses."""
    parts = list(stage.victims.values())
    victims = ImageSet(
        torch.cat([p.images for p in parts]), torch.cat([p.labels for p in parts]),
        parts[0].classes, parts[0].name,
    )  # fmt: skip
    return staged(
        replace(stage.scenario, defenses=defenses),
        victims=victims, surrogate=stage.surrogate, box=stage.box,
    )  # fmt: skip


def _psnr(trial: Trial, stage: Stage) -> list[float]:
    """Of every victim, by the common protocol."""
    scores = harness.scored(trial, stage, public=scene.public_images(stage))
    return [image.psnr for image in scores.images]


def _around(trial: Trial, stage: Stage) -> list[float] | None:
    """The attack on the defense's secret, where it has one."""
    found = secrets.fitted(trial.view, steps=STEPS, seed=stage.scenario.seed)
    if found is None:
        return None
    return _psnr(replace(trial, images=stage.box.denormalize(found)), stage)


# -- without an attack ---------------------------------------------------------------------------


def measure(cell: Cell) -> dict[str, Any]:
    """Accuracy at the step size that validates best, and that step."""
    _, accuracy, lr = max(_trained(cell, lr) for lr in RATES)
    return {"accuracy": accuracy, "lr": lr}


def _trained(cell: Cell, lr: float) -> tuple[float, float, float]:
    """Accuracy on validation and on test images, and the step size."""
    images, box = data.digits(), scene.pixel_space(cell.case, 1)
    x, y = box.normalize(images.images), images.labels
    parts = torch.arange(CLIENTS * EXAMPLES).split(EXAMPLES)
    defenses = tuple(defense_from_json(defense) for defense in cell.case.defenses)
    federation = Federation(
        scene.network(cell)[1], {k: Client(x[part], y[part]) for k, part in enumerate(parts)},
        FedSGD(lr=lr, mode="train"), defenses, seed=cell.seed,
    )  # fmt: skip
    for _ in range(ROUNDS):
        federation.play_round(apply=True)
    first = CLIENTS * EXAMPLES
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(cell.seed)
        # Two clients: private parts differ between them.
        scores = [
            torch.stack(
                [
                    (federation.evaluation_model(k)(x[part]).argmax(1) == y[part]).double().mean()
                    for k in (0, 1)
                ]
            ).mean()
            for part in (slice(first, first + TEST), slice(first + TEST, first + 2 * TEST))
        ]
    return float(scores[0]), float(scores[1]), lr
