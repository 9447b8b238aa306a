"""Files of a real FL system, made into a capture: what they are follows from what they hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from leakatlas import tensorfiles
from leakatlas.errors import InvalidInput, shown
from leakatlas.fl import Update, state_hash
from leakatlas.fl.capture import Capture, CapturedRound
from leakatlas.fl.naming import Arrays, by_name

HOW = (
    "Make one with safetensors.torch.save_file(model.state_dict(), PATH), torch.save("
    "[p.grad for p in model.parameters()], PATH), or numpy.savez(PATH, *arrays)."
)

Kind = Literal["gradient", "delta", "weights"]


def read_arrays(path: Path | str) -> Arrays:
    """Arrays of a safetensors, torch or npz file, by name or as a list; never code.

    Raises:
        InvalidInput: If the file is missing, damaged, or holds something else; with how to make it.
    """
    path = Path(path)
    who = f"The captured file {shown(str(path))}"
    if path.suffix == ".safetensors":
        return tensorfiles.read_safetensors(path, what="captured file")[0]
    if path.suffix == ".npz":
        arrays = tensorfiles.read_npz(path, what="captured file")
        if list(arrays) == [f"arr_{i}" for i in range(len(arrays))]:
            return list(arrays.values())
        return arrays
    found = tensorfiles.read_torch(path, what="captured file")
    while isinstance(found, Mapping) and not _tensors(found):
        inner = [
            value for value in found.values() if isinstance(value, Mapping) and _tensors(value)
        ]
        if len(inner) != 1:
            break
        (found,) = inner
    if isinstance(found, Mapping) and _tensors(found):
        return found
    if isinstance(found, Sequence) and not isinstance(found, str):
        return found
    raise InvalidInput(f"{who} holds a {type(found).__name__}, expected arrays. {HOW}")


def _tensors(found: Mapping[Any, Any]) -> bool:
    return bool(found) and all(isinstance(value, Tensor) for value in found.values())


def read_capture(
    paths: Sequence[Path | str],
    model: nn.Module,
    *,
    num_examples: int,
    kind: Kind | None = None,
    reduction: Literal["mean", "sum"] = "mean",
    sign: Literal[1, -1] = 1,
    scale: float = 1.0,
    clients: int = 1,
) -> Capture:
    """A round from the files of a real system, or several from captures of one each.

    Args:
        paths: Captures or updates of LeakAtlas, one round after the other; or one file of arrays;
            or two, the state before and the state after.
        model: Whose names these are. With one file, it holds the state that the client received.
        num_examples: Examples behind the update, as the client reported them.
        kind: What one file holds; found out if None.
        reduction: Over examples, for a gradient.
        sign: -1 if the descent direction was sent.
        scale: A positive factor that was applied.
        clients: How many clients were averaged into it.

    Raises:
        InvalidInput: If the files do not fit the model, or it is not clear what they hold.
    """
    if len(paths) > 1 and all(_is_ours(path) for path in paths):
        return Capture.of_rounds([Capture.load(path) for path in paths])
    if len(paths) == 2:
        before, after = (read_arrays(path) for path in paths)
        update = Update.from_arrays(
            before, after, model, num_examples=num_examples, clients=clients
        )
        start = by_name(before, model, "state before")
        note = f"two states, {start.order}: the update is their difference"
        received = {**start.parameters, **start.buffers}
        return Capture(
            rounds=(CapturedRound(update=update, received=received, cohort=clients),), notes=(note,)
        )
    if len(paths) != 1:
        raise InvalidInput(
            "Give one file (an update), two (the state before and the state after), or captures "
            f"of rounds in order, got {len(paths)} files that are no captures."
        )
    path = Path(paths[0])
    if _is_ours(path):
        return Capture.load(path)
    named = by_name(read_arrays(path), model, "captured file")
    chosen = kind or _kind(named.parameters, bool(named.buffers), model)
    own = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    received = {name: tensor.detach().clone() for name, tensor in own.items()}
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    update = Update(
        tensors={n: t for n, t in named.parameters.items() if n in trained},
        kind=chosen,
        state_hash=state_hash(received) if chosen == "weights" else "",
        num_examples=num_examples,
        sign=sign,
        scale=scale,
        reduction=reduction,
        buffers_after=named.buffers,
        clients=clients,
    ).check()
    found_out = "" if kind else " (found out from the values)"
    note = f"one file, {named.order}, of kind {chosen}{found_out}"
    one = CapturedRound(update=update, received=received, cohort=clients)
    return Capture(rounds=(one,), notes=(note,))


def _is_ours(path: Path | str) -> bool:
    """Whether a file is a capture or an update that LeakAtlas wrote."""
    if Path(path).suffix != ".safetensors":
        return False
    texts = tensorfiles.read_safetensors(path, what="captured file")[1]
    return bool({"leakatlas.capture", "leakatlas.update"} & texts.keys())


def _kind(tensors: Mapping[str, Tensor], with_buffers: bool, model: nn.Module) -> Kind:
    """Weights lie near the received ones; gradients and deltas near zero, which look alike."""
    own = dict(model.named_parameters())
    apart = sum(float((t - own[n].detach()).double().square().sum()) for n, t in tensors.items())
    size = sum(float(own[n].detach().double().square().sum()) for n in tensors)
    if with_buffers or apart < 0.25 * size:
        return "weights"
    raise InvalidInput(
        "It is not clear what the captured file holds: its values are not near the model's "
        "weights. Say kind='gradient', 'delta' or 'weights' (--kind), or give two files, the state "
        "before and the state after."
    )
