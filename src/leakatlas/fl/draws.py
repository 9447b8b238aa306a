"""What a model draws in its forward pass (dropout, stochastic depth): recorded, replayed, averaged.

A client in train mode draws masks that nobody else knows. The simulated client records them, so
that the harness can repeat its computation exactly; an adversary gets them by
``Grant.DROPOUT_MASKS`` alone, and otherwise replays the mean network: every mask at its
expectation, as dropout does in eval mode.

Recorded are ``F.dropout`` and its kin, ``torch.bernoulli`` and ``Tensor.bernoulli_`` (stochastic
depth, drop path) and dropout within attention, whether modules or functions of the forward pass
call them. What is made of several draws inside one function of torch (``F.multi_head_attention_
forward``, alpha dropout) is recorded as the seed it was run with. Draws of other kinds
(``torch.randn`` in a forward pass) stay what they are: new every time.

Masks are drawn on the CPU and moved, so that a seed means the same on every device; what is
recorded as a seed is drawn on the device itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from leakatlas.errors import UnsupportedModel

Draws = tuple[Tensor, ...]
"""Of one forward pass, in order: masks (already scaled), or seeds (int64 scalars)."""

_MASKED = {F.dropout, F.dropout1d, F.dropout2d, F.dropout3d}
_SEEDED = {F.alpha_dropout, F.feature_alpha_dropout, F.multi_head_attention_forward}
_COINS = {torch.bernoulli, Tensor.bernoulli, Tensor.bernoulli_}


class _Mode(TorchFunctionMode):
    """Hands every draw to ``draw``; everything else passes."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        del types
        kwargs = dict(kwargs or {})
        if func in _MASKED:
            return self._masked(func, *args, **kwargs)
        if func in _COINS:
            return self._coins(func, *args, **kwargs)
        if func is F.scaled_dot_product_attention and kwargs.get("dropout_p", _at(args, 4)):
            return self._attention(*args, **kwargs)
        if func in _SEEDED and _draws(func, args, kwargs):
            return self._seeded(func, args, kwargs)
        return func(*args, **kwargs)

    def draw(self, make: Callable[[], Tensor], expectation: Callable[[], Tensor]) -> Tensor:
        """The next mask."""
        raise NotImplementedError

    def seed(self) -> int | None:
        """The next seed; None for the mean network."""
        raise NotImplementedError

    def _masked(
        self,
        func: Callable[..., Tensor],
        input: Tensor,
        p: float = 0.5,
        training: bool = True,
        inplace: bool = False,
    ) -> Tensor:
        if not training or p == 0.0 or _batched(input):
            return func(input, p, training, inplace)
        ones = torch.ones_like(input, device="cpu")
        mask = self.draw(
            lambda: func(ones, p, True, False).to(input), lambda: torch.ones_like(input)
        )
        return input.mul_(mask) if inplace else input * mask

    def _coins(self, func: Callable[..., Tensor], input: Tensor, *args: Any, **kwargs: Any) -> Any:
        p = args[0] if args else kwargs.get("p")
        if _batched(input) or isinstance(p, Tensor):
            return func(input, *args, **kwargs)
        if p is None:  # each entry is its own probability; there is no slope through a coin
            held = input.detach()
            return self.draw(lambda: func(held.cpu(), **kwargs).to(held), lambda: held.clone())
        like = input.detach()
        found = self.draw(
            lambda: torch.empty_like(like, device="cpu").bernoulli_(p, **kwargs).to(like),
            lambda: torch.full_like(like, p),
        )
        return input.copy_(found) if func is Tensor.bernoulli_ else found

    def _attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """Attention written out, so that its dropout can be taken hold of."""
        if _batched(query) or enable_gqa:
            return F.scaled_dot_product_attention(
                query, key, value, attn_mask, dropout_p, is_causal,
                scale=scale, enable_gqa=enable_gqa,
            )  # fmt: skip
        size = query.shape[-1] ** -0.5 if scale is None else scale
        scores = query @ key.transpose(-2, -1) * size
        if is_causal:
            rows, columns = scores.shape[-2:]
            allowed = torch.ones(rows, columns, dtype=torch.bool, device=scores.device).tril()
            scores = scores.masked_fill(~allowed, float("-inf"))
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            scores = scores.masked_fill(~attn_mask, float("-inf"))
        elif attn_mask is not None:
            scores = scores + attn_mask
        weights = scores.softmax(dim=-1)
        ones = torch.ones_like(weights, device="cpu")
        drawn = self.draw(
            lambda: F.dropout(ones, dropout_p).to(weights), lambda: torch.ones_like(weights)
        )
        return weights * drawn @ value

    def _seeded(self, func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        seed = self.seed()
        if seed is None:
            return _undrawn(func, args, kwargs)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return func(*args, **kwargs)


def _at(args: Sequence[Any], index: int) -> Any:
    return args[index] if len(args) > index else 0.0


def _draws(func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    training = kwargs.get("training", True)
    p = kwargs.get("dropout_p", _at(args, 10)) if func is F.multi_head_attention_forward else 1
    return bool(training) and bool(p)


def _undrawn(func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """The function at the expectation of what it draws: as in eval mode."""
    if func is F.multi_head_attention_forward:
        return func(*args, **(kwargs | {"training": False}))
    return args[0] if args else kwargs["input"]


def _batched(tensor: Tensor) -> bool:
    """Whether vmap is at work: a mask drawn there cannot be taken out of it."""
    return bool(torch._C._functorch.is_batchedtensor(tensor))


@dataclass(frozen=True)
class Place:
    """Where a forward pass draws a mask; public with the architecture.

    Args:
        shape: Of the mask.
        high: What an entry that is kept is multiplied by, 1 / (1 - p) for dropout.
        keep: The probability to be kept, 1 - p.
    """

    shape: tuple[int, ...]
    high: float
    keep: float


class _Surveying(_Mode):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[Place] = []

    def draw(self, make: Callable[[], Tensor], expectation: Callable[[], Tensor]) -> Tensor:
        mean = expectation().detach()
        high = 1.0
        for _ in range(64):  # a small mask may be empty by chance
            if (highest := float(make().detach().max())) > 0:
                high = highest
                break
        self.found.append(Place(tuple(mean.shape), high, float(mean.mean()) / high))
        return mean

    def seed(self) -> int:
        raise UnsupportedModel(
            "This model draws within a function of torch (multi-head attention, alpha dropout), "
            "where there is no mask to take hold of; write the dropout out as nn.Dropout."
        )


class _Recording(_Mode):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[Tensor] = []

    def draw(self, make: Callable[[], Tensor], expectation: Callable[[], Tensor]) -> Tensor:
        del expectation
        self.found.append(make().detach())
        return self.found[-1]

    def seed(self) -> int:
        drawn = torch.randint(2**62, ())
        self.found.append(drawn)
        return int(drawn)


class _Replaying(_Mode):
    def __init__(self, draws: Sequence[Tensor]) -> None:
        super().__init__()
        self.left = list(draws)

    def draw(self, make: Callable[[], Tensor], expectation: Callable[[], Tensor]) -> Tensor:
        del expectation
        return self.left.pop(0) if self.left else make()

    def seed(self) -> int:
        return int(self.left.pop(0)) if self.left else int(torch.randint(2**62, ()))


class _Averaging(_Mode):
    def draw(self, make: Callable[[], Tensor], expectation: Callable[[], Tensor]) -> Tensor:
        del make
        return expectation()

    def seed(self) -> None:
        return None


@contextmanager
def recorded() -> Iterator[list[Tensor]]:
    """Within the block, every draw is added to the list."""
    with _Recording() as mode:
        yield mode.found


@contextmanager
def replayed(draws: Sequence[Tensor]) -> Iterator[None]:
    """Within the block, forward passes use these draws, in order."""
    with _Replaying(draws):
        yield


@contextmanager
def averaged() -> Iterator[None]:
    """Within the block, every draw is at its expectation: the mean network."""
    with _Averaging():
        yield


def draws_of(model: nn.Module, x: Tensor) -> Draws:
    """What one forward pass in the model's present mode draws; empty for a deterministic one.

    Args:
        model: Its buffers and the global random state are left as they were.
        x: Any inputs of the right shape.
    """
    mode = _Recording()
    _pass(model, x, mode)
    return tuple(mode.found)


def draws_anything(model: nn.Module, x: Tensor) -> bool:
    """Whether a forward pass in the model's present mode draws anything.

    A network of many parameters is asked without arithmetic, by tensors that have shapes and no
    values; a small one, for which loading what that takes would be dearer, or one that looks at its
    values or brings tensors of its own, is run instead.

    Args:
        model: Left as it was.
        x: Any inputs of the right shape.
    """
    if not is_large(model):
        return bool(draws_of(model, x))
    mode = _Recording()
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]), mode:
            without_values(model, x)
    except NEEDS_VALUES:
        return bool(draws_of(model, x))
    return bool(mode.found)


MANY = 20_000_000


def is_large(model: nn.Module) -> bool:
    """Whether a pass without values (:func:`without_values`) is cheaper than one with them."""
    return sum(parameter.numel() for parameter in model.parameters()) >= MANY


NEEDS_VALUES = (RuntimeError, TypeError, ValueError)
"""What :func:`without_values` raises of a network that looks at its values."""


def without_values(model: nn.Module, x: Tensor) -> Any:
    """A forward pass on tensors that have shapes and no values: what it returns has none either."""
    state = {n: t.to("meta") for n, t in [*model.named_parameters(), *model.named_buffers()]}
    return functional_call(model, state, (x.to("meta"),))


def places(model: nn.Module, x: Tensor) -> tuple[Place, ...]:
    """Where one forward pass in the model's present mode draws, in order.

    Args:
        model: Its buffers and the global random state are left as they were.
        x: Any inputs ``(N, C, H, W)``; masks are as many as examples.

    Raises:
        UnsupportedModel: If something is drawn that is no mask.
    """
    mode = _Surveying()
    _pass(model, x, mode)
    return tuple(mode.found)


def moving_buffers(model: nn.Module, x: Tensor) -> list[str]:
    """Buffers that a forward pass in the model's present mode moves, but for batch statistics.

    Args:
        model: Its buffers and the global random state are left as they were.
        x: Any inputs of the right shape.
    """
    held = {name: b.detach().clone() for name, b in model.named_buffers()}
    moved = list[str]()
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        model(x)
        for name, buffer in model.named_buffers():
            if not torch.equal(buffer, held[name]):
                moved.append(name)
                buffer.copy_(held[name])
    statistics = ("running_mean", "running_var", "num_batches_tracked")
    return [name for name in moved if not name.endswith(statistics)]


def _pass(model: nn.Module, x: Tensor, mode: _Mode) -> None:
    """One forward pass under ``mode`` that leaves nothing behind."""
    held = {name: b.detach().clone() for name, b in model.named_buffers()}
    with torch.no_grad(), torch.random.fork_rng(devices=[]), mode:
        model(x)
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            buffer.copy_(held[name])
