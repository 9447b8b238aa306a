r"""iDLG: read the label off the last layer, then find the image as DLG does.

Zhao, Mopuri and Bilen, "iDLG: Improved Deep Leakage from Gradients", 2020.   FedSGD, one image.

For one image with label c, features a and probabilities p, the gradient of the head's rows is
:math:`\nabla W_i = (p_i - [i = c])\, a`, so row c alone points against the others:

.. math:: c = i \;\text{ s.t. }\; \nabla W_i^\top \nabla W_j \le 0 \;\; \forall j \ne i \tag{4}

With c fixed, DLG's objective is minimised by L-BFGS over the image alone, with the ordinary
cross-entropy:

.. math:: \hat x = \arg\min_x \sum_l \lVert \nabla_{\theta_l} \mathcal L(x, c) - g_l \rVert^2 .

Three rules for the label: the paper's Eq. 4 (exact for any features, three classes or more); the
bias rule :math:`\arg\min_i \partial \mathcal L / \partial b_i` (exact for any features and
classes); and the released code's sum rule :math:`\arg\min_i \sum_m \nabla W_{im}`, which is right
only where the features have a positive sum. Label smoothing, mixed labels, a frozen head or
N > 1 break what all three rest on; a saturated network (a gradient of zero) makes the attack
abstain.

Departures:
    - Eq. 4 is the default, as in the paper; the released code uses the sum rule.
    - The stopping tolerances and the unit of the distance are those of DLG's *Departures*; the
      released code also ends at a distance below 1e-6, here ``tolerance`` is relative.
    - The iterate of smallest distance is returned.

Released code: ``PatrickZH/Improved-Deep-Leakage-from-Gradients``, ``iDLG.py``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from leakatlas.attacks.api import Attack, Outlook, Reconstruction, attack, nothing_found
from leakatlas.blocks import descent, init, labels, matching
from leakatlas.blocks.observed import mean_gradient
from leakatlas.blocks.watch import Watch
from leakatlas.errors import UnsupportedModel
from leakatlas.fl import View
from leakatlas.fl.losses import PLAIN
from leakatlas.models.structure import example_input
from leakatlas.params import NonNegative, Positive, PositiveInt
from leakatlas.threat import Knowledge

UNIT = 1e-12
"""The distance is minimised in units of this times the squared norm of the update."""


@attack("idlg", needs=Knowledge.UPDATES)
@dataclass(frozen=True, kw_only=True)
class IDLG(Attack):
    """A label by rule, then L-BFGS over the image.

    Args:
        rule: How the label is read: the paper's sign rule, the head's bias, or the row sums of
            the released code.
        steps: Outer iterations.
        inner: L-BFGS iterations within each.
        lr: Step size of L-BFGS.
        history: Curvature pairs that L-BFGS keeps.
        line_search: Whether steps obey the strong Wolfe conditions.
        restarts: Independent starts, of which the one of smallest distance is kept.
        tolerance: A start ends below this share of the update's squared norm, and no further
            start is made.
    """

    replays = True
    fewest = 4  # each evaluates some twenty times

    rule: Literal["paper", "bias", "sum"] = "paper"
    steps: PositiveInt = 300
    inner: PositiveInt = 20
    lr: Positive = 1.0
    history: PositiveInt = 100
    line_search: bool = False
    restarts: PositiveInt = 1
    tolerance: NonNegative = 1e-26

    def outlook(self, view: View) -> Outlook:
        """One example, whose label the head gives away."""
        if view.num_examples != 1:
            return Outlook(
                "hopeless",
                f"its rule reads the label of one image, the update is of {view.num_examples}",
            )
        return Outlook("applicable", "the label is exact; the image is as hard as for DLG")

    def run(self, view: View, *, generator: torch.Generator, watch: Watch) -> Reconstruction:
        """The label, then the image."""
        if view.num_examples != 1:
            return nothing_found(
                view.input_shape,
                f"the rule reads the label of one image, the update is of {view.num_examples}",
            )
        if self.rule == "paper" and view.classes < 3:
            raise UnsupportedModel(
                f"IDLG(rule='paper') needs at least 3 classes, the model has {view.classes}: with "
                "two, both rows qualify. Use rule='bias'."
            )
        g = view.update.tensors
        like = next(iter(g.values()))
        head = labels.find_head(view.model, example_input(view.model, view.input_shape))
        scale = torch.stack([tensor.square().sum() for tensor in g.values()]).sum()
        if not bool(head.weight_grad(g).any()):
            return nothing_found(view.input_shape, "the head's gradient is zero; the label is lost")
        g_mean = mean_gradient(view)
        c = (
            labels.idlg(g_mean, head, rule=self.rule)
            if view.loss == PLAIN
            else labels.target_of_one(view.loss, g_mean, head, view.model)
        )
        replay = view.replayer()

        def objective(variables: descent.Variables, t: Tensor) -> descent.Value:
            del t
            D = matching.squared_l2(replay(variables["x"], c), g) / scale
            return descent.Value(D / UNIT, D)

        start = init.normal((self.restarts, *view.batch_shape), generator=generator, like=like)
        found = descent.descend(
            objective,
            {"x": start},
            candidates=self.restarts,
            optimizer=descent.lbfgs(
                self.lr, history=self.history, inner=self.inner, line_search=self.line_search
            ),
            steps=self.steps,
            watch=watch,
            done=lambda D: float(D.min()) < self.tolerance,
            report_every=10,
        )
        D = float(found.criterion.min())
        return Reconstruction(
            images=found.chosen()["x"],
            labels=c,
            confidence=torch.tensor([-D], dtype=torch.float64),
            notes={
                "relative_distance": D,
                "iterations": float(found.steps),
                "restarts": float(torch.isfinite(found.criterion).sum()),
                "diverged_restarts": float((~found.alive).sum()),
            },
        ).or_failed(found.trouble)
