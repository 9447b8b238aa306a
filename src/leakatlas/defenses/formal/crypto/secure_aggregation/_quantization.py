"""From updates to bounded integers and back: what a ring can add without loss."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from leakatlas.defenses.formal.crypto.secure_aggregation._masking import Ring, Words
from leakatlas.errors import InvalidParameter
from leakatlas.fl import Update

MOST_LEVELS = 2**48
"""Finer steps than this vanish in the 53 bits of the floats that they come from."""


@dataclass(frozen=True)
class Header:
    """The public facts of an upload, by which the server knows what a masked vector holds.

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


def choose_levels(ring: Ring, clients: int, max_weight: int, asked: int | None) -> int:
    """Q: steps of the quantiser, such that no sum of weighted inputs leaves the ring.

    Args:
        ring: Where sums are taken.
        clients: n.
        max_weight: Largest integer weight of a client.
        asked: The Q that was asked for; None takes the largest one that fits.

    Raises:
        InvalidParameter: If n · max_weight · Q < R does not hold.
    """
    room = (2**ring.bits - 1) // (clients * max_weight)
    if asked is None:
        asked = min(room, MOST_LEVELS)
        asked -= asked % 2
    if not 2 <= asked <= room:
        raise InvalidParameter(
            f"SecureAggregation(levels={asked}, ring_bits={ring.bits}): the sum of {clients} "
            f"clients with weights up to {max_weight} would overflow; it needs clients * weight * "
            f"levels < 2^{ring.bits}, so at most {room} levels (and at least 2). Lower levels or "
            "max_examples, or use ring_bits=64."
        )
    return asked


def step_size(clip_range: float, levels: int) -> float:
    """Distance 2c/Q between neighbouring levels."""
    return 2.0 * clip_range / levels


def quantise(
    values: Tensor, clip_range: float, levels: int, generator: torch.Generator
) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """Clip to [-c, c] and round stochastically to multiples of the step; unbiased inside.

    0 stays 0: it lies on the grid, whatever is drawn.

    Args:
        values: ``(D,)`` float64.
        clip_range: c.
        levels: Q; results lie in [-Q/2, Q/2].
        generator: Of the rounding.
    """
    scaled = values.clamp(-clip_range, clip_range) / step_size(clip_range, levels)
    drawn = torch.rand(values.shape, generator=generator, dtype=torch.float64)
    most = levels // 2
    whole = torch.floor(scaled + drawn).clamp(-most, most)
    return np.asarray(whole.to(torch.int64).numpy())


def into_ring(integers: np.ndarray[tuple[int], np.dtype[np.int64]], ring: Ring) -> Words:
    """Signed integers as ring elements."""
    return integers.astype(ring.unsigned)


def from_ring(words: Words, ring: Ring) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """Ring elements as the signed integers next to 0."""
    return words.view(ring.signed).astype(np.int64)


def mean_of_sum(
    total: np.ndarray[tuple[int], np.dtype[np.int64]], weight: int, step: float
) -> Tensor:
    """The weighted mean ``(D,)`` float64 behind a sum of weighted integers."""
    return torch.from_numpy(total.astype(np.float64)) * (step / weight)


def word_tensor(words: Words, ring: Ring) -> Tensor:
    """Ring elements as a torch tensor with the same bits (torch adds no unsigned words)."""
    return torch.from_numpy(words.view(ring.signed).copy())


def tensor_words(tensor: Tensor, ring: Ring) -> Words:
    """The inverse of :func:`word_tensor`."""
    words: Words = tensor.cpu().numpy().view(ring.unsigned)
    return words


def threshold_count(fraction: float, clients: int) -> int:
    """t: the fraction of the cohort, rounded up; at least one client."""
    # 2/3 of 3 must not become 3 by the last bit of the product.
    return max(1, math.ceil(fraction * clients - 1e-9))
