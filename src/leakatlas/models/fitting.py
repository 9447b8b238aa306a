"""Checkpoints as trainers leave them, brought under a model's own names.

Wrappers put something before every name: Lightning ``model.`` or ``net.``, DataParallel
``module.``, ``torch.compile`` ``_orig_mod.``, Opacus ``_module.``; or the model that is audited is
itself inside a wrapper, and the checkpoint is not. Which prefix it is follows from the names, not
from a list of known wrappers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

from torch import Tensor, nn

from leakatlas.errors import InvalidInput

COUNTER = "num_batches_tracked"
"""What batch normalisation counts; checkpoints of old, and averaged ones, lack it."""


class Held(NamedTuple):
    """Tensors of a checkpoint.

    Args:
        state: By name.
        notes: What was done to get there, for people.
    """

    state: dict[str, Tensor]
    notes: tuple[str, ...] = ()


def fit_state(state: Mapping[str, Tensor], model: nn.Module, *, source: str) -> Held:
    """The tensors of a checkpoint by the names of a model, and what was done to their names.

    Args:
        state: As it was read.
        model: Whose parameters and buffers are wanted; its values stand for buffers that are never
            saved, and for counters that are missing.
        source: Where the state comes from, for messages.

    Raises:
        InvalidInput: If names or shapes do not fit, or two parts of the file would.
    """
    own = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    saved = set(model.state_dict())
    core = [name for name in own if name in saved and not name.endswith(COUNTER)]
    notes: list[str] = []
    for inner, outer in _prefixes(core, state):
        found = {n: outer + n.removeprefix(inner) for n in own}
        rest = [n for n in state if n.startswith(outer)]
        rest = sorted(set(rest) - {outer + n.removeprefix(inner) for n in saved})
        if rest and (outer or inner):
            continue  # a larger model, of which this one would be a part
        if rest:
            break
        if outer:
            notes.append(f"the names lost their prefix {outer!r}")
        if inner:
            notes.append(f"the names got the model's prefix {inner!r}")
        others = [n for n in state if not n.startswith(outer)]
        if others:
            notes.append(f"{len(others)} tensors were left out: {some(others)}")
        missing = [n for n in own if n in saved and found[n] not in state]
        if missing:
            notes.append(f"{len(missing)} counters of batch normalisation are missing in it")
        fitted = {n: state.get(held, own[n].detach()) for n, held in found.items()}
        _require_shapes(fitted, own, model, source)
        return Held(fitted, tuple(f"{source}: {note}" for note in notes))
    missing = sorted(name for name in core if name not in state)
    foreign = sorted(name for name in state if name not in saved)
    raise InvalidInput(
        f"{source}: not the weights of this {type(model).__name__}: missing {some(missing)}; not "
        f"in the model: {some(foreign)}. No common prefix of the names makes them fit."
    )


def _prefixes(core: list[str], state: Mapping[str, Tensor]) -> Iterator[tuple[str, str]]:
    """Pairs of what stands before all names of the model, and what before those in the file.

    Raises:
        InvalidInput: If two parts of the file would fit alike.
    """
    if not core:
        yield "", ""
        return
    telling = max(core, key=len)
    dots = [place + 1 for place, letter in enumerate(telling) if letter == "."]
    for inner in ("", *(telling[:dot] for dot in dots)):
        if not all(name.startswith(inner) for name in core):
            return
        ending = telling.removeprefix(inner)
        outers = {n.removesuffix(ending) for n in state if n.endswith(ending)}
        fits = sorted(
            outer for outer in outers
            if (not outer or outer.endswith("."))
            and all(outer + name.removeprefix(inner) in state for name in core)
        )  # fmt: skip
        if len(fits) > 1 and "" not in fits:
            raise InvalidInput(
                f"The weights would fit under each of {', '.join(map(repr, fits))}; save the part "
                "that is meant as a file of its own."
            )
        if fits:
            yield inner, fits[0]


def _require_shapes(
    fitted: Mapping[str, Tensor], own: Mapping[str, Tensor], model: nn.Module, source: str
) -> None:
    wrong = [name for name, tensor in fitted.items() if tensor.shape != own[name].shape]
    if wrong:
        one = wrong[0]
        more = f"; {len(wrong) - 1} more differ" if len(wrong) > 1 else ""
        raise InvalidInput(
            f"{source}: {one} has shape {tuple(fitted[one].shape)}; this {type(model).__name__} "
            f"expects {tuple(own[one].shape)}{more}. Build the model with the settings (classes, "
            "size, width) of the file."
        )


def some(names: list[str]) -> str:
    """The first three of many names.

    >>> some(["a", "b", "c", "d"])
    'a, b, c and 1 more'
    """
    first = ", ".join(names[:3]) or "nothing"
    return first + (f" and {len(names) - 3} more" if len(names) > 3 else "")
