"""Adapters as they travel: the capture of a client that shares its PEFT adapter alone (``peft``).

The base model stays where it is, so an update is small and names no base weight. A capture of it
is an update of the parameters that were trained, at a received state that both sides hold; what it
means for an adversary is said in words (:func:`described`).

At the first round of LoRA the up-projection B is zero: the gradient of the down-projection A is
then exactly zero, and everything that leaks does so through B and what is trained in full
(``modules_to_save``, a head).

Source: ``peft.get_peft_model_state_dict`` of peft 0.21.2, which leaves the adapter's name out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from torch import Tensor

from leakatlas.errors import InvalidInput, shown
from leakatlas.fl.capture import Capture, CapturedRound
from leakatlas.fl.state import model_state
from leakatlas.fl.update import Update


def adapter_state(model: PeftModel) -> dict[str, Tensor]:
    """Copies of what a client of this model sends, by PEFT's names."""
    return {n: t.detach().clone() for n, t in get_peft_model_state_dict(model).items()}


def capture(
    model: PeftModel,
    received: Mapping[str, Any],
    sent: Mapping[str, Any],
    *,
    examples: int,
) -> Capture:
    """What audits take: an update of the adapter, at the state that the client trained from.

    Args:
        model: Base and adapter; the base's values are the state that both sides hold.
        received: The adapter as it arrived, by PEFT's names.
        sent: The adapter as it left, by PEFT's names.
        examples: Behind it.

    Raises:
        InvalidInput: If an array is not this adapter's.
    """
    names = _own_names(model)
    before, after = (_renamed(arrays, names) for arrays in (received, sent))
    if missing := sorted(set(before) ^ set(after)):
        raise InvalidInput(
            f"The adapter received and the one sent are not the same: {missing[0]} is in one only."
        )
    moved = {n: (after[n] - before[n]) for n in after}
    update = Update(tensors=moved, kind="delta", state_hash="", num_examples=examples).check()
    state = {**model_state(model), **before}
    one = CapturedRound(update=update, received=state)
    return Capture(rounds=(one,), notes=(f"payload: adapter. {described(model)}",))


def described(model: PeftModel) -> str:
    """What of the model travels, in a sentence."""
    kinds = {str(c.peft_type.value) for c in model.peft_config.values()}
    sent = get_peft_model_state_dict(model)
    numbers = sum(t.numel() for t in sent.values())
    whole = sum(p.numel() for p in model.parameters())
    full = sorted({n for n in sent if not any(word in n for word in ("lora_", "ia3_"))})
    beside = f"; trained in full beside it: {', '.join(full[:4])}" if full else ""
    return (
        f"{', '.join(sorted(kinds))} adapter of {numbers:,} of {whole:,} numbers "
        f"({numbers / whole:.1%}); the base model does not travel{beside}"
    )


def shared(model: PeftModel) -> tuple[str, ...]:
    """Patterns for ``FedAVG(shared=...)`` and ``FedSGD(shared=...)``: the adapter alone."""
    return tuple(sorted(_own_names(model).values()))


def _own_names(model: PeftModel) -> dict[str, str]:
    """The model's own parameter names by PEFT's names of what travels.

    Identity decides: both name the same numbers in memory.
    """
    by_place = {p.data_ptr(): name for name, p in model.named_parameters()}
    return {
        name: by_place[tensor.data_ptr()]
        for name, tensor in get_peft_model_state_dict(model).items()
        if tensor.data_ptr() in by_place
    }


def _renamed(arrays: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Tensor]:
    if unknown := [name for name in arrays if name not in names]:
        raise InvalidInput(
            f"The adapter has no {shown(unknown[0])}; it has: {', '.join(list(names)[:4])}."
        )
    return {names[name]: torch.as_tensor(array) for name, array in arrays.items()}
