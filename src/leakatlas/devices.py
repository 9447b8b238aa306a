"""Where tensors live: the device that a person asked for, and those that this machine has."""

from __future__ import annotations

import torch

from leakatlas.errors import InvalidInput, UnknownName, shown

CPU = torch.device("cpu")

KINDS = ("auto", "cpu", "cuda", "mps")


def existing() -> list[str]:
    """The devices of this machine, by name."""
    found = ["cpu", *(f"cuda:{k}" for k in range(torch.cuda.device_count()))]
    return [*found, "mps"] if torch.backends.mps.is_available() else found


def chosen(name: str | torch.device) -> torch.device:
    """The device of that name, made to compute what the CPU computes.

    ``auto`` is a CUDA GPU if there is one, else the CPU. It is never ``mps``, which has no float64:
    closed forms and label rules that compute in it end there as errors. On CUDA, float32 is float32
    from here on (no TF32) and convolutions are deterministic: residuals are judged by their last
    digits, and a seed means the same every time.

    Raises:
        UnknownName: If there is no such kind of device.
        InvalidInput: If this machine does not have it; with those that it has.
    """
    if isinstance(name, torch.device) and name.type not in KINDS:
        return name  # of a backend that torch knows and its owner loaded
    text = str(name)
    kind, _, number = text.partition(":")
    if kind not in KINDS or (number and not (kind == "cuda" and number.isdecimal())):
        raise UnknownName("device", text, ["auto", *existing(), "cuda", "cuda:1", "mps"])
    there = existing()
    if kind == "auto":
        kind = "cuda" if "cuda:0" in there else "cpu"
    wanted = f"cuda:{int(number or 0)}" if kind == "cuda" else kind
    if wanted not in there:
        raise InvalidInput(
            f"There is no device {shown(text)} on this machine; it has: {', '.join(there)}. "
            "device auto takes what is there."
        )
    if kind == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cudnn.allow_tf32 = False
        torch.backends.cudnn.benchmark = False
        torch.backends.cudnn.deterministic = True
    return torch.device(wanted)


def in_words(device: torch.device) -> str:
    """A device for people: its name, and what it is where the system says so."""
    if device.type != "cuda":
        return str(device)
    return f"{device} ({torch.cuda.get_device_name(device)})"
