r"""DLG: find the image and the label whose gradient is the observed one, by L-BFGS.

Zhu, Liu and Han, "Deep Leakage from Gradients", NeurIPS 2019.   FedSGD, one round.

.. math:: \hat x, \hat y = \arg\min_{x,\, y} \; D(x, y), \qquad
          D = \sum_l \bigl\lVert \nabla_{\theta_l} \mathcal L(x, \mathrm{softmax}(y))
              - g_l \bigr\rVert^2 \tag{3}

Dummy images and dummy label logits start as standard normal noise and are moved jointly; the label
of an image is the largest logit. There is no projection and no prior, so nothing beyond the
update is needed. The sigmoid LeNet of the paper is smooth enough for convergence to machine
precision; the gradient of a ReLU network is piecewise constant in its masks, where this objective
has flat pieces.

For N > 1 the objective has N! equal minima, and joint steps hover between them. The paper's
remedy, one example moved per iteration while the others rest, is ``one_at_a_time``.

Departures:
    - PyTorch's L-BFGS ends a step at an absolute change of 1e-9 and skips curvature below 1e-10,
      both of which it meets long before the minimum. The stopping tolerances are set to 0, and D
      is minimised in units of :math:`10^{-12} \lVert g \rVert^2`, which changes no minimum.
    - The released code runs L-BFGS without a line search and often leaves for a saturated plateau.
      That is the default here too; ``line_search`` adds the strong Wolfe conditions.
    - The iterate of smallest D is returned, not the last one.
    - ``restarts`` and the choice among them by D are ours; the paper reruns failures by hand.
    - ``one_at_a_time`` is in the paper but not in the released code, whose steps are joint.

Released code: ``mit-han-lab/dlg``, ``main.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn

from leakatlas.attacks.api import Attack, Outlook, Reconstruction, attack, nothing_found
from leakatlas.blocks import descent, init, labels, matching
from leakatlas.blocks.watch import Watch
from leakatlas.fl import View
from leakatlas.params import NonNegative, Positive, PositiveInt
from leakatlas.threat import Knowledge

UNIT = 1e-12
"""D is minimised in units of this times the squared norm of the update; see *Departures*."""


@attack("dlg", needs=Knowledge.UPDATES)
@dataclass(frozen=True, kw_only=True)
class DLG(Attack):
    """Joint L-BFGS over images and label logits.

    Args:
        steps: Outer iterations; 300 in the released code, 1,200 in the paper's figures.
        inner: L-BFGS iterations within each.
        lr: Step size of L-BFGS.
        history: Curvature pairs that L-BFGS keeps.
        line_search: Whether steps obey the strong Wolfe conditions.
        one_at_a_time: Whether an iteration moves a single example, each in turn.
        restarts: Independent starts, of which the one of smallest D is kept.
        tolerance: A start ends when D falls below this share of the update's squared norm, and
            no further start is made.
    """

    replays = True
    fewest = 4  # each evaluates some twenty times

    steps: PositiveInt = 300
    inner: PositiveInt = 20
    lr: Positive = 1.0
    history: PositiveInt = 100
    line_search: bool = False
    one_at_a_time: bool = False
    restarts: PositiveInt = 1
    tolerance: NonNegative = 1e-26

    @classmethod
    def exact(cls, *, restarts: int = 2) -> Self:
        """Our setting for machine precision on smooth networks in float64."""
        return cls(steps=600, history=400, line_search=True, restarts=restarts, tolerance=1e-16)

    def outlook(self, view: View) -> Outlook:
        """Whether the landscape is smooth; ReLU has no second derivative to follow."""
        if any(isinstance(m, nn.ReLU | nn.LeakyReLU | nn.MaxPool2d) for m in view.model.modules()):
            return Outlook(
                "unknown", "a piecewise linear network flattens the distance that it descends"
            )
        if view.num_examples > 1:
            return Outlook("unknown", f"{view.num_examples} images and labels at once")
        return Outlook("applicable", "one image and a smooth network: the setting of the paper")

    def run(self, view: View, *, generator: torch.Generator, watch: Watch) -> Reconstruction:
        """Restarts of joint L-BFGS, ranked by D."""
        g = view.update.tensors
        N, K = view.num_examples, view.classes
        like = next(iter(g.values()))
        scale = squared_norm(g)
        if scale == 0:
            return nothing_found(view.input_shape, "the update is zero; every image fits it")
        replay = view.replayer()

        def objective(variables: descent.Variables, t: Tensor) -> descent.Value:
            del t
            x_hat, logits = gather(variables, N)
            y_hat = labels.soft_targets(view.loss, logits)
            D = matching.squared_l2(replay(x_hat, y_hat), g) / scale
            return descent.Value(D / UNIT, D)

        optimizer = descent.lbfgs(
            self.lr, history=self.history, inner=self.inner, line_search=self.line_search
        )
        if self.one_at_a_time:
            optimizer = descent.in_turn(optimizer, [(f"x{i}", f"y{i}") for i in range(N)])
        starts = []
        for _ in range(self.restarts):
            x = init.normal(view.batch_shape, generator=generator, like=like)
            y = labels.joint_logits(N, K, generator=generator, like=like)
            starts.append(scatter(x, y))
        found = descent.descend(
            objective,
            {name: torch.stack([start[name] for start in starts]) for name in starts[0]},
            candidates=self.restarts,
            optimizer=optimizer,
            steps=self.steps,
            watch=watch,
            done=lambda D: float(D.min()) < self.tolerance,
            report_every=max(N, 10),
        )
        x_hat, logits = gather(found.chosen(), N)
        D = float(found.criterion.min())
        return Reconstruction(
            images=x_hat,
            labels=labels.soft_targets(view.loss, logits).detach()
            if view.loss.multilabel
            else logits.argmax(1),
            confidence=torch.full((N,), -D, dtype=torch.float64),
            notes={
                "relative_distance": D,
                "iterations": float(found.steps),
                "restarts": float(torch.isfinite(found.criterion).sum()),
                "diverged_restarts": float((~found.alive).sum()),
            },
        ).or_failed(found.trouble)


def squared_norm(g: Mapping[str, Tensor]) -> float:
    """Squared Euclidean norm over all tensors."""
    return float(sum(tensor.double().square().sum() for tensor in g.values()))


def scatter(x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """One variable per example: ``x0, y0, x1, y1, ...`` of ``(1, C, H, W)`` and ``(1, K)``."""
    named: dict[str, Tensor] = {}
    for i in range(len(x)):
        named |= {f"x{i}": x[i : i + 1], f"y{i}": y[i : i + 1]}
    return named


def gather(variables: Mapping[str, Tensor], N: int) -> tuple[Tensor, Tensor]:
    """The inverse of :func:`scatter`: images ``(N, C, H, W)`` and logits ``(N, K)``."""
    return (
        torch.cat([variables[f"x{i}"] for i in range(N)]),
        torch.cat([variables[f"y{i}"] for i in range(N)]),
    )
