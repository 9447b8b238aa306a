"""The losses that clients minimise, as data: what a gradient is the gradient of.

A loss is part of the protocol and, like the architecture, public: whoever sends the model says what
it is to be trained for. Each takes the model's outputs ``(N, K)`` and targets of its own kind and
follows ``torch.nn.functional`` in everything, the denominators of its mean included.

=================  ==========================================  =================================
name               outputs                                     targets
=================  ==========================================  =================================
``cross_entropy``  logits                                      ``(N,)`` classes, or ``(N, K)``
                                                               probabilities
``nll``            log-probabilities                           the same
``focal``          logits                                      the same
``bce``            logits, or probabilities                    ``(N, K)`` in [0, 1]; ``(N,)``
                   (``from_logits=False``)                     classes become one-hot, for K = 1
                                                               they are the target itself
``mse``            values                                      as ``bce``, any range
``python``         anything that the function reads            the same
=================  ==========================================  =================================
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import PlainSerializer, PlainValidator
from torch import Tensor
from torch.nn import functional as F

from leakatlas.errors import InvalidInput, InvalidParameter, UnknownName
from leakatlas.fl import factory
from leakatlas.params import Configured, Fraction, NonNegative, Positive

Reduction = Literal["mean", "sum"]
Function = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class Loss(Configured):
    """What the client minimises; final classes follow."""

    key: ClassVar[str]
    """The name in protocols and files."""
    multilabel: ClassVar[bool] = False
    """Whether a target is a vector of K entries of its own, rather than one class."""

    def __call__(self, outputs: Tensor, y: Tensor, reduction: Reduction = "mean") -> Tensor:
        """The scalar that the client differentiates.

        Args:
            outputs: ``(N, K)``.
            y: Targets of this loss's kind, see the table above.
            reduction: Over the N examples.

        Raises:
            InvalidInput: If the targets do not fit the outputs.
        """
        return self.value(outputs, self.target(outputs, y), reduction)

    @abstractmethod
    def value(self, outputs: Tensor, y: Tensor, reduction: Reduction) -> Tensor:
        """The loss of targets that fit."""

    def target(self, outputs: Tensor, y: Tensor) -> Tensor:
        """Targets in the form in which :meth:`value` takes them."""
        return y

    def describe(self) -> str:
        """In words, for reports: the name, and what differs from the defaults."""
        plain = type(self)().to_json()
        changed = {n: v for n, v in self.to_json().items() if v != plain[n]}
        settings = ", ".join(f"{name}={value}" for name, value in changed.items())
        return f"{self.key} ({settings})" if settings else self.key


def _class_weights(weights: tuple[float, ...] | None, outputs: Tensor, who: str) -> Tensor | None:
    if weights is None:
        return None
    if len(weights) != outputs.shape[1]:
        raise InvalidInput(
            f"loss {who}: {len(weights)} class weights were given, the model has "
            f"{outputs.shape[1]} outputs; give one for each."
        )
    return outputs.new_tensor(weights)


@dataclass(frozen=True, kw_only=True)
class CrossEntropy(Loss):
    """Softmax cross-entropy, the loss of every row of the tables.

    Args:
        label_smoothing: Share of every target that is spread over all classes.
        class_weights: One factor per class; the mean divides by the targets' factors, as torch's.
    """

    key: ClassVar[str] = "cross_entropy"
    label_smoothing: Fraction = 0.0
    class_weights: tuple[NonNegative, ...] | None = None

    def value(self, outputs: Tensor, y: Tensor, reduction: Reduction) -> Tensor:
        """``-sum_k y_k log softmax(outputs)_k``."""
        return F.cross_entropy(
            outputs,
            y,
            weight=_class_weights(self.class_weights, outputs, self.key),
            label_smoothing=self.label_smoothing,
            reduction=reduction,
        )


@dataclass(frozen=True, kw_only=True)
class NLL(Loss):
    """Negative log-likelihood of outputs that are log-probabilities already.

    A model that ends with a softmax instead gets what torch gives it: ``-p_y``, whose gradient is
    another one than that of cross-entropy.

    Args:
        class_weights: As for cross-entropy.
    """

    key: ClassVar[str] = "nll"
    class_weights: tuple[NonNegative, ...] | None = None

    def value(self, outputs: Tensor, y: Tensor, reduction: Reduction) -> Tensor:
        """``-outputs_y``, or its expectation under probabilities."""
        weights = _class_weights(self.class_weights, outputs, self.key)
        if not y.is_floating_point():
            return F.nll_loss(outputs, y, weight=weights, reduction=reduction)
        each = -(y * outputs * (1 if weights is None else weights)).sum(1)
        return each.mean() if reduction == "mean" else each.sum()


@dataclass(frozen=True, kw_only=True)
class Focal(Loss):
    """Cross-entropy that counts easy examples less (Lin et al., 2017, Eq. 4 and 5), for K classes.

    Args:
        gamma: Exponent of ``1 - p``; 0 gives cross-entropy.
        class_weights: The factors alpha; the mean divides by N whatever they are.
    """

    key: ClassVar[str] = "focal"
    gamma: NonNegative = 2.0
    class_weights: tuple[NonNegative, ...] | None = None

    def value(self, outputs: Tensor, y: Tensor, reduction: Reduction) -> Tensor:
        """``-sum_k y_k alpha_k (1 - p_k)^gamma log p_k``."""
        log_p = F.log_softmax(outputs, dim=1)
        weights = _class_weights(self.class_weights, outputs, self.key)
        terms = log_p if weights is None else log_p * weights
        if self.gamma:
            terms = (1 - log_p.exp()) ** self.gamma * terms
        if y.is_floating_point():
            each = -(y * terms).sum(1)
        else:
            each = -terms.gather(1, y[:, None]).squeeze(1)
        return each.mean() if reduction == "mean" else each.sum()


def _vectors(outputs: Tensor, y: Tensor, who: str) -> Tensor:
    """Targets as ``(N, K)`` in the outputs' type."""
    K = outputs.shape[1]
    if y.dim() == 1 and K == 1:
        return y[:, None].to(outputs.dtype)
    if y.dim() == 1 and not y.is_floating_point():
        return F.one_hot(y, K).to(outputs.dtype)
    if y.shape != outputs.shape:
        raise InvalidInput(
            f"loss {who}: the targets have shape {tuple(y.shape)}, the outputs "
            f"{tuple(outputs.shape)}; expected the same shape, or class indices (N,)."
        )
    return y.to(outputs.dtype)


@dataclass(frozen=True, kw_only=True)
class BCE(Loss):
    """Binary cross-entropy of K independent labels; the mean runs over all ``N K`` of them.

    Args:
        from_logits: Whether a sigmoid is still to be applied; false for models that end with one.
        positive_weights: One factor per label on its positive term (from logits only).
    """

    key: ClassVar[str] = "bce"
    multilabel: ClassVar[bool] = True
    from_logits: bool = True
    positive_weights: tuple[Positive, ...] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.positive_weights is not None and not self.from_logits:
            raise InvalidParameter("BCE: positive_weights take logits; set from_logits=True.")

    def target(self, outputs: Tensor, y: Tensor) -> Tensor:
        """``(N, K)``."""
        return _vectors(outputs, y, self.key)

    def value(self, outputs: Tensor, y: Tensor, reduction: Reduction) -> Tensor:
        """``-y log s - (1 - y) log(1 - s)``."""
        if not self.from_logits:
            return F.binary_cross_entropy(outputs, y, reduction=reduction)
        weights = _class_weights(self.positive_weights, outputs, self.key)
        return F.binary_cross_entropy_with_logits(
            outputs, y, pos_weight=weights, reduction=reduction
        )


@dataclass(frozen=True, kw_only=True)
class MSE(Loss):
    """Squared error; the mean runs over all ``N K`` outputs."""

    key: ClassVar[str] = "mse"
    multilabel: ClassVar[bool] = True

    def target(self, outputs: Tensor, y: Tensor) -> Tensor:
        """``(N, K)``."""
        return _vectors(outputs, y, self.key)

    def value(self, outputs: Tensor, y: Tensor, reduction: Reduction) -> Tensor:
        """``(outputs - y)^2``."""
        return F.mse_loss(outputs, y, reduction=reduction)


@dataclass(frozen=True, kw_only=True)
class PythonLoss(Loss):
    """A function of one's own.

    Args:
        function: ``(outputs, targets) -> (N,)`` or the mean over the batch, a scalar; absent where
            a description was read from a file, which never runs code.
        name: ``file.py:function`` or ``package.module:function``, for recipes.
    """

    key: ClassVar[str] = "python"
    name: str = ""
    function: Annotated[Any, PlainSerializer(lambda _: None)] = field(default=None, repr=False)

    def value(self, outputs: Tensor, y: Tensor, reduction: Reduction) -> Tensor:
        """What the function gives, reduced.

        Raises:
            InvalidInput: If it is absent, or returns something else.
        """
        if self.function is None:
            raise InvalidInput(
                f"The loss {self.name!r} is Python code, which is not run from a file; pass the "
                "function itself as loss=, or name it in the audit's own YAML."
            )
        found = self.function(outputs, y)
        if not isinstance(found, Tensor) or found.shape not in ((), (len(outputs),)):
            got = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise InvalidInput(
                f"The loss {self.name!r} returned {got}; expected one value per example "
                f"({len(outputs)},) or a scalar mean."
            )
        if found.dim():
            return found.mean() if reduction == "mean" else found.sum()
        return found * len(outputs) if reduction == "sum" else found

    def describe(self) -> str:
        """The function's name."""
        return self.name


PLAIN = CrossEntropy()
"""Softmax cross-entropy without smoothing or weights: what every row of the tables assumes."""

LOSSES: dict[str, type[Loss]] = {
    cls.key: cls for cls in (CrossEntropy, NLL, Focal, BCE, MSE, PythonLoss)
}


def as_loss(value: object) -> Loss:
    """A loss from what people write: a name, a mapping with ``name:``, a function, or a loss.

    >>> as_loss({"name": "focal", "gamma": 1.5}).describe()
    'focal (gamma=1.5)'

    Raises:
        UnknownName: If no loss has that name.
        InvalidParameter: If a parameter is unknown or outside its range.
    """
    match value:
        case Loss():
            return value
        case str():
            if ":" in value:
                return PythonLoss(name=value)
            return _named(value)()
        case Mapping():
            values = {str(key): item for key, item in value.items()}
            name = values.pop("name", None)
            if name is None:
                raise InvalidParameter(
                    f"A loss is {{name: ..., parameters}}, got {', '.join(values) or 'nothing'}; "
                    f"names: {', '.join(LOSSES)}."
                )
            if name == PythonLoss.key:
                return PythonLoss(name=str(values.pop("function", "")))
            return _named(str(name)).from_json(values)
        case _ if callable(value):
            module = getattr(value, "__module__", None) or type(value).__module__
            label = getattr(value, "__qualname__", type(value).__qualname__)
            return PythonLoss(name=f"{module}:{label}", function=value)
    raise InvalidParameter(
        f"A loss is a name ({', '.join(LOSSES)}), a mapping or a function, got "
        f"{type(value).__name__}."
    )


def _named(name: str) -> type[Loss]:
    if name not in LOSSES or name == PythonLoss.key:
        raise UnknownName("loss", name, [n for n in LOSSES if n != PythonLoss.key])
    return LOSSES[name]


def loss_json(loss: Loss) -> Any:
    """A loss as plain JSON: its bare name where nothing differs from the defaults."""
    if isinstance(loss, PythonLoss):
        return {"name": loss.key, "function": loss.name}
    plain = type(loss)().to_json()
    changed = {n: v for n, v in loss.to_json().items() if v != plain[n]}
    return {"name": loss.key, **changed} if changed else loss.key


LossField = Annotated[Any, PlainValidator(as_loss), PlainSerializer(loss_json)]
"""The type of a protocol's field: takes what :func:`as_loss` takes, and holds a :class:`Loss`."""


def with_code(loss: Loss, folder: Path) -> Loss:
    """A described Python loss with its function, for descriptions that their owner trusts.

    Args:
        loss: Any; others than :class:`PythonLoss` are returned as they are.
        folder: Where a relative file is looked for.

    Raises:
        InvalidInput: If the code cannot be found or run.
        UnknownName: If it has no such function.
    """
    if not isinstance(loss, PythonLoss) or loss.function is not None:
        return loss
    location, _, attribute = loss.name.rpartition(":")
    name = f"{folder / location}:{attribute}" if location.endswith(".py") else loss.name
    return PythonLoss(name=loss.name, function=factory.find(name, "loss"))
