"""What the adversary sees at the head when it runs inputs of its own: features and logits.

Dummy inputs, public data, the global and the client's model: every estimate of what the client's
batch did at the head starts from one :class:`HeadPass`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call

from leakatlas.blocks.labels.counts import mean_probability
from leakatlas.blocks.labels.head import Head
from leakatlas.blocks.watch import Watch
from leakatlas.errors import InvalidInput, UnsupportedModel
from leakatlas.models.structure import in_mode

AT_ONCE = 10_000_000
"""Numbers of input that one forward pass takes: 3,000 images of 32 pixels, 66 of 224."""


@dataclass(frozen=True, kw_only=True)
class HeadPass:
    """One forward pass, cut at the head.

    Args:
        features: Input of the last Linear ``(N, D)``.
        logits: Its output ``(N, K)``.
        labels: Labels of the inputs ``(N,)`` if they are the adversary's own data.
    """

    features: Tensor
    logits: Tensor
    labels: Tensor | None = None


def head_pass(
    model: nn.Module,
    head: Head,
    inputs: Tensor,
    labels: Tensor | None = None,
    *,
    weights: dict[str, Tensor] | None = None,
    watch: Watch | None = None,
) -> HeadPass:
    """Run ``inputs`` ``(N, ...)`` through the model in eval mode and keep what meets the head.

    Features are the *input of the head*, whatever activation or pooling made them.

    Args:
        model: The classifier; left as it was.
        head: Its head, from :func:`~leakatlas.blocks.labels.find_head`.
        inputs: In the network's own (normalised) space.
        labels: Labels of the inputs, kept beside them.
        weights: Other weights to run at, by parameter name (the client's after training).
        watch: Ends the pass early, after so many inputs as time allows.
    """
    caught: list[Tensor] = []

    def catch(_module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        caught.append(arguments[0])

    hook = model.get_submodule(head.module_name).register_forward_pre_hook(catch)
    try:
        with in_mode(model, train=False), torch.no_grad(), torch.random.fork_rng(devices=[]):
            # As many at once as fit in little memory: small inputs all, large photos a few.
            parts = inputs.split(max(1, AT_ONCE // max(inputs[0].numel(), 1)))
            logits = list[Tensor]()
            for step in (watch or Watch()).steps(len(parts)):
                logits.append(functional_call(model, weights or {}, (parts[step.index],)))
    finally:
        hook.remove()
    return HeadPass(
        features=torch.cat(caught).detach(),
        logits=torch.cat(logits).detach(),
        labels=labels if labels is None else labels[: sum(map(len, logits))],
    )


def mean_feature_sum(seen: HeadPass) -> Tensor:
    """Mean over inputs of ``sum_j h_j``, a scalar in float64.

    Raises:
        UnsupportedModel: If it is within a tenth of 0 relative to ``E sum_j |h_j|``: zero-mean
            features (tanh, SiLU, GELU heads), where dividing by it is meaningless.
    """
    h = seen.features.double()
    s, size = h.sum(dim=1).mean(), h.abs().sum(dim=1).mean()
    if float(s.abs()) < 0.1 * float(size) or float(size) == 0:
        raise UnsupportedModel(
            f"weight-only label counts divide by the mean feature sum, which is {float(s):.3g} "
            f"against a mean absolute sum of {float(size):.3g}: the features change sign. Use the "
            "bias form (counts_from_bias)."
        )
    return s


def class_row_sums(seen: HeadPass) -> Tensor:
    """``G_c`` of an imagined batch that is all of class k, ``(K, K)`` by (k, c).

    Row sums of the head's gradient follow from features and logits alone:
    ``G_c = mean_i (p_ic - [c = k]) s_i``. Without labels every input stands for every class
    (dummy data); with labels row k uses the inputs of class k, and all inputs if there are none.
    """
    p, s = seen.logits.double().softmax(dim=1), seen.features.double().sum(dim=1)
    classes = p.shape[1]
    rows = torch.empty(classes, classes, dtype=torch.float64, device=p.device)
    for k in range(classes):
        mine = slice(None) if seen.labels is None else _members(seen.labels, k)
        rows[k] = (p[mine] * s[mine, None]).mean(dim=0)
        rows[k, k] -= s[mine].mean()
    return rows


def confusion(seen: HeadPass) -> Tensor:
    """``E[p | y = k]``, ``(K, K)`` by (k, c), from labelled public data.

    A class without an example takes the mean over all examples.
    """
    if seen.labels is None:
        raise InvalidInput("confusion: needs labelled public data, got inputs without labels.")
    p = seen.logits.double().softmax(dim=1)
    return torch.stack([p[_members(seen.labels, k)].mean(dim=0) for k in range(p.shape[1])])


def mean_probability_of(seen: HeadPass) -> Tensor:
    """The mean softmax output of these inputs, ``(K,)``."""
    return mean_probability(seen.logits)


def _members(labels: Tensor, k: int) -> Tensor:
    members = (labels == k).nonzero().flatten()
    return members if len(members) else torch.arange(len(labels), device=labels.device)
