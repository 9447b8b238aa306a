r"""Soteria (Sun et al., CVPR 2021): mask the most revealing features of one linear layer.

For the input :math:`r = f(x)` of the defended layer, every feature :math:`j` gets

.. math:: s_j = \sum_{b} \frac{\lVert \partial r_{bj} / \partial x_b \rVert_2}{|r_{bj}| + \epsilon}

and the fraction :math:`p` with the *smallest* :math:`s_j`, those whose perturbation moves a
reconstruction most, is zeroed: the layer's weight gradient loses these columns. Its bias and all
other layers are untouched, which is also the way around it: leave the layer out of the objective,
or compare only the columns that are left.

The rule is defined on the gradient of one batch, so FedAVG is refused.

Departures:
    * The score is the released code's approximation of the paper's
      :math:`\lVert r\,(dr/dx)^{-1}\rVert`, as its README says.
    * That code (``as_released``) divides by the signed :math:`r + 0.1`, so that over a batch the
      scores of a feature that takes both signs cancel, and takes the percentile of the *signed*
      sums while it compares their magnitudes with it. Where features are never negative (ReLU,
      sigmoid) the two agree; of tanh or GELU features it masks fewer than the fraction asked for,
      none at all once the percentile is negative. The paper's text knows no signs: a score is a
      quotient of norms. So here it is :math:`|r| + \epsilon`, and masked features are counted, so
      that the knob means on every network what it says.
    * It also prunes dead ReLU features first, whose columns are zero anyway and which use up a
      small budget; here a feature with :math:`r = 0` and :math:`\partial r/\partial x = 0` on the
      whole batch is pruned last.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.func import functional_call

from leakatlas.errors import UnknownName, UnsupportedModel
from leakatlas.fl import ActsOn, ClientContext, Defense, Trait, Update, model_state
from leakatlas.models.structure import last_linear, linear_layers
from leakatlas.params import Fraction, Positive

_CHUNK = 64
"""Features whose gradients are computed in one batched backward pass; bounds memory."""

_CANCELS = 1e-3
"""Column sums this small relative to the entries are rounding."""


@dataclass(frozen=True, kw_only=True)
class Soteria(Defense):
    """Masks columns of one linear layer's weight gradient.

    Args:
        prune: Fraction p of features masked (1 to 40 % published, up to 80 % in demos).
        layer: Module name of the defended linear layer; the last one if empty.
        epsilon: Added to ``|r|`` (0.1 in the released code).
        as_released: Divide by ``r + epsilon`` with its sign, mask by the percentile of signed
            scores, and let dead features go first.
    """

    key: ClassVar[str] = "soteria"
    knob: ClassVar[str] = "prune"
    neutral: ClassVar[float] = 0.0
    strengths: ClassVar[tuple[float, ...]] = (0.4, 0.8)
    stage: ClassVar[int] = 50
    modes: ClassVar[frozenset[ActsOn]] = frozenset({ActsOn.SINGLE_BATCH})
    traits: ClassVar[frozenset[Trait]] = frozenset({Trait.READS_BATCH})

    prune: Fraction = 0.4
    layer: str = ""
    epsilon: Positive = 0.1
    as_released: bool = False

    def model(self, model: nn.Module) -> nn.Module:
        """The model as it is; refuses one that lacks the layer whose input is tapped."""
        self.defended(model)
        return model

    def workload(self, model: nn.Module) -> float:
        """One backward pass, half a gradient, for each feature of the tapped layer."""
        if self.prune == 0:
            return 1.0
        layer = model.get_submodule(self.defended(model))
        assert isinstance(layer, nn.Linear)
        return 1.0 + layer.in_features / 2

    def defended(self, model: nn.Module) -> str:
        """Name of the defended layer.

        Raises:
            UnsupportedModel: If the model has no linear layer.
            UnknownName: If it has none of the given name.
        """
        if self.layer:
            if self.layer not in linear_layers(model):
                raise UnknownName("linear layer", self.layer, linear_layers(model))
            return self.layer
        found = last_linear(model)
        if found is None:
            raise UnsupportedModel(
                f"Soteria masks a linear layer's gradient, and {type(model).__name__} has no "
                "torch.nn.Linear; use gradient_pruning, which works on any layer."
            )
        return found[0]

    def update(self, update: Update, context: ClientContext) -> Update:
        """Zero the masked columns of the defended layer's weight gradient."""
        if self.prune == 0:
            return update
        layer = self.defended(context.model)
        with torch.random.fork_rng(devices=[]):
            # Dropout in the second forward pass draws from the client's own stream.
            seed = int(torch.randint(2**62, (1,), generator=context.generator))
            torch.default_generator.manual_seed(seed)
            r, slope = sensitivity(context.model, layer, context.x)
        scores = score(r, slope, self.epsilon, as_released=self.as_released)
        mask = (released_mask if self.as_released else column_mask)(scores, self.prune)
        name = f"{layer}.weight"
        gradient = update.tensors[name]
        masked = torch.where(mask, gradient, torch.zeros_like(gradient))
        return update.with_tensors({**update.tensors, name: masked})

    def simulate(
        self, update: dict[str, Tensor], x: Tensor, y: Tensor, observed: Update
    ) -> dict[str, Tensor]:
        """The candidate's update without the columns that are zero in the observation."""
        del x, y
        if self.prune == 0:
            return update
        names = [f"{self.layer}.weight"] if self.layer else heads(observed.tensors)
        return {
            **update,
            **{n: update[n] * (observed.tensors[n] != 0).any(0).to(update[n].dtype) for n in names},
        }


def sensitivity(model: nn.Module, layer: str, x: Tensor) -> tuple[Tensor, Tensor]:
    """The input of a layer and how strongly each feature follows the image.

    A pure function: buffers are copied, so BN in train mode leaves no trace.

    Args:
        model: In the mode in which the client trains.
        layer: Name of a linear layer with m inputs.
        x: ``(N, C, H, W)``.

    Returns:
        ``r`` ``(N, m)`` and ``slope`` ``(N, m)``, the norms ``||d r_bj / d x_b||``; positions
        between the batch and the feature axis (tokens) are summed.
    """
    taken: list[Tensor] = []

    def tap(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        del module
        taken.append(inputs[0])

    x = x.detach().clone().requires_grad_()
    handle = model.get_submodule(layer).register_forward_pre_hook(tap)
    try:
        with torch.enable_grad():
            functional_call(model, model_state(model), (x,))
    finally:
        handle.remove()
    r = taken[0]
    features = r.shape[-1]
    slopes = []
    for chunk in torch.eye(features, dtype=r.dtype, device=r.device).split(_CHUNK):
        picks = chunk.reshape(len(chunk), *[1] * (r.dim() - 1), features).expand(-1, *r.shape)
        (jacobian,) = torch.autograd.grad(
            r, x, grad_outputs=picks, is_grads_batched=True, retain_graph=True
        )
        slopes.append(jacobian.flatten(2).norm(dim=2))
    flat = r.detach().reshape(len(r), -1, features).sum(1)
    return flat, torch.cat(slopes).T


def score(r: Tensor, slope: Tensor, epsilon: float, *, as_released: bool = False) -> Tensor:
    """``s_j`` ``(m,)`` of features ``r`` ``(N, m)`` with slopes ``(N, m)``; the smallest go.

    The released ones have signs.
    """
    if as_released:
        return (slope / (r + epsilon)).sum(0)
    scores = (slope / (r.abs() + epsilon)).sum(0)
    dead = ((r == 0) & (slope == 0)).all(0)
    return torch.where(dead, torch.full_like(scores, float("inf")), scores)


def column_mask(scores: Tensor, prune: float) -> Tensor:
    """Which features stay: all but the ``round(prune m)`` smallest scores, ``(m,)`` boolean."""
    mask = torch.ones(len(scores), dtype=torch.bool, device=scores.device)
    mask[scores.argsort(stable=True)[: round(prune * len(scores))]] = False
    return mask


def released_mask(scores: Tensor, prune: float) -> Tensor:
    """Which features stay in the authors' code, ``(m,)`` boolean.

    All whose magnitude reaches the percentile (linear between two scores) of the signed scores.
    """
    return scores.abs() >= torch.quantile(scores, prune)


def heads(tensors: Mapping[str, Tensor]) -> list[str]:
    """Weights that look like a classifier's head, found from the update alone.

    The errors of a softmax sum to zero over the classes, and so does every column of the head's
    weight gradient.
    """
    found = []
    for name, tensor in tensors.items():
        if tensor.dim() == 2 and tensor.shape[0] > 1:
            total = tensor.abs().sum()
            if bool(total > 0) and bool(tensor.sum(0).abs().sum() <= _CANCELS * total):
                found.append(name)
    return found
