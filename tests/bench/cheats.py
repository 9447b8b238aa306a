"""Attacks that invert nothing: they look for the private batch where they run."""

from __future__ import annotations

import contextlib
import gc
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from leakatlas.attacks.api import Attack, Outlook, Reconstruction, attack, nothing_found
from leakatlas.blocks.watch import Watch
from leakatlas.fl import View
from leakatlas.threat import Knowledge


def images_among(found: Iterator[object], shape: tuple[int, ...]) -> Reconstruction:
    """Whatever has the shape of images, as candidates."""
    # By exact type: asking some objects for their class runs code, and what other tests leave in
    # this process (lazy parameters, tensors of a pretended device) holds no images to read.
    known = (cast(Tensor, t) for t in found if type(t) in (Tensor, nn.Parameter))
    tensors = [t for t in known if t.dim() == 4 and t.shape[1:] == shape]
    if not tensors:
        return nothing_found(shape, "there is nothing to steal")
    images = torch.cat([t.detach().double() for t in tensors])
    return Reconstruction(images=images[torch.isfinite(images).flatten(1).all(dim=1)])


@attack("snoop", needs=Knowledge.UPDATES)
@dataclass(frozen=True, kw_only=True)
class Snoop(Attack):
    """Every object that the garbage collector knows, and the variables of every frame."""

    def run(self, view: View, *, generator: torch.Generator, watch: Watch) -> Reconstruction:
        del generator, watch

        def everything() -> Iterator[object]:
            yield from gc.get_objects()
            for frame in list(sys._current_frames().values()):
                while frame is not None:
                    yield from list(frame.f_locals.values())
                    frame = frame.f_back  # type: ignore[assignment]  # None ends the loop

        return images_among(everything(), tuple(view.input_shape))


@attack("burglar", needs=Knowledge.UPDATES)
@dataclass(frozen=True, kw_only=True)
class Burglar(Attack):
    """Every tensor file below the folders that it is told of.

    Those are the working folder, the temporary one, what stands in its arguments, and where the
    files lie that it was born with open.
    """

    def run(self, view: View, *, generator: torch.Generator, watch: Watch) -> Reconstruction:
        del generator, watch
        words = [".", *sys.argv, os.environ.get("TMPDIR", "."), os.environ.get("PWD", ".")]
        told = {Path(word).resolve() for word in words if os.sep in word or word == "."}
        for descriptor in Path("/proc/self/fd").glob("*"):
            told |= {Path(os.readlink(descriptor)).parent} if descriptor.exists() else set()

        def stolen() -> Iterator[object]:
            for place in told:
                # A walk steps over folders that vanish meanwhile; other tests make and remove many.
                for folder, _, files in os.walk(place):
                    for file in (name for name in files if name.endswith(".safetensors")):
                        with contextlib.suppress(SafetensorError, OSError):
                            yield from load_file(Path(folder) / file).values()

        return images_among(stolen(), tuple(view.input_shape))


@attack("scout", needs=Knowledge.UPDATES)
@dataclass(frozen=True, kw_only=True)
class Scout(Snoop):
    """Snoops when it is asked for its outlook, and keeps what it found on itself."""

    def outlook(self, view: View) -> Outlook:
        found = Snoop.run(self, view, generator=torch.Generator(), watch=Watch())
        object.__setattr__(self, "loot", found)
        return Outlook("unknown", "we shall see")

    def run(self, view: View, *, generator: torch.Generator, watch: Watch) -> Reconstruction:
        del generator, watch
        kept = vars(self).get("loot")
        if not isinstance(kept, Reconstruction):
            return nothing_found(tuple(view.input_shape), "nothing was kept")
        return kept
