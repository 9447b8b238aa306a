r"""DCS-2: the gradient of sensitive samples is that of concealed ones, too, which look otherwise.

Wu, Hayat, Zhou and Harandi, "Concealing Sensitive Samples Against Gradient Leakage in Federated
Learning", AAAI 2024.

The last s examples of a batch are sensitive. For each, a concealed sample :math:`x_c` is sought,
from another image and with its label :math:`y_c`,

.. math:: \min_{x_c} \; 1 - \cos\bigl(\nabla \mathcal L(x_s, y_s), \nabla \mathcal L(x_c, y_c)\bigr)
          + e^{-\lambda_x \lVert x_c - x_s \rVert}
          + \lambda_z \Bigl(\frac{\lVert f(x_c) - f(x_s) \rVert}{\lVert f(x_s) \rVert}
          - \epsilon\Bigr),

and the client's step is taken on

.. math:: \tfrac13 \bigl[\lambda_y \mathcal L(x_c, y_c) + (1 - \lambda_y) \mathcal L(x_c, y_s)
          + \mathcal L(x, y)\bigr].

Where that gradient :math:`\tilde g` points away from the batch's own, it is drawn back,

.. math:: \tilde g \leftarrow \tilde g + v g, \qquad
          v = \max\bigl(\gamma, -\langle \tilde g, g \rangle / (\lVert g \rVert^2 + 10^{-3})\bigr)
          \quad \text{if } \langle \tilde g, g \rangle < 0 .

What an adversary does about it: it looks for twice as many images, of which one of each pair looks
like an image. Isolating attacks get the concealed and the true one, each in a bin of its own.

Departures:
    * The step back is the closed form of the release's quadratic programme, which has one
      constraint.
    * The best concealed samples are kept, where the release keeps the last.
    * Concealed samples start from other images of the client, of another class where it has one,
      and from noise under a random label where it has one image only. (Starting from a mixture with
      the sensitive image is what the release's ``--mixup`` turns *off*, and its scripts do so.)
    * The last term is linear in the release as above; distances are in model space, and nothing
      is clamped.
    * Mean and concealed examples pass the network in one batch, whatever mode it is in.

A step costs about a thousand double-backward passes: the dearest defense of all.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.func import functional_call

from leakatlas.errors import InvalidParameter
from leakatlas.fl import ActsOn, ClientContext, Defense, LocalStep, Memory, model_state, replay
from leakatlas.params import Fraction, NonNegative, Positive, PositiveInt, PositiveOrInf

FALLS = (3 / 8, 5 / 8, 7 / 8)
"""Shares of the search after which the step size falls tenfold."""

SOFT = 1e-3
"""Added to the squared norm of the gradient that is drawn back to."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DCS2(Defense):
    """Adds concealed samples for the sensitive examples of every batch.

    Args:
        share: Share of the batch that is sensitive, its last examples; 0 conceals nothing.
        per_image: Concealed samples of each.
        iterations: Steps of the search.
        lr: Adam's step size.
        distance_weight: Lambda_x, of the visual distance (0.001 for Tiny ImageNet).
        logit_weight: Lambda_z, of the distance between logits (0.1 for CelebA).
        mix: Lambda_y, the part of the concealed samples' own labels.
        epsilon: Distance between logits that costs nothing; a constant of the objective.
        enough: Mean distance at which the search ends (300 for MNIST, 500 for CIFAR-10).
        margin: Gamma, least step back to the batch's own gradient.
    """

    key: ClassVar[str] = "dcs2"
    knob: ClassVar[str] = "share"
    neutral: ClassVar[float] = 0.0
    strengths: ClassVar[tuple[float, ...]] = (0.5, 1.0)
    stage: ClassVar[int] = 10
    modes: ClassVar[frozenset[ActsOn]] = frozenset({ActsOn.PER_STEP})

    share: Fraction = 1.0
    per_image: PositiveInt = 1
    iterations: PositiveInt = 1_000
    lr: Positive = 0.1
    distance_weight: NonNegative = 0.01
    logit_weight: NonNegative = 0.01
    mix: Fraction = 0.7
    epsilon: NonNegative = 0.01
    enough: PositiveOrInf = 500.0
    margin: NonNegative = 0.5

    def workload(self, model: nn.Module) -> float:
        """Three gradients for every step of the search, one more for the way back."""
        return 1.0 if self.share == 0 else 2.0 + 3.0 * self.iterations

    def sensitive(self, examples: int) -> int:
        """How many of a batch are concealed."""
        return math.ceil(self.share * examples)

    def batch(self, x: Tensor, y: Tensor, context: ClientContext) -> tuple[Tensor, Tensor]:
        """The batch with the concealed samples behind it.

        Raises:
            InvalidParameter: If targets are no classes.
        """
        if self.share == 0:
            return x, y
        if y.dim() != 1:
            raise InvalidParameter(
                f"DCS-2 gives concealed samples a class of their own; the targets of this protocol "
                f"have shape {tuple(y.shape)}. Use a loss on classes."
            )
        s = self.sensitive(len(x))
        x_s, y_s = (t[-s:].repeat_interleave(self.per_image, 0) for t in (x, y))
        x_c, y_c = self.proxies(x_s, y_s, context)
        x_c = self.concealed(context, x_s, y_s, x_c, y_c)
        context.memory.update(count=len(x_c), y_s=y_s, x_c=x_c, y_c=y_c)
        return torch.cat([x, x_c]), torch.cat([y, y_c])

    def local_step(
        self, step: LocalStep, gradients: Callable[[LocalStep], dict[str, Tensor]]
    ) -> dict[str, Tensor]:
        """The gradient of the mixed loss, drawn back where it points away from the batch's own."""
        if self.share == 0:
            return gradients(step)
        count, y_s = (step.context.memory[name] for name in ("count", "y_s"))
        own = len(step.x) - count
        honest = gradients(dataclasses.replace(step, x=step.x[:own], y=step.y[:own]))

        def loss(logits: Tensor, y: Tensor) -> Tensor:
            return self.mixed_loss(step.loss, logits, y, y_s)

        return drawn_back(gradients(dataclasses.replace(step, loss=loss)), honest, self.margin)

    def mixed_loss(
        self, loss: Callable[[Tensor, Tensor], Tensor], logits: Tensor, y: Tensor, y_s: Tensor
    ) -> Tensor:
        """The client's loss on a batch with its concealed samples last.

        Args:
            loss: ``(logits, y) -> scalar``.
            logits: Of all.
            y: Labels of all, those of the concealed samples last.
            y_s: Labels of the samples that these conceal.
        """
        own = len(logits) - len(y_s)
        value = loss(logits[:own], y[:own])
        if self.mix > 0:
            value = value + self.mix * loss(logits[own:], y[own:])
        if self.mix < 1:
            value = value + (1 - self.mix) * loss(logits[own:], y_s)
        return value / (2 if self.mix in (0, 1) else 3)

    def proxies(self, x_s: Tensor, y_s: Tensor, context: ClientContext) -> tuple[Tensor, Tensor]:
        """Where concealed samples start, and their labels: other images of the client, or noise."""
        known = context.memory.setdefault("own", (context.x, context.y))
        images, labels = [], []
        with torch.no_grad():
            state = model_state(context.model)
            classes = functional_call(context.model, state, (x_s[:1],)).shape[1]
        for label in y_s.tolist():
            others = (known[1] != label).nonzero()[:, 0]
            if len(others):
                drawn = int(torch.randint(len(others), (1,), generator=context.generator))
                images.append(known[0][others[drawn]])
                labels.append(known[1][others[drawn]])
                continue
            noise = torch.randn(x_s.shape[1:], generator=context.generator, dtype=torch.float64)
            images.append(noise.to(x_s))
            shift = int(torch.randint(1, max(classes, 2), (1,), generator=context.generator))
            labels.append(torch.tensor((label + shift) % classes, device=y_s.device))
        return torch.stack(images), torch.stack(labels)

    def concealed(
        self, context: ClientContext, x_s: Tensor, y_s: Tensor, x_c: Tensor, y_c: Tensor
    ) -> Tensor:
        """The search: samples ``(s, C, H, W)`` of smallest objective on the way from ``x_c``."""
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            seed = int(torch.randint(2**62, (1,), generator=context.generator))
            torch.default_generator.manual_seed(seed)  # dropout draws from the client's stream
            goal = Goal.of(context, x_s, y_s)
            x = x_c.detach().clone().requires_grad_()
            optimizer = torch.optim.Adam([x], lr=self.lr)
            falls = [int(part * self.iterations) for part in FALLS]
            schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, falls)
            best, lowest = x_c, math.inf
            for index in range(self.iterations + 1):
                value = self.objective(goal, x, y_c)
                if float(value.detach()) < lowest:
                    best, lowest = x.detach().clone(), float(value.detach())
                away = float((x - x_s).detach().flatten(1).norm(dim=1).mean())
                if index == self.iterations or away > self.enough:
                    break
                (x.grad,) = torch.autograd.grad(value, x)
                optimizer.step()
                schedule.step()
        return best

    def objective(self, goal: Goal, x_c: Tensor, y_c: Tensor) -> Tensor:
        """What the search minimises, a scalar."""
        found, logits = goal.gradient(x_c, y_c)
        match = 1 - _cosine(found, goal.slopes)
        away = (x_c - goal.x).flatten(1).norm(dim=1).mean()
        apart = ((logits - goal.logits).norm(dim=1) / goal.logits.norm(dim=1)).mean()
        visible = torch.exp(-self.distance_weight * away)
        total: Tensor = match + visible + self.logit_weight * (apart - self.epsilon)
        return total

    def secrets(self, memory: Memory) -> dict[str, Tensor]:
        """The concealed samples of the last step, and their labels."""
        return {n: memory[n] for n in ("x_c", "y_c") if n in memory}


@dataclasses.dataclass(frozen=True)
class Goal:
    """The sensitive samples, and what concealed ones must match.

    Args:
        context: The client's side; its model is not changed.
        x: Sensitive images ``(s, C, H, W)``.
        slopes: Their gradient, by name.
        logits: Theirs ``(s, K)``.
    """

    context: ClientContext
    x: Tensor
    slopes: Mapping[str, Tensor]
    logits: Tensor

    @classmethod
    def of(cls, context: ClientContext, x: Tensor, y: Tensor) -> Goal:
        """The goal of sensitive images and their labels."""
        start = cls(context, x, {}, x)
        slopes, logits = start.gradient(x, y)
        return cls(context, x, {n: t.detach() for n, t in slopes.items()}, logits.detach())

    def gradient(self, x: Tensor, y: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Gradient of the client's loss, differentiable in ``x``, and the logits."""
        kept: list[Tensor] = []

        def loss(logits: Tensor, target: Tensor) -> Tensor:
            kept.append(logits)
            value: Tensor = self.context.protocol.loss(logits, target)
            return value

        model = self.context.model
        parameters = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
        found = replay.gradient(model, parameters, dict(model.named_buffers()), x, y, loss=loss)
        return found, kept[-1]


def drawn_back(
    sent: Mapping[str, Tensor], honest: Mapping[str, Tensor], margin: float
) -> dict[str, Tensor]:
    """A gradient that does not point away from the honest one.

    Args:
        sent: What is to be sent.
        honest: Of the batch without concealed samples.
        margin: Least multiple of ``honest`` that is added where it does.
    """
    dots = [(t * honest[name]).sum() for name, t in sent.items()]
    along = torch.stack(dots).sum()
    if float(along) >= 0:
        return dict(sent)
    size = torch.stack([g.square().sum() for g in honest.values()]).sum()
    v = torch.clamp(-along / (size + SOFT), min=margin)
    return {name: t + v * honest[name] for name, t in sent.items()}


def _cosine(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> Tensor:
    dot = torch.stack([(a[n] * b[n]).sum() for n in b]).sum()
    sizes = [torch.stack([t[n].square().sum() for n in b]).sum().sqrt() for t in (a, b)]
    return dot / (sizes[0] * sizes[1] + 1e-12)
