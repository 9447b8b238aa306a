r"""FedLeak: match part of the update, and keep to where the matching loss is flat.

Fan, Wang, Chen and Zhou, "Boosting Gradient Leakage Attacks: Data Reconstruction in Realistic FL
Settings", USENIX Security 2025. FedSGD, and FedAVG by replaying the local steps.

The paper holds that matching fails in realistic training because the search does not get through,
not because several images have the same gradient. Two ingredients are to help it:

* *partial matching*: only a share of the update's entries is compared, those of largest magnitude
  in every tensor,
* *gradient regularisation*: where the matching loss f is steep the search is led away,

.. math:: \min_x \; f(x) + \lambda \lVert \nabla f(x) \rVert, \qquad
          f(x) = 1 - \cos\bigl(m \odot \nabla_\theta \mathcal L(x, y),\, m \odot g\bigr)
                 + \alpha \, \mathrm{TV}(x) .

The penalty's slope takes a third derivative of the network; it is replaced by a difference along
the slope itself, so that a step costs two slopes of f and no more,

.. math:: \nabla \bigl(f + \lambda \lVert \nabla f \rVert\bigr) \approx
          (1 - \kappa) \, \nabla f(x) + \kappa \, \nabla f\Bigl(x + \rho
          \frac{\nabla f(x)}{\lVert \nabla f(x) \rVert}\Bigr), \qquad \kappa = \lambda / \rho .

Measured (study ``fedleak``): with as many slopes and as much CPU time [3] reaches more, preset
against preset and rehearsed against rehearsed, on a fresh and a trained network with batch
normalisation; on the trained one partial matching and regularisation each take something away.

Departures (the paper's formulas and settings were not at hand; this is rebuilt from its abstract,
which names both ingredients and says that both are approximated):
    * The rule that selects entries, the difference above, the cosine, the prior and every default
      are ours. ``selection="random"`` compares a random share instead.
    * The radius rho is given by entry: the point ahead differs by a root mean square of ``radius``.
    * Labels are granted, or read off the update as the other attacks of this folder do.
    * Text is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Literal, Self

import torch
from pydantic import Field
from torch import Tensor

from leakatlas.attacks.api import Attack, Outlook, Reconstruction, attack, nothing_found
from leakatlas.blocks import descent, init, matching, observed, priors
from leakatlas.blocks.watch import Watch
from leakatlas.fl import View
from leakatlas.params import Fraction, NonNegative, NonNegativeInt, Positive, PositiveInt
from leakatlas.threat import Knowledge


@attack("fedleak", needs=Knowledge.UPDATES | Knowledge.BASIC)
@dataclass(frozen=True, kw_only=True)
class FedLeak(Attack):
    r"""Adam on a partial cosine distance whose slope is mixed with that of a point ahead.

    Args:
        steps: Iterations.
        lr: Step size of Adam in model space; falls to 0 along a cosine.
        share: Share of every tensor's entries that is compared; 1 compares all.
        selection: Which: those of ``largest`` magnitude in the update, or ``random`` ones.
        mix: Weight kappa of the slope ahead; 0 leaves the regularisation out.
        radius: Root mean square by which the point ahead differs, in model space.
        tv_weight: Alpha of the total variation.
        labels: Labels that were read from this update beforehand, where none are granted; the
            attack's own rule if empty.
    """

    steps: PositiveInt = 4_800
    lr: Positive = 0.1
    share: Annotated[float, Field(gt=0, le=1)] = 0.5
    selection: Literal["largest", "random"] = "largest"
    mix: Fraction = 0.5
    radius: Positive = 0.01
    tv_weight: NonNegative = 1e-1
    labels: tuple[NonNegativeInt, ...] = ()

    @classmethod
    def tuned(cls) -> Self:
        """Our setting for a few hundred iterations, after that of Inverting Gradients."""
        return cls(steps=400, lr=0.3, tv_weight=0.03)

    @classmethod
    def variants(cls) -> Mapping[str, Self]:
        """With more and less of both ingredients, and of the prior."""
        tuned = cls.tuned()
        return {
            "tuned": tuned,
            "tv 0.1": replace(tuned, tv_weight=0.1),
            "no regularisation": replace(tuned, mix=0.0),
            "published": cls(),
            "a fifth of the entries": replace(tuned, share=0.2),
            "tv 0.3": replace(tuned, tv_weight=0.3),
        }

    def outlook(self, view: View) -> Outlook:
        """What stands against it."""
        told = f"{view.num_examples} images share one update, a share {self.share:g} is compared"
        if view.rounds and view.update.kind != "gradient":
            return Outlook("unknown", f"{told}; the local steps are unrolled")
        return Outlook("unknown", told)

    def run(self, view: View, *, generator: torch.Generator, watch: Watch) -> Reconstruction:
        """One descent; the iterate of smallest partial distance is kept."""
        g = dict(view.update.tensors)
        if not any(bool(tensor.any()) for tensor in g.values()):
            return nothing_found(view.input_shape, "the update is zero; it has no direction")
        like = next(iter(g.values()))
        y = observed.known_labels(view, self.labels)
        replay = view.replayer()
        masks = selected(g, self.share, self.selection, generator)
        distance = matching.masked(matching.cosine, masks) if masks else matching.cosine

        def f(x: Tensor) -> tuple[Tensor, Tensor]:
            match = distance(replay(x, y), g)
            return match + self.tv_weight * priors.tv_mean(x), match

        def objective(variables: descent.Variables, t: Tensor) -> descent.Value:
            del t
            return regularised(f, variables["x"], mix=self.mix, radius=self.radius)

        found = descent.descend(
            objective,
            {"x": init.normal(view.batch_shape, generator=generator, like=like)},
            optimizer=descent.adam(self.lr),
            steps=self.steps,
            watch=watch,
            schedule=descent.cosine_decay(),
            after=(descent.inside(view.box, "x"),),
        )
        loss = float(found.criterion)
        return Reconstruction(
            images=found.best["x"],
            labels=y,
            confidence=torch.full((view.num_examples,), -loss, dtype=torch.float64),
            notes={
                "matching_loss": loss,
                "iterations": float(found.steps),
                "labels_granted": float(view.has("labels")),
            },
        ).or_failed(found.trouble)


def selected(
    g: Mapping[str, Tensor],
    share: float,
    selection: Literal["largest", "random"],
    generator: torch.Generator,
) -> dict[str, Tensor]:
    """Masks of the compared entries, at least one a tensor; none at all for a share of 1.

    Args:
        g: The update.
        share: Of every tensor's entries.
        selection: By magnitude (ties by position), or at random.
        generator: Of random ones.
    """
    if share == 1:
        return {}
    masks: dict[str, Tensor] = {}
    for name, tensor in g.items():
        count = max(1, round(share * tensor.numel()))
        if selection == "largest":
            order = tensor.abs().flatten().argsort(descending=True, stable=True)
        else:
            order = torch.randperm(tensor.numel(), generator=generator).to(tensor.device)
        mask = torch.zeros(tensor.numel(), dtype=torch.bool, device=tensor.device)
        mask[order[:count]] = True
        masks[name] = mask.reshape(tensor.shape)
    return masks


def regularised(
    f: Callable[[Tensor], tuple[Tensor, Tensor]], x: Tensor, *, mix: float, radius: float
) -> descent.Value:
    """An objective with f's value at ``x``, whose slope is mixed with that at a point ahead.

    Args:
        f: ``x -> (value, criterion)``.
        x: Takes gradients.
        mix: Kappa.
        radius: Root mean square of the way to the point ahead.
    """
    value, criterion = f(x)
    if mix == 0:
        return descent.Value(value, criterion)
    (slope,) = torch.autograd.grad(value, x)
    length = slope.square().mean().sqrt()
    way = torch.where(length > 0, radius * slope / length, torch.zeros_like(slope))
    ahead, _ = f(x + way)
    # Linear in x: the slope at x is known and need not be computed again.
    here = (slope * (x - x.detach())).sum()
    total = value.detach() + (1 - mix) * here + mix * (ahead - ahead.detach())
    return descent.Value(total, criterion.detach())
