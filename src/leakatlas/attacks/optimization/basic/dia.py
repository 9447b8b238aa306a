r"""DIA, the dropout inversion attack: find the client's dropout masks along with its images.

Scheliga, Mäder and Seeland, "Dropout Is NOT All You Need to Prevent Gradient Leakage", AAAI 2023.
FedSGD, one round; the client's model is in train mode.

.. math:: \hat x, \hat m = \arg\min_{x,\; m_l \in [0, 1]} \;
          1 - \frac{\langle \nabla_\theta \mathcal L(x, y; m),\, g \rangle}
                   {\lVert \nabla_\theta \mathcal L(x, y; m) \rVert \, \lVert g \rVert}
          + \alpha \, \mathrm{TV}(x)
          + \beta \sum_l \lvert (1 - \overline{m_l}) - p_l \rvert

A client draws masks that nobody else knows, and the gradient belongs to the thinned network that
they leave. The adversary knows where layers drop and at which rate :math:`p_l`, so it relaxes every
mask from {0, 1} to [0, 1], starts it at a draw of its own and moves it with the images; the last
term keeps its mean :math:`\overline{m_l}` at the rate. Adam follows the sign of the gradient in the
images and the gradient itself in the masks; both are projected after every step. Without dropout,
or with granted masks, this is [3].

Labels: the paper takes them as known; here ``Grant.LABELS`` gives them, or the rules of
:func:`~leakatlas.blocks.observed.known_labels` read them.

Measured (study ``dia``): on transformers, fresh and trained, and on trained fully connected
networks finding the masks gives clearly more than ignoring them, about as much as being granted
them (at dropout .5 of the latter within chance, on eight images); on fresh fully connected ones the
gain is within chance and the oracle is far ahead.

Departures:
    - Settings and steps follow the released code; of the paper, the abstract was read.
    - The released step size falls tenfold when the objective has not improved for 800 iterations,
      and the run ends after 4,000 of them; here it falls at 3/8, 5/8 and 7/8 of the run.
    - Masks are those of every place of the forward pass that draws one, whether a module or a
      function calls for it; where whole channels are dropped, the relaxed mask does not know it.
    - With several local steps every step has masks of its own; the paper has one.
    - ``restarts`` and :meth:`DIA.tuned` are ours.

Released code: ``dAI-SY-Group/DropoutInversionAttack``, ``src/attacks.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal, Self

import torch
from torch import Tensor

from leakatlas.attacks.api import Attack, Outlook, Reconstruction, attack, nothing_found
from leakatlas.blocks import descent, init, matching, observed, priors
from leakatlas.blocks.watch import Watch
from leakatlas.fl import FedAVG, View, draws
from leakatlas.params import NonNegative, Positive, PositiveInt
from leakatlas.threat import Knowledge


@attack("dia", needs=Knowledge.UPDATES | Knowledge.BASIC | Knowledge.TRAINING)
@dataclass(frozen=True, kw_only=True)
class DIA(Attack):
    r"""Signed descent on the images and descent on the masks, by the cosine distance.

    Args:
        steps: Iterations.
        lr: Step size of the images, in model space.
        mask_lr: Step size of the masks; the released code has one for both.
        tv_weight: Alpha.
        mask_weight: Beta.
        schedule: "steps" (tenfold falls) or "cosine".
        start: Where masks start: at a draw ("drawn") or all at their mean ("mean").
        restarts: Independent starts, of which the one of smallest objective is kept.
    """

    steps: PositiveInt = 20_000
    lr: Positive = 0.1
    mask_lr: Positive = 0.1
    tv_weight: NonNegative = 1e-5
    mask_weight: NonNegative = 1e-4
    schedule: Literal["steps", "cosine"] = "steps"
    start: Literal["drawn", "mean"] = "drawn"
    restarts: PositiveInt = 1

    @classmethod
    def tuned(cls, *, steps: int = 600, restarts: int = 1) -> Self:
        """Our setting for a few hundred iterations."""
        return cls(steps=steps, tv_weight=1e-2, schedule="cosine", start="mean", restarts=restarts)

    @classmethod
    def variants(cls) -> Mapping[str, Self]:
        """From our preset to other priors and starts."""
        tuned = cls.tuned()
        return {
            "tuned": tuned,
            "tv 0.1": replace(tuned, tv_weight=0.1),
            "tv 0.001": replace(tuned, tv_weight=1e-3),
            "slow masks": replace(tuned, mask_lr=0.03),
            "masks drawn": replace(tuned, start="drawn"),
            "published": cls(),
        }

    def outlook(self, view: View) -> Outlook:
        """Whether there are masks to be found, and how many numbers they are."""
        if view.has("dropout_masks"):
            return Outlook("applicable", "the masks are granted; what is left is to match")
        if not (view.rounds and view.has("protocol")):
            return Outlook("unknown", "whether masks are drawn shows in the first round")
        unknown = sum(torch.Size(place.shape).numel() for step in masks_of(view) for place in step)
        if not unknown:
            return Outlook("applicable", "nothing is dropped; this is Inverting Gradients")
        pixels = torch.Size(view.batch_shape).numel()
        return Outlook("unknown", f"{unknown:,} entries of masks beside {pixels:,} of images")

    def run(self, view: View, *, generator: torch.Generator, watch: Watch) -> Reconstruction:
        """Joint descent on images and masks, ranked by the whole objective."""
        g = dict(view.update.tensors)
        if not any(bool(tensor.any()) for tensor in g.values()):
            return nothing_found(view.input_shape, "the update is zero; it has no direction")
        like = next(iter(g.values()))
        y = observed.known_labels(view)
        replay = view.replayer()
        drawn = masks_of(view)
        places = {f"mask {t}.{i}": p for t, step in enumerate(drawn) for i, p in enumerate(step)}

        def scaled(variables: descent.Variables) -> tuple[draws.Draws, ...] | None:
            """The draws of every local step; nothing to say where nothing is drawn."""
            if not places:
                return None
            return tuple(
                tuple(place.high * variables[f"mask {t}.{i}"] for i, place in enumerate(step))
                for t, step in enumerate(drawn)
            )

        def objective(variables: descent.Variables, t: Tensor) -> descent.Value:
            del t
            x = variables["x"]
            match = matching.cosine(replay(x, y, drawn=scaled(variables)), g)
            total = match + self.tv_weight * priors.tv_mean(x)
            for name, place in places.items():
                total = total + self.mask_weight * off_rate(variables[name], 1 - place.keep)
            return descent.Value(total, total)

        shape = (self.restarts, *view.batch_shape)
        start = {"x": init.normal(shape, generator=generator, like=like)}
        for name, place in places.items():
            kept = torch.full((self.restarts, *place.shape), place.keep)
            if self.start == "drawn":
                kept = torch.bernoulli(kept, generator=generator)
            start[name] = kept.to(like)
        found = descent.descend(
            objective,
            start,
            candidates=self.restarts,
            optimizer=descent.adam({"x": self.lr, **dict.fromkeys(places, self.mask_lr)}),
            steps=self.steps,
            watch=watch,
            schedule=descent.step_decay((3 / 8, 5 / 8, 7 / 8))
            if self.schedule == "steps"
            else descent.cosine_decay(),
            transform={"x": descent.signed},
            after=(
                descent.inside(view.box, "x"),
                *(descent.between(0.0, 1.0, name) for name in places),
            ),
        )
        x_hat = found.chosen()["x"]
        loss = float(found.criterion.min())
        return Reconstruction(
            images=x_hat,
            labels=y,
            confidence=torch.full((len(x_hat),), -loss, dtype=torch.float64),
            notes={
                "objective": loss,
                "masks": float(len(places)),
                "iterations": float(found.steps),
                "labels_granted": float(view.has("labels")),
            },
        ).or_failed(found.trouble)


def masks_of(view: View) -> tuple[tuple[draws.Place, ...], ...]:
    """The places of every local step whose masks are not known; none where they are granted.

    Raises:
        UnsupportedModel: If the model draws something that is no mask.
    """
    if view.has("dropout_masks"):
        return ()
    sizes = [view.num_examples]
    if view.update.kind != "gradient" and isinstance(protocol := view.protocol, FedAVG):
        each = torch.arange(view.num_examples).split(protocol.batch_size)
        sizes = [len(part) for part in each] * protocol.epochs
    model = view.model
    like = next(model.parameters())
    found = {n: draws.places(model, like.new_zeros((n, *view.input_shape))) for n in set(sizes)}
    return tuple(found[n] for n in sizes)


def off_rate(mask: Tensor, p: float) -> Tensor:
    """How far the share that a relaxed mask drops is from the rate p of its layer."""
    return ((1 - mask.mean()) - p).abs()
