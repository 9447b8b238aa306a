"""What each defense of the stress set costs and what it stops: privacy and utility, side by side.

``python benchmarks/defenses.py`` writes ``results/defenses/<key>.json`` for every defense.

Utility: eight clients train one small network on scikit-learn's digits by FedSGD; test accuracy of
the models that clients predict with. Privacy: at initialisation, one held-out digit for each of
four clients, attacked by gradient matching that ignores the defense (oblivious), by the same
attack with the defense in its replay or around it (adaptive), and, on a fully connected network,
by the closed-form ratio of weight rows to bias entries. The control is plain Gaussian noise of the
same relative error, attacked obliviously: a defense that does not beat it is no better than noise.
"""

from __future__ import annotations

import argparse
import functools
import json
import shlex
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from leakatlas import data, models
from leakatlas.attacks.optimization.basic.inverting_gradients import InvertingGradients
from leakatlas.blocks import descent, init, matching, priors
from leakatlas.blocks.watch import Watch
from leakatlas.catalogue import registry
from leakatlas.data import Box, ImageSet
from leakatlas.defenses.heuristic.model.fedkl import merged
from leakatlas.defenses.heuristic.model.precode import PRECODE, Bottleneck
from leakatlas.errors import LeakAtlasError
from leakatlas.fl import (
    Client,
    ClientContext,
    Defense,
    Federation,
    FedSGD,
    ModelRef,
    Scenario,
    Stage,
    Update,
    View,
    stage,
    stream,
)
from leakatlas.fl import replay as replays
from leakatlas.metrics.assignment import assign, pairwise_mse
from leakatlas.metrics.images import psnr_of_mse
from leakatlas.metrics.intervals import bootstrap
from leakatlas.threat import Grant, Vantage

INF = float("inf")
KNOBS: dict[str, tuple[float, ...]] = {
    "central_dp": (0.0, 0.1, 1.0),
    "client_dp": (0.0, 0.1, 1.0),
    "secure_aggregation": (0.0, 2 / 3),
    "gradient_pruning": (0.0, 0.8, 0.95),
    "clipping": (INF, 1.0, 0.1),
    "soteria": (0.0, 0.4, 0.8),
    "vicinal_augmentation": (0.0, 0.5, 1.0),
    "precode": (0.0, 0.5, 1.0),
    "fedkl": (0.0, 0.5, 1.0),
}
"""Values of each defense's knob, the neutral one first."""

AGGREGATE = frozenset({"central_dp", "secure_aggregation"})
"""Rows that act between server and aggregate; they are attacked at the vantage they protect."""

RATES: dict[str, tuple[float, ...]] = {"soteria": (0.5,)}
"""Server step sizes tried for a defense; clipping, noise and added layers change the right one.

Soteria leaves the step of every other layer as it is, and one of its runs costs a minute.
"""

TRIED = (0.5, 0.15)

CLIENTS, EXAMPLES, TEST, VICTIMS = 8, 40, 300, 4
SUCCESS = 19.0  # dB; the threshold of the published evaluations
EXACT = 1e-4  # relative error of an exact read-out


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
        factor = self.ratio * norm(update.tensors) / norm(noise)
        return update.with_tensors({n: t + factor * noise[n] for n, t in update.tensors.items()})


@dataclass(frozen=True, eq=False)
class Settings:
    """What one call of the benchmark runs.

    Args:
        images: The data set.
        seeds: Seeds of networks, noise and attacks.
        rounds: Rounds of training.
        steps: Iterations of an attack.
    """

    images: ImageSet
    seeds: tuple[int, ...]
    rounds: int
    steps: int

    def network(self, seed: int) -> nn.Module:
        """The network that is trained and attacked: two convolutions, GroupNorm, SiLU, a head."""
        side = -(-self.images.size // 2)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            return nn.Sequential(
                nn.Conv2d(self.images.channels, 12, 5, stride=2, padding=2),
                nn.GroupNorm(4, 12),
                nn.SiLU(),
                nn.Conv2d(12, 24, 3, padding=1),
                nn.GroupNorm(4, 24),
                nn.SiLU(),
                nn.Flatten(),
                nn.Linear(24 * side * side, len(self.images.classes)),
            )

    @property
    def box(self) -> Box:
        """A pixel space centred on the data."""
        channels = self.images.channels
        return Box(mean=(0.5,) * channels, std=(0.5,) * channels)

    def split(self) -> tuple[ImageSet, ImageSet, ImageSet, ImageSet]:
        """Training, validation, test and victim images, the same for every seed and defense."""
        order = torch.randperm(len(self.images), generator=stream("defense benchmark split"))
        sizes = (CLIENTS * EXAMPLES, TEST, TEST, VICTIMS)
        train, validation, test, victims = (
            self.images.subset(part) for part in order[: sum(sizes)].split(sizes)
        )
        return train, validation, test, victims


def norm(tensors: Mapping[str, Tensor]) -> Tensor:
    """Euclidean norm of all tensors together."""
    total: Tensor = torch.linalg.vector_norm(torch.cat([t.flatten() for t in tensors.values()]))
    return total


# -- utility -------------------------------------------------------------------------------------


def utility(
    settings: Settings, defense: Defense | None, seed: int, rates: tuple[float, ...] = TRIED
) -> tuple[float, float, float]:
    """Test accuracy at the step size that validates best, that step size, seconds per round."""
    _, validation, test, _ = settings.split()
    best = (-1.0, 0.0, 0.0, 0.0)
    for lr in rates:
        federation, seconds = trained(settings, defense, seed, lr)
        here = accuracy(settings, federation, validation, seed)
        if here > best[0]:
            best = (here, accuracy(settings, federation, test, seed), lr, seconds)
    return best[1:]


def trained(
    settings: Settings, defense: Defense | None, seed: int, lr: float
) -> tuple[Federation, float]:
    """A federation after all rounds, and seconds per round."""
    train = settings.split()[0]
    parts = [train.subset(range(k * EXAMPLES, (k + 1) * EXAMPLES)) for k in range(CLIENTS)]
    clients = {
        k: Client(settings.box.normalize(part.images), part.labels) for k, part in enumerate(parts)
    }
    protocol = FedSGD(lr=lr, mode="train")
    defenses = () if defense is None else (defense,)
    federation = Federation(settings.network(seed), clients, protocol, defenses, seed=seed)
    begun = time.perf_counter()
    for _ in range(settings.rounds):
        federation.play_round(apply=True)
    return federation, (time.perf_counter() - begun) / settings.rounds


def accuracy(settings: Settings, federation: Federation, images: ImageSet, seed: int) -> float:
    """Share of right predictions, over two clients: private parts differ between them."""
    x = settings.box.normalize(images.images)
    right = []
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        for client in (0, 1):
            logits = federation.evaluation_model(client)(x)
            right.append((logits.argmax(1) == images.labels).double().mean())
    return float(torch.stack(right).mean())


# -- privacy -------------------------------------------------------------------------------------


def victims_on_stage(
    settings: Settings,
    defense: Defense | None,
    seed: int,
    *,
    letter: str,
    vantage: Vantage,
    network: nn.Module,
) -> Stage:
    """A few clients with one image each, at the first round."""
    labels_known = vantage is Vantage.SERVER
    scenario = Scenario(
        model=ModelRef("object", "benchmark network"),
        clients=VICTIMS,
        protocol=FedSGD(mode="train"),
        defenses=() if defense is None else (defense,),
        letter=letter,
        vantage=vantage,
        grants=frozenset({Grant.LABELS}) if labels_known else frozenset(),
        seed=seed,
    )
    return stage(
        scenario,
        model=network,
        victims=settings.split()[3],
        box=settings.box,
    )


def views(played: Stage, vantage: Vantage) -> list[View]:
    """What the adversary holds: one view for each victim, or one of all at the aggregate."""
    record = played.federation.play_round()
    targets = range(VICTIMS) if vantage is Vantage.SERVER else [0]
    return [played.view([record], target=target) for target in targets]


Invert = Callable[[View, int], Tensor]
"""``(view, seed) -> candidates`` in the model's input space."""


def matching_attack(steps: int) -> Invert:
    """Gradient matching; it simulates the defenses that its view tells it of."""
    attack = InvertingGradients.tuned(steps=steps)
    return lambda view, seed: attack(view, seed=seed).images


def joint_attack(
    view: View,
    seed: int,
    steps: int,
    extra: Mapping[str, Tensor],
    replay: Callable[[Tensor, Mapping[str, Tensor]], Mapping[str, Tensor]],
) -> Tensor:
    """The same attack on the image and on the defense's secret together."""
    g = dict(view.update.tensors)
    like = next(iter(g.values()))

    def objective(variables: Mapping[str, Tensor], t: Tensor) -> descent.Value:
        del t
        x = variables["x"]
        secret = {name: t for name, t in variables.items() if name != "x"}
        match = matching.relative_l2(replay(x, secret), g)
        return descent.Value(match + 1e-4 * priors.tv_mean(x), match)

    def optimizer(leaves: dict[str, Tensor]) -> torch.optim.SGD:
        secrets = [leaf for name, leaf in leaves.items() if name != "x"]
        return torch.optim.SGD(
            [{"params": [leaves["x"]], "lr": 0.1}, {"params": secrets, "lr": 0.05}]
        )

    found = descent.descend(
        objective,
        {"x": init.normal(view.batch_shape, generator=stream("joint", seed), like=like), **extra},
        optimizer=optimizer,
        steps=steps,
        watch=Watch(),
        schedule=descent.cosine_decay(),
        transform=descent.signed,
        after=(descent.inside(view.box, "x"),),
    )
    return found.best["x"]


def fit_noise(view: View, seed: int, steps: int) -> Tensor:
    """Against PRECODE: optimise the draws of the bottleneck together with the image."""
    model = view.model
    (defense,) = view.defenses
    (bottleneck,) = (m for m in model.modules() if isinstance(m, Bottleneck))
    parameters = {n: p.detach() for n, p in model.named_parameters()}
    buffers = dict(model.named_buffers())
    y = view.labels
    loss_of = nn.functional.cross_entropy

    def replay(x: Tensor, secret: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        bottleneck.noise = secret["noise"]
        return replays.gradient(
            model, parameters, buffers, x, y,
            loss=lambda logits, target: defense.simulate_loss(loss_of(logits, target), model),
        )  # fmt: skip

    assert isinstance(defense, PRECODE)
    start = {"noise": torch.zeros(view.num_examples, defense.latent)}
    return joint_attack(view, seed, steps, start, replay)


def fit_locks(view: View, seed: int, steps: int) -> Tensor:
    """Against FedKL: optimise scale and shift of every locked layer together with the image."""
    locked = view.model
    plain = merged(locked)
    parameters = {n: p.detach() for n, p in plain.named_parameters()}
    shared = set(view.update.tensors)
    start = {n.replace(".", "/"): p for n, p in parameters.items() if n not in shared}
    # Half the channels are expected to be alive; no guess is better than the mean of the locks.
    start = {n: torch.full_like(p, 0.25 if n.endswith("weight") else 0.1) for n, p in start.items()}
    buffers = dict(plain.named_buffers())
    y = view.labels

    def replay(x: Tensor, secret: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        held = {**parameters, **{n.replace("/", "."): t for n, t in secret.items()}}
        found = replays.gradient(plain, held, buffers, x, y)
        return {name: found[name] for name in view.update.tensors}

    return joint_attack(view, seed, steps, start, replay)


ADAPTIVE: dict[str, Callable[[View, int, int], Tensor]] = {
    "precode": fit_noise,
    "fedkl": fit_locks,
}
"""Attacks around a defense whose mirror alone does not undo it; for the others, the replay."""


def scores(settings: Settings, seen: list[View], invert: Invert, seed: int) -> list[float]:
    """PSNR of every victim in dB, by the best one-to-one assignment; a failure counts as 0."""
    truth = settings.split()[3].images
    found: list[float] = []
    for index, view in enumerate(seen):
        originals = truth[index : index + 1] if len(seen) > 1 else truth
        try:
            candidates = invert(view, seed)
        except LeakAtlasError as problem:
            print(f"    attack refused: {problem}", file=sys.stderr)
            found += [0.0] * len(originals)
            continue
        images = settings.box.denormalize(candidates).clamp(0, 1)
        errors = pairwise_mse(images, originals)
        for column, row in enumerate(assign(errors).of_original):
            found.append(0.0 if row is None else float(psnr_of_mse(errors[row, column])))
    return found


def ledger(plain: View, defended: View) -> tuple[float, float, float] | None:
    """Relative error, cosine and norm ratio of an upload; None if the tensors differ in name."""
    a, b = dict(defended.update.tensors), dict(plain.update.tensors)
    if a.keys() != b.keys():
        return None
    u = torch.cat([a[n].flatten() for n in b])
    v = torch.cat([t.flatten() for t in b.values()])
    cosine = torch.cosine_similarity(u, v, dim=0)
    return float((u - v).norm() / v.norm()), float(cosine), float(u.norm() / v.norm())


def readout(settings: Settings, defense: Defense | None, seed: int) -> float | None:
    """Share of victims that the ratio gives exactly; None if the network cannot be defended."""
    network = models.build(
        "fc",
        in_channels=settings.images.channels,
        size=settings.images.size,
        classes=len(settings.images.classes),
        widths=(64, 32),
        seed=seed,
    ).double()
    try:
        played = victims_on_stage(
            settings, defense, seed, letter="B", vantage=Vantage.SERVER, network=network
        )
    except LeakAtlasError:
        return None
    record = played.federation.play_round()
    exact = 0
    for target, client in played.federation.clients.items():
        view = played.view([record], target=target)
        if view.rounds[-1].update is None:
            return 0.0
        g = view.update.tensors
        weight, bias = g["hidden.1.weight"], g["hidden.1.bias"]
        if not bool((bias != 0).any()):
            continue
        row = int(bias.abs().argmax())
        x = client.x.flatten()
        exact += int(float((weight[row] / bias[row] - x).norm() / x.norm()) < EXACT)
    return exact / VICTIMS


@functools.cache
def undefended(settings: Settings, vantage: Vantage, seed: int) -> dict[str, tuple[float, ...]]:
    """The neutral knob of every row, measured once: it sends the undefended upload bitwise."""
    reached, lr, seconds = utility(settings, None, seed)
    played = victims_on_stage(
        settings, None, seed, letter="B", vantage=vantage, network=settings.network(seed)
    )
    invert = matching_attack(settings.steps)
    return {
        "accuracy": (reached,),
        "lr": (lr,),
        "round": (seconds,),
        "readout": (readout(settings, None, seed) or 0.0,),
        "oblivious": tuple(scores(settings, views(played, vantage), invert, seed)),
    }


# -- one defense ---------------------------------------------------------------------------------


def measure(
    name: str,
    values: list[float],
    unit: str,
    note: str = "",
    *,
    interval: bool = True,
    letter: str | None = None,
    vantage: Vantage | None = None,
) -> dict[str, Any]:
    """One entry of a result file."""
    sample = torch.tensor(values, dtype=torch.float64)
    bounds = bootstrap(sample, generator=stream("interval", name)) if interval else None
    entry: dict[str, Any] = {
        "name": name,
        "value": round(float(sample.mean()), 4),
        "unit": unit,
        "interval": None if bounds is None else [round(bounds.low, 4), round(bounds.high, 4)],
        "n": len(values),
        "note": note,
    }
    if letter is not None and vantage is not None:
        entry |= {"letter": letter, "vantage": vantage.value}
    return entry


def benchmark(settings: Settings, key: str) -> dict[str, Any]:
    """Every measure of one defense."""
    cls = registry.load_defense(key)
    vantage = Vantage.AGGREGATE if key in AGGREGATE else Vantage.SERVER
    invert = matching_attack(settings.steps)

    def at(defense: Defense | None, seed: int, letter: str) -> list[View]:
        played = victims_on_stage(
            settings, defense, seed,
            letter=letter, vantage=vantage, network=settings.network(seed),
        )  # fmt: skip
        return views(played, vantage)

    measures: list[dict[str, Any]] = []
    published = getattr(cls(), cls.knob)
    shown = published if published in KNOBS[key] else KNOBS[key][-1]
    for value in KNOBS[key]:
        defense: Defense = cls(**{cls.knob: value})
        where = f"{cls.knob}={value:.3g}"
        neutral = value == cls.neutral
        found: dict[str, list[float]] = {}

        def add(name: str, values: list[float], found: dict[str, list[float]] = found) -> None:
            found.setdefault(name, []).extend(values)

        for seed in settings.seeds:
            if neutral:
                for name, values in undefended(settings, vantage, seed).items():
                    add(name, list(values))
                continue
            reached, lr, seconds = utility(settings, defense, seed, RATES.get(key, TRIED))
            add("accuracy", [reached])
            add("lr", [lr])
            add("round", [seconds])
            share = readout(settings, defense, seed)
            if share is not None:
                add("readout", [share])
            seen = at(defense, seed, "B")
            add("oblivious", scores(settings, seen, invert, seed))
            around = ADAPTIVE.get(key)
            informed = (
                invert
                if around is None
                else lambda view, s, attack=around: attack(view, s, settings.steps)
            )
            add("adaptive", scores(settings, at(defense, seed, "C"), informed, seed))
            facts = [
                entry
                for a, b in zip(at(None, seed, "B"), seen, strict=True)
                if (entry := ledger(a, b)) is not None
            ]
            if facts:
                columns = zip(*facts, strict=True)
                for name, values in zip(("error", "cosine", "size"), columns, strict=True):
                    add(name, list(values))
                ratio = sum(entry[0] for entry in facts) / len(facts)
                control = at(EqualNoise(ratio=ratio), seed, "B")
                add("control", scores(settings, control, invert, seed))
        measures += summary(found, where, vantage, representative=value == shown)
        print(f"{key} {where}: " + ", ".join(
            f"{m['name'].split(' [')[0]} {m['value']}" for m in measures if where in m["name"]
        ), file=sys.stderr)  # fmt: skip
    return {
        "schema": "leakatlas/result/1",
        "kind": "defense",
        "key": key,
        "code_version": cls.version,
        "recipe": {
            "defense": {"key": key, **cls().to_json()},
            "knob": cls.knob,
            "neutral": str(cls.neutral),
            "data": settings.images.name,
            "model": "conv 12 (5x5, stride 2), conv 24 (3x3), group normalisation, silu, one "
            "linear layer; read-out: fc, widths 64 and 32",
            "utility": {
                "clients": CLIENTS,
                "examples": EXAMPLES,
                "test": TEST,
                "algorithm": "fedsgd",
                "rounds": settings.rounds,
                "lr_tried": list(RATES.get(key, TRIED)),
                "validation": TEST,
            },
            "privacy": {
                "victims": VICTIMS,
                "batch": 1,
                "snapshot": "initialisation",
                "vantage": vantage.value,
                "attack": {
                    "key": "inverting_gradients",
                    "preset": "tuned",
                    "steps": settings.steps,
                },
                "labels": "granted" if vantage is Vantage.SERVER else "recovered",
                "success_psnr_db": SUCCESS,
            },
        },
        "hardware": "2 CPU cores, no GPU",
        "seeds": list(settings.seeds),
        "measures": measures,
        "command": shlex.join(["python", "benchmarks/defenses.py", *sys.argv[1:]]),
        "date": "2026-11-22",
    }


NAMES: dict[str, tuple[str, str, str]] = {
    "accuracy": ("test accuracy", "share", "mean over seeds of the last round's models"),
    "lr": ("step size chosen on validation images", "1", "mean over seeds"),
    "round": ("seconds per round", "s", "all clients, one thread"),
    "oblivious": (
        "PSNR, oblivious attack",
        "dB",
        "ignores the defense; relative L2, not scale-free; failures count as 0",
    ),
    "adaptive": ("PSNR, adaptive attack", "dB", "knows the mechanism; failures count as 0"),
    "control": ("PSNR, oblivious attack on equal noise", "dB", "same relative error of the upload"),
    "readout": ("exact by ratio read-out", "share", "fully connected first layer, batch of 1"),
    "error": ("relative error of the upload", "1", ""),
    "cosine": ("cosine with the undefended upload", "1", ""),
    "size": ("norm over the undefended norm", "1", ""),
}


LETTER = {"oblivious": "B", "adaptive": "C"}
"""The threat model whose knowledge an attack uses."""


def summary(
    found: Mapping[str, list[float]], where: str, vantage: Vantage, *, representative: bool
) -> list[dict[str, Any]]:
    """The measures at one knob value; at the representative one, the success rate of letter C."""
    measures = []
    for name, (title, unit, note) in NAMES.items():
        if name in found:
            steady = name in ("accuracy", "lr", "round", "readout")  # one value a seed
            measures.append(
                measure(
                    f"{title} [{where}]",
                    found[name],
                    unit,
                    note,
                    interval=not steady,
                    letter=LETTER.get(name),
                    vantage=vantage,
                )
            )
    attacks = {LETTER[name]: found[name] for name in LETTER if name in found}
    worst = [max(values) for values in zip(*attacks.values(), strict=True)]
    title = f"PSNR, worst attack per victim [{where}]"
    measures.append(measure(title, worst, "dB", f"vantage {vantage.value}"))
    hits = [float(value >= SUCCESS) for value in worst]
    measures.append(
        measure(f"victims recovered at {SUCCESS:.0f} dB [{where}]", hits, "share", "worst attack")
    )
    if representative:
        # None for B: its strongest attack would have to be scale-free and mask what is zero.
        note = f"PSNR of {SUCCESS:.0f} dB, {where}, batch of 1, first round"
        measures.append(measure("success_rate", hits, "share", note, letter="C", vantage=vantage))
    return measures


def write(result: Mapping[str, Any], folder: Path) -> None:
    """One file a defense, one line a measure."""
    folder.mkdir(parents=True, exist_ok=True)
    head = json.dumps({k: v for k, v in result.items() if k != "measures"}, indent=1)[:-2]
    lines = ",\n".join("  " + json.dumps(m, allow_nan=False) for m in result["measures"])
    text = f'{head},\n "measures": [\n{lines}\n ]\n}}\n'
    (folder / f"{result['key']}.json").write_text(text, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--keys", nargs="*", default=list(KNOBS), choices=list(KNOBS))
    parser.add_argument("--data", default="digits", help="digits, or parquet:PATH[@SIZE]")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--out", type=Path, default=Path("results/defenses"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    settings = Settings(
        data.load(options.data), tuple(options.seeds), options.rounds, options.steps
    )
    for key in options.keys:
        write(benchmark(settings, key), options.out)


if __name__ == "__main__":
    main()
