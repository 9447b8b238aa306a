"""Everything an adversary holds: what its threat model and grants give, and nothing else.

The fields and who gives them stand in :mod:`leakatlas.fl.granted`; here is what follows from them:
the received model, the client's computation as far as it is known, the adversary's rehearsals.
The loss goes with the architecture, as it does wherever a model is handed out to be trained.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn

from leakatlas import reading
from leakatlas.data import ImageSet
from leakatlas.errors import NotGranted, UnsupportedModel, shown
from leakatlas.fl import draws, rehearsal, replay, state, unrolled, viewfile
from leakatlas.fl.augmentation import augmented
from leakatlas.fl.granted import SOURCES, Distribution, Granted, RoundView
from leakatlas.fl.hooks import Defense
from leakatlas.fl.losses import PLAIN, Loss, loss_json
from leakatlas.fl.plain import (
    defense_from_json,
    defense_json,
    protocol_from_json,
    protocol_json,
)
from leakatlas.fl.protocol import FedAVG, FedSGD, Protocol
from leakatlas.fl.state import ModelRef
from leakatlas.fl.update import Update
from leakatlas.threat import Grant, Vantage

__all__ = [
    "SOURCES",
    "Distribution",
    "RoundView",
    "View",
    "defense_from_json",
    "defense_json",
    "protocol_from_json",
    "protocol_json",
]


class View(Granted):
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
        super().__init__(letter, vantage, grants, fields)
        self._architecture = architecture
        self._model_ref = model_ref
        self._loss = loss
        self._architecture_defenses = tuple(architecture_defenses)
        state.require_finite(state.held(architecture), architecture, "The model of the view")
        for seen in self._fields.get("rounds", ()):
            who = f"The state received in round {seen.index}"
            state.require_finite(seen.state, architecture, who)

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
            return copy.deepcopy(self._architecture)
        own = state.held(self._architecture)
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
        last = round in (-1, len(self.rounds) - 1)  # of the last round only are secrets kept
        secrets = self.secrets if defenses and last and self.has("secrets") else {}
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
                secrets=secrets,
                drawn=drawn if isinstance(drawn, str) else drawn[0],
            )
        return replay.client(
            model,
            protocol,
            update,
            defenses=defenses,
            secrets=secrets,
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
        return "mean" if draws.draws_anything(model, probe) else "new"

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

    def beside(self, client: int, round: int) -> View:
        """The same server, had another client been the target of one round that it took part in.

        What was granted about the target's batch is absent.

        Args:
            client: Whose update; one of :attr:`others`.
            round: Which round.

        Raises:
            NotGranted: If that client's update was not seen.
        """
        update = self.others[round].get(client)
        if update is None:
            seen = ", ".join(map(str, self.others[round])) or "none"
            raise NotGranted(f"Round {round} shows no update of client {client}; it shows: {seen}.")
        gone = rehearsal.OWN | rehearsal.GONE | {"others", "target"}
        fields = {n: v for n, v in self._fields.items() if n not in gone}
        fields["rounds"] = (replace(self.rounds[round], update=update),)
        fields["num_examples"] = update.num_examples
        return self._copy(fields)

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
        tensors, facts = viewfile.pack(self._fields)
        text = json.dumps(
            [self.describe(), facts, loss_json(self._loss), state.state_hash(tensors)],
            sort_keys=True,
        )
        return hashlib.sha256(text.encode()).hexdigest()

    def save(self, folder: Path | str) -> None:
        """Write ``view.json`` and ``view.safetensors``; no code, no pickle, no private tensor."""
        description = {
            "letter": self.letter,
            "vantage": self.vantage.value,
            "grants": sorted(grant.value for grant in self.grants),
            "model": self._model_ref.to_json(),
            "loss": loss_json(self._loss),
            "architecture_defenses": [defense_json(d) for d in self._architecture_defenses],
            "read_before": sorted(self._read_before),
        }
        viewfile.write(Path(folder), description, self._fields, self._architecture)

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
        description, tensors = viewfile.read(folder)
        who = f"The view in {shown(str(folder))}"
        with reading.boundary(who, LookupError, TypeError, AttributeError, RuntimeError):
            if device is not None:
                tensors = {name: tensor.to(device) for name, tensor in tensors.items()}
            view = cls(
                **viewfile.rebuild(
                    description, tensors,
                    model=model, loss=loss, trust_code=trust_code, device=device,
                )
            )  # fmt: skip
            view.remember(frozenset(description["read_before"]))
            return view
