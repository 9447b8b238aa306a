"""The audit's YAML file: every key checked, every mistake named with its place and a way out."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PositiveFloat,
    StrictInt,
    StrictStr,
    ValidationError,
)
from torch import nn

from leakatlas import data, devices, models, reading, yamlfiles
from leakatlas.audit import promises
from leakatlas.audit.plan import Plan, Setting, stand_in
from leakatlas.audit.utility import Task
from leakatlas.blocks.watch import Execution, parse_budget
from leakatlas.data import Box
from leakatlas.errors import InvalidInput, InvalidParameter, UnknownName, shown
from leakatlas.fl import ModelRef, Protocol
from leakatlas.fl.capture import Capture
from leakatlas.fl.losses import with_code
from leakatlas.fl.recording import described_by, read_recording
from leakatlas.fl.state import load_into
from leakatlas.fl.view import defense_from_json, protocol_from_json
from leakatlas.models.structure import batchnorm_layers
from leakatlas.report import Context
from leakatlas.threat import Grant, Vantage, threat_models


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class ModelConfig(_Strict):
    """Which model; exactly one of ``builtin`` and ``python``."""

    builtin: str | None = None
    """A name of ``leakatlas.models``: convnet, lenet, resnet, vit, ..."""
    python: str | None = None
    """``file.py:factory``, which is run, or ``package.module:factory``, which is run if it is a
    class of modules or its return type says that it makes one."""
    kwargs: dict[str, Any] = Field(default_factory=dict)
    """Arguments of the factory."""
    output: int | str | None = None
    """Which part of the model's output holds the logits (place, key or attribute), if it returns
    more than one tensor."""
    weights: str | None = None
    """safetensors (or plain-tensor torch) file, or the name of a shipped checkpoint."""


class DataConfig(_Strict):
    """Which images are at stake, and what is public."""

    victims: str = "photos"
    """``none`` where a capture comes without its images;
    ``photos``, ``folder:PATH@SIZE``, ``parquet:PATH``, ``torchvision:CIFAR10/test:ROOT``, ..."""
    limit: int = Field(default=4, gt=0)
    """How many victim images are used, in the order of the set."""
    surrogate: str | None = None
    """Public images of the same population, for letters D, E, G, H; no victim among them."""
    shape: tuple[int, int, int] | None = None
    """``[channels, height, width]``, with ``victims: none``."""
    channels: Literal[1, 3] | None = None
    """3 gives grey images three equal channels, 1 makes colour ones grey; the files' own if left
    out."""
    classes: tuple[StrictStr | StrictInt, ...] | dict[str, StrictInt] | None = None
    """Names of the classes in the order of their labels, or ``{name: label}``; of a folder, the
    names of its subfolders, which otherwise are the labels themselves where all are whole numbers,
    and are numbered in sorted order where they are not."""
    mean: tuple[float, ...] | None = None
    """Normalisation of the model's inputs, per channel; none if left out."""
    std: tuple[float, ...] | None = None
    """As ``mean``."""


IN_ORDER = (
    "whether the client shuffles its examples was not recorded; they are taken in order, which is "
    "more than most adversaries know: say shuffle: true under protocol if it does"
)
"""Said of a capture from a framework that does not tell."""

DROPOUT = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout)

TRAINING = (
    "whether the client computes in train mode was not recorded, and it matters for this model; "
    "train mode is taken: say mode: eval under protocol if it does not"
)
"""Said of a capture from a framework that does not tell, of a model with BN or dropout."""


class RecordedConfig(_Strict):
    """A folder that one of :mod:`leakatlas.integrations` recorded, and what of it is attacked."""

    folder: str
    """Where the captures went."""
    client: str | None = None
    """Whose; the first one's if left out."""
    place: Literal["raw", "wire", "server", "aggregate"] | None = None
    """Where it was recorded; as an adversary sees it, if left out."""
    rounds: tuple[int, ...] | None = None
    """Which, oldest first; all that are there if left out."""
    examples: int | None = Field(default=None, gt=0)
    """Behind each update, where the framework did not say it."""


class UtilityConfig(_Strict):
    """What defenses cost, measured on the model, protocol and images of the audit itself."""

    train: str | None = None
    """Training images, dealt to the clients evenly, as ``victims`` under ``data``; if left out,
    those of ``victims`` that are not under attack."""
    test: str | None = None
    """Images whose accuracy counts; a fifth of the training images if left out."""
    limit: int = Field(default=2_000, gt=0)
    """How many images of each are used."""
    clients: int = Field(default=10, gt=0)
    """How many clients train."""
    rounds: int = Field(default=20, gt=0)
    """For how many rounds, all clients in each."""
    rates: tuple[PositiveFloat, ...] = Field(default=(0.5, 0.15, 0.05), min_length=1)
    """Step sizes (``lr`` of the protocol); the best on a fifth of the training images is taken, for
    every set of defenses by itself."""


class AuditConfig(_Strict):
    """The whole file."""

    model: ModelConfig
    """Which model is attacked."""
    data: DataConfig = DataConfig()
    """Which images are at stake, and what is public."""
    protocol: dict[str, Any] = Field(default_factory=lambda: {"algorithm": "fedsgd"})
    """``algorithm: fedsgd | fedavg`` and its parameters, ``loss`` and ``shared`` among them."""
    clients: int = Field(default=1, gt=0)
    """How many clients the images are dealt to, evenly."""
    targets: tuple[int, ...] = (0,)
    """Which of them are attacked, one after the other."""
    defenses: tuple[dict[str, Any], ...] = ()
    """In force: ``- {key: clipping, max_norm: 1.0}``."""
    alternatives: dict[str, tuple[dict[str, Any], ...]] = Field(default_factory=dict)
    """Defense sets to compare with what is in force, by name."""
    threat: str = "A-H"
    """Adversaries, as letters and ranges: ``A-E``, ``B,F``."""
    vantage: Literal["wire", "server", "aggregate", "peer"] = "server"
    """Where they look."""
    grants: tuple[str, ...] = ()
    """Facts that they are given on top of their letters, such as ``labels``."""
    attacks: tuple[str, ...] | None = None
    """Keys; every implemented one if left out."""
    attack_parameters: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """Changes to the presets, by key: ``{inverting_gradients: {steps: 500}}``."""
    budget: str = "5m"
    """``30s``, ``10m``, ``1h``, or ``paper`` for the published presets without a limit."""
    seed: int = 0
    """Of everything random."""
    execution: Execution = "auto"
    """How optimisation attacks compute slopes; ``eager`` repeats long runs bit for bit."""
    rehearsal: bool = True
    """Whether the adversary first tries its attacks on public images, within the budget."""
    upper_bound: bool = True
    """Whether the strongest attacks run once more with oracles (labels, batch statistics, eval
    mode), within the budget, for the second of the two verdicts."""
    device: str = "auto"
    """Where to compute: ``auto`` (a CUDA GPU if there is one, else the CPU), ``cpu``, ``cuda``,
    ``cuda:1``, ``mps``."""
    captured: str | RecordedConfig | None = None
    """What a real client sent, attacked instead of a simulated round: a file of ``leakatlas
    capture``, or the folder that the capture of a framework wrote (``{folder: PATH, client: ID}``
    chooses from it; the protocol is completed from what was recorded)."""
    context: Context = Context()
    """What the audit is about, for the first page of the report; every key is optional."""
    utility: Literal["reference", "own"] | UtilityConfig = "reference"
    """Where the price of defenses in accuracy is measured: a small ``reference`` task, which needs
    nothing, or one's ``own`` model, protocol and images (or the keys that say which)."""
    fail_on: tuple[str, ...] = ()
    """Conditions that fail a build: ``P(psnr > 20 dB) > 0.05``."""


def read_config(path: Path | str) -> AuditConfig:
    """Read and check a YAML file.

    Raises:
        InvalidInput: If the file is missing, is not YAML, or has unknown keys or wrong values; all
            problems are named at once.
    """
    content = yamlfiles.read(path, what="configuration")
    if not isinstance(content, dict):
        raise InvalidInput(
            f"{shown(str(path))} holds {shown(content)}, expected keys such as 'model:'."
        )
    try:
        return AuditConfig.model_validate(content)
    except ValidationError as problem:
        errors = problem.errors(include_url=False)
        lines = [_explain(error) for error in errors[:MOST]]
        if len(errors) > MOST:
            lines.append(f"And {len(errors) - MOST} more.")
        raise InvalidInput(f"{path}: " + " ".join(lines)) from None


MOST = 8
"""Mistakes that are explained at once."""


def _explain(error: Any) -> str:
    place = ".".join(str(part)[:40] for part in error["loc"])
    if error["type"] == "extra_forbidden":
        parent = error["loc"][:-1]
        known = _keys_at(parent)
        close = difflib.get_close_matches(str(error["loc"][-1])[:40], known, n=1)
        hint = f" did you mean {close[0]!r}?" if close else ""
        return f"unknown key {shown(place)};{hint} known: {', '.join(known)}."
    if error["type"] == "missing":
        return f"key {place!r} is missing."
    return f"{place}: {error['msg'][:1].lower()}{error['msg'][1:]}, got {shown(error['input'])}."


def _keys_at(place: tuple[int | str, ...]) -> list[str]:
    schema: type[BaseModel] = AuditConfig
    for part in place:
        if part == "model":
            schema = ModelConfig
        elif part == "data":
            schema = DataConfig
        elif part == "utility":
            schema = UtilityConfig
        elif part == "context":
            schema = Context
    return sorted(schema.model_fields)


def as_context(values: Context | Mapping[str, Any] | None) -> Context:
    """A context from its keys; empty for None.

    Raises:
        InvalidParameter: If a key is unknown or a value does not fit.
    """
    if isinstance(values, Context):
        return values
    try:
        return Context.model_validate(values or {})
    except ValidationError as problem:
        error = problem.errors(include_url=False)[0]
        place = ".".join(str(part) for part in error["loc"])
        raise InvalidParameter(
            f"context: {shown(place)}: {error['msg'][:1].lower()}{error['msg'][1:]}; it has: "
            f"{', '.join(Context.model_fields)}."
        ) from None


def make_plan(config: AuditConfig, *, base: Path, command: str) -> Plan:
    """Turn a configuration into live objects.

    Args:
        config: The configuration.
        base: Folder that relative paths start from.
        command: Repeats the audit.

    Raises:
        LeakAtlasError: If a file, name, letter, grant or parameter does not exist or fit.
    """
    setting = make_setting(config, base=base)
    return Plan(
        settings=(setting,),
        letters=tuple(model.letter for model in threat_models(config.threat)),
        alternatives={
            name: tuple(_defense(d) for d in defenses)
            for name, defenses in config.alternatives.items()
        },
        attack_parameters=config.attack_parameters,
        seconds=parse_budget(config.budget),
        seed=config.seed,
        execution=config.execution,
        rehearsal=config.rehearsal,
        upper_bound=config.upper_bound,
        context=config.context,
        task=_task(config, setting, base),
        source=config.model_dump(mode="json"),
        command=command,
    )


def make_setting(config: AuditConfig, *, base: Path) -> Setting:
    """The one set-up that the file describes."""
    reference = _model_ref(config.model, base)
    model = reference.build(trust_code=True)  # the person who starts an audit names this file
    described: Mapping[str, Any] = config.protocol
    capture, recorded = _captured(config, model, base)
    assumed: tuple[str, ...] = ()
    if recorded is not None:
        described = recorded
        if recorded["algorithm"] == "fedavg" and "shuffle" not in recorded:
            assumed = (IN_ORDER,)
        if recorded["algorithm"] == "fedavg" and "mode" not in recorded and _has_modes(model):
            assumed = (*assumed, TRAINING)
    known = config.data.victims != "none"
    if known and config.data.shape is not None:
        raise InvalidInput("data.shape belongs to victims: none; images bring their own shape.")
    victims = (
        _images(config, config.data.victims, base, limit=config.data.limit)
        if known
        else stand_in(capture, config.data.shape)
    )
    channels = victims.images.shape[1]
    box = Box.unit(channels)
    if config.data.mean is not None or config.data.std is not None:
        mean = config.data.mean or (0.0,) * channels
        std = config.data.std or (1.0,) * channels
        box = Box(mean=mean, std=std)
    notes: tuple[str, ...] = ()
    if config.model.weights is not None:
        name = config.model.weights
        held = models.load_for(model, name if name in models.shipped() else _rebased(name, base))
        model, notes = load_into(model, held.state), held.notes
    surrogate = config.data.surrogate
    return Setting(
        name=f"{config.model.builtin or config.model.python}, "
        f"{described.get('algorithm', 'fedsgd')}",
        model=model,
        model_ref=reference,
        victims=victims,
        protocol=_protocol(described, base),
        # A mean is of as many clients as were recorded, unless somebody says otherwise.
        clients=config.clients
        if capture is None or "clients" in config.model_fields_set
        else capture.update.clients,
        targets=config.targets,
        defenses=tuple(_defense(d) for d in config.defenses),
        box=box,
        surrogate=None if surrogate is None else _images(config, surrogate, base),
        grants=frozenset(_grant(name) for name in config.grants),
        vantage=Vantage(config.vantage),
        attacks=config.attacks,
        captured=capture,
        known=known,
        weights=config.model.weights or "",
        device=devices.chosen(config.device),
        weights_notes=(*notes, *assumed),
    )


def _task(config: AuditConfig, setting: Setting, base: Path) -> Task | None:
    """One's own federation, whose accuracy is the price of defenses; None for the reference."""
    if config.utility == "reference":
        return None
    told = UtilityConfig() if config.utility == "own" else config.utility
    behind = 0
    if told.train is None:
        behind = len(setting.victims)
        if not setting.known:
            raise InvalidInput("utility: there are no images (victims: none); name train and test.")
    spec = told.train or config.data.victims
    train = _images(config, spec, base, limit=behind + told.limit)
    rest = list(range(behind, len(train)))
    test: data.ImageSet | None = None
    if told.test is not None:
        test = _images(config, told.test, base, limit=told.limit)
    # Every fifth, so that a set sorted by class loses some of each.
    held = set(rest[::5])
    second = set(rest[2::5]) if len(told.rates) > 1 else set[int]()
    kept = [i for i in rest if not (test is None and i in held) and i not in second]
    if not kept or not rest or train.labels.ndim != 1:
        raise InvalidInput(
            f"utility: {shown(spec)} leaves {len(kept)} images to train on behind the {behind} "
            "under attack; it takes images with one label each. Name train and test."
        )
    return Task(
        name="your own model and data",
        model=setting.model,
        train=train.subset(kept),
        validation=train.subset(sorted(second)) if second else None,
        test=test or train.subset(sorted(held)),
        protocol=setting.protocol,
        clients=told.clients,
        rounds=told.rounds,
        rates=told.rates,
        box=setting.box,
    )


def _captured(
    config: AuditConfig, model: nn.Module, base: Path
) -> tuple[Capture | None, Mapping[str, Any] | None]:
    """The capture, and the protocol that a folder of exchanges and the file describe together."""
    given = config.captured
    if given is None:
        return None, None
    if isinstance(given, str):
        if not reading.is_folder(base / given):
            return Capture.load(base / given), None
        given = RecordedConfig(folder=given)
    recording = read_recording(base / given.folder, place=given.place, client=given.client)
    if given.rounds is not None:
        recording = recording.select(given.rounds)
    said = config.protocol if "protocol" in config.model_fields_set else {}
    recording = replace(recording, notes=(*recording.notes, *promises.checked(recording)))
    described = described_by(recording.last.settings, kind=recording.last.kind, given=said)
    return recording.capture(model, examples=given.examples), described


def _has_modes(model: nn.Module) -> bool:
    """Whether train and eval mode differ: batch normalisation, or dropout of any kind."""
    return bool(batchnorm_layers(model)) or any(
        isinstance(module, DROPOUT) for module in model.modules()
    )


def _images(config: AuditConfig, spec: str, base: Path, limit: int | None = None) -> data.ImageSet:
    return data.load(
        _rebased(spec, base),
        limit=limit,
        channels=config.data.channels,
        classes=config.data.classes,
    )


def _protocol(description: Mapping[str, Any], base: Path) -> Protocol:
    """The protocol; a loss in Python code is the audit's own, like its model."""
    protocol = protocol_from_json(description)
    return replace(protocol, loss=with_code(protocol.loss, base))


def _defense(description: Mapping[str, Any]) -> Any:
    return defense_from_json(description)


def _grant(name: str) -> Grant:
    try:
        return Grant(name)
    except ValueError:
        raise UnknownName("grant", name, [grant.value for grant in Grant]) from None


def _model_ref(config: ModelConfig, base: Path) -> ModelRef:
    if (config.builtin is None) == (config.python is None):
        raise InvalidInput("model: give exactly one of 'builtin' and 'python'.")
    if config.builtin is not None:
        return ModelRef("builtin", config.builtin, config.kwargs, config.output)
    assert config.python is not None
    location, _, factory = config.python.rpartition(":")
    if location.endswith(".py"):
        name = f"{_rebased(location, base)}:{factory}"
        return ModelRef("python", name, config.kwargs, config.output)
    return ModelRef("python", config.python, config.kwargs, config.output)


def _rebased(spec: str, base: Path) -> str:
    """A path, or a ``kind:path`` data set, with its path taken relative to ``base``."""
    kind, colon, rest = spec.partition(":")
    if colon and kind in ("parquet", "folder"):
        path, at, size = rest.partition("@")
        return f"{kind}:{base / path}{at}{size}"
    if colon and kind == "torchvision":
        name, _, root = rest.partition(":")
        return f"{kind}:{name}:{base / root}"
    if colon or spec in ("photos", "patches", "digits", "faces"):
        return spec
    return str(base / spec)
