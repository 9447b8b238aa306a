"""What a malicious server may change in a model, as data: a closed list of blocks in front of it.

An edit is a frozen recipe: a few numbers and tensors. The *client* builds the layers from it, so
nothing that a server made can run on a device: no hook, no closure, no module that records what it
sees. The layers' parameters are addressed by name (``block.first.weight``), and a read-out never
needs the modules. Changed values of the agreed parameters are no edits; see
:class:`~leakatlas.fl.tampering.TamperedModel`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from leakatlas import limits
from leakatlas.errors import InvalidInput
from leakatlas.params import Configured, NonNegativeInt, Positive, PositiveInt, Real

Form = Literal["cumulative", "sparse"]
Connection = Literal["linear", "addition"]


@dataclass(frozen=True)
class Edit(Configured, ABC):
    """A block that the input passes before it meets the model; it keeps the input's shape."""

    @property
    @abstractmethod
    def pixels(self) -> int:
        """Entries n = C H W of one input."""

    @abstractmethod
    def layers(self) -> nn.Module:
        """The block, freshly built: ``(N, C, H, W)`` to the same shape."""


class Imprinted(nn.Module):
    """A model behind an inserted block.

    Args:
        block: Maps ``(N, C, H, W)`` to the same shape.
        model: The benign model.
    """

    def __init__(self, block: nn.Module, model: nn.Module) -> None:
        super().__init__()
        self.block = block
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        """Logits of the model on the block's output."""
        logits: Tensor = self.model(self.block(x))
        return logits


# -- binning layers --------------------------------------------------------------------------------


def binning_rows(w: Tensor, edges: Tensor, form: Form) -> tuple[Tensor, Tensor]:
    """Weights ``(k, n)`` and biases ``(k,)`` of a layer that bins ``h(x) = <w, x>``.

    Args:
        w: ``(n,)``.
        edges: ``(k + 1,)`` rising.
        form: ``cumulative``: row i is ``h - c_i``, for a ReLU. ``sparse``: row i is
            ``(h - c_i) / (c_{i+1} - c_i)``, for a hard tanh on [0, 1], so that an input inside the
            outer edges has a gradient through the row of its own bin only.

    Returns:
        The cumulative rows are one row seen k times, and take no memory of their own.
    """
    edges = edges.to(w)
    low = edges[:-1]
    if form == "cumulative":
        return w.expand(len(low), -1), -low
    width = edges.diff()
    return w / width[:, None], -low / width


def mean_activation(edges: Tensor, form: Form) -> float:
    """What all binning neurons add up to, on average over equally likely inner bins."""
    low, high = edges[:-1], edges[1:]
    h = (low + high)[1:-1] / 2 if len(low) > 2 else (low + high) / 2
    if form == "cumulative":
        total = (h[:, None] - low[None, :]).clamp(min=0).sum(dim=1)
    else:
        total = ((h[:, None] - low) / (high - low)).clamp(0, 1).sum(dim=1)
    return float(total.mean())


@dataclass(frozen=True)
class Imprint(Edit):
    """``y = W2 act(W1 x + b1) + b2``, back in the shape of the input.

    Args:
        w: ``(n,)`` the measurement.
        edges: ``(k + 1,)`` rising.
        form: ReLU (cumulative) or hard tanh (sparse).
        connection: ``linear`` passes y on, ``addition`` passes ``x + y``.
        gain: W1 and b1 are multiplied by it, W2 is divided by it.
        spread: All entries of W2 are one value, chosen so that an average input gives ``y + 1`` =
            ``spread``; None for ``1 / gain``, as released, which drives the model behind to
            saturation.

    Raises:
        InvalidInput: If the edges do not rise, or a shape is another.
    """

    w: Tensor
    edges: Tensor
    form: Form = "cumulative"
    connection: Connection = "linear"
    gain: Positive = 1.0
    spread: Positive | None = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_bins(self)

    @property
    def pixels(self) -> int:
        """Entries of one input."""
        return len(self.w)

    def layers(self) -> ImprintLayers:
        """The block."""
        return ImprintLayers(self)


class ImprintLayers(nn.Module):
    """The layers of an :class:`Imprint`."""

    def __init__(self, edit: Imprint) -> None:
        super().__init__()
        w, edges, form, gain = edit.w, edit.edges, edit.form, edit.gain
        self.form: Form = form
        self.ceiling = gain  # the hard tanh saturates where 1 would be without gain
        self.connection: Connection = edit.connection
        weight, bias = binning_rows(w, edges, form)
        total = mean_activation(edges, form)
        column = 1.0 / gain if edit.spread is None else edit.spread / (gain * total)
        self.first = _unset(*weight.shape, like=w)
        with torch.no_grad():
            torch.mul(weight, gain, out=self.first.weight)
            torch.mul(bias, gain, out=self.first.bias)
        # Equal columns: every active row then has the same delta, and differences of rows cancel.
        self.second = _constant(len(w), len(edges) - 1, column, -column * gain * total, like=w)

    def forward(self, x: Tensor) -> Tensor:
        """``(N, C, H, W)`` to ``(N, C, H, W)``."""
        z = self.first(x.flatten(1))
        hidden = F.relu(z) if self.form == "cumulative" else F.hardtanh(z, 0.0, self.ceiling)
        y: Tensor = self.second(hidden).reshape(x.shape)
        return x + y if self.connection == "addition" else y


@dataclass(frozen=True)
class SplitImprint(Edit):
    """An imprint behind a convolution that gives every client columns of its own.

    Client j's copy has non-zero kernels only in its own group of channels, where they copy the
    input times ``kappa``, and non-zero weights of the first linear layer only in the columns that
    those channels feed. The gradient of the other columns is zero, and stays zero through all
    local steps, so a sum over clients keeps them apart.

    Args:
        w: ``(n,)`` the measurement.
        edges: ``(k + 1,)`` rising.
        shape: ``(C, H, W)``.
        clients: Number of groups.
        group: Which group this copy uses.
        kappa: Convolutional scaling factor: images times kappa, weights over kappa.
        anchor: Whether every group has one more channel, which is constant (``kappa``) and takes
            no part in the forward pass: its column sums the deltas of one client alone.
        spread: As in :class:`Imprint`.
        connection: As in :class:`Imprint`.
        std: Per channel, a factor on what the kernels copy; 1 if None.
        mean: Per channel, what they add; 0 if None. With the box's own two, a normalisation is
            undone.

    Raises:
        InvalidInput: If the edges do not rise, or a shape is another.
    """

    w: Tensor
    edges: Tensor
    shape: tuple[PositiveInt, PositiveInt, PositiveInt]
    clients: PositiveInt
    group: NonNegativeInt
    kappa: Positive
    anchor: bool = False
    spread: Positive = 1.0
    connection: Connection = "linear"
    std: tuple[Positive, ...] | None = None
    mean: tuple[Real, ...] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_bins(self)
        channels = self.shape[0]
        if len(self.w) != math.prod(self.shape) or self.group >= self.clients:
            raise InvalidInput(
                f"SplitImprint(shape={self.shape}, clients={self.clients}, group={self.group}): "
                f"expected a group below clients and w of {math.prod(self.shape)} entries, got "
                f"{len(self.w)}."
            )
        for name, values in (("std", self.std), ("mean", self.mean)):
            if values is not None and len(values) != channels:
                raise InvalidInput(
                    f"SplitImprint({name}=...): expected {channels} values, one a channel, got "
                    f"{len(values)}."
                )

    @property
    def pixels(self) -> int:
        """Entries of one input."""
        return len(self.w)

    def layers(self) -> SplitImprintLayers:
        """The block."""
        return SplitImprintLayers(self)


class SplitImprintLayers(nn.Module):
    """The layers of a :class:`SplitImprint`."""

    def __init__(self, edit: SplitImprint) -> None:
        super().__init__()
        w, edges, kappa = edit.w, edit.edges, edit.kappa
        channels, height, width = edit.shape
        self.connection: Connection = edit.connection
        own = channels + int(edit.anchor)
        n, k = len(w), len(edges) - 1
        start = edit.group * own
        limits.require_memory(
            f"SplitImprint(clients={edit.clients:,})",
            float(own * edit.clients * (k * height * width + 9 * channels) * w.element_size()),
            f"{edit.clients:,} clients x {own} channels x ({k:,} bins x {height} x {width} pixels "
            f"+ 9 x {channels}) x {w.element_size()} bytes",
        )
        self.conv = nn.utils.skip_init(
            nn.Conv2d, channels, own * edit.clients, 3, padding=1, dtype=w.dtype, device=w.device
        )
        bias = self.conv.bias
        assert bias is not None
        std, mean = edit.std or (1.0,) * channels, edit.mean or (0.0,) * channels
        with torch.no_grad():
            self.conv.weight.zero_()
            bias.zero_()
            for c in range(channels):
                self.conv.weight[start + c, c, 1, 1] = kappa * std[c]
                bias[start + c] = kappa * mean[c]
            if edit.anchor:
                bias[start + channels] = kappa
        weight, threshold = binning_rows(w, edges.to(w), "sparse")
        area = height * width
        self.first = _unset(k, own * edit.clients * area, like=w)
        with torch.no_grad():
            self.first.weight.zero_()
            torch.div(weight, kappa, out=self.first.weight[:, start * area : start * area + n])
            self.first.bias.copy_(threshold)
        total = mean_activation(edges, "sparse")
        column = edit.spread / total
        self.second = _constant(n, k, column, -column * total, like=w)

    def forward(self, x: Tensor) -> Tensor:
        """``(N, C, H, W)`` to ``(N, C, H, W)``."""
        z = self.first(self.conv(x).flatten(1))
        y: Tensor = self.second(F.hardtanh(z, 0.0, 1.0)).reshape(x.shape)
        return x + y if self.connection == "addition" else y


# -- trap weights ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class TrapBlock(Edit):
    """``x + W2 ReLU(W1 x + b1)``.

    Args:
        weight: ``(k, n)`` the traps W1.
        bias: ``(k,)``.
        back: ``(n, k)`` W2.

    Raises:
        InvalidInput: If a shape is another.
    """

    weight: Tensor
    bias: Tensor
    back: Tensor

    def __post_init__(self) -> None:
        super().__post_init__()
        shapes = tuple(tuple(t.shape) for t in (self.weight, self.bias, self.back))
        k, n = shapes[0] if self.weight.dim() == 2 else (0, 0)
        if not (k and n) or shapes[1:] != ((k,), (n, k)):
            raise InvalidInput(
                f"TrapBlock: expected weight (k, n), bias (k,) and back (n, k), got {shapes}."
            )

    @property
    def pixels(self) -> int:
        """Entries of one input."""
        return self.weight.shape[1]

    def layers(self) -> TrapLayers:
        """The block."""
        return TrapLayers(self)


class TrapLayers(nn.Module):
    """The layers of a :class:`TrapBlock`."""

    def __init__(self, edit: TrapBlock) -> None:
        super().__init__()
        k, n = edit.weight.shape
        self.first = _unset(k, n, like=edit.weight)
        self.second = _unset(n, k, like=edit.weight)
        with torch.no_grad():
            self.first.weight.copy_(edit.weight)
            self.first.bias.copy_(edit.bias)
            self.second.weight.copy_(edit.back)
            self.second.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        """``(N, C, H, W)`` to ``(N, C, H, W)``."""
        y: Tensor = self.second(F.relu(self.first(x.flatten(1))))
        return x + y.reshape(x.shape)


EDITS: dict[str, type[Edit]] = {cls.__name__: cls for cls in (Imprint, SplitImprint, TrapBlock)}
"""The closed list. A client builds these and nothing else, subclasses included."""


def _check_bins(edit: Imprint | SplitImprint) -> None:
    w, edges = edit.w, edit.edges
    if w.dim() != 1 or len(w) == 0 or edges.dim() != 1 or len(edges) < 2:
        raise InvalidInput(
            f"{type(edit).__name__}: expected w (n,) and edges (k + 1,), got {tuple(w.shape)} and "
            f"{tuple(edges.shape)}."
        )
    if not bool((edges.diff() > 0).all()):
        raise InvalidInput(f"{type(edit).__name__}: the edges of the bins must rise strictly.")


def _unset(rows: int, columns: int, *, like: Tensor) -> nn.Linear:
    """A linear layer whose values are still to be written: the largest ones exist only once."""
    layer: nn.Linear = nn.utils.skip_init(
        nn.Linear, columns, rows, dtype=like.dtype, device=like.device
    )
    return layer


def _constant(rows: int, columns: int, weight: float, bias: float, *, like: Tensor) -> nn.Linear:
    largest = torch.finfo(like.dtype).max
    if max(abs(weight), abs(bias)) > largest:
        raise InvalidInput(
            f"A layer of an edit cannot hold {weight:g} and {bias:g}: {like.dtype} ends at "
            f"{largest:g}."
        )
    layer = _unset(rows, columns, like=like)
    with torch.no_grad():
        layer.weight.fill_(weight)
        layer.bias.fill_(bias)
    return layer
