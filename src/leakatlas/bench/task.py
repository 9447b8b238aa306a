"""What a harness asks of an attack's process, and what comes back.

The way there may carry code: the attack itself and, for a user's own model, its architecture; the
harness is trusted. The way back is plain data, checked on arrival: an attack must not be able to
run anything in the process that holds the truth.
"""

from __future__ import annotations

import base64
import copy
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, TypeVar

import cloudpickle
import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors.torch import save_file
from torch import Tensor

import leakatlas.errors
from leakatlas import devices, tensorfiles
from leakatlas.attacks.api import Attack, Reconstruction, cache_folder
from leakatlas.bench.adversary import Here, Request, Turn
from leakatlas.bench.child import Message
from leakatlas.blocks.watch import Conduct, Execution, Trail, Watch
from leakatlas.errors import AttackCrashed, InvalidInput, LeakAtlasError
from leakatlas.fl import Stage, Tampering, View
from leakatlas.fl.losses import PythonLoss

VIEW = "view"
CODE = "code.pickle"
FOUND = "found.safetensors"
SENT = "sent.safetensors"
LOADED = "leakatlas_user_"
"""How :func:`leakatlas.fl.factory.find` calls the modules that it makes of people's files."""
TENSORS = ("images", "labels", "label_counts", "confidence")


# -- the way there -------------------------------------------------------------------------------


def code_of(stage: Stage) -> bytes | None:
    """The code without which a view of this stage cannot be read elsewhere; None if it needs none.

    A user's own model and loss travel as objects of trusted code. Of the model only the
    architecture does: its parameters and buffers are blanked here, and filled over there from the
    received state that the view holds.

    Raises:
        InvalidInput: If the model cannot travel, or holds one of the victims' images.
    """
    loss = stage.scenario.protocol.loss
    plain = not isinstance(loss, PythonLoss)
    if stage.scenario.model.kind == "builtin" and plain:
        return None
    model = copy.deepcopy(stage.federation.base_model)
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            tensor.zero_()
    name = type(model).__name__
    try:
        with _by_value():
            blob: bytes = cloudpickle.dumps((model, None if plain else loss))
    except (TypeError, AttributeError, ValueError, cloudpickle.pickle.PicklingError) as problem:
        raise InvalidInput(
            f"The model {name} cannot be sent to the attack's process ({problem}). Describe it as "
            "'file.py:factory', or attack it in this process (in_process=True)."
        ) from None
    for images in stage.victims.values():
        x = stage.box.normalize(images.images)
        if any(row.numpy().tobytes() in blob for part in (images.images, x) for row in part):
            raise InvalidInput(
                f"The model {name} holds one of the private images (a module that remembers its "
                "inputs?), so it cannot be shown to an adversary; pass a fresh one."
            )
    return blob


@contextmanager
def _by_value() -> Iterator[None]:
    """Within the block, what was loaded from a ``file.py`` travels itself.

    Over there nobody finds it by the name of its module, which no import knows.
    """
    loaded = [module for name, module in sys.modules.items() if name.startswith(LOADED)]
    for module in loaded:
        cloudpickle.register_pickle_by_value(module)
    try:
        yield
    finally:
        for module in loaded:
            cloudpickle.unregister_pickle_by_value(module)


def asked(
    what: Literal["tamper", "attack"],
    request: Request,
    folder: Path,
    *,
    memory: float | None,
    device: str = "cpu",
) -> Message:
    """Save the view and its code into ``folder``, and the message about them.

    What may be large lies in files: a pipe would keep the harness waiting until it is read.

    ``device`` is where the attack computes, as its process numbers devices.
    """
    request.view.save(folder / VIEW)
    # Its class and its parameters: what it noted on itself beside the truth stays here.
    attack = type(request.attack).from_json(request.attack.to_json())
    conduct, draws, code = request.watch.conduct, request.draws, request.code
    checkpoints = conduct.checkpoints
    if code is not None:
        (folder / CODE).write_bytes(code)
    return {
        "do": what,
        "attack": _text(cloudpickle.dumps(attack)),
        "code": code is not None,
        "path": [os.path.abspath(entry) for entry in sys.path],
        "seed": request.seed,
        "turn": request.turn,
        "draws": None if draws is None else _text(draws.numpy().tobytes()),
        "seconds": request.watch.remaining(),
        "execution": conduct.execution,
        "trail": conduct.trail is not None,
        "checkpoints": None if checkpoints is None else str(checkpoints.resolve()),
        "memory": memory,
        "device": device,
        "cache": str(cache_folder().resolve()),
        "threads": torch.get_num_threads(),
    }


def files_of(folder: Path) -> dict[str, bytes]:
    """What :func:`asked` saved as bytes, for a process that does not share this machine's files."""
    held = {f"{VIEW}/{path.name}": path for path in sorted((folder / VIEW).iterdir())}
    code = folder / CODE
    held |= {CODE: code} if code.is_file() else {}
    return {name: path.read_bytes() for name, path in held.items()}


# -- over there ----------------------------------------------------------------------------------


def perform(
    message: Message, folder: Path, *, listen: Callable[[float, str], None], parent: Watch
) -> Message:
    """Do what was asked, with the view in ``folder``; answers lie there too.

    Whatever is not one of our own errors ends the process: the harness reads how.
    """
    execution: Execution = message["execution"]
    checkpoints = message["checkpoints"]
    watch = Watch(
        message["seconds"],
        listen,
        parent=parent,
        conduct=Conduct(
            execution=execution,
            checkpoints=None if checkpoints is None else Path(checkpoints),
            trail=Trail() if message["trail"] else None,
        ),
    )
    # What was imported over here after that process began, as beside a model's file, is found too.
    sys.path += [entry for entry in message["path"] if entry not in sys.path]
    attack: Attack = cloudpickle.loads(_bytes(message["attack"]))
    model, loss = (
        cloudpickle.loads((folder / CODE).read_bytes()) if message["code"] else (None, None)
    )
    try:
        device = devices.chosen(message["device"])
        view = View.load(folder / VIEW, model=model, loss=loss, device=device)
        state = message["draws"]
        request = Request(
            attack=attack, view=view, seed=message["seed"], watch=watch, turn=message["turn"],
            draws=None if state is None else _state(state),
        )  # fmt: skip
        if message["do"] == "tamper":
            turn = Here().tamper(request)
            if turn.tampering is not None:
                turn.tampering.save(folder / SENT)
            return {
                "sent": turn.tampering is not None,
                "draws": _text(turn.draws.numpy().tobytes()),
                "reads": sorted(turn.reads),
                "cut_short": turn.cut_short,
                "planned": turn.planned,
            }
        found = Here().attack(request)
    except LeakAtlasError as refusal:
        return {"refused": type(refusal).__name__, "message": str(refusal)}
    held = {name: tensor for name in TENSORS if (tensor := getattr(found, name)) is not None}
    trail = watch.conduct.trail
    if trail is not None and trail.points:
        held |= {"trail": torch.stack([x for _, x in trail.points])}
    save_file({n: t.detach().cpu().clone().contiguous() for n, t in held.items()}, folder / FOUND)
    return {
        "status": found.status,
        "reason": found.reason,
        "notes": {name: float(value) for name, value in found.notes.items()},
        "seconds": found.seconds,
        "execution": found.execution,
        "reads": sorted(found.reads),
        "cut_short": watch.cut_short,
        "trail": [] if trail is None else [seconds for seconds, _ in trail.points],
        "planned": watch.planned,
    }


# -- the way back --------------------------------------------------------------------------------


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


T = TypeVar("T", bound=_Strict)


class _Turn(_Strict):
    sent: bool
    draws: str
    reads: tuple[str, ...]
    cut_short: bool
    planned: tuple[int, int] | None


class _Found(_Strict):
    status: Literal["complete", "cut short", "failed"]
    reason: str
    notes: dict[str, float]
    seconds: float
    execution: str
    reads: tuple[str, ...]
    cut_short: bool
    planned: tuple[int, int] | None
    trail: tuple[float, ...] = ()


def turn_of(answer: Message, folder: Path) -> Turn:
    """The turn behind an answer.

    Raises:
        LeakAtlasError: The refusal that was answered.
        AttackCrashed: If the answer is not one.
    """
    facts = _checked(answer, _Turn)
    sent = Tampering.load(folder / SENT) if facts.sent else None
    return Turn(sent, _state(facts.draws), frozenset(facts.reads), facts.cut_short, facts.planned)


def found_of(answer: Message, folder: Path, view: View, watch: Watch) -> Reconstruction:
    """The reconstruction behind an answer; its candidates fit the view's inputs.

    Raises:
        LeakAtlasError: The refusal that was answered.
        AttackCrashed: If the answer is not one.
    """
    facts = _checked(answer, _Found)
    held = tensorfiles.read_safetensors(folder / FOUND, what="answer of the attack")[0]
    reads = frozenset(facts.reads)
    way = held.pop("trail", held["images"].new_empty(0)) if "images" in held else None
    if way is None or set(held) - set(TENSORS):
        raise AttackCrashed(f"The attack answered with {sorted(held)} in place of its tensors.")
    shape = tuple(held["images"].shape[1:])
    if shape != tuple(view.input_shape):
        raise AttackCrashed(f"The attack answered with images of shape {shape}.")
    if len(way) != len(facts.trail) or (len(way) and tuple(way.shape[2:]) != shape):
        raise AttackCrashed(f"The attack answered with iterates of shape {tuple(way.shape)}.")
    if watch.conduct.trail is not None:
        watch.conduct.trail.points = list(zip(facts.trail, way, strict=True))
    if facts.cut_short:
        watch.cut()
    if facts.planned is not None:
        watch.shortened(*facts.planned)
    return Reconstruction(
        images=held["images"],
        labels=held.get("labels"),
        label_counts=held.get("label_counts"),
        confidence=held.get("confidence"),
        status=facts.status,
        reason=facts.reason,
        notes=facts.notes,
        seconds=facts.seconds,
        execution=facts.execution,
        reads=reads,
    )


def _checked(answer: Message, schema: type[T]) -> T:
    if "refused" in answer:
        raise _error(str(answer["refused"]), str(answer.get("message", "")))
    try:
        return schema.model_validate(answer)
    except ValidationError as problem:
        first = problem.errors()[0]
        raise AttackCrashed(
            f"The attack's answer is malformed at {first['loc']}: {first['msg']}."
        ) from None


def _error(name: str, message: str) -> LeakAtlasError:
    """An error of ours by its name, as it was raised over there."""
    cls = getattr(leakatlas.errors, name, LeakAtlasError)
    if not (isinstance(cls, type) and issubclass(cls, LeakAtlasError)):
        cls = LeakAtlasError
    error = cls.__new__(cls)
    error.args = (message,)
    return error


def _text(content: bytes) -> str:
    return base64.b64encode(content).decode("ascii")


def _bytes(text: str) -> bytes:
    return base64.b64decode(text)


def _state(text: str) -> Tensor:
    return torch.frombuffer(bytearray(_bytes(text)), dtype=torch.uint8)
