r"""Blind source separation: rows that are linear mixtures of signals, whitened and judged.

A matrix ``(h, d)`` holds h mixtures of n signals of length d. Whitening leaves a rotation to be
found; the terms here say how separate, how different and how one-signed its rows are
[Kariyappa et al., 2023; Hyvarinen and Oja, 2000].
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from leakatlas.errors import UnsupportedModel
from leakatlas.models.structure import example_input, in_mode, linear_layers

Negentropy = Literal["fastica", "paper", "off"]

GAUSSIAN = 0.37456720
"""E log cosh of a standard normal variable."""

LARGE = 2048
"""Rows and columns above which only the strongest singular vectors are computed: all of them take
many minutes for the 4,096 by 25,088 weights of the published VGG-16's first linear layer."""

SPARE = 16
"""Singular vectors beyond those asked for, which make these exact up to rounding."""


@dataclass(frozen=True)
class White:
    """Whitened mixtures.

    Args:
        Z: ``(n, d)``, rows of mean 0 and unit covariance.
        W: ``(n, h)``, so that ``Z = W (G - mu)``.
        shift: ``(n, 1)``, W times the row means.
    """

    Z: Tensor
    W: Tensor
    shift: Tensor


def numerical_rank(G: Tensor, tolerance: float, n: int) -> int:
    """Singular values of the centred rows of ``G`` ``(h, d)`` above a share of the largest.

    In a large matrix no more than :data:`SPARE` beyond ``n`` are counted.
    """
    M = G - G.mean(1, keepdim=True)
    size = strongest(M, n)[1] if is_large(M, n) else torch.linalg.svdvals(M)
    return int((size > tolerance * size.max()).sum())


def is_large(M: Tensor, n: int) -> bool:
    """Whether all singular vectors of ``M`` take long, and n of them are few."""
    return min(M.shape) > max(LARGE, 4 * (n + SPARE))


def strongest(M: Tensor, n: int) -> tuple[Tensor, Tensor, Tensor]:
    """The ``n + SPARE`` largest singular values of ``M`` and their vectors, by random projection.

    Exact up to rounding where M is, up to noise far below them, of rank n; the projection is the
    same in every call.

    Source:
        Halko, Martinsson and Tropp, "Finding Structure with Randomness", 2011, algorithm 4.4.

    Returns:
        ``(h, n + SPARE)``, ``(n + SPARE,)`` and ``(n + SPARE, d)``, as of ``torch.linalg.svd``.
    """
    with torch.random.fork_rng(devices=[M.device] if M.is_cuda else []):
        torch.manual_seed(0)
        left, size, right = torch.svd_lowrank(M, q=n + SPARE, niter=4)
    return left, size, right.T


def whiten(G: Tensor, n: int) -> White:
    """The n strongest principal components of the rows of ``G`` ``(h, d)``, at unit variance."""
    mu = G.mean(1, keepdim=True)
    M = G - mu
    taken_apart = strongest(M, n) if is_large(M, n) else torch.linalg.svd(M, full_matrices=False)
    left, size, right = taken_apart
    sign = torch.where(left.sum(0) < 0, -1.0, 1.0).to(G)[:n, None]  # else the library's choice
    root = (G.shape[1] - 1) ** 0.5
    W = sign * left[:, :n].T * root / size[:n, None]
    return White(sign * right[:n] * root, W, W @ mu)


def unit_rows(u: Tensor) -> Tensor:
    """Rows of ``u`` ``(n, n)`` at norm 1."""
    size: Tensor = u.norm(dim=1, keepdim=True)
    return u / size.clamp(min=torch.finfo(u.dtype).tiny)


def log_cosh(s: Tensor) -> Tensor:
    """``log cosh s`` without overflow."""
    size = s.abs()
    return size + F.softplus(-2 * size) - 0.6931471805599453


def negentropy(S: Tensor, kind: Negentropy) -> Tensor:
    """Minus the squared distance of ``m = E log cosh s`` from a reference, meant over rows.

    ``fastica`` takes the Gaussian's value as the reference, ``paper`` 0; ``off`` is 0. Smaller
    means more independent rows of ``S`` ``(n, d)``.
    """
    if kind == "off":
        return S.new_zeros(())
    reference = GAUSSIAN if kind == "fastica" else 0.0
    return -(log_cosh(S).mean(1) - reference).square().mean()


def alike(U: Tensor, temperature: float) -> Tensor:
    """``mean_ij (exp(T |<u_i, u_j>|) - 1)`` over rows of norm 1, the diagonal included."""
    return torch.expm1(temperature * (U @ U.T).abs()).mean()


def two_signs(X: Tensor) -> Tensor:
    """``mean_i min(|x_i^+|, |x_i^-|)``: 0 if every row of ``X`` ``(n, d)`` has one sign."""
    return torch.minimum(X.clamp(min=0).norm(dim=1), X.clamp(max=0).norm(dim=1)).mean()


# -- the layer that mixes --------------------------------------------------------------------------


@dataclass(frozen=True)
class Mixture:
    """The linear layer whose gradient is taken apart.

    Args:
        name: Of the module.
        layer: The module.
        reads_image: Whether its input is the flattened image itself.
    """

    name: str
    layer: nn.Linear
    reads_image: bool


def find_mixture(model: nn.Module, shape: tuple[int, ...]) -> Mixture:
    """The first linear layer that the model calls, and whether it reads the image itself.

    Args:
        model: A copy that the caller owns.
        shape: ``(C, H, W)``.

    Raises:
        UnsupportedModel: If there is none, or it reads several rows an example (tokens).
    """
    names: dict[nn.Module, str] = {module: name for name, module in linear_layers(model).items()}
    seen: list[tuple[nn.Module, Tensor]] = []

    def note(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        seen.append((module, inputs[0]))

    x = example_input(model, shape)
    x = x + torch.arange(x.numel(), dtype=x.dtype, device=x.device).reshape(x.shape) / x.numel()
    handles = [module.register_forward_pre_hook(note) for module in names]
    try:
        with in_mode(model, train=False), torch.no_grad():
            model(x)
    finally:
        for handle in handles:
            handle.remove()
    if not seen:
        raise UnsupportedModel(
            f"A separation takes a linear layer's inputs; {type(model).__name__} calls none."
        )
    module, read = seen[0]
    if read.dim() != 2:
        raise UnsupportedModel(
            f"A separation takes the inputs of a linear layer that reads one row an example; "
            f"{names[module]!r} of {type(model).__name__} reads {tuple(read.shape)}."
        )
    assert isinstance(module, nn.Linear)  # the keys of linear_layers
    return Mixture(names[module], module, torch.equal(read, x.flatten(1)))


def features(model: nn.Module, name: str) -> Callable[[Tensor], Tensor]:
    """What a module reads of images ``(N, C, H, W)``, ``(N, d)``, in eval mode, differentiable.

    Args:
        model: A copy that the caller owns; it is put into eval mode.
        name: Of the module.
    """
    model.eval()
    state = {n: t.detach() for n, t in [*model.named_parameters(), *model.named_buffers()]}

    def of(x: Tensor) -> Tensor:
        caught: list[Tensor] = []

        def catch(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            caught.append(inputs[0])

        handle = model.get_submodule(name).register_forward_pre_hook(catch)
        try:
            functional_call(model, state, (x,))
        finally:
            handle.remove()
        return caught[0]

    return of
