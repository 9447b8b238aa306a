"""What everybody may know of an update whose values are hidden, and its values as one vector."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from leakatlas.fl import Update


@dataclass(frozen=True)
class Header:
    """The public facts of an upload, by which the server knows what a hidden vector holds.

    Args:
        template: The update with shapes and dtypes but no values; buffers as broadcast.
        device: Where its tensors were.
    """

    template: Update
    device: torch.device

    @property
    def weighted(self) -> bool:
        """Whether clients count by their examples (a sum of gradients counts once)."""
        return self.template.reduction == "mean"

    @property
    def size(self) -> int:
        """Entries of the vector, D."""
        return sum(part.numel() for part in self.parts())

    def layout(self) -> tuple[object, ...]:
        """What must agree between clients whose vectors are added."""
        t = self.template
        names = (*t.tensors, *(name for name, _ in self._buffers()))
        shapes = tuple(tuple(part.shape) for part in self.parts())
        return (t.kind, t.sign, t.scale, t.reduction, names, shapes)

    def parts(self) -> list[Tensor]:
        """The pieces of the vector, in order, as tensors without values."""
        return [*self.template.tensors.values(), *(buffer for _, buffer in self._buffers())]

    def _buffers(self) -> list[tuple[str, Tensor]]:
        # Counters of batches would tell how many examples a client has; they stay as broadcast.
        after = self.template.buffers_after.items()
        return [(name, b) for name, b in after if b.is_floating_point()]

    @classmethod
    def of(cls, update: Update) -> Header:
        """The header of a client's update."""
        device = next(iter(update.tensors.values())).device
        template = replace(
            update,
            tensors={n: t.to("meta") for n, t in update.tensors.items()},
            buffers_after={n: b.to("meta") for n, b in update.buffers_after.items()},
            num_examples=0,
        )
        return cls(template, device)

    def flatten(self, update: Update) -> Tensor:
        """All values in the header's order ``(D,)`` float64: tensors, then moves of buffers."""
        before = update.buffers_before
        moves = [
            update.buffers_after[name] - before[name]
            if name in before
            else update.buffers_after[name]
            for name, _ in self._buffers()
        ]
        parts = [update.tensors[name] for name in self.template.tensors] + moves
        return torch.cat([part.detach().cpu().double().reshape(-1) for part in parts])

    def unflatten(self, values: Tensor, examples: int, clients: int) -> Update:
        """The update whose values (:meth:`flatten`) are ``values``."""
        start = 0
        before = self.template.buffers_before

        def take(like: Tensor) -> Tensor:
            nonlocal start
            part = values[start : start + like.numel()]
            start += like.numel()
            return part.reshape(like.shape).to(like.dtype).to(self.device)

        tensors = {name: take(like) for name, like in self.template.tensors.items()}
        moves = {name: take(like) for name, like in self._buffers()}
        after = {n: before[n] + move if n in before else move for n, move in moves.items()}
        for name in self.template.buffers_after:
            if name not in after and name in before:
                after[name] = before[name]
        return replace(
            self.template,
            tensors=tensors,
            buffers_after=after,
            num_examples=examples,
            clients=clients,
        )
