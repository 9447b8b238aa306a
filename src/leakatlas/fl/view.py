"""Everything an adversary holds: what its threat model and grants give, and nothing else.

===================  ==========================================================
field                given by
===================  ==========================================================
``rounds``           UPDATES (and with it ``update``, ``model``, ``num_examples``,
                     ``input_shape``, ``classes``)
``box``              BASIC, or ``Grant.PIXEL_RANGE``
``protocol``         TRAINING
``defenses``         TRAINING
``surrogate``        SURROGATE
``distribution``     DISTRIBUTION
``key``              MANIPULATION
``clients``          MANIPULATION or SELECTION (and with it ``target``)
``labels``           ``Grant.LABELS``
``batch_bn``         ``Grant.BATCH_BN``
``batch_order``      ``Grant.BATCH_ORDER``
``dropout_masks``    ``Grant.DROPOUT_MASKS``
``augmentation``     ``Grant.AUGMENTATION``
``secrets``          ``Grant.DEFENSE_SECRETS``
===================  ==========================================================

The loss goes with the architecture, as it does wherever a model is handed out to be trained.
A field that was not granted is not in the object; reading it raises
:class:`~leakatlas.errors.NotGranted`. Reads are recorded.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, overload

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from leakatlas import reading, tensorfiles
from leakatlas.catalogue import registry
from leakatlas.data import Box, ImageSet
from leakatlas.errors import (
    InvalidInput,
    InvalidParameter,
    NotGranted,
    UnknownName,
    UnsupportedModel,
    shown,
)
from leakatlas.fl import draws, rehearsal, replay, state, unrolled
from leakatlas.fl.augmentation import augmented
from leakatlas.fl.hooks import Defense
from leakatlas.fl.losses import PLAIN, Loss, as_loss, loss_json, with_code
from leakatlas.fl.protocol import PROTOCOLS, FedAVG, FedSGD, Protocol
from leakatlas.fl.state import ModelRef
from leakatlas.fl.update import Update
from leakatlas.threat import Grant, Knowledge, Vantage, threat_model

SOURCES: dict[str, tuple[Knowledge, Grant | None]] = {
    "rounds": (Knowledge.UPDATES, None),
    "num_examples": (Knowledge.UPDATES, None),
    "input_shape": (Knowledge.UPDATES, None),
    "classes": (Knowledge.UPDATES, None),
    "box": (Knowledge.BASIC, Grant.PIXEL_RANGE),
    "protocol": (Knowledge.TRAINING, None),
    "defenses": (Knowledge.TRAINING, None),
    "surrogate": (Knowledge.SURROGATE, None),
    "distribution": (Knowledge.DISTRIBUTION, None),
    "key": (Knowledge.MANIPULATION, None),
    "clients": (Knowledge.MANIPULATION | Knowledge.SELECTION, None),
    "target": (Knowledge.MANIPULATION | Knowledge.SELECTION, None),
    "labels": (Knowledge(0), Grant.LABELS),
    "batch_bn": (Knowledge(0), Grant.BATCH_BN),
    "batch_order": (Knowledge(0), Grant.BATCH_ORDER),
    "dropout_masks": (Knowledge(0), Grant.DROPOUT_MASKS),
    "augmentation": (Knowledge(0), Grant.AUGMENTATION),
    "secrets": (Knowledge(0), Grant.DEFENSE_SECRETS),
}
"""Which knowledge, or which grant instead, puts a field into a view."""

FINITE = ("distribution/", "batch_bn/")
"""Fields of a saved view, besides states, updates and images, in which every value is finite."""

Statistics = Mapping[str, tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Distribution:
    """What is known of a client's population under ``Knowledge.DISTRIBUTION``.

    Computed from other images than any client's: the statistics of a batch nearly are the batch
    (of two images, mean and spread give both).

    Args:
        class_frequencies: ``(K,)``, sums to 1; zeros if no class of the images is the model's.
        mean: Per-pixel mean ``(C, H, W)``, model space.
        std: Per-pixel standard deviation ``(C, H, W)``, model space.
    """

    class_frequencies: Tensor
    mean: Tensor
    std: Tensor


@dataclass(frozen=True)
class RoundView:
    """One round as the adversary saw it.

    Args:
        index: Round number.
        state: Shared state of the model that the target received, by name.
        cohort: How many clients took part.
        update: The update visible at the vantage, or None.
        hidden_by: Why there is none.
        payload: Encoded tensors seen instead.
        own: At the peer vantage, the peer's own update.
        key: What an active adversary noted when it tampered with this round.
    """

    index: int
    state: Mapping[str, Tensor]
    cohort: int
    update: Update | None
    hidden_by: str = ""
    payload: Mapping[str, Tensor] = field(default_factory=dict)
    own: Update | None = None
    key: Mapping[str, Tensor] = field(default_factory=dict)


class View:
    """The adversary's side of a scenario.

    Args:
        letter: Threat model, A-H.
        vantage: Where the adversary looks.
        grants: Extra facts.
        fields: The granted fields, by the names of :data:`SOURCES`.
        architecture: The shared architecture with the state broadcast last; its mode is the
            client's, its private parameters hold what the adversary would guess, and those that
            take no gradient are constants.
        loss: What the client minimises.
        model_ref: How to rebuild the undefended architecture elsewhere.
        architecture_defenses: Defenses that changed the architecture, which is public.

    Raises:
        InvalidInput: If a field is given that neither the letter nor a grant allows, or a received
            state is not finite.
    """

    def __init__(
        self,
        *,
        letter: str,
        vantage: Vantage,
        grants: frozenset[Grant],
        fields: Mapping[str, Any],
        architecture: nn.Module,
        model_ref: ModelRef,
        loss: Loss = PLAIN,
        architecture_defenses: Sequence[Defense] = (),
    ) -> None:
        self.letter = threat_model(letter).letter
        self.knowledge = threat_model(letter).knowledge
        self.vantage = vantage
        self.grants = grants
        self._architecture = architecture
        self._model_ref = model_ref
        self._loss = loss
        self._architecture_defenses = tuple(architecture_defenses)
        self._reads: set[str] = set()
        self._read_before: frozenset[str] = frozenset()
        self._fields = dict(fields)
        for name in self._fields:
            if not self._allowed(name):
                raise InvalidInput(f"{name!r} is not given to {self.describe()}.")
        state.require_finite(state.held(architecture), architecture, "The model of the view")
        for seen in self._fields.get("rounds", ()):
            who = f"The state received in round {seen.index}"
            state.require_finite(seen.state, architecture, who)

    def _allowed(self, name: str) -> bool:
        knowledge, grant = SOURCES[name]
        return bool(knowledge & self.knowledge) or (grant is not None and grant in self.grants)

    def describe(self) -> str:
        """The adversary in words, for messages."""
        grants = f" + {', '.join(sorted(self.grants))}" if self.grants else ""
        return f"threat model {self.letter} at {self.vantage.value}{grants}"

    def has(self, name: str) -> bool:
        """Whether a field was granted; asking is not reading.

        Args:
            name: A name of :data:`SOURCES`.
        """
        return name in self._fields

    @property
    def reads(self) -> frozenset[str]:
        """The fields read so far, while tampering with earlier rounds too."""
        return self._read_before | self._reads

    def forget_reads(self) -> None:
        """Start a new record of reads; what was remembered stays."""
        self._reads.clear()

    def remember(self, reads: frozenset[str]) -> None:
        """Count ``reads`` of earlier views of the same adversary, such as those of tampering."""
        self._read_before |= reads

    def _get(self, name: str) -> Any:
        if name not in self._fields:
            knowledge, grant = SOURCES[name]
            ways = []
            if knowledge:
                ways.append(f"a threat model with {'/'.join(knowledge.names()).upper()}")
            if grant is not None:
                ways.append(f"the grant {grant.value!r}")
            why = " or ".join(ways)
            held = ", ".join(self.knowledge.names()).upper()
            if self._allowed(name):
                raise NotGranted(f"view.{name} is absent for {self.describe()}: {_absence(name)}.")
            raise NotGranted(
                f"view.{name} is not granted to {self.describe()} (which holds {held}); "
                f"it takes {why}."
            )
        self._reads.add(name)
        return self._fields[name]

    # -- fields --------------------------------------------------------------------------------

    @property
    def rounds(self) -> tuple[RoundView, ...]:
        """Every round seen, oldest first."""
        return self._get("rounds")  # type: ignore[no-any-return]

    @property
    def num_examples(self) -> int:
        """Examples behind the observed update; clients send it as their aggregation weight."""
        return self._get("num_examples")  # type: ignore[no-any-return]

    @property
    def input_shape(self) -> tuple[int, ...]:
        """``(C, H, W)``, which the architecture fixes."""
        return self._get("input_shape")  # type: ignore[no-any-return]

    @property
    def classes(self) -> int:
        """Number of classes K, the width of the head."""
        return self._get("classes")  # type: ignore[no-any-return]

    @property
    def box(self) -> Box:
        """The pixel space."""
        return self._get("box")  # type: ignore[no-any-return]

    @property
    def protocol(self) -> Protocol:
        """The learning algorithm and its local hyperparameters."""
        return self._get("protocol")  # type: ignore[no-any-return]

    @property
    def defenses(self) -> tuple[Defense, ...]:
        """The defenses in force: mechanism and parameters, never their secrets."""
        return self._get("defenses")  # type: ignore[no-any-return]

    @property
    def surrogate(self) -> ImageSet:
        """Public images from the client's population, in [0, 1]; none of them is the client's."""
        return self._get("surrogate")  # type: ignore[no-any-return]

    @property
    def distribution(self) -> Distribution:
        """Statistics of the client's data."""
        return self._get("distribution")  # type: ignore[no-any-return]

    @property
    def key(self) -> Mapping[str, Tensor]:
        """What the adversary noted when it tampered with the last round."""
        return self._get("key")  # type: ignore[no-any-return]

    @property
    def clients(self) -> tuple[int, ...]:
        """Ids that the adversary may select from."""
        return self._get("clients")  # type: ignore[no-any-return]

    @property
    def target(self) -> int:
        """Id of the client under attack."""
        return self._get("target")  # type: ignore[no-any-return]

    @property
    def labels(self) -> Tensor:
        """The private labels ``(N,)``, in order; an oracle."""
        return self._get("labels")  # type: ignore[no-any-return]

    @property
    def batch_bn(self) -> Statistics:
        """Mean and biased variance at each BN layer's input on the private batch; an oracle."""
        return self._get("batch_bn")  # type: ignore[no-any-return]

    @property
    def batch_order(self) -> tuple[Tensor, ...]:
        """Example indices of every local step; an oracle."""
        return self._get("batch_order")  # type: ignore[no-any-return]

    @property
    def dropout_masks(self) -> tuple[draws.Draws, ...]:
        """What the model drew in every local step, see :mod:`leakatlas.fl.draws`; an oracle."""
        return self._get("dropout_masks")  # type: ignore[no-any-return]

    @property
    def augmentation(self) -> tuple[int, ...]:
        """Seeds of every local step's transforms; an oracle."""
        return self._get("augmentation")  # type: ignore[no-any-return]

    @property
    def secrets(self) -> Mapping[str, Tensor]:
        """Secret state of the defenses, ``key/name -> tensor``; an oracle."""
        return self._get("secrets")  # type: ignore[no-any-return]

    # -- what follows from the fields ----------------------------------------------------------

    @property
    def update(self) -> Update:
        """The update of the last round.

        Raises:
            NotGranted: If a defense hides it at this vantage.
        """
        return self.update_at(-1)

    def update_at(self, round: int) -> Update:
        """The update of one round.

        Raises:
            NotGranted: If there was no round yet, or a defense hides it at this vantage.
        """
        if not self.rounds:
            raise NotGranted("No round was played yet, so there is no update to read.")
        seen = self.rounds[round]
        if seen.update is None:
            raise NotGranted(
                f"The update of round {seen.index} is not readable at {self.vantage.value}: "
                f"{seen.hidden_by}."
            )
        return seen.update

    @property
    def loss(self) -> Loss:
        """What the client minimises; public with the architecture."""
        return self._loss

    @property
    def trained_names(self) -> tuple[str, ...]:
        """Parameters that take gradients; the others are constants. Public, in model order."""
        return tuple(state.trained(self._architecture))

    @property
    def batch_shape(self) -> tuple[int, ...]:
        """``(N, C, H, W)`` of the private batch."""
        return (self.num_examples, *self.input_shape)

    @property
    def model(self) -> nn.Module:
        """A copy of the model of the last round, or the global model before any."""
        return self.model_at(-1)

    def model_at(self, round: int) -> nn.Module:
        """A copy of the model that the target received in a round.

        Raises:
            UnsupportedModel: If that round's architecture was another one.
        """
        if not self.rounds:
            return state.load_into(self._architecture, state.model_state(self._architecture))
        own = state.model_state(self._architecture)
        received = self.rounds[round].state
        if not received.keys() <= own.keys():
            extra = sorted(received.keys() - own.keys())[0]
            raise UnsupportedModel(
                f"Round {self.rounds[round].index} used another architecture (it has {extra!r}); "
                "its update can be read out, but not replayed."
            )
        return state.load_into(self._architecture, {**own, **received})

    @overload
    def replayer(
        self, *, round: int = -1, adaptive: bool = True, one_step: Literal[False] = False
    ) -> replay.Client: ...

    @overload
    def replayer(
        self, *, round: int = -1, adaptive: bool = True, one_step: Literal[True]
    ) -> replay.OneStep: ...

    def replayer(
        self, *, round: int = -1, adaptive: bool = True, one_step: bool = False
    ) -> Callable[..., dict[str, Tensor]]:
        """The client's computation of one round, as a pure function of candidates.

        What the view does not know it does not use: without the protocol a gradient can be
        replayed (one step, mean or sum as the message says) but a delta cannot; without the
        batch order, batches follow the order of the candidates; without the masks of dropout,
        the mean network is replayed.

        Args:
            round: Which round.
            adaptive: Whether known defenses' mirrors are applied; an oblivious attack says no.
            one_step: Replay one gradient at weights of the attack's choice, standing for the
                whole update: for methods that put a single gradient between the state before and
                the state after. Without the protocol a delta's stand-in has the right direction
                and no size.

        Returns:
            ``(x, y) -> {name: tensor}`` in the units of that round's update, differentiable in
            ``x`` ``(N, C, H, W)`` and, if it holds probabilities, in ``y`` ``(N, K)``; a call may
            bring masks of its own for every local step (``drawn=``). With ``one_step``,
            ``(x, y, at=weights)``, differentiable in the weights too; the received ones if ``at``
            is left out.

        Raises:
            NotGranted: If the update is a delta, the protocol is not granted, and more than one
                step is to be replayed.
            InvalidInput: If the update does not belong to the model.
            InvalidParameter: If this machine's memory cannot hold so many local steps.
        """
        update = self.update_at(round)
        model = replay.without_running_statistics(self.model_at(round))
        defenses = self.defenses if adaptive and self.has("defenses") else ()
        drawn = self._drawn(model)
        protocol: Protocol = FedSGD(lr=1.0, reduction=update.reduction, loss=self._loss)
        if update.kind != "gradient" and (not one_step or self.has("protocol")):
            protocol = self.protocol
        if isinstance(protocol, FedAVG) and not one_step:
            unrolled.require_room(model, protocol, self.num_examples, self.input_shape)
        if one_step:
            return replay.one_step(
                model,
                protocol,
                update,
                steps=protocol.steps(self.num_examples),
                defenses=defenses,
                drawn=drawn if isinstance(drawn, str) else drawn[0],
            )
        return replay.client(
            model,
            protocol,
            update,
            defenses=defenses,
            order=self.batch_order if self.has("batch_order") else None,
            drawn=drawn,
            augment=self._augment(),
            own=True,
        )

    def _augment(self) -> Callable[[Tensor, int], Tensor] | None:
        """The client's transforms as it drew them, where recipe and draws are both known."""
        if not self.has("augmentation") or not self.has("protocol"):
            return None
        seeds, recipe = self.augmentation, self.protocol.augment
        box = self.box if self.has("box") else None
        if not seeds:
            return None
        return lambda x, step: augmented(x, recipe, seeds[step], box)

    def _drawn(self, model: nn.Module) -> tuple[draws.Draws, ...] | Literal["mean", "new"]:
        """What replays draw: the granted masks, or the mean network's; nothing costs nothing."""
        if self.has("dropout_masks"):
            return self.dropout_masks
        like = next(model.parameters())
        probe = torch.zeros(2, *self.input_shape, dtype=like.dtype, device=like.device)
        return "mean" if draws.draws_of(model, probe) else "new"

    def replay(
        self, x: Tensor, y: Tensor, *, round: int = -1, adaptive: bool = True
    ) -> dict[str, Tensor]:
        """What the client would have sent for ``(x, y)``; see :meth:`replayer`."""
        return self.replayer(round=round, adaptive=adaptive)(x, y)

    def rehearse(
        self, x: Tensor, y: Tensor, *, seed: int = 0, surrogate: ImageSet | None = None
    ) -> View:
        """The same adversary, had its own images been the victim's; see :mod:`.rehearsal`.

        Letter, vantage and grants stay. The update of the last round is what the adversary makes
        of its images at the received state, under the protocol and the defenses as far as it knows
        them; what was granted about the private batch describes these images instead. Defense
        secrets are the victim's and are absent.

        Args:
            x: ``(N, C, H, W)``, model space, shaped as the private batch.
            y: ``(N,)`` labels.
            seed: Of local orders and of the defenses' noise.
            surrogate: What the adversary holds beside these images, if it holds a surrogate; its
                own one, which may contain them, if None.

        Raises:
            NotGranted: If there is no readable update, or a delta cannot be simulated without the
                protocol.
            InvalidInput: If the images have another shape.
            UnsupportedModel: If the last round had another architecture.
        """
        seen = self._fields["rounds"][-1] if self._fields.get("rounds") else None
        if seen is None or seen.update is None:
            raise NotGranted(
                f"There is no update to imitate for {self.describe()}"
                + (f": {seen.hidden_by}." if seen is not None else ": no round was played yet.")
            )
        protocol = self._fields.get("protocol")
        if protocol is None and seen.update.kind != "gradient":
            raise NotGranted(
                f"{self.describe()} cannot imitate a {seen.update.kind} without the protocol; it "
                "takes a threat model with TRAINING."
            )
        N = self._fields["num_examples"]
        aggregated = self.vantage in (Vantage.AGGREGATE, Vantage.PEER) and N % seen.cohort == 0
        copy = self._copy(self._fields)
        model = copy.model
        played = rehearsal.play(
            model,
            x,
            y,
            observed=seen.update,
            protocol=protocol,
            loss=self._loss,
            defenses=self._fields.get("defenses", ()),
            clients=seen.cohort if aggregated else 1,
            box=self._fields.get("box"),
            seed=seed,
        )
        own = rehearsal.own_fields(self._fields, model, x, y, played)
        if surrogate is not None and "surrogate" in own:
            own["surrogate"] = surrogate
        return self._copy(own)

    def circumstances(self) -> dict[str, Any]:
        """What :meth:`rehearse` rests on besides the images, in plain JSON.

        Equal circumstances, images and seeds give equal rehearsals. A read of rounds and shapes.

        Raises:
            NotGranted: If there is no readable update.
        """
        seen = self._fields["rounds"][-1]
        update = self.update
        protocol, box = self._fields.get("protocol"), self._fields.get("box")
        model = self.model
        return {
            "state": state.state_hash(state.model_state(model)),
            "architecture": str(model),  # activations have no state
            "training": model.training,
            "protocol": None if protocol is None else protocol_json(protocol),
            "loss": loss_json(self._loss),
            "defenses": [defense_json(d) for d in self._fields.get("defenses", ())],
            "update": [update.kind, update.sign, update.scale, update.reduction],
            "vantage": self.vantage.value,
            "cohort": seen.cohort,
            "shape": list(self.batch_shape),
            "box": None if box is None else box.to_json(),
        }

    def without(self, name: str) -> View:
        """The same view with one field taken away, to test what an attack needs."""
        return self._copy({n: v for n, v in self._fields.items() if n != name})

    def with_rounds(self, rounds: Sequence[RoundView], key: Mapping[str, Tensor]) -> View:
        """The same adversary after more rounds."""
        fields = {**self._fields, "rounds": tuple(rounds)}
        if self._allowed("key"):
            fields["key"] = key
        return self._copy(fields)

    def _copy(self, fields: Mapping[str, Any]) -> View:
        return View(
            letter=self.letter,
            vantage=self.vantage,
            grants=self.grants,
            fields=fields,
            architecture=self._architecture,
            model_ref=self._model_ref,
            loss=self._loss,
            architecture_defenses=self._architecture_defenses,
        )

    def fingerprint(self) -> str:
        """SHA-256 of all that this view holds; not a read."""
        tensors, facts = _pack(self._fields)
        text = json.dumps(
            [self.describe(), facts, loss_json(self._loss), state.state_hash(tensors)],
            sort_keys=True,
        )
        return hashlib.sha256(text.encode()).hexdigest()

    # -- on disk -------------------------------------------------------------------------------

    def save(self, folder: Path | str) -> None:
        """Write ``view.json`` and ``view.safetensors``; no code, no pickle, no private tensor."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tensors, facts = _pack(self._fields)
        for name, tensor in state.model_state(self._architecture).items():
            tensors[f"architecture/{name}"] = tensor
        description = {
            "format": "leakatlas/view/1",
            "letter": self.letter,
            "vantage": self.vantage.value,
            "grants": sorted(grant.value for grant in self.grants),
            "model": self._model_ref.to_json(),
            "mode": "train" if self._architecture.training else "eval",
            "constants": sorted(
                n for n, p in self._architecture.named_parameters() if not p.requires_grad
            ),
            "loss": loss_json(self._loss),
            "architecture_defenses": [defense_json(d) for d in self._architecture_defenses],
            "fields": facts,
            "read_before": sorted(self._read_before),
        }
        # Copies: safetensors refuses tensors that share memory.
        save_file({n: t.detach().cpu().clone().contiguous() for n, t in tensors.items()},
                  folder / "view.safetensors")  # fmt: skip
        (folder / "view.json").write_text(json.dumps(description, indent=2), encoding="utf-8")

    @classmethod
    def load(
        cls,
        folder: Path | str,
        *,
        model: nn.Module | None = None,
        loss: Loss | None = None,
        trust_code: bool = False,
        device: torch.device | None = None,
    ) -> View:
        """Read what :meth:`save` wrote; nothing in it is run.

        Args:
            folder: Where it lies.
            model: The undefended architecture, if the view names one that only exists live, or
                one that is Python code.
            loss: The client's loss, if it is Python code.
            trust_code: Whether Python code that the view names as its architecture or its loss
                may be run; only for views that one saved oneself.
            device: Where it is to lie; the CPU if None.

        Raises:
            InvalidInput: If a file is missing, truncated, or not a view, or if its architecture
                is code that nobody trusted.
            UnknownName: If it names a letter, vantage, grant or model that does not exist.
        """
        folder = Path(folder)
        who = f"The view in {shown(str(folder))}"
        for part in ("view.json", "view.safetensors"):
            if not reading.is_file(folder / part):
                raise InvalidInput(f"{shown(str(folder))} is not a saved view: {part} is missing.")
        description = reading.read_json(folder / "view.json", what="view")
        tensors = tensorfiles.read_safetensors(folder / "view.safetensors", what="view")[0]
        if not isinstance(description, dict):
            raise InvalidInput(f"{folder / 'view.json'} is not the description of a view.")
        if description.get("format") != "leakatlas/view/1":
            raise InvalidInput(
                f"{folder / 'view.json'} has format {shown(description.get('format'))}, "
                "expected 'leakatlas/view/1'."
            )
        with reading.boundary(who, LookupError, TypeError, AttributeError, RuntimeError):
            if device is not None:
                tensors = {name: tensor.to(device) for name, tensor in tensors.items()}
            return cls._from_file(description, tensors, model, loss, trust_code, device)

    @classmethod
    def _from_file(
        cls,
        description: Mapping[str, Any],
        tensors: Mapping[str, Tensor],
        model: nn.Module | None,
        loss: Loss | None,
        trust_code: bool,
        device: torch.device | None,
    ) -> View:
        reference = ModelRef.from_json(description["model"])
        architecture = model if model is not None else reference.build(trust_code=trust_code)
        defenses = [defense_from_json(d) for d in description["architecture_defenses"]]
        with torch.random.fork_rng(devices=[]):  # what is initialised here is overwritten below
            for defense in defenses:
                architecture = defense.model(architecture)
        prefix = "architecture/"
        architecture = state.load_into(
            architecture if device is None else architecture.to(device),
            {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)},
        )
        architecture.train(description["mode"] == "train")
        constants = set(description["constants"])
        for name, parameter in architecture.named_parameters():
            parameter.requires_grad_(name not in constants)
        for path, tensor in tensors.items():
            if path.startswith(FINITE) and tensorfiles.count_non_finite(tensor):
                raise InvalidInput(f"The view holds values at {shown(path)} that are not finite.")
        fields = _unpack(description["fields"], tensors)
        if loss is None and trust_code:
            loss = with_code(as_loss(description["loss"]), Path())
        if loss is not None and "protocol" in fields:
            fields["protocol"] = replace(fields["protocol"], loss=loss)
        view = cls(
            letter=description["letter"],
            vantage=Vantage.named(description["vantage"]),
            grants=frozenset(Grant.named(grant) for grant in description["grants"]),
            fields=fields,
            architecture=architecture,
            model_ref=reference,
            loss=as_loss(description["loss"]) if loss is None else loss,
            architecture_defenses=defenses,
        )
        view.remember(frozenset(description["read_before"]))
        return view


def _absence(name: str) -> str:
    """Why a field that knowledge or a grant allows can still be missing."""
    match name:
        case "surrogate":
            return "the scenario names no `surrogate` data"
        case "distribution":
            return "it takes other images of the population, or `surrogate` data; there are none"
        case _:
            return "this view holds none (it may exist only once a round was played)"


# -- (de)serialisation: plain values into JSON, tensors beside them under their path -------------


def defense_json(defense: Defense) -> dict[str, Any]:
    """A defense as ``{"key": ..., parameters}``."""
    return {"key": defense.key, **defense.to_json()}


def defense_from_json(description: Mapping[str, Any]) -> Defense:
    """The defense that :func:`defense_json` described.

    Raises:
        UnknownName: If no defense has that key.
        InvalidInput: If the key is missing.
        InvalidParameter: If a parameter is unknown or outside its range.
    """
    if not isinstance(description, Mapping) or not isinstance(description.get("key"), str):
        raise InvalidInput(f"A defense needs its 'key' as text; got {shown(description)}.")
    values = dict(description)
    cls = registry.load_defense(values.pop("key"))
    return cls.from_json(values)  # type: ignore[no-any-return]  # the registry is torch-free, hence untyped


def protocol_json(protocol: Protocol) -> dict[str, Any]:
    """A protocol as ``{"algorithm": ..., parameters}``."""
    return {"algorithm": type(protocol).__name__.lower(), **protocol.to_json()}


def protocol_from_json(description: Mapping[str, Any]) -> Protocol:
    """The protocol that :func:`protocol_json` described.

    Raises:
        UnknownName: If there is no such algorithm.
        InvalidParameter: If a parameter is unknown or outside its range.
    """
    if not isinstance(description, Mapping):
        raise InvalidInput(f"A protocol is described by names; got {shown(description)}.")
    values = dict(description)
    for key, value in values.items():
        if "algorithm" not in values and isinstance(value, str) and value.lower() in PROTOCOLS:
            raise InvalidParameter(
                f"The protocol has no key {shown(key)}; the learning algorithm stands under "
                f"'algorithm'. Write algorithm: {value.lower()}."
            )
    algorithm = values.pop("algorithm", "fedsgd")
    algorithm = algorithm.lower() if isinstance(algorithm, str) else algorithm
    if not isinstance(algorithm, str) or algorithm not in PROTOCOLS:
        raise UnknownName("learning algorithm", algorithm, PROTOCOLS)
    return PROTOCOLS[algorithm].from_json(values)


def _pack(fields: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors: dict[str, Tensor] = {}
    facts: dict[str, Any] = {}

    def put(path: str, group: Mapping[str, Tensor]) -> None:
        tensors.update({f"{path}/{name}": tensor for name, tensor in group.items()})

    def put_update(path: str, update: Update | None) -> Any:
        if update is None:
            return None
        content, description = update.pack()
        put(path, content)
        return description

    for name, value in fields.items():
        match name:
            case "rounds":
                facts[name] = []
                for number, seen in enumerate(value):
                    path = f"rounds/{number}"
                    put(f"{path}/state", seen.state)
                    put(f"{path}/payload", seen.payload)
                    put(f"{path}/key", seen.key)
                    facts[name].append(
                        {
                            "index": seen.index,
                            "cohort": seen.cohort,
                            "hidden_by": seen.hidden_by,
                            "update": put_update(f"{path}/update", seen.update),
                            "own": put_update(f"{path}/own", seen.own),
                        }
                    )
            case "num_examples" | "classes" | "target":
                facts[name] = int(value)
            case "input_shape" | "clients":
                facts[name] = list(value)
            case "box":
                facts[name] = value.to_json()
            case "protocol":
                facts[name] = protocol_json(value)
            case "defenses":
                facts[name] = [defense_json(defense) for defense in value]
            case "surrogate":
                put(name, {"images": value.images, "labels": value.labels})
                facts[name] = {"classes": list(value.classes), "name": value.name}
            case "distribution":
                put(name, vars(value))
                facts[name] = {}
            case "labels":
                put(name, {"labels": value})
                facts[name] = {}
            case "key" | "secrets":
                put(name, value)
                facts[name] = {}
            case "batch_bn":
                for layer, (mean, variance) in value.items():
                    put(name, {f"{layer}:mean": mean, f"{layer}:variance": variance})
                facts[name] = list(value)
            case "batch_order":
                put(name, {str(step): indices for step, indices in enumerate(value)})
                facts[name] = len(value)
            case "augmentation":
                facts[name] = list(value)
            case "dropout_masks":
                put(name, {f"{s}/{i}": t for s, step in enumerate(value)
                           for i, t in enumerate(step)})  # fmt: skip
                facts[name] = [len(step) for step in value]
    return tensors, facts


def _unpack(facts: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    groups = _groups(tensors)

    def take(path: str) -> dict[str, Tensor]:
        return dict(groups.get(path, {}))

    def take_update(path: str, description: Mapping[str, Any] | None) -> Update | None:
        return None if description is None else Update.unpack(take(path), description).check()

    fields: dict[str, Any] = {}
    for name, value in facts.items():
        match name:
            case "rounds":
                fields[name] = tuple(
                    RoundView(
                        index=seen["index"],
                        state=take(f"rounds/{number}/state"),
                        cohort=seen["cohort"],
                        update=take_update(f"rounds/{number}/update", seen["update"]),
                        hidden_by=seen["hidden_by"],
                        payload=take(f"rounds/{number}/payload"),
                        own=take_update(f"rounds/{number}/own", seen["own"]),
                        key=take(f"rounds/{number}/key"),
                    )
                    for number, seen in enumerate(value)
                )
            case "num_examples" | "classes" | "target":
                fields[name] = int(value)
            case "input_shape" | "clients":
                fields[name] = tuple(value)
            case "box":
                fields[name] = Box.from_json(value)
            case "protocol":
                fields[name] = protocol_from_json(value)
            case "defenses":
                fields[name] = tuple(defense_from_json(defense) for defense in value)
            case "surrogate":
                content = take(name)
                fields[name] = ImageSet(
                    images=content["images"],
                    labels=content["labels"],
                    classes=tuple(value["classes"]),
                    name=value["name"],
                )
            case "distribution":
                fields[name] = Distribution(**take(name))
            case "labels":
                fields[name] = take(name)["labels"]
            case "key" | "secrets":
                fields[name] = take(name)
            case "batch_bn":
                content = take(name)
                fields[name] = {
                    layer: (content[f"{layer}:mean"], content[f"{layer}:variance"])
                    for layer in value
                }
            case "batch_order":
                content = take(name)
                fields[name] = tuple(content[str(step)] for step in range(value))
            case "augmentation":
                fields[name] = tuple(map(int, value))
            case "dropout_masks":
                content = take(name)
                fields[name] = tuple(
                    tuple(content[f"{step}/{i}"] for i in range(count))
                    for step, count in enumerate(value)
                )
            case _:
                raise InvalidInput(f"A view has no field {shown(name)}.")
    return fields


def _groups(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Tensors under each of the paths that :func:`_pack` makes (three parts at most)."""
    groups: dict[str, dict[str, Tensor]] = {}
    for path, tensor in tensors.items():
        parts = path.split("/", 3)
        for depth in range(1, len(parts)):
            groups.setdefault("/".join(parts[:depth]), {})["/".join(parts[depth:])] = tensor
    return groups
