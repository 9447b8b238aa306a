"""What an observed update says before anything is optimised."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from leakatlas.blocks import labels
from leakatlas.errors import InvalidParameter
from leakatlas.fl import View
from leakatlas.models.structure import example_input


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


def known_labels(view: View, read: Sequence[int] = ()) -> Tensor:
    """The granted labels ``(N,)``, else the one target (N = 1), else those of recovered counts.

    Only the multiset of recovered counts is known, so they come in ascending order.

    Args:
        view: The adversary's side.
        read: Labels that the adversary read from this update beforehand, in place of a rule.

    Raises:
        InvalidParameter: If ``read`` are not the labels of such a batch.
        UnsupportedModel: If the client's loss does not let them be read.
    """
    if view.has("labels"):
        return view.labels
    g = mean_gradient(view)
    if read:
        N, K = view.num_examples, view.classes
        if len(read) != N or not all(0 <= label < K for label in read):
            raise InvalidParameter(
                f"labels={tuple(read)}: the update is of {N} examples of {K} classes; give {N} "
                f"labels from 0 to {K - 1}, or none."
            )
        return torch.tensor(read, device=next(iter(g.values())).device)
    head = labels.find_head(view.model, example_input(view.model, view.input_shape))
    if view.num_examples == 1:
        return labels.target_of_one(view.loss, g, head, view.model)
    labels.require_plain(view.loss, "Counting labels")
    if head.bias_name is None:
        return labels.column_min(g, head, view.num_examples)
    counts = labels.uniform_counts(head.bias_grad(g), view.num_examples)
    return labels.labels_from_counts(counts)
