r"""Matching of batch normalisation statistics, one of the strongest image priors.

.. math:: R_{BN} = \sum_l \lVert \mu_l(\hat x) - \bar\mu_l \rVert_2
          + \lVert \sigma^2_l(\hat x) - \bar v_l \rVert_2

with the per-channel mean and biased variance of the *input* of every BN layer l.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from leakatlas.blocks.matching import norm
from leakatlas.errors import InvalidInput, UnsupportedModel
from leakatlas.fl import batchnorm_statistics
from leakatlas.models.structure import batchnorm_layers

Statistics = Mapping[str, tuple[Tensor, Tensor]]


def running_statistics(model: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    """The running mean and variance of every BN layer, by layer name.

    They average over all data the model has seen (the variance in its unbiased form), so a
    private batch meets them only approximately.

    Raises:
        UnsupportedModel: If the model has no BN layer, or one that keeps no running statistics.
    """
    found: dict[str, tuple[Tensor, Tensor]] = {}
    for name, layer in batchnorm_layers(model).items():
        mean, variance = layer.running_mean, layer.running_var
        if not isinstance(mean, Tensor) or not isinstance(variance, Tensor):
            raise UnsupportedModel(
                f"BN layer {name!r} keeps no running statistics (track_running_stats=False); "
                "give the batch's own statistics, or leave this prior out."
            )
        found[name] = (mean.detach().clone(), variance.detach().clone())
    if not found:
        raise UnsupportedModel(
            f"{type(model).__name__} has no BN layer, so there are no statistics to match; "
            "leave this prior out."
        )
    return found


def distance(statistics: Statistics, target: Statistics, *, first_weight: float = 1.0) -> Tensor:
    """R_BN of the module docstring.

    Args:
        statistics: Of the candidate batch.
        target: What they should be; its layers are the ones compared.
        first_weight: Factor on the first layer of ``statistics``, the one nearest to the pixels.

    Raises:
        InvalidInput: If the candidate's statistics lack a layer.
    """
    missing = [name for name in target if name not in statistics]
    if missing or not target:
        raise InvalidInput(
            f"BN matching: the candidate's forward pass never reached layer {missing[0]!r}."
            if missing
            else "BN matching needs the statistics of at least one layer, got none."
        )
    first = next(name for name in statistics if name in target)
    terms = [
        (first_weight if name == first else 1.0)
        * (norm(statistics[name][0] - mean) + norm(statistics[name][1] - variance))
        for name, (mean, variance) in target.items()
    ]
    return torch.stack(terms).sum()


def prior(
    model: nn.Module, target: Statistics, *, first_weight: float = 1.0
) -> Callable[[Tensor], Tensor]:
    """R_BN as a function of the candidate batch ``(N, C, H, W)``.

    Args:
        model: In the mode in which the client saw the batch; it is not changed.
        target: By layer name.
        first_weight: See :func:`distance`.
    """
    state = {
        name: tensor.detach()
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]
    }

    def penalty(x: Tensor) -> Tensor:
        return distance(batchnorm_statistics(model, state, x), target, first_weight=first_weight)

    return penalty
