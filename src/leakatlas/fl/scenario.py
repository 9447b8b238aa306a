"""A whole set-up in one serializable object, and the stage on which it is played."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor, nn

from leakatlas import data, models
from leakatlas.data import Box, ImageSet
from leakatlas.devices import CPU
from leakatlas.errors import InvalidInput, InvalidParameter, shown
from leakatlas.fl import state
from leakatlas.fl.capture import Capture, Replayed
from leakatlas.fl.hooks import Defense
from leakatlas.fl.intake import outline, take_in, trained_output
from leakatlas.fl.losses import Loss
from leakatlas.fl.protocol import FedSGD, Mode, Protocol
from leakatlas.fl.rounds import Client, Federation, RoundRecord
from leakatlas.fl.seeding import stream
from leakatlas.fl.state import ModelRef
from leakatlas.fl.statistics import batchnorm_statistics
from leakatlas.fl.tampering import agreed_part
from leakatlas.fl.update import Update
from leakatlas.fl.view import (
    SOURCES,
    Distribution,
    RoundView,
    View,
    defense_from_json,
    defense_json,
    protocol_from_json,
    protocol_json,
)
from leakatlas.models.structure import in_mode
from leakatlas.threat import Grant, Knowledge, Vantage, threat_model

POPULATION = 2_000
"""Images of a data set that its statistics are taken from, at most."""


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """Model + data + protocol + defenses + adversary + seed.

    Args:
        model: The architecture.
        weights: Shipped checkpoint name or safetensors path; the architecture's own
            initialisation if None.
        data: Data set of the victims, as :func:`leakatlas.data.load` names it.
        surrogate: Data set that letters with SURROGATE hold; disjoint from the victims.
        examples: Examples per client N.
        clients: Number of clients.
        distinct_labels: Whether a client's labels are all different, as some rows assume.
        protocol: The learning algorithm.
        defenses: In any order.
        letter: Threat model A-H.
        vantage: Where the adversary looks.
        grants: Extra facts.
        rounds: Honest rounds that a passive adversary watches.
        seed: Of data, training and noise.
    """

    model: ModelRef
    weights: str | None = None
    data: str = "photos"
    surrogate: str | None = None
    examples: int = 1
    clients: int = 1
    distinct_labels: bool = False
    protocol: Protocol = field(default_factory=FedSGD)
    defenses: tuple[Defense, ...] = ()
    letter: str = "B"
    vantage: Vantage = Vantage.SERVER
    grants: frozenset[Grant] = frozenset()
    rounds: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        threat_model(self.letter)
        for name in ("examples", "clients", "rounds"):
            if getattr(self, name) < 1:
                raise InvalidParameter(
                    f"Scenario({name}={getattr(self, name)}): expected at least 1."
                )

    def to_json(self) -> dict[str, Any]:
        """The scenario as plain JSON values."""
        return {
            "model": self.model.to_json(),
            "weights": self.weights,
            "data": self.data,
            "surrogate": self.surrogate,
            "examples": self.examples,
            "clients": self.clients,
            "distinct_labels": self.distinct_labels,
            "protocol": protocol_json(self.protocol),
            "defenses": [defense_json(defense) for defense in self.defenses],
            "letter": self.letter,
            "vantage": self.vantage.value,
            "grants": sorted(grant.value for grant in self.grants),
            "rounds": self.rounds,
            "seed": self.seed,
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Scenario:
        """The scenario whose :meth:`to_json` is ``values``.

        Raises:
            InvalidParameter: If a key is unknown or a value is outside its range.
            UnknownName: If a defense, letter, grant or algorithm does not exist.
        """
        known = set(cls.__dataclass_fields__)
        if not isinstance(values, Mapping):
            raise InvalidParameter(f"A scenario is described by names; got {shown(values)}.")
        unknown = [name for name in values if name not in known]
        if unknown:
            raise InvalidParameter(
                f"A scenario has no key {shown(unknown[0])}; it has: {', '.join(sorted(known))}."
            )
        if "model" not in values:
            raise InvalidParameter("A scenario needs the key 'model'.")
        for name, value in values.items():
            try:
                _SHAPES[name].validate_python(value, strict=True)
            except ValidationError as problem:
                reason = problem.errors(include_url=False)[0]["msg"]
                raise InvalidParameter(
                    f"Scenario({name}={shown(value)}): {reason[:1].lower()}{reason[1:]}."
                ) from None
        plain = dict(values)
        plain["model"] = ModelRef.from_json(plain["model"])
        if "protocol" in plain:
            plain["protocol"] = protocol_from_json(plain["protocol"])
        if "defenses" in plain:
            plain["defenses"] = tuple(defense_from_json(d) for d in plain["defenses"])
        if "vantage" in plain:
            plain["vantage"] = Vantage.named(plain["vantage"])
        if "grants" in plain:
            plain["grants"] = frozenset(Grant.named(grant) for grant in plain["grants"])
        return cls(**plain)


_SHAPES: dict[str, TypeAdapter[Any]] = {
    "model": TypeAdapter(dict[str, Any]),
    "protocol": TypeAdapter(dict[str, Any]),
    "defenses": TypeAdapter(list[dict[str, Any]]),
    "grants": TypeAdapter(list[str]),
    "distinct_labels": TypeAdapter(bool),
    **{name: TypeAdapter(str | None) for name in ("weights", "surrogate")},
    **{name: TypeAdapter(str) for name in ("data", "letter", "vantage")},
    **{name: TypeAdapter(int) for name in ("examples", "clients", "rounds", "seed")},
}
"""What each key of :meth:`Scenario.to_json` holds."""


@dataclass(frozen=True)
class Truth:
    """The private batch of one client; lives in the harness and meets results in ``metrics/``.

    Args:
        images: ``(N, C, H, W)`` in [0, 1].
        labels: ``(N,)`` classes, or ``(N, K)`` targets.
    """

    images: Tensor
    labels: Tensor


class Stage:
    """A scenario with its live objects: the federation, the victims, the public data.

    Args:
        scenario: The description.
        model: The undefended architecture with the initial global weights.
        victims: Private images of every client.
        box: Pixel space of the model.
        surrogate: Public images, in the victims' shape.
        others: More images of the victims' population, from which DISTRIBUTION is computed; the
            surrogate images if None. Copies of a private image are left out.
        device: Where clients, server and adversary compute. The private images stay on the CPU,
            where they are held against what comes out.
    """

    def __init__(
        self,
        scenario: Scenario,
        model: nn.Module,
        victims: Mapping[int, ImageSet],
        box: Box,
        surrogate: ImageSet | None = None,
        others: ImageSet | None = None,
        device: torch.device = CPU,
    ) -> None:
        state.require_finite(state.held(model), model, f"The model {type(model).__name__}")
        self.scenario = scenario
        self.device = device
        self.known = True
        """Whether the private images are at hand; a capture may come without them."""
        self.notes: tuple[str, ...] = ()
        """What was done to the model to make it a client's, for people."""
        self.victims = dict(victims)
        self.box = box
        self.surrogate = surrogate
        self.others = surrogate if others is None else _without(others, self.victims)
        _check_disjoint(self.victims, surrogate)
        first = next(iter(self.victims.values()))
        self.input_shape = tuple(first.images.shape[1:])
        dtype = next((p.dtype for p in model.parameters()), torch.float32)
        model = state.on_device(model, device)
        clients = {
            index: Client(
                box.normalize(images.images.to(dtype)).to(device),
                images.labels.clone().to(device),
            )
            for index, images in self.victims.items()
        }
        self.classes = _check_model(
            model, next(iter(clients.values())).x[:1], first,
            scenario.protocol.loss, scenario.protocol.mode,
        )  # fmt: skip
        self.federation = Federation(
            model, clients, scenario.protocol, scenario.defenses, seed=scenario.seed, box=box
        )

    def play_back(self, capture: Capture, *, target: int = 0, known: bool = True) -> None:
        """From now on, show captured rounds instead of letting clients compute.

        Args:
            capture: Of the client ``target``, or the mean of several.
            target: The client under attack.
            known: Whether the victims are the images behind the capture; otherwise they only stand
                for a shape, and nothing of them is granted or scored.

        Raises:
            InvalidInput: If the capture does not fit the model, or another number of examples.
        """
        whole, one = capture.num_examples, capture.num_examples // capture.update.clients
        held = sum(len(images) for images in self.victims.values())
        if known and held not in (whole, one):
            raise InvalidInput(
                f"The captured update says that {whole} examples are behind it; the batch "
                f"holds {held}."
            )
        self.federation = Replayed(self.federation, capture.fitted(self.federation.model), target)
        self.known = known

    def truth(self, target: int = 0) -> Truth:
        """One client's private batch."""
        images = self.victims[target]
        return Truth(images.images, images.labels)

    def pooled_truth(self) -> Truth:
        """All clients' private batches, in order of client id."""
        ids = sorted(self.victims)
        return Truth(
            torch.cat([self.victims[i].images for i in ids]),
            torch.cat([self.victims[i].labels for i in ids]),
        )

    def view(
        self,
        records: Sequence[RoundRecord] = (),
        *,
        target: int = 0,
        keys: Sequence[Mapping[str, Tensor]] = (),
        others: bool = False,
    ) -> View:
        """What the scenario's adversary holds after these rounds.

        Args:
            records: The rounds, oldest first.
            target: The client under attack.
            keys: What an active adversary noted for each round.
            others: Whether a server also looks at every other client's update.
        """
        scenario, federation = self.scenario, self.federation
        knowledge = threat_model(scenario.letter).knowledge
        wanted = {
            name
            for name, (source, grant) in SOURCES.items()
            if source & knowledge or (grant is not None and grant in scenario.grants)
        }
        keys = [*keys, *([{}] * (len(records) - len(keys)))]
        seen = tuple(
            self._round_view(record, target, key) for record, key in zip(records, keys, strict=True)
        )
        offered: dict[str, Any] = {
            "rounds": seen,
            "num_examples": self._visible_examples(records, target),
            "input_shape": self.input_shape,
            "classes": self.classes,
            "box": self.box,
            "protocol": scenario.protocol,
            "defenses": federation.defenses,
            "key": {n: t.to(self.device) for n, t in keys[-1].items()} if keys else {},
            "clients": tuple(sorted(federation.clients)),
            "target": target,
        }
        if others and scenario.vantage is Vantage.SERVER:
            beside = tuple(self._others(record, target) for record in records)
            if any(beside):
                offered["others"] = beside
        if self.surrogate is not None:
            offered["surrogate"] = self.surrogate.to(self.device)
        client = federation.clients[target]
        if "distribution" in wanted and self.others is not None and len(self.others) > 1:
            population = self.box.normalize(self.others.images.to(client.x))
            offered["distribution"] = _distribution(
                population, self.others.labels.to(self.device), self.classes
            )
        offered |= self._granted(records, target, wanted)
        return View(
            letter=scenario.letter,
            vantage=scenario.vantage,
            grants=scenario.grants,
            fields={name: offered[name] for name in wanted if name in offered},
            architecture=self._public_architecture(),
            model_ref=scenario.model,
            loss=scenario.protocol.loss,
            architecture_defenses=[
                d for d in federation.defenses if type(d).model is not Defense.model
            ],
        )

    def _granted(
        self, records: Sequence[RoundRecord], target: int, wanted: Collection[str]
    ) -> dict[str, Any]:
        """What no column settles: labels, statistics, draws and secrets.

        Of a sum, the labels of everyone in it; what only one client's batch has is not given then.
        """
        scenario, federation = self.scenario, self.federation
        client = federation.clients[target]
        members = self._behind(records, target)
        single = members == [target]
        found: dict[str, Any] = {}
        if "labels" in wanted and self.known:
            found["labels"] = torch.cat([federation.clients[c].y for c in members])
        if records and single and "batch_bn" in wanted and self.known:
            received = records[-1].received[target]
            received.train(scenario.protocol.mode == "train")
            found["batch_bn"] = {
                layer: (mean.detach(), variance.detach())
                for layer, (mean, variance) in batchnorm_statistics(
                    received, state.model_state(received), client.x
                ).items()
            }
        if records and single and "batch_order" in wanted and target in records[-1].order:
            found["batch_order"] = tuple(i.clone() for i in records[-1].order[target])
        if records and single and "dropout_masks" in wanted and target in records[-1].draws:
            found["dropout_masks"] = records[-1].draws[target]
        if records and single and "augmentation" in wanted and target in records[-1].augmentation:
            found["augmentation"] = records[-1].augmentation[target]
        if "secrets" in wanted:
            found["secrets"] = {
                f"{defense.key}/{name}": tensor
                for defense in federation.defenses
                for name, tensor in defense.secrets(client.memories.get(defense.key, {})).items()
            }
            if records:
                # As they were when the client began to train, not after its step.
                began = state.model_state(agreed_part(records[-1].received[target])[1])
                found["secrets"] |= {
                    f"private/{name}": began[name]
                    for name in sorted(federation.private_names & began.keys())
                }
        return found

    def _behind(self, records: Sequence[RoundRecord], target: int) -> list[int]:
        """The honest clients whose examples are behind the update that is seen."""
        if records and self.scenario.vantage in (Vantage.AGGREGATE, Vantage.PEER):
            return [c for c in records[-1].cohort if c not in records[-1].sybils]
        return [target]

    def _public_architecture(self) -> nn.Module:
        """The global model in the clients' mode.

        Private parameters hold their public initial values, which are not any client's.
        """
        return copy.deepcopy(self.federation.model).train(self.scenario.protocol.mode == "train")

    def _visible_examples(self, records: Sequence[RoundRecord], target: int) -> int:
        if records and self.scenario.vantage in (Vantage.AGGREGATE, Vantage.PEER):
            return records[-1].aggregate.num_examples
        if records and self._readable(records[-1], target) is None:
            return records[-1].messages[target].num_examples
        if isinstance(self.federation, Replayed):
            return self.federation.capture.num_examples
        return len(self.federation.clients[target].x)

    def _readable(self, record: RoundRecord, target: int) -> Update | None:
        """What whoever takes messages from the wire reads in one.

        Sybils are members of the cohort, and hold what members hold; so do granted secrets.
        """
        message = record.messages[target]
        if record.sybils or Grant.DEFENSE_SECRETS in self.scenario.grants:
            for defense in self.federation.defenses:
                if defense.key == message.encoded_by:
                    memory = self.federation.clients[target].memories[defense.key]
                    opened = defense.members_read(message, memory)
                    if opened is not None:
                        return opened
        return message.update

    def _others(self, record: RoundRecord, target: int) -> dict[int, Update]:
        """The honest clients' updates that the server can read, the target's left out."""
        return {
            client: update
            for client in record.cohort
            if client != target and client in record.messages and client not in record.sybils
            if (update := self._readable(record, client)) is not None
        }

    def _round_view(self, record: RoundRecord, target: int, key: Mapping[str, Tensor]) -> RoundView:
        message = record.messages[target]
        seen = RoundView(
            index=record.index,
            state={n: t.clone() for n, t in record.states[target].items()},
            cohort=len(record.cohort),
            update=None,
            key={name: tensor.to(self.device) for name, tensor in key.items()},
        )
        match self.scenario.vantage:
            case Vantage.WIRE | Vantage.SERVER:
                readable = self._readable(record, target)
                if readable is not None:
                    return replace(seen, update=readable)
                return replace(
                    seen,
                    payload=dict(message.payload),
                    hidden_by=f"{message.encoded_by} encodes each client's message; "
                    "only the vantage 'aggregate' shows a sum",
                )
            case Vantage.AGGREGATE:
                if record.broadcast is not None:
                    return replace(seen, update=record.broadcast)
                return replace(
                    seen,
                    hidden_by=f"{message.encoded_by} keeps the aggregate encrypted; only clients "
                    "open it (the vantage 'peer')",
                )
            case Vantage.PEER:
                peers = [c for c in record.cohort if c != target and c not in record.sybils]
                own = record.updates[peers[0]] if peers else None
                return replace(seen, update=record.aggregate, own=own)


def stage(
    scenario: Scenario,
    *,
    model: nn.Module | None = None,
    victims: ImageSet | None = None,
    surrogate: ImageSet | None = None,
    box: Box | None = None,
    trust_code: bool = False,
    device: torch.device = CPU,
) -> Stage:
    """Bring a scenario to life.

    Args:
        scenario: The description.
        model: A live model, instead of the described one.
        victims: Live private images, dealt to the clients in order, instead of the named set.
        surrogate: Live public images, instead of the named set.
        box: Pixel space; plain [0, 1] if None.
        trust_code: Whether Python code that the description names as its model may be run; it
            is not if the description came from a file.
        device: Where clients, server and adversary compute.

    Raises:
        InvalidInput: If there are too few images, or they do not fit the model.
    """
    if model is None:
        model = scenario.model.build(trust_code=trust_code)
    if scenario.weights is not None:
        model = state.load_into(model, models.load_for(model, scenario.weights).state)
    others = None
    if victims is None:
        loaded = data.load(scenario.data)
        if threat_model(scenario.letter).knowledge & Knowledge.DISTRIBUTION:
            drawn = torch.randperm(len(loaded), generator=stream(scenario.seed, "population"))
            others = loaded.subset(drawn[:POPULATION])
        needed = scenario.examples * scenario.clients
        chosen = _choose(loaded, needed, scenario)
        dealt = {
            client: loaded.subset(
                chosen[client * scenario.examples : (client + 1) * scenario.examples]
            )
            for client in range(scenario.clients)
        }
    else:
        per_client = len(victims) // scenario.clients
        if per_client == 0:
            raise InvalidInput(
                f"{len(victims)} images cannot be dealt to {scenario.clients} clients."
            )
        scenario = replace(scenario, examples=per_client)
        dealt = {
            client: victims.subset(range(client * per_client, (client + 1) * per_client))
            for client in range(scenario.clients)
        }
    if surrogate is None and scenario.surrogate is not None:
        surrogate = data.load(scenario.surrogate)
    example = next(iter(dealt.values())).images[:1]
    channels = example.shape[1]
    model, notes = take_in(state.on_device(model, device), example.to(device))
    live = Stage(scenario, model, dealt, box or Box.unit(channels), surrogate, others, device)
    live.notes = notes
    return live


def _choose(images: ImageSet, needed: int, scenario: Scenario) -> list[int]:
    order = torch.randperm(len(images), generator=stream(scenario.seed, "victims")).tolist()
    if scenario.distinct_labels:
        chosen: list[int] = []
        for _ in range(scenario.clients):
            taken: set[int] = set()
            for index in order:
                label = int(images.labels[index])
                if label not in taken and index not in chosen and len(taken) < scenario.examples:
                    taken.add(label)
                    chosen.append(index)
    else:
        chosen = order[:needed]
    if len(chosen) < needed:
        raise InvalidInput(
            f"Data set {images.name!r} gives {len(chosen)} of the {needed} images needed "
            f"({scenario.clients} clients x {scenario.examples} examples"
            f"{', distinct labels' if scenario.distinct_labels else ''})."
        )
    return chosen


def _check_disjoint(victims: Mapping[int, ImageSet], surrogate: ImageSet | None) -> None:
    """Refuse public data that hold a private image: no attack may find the truth in its prior."""
    if surrogate is None:
        return
    public = {image.numpy().tobytes() for image in surrogate.images}
    for client, images in victims.items():
        shared = sum(image.numpy().tobytes() in public for image in images.images)
        if shared:
            raise InvalidInput(
                f"{shared} of client {client}'s {len(images)} images are also in the surrogate set "
                f"{surrogate.name!r}; public and private data must be disjoint."
            )


def _without(images: ImageSet, victims: Mapping[int, ImageSet]) -> ImageSet:
    """``images`` but for the private ones."""
    private = {image.numpy().tobytes() for held in victims.values() for image in held.images}
    return images.subset(
        [i for i, image in enumerate(images.images) if image.numpy().tobytes() not in private]
    )


def _check_model(model: nn.Module, x: Tensor, images: ImageSet, loss: Loss, mode: Mode) -> int:
    """Number of outputs K, after one forward pass that must work and give ``(1, K)``."""
    try:
        with in_mode(model, train=False), torch.no_grad(), torch.random.fork_rng(devices=[]):
            # Zeros: a module that remembers its last input would carry a victim into the view.
            logits = model(torch.zeros_like(x))
        told = trained_output(model, x) if mode == "train" else None
    except (RuntimeError, TypeError, ValueError) as problem:
        raise InvalidInput(
            f"{type(model).__name__} cannot read inputs of shape {tuple(x.shape)}: "
            f"{str(problem).splitlines()[0]}. It must take one tensor of images: put a model of "
            "several inputs into a module that fixes the others. Grey images become colour ones, "
            "and back, by data.channels in YAML or ImageSet.with_channels."
        ) from None
    if not isinstance(logits, Tensor) or logits.dim() != 2:
        way = (
            ""
            if isinstance(logits, Tensor)
            else " Name the part that holds the logits: output= (output: in the YAML's model)."
        )
        raise InvalidInput(
            f"{type(model).__name__} must return class logits (N, K); for one input it gave "
            f"{outline(logits)}.{way}"
        )
    if told is not None:
        raise InvalidInput(
            f"{type(model).__name__} returns class logits in eval mode and, in train mode, {told}: "
            "name the part that holds the logits, output= (output: in the YAML's model). A loss on "
            "the others is not replayed."
        )
    classes = int(logits.shape[1])
    targets = images.labels
    if targets.dim() == 2 and targets.shape[1] != classes:
        raise InvalidInput(
            f"The targets have {targets.shape[1]} entries each, the model {classes} outputs."
        )
    highest = 2 if classes == 1 and loss.multilabel else classes
    if targets.dim() == 1 and len(targets) and int(targets.max()) >= highest:
        raise InvalidInput(
            f"Label {int(targets.max())} is out of range for a model with {classes} classes "
            f"(0..{highest - 1})."
        )
    return classes


def _distribution(x: Tensor, y: Tensor, classes: int) -> Distribution:
    if y.dim() == 2:
        counts = y.to(x.dtype).sum(0)
    else:
        # Public images may have classes that the model lacks.
        counts = torch.bincount(y[y < classes], minlength=classes).to(x.dtype)
    return Distribution(counts / counts.sum().clamp(min=1), x.mean(0), x.std(0, correction=0))
