"""Models that ``leakatlas lint`` judges: honest ones, and what every active row sends.

The case ``calibration`` gives the numbers that thresholds follow from; no tampered model takes part
in it. Every other case counts alarms with the thresholds of the package: on models of even seeds
they were set, those of odd seeds are held out, and ``fresh`` has seeds and pictures of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from leakatlas import fl, models
from leakatlas.attacks.api import ActiveAttack
from leakatlas.bench import harness, scene
from leakatlas.bench.cells import Cell
from leakatlas.catalogue import registry
from leakatlas.data import CIFAR10, Box, ImageSet
from leakatlas.errors import InvalidInput, UnsupportedModel
from leakatlas.lint import dynamics, evaluate
from leakatlas.threat import Knowledge, Vantage

SIZE, CLASSES = 32, 10
ROUNDS = (1, 2, 4, 8)
"""Checkpoints of an honest run are taken before these rounds."""

CALIBRATION = {"initialisations": range(0, 12, 2), "checkpoints": range(1)}
"""Seeds of the models that set thresholds."""


def conv_fc(seed: int) -> nn.Module:
    """Two convolutions, a hidden linear layer, a head: what traps behind convolutions need."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
            nn.Linear(8 * (SIZE // 4) ** 2, 128), nn.ReLU(), nn.Linear(128, CLASSES),
        )  # fmt: skip


def _builtin(name: str, **settings: Any) -> Callable[[int], nn.Module]:
    return lambda seed: models.build(name, classes=CLASSES, size=SIZE, seed=seed, **settings)


ARCHITECTURES: dict[str, Callable[[int], nn.Module]] = {
    "fc": _builtin("fc", widths=(128, 64)),
    "lenet": _builtin("lenet"),
    "convnet": _builtin("convnet", width=8),
    "conv-fc": conv_fc,
    "vgg6": _builtin("vgg6", width=8),
    "resnet8": _builtin("resnet8", width=8),
    "vit": _builtin("vit", dim=32, patch=8),
}

# Learning what these rows send takes them far longer than a study of many models has. How well the
# autoencoder of scale_mia does is no matter to any check; a SEER that has hardly learned yet only
# shows that its weights look trained, as they are.
REDUCED: dict[str, dict[str, Any]] = {
    "scale_mia": {"epochs": 5},
    "seer": {"steps": 40, "batches": 2, "entries": 300, "batch_size": 8},
}
ONLY_ON = {"seer": ("resnet8",)}
"""Architectures of rows that need batch normalisation."""


def measure(cell: Cell) -> dict[str, Any]:
    """Thresholds from honest models, or alarms on those of one case and seed."""
    assert cell.case.surrogate is not None
    own, public = (scene.images(s, cell.data) for s in (cell.case.victims, cell.case.surrogate))
    part, _, population = cell.label.partition("/")
    if part == "calibration":
        honest = [HONEST[kind](own, s) for kind, seeds in CALIBRATION.items() for s in seeds]
        return evaluate.calibrated([one for each in honest for one in each])
    if population in HONEST:
        judged = list(HONEST[population](own, cell.seed))
    else:
        cls = registry.load_attack(population)
        assert issubclass(cls, ActiveAttack)
        judged = list(tampered(population, cls, own, public, cell.seed))
    counted = {f"models of {n}": sum(j.architecture == n for j in judged) for n in ARCHITECTURES}
    return evaluate.rates(judged, everywhere=population not in HONEST) | counted


def box_of(seed: int) -> Box:
    """Plain pixels and normalised ones by turns."""
    return CIFAR10 if seed % 2 else Box.unit(3)


def batch_of(images: ImageSet, seed: int, count: int, *, skewed: bool) -> ImageSet:
    """A client's own examples, of any classes or of one."""
    generator = fl.stream("lint batch", seed, count)
    order = torch.randperm(len(images), generator=generator)
    if skewed:
        order = order[images.labels[order] == images.labels[order[0]]]
    return images.subset(order[:count])


# -- honest models ---------------------------------------------------------------------------------


def initialisations(images: ImageSet, seed: int) -> Iterator[evaluate.Judged]:
    """Random weights, judged with a batch of 8, 16 or 32 examples; every third one skewed."""
    batch = batch_of(images, seed, (8, 16, 32)[seed % 3], skewed=seed % 3 == 1)
    for name, build in ARCHITECTURES.items():
        model, others = build(seed), [fl.model_state(build(seed))]
        yield evaluate.judge(
            f"{name}/{seed}", name, model,
            batch=batch, box=box_of(seed), reference=build(seed), others=others,
        )  # fmt: skip


def checkpoints(images: ImageSet, seed: int) -> Iterator[evaluate.Judged]:
    """Checkpoints of honest runs, each judged by client 0 against the round before."""
    settings: list[tuple[fl.Protocol, int, bool]] = [  # examples a client, of one class only?
        (fl.FedAVG(epochs=1, batch_size=8, lr=0.05, shuffle=True), 32, False),
        (fl.FedAVG(epochs=3, batch_size=4, lr=0.05, momentum=0.5), 8, True),
        (fl.FedSGD(lr=0.1), 16, False),
    ]
    for name, build in ARCHITECTURES.items():
        for number, (protocol, count, skewed) in enumerate(settings):
            run = 10 * number + seed
            box = box_of(run)
            own = [batch_of(images, 50 * run + c, count, skewed=skewed) for c in range(4)]
            before, *models_ = honest(build(100 + seed), own, protocol, box, run, max(ROUNDS))
            history = [dynamics(before, own[0], box=box)]
            for round_, now in enumerate(models_, 1):
                if round_ in ROUNDS:
                    yield evaluate.judge(
                        f"{name}/run {run}", name, now, batch=own[0], box=box, reference=before,
                        previous=before, others=[fl.model_state(now)], history=history,
                    )  # fmt: skip
                before = now
                history.append(dynamics(before, own[0], box=box))


HONEST = {"initialisations": initialisations, "checkpoints": checkpoints}


def honest(
    model: nn.Module, own: Sequence[ImageSet], protocol: fl.Protocol, box: Box, seed: int, last: int
) -> Iterator[nn.Module]:
    """The global model before the first round and after each."""
    clients = {c: fl.Client(box.normalize(s.images), s.labels) for c, s in enumerate(own)}
    federation = fl.Federation(model, clients, protocol, seed=seed)
    yield fl.load_into(federation.model, fl.model_state(federation.model))
    for _ in range(last):
        federation.play_round(apply=True)
        yield fl.load_into(federation.model, fl.model_state(federation.model))


# -- tampered models -------------------------------------------------------------------------------


def tampered(
    key: str, cls: type[ActiveAttack], images: ImageSet, public: ImageSet, seed: int
) -> Iterator[evaluate.Judged]:
    """The last model that a row sends to client 0, on every architecture that it can tamper with.

    Default strength; judged with that client's batch and update. Odd seeds start from weights that
    were trained honestly for some rounds.
    """
    attack = replace(cls.tuned(), **REDUCED[key]) if key in REDUCED else cls()
    # MANDRAKE's single local step is a gradient, which survives float32; LOKI is made for deltas.
    fedavg = key == "loki"
    fedsgd = fl.FedSGD(mode="train" if key == "seer" else "eval")
    box = box_of(seed // 2)
    for name in ONLY_ON.get(key, tuple(ARCHITECTURES)):
        model = ARCHITECTURES[name](seed)
        own = [batch_of(images, 7000 + 50 * seed + c, 32, skewed=False) for c in range(4)]
        protocol = fl.FedAVG(batch_size=8, lr=0.05)
        earlier = list(honest(model, own, protocol, box, seed, 4)) if seed % 2 else []
        model = earlier[-1] if earlier else model
        scenario = fl.Scenario(
            model=fl.ModelRef("object", name),
            letter="H" if attack.needs & Knowledge.SELECTION else "G",
            examples=16,
            clients=4,
            protocol=fl.FedAVG(batch_size=16, lr=0.01) if fedavg else fedsgd,
            vantage=Vantage.AGGREGATE if fedavg else Vantage.SERVER,
            seed=seed,
        )
        victims = batch_of(images, 1000 + seed, 16 * 4, skewed=False)
        played = fl.stage(scenario, model=model, victims=victims, surrogate=public, box=box)
        try:
            _, records = harness.observe(played, attack, seed=seed)
        except (UnsupportedModel, InvalidInput):
            continue  # counted: nothing was played on this architecture
        last, client = records[-1], played.federation.clients[0]
        yield evaluate.judge(
            f"{name}/{seed}", name, last.received[0],
            batch=(client.x, client.y), box=box, reference=model,
            previous=model if earlier else None, update=last.updates[0],
            history=[dynamics(one, (client.x, client.y)) for one in earlier],
            # Whom the server asks alone can still look into a log of what was announced.
            others=[last.states[c] for c in last.states if c != 0] or [fl.model_state(model)],
        )  # fmt: skip
