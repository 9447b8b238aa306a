"""Changing a model's weights so that its update shows inputs: kernels that copy, traps.

The pure parts (rows, kernels, chains of layers) know no attack. Blocks that a malicious server
inserts are data, see :mod:`leakatlas.fl.edits`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from leakatlas.data import Box
from leakatlas.errors import UnsupportedModel
from leakatlas.fl import TamperedModel, edits
from leakatlas.models.structure import hooked, in_mode

SCALINGS = (0.7, 0.77, 0.85, 0.9, 0.93, 0.95, 0.97, 0.98, 0.99)
"""Values of s tried on surrogate images; the papers' own are 0.7, 0.95 and 0.99."""

PASSING = (nn.ReLU, nn.Identity, nn.Flatten, nn.Dropout, nn.Dropout2d)
POOLING = (nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d)


# -- in front of a model ---------------------------------------------------------------------------


class Normalise(nn.Module):
    """Pixels in [0, 1] to the model's input space.

    Args:
        box: The pixel space.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, box: Box) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(box.mean).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(box.std).view(-1, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        """``(N, C, H, W)`` to the same shape."""
        return (images - self.mean) / self.std


def columns_of_their_own(
    clients: Sequence[int],
    edges: Tensor,
    box: Box,
    shape: tuple[int, ...],
    *,
    kappa: float,
    anchor: bool,
    spread: float,
    connection: edits.Connection,
) -> dict[int, TamperedModel]:
    """Every client's model: the global one behind its own group of an imprint of brightness.

    The kernels undo the normalisation, so that a row of the gradient is an image in [0, 1] times
    one number.

    Args:
        clients: Their ids; the place of one is its group.
        edges: ``(k + 1,)`` of the mean pixel, in the model's dtype and on its device.
        box: The pixel space.
        shape: ``(C, H, W)``.
        kappa: As in :class:`~leakatlas.fl.edits.SplitImprint`, like what follows.
        anchor: Whether every group has a constant channel.
        spread: Size of the block's output.
        connection: Whether the input is added to it.
    """
    channels, height, width = shape
    n = math.prod(shape)
    w = edges.new_full((n,), 1 / n)
    return {
        client: TamperedModel(
            edits=(
                edits.SplitImprint(
                    w,
                    edges,
                    shape=(channels, height, width),
                    clients=len(clients),
                    group=group,
                    kappa=kappa,
                    anchor=anchor,
                    spread=spread,
                    connection=connection,
                    std=box.std,
                    mean=box.mean,
                ),
            )
        )
        for group, client in enumerate(clients)
    }


# -- trap weights and copying kernels --------------------------------------------------------------


def trap_rows(
    rows: int,
    n: int,
    *,
    scaling: float,
    sigma: float,
    mean: float = 0.0,
    generator: torch.Generator,
    like: Tensor,
) -> Tensor:
    """Trap weights ``(rows, n)``: each row half negative, half the same values times -scaling.

    With inputs in [0, 1] and ``scaling`` slightly below 1, a row's pre-activation is mostly
    negative, so few inputs fire it.

    Args:
        rows: m.
        n: Input size; an odd one leaves one zero per row.
        scaling: s in (0, 1).
        sigma: Spread of the negative half before its sign is fixed.
        mean: Its mean.
        generator: Randomness.
        like: Gives dtype and device.
    """
    half = n // 2
    size = (mean + sigma * torch.randn(rows, half, generator=generator, dtype=torch.float64)).abs()
    place = torch.rand(rows, n, generator=generator).argsort(dim=1)
    shuffle = torch.rand(rows, half, generator=generator).argsort(dim=1)
    weight = torch.zeros(rows, n, dtype=torch.float64)
    weight.scatter_(1, place[:, :half], -size)
    weight.scatter_(1, place[:, half : 2 * half], scaling * size.gather(1, shuffle))
    return weight.to(like)


def copying_kernels(
    conv: nn.Conv2d, channels: int, *, gain: Sequence[float], shift: Sequence[float]
) -> None:
    """Make the first ``channels`` outputs of ``conv`` copies of its first inputs, the rest zero.

    The single tap sits where output position p reads input position ``stride * p``, so a stride
    subsamples and nothing is lost at the border. Changes ``conv`` in place.

    Args:
        conv: Owned by the caller.
        channels: How many channels are carried.
        gain: Factor on each carried channel.
        shift: Added to each carried channel; needs a bias unless zero.

    Raises:
        UnsupportedModel: If the convolution cannot carry them.
    """
    height, width = (
        min(int(p), k - 1) for p, k in zip(_padding(conv), conv.kernel_size, strict=True)
    )
    if conv.out_channels < channels or conv.groups != 1:
        raise UnsupportedModel(
            f"A convolution {conv.in_channels}->{conv.out_channels} with {conv.groups} groups "
            f"cannot carry {channels} channels unchanged; it needs as many outputs and one group."
        )
    if any(shift) and conv.bias is None:
        raise UnsupportedModel(
            "The first convolution has no bias, so it cannot undo the pixel normalisation; give "
            "the model plain pixels (a unit box), or a convolution with bias."
        )
    with torch.no_grad():
        conv.weight.zero_()
        if conv.bias is not None:
            conv.bias.zero_()
        for c in range(channels):
            conv.weight[c, c, height, width] = gain[c]
            if conv.bias is not None:
                conv.bias[c] = shift[c]


def _padding(conv: nn.Conv2d) -> tuple[int, ...]:
    if isinstance(conv.padding, str):
        if conv.padding == "valid":
            return (0, 0)
        return tuple((k - 1) * d // 2 for k, d in zip(conv.kernel_size, conv.dilation, strict=True))
    return tuple(conv.padding)


# -- the structure of a model ----------------------------------------------------------------------


@dataclass(frozen=True)
class Link:
    """One layer of a chain.

    Args:
        name: Module name.
        module: The layer itself.
        input_shape: Of one example, without the batch.
        output_shape: Of one example.
    """

    name: str
    module: nn.Module
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]


def chain(model: nn.Module, example: Tensor) -> tuple[Link, ...]:
    """The layers of a model in the order of execution, if each one feeds the next alone.

    The model is run once in eval mode. Views between layers (flatten, reshape) are followed;
    sums, concatenations and activations that are not modules break the chain.

    Args:
        model: Any module; left as it was.
        example: ``(1, C, H, W)``.

    Raises:
        UnsupportedModel: Naming the two layers between which the chain breaks.
    """
    names = {module: name for name, module in model.named_modules()}
    leaves = [m for m in model.modules() if not list(m.children()) and m is not model]
    if not leaves:
        leaves = [model]
    seen: list[tuple[nn.Module, Tensor, Tensor]] = []

    def note(module: nn.Module, inputs: tuple[object, ...], output: object) -> None:
        if len(inputs) == 1 and isinstance(inputs[0], Tensor) and isinstance(output, Tensor):
            seen.append((module, inputs[0], output))

    with in_mode(model, train=False), hooked(leaves, note):
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            logits = model(example)
    links: list[Link] = []
    value, last = example, "the input"
    for module, given, result in seen:
        name = names[module] or type(module).__name__
        if not _same(value, given):
            raise UnsupportedModel(_broken(model, last, name))
        links.append(Link(names[module], module, tuple(given.shape[1:]), tuple(result.shape[1:])))
        value, last = result, name
    if not isinstance(logits, Tensor) or not _same(value, logits):
        raise UnsupportedModel(_broken(model, last, "the output"))
    return tuple(links)


def _same(a: Tensor, b: Tensor) -> bool:
    return a.data_ptr() == b.data_ptr() and a.numel() == b.numel()


def _broken(model: nn.Module, before: str, after: str) -> str:
    return (
        f"{type(model).__name__} is not a plain chain of layers: something other than a module "
        f"happens between {before} and {after} (a residual sum, a branch, a functional "
        "activation). This method follows convolutions, linear layers, activation modules, "
        "pooling and flattening only."
    )


# -- where the traps go ----------------------------------------------------------------------------


@dataclass(frozen=True)
class TrapPath:
    """The way from the pixels to the trapped layer, and to the linear layer behind it.

    Args:
        convolutions: Layers that must copy.
        linear: The layer that gets the traps.
        index: Its place among the model's linear layers.
        following: The next linear layer.
        carried: ``(C, h, w)`` of the image when it arrives.
    """

    convolutions: tuple[nn.Conv2d, ...]
    linear: nn.Linear
    index: int
    following: nn.Linear
    carried: tuple[int, int, int]


def find_trap(model: nn.Module, example: Tensor) -> TrapPath:
    """The first linear layer with bias and ReLU that an image can reach unchanged.

    Args:
        model: Owned by the caller.
        example: ``(1, C, H, W)``.

    Raises:
        UnsupportedModel: If there is none, saying what stands in the way.
    """
    links = chain(model, example)
    channels = example.shape[1]
    size = tuple(example.shape[2:])
    convolutions: list[nn.Conv2d] = []
    for place, link in enumerate(links):
        module = link.module
        if isinstance(module, nn.Linear):
            behind = links[place + 1 : place + 2]
            following = [n.module for n in links[place + 1 :] if isinstance(n.module, nn.Linear)]
            if module.bias is None or not behind or not isinstance(behind[0].module, nn.ReLU):
                raise UnsupportedModel(
                    f"Trap weights need a linear layer with bias and a ReLU behind it; the first "
                    f"one that the image reaches, {link.name}, is "
                    f"{'without bias' if module.bias is None else 'not followed by a ReLU'}."
                )
            if not following or not isinstance(following[0], nn.Linear):
                raise UnsupportedModel(f"No linear layer follows the trapped one, {link.name}.")
            linears = [m for m in model.modules() if isinstance(m, nn.Linear)]
            return TrapPath(
                tuple(convolutions), module, linears.index(module), following[0],
                (channels, size[0], size[1]),
            )  # fmt: skip
        if isinstance(module, nn.Conv2d):
            convolutions.append(module)
        elif not isinstance(module, PASSING + POOLING):
            raise UnsupportedModel(
                f"{type(module).__name__} ({link.name}) changes the image before it reaches a "
                "linear layer; trap weights pass through convolutions, ReLU and pooling only."
            )
        if len(link.output_shape) == 3:
            size = link.output_shape[1:]
    raise UnsupportedModel(f"{type(model).__name__} has no linear layer that could hold traps.")


def set_traps(
    path: TrapPath,
    box: Box,
    *,
    scaling: float,
    sigma: float,
    gain: float,
    generator: torch.Generator,
) -> None:
    """Write copying kernels and trap weights into the layers of ``path``, in place."""
    channels = path.carried[0]
    one = [1.0] * channels
    for place, conv in enumerate(path.convolutions):
        first = place == 0
        copying_kernels(
            conv,
            channels,
            # The first one undoes the normalisation, so that pixels in [0, 1] pass every ReLU.
            gain=box.std if first else one,
            shift=box.mean if first else [0.0] * channels,
        )
    n = math.prod(path.carried)
    weight = path.linear.weight.detach()
    traps = trap_rows(
        len(weight), n, scaling=scaling, sigma=sigma, generator=generator, like=weight
    )
    bias = weight.new_zeros(len(weight))
    if not path.convolutions:
        area = n // channels
        std = weight.new_tensor(box.std).repeat_interleave(area)
        mean = weight.new_tensor(box.mean).repeat_interleave(area)
        bias = traps @ mean
        traps = traps * std
    with torch.no_grad():
        path.linear.weight.zero_()
        path.linear.weight[:, :n] = traps / gain
        path.linear.bias.copy_(bias / gain)
        path.following.weight.mul_(gain)


def tuned_scaling(images: Tensor, batch: int, generator: torch.Generator) -> float:
    """The s at which most surrogate images of a batch fire some trap row alone.

    Args:
        images: ``(S, C, h, w)`` in [0, 1].
        batch: Size of the batch to expect.
        generator: Trap weights and batches.
    """
    flat = images.double().flatten(1)
    best, best_share = SCALINGS[0], -1.0
    for s in SCALINGS:
        traps = trap_rows(256, flat.shape[1], scaling=s, sigma=1.0, generator=generator, like=flat)
        share = 0.0
        for _ in range(4):
            chosen = torch.randperm(len(flat), generator=generator)[:batch]
            fires = flat[chosen] @ traps.T > 0  # (batch, rows)
            alone = fires & (fires.sum(dim=0) == 1)
            share += float(alone.any(dim=1).double().mean())
        if share > best_share:
            best, best_share = s, share
    return best
