r"""E2EGI: several searches, recombined image by image so that the gradient's loss falls.

Li, Zhang, Li, Chen, Pan and Yang, "E2EGI: End-to-End Gradient Inversion in Federated Learning",
IEEE Journal of Biomedical and Health Informatics 2023.   FedSGD.

With :math:`C(x) = 1 - \cos(\nabla_\theta \mathcal L(x, y), g)`, n groups of candidate batches
minimise

.. math:: C(x) + \lambda_{TV} \mathrm{TV}(x) + \lambda_{BN} R_{BN}(x)
          + \lambda_G \operatorname{mean}(x - \bar x)^2
          + \lambda_{\ell_2} \operatorname{mean}_i \lVert x_i \rVert_2

by Adam on the sign of the slope, with pixel noise after every step and a projection onto valid
pixels, in three stages (0.3, 0.3 and 0.4 of the iterations):

1. *Initial*: every group alone.
2. *MLCO*, minimum loss combinatorial optimisation: a consensus :math:`\bar x` is built, every
   group runs ``inner`` iterations with the group term on, and so on.
3. *Final*: one run from the consensus, without noise and group term.

The consensus starts from the group of least C. For every place i and every group, image i is
replaced by that group's, and the replacement stays if C of the whole batch falls. So C of the
consensus never exceeds that of the best group. Every stage gives its iterate of least C. The step
size falls linearly from stage to stage and along (nearly) half a cosine within each.

Labels, where none are granted: an absent class of a fresh head has the row sum s/K of its
gradient, from which follows what one example takes away (:func:`leakatlas.blocks.labels.e2egi`).
It presumes non-negative features, a nearly uniform softmax and one absent class.

Measured (study ``e2egi``): recombining three searches gives more than one of them, than the best of
three restarts and than [3] under our preset with as many, at equal CPU time; [3] as it rehearsed is
ahead of it, and alone passes the nearest public image.

Departures:
    - Groups are aligned inside each class of labels before they are recombined (least squared
      pixel difference, to the best group): equal labels may have settled in exchanged places, and
      a greedy replacement would then take one image twice.
    - The final stage starts from the newest consensus. The release builds it, prints its loss, and
      starts from the one before.
    - The distributed version is one machine's exact equivalent: ``chunk`` computes gradients of
      large batches in pieces, twice. It needs examples that do not meet in a normalisation.
    - A search over one's own images for learning rate and weights is what a rehearsal does;
      :meth:`E2EGI.tuned` is ours, chosen on other images than any figure.

Released code: ``zhaohuali/E2EGI``, ``kernels/gradient_inversion.py``, ``kernels/MLCO.py``. Its
victim is started without ``--upload-bn`` in the README; the attack's ``--exact-bn`` then silently
falls back to running statistics. Here the batch's statistics are the explicit grant ``batch_bn``.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, Self

import torch
from torch import Tensor

from leakatlas.attacks.api import Attack, Outlook, Reconstruction, attack, nothing_found
from leakatlas.blocks import batchnorm, chunks, descent, init, labels, matching, observed, priors
from leakatlas.blocks.watch import Watch
from leakatlas.fl import View
from leakatlas.fl.losses import PLAIN
from leakatlas.models.structure import example_input, has_batchnorm
from leakatlas.params import NonNegative, NonNegativeInt, Positive, PositiveInt
from leakatlas.threat import Grant, Knowledge

SHARES = (0.3, 0.3, 0.4)
"""Of the iterations: initial, recombination, final."""

Replay = Callable[[Tensor, Tensor], dict[str, Tensor]]


@attack("e2egi", needs=Knowledge.UPDATES | Knowledge.BASIC)
@dataclass(frozen=True, kw_only=True)
class E2EGI(Attack):
    r"""Signed descent in groups, recombined image by image.

    Args:
        steps: Iterations T of a group, over all stages.
        groups: Searches n.
        inner: Iterations between two recombinations, fewer if the stage is shorter.
        lr: Step size at first.
        lr_end: Step size at last.
        tv_weight: :math:`\lambda_{TV}`.
        bn_weight: :math:`\lambda_{BN}`.
        group_weight: :math:`\lambda_G`.
        l2_weight: :math:`\lambda_{\ell_2}`.
        noise: Standard deviation of the pixel noise, in units of the step size.
        bn: Statistics of the private batch (a grant), or the model's running ones.
        distance: How gradients are compared.
        aligned: Whether groups are aligned inside each class before they are recombined.
        chunk: Examples whose gradient is computed at once; all if None.
        labels: Labels that were read from this update beforehand, where none are granted; the
            rule above if empty.
    """

    version: ClassVar[int] = 1

    steps: PositiveInt = 24_000
    groups: PositiveInt = 8
    inner: PositiveInt = 1_000
    lr: Positive = 0.1046
    lr_end: Positive = 1e-3
    tv_weight: NonNegative = 0.0114
    bn_weight: NonNegative = 0.0357
    group_weight: NonNegative = 0.01
    l2_weight: NonNegative = 0.0
    noise: NonNegative = 0.2
    bn: Literal["exact", "running"] = "exact"
    distance: Literal["cosine", "squared_l2"] = "cosine"
    aligned: bool = True
    chunk: PositiveInt | None = None
    labels: tuple[NonNegativeInt, ...] = ()

    departs_from_letter = (
        "The table prints E for the statistics of the private batch; here those are the explicit "
        "grant batch_bn. The rest of the method reads the update and the pixel range."
    )

    def grants(self) -> frozenset[Grant]:
        """The batch's own BN statistics, where they are matched."""
        exact = self.bn == "exact" and self.bn_weight > 0
        return frozenset({Grant.BATCH_BN}) if exact else frozenset()

    @classmethod
    def tuned(cls) -> Self:
        """Ours for short budgets: three groups, no noise, no grant; BN is left out."""
        return cls(
            steps=400, groups=3, inner=40, tv_weight=0.05, bn_weight=0.0, noise=0.0,
            group_weight=0.1,
        )  # fmt: skip

    @classmethod
    def variants(cls) -> Mapping[str, Self]:
        """Ours without and with the model's running statistics, and the published preset."""
        tuned = cls.tuned()
        return {
            "tuned": tuned,
            "tuned, running bn": cls(**{**vars(tuned), "bn": "running", "bn_weight": 0.001}),
            "published": cls(bn="running"),
        }

    def outlook(self, view: View) -> Outlook:
        """A model without normalisation has no statistics, and several images share a gradient."""
        if self.bn_weight > 0 and not has_batchnorm(view.model):
            return Outlook("hopeless", "the model has no batch normalisation to match")
        if view.num_examples == 1:
            return Outlook("unknown", "of one image nothing is recombined: the best group wins")
        return Outlook("unknown", f"{view.num_examples} images share one gradient")

    def run(self, view: View, *, generator: torch.Generator, watch: Watch) -> Reconstruction:
        """Labels, then the three stages."""
        g = dict(view.update.tensors)
        if not any(bool(tensor.any()) for tensor in g.values()):
            return nothing_found(view.input_shape, "the update is zero; it has no direction")
        like = next(iter(g.values()))
        y = self.read_labels(view)
        replay: Replay = view.replayer()
        if self.chunk is not None:
            replay = chunks.in_chunks(replay, self.chunk, view)
        compare = matching.cosine if self.distance == "cosine" else matching.squared_l2
        bn_prior = self.bn_prior(view)

        def distance(x: Tensor) -> Tensor:
            return compare(replay(x, y), g)

        def value(x: Tensor) -> descent.Value:
            match = distance(x)
            total = match + self.tv_weight * priors.tv_mean(x)
            total = total + self.bn_weight * bn_prior(x) + self.l2_weight * priors.l2_norm(x)
            return descent.Value(total, match)

        lengths = stage_lengths(self.steps, self.inner)
        ends = stage_rates(lengths, self.lr, self.lr_end)
        stages = zip(lengths, ends, watch.share([float(n) for n in lengths]), strict=False)
        x = init.normal((self.groups, *view.batch_shape), generator=generator, like=like)
        x_bar, iterations = x[0], 0
        loss = torch.full((self.groups,), math.inf)
        for number, (steps, (first, last), part) in enumerate(stages):
            initial, final = number == 0, number == len(lengths) - 1

            def objective(
                variables: descent.Variables, t: Tensor,
                *, apart: bool = initial or final, near: Tensor = x_bar,
            ) -> descent.Value:  # fmt: skip
                del t
                found = value(variables["x"])
                if apart:
                    return found
                pull = (variables["x"] - near).square().mean()
                return descent.Value(found.total + self.group_weight * pull, found.criterion)

            shake = () if final else (descent.langevin(self.noise, "x", generator=generator),)
            end = descent.descend(
                objective,
                {"x": x_bar if final else x},
                candidates=None if final else self.groups,
                optimizer=descent.adam(first),
                steps=steps,
                watch=part,
                schedule=falling(last / first, steps),
                transform=descent.signed,
                after=(*shake, descent.inside(view.box, "x")),
                generators=(generator,),
            )
            iterations += end.steps
            if end.trouble:
                return nothing_found(view.input_shape, end.trouble)
            loss = end.criterion
            if final:
                x_bar = end.best["x"]
                continue
            x = end.best["x"]
            best = int(loss.argmin())
            x = align(x, best, y) if self.aligned else x
            x_bar = consensus(x, best, lambda candidate: float(distance(candidate).detach()))
        spread = (x - x.mean(0)).square().mean().sqrt()
        matched = float(distance(x_bar).detach())
        return Reconstruction(
            images=x_bar,
            labels=y,
            confidence=torch.full((len(x_bar),), -matched, dtype=torch.float64),
            notes={
                "matching_loss": matched,
                "iterations": float(iterations),
                "spread_of_groups": float(spread),
                "labels_granted": float(view.has("labels")),
            },
        )

    def read_labels(self, view: View) -> Tensor:
        """Granted, given, of a single example, or by the rule of the module docstring, ``(N,)``."""
        plain = view.loss == PLAIN and view.num_examples > 1
        if view.has("labels") or self.labels or not plain:
            return observed.known_labels(view, self.labels)
        head = labels.find_head(view.model, example_input(view.model, view.input_shape))
        weight = head.weight_grad(observed.mean_gradient(view))
        return labels.labels_from_counts(labels.e2egi(weight, view.num_examples))

    def bn_prior(self, view: View) -> Callable[[Tensor], Tensor]:
        """R_BN of a candidate batch ``(N, C, H, W)``; 0 where it has no weight."""
        if self.bn_weight == 0:
            return lambda x: x.new_zeros(())
        model = view.model
        exact = self.bn == "exact"
        target = view.batch_bn if exact else batchnorm.running_statistics(model)
        return batchnorm.prior(model, target)


# -- stages ----------------------------------------------------------------------------------------


def stage_lengths(steps: int, inner: int) -> list[int]:
    """Iterations of every stage: initial, each recombination's, final; at least one each."""
    initial, middle, final = (math.ceil(share * steps) for share in SHARES)
    each = min(inner, middle)
    return [initial, *[each] * math.ceil(middle / each), final]


def stage_rates(lengths: Sequence[int], lr: float, lr_end: float) -> list[tuple[float, float]]:
    """Step size at both ends of every stage, on a line from ``lr`` to ``lr_end``."""
    total, done = sum(lengths), 0
    ends = [lr]
    for length in lengths:
        done += length
        ends.append(lr + (lr_end - lr) * done / total)
    return list(itertools.pairwise(ends))


def falling(factor: float, steps: int) -> Callable[[float], float]:
    """Half a cosine from 1 down to ``factor``, with a period of ten steps more than there are."""
    period = steps + 10
    return lambda progress: (
        factor + (1 - factor) * 0.5 * (1 + math.cos(math.pi * progress * steps / period))
    )


# -- recombination ---------------------------------------------------------------------------------


def consensus(x: Tensor, best: int, loss: Callable[[Tensor], float]) -> Tensor:
    """Greedy recombination of groups ``(n, N, C, H, W)``, image by image, ``(N, C, H, W)``.

    Args:
        x: The groups.
        best: The group to begin with.
        loss: Of a whole batch.
    """
    chosen = x[best].clone()
    least = loss(chosen)
    for i in range(x.shape[1]):
        for group in x:
            trial = chosen.clone()
            trial[i] = group[i]
            reached = loss(trial)
            if reached < least:
                chosen, least = trial, reached
    return chosen


def align(x: Tensor, best: int, y: Tensor) -> Tensor:
    """Groups ``(n, N, C, H, W)`` with the images of each class in the order of the best group's."""
    from scipy.optimize import linear_sum_assignment  # half a second to import

    aligned = x.clone()
    for c in y.unique().tolist():
        places = torch.nonzero(y == c).flatten()
        wanted = x[best, places].flatten(1).double()
        for s in range(len(x)):
            have = x[s, places].flatten(1).double()
            _, order = linear_sum_assignment(torch.cdist(wanted, have).square().cpu().numpy())
            aligned[s, places] = x[s, places[torch.as_tensor(order, device=places.device)]]
    return aligned
