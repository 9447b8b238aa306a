"""The live objects of a cell: images, network, federation, attack."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from leakatlas import data, models, reading
from leakatlas.attacks.api import Attack
from leakatlas.bench.cells import Cell
from leakatlas.bench.schema import REHEARSED, Case, Images, Pixels, Training
from leakatlas.catalogue import registry
from leakatlas.data import CIFAR10, Box, ImageSet, patches
from leakatlas.errors import InvalidInput, Unavailable, UnknownName
from leakatlas.fl import ModelRef, Protocol, Scenario, Stage, stage, state_hash, stream, task_loss
from leakatlas.fl.state import load_into, model_state
from leakatlas.fl.view import defense_from_json, protocol_from_json
from leakatlas.threat import Grant, Vantage

PUBLIC = 64
"""Public images for the null baselines where a case names no surrogate."""


def staged(cell: Cell, *, decoy: bool = False) -> Stage:
    """The federation of a cell, before any round.

    Args:
        cell: Which.
        decoy: With other images under the same labels, for the null baseline.

    Raises:
        LeakAtlasError: If a name, file, parameter or combination does not exist or fit.
    """
    case = cell.case
    chosen = victims(cell, decoy=decoy)
    public = None if case.surrogate is None else images(case.surrogate, cell.data)
    reference, model = network(cell)
    box = pixel_space(case, chosen.channels)
    scenario = Scenario(
        model=reference,
        data=f"{case.victims.set}#{chosen.fingerprint()[:12]}",
        surrogate=None
        if public is None or case.surrogate is None
        else f"{case.surrogate.set}#{public.fingerprint()[:12]}",
        examples=case.batch,
        clients=case.clients,
        protocol=protocol(case),
        defenses=tuple(defense_from_json(defense) for defense in case.defenses),
        letter=case.letter,
        vantage=Vantage(case.vantage),
        grants=frozenset(Grant.named(grant) for grant in case.grants),
        rounds=case.rounds,
        seed=cell.seed,
    )
    return stage(scenario, model=model, victims=chosen, surrogate=public, box=box)


def protocol(case: Case, **changes: Any) -> Protocol:
    """How the clients of a case train, with some settings changed."""
    return protocol_from_json({**case.protocol, **changes})


def attack_of(case: Case) -> Attack:
    """The attack of a case, preset and changes applied.

    Where an adversary rehearses, the published preset, of which only the length will stay.

    Raises:
        UnknownName: If the attack or the preset does not exist.
        InvalidParameter: If a parameter is unknown or outside its range.
    """
    assert case.attack is not None
    cls = registry.load_attack(case.attack.key)
    named = "published" if case.attack.preset == REHEARSED else case.attack.preset
    preset = presets(cls).get(named)
    if preset is None:
        raise UnknownName(f"preset of {case.attack.key}", case.attack.preset, presets(cls))
    made: Attack = preset()
    if case.attack.parameters:
        made = cls.from_json({**made.to_json(), **case.attack.parameters})
    return made


def presets(cls: type[Attack]) -> dict[str, Callable[[], Attack]]:
    """``published``, ``tuned``, and the further presets that the class itself defines."""
    own = {
        name: getattr(cls, name)
        for name, value in vars(cls).items()
        if isinstance(value, classmethod) and not name.startswith("_")
    }
    return {**own, "published": cls, "tuned": cls.tuned}


# -- images --------------------------------------------------------------------------------------


def images(spec: Images, root: Path, *, at_least: int = 0) -> ImageSet:
    """A part of a data set.

    Args:
        spec: Which.
        root: Folder that a relative path starts from.
        at_least: Of these images are needed, if the part names no count.

    Raises:
        Unavailable: If its file is not on this machine.
    """
    limit = None if spec.count is None else spec.first + spec.count
    if limit is None and at_least:
        limit = spec.first + at_least
    found = _loaded(_rebased(spec.set, root), limit)
    if len(found) <= spec.first or (spec.count and len(found) < spec.first + spec.count):
        raise InvalidInput(
            f"{spec.set}: images {spec.first} to {spec.first + (spec.count or 1) - 1} were asked "
            f"for; it holds {len(found)}."
        )
    part = found.subset(range(spec.first, len(found)))
    return part if spec.size is None else part.resize(spec.size)


@functools.lru_cache(maxsize=8)
def _loaded(spec: str, limit: int | None) -> ImageSet:
    return data.load(spec, limit=limit)


def _rebased(spec: str, root: Path) -> str:
    kind, _, rest = spec.partition(":")
    if kind not in ("parquet", "folder"):
        return spec
    bare = re.sub(r"@\d+$", "", rest)
    if not (reading.is_file(root / bare) or reading.is_folder(root / bare)):
        raise Unavailable(
            f"{spec} is not on this machine: there is no {root / bare}. Name the folder that holds "
            "it with --data or $LEAKATLAS_DATA."
        )
    return f"{kind}:{root / rest}"


def victims(cell: Cell, *, decoy: bool = False) -> ImageSet:
    """The private images of a cell, client after client; or a decoy's.

    A decoy has the labels of the victims, image by image, and none of their images. It is taken
    from what follows the victims in the set, and then from its start.
    """
    case = cell.case
    size = case.batch * case.clients
    begin = cell.batch * size
    plain = case.choose == "in order" and case.classes_a_client is None and not decoy
    pool = images(case.victims, cell.data, at_least=begin + size if plain else 0)
    order = list(range(len(pool)))
    if case.choose == "one class":
        order = [i for i in order if int(pool.labels[i]) == case.label]
    if case.classes_a_client is not None:
        chosen = _own_classes(
            pool.labels, case.batch, cell.batch, case.clients, case.classes_a_client
        )
    elif case.choose == "distinct labels":
        chosen = _distinct(pool.labels, case.batch, cell.batch * case.clients, case.clients)
    else:
        chosen = order[begin : begin + size]
    if len(chosen) < size:
        raise InvalidInput(
            f"{cell.study}, case {cell.label}: batch {cell.batch} takes {size} images "
            f"({case.choose}) of {case.victims.set!r}, which has too few ({len(order)})."
        )
    if decoy:
        chosen = _decoys(pool.labels, chosen)
    return pool.subset(chosen)


def _distinct(labels: Tensor, batch: int, skip: int, count: int) -> list[int]:
    """``count`` batches of distinct labels after the first ``skip``, in file order, disjoint."""
    left = list(range(len(labels)))
    batches: list[list[int]] = []
    while len(batches) < skip + count:
        chosen: list[int] = []
        taken: set[int] = set()
        for index in left:
            if len(chosen) < batch and int(labels[index]) not in taken:
                chosen.append(index)
                taken.add(int(labels[index]))
        if len(chosen) < batch:
            break
        used = set(chosen)
        left = [index for index in left if index not in used]
        batches.append(chosen)
    return [index for chosen in batches[skip:] for index in chosen]


def _own_classes(labels: Tensor, batch: int, skip: int, clients: int, each: int) -> list[int]:
    """The batch number ``skip`` of every client, in file order, from classes of its own.

    Classes go round with the number of the batch, so that the target's are others every time.
    """
    chosen: list[int] = []
    for client in range(clients):
        first = (client + skip) % clients * each
        mine = torch.isin(labels, torch.arange(first, first + each))
        chosen += mine.nonzero().flatten()[skip * batch : (skip + 1) * batch].tolist()
    return chosen


def _decoys(labels: Tensor, chosen: list[int]) -> list[int]:
    own = set(chosen)
    start = max(chosen) + 1
    order = [*range(start, len(labels)), *range(start)]
    decoys = []
    for index in chosen:
        label = int(labels[index])
        other = next((i for i in order if i not in own and int(labels[i]) == label), None)
        if other is None:
            raise InvalidInput(
                f"No decoy: the set holds no other image of class {label} for the control."
            )
        own.add(other)
        decoys.append(other)
    return decoys


def public_images(stage: Stage) -> tuple[Tensor, Tensor | None]:
    """Public images in the victims' shape and their labels, for the null baselines."""
    if stage.surrogate is not None:
        return stage.surrogate.images, stage.surrogate.labels
    channels, height, width = stage.input_shape
    found = patches(max(height, width), PUBLIC, part="surrogate").images[:, :, :height, :width]
    if channels != 3:
        found = found.mean(1, keepdim=True).expand(-1, channels, -1, -1)
    return found, None


def pixel_space(case: Case, channels: int) -> Box:
    """The pixel space of a case."""
    if isinstance(case.pixels, Pixels):
        return Box(mean=case.pixels.mean, std=case.pixels.std)
    return CIFAR10 if case.pixels == "cifar10" else Box.unit(channels)


# -- the network ---------------------------------------------------------------------------------


def network(cell: Cell) -> tuple[ModelRef, nn.Module]:
    """How the network of a cell is described, and the network with its weights."""
    spec = cell.case.model
    kwargs = {"seed": cell.seed, **spec.kwargs}
    reference = ModelRef("builtin", spec.builtin, kwargs)
    model = reference.build()
    if spec.weights is not None:
        shipped = spec.weights in models.shipped()
        held = models.load_for(model, spec.weights if shipped else _weights(cell, spec.weights))
        model = load_into(model, held.state)
    if spec.train is not None:
        model = load_into(model, _trained(cell, spec.train, model))
    return reference, model.to(getattr(torch, spec.dtype))


def _weights(cell: Cell, name: str) -> Path:
    """A file beside the study's own Python file, else in the data folder."""
    beside = cell.data if cell.hook is None else cell.hook.parent
    return (beside if reading.is_file(beside / name) else cell.data) / name


_TRAINED: dict[str, dict[str, Tensor]] = {}
"""Weights of this process; the next cell of a case asks for the same."""


def _trained(cell: Cell, training: Training, model: nn.Module) -> dict[str, Tensor]:
    box = pixel_space(cell.case, int(next(model.parameters()).shape[1]))
    public = images(training.images, cell.data)
    start = state_hash(model_state(model))
    built = (cell.case.model.builtin, sorted(cell.case.model.kwargs.items()))  # dropout, say
    schedule = training.model_dump_json(exclude={"images"})
    key = f"{start}|{built}|{public.fingerprint()}|{box}|{schedule}"
    if key not in _TRAINED:
        x = box.normalize(public.images)
        optimizer = torch.optim.Adam(model.parameters(), lr=training.lr)
        generator = stream("study training")
        model.train()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(generator.initial_seed())  # dropout draws from the global generator
            for _ in range(training.epochs):
                for part in torch.randperm(len(x), generator=generator).split(training.batch_size):
                    optimizer.zero_grad()
                    task_loss(model(x[part]), public.labels[part]).backward()
                    optimizer.step()
        _TRAINED[key] = model_state(model)
    return _TRAINED[key]


def settings(case: Case) -> dict[str, Any]:
    """A case in few words, for tables."""
    return {
        "model": case.model.builtin,
        "weights": case.model.weights or ("trained" if case.model.train else "fresh"),
        "data": case.victims.set,
        "batch": case.batch,
        "clients": case.clients,
        "protocol": str(case.protocol.get("algorithm", "fedsgd")),
        "defenses": [str(d.get("key")) for d in case.defenses],
        "attack": None if case.attack is None else case.attack.key,
        "letter": case.letter,
        "vantage": case.vantage,
        "grants": list(case.grants),
    }
