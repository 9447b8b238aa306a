"""What an observed update says before anything is optimised."""

from __future__ import annotations

from torch import Tensor

from leakatlas.fl import View


def mean_gradient(view: View) -> dict[str, Tensor]:
    """The client's mean gradient, by parameter name.

    A weight delta stands for ``(before - after) / (eta T)``, the mean of the local gradients under
    plain SGD with learning rate eta and T steps; reading it takes the protocol.

    Raises:
        NotGranted: For a delta without the protocol.
    """
    update = view.update
    if update.kind == "gradient":
        return update.gradient()
    return update.gradient(lr=view.protocol.lr, steps=view.protocol.steps(view.num_examples))
