r"""MKOR: every class has a row of its own, and the convolutions only copy, shift and bound.

Wang, Chen, Yang and Palanisamy, "Maximum Knowledge Orthogonality Reconstruction with Gradients in
Federated Learning", WACV 2024. FedSGD, one round. Letter F: all weights are chosen by the server,
the architecture stays, no data are needed.

1. *Decoupling head.* All rows of the first linear layer are 1 / n, the following ones rectangular
   identities: logit c sees row c only, and all logits are equal. With softmax cross-entropy, K
   classes and features f_s, for every row c < K (kappa_s: slopes of the activations in between)

   .. math:: G_b[c] = \tfrac1B \Bigl(\tfrac1K \sum_s \kappa_s - \sum_{y_s = c} \kappa_s\Bigr),
      \quad G_W[c] = \tfrac1B \Bigl(\tfrac1K \sum_s \kappa_s f_s
                                    - \sum_{y_s = c} \kappa_s f_s\Bigr).

   The row of an *absent* class a holds the first sums alone, so
   (G_W[c] - G_W[a]) / (G_b[c] - G_b[a]) is the mean feature of class c, exactly, and the feature
   itself if the class is unique. The head's bias gradient, 1/K - n_c / B, gives all labels.
2. *Orthogonal convolutions.* Each convolution copies its first channels ("paths") with single taps.
   Where the resolution falls by two and the channels suffice, the later layers first, it emits four
   copies shifted by one position ("4_dir"), so that every offset is sampled. In front of max-pools
   there are two sets of paths, x and 1 - x.
3. *Read-out*, layer by layer backwards. Sigmoids are inverted. A max over a window bounds every
   pixel in it; over all overlapping windows, the smallest maximum of x and the smallest maximum of
   1 - x bound it from both sides, and the image is the middle, smoothed by a 5x5 Gaussian. A
   stride is undone by putting the shifted copies back in place, and an average pool by a linear
   system, which is triangular once all shifts are there.

Channels that carry no path keep their values; the changed rows are those of the paths alone.

Departures:
    - The released code feeds raw logits to a negative log-likelihood, which softmax cross-entropy
      is not: there, the plain ratio G_W[c] / G_b[c] is a mixture. The correction by an absent
      class is ours, and so is ``isolate="sink"``: a large bias on one logit takes all probability,
      so that every *other* class can be read even if no class is absent.
    - Classes come from the counts n_c rather than from G_b < -1e-6, which is wrong under
      cross-entropy for absent and majority classes alike.
    - The released read-out takes an average of sigmoids for one pixel's; here the averages are
      solved, which is exact where no position was cropped away.
    - Zero padding is as good as replicate padding (a window is cropped), so models keep theirs.
    - The pixel normalisation is undone by the first convolution, as paths need [0, 1].
    - Quantisation and the parameter noise of the released code are left out.

Released code: ``wfwf10/MKOR``, ``VGG16.py``, ``LeNet.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from leakatlas.attacks.api import (
    ActiveAttack,
    Outlook,
    Reconstruction,
    TamperedModel,
    Tampering,
    attack,
    nothing_found,
)
from leakatlas.blocks import labels, surgery
from leakatlas.blocks.observed import mean_gradient
from leakatlas.blocks.watch import Watch
from leakatlas.data import Box
from leakatlas.errors import UnsupportedModel
from leakatlas.fl import View
from leakatlas.models.structure import example_input
from leakatlas.params import NonNegative
from leakatlas.threat import Knowledge

SINK = 50.0
"""Bias of the sink logit: exp(-50) is nothing next to a gradient in float64."""

INVERSES: dict[type[nn.Module], Callable[[Tensor], Tensor]] = {
    nn.Identity: lambda v: v,
    nn.ReLU: lambda v: v,  # what paths carry is never negative
    nn.LeakyReLU: lambda v: v,
    nn.ELU: lambda v: v,
    nn.Sigmoid: lambda v: v.logit(),
    nn.Tanh: lambda v: v.atanh(),
    nn.Softplus: lambda v: v.expm1().log(),
}
"""Activations that rise strictly on what a path can carry, and their inverses there."""


@attack(
    "mkor",
    needs=Knowledge.UPDATES | Knowledge.BASIC | Knowledge.MANIPULATION,
)
@dataclass(frozen=True, kw_only=True)
class MKOR(ActiveAttack):
    """Class decoupling and orthogonal convolutions.

    Args:
        isolate: ``absent`` subtracts a class that no example has; ``sink`` gives the last class
            all probability and loses its examples alone.
        smoothing: Sigma, in pixels, of the 5x5 Gaussian over an image read from bounds
            (released: 10); 0 for none.
    """

    isolate: Literal["absent", "sink"] = "absent"
    smoothing: NonNegative = 10.0

    plain_loss_only = True

    @classmethod
    def tuned(cls) -> Self:
        """The sink, which works whichever classes a batch has, and no blur, for small images."""
        return cls(isolate="sink", smoothing=0)

    def outlook(self, view: View) -> Outlook:
        """Whether the model can carry pixels, and whether a class must be absent."""
        try:
            found = plan(view.model, view.input_shape)
        except UnsupportedModel as problem:
            return Outlook("hopeless", str(problem))
        if view.has("protocol") and view.protocol.steps(view.num_examples) > 1:
            return Outlook("unknown", "after the first local step the rows are no longer equal")
        if self.isolate == "absent" and view.num_examples >= view.classes:
            return Outlook(
                "unknown",
                f"a class must be absent; {view.num_examples} examples may cover all "
                f"{view.classes} (isolate='sink' needs none)",
            )
        kind = "bounds on pixels" if found.bounded else "pixels"
        return Outlook("applicable", f"{kind} of every class that occurs once; others are averaged")

    def tamper(self, view: View, *, generator: torch.Generator, watch: Watch) -> Tampering | None:
        """The same architecture with copying convolutions and a decoupling head."""
        del generator
        if view.rounds:
            return None
        model = view.model
        layout = plan(model, view.input_shape)
        set_convolutions(model, layout, view.box)
        set_head(model, layout, view.box, sink=self.isolate == "sink")
        return Tampering(sent=TamperedModel.of(model), key={})

    def run(self, view: View, *, generator: torch.Generator, watch: Watch) -> Reconstruction:
        """Labels, features, images."""
        del generator, watch  # two divisions and small linear systems
        shape = tuple(view.input_shape)
        model = view.model
        layout = plan(model, shape)
        g = {name: tensor.double() for name, tensor in mean_gradient(view).items()}
        missing = [n for n in layout.read if n not in g]
        if missing:
            return nothing_found(shape, f"the update lacks {missing[0]}")
        p = dict(model.named_parameters())[f"{layout.head}.bias"].detach().double().softmax(dim=0)
        raw = labels.counts_from_bias(g[f"{layout.head}.bias"], p, view.num_examples)
        counts = labels.round_counts(raw, view.num_examples)
        notes = {
            "classes_present": float((counts > 0).sum()),
            "classes_unique": float((counts == 1).sum()),
        }
        g_w, g_b = g[f"{layout.dense}.weight"], g[f"{layout.dense}.bias"]
        present = torch.nonzero(counts > 0).flatten()
        if self.isolate == "sink":
            present = present[present != view.classes - 1]
            base_w, base_b = torch.zeros_like(g_w[0]), torch.zeros_like(g_b[0])
        elif bool((counts == 0).any()):
            absent = counts == 0
            base_w = g_w[: view.classes][absent].mean(dim=0)
            base_b = g_b[: view.classes][absent].mean(dim=0)
        else:
            return nothing_found(
                shape,
                "every class occurs in the batch, so no row holds the common part alone; "
                "isolate='sink' reads all classes but one",
                **notes,
            )
        divisor = g_b[present] - base_b
        readable = divisor.abs() > 1e-6 / view.num_examples
        present, divisor = present[readable], divisor[readable]
        if not len(present):
            return nothing_found(shape, "no class shows in the first linear layer", **notes)
        f = (g_w[present] - base_w) / divisor[:, None]
        upper, lower = read_images(f, layout, view.box)
        notes["gap"] = float((upper - lower).mean())
        pixels = (upper + lower) / 2
        if layout.bounded and self.smoothing:
            pixels = smooth(pixels, self.smoothing)
        like = view.update.tensors[f"{layout.dense}.weight"]
        pixels = pixels.clamp(view.box.low, view.box.high)
        return Reconstruction(
            images=view.box.normalize(pixels).to(like),
            labels=present,
            label_counts=counts,
            confidence=1 / counts[present].double(),
            notes=notes,
        )


# -- the plan: which layer carries what ------------------------------------------------------------


@dataclass(frozen=True)
class Axis:
    """One axis of a stage: where every pooled, shifted output reads.

    Args:
        reads: ``(rows, k)`` input positions of every row (shift-major, then position); -1 where
            the padding is read.
        size: Input positions n.
    """

    reads: Tensor
    size: int

    @property
    def average(self) -> Tensor:
        """``(rows, n)``: the mean over each row's positions."""
        rows, k = self.reads.shape
        matrix = torch.zeros(rows, self.size + 1, dtype=torch.float64)
        matrix.scatter_add_(
            1, torch.where(self.reads < 0, self.size, self.reads),
            torch.full((rows, k), 1 / k, dtype=torch.float64),
        )  # fmt: skip
        return matrix[:, : self.size]


@dataclass(frozen=True)
class Layer:
    """A convolution, its activation and its pool.

    Args:
        conv: Module name.
        act: The activation module.
        pool: How positions are merged.
        paths: How many paths come in.
        shifts: Copies along each axis.
        tap: Where the unshifted copy reads, in the kernel.
        output: ``(h, w)`` after pooling.
        axes: Vertical and horizontal.
    """

    conv: str
    act: nn.Module
    pool: Literal["none", "max", "average"]
    paths: int
    shifts: tuple[int, int]
    tap: tuple[int, int]
    output: tuple[int, int]
    axes: tuple[Axis, Axis]


@dataclass(frozen=True)
class Layout:
    """What carries what.

    Args:
        layers: In the order of execution.
        linear: Names of the linear layers.
        bounded: Whether a max-pool leaves bounds only, so that 1 - x is carried too.
        features: ``(channels, h, w)`` in front of the first linear layer.
    """

    layers: tuple[Layer, ...]
    linear: tuple[str, ...]
    bounded: bool
    features: tuple[int, int, int]

    @property
    def dense(self) -> str:
        """The first linear layer."""
        return self.linear[0]

    @property
    def head(self) -> str:
        """The last one."""
        return self.linear[-1]

    @property
    def read(self) -> tuple[str, ...]:
        """Parameters whose gradient the read-out takes."""
        return (f"{self.dense}.weight", f"{self.dense}.bias", f"{self.head}.bias")


@dataclass
class _Stage:
    """A stage while the chain is parsed."""

    link: surgery.Link
    conv: nn.Conv2d
    act: nn.Module
    pool: nn.Module | None
    output: tuple[int, ...]


def plan(model: nn.Module, shape: tuple[int, ...]) -> Layout:
    """How the model can carry pixels to its first linear layer.

    Raises:
        UnsupportedModel: If it is no chain of convolutions, activations, pools and linear layers
            with biases, or too narrow for one path per channel, or for a row per class.
    """
    example = example_input(model, shape)
    stages: list[_Stage] = []
    linear: list[surgery.Link] = []
    for link in surgery.chain(model, example):
        module = link.module
        if isinstance(module, nn.Flatten | nn.Dropout):
            continue
        if isinstance(module, nn.Linear):
            linear.append(link)
        elif linear:
            if type(module) not in INVERSES:
                raise _unsupported(model, link)
        elif isinstance(module, nn.Conv2d):
            stages.append(_Stage(link, module, nn.Identity(), None, link.output_shape))
        elif stages and stages[-1].pool is None and type(module) in INVERSES:
            stages[-1].act = module
        elif stages and stages[-1].pool is None and _plain_pool(module):
            stages[-1].pool, stages[-1].output = module, link.output_shape
        else:
            raise _unsupported(model, link)
    classes = linear[-1].output_shape[0] if linear else 0
    if not linear or min(link.output_shape[0] for link in linear) < classes:
        raise UnsupportedModel(
            f"MKOR needs linear layers with a row for every class; {type(model).__name__} has none."
        )
    for link in (*(stage.link for stage in stages), *linear):
        if link.module.bias is None:
            raise UnsupportedModel(
                f"MKOR sets the bias of every layer; {link.name!r} of {type(model).__name__} has "
                "none."
            )
    bounded = any(isinstance(stage.pool, nn.MaxPool2d) for stage in stages)
    first = shape[0] * (2 if bounded else 1)
    shifted = _shifted(model, stages, first)
    layers, paths = [], first
    for stage, copies in zip(stages, shifted, strict=True):
        layers.append(_layer(stage, paths, copies))
        paths *= copies[0] * copies[1]
    shape_out = stages[-1].output if stages else shape
    return Layout(
        tuple(layers),
        tuple(link.name for link in linear),
        bounded,
        (shape_out[0], shape_out[1], shape_out[2]),
    )


def _unsupported(model: nn.Module, link: surgery.Link) -> UnsupportedModel:
    return UnsupportedModel(
        f"MKOR inverts convolutions, activations and pools layer by layer; it cannot pass "
        f"{type(link.module).__name__} {link.name!r} of {type(model).__name__}."
    )


def _plain_pool(module: nn.Module) -> bool:
    """A pool of disjoint windows."""
    if isinstance(module, nn.MaxPool2d):
        dilated = _pair(module.dilation) != (1, 1)
    elif isinstance(module, nn.AvgPool2d):
        dilated = module.divisor_override is not None
    else:
        return False
    disjoint = _pair(module.kernel_size) == _pair(module.stride) and _pair(module.padding) == (0, 0)
    return disjoint and not dilated and not module.ceil_mode


def _pair(value: int | Sequence[int] | None) -> tuple[int, int]:
    if value is None or isinstance(value, int):
        return (value or 0, value or 0)
    return (value[0], value[1])


def _window(stage: _Stage) -> tuple[int, int]:
    pool = stage.pool
    return _pair(pool.kernel_size) if isinstance(pool, nn.MaxPool2d | nn.AvgPool2d) else (1, 1)


def _factor(stage: _Stage) -> tuple[int, int]:
    """By how much a stage lowers the resolution."""
    stride, window = _pair(stage.conv.stride), _window(stage)
    return (stride[0] * window[0], stride[1] * window[1])


def _centre(conv: nn.Conv2d) -> tuple[int, int]:
    kernel = _pair(conv.kernel_size)
    return ((kernel[0] - 1) // 2, (kernel[1] - 1) // 2)


def _shifted(model: nn.Module, stages: Sequence[_Stage], paths: int) -> list[tuple[int, int]]:
    """Copies per stage and axis: shifts at the later stages first, as long as channels suffice."""
    for stage in stages:
        conv = stage.conv
        if conv.groups != 1 or _pair(conv.dilation) != (1, 1) or not _known_padding(conv):
            raise _unsupported(model, stage.link)
        if conv.out_channels < paths:
            raise UnsupportedModel(
                f"MKOR carries {paths} paths; convolution {stage.link.name!r} of "
                f"{type(model).__name__} has {conv.out_channels} channels."
            )
    copies = [(1, 1)] * len(stages)
    for index in reversed(range(len(stages))):
        factor, centre = _factor(stages[index]), _centre(stages[index].conv)
        kernel = _pair(stages[index].conv.kernel_size)
        if any(c + f > k for c, f, k in zip(centre, factor, kernel, strict=True)):
            continue
        trial = [*copies[:index], factor, *copies[index + 1 :]]
        carried = paths
        fits = True
        for stage, (down, across) in zip(stages, trial, strict=True):
            carried *= down * across
            fits = fits and carried <= stage.conv.out_channels
        if fits:
            copies = trial
    return copies


def _known_padding(conv: nn.Conv2d) -> bool:
    return not isinstance(conv.padding, str) and conv.padding_mode in ("zeros", "replicate")


def _layer(stage: _Stage, paths: int, copies: tuple[int, int]) -> Layer:
    conv, centre, window = stage.conv, _centre(stage.conv), _window(stage)
    height, width = stage.output[1:]
    axes = [
        _axis(
            size=stage.link.input_shape[1 + i],
            outputs=(height, width)[i],
            window=window[i],
            stride=_pair(conv.stride)[i],
            offset=centre[i] - _pair(conv.padding)[i],  # type: ignore[arg-type]  # str is refused
            copies=copies[i],
            replicate=conv.padding_mode == "replicate",
        )
        for i in (0, 1)
    ]
    pool: Literal["none", "max", "average"] = "none"
    if stage.pool is not None:
        pool = "max" if isinstance(stage.pool, nn.MaxPool2d) else "average"
    return Layer(
        stage.link.name, stage.act, pool, paths, copies, centre, (height, width), (axes[0], axes[1])
    )


def _axis(
    *, size: int, outputs: int, window: int, stride: int, offset: int, copies: int, replicate: bool
) -> Axis:
    shift = torch.arange(copies)[:, None, None]
    place = torch.arange(outputs)[None, :, None] * window + torch.arange(window)[None, None, :]
    reads = (place * stride + shift + offset).reshape(copies * outputs, window)
    if replicate:
        return Axis(reads.clamp(0, size - 1), size)
    return Axis(torch.where((reads < 0) | (reads >= size), -1, reads), size)


# -- surgery ---------------------------------------------------------------------------------------


def set_convolutions(model: nn.Module, layout: Layout, box: Box) -> None:
    """Write the copying taps, in place; channels beyond the paths keep their values."""
    modules = dict(model.named_modules())
    for index, layer in enumerate(layout.layers):
        conv = modules[layer.conv]
        assert isinstance(conv, nn.Conv2d) and conv.bias is not None
        gain, shift, source = _carried(layer.paths, box, first=index == 0)
        with torch.no_grad():
            for copy in range(layer.shifts[0] * layer.shifts[1]):
                down, across = divmod(copy, layer.shifts[1])
                for path in range(layer.paths):
                    out = copy * layer.paths + path
                    conv.weight[out] = 0
                    row, column = layer.tap[0] + down, layer.tap[1] + across
                    conv.weight[out, source[path], row, column] = gain[path]
                    conv.bias[out] = shift[path]


def _carried(paths: int, box: Box, *, first: bool) -> tuple[list[float], list[float], list[int]]:
    """Gain, shift and source channel of every path; the first layer makes x and 1 - x of pixels."""
    if not first:
        return [1.0] * paths, [0.0] * paths, list(range(paths))
    up = list(box.std)
    gain, shift = up, [mean - box.low for mean in box.mean]
    if paths > box.channels:
        gain = [*up, *(-std for std in up)]
        shift = [*shift, *(box.high - mean for mean in box.mean)]
    return gain, shift, [path % box.channels for path in range(paths)]


def set_head(model: nn.Module, layout: Layout, box: Box, *, sink: bool) -> None:
    """Write the decoupling head, in place."""
    modules = dict(model.named_modules())
    with torch.no_grad():
        for name in layout.linear:
            linear = modules[name]
            assert isinstance(linear, nn.Linear)
            if name == layout.dense:
                # Not the identity: all neurons see the mean feature, which is positive.
                linear.weight.fill_(1 / linear.in_features)
            else:
                nn.init.eye_(linear.weight)
            linear.bias.zero_()
        if not layout.layers:  # normalised pixels reach down to -mean / std, and a ReLU would die
            lowest = box.bounds(torch.zeros(box.channels, 1, 1))[0].min()
            first = modules[layout.dense]
            assert isinstance(first, nn.Linear)
            first.bias.fill_(max(0.0, -float(lowest)))
        if sink:
            head = modules[layout.head]
            assert isinstance(head, nn.Linear)
            head.bias[-1] = SINK


# -- read-out --------------------------------------------------------------------------------------


def read_images(f: Tensor, layout: Layout, box: Box) -> tuple[Tensor, Tensor]:
    """Upper and lower bounds of every pixel, ``(M, C, H, W)`` each; equal without max-pools.

    Args:
        f: Features ``(M, channels * h * w)`` in front of the first linear layer, float64.
        layout: Of the model.
        box: The pixel space.
    """
    values = f.reshape(-1, *layout.features)
    low, high = ranges(layout, box)
    known = tuple(torch.ones(side, dtype=torch.bool, device=f.device) for side in values.shape[2:])
    for index in reversed(range(len(layout.layers))):
        layer = layout.layers[index]
        _, shift, _ = _carried(layer.paths, box, first=index == 0)
        # What a padded position shows: a convolution of zeros.
        outside = layer.act(values.new_tensor(shift))[:, None, None]
        values, known = undo_pool(values, layer, outside, known)
        values = INVERSES[type(layer.act)](values.clamp(low[index + 1], high[index + 1]))
    values = interpolate(values, known)
    channels = box.channels
    if not layout.layers:  # the linear layer reads model space
        x = box.denormalize(values)
        return x, x
    upper = values[:, :channels] + box.low
    lower = box.high - values[:, channels:] if layout.bounded else upper
    return upper, lower


def ranges(layout: Layout, box: Box) -> tuple[list[float], list[float]]:
    """Smallest and largest value that a path can carry in front of each layer, and at the end."""
    low, high = [0.0], [box.high - box.low]
    for layer in layout.layers:
        edges = layer.act(torch.tensor([low[-1], high[-1]], dtype=torch.float64))
        low.append(float(edges[0]))
        high.append(float(edges[1]))
    return low, high


def undo_pool(
    values: Tensor, layer: Layer, outside: Tensor, known: Sequence[Tensor]
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """What the activation put out, at the input positions that it was copied from.

    Args:
        values: ``(M, channels, h, w)`` behind the pool.
        layer: The layer.
        outside: ``(paths, 1, 1)`` what padded positions showed.
        known: Which rows ``(h,)`` and columns ``(w,)`` of ``values`` mean something.

    Returns:
        ``(M, paths, H, W)``, exact or upper bounds behind a max-pool, and which of its rows and
        columns mean something. Where equations are fewer than positions, the smoothest answer.
    """
    (down, across), (h, w) = layer.shifts, layer.output
    used = values[:, : down * across * layer.paths]
    rows = used.reshape(-1, down, across, layer.paths, h, w).permute(0, 3, 1, 4, 2, 5)
    rows = rows.reshape(-1, layer.paths, down * h, across * w)
    kept = [mask.repeat(copies) for mask, copies in zip(known, layer.shifts, strict=True)]
    rows = rows[:, :, kept[0]][..., kept[1]]
    vertical, horizontal = (
        axis.average.to(rows)[mask] for axis, mask in zip(layer.axes, kept, strict=True)
    )
    read = (vertical.any(dim=0), horizontal.any(dim=0))
    if layer.pool == "max":
        return _smallest(_smallest(rows, horizontal).mT, vertical).mT, read
    level = rows.mean(dim=(2, 3), keepdim=True)
    inside = vertical.sum(dim=1)[:, None] * horizontal.sum(dim=1)
    rest = rows - outside - (level - outside) * inside
    return level + torch.linalg.pinv(vertical) @ rest @ torch.linalg.pinv(horizontal).mT, read


def _smallest(rows: Tensor, average: Tensor) -> Tensor:
    """The least of all rows that read a position, along the last dimension; 0 if none does.

    Args:
        rows: ``(..., r)``.
        average: ``(r, n)``.
    """
    result = rows.new_zeros(*rows.shape[:-1], average.shape[1])
    for position, reads in enumerate((average > 0).T):
        if bool(reads.any()):
            result[..., position] = rows[..., reads].amin(dim=-1)
    return result


def interpolate(values: Tensor, known: Sequence[Tensor]) -> Tensor:
    """Unknown rows and columns linearly from their nearest known ones.

    Args:
        values: ``(M, C, H, W)``.
        known: ``(H,)`` and ``(W,)``.
    """
    for dim, mask in zip((2, 3), known, strict=True):
        if bool(mask.all()):
            continue
        held = torch.nonzero(mask).flatten()
        places = torch.arange(len(mask), device=values.device)
        after = torch.searchsorted(held, places).clamp(max=len(held) - 1)
        before = (torch.searchsorted(held, places, right=True) - 1).clamp(min=0)
        span = (held[after] - held[before]).clamp(min=1)
        weight = ((places - held[before]) / span).to(values).clamp(0, 1)
        shape = [1, 1, 1, 1]
        shape[dim] = len(mask)
        weight = weight.reshape(shape)
        values = values.index_select(dim, held[before]) * (1 - weight) + (
            values.index_select(dim, held[after]) * weight
        )
    return values


def smooth(x: Tensor, sigma: float) -> Tensor:
    """A 5x5 Gaussian on every channel, edges repeated.

    Args:
        x: ``(M, C, H, W)``.
        sigma: In pixels.
    """
    place = torch.arange(-2, 3, dtype=x.dtype, device=x.device)
    line = torch.exp(-place.square() / (2 * sigma**2))
    line = line / line.sum()
    kernel = (line[:, None] * line[None, :]).expand(x.shape[1], 1, 5, 5)
    return F.conv2d(F.pad(x, (2, 2, 2, 2), mode="replicate"), kernel, groups=x.shape[1])
