"""Capture of what Opacus releases (``opacus`` 1.5 and newer): the gradient after clip and noise.

>>> with capture_release(optimizer) as release:           # doctest: +SKIP
...     train_one_batch(model, optimizer)
>>> capture = release.capture(model, examples=32)         # doctest: +SKIP

``DPOptimizer`` noises ``p.grad`` inside ``step()``, between clipping and the inner optimizer: what
stands in ``p.grad`` before is not what leaves. Its step hook, a single slot that the accountant
uses, is called at the right moment; this module puts itself in front of it and hands it on.

Source: ``opacus.optimizers.DPOptimizer`` of opacus 1.6.0 (``pre_step``, ``attach_step_hook``).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from leakatlas.errors import InvalidInput, ProtocolError
from leakatlas.fl.capture import Capture, CapturedRound
from leakatlas.fl.intake import take_in
from leakatlas.fl.state import model_state
from leakatlas.fl.update import Update

if TYPE_CHECKING:
    from opacus import PrivacyEngine
    from opacus.optimizers import DPOptimizer


@dataclass
class Release:
    """The gradients that an optimizer released, one a step.

    Args:
        gradients: In the order of ``optimizer.params``.
        noise_multiplier: Standard deviation of the noise over the clipping norm.
        max_grad_norm: Clipping norm.
    """

    gradients: list[list[Tensor]] = field(default_factory=list)
    noise_multiplier: float = 0.0
    max_grad_norm: float = 0.0

    def capture(
        self,
        model: nn.Module,
        *,
        examples: int,
        received: Mapping[str, Tensor] | None = None,
        spent: Mapping[str, float | str] | None = None,
    ) -> Capture:
        """What audits take: the first released gradient, at the state before the step.

        Args:
            model: The model that was trained, wrapped by Opacus or not.
            examples: In the batch (the expected number under Poisson sampling).
            received: The state before the step, by name, if the model has moved on.
            spent: What :func:`formal` says of the accountant; doctor and report then show it.

        Raises:
            ProtocolError: If nothing was released.
            InvalidInput: If the gradients are not this model's.
        """
        if not self.gradients:
            raise ProtocolError("No gradient was released: the optimizer made no step.")
        inner = take_in(model).model
        trained = {n: p for n, p in inner.named_parameters() if p.requires_grad}
        first = self.gradients[0]
        shapes = [tuple(p.shape) for p in trained.values()]
        if shapes != [tuple(gradient.shape) for gradient in first]:
            raise InvalidInput(
                f"The optimizer released {len(first)} gradients, which are not those of the "
                f"{len(shapes)} trained parameters of {type(inner).__name__}."
            )
        named = dict(zip(trained, first, strict=True))
        update = Update.from_gradients(named, inner, num_examples=examples)
        state = model_state(inner) if received is None else dict(received)
        noted = (
            f"a gradient as released by Opacus: clipped to {self.max_grad_norm:g}, noise "
            f"multiplier {self.noise_multiplier:g}"
        )
        notes = [noted]
        if spent is not None:
            notes.append(
                f"the accountant ({spent['accountant']}) has counted epsilon "
                f"{spent['epsilon']:.3g} at delta {spent['delta']:g}"
            )
        return Capture(rounds=(CapturedRound(update=update, received=state),), notes=tuple(notes))


@contextmanager
def capture_release(optimizer: DPOptimizer) -> Iterator[Release]:
    """Record every gradient that leaves a ``DPOptimizer`` within the block.

    Args:
        optimizer: As ``PrivacyEngine.make_private`` returns it; its accountant goes on counting.
    """
    release = Release(
        noise_multiplier=float(optimizer.noise_multiplier),
        max_grad_norm=float(optimizer.max_grad_norm),
    )
    accountant: Any = optimizer.step_hook

    def see(stepped: DPOptimizer) -> None:
        release.gradients.append([p.grad.detach().clone() for p in stepped.params])
        if accountant is not None:
            accountant(stepped)

    optimizer.attach_step_hook(see)
    try:
        yield release
    finally:
        optimizer.attach_step_hook(accountant)


def formal(engine: PrivacyEngine, *, delta: float) -> dict[str, float | str]:
    """The guarantee that the accountant has counted so far, for a report's context.

    Args:
        engine: After training.
        delta: Of (epsilon, delta).
    """
    return {
        "epsilon": float(engine.get_epsilon(delta)),
        "delta": delta,
        "accountant": type(engine.accountant).mechanism(),
    }
