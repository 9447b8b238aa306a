r"""Adversarial priors: gradient matching that borrows style and features from one's own images.

Usynin, Rueckert and Kaissis, "Beyond Gradients: Exploiting Adversarial Priors in Model Inversion
Attacks", ACM TOPS 2023.   FedSGD (reconstructed).

An honest participant holds images :math:`p_1, \dots, p_M` of the client's kind, best of its class,
and sends them through the shared network once. With :math:`F_l` ``(C, H W)`` what layer l gives and
:math:`G_l = F_l F_l^\top / (C\, H W)` its Gram matrix, minimise

.. math:: 1 - \cos\bigl(\nabla_\theta \mathcal L(x, y), g\bigr) + \gamma\, \mathrm{TV}(x)
          + \alpha \sum_{l \in \text{style}} \lVert G_l(x) - \bar G_l \rVert_F^2
          + \beta \sum_{l \in \text{features}} \operatorname{mean} (F_l(x) - \bar F_l)^2

by Adam on signs, as Inverting Gradients does, which this is with :math:`\alpha = \beta = 0`. Means
are over the images that one holds. Style is read at the first convolution of every resolution,
features at the last one.

Only the abstract could be read: it states gradient matching with features and style of images that
the adversary controls. Forms, layers and weights of the losses are ours.

Measured (study ``adversarial_priors``): where most of an update is pruned, style alone puts it
ahead of the same search without priors and of a rehearsed [3]; features add nothing. On a whole
update the gain is within chance.

Departures (ours):
    - Of several examples each has priors of its own class. Where one's images show no image of a
      class, those to which the network gives it the highest probability stand in.
    - ``aligned`` compares features place by place, else their means over places.
    - The network runs in eval mode on both sides: activations under the statistics of two
      different batches cannot be compared.
    - The iterate of least *gradient* distance is returned. How near it is to the nearest prior
      image is noted (``psnr_to_prior``): a copy of one's own image is no reconstruction.
    - :meth:`AdversarialPriors.tuned`: weights of style (0 to 10) and features (0 to 1) were
      searched on four CIFAR-10 training images of which a twentieth of the update was left.

There is no code.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, Self

import torch
from torch import Tensor, nn
from torch.func import functional_call

from leakatlas.attacks.api import Attack, Outlook, Reconstruction, attack, nothing_found
from leakatlas.blocks import descent, init, matching, observed, priors
from leakatlas.blocks.watch import Watch
from leakatlas.fl import View
from leakatlas.models.structure import example_input, hooked, in_mode
from leakatlas.params import NonNegative, NonNegativeInt, Positive, PositiveInt
from leakatlas.threat import Knowledge

Activations = Callable[[Tensor], dict[str, Tensor]]


@attack("adversarial_priors", needs=Knowledge.UPDATES | Knowledge.BASIC | Knowledge.SURROGATE)
@dataclass(frozen=True, kw_only=True)
class AdversarialPriors(Attack):
    r"""Signed descent on the cosine distance, with style and features of images that one holds.

    Args:
        steps: Iterations; 10,000 at 224 pixels.
        lr: Step size in model space.
        schedule: Tenfold falls (as Inverting Gradients), or half a cosine.
        optimizer: Adam on the signed gradient, or on the gradient itself.
        style_weight: :math:`\alpha`.
        feature_weight: :math:`\beta`.
        tv_weight: :math:`\gamma`.
        images: Priors for each example, M.
        aligned: Whether features are compared place by place.
        start: Noise, or the mean of an example's priors.
        labels: Labels that were read from this update beforehand, where none are granted; the
            rules for mean gradients if empty.
    """

    replays: ClassVar[bool] = True
    draws_on_prior: ClassVar[bool] = True

    steps: PositiveInt = 2_000
    lr: Positive = 0.1
    schedule: Literal["steps", "cosine"] = "steps"
    optimizer: Literal["adam", "unsigned"] = "adam"
    style_weight: NonNegative = 1e-3
    feature_weight: NonNegative = 1e-3
    tv_weight: NonNegative = 1e-4
    images: PositiveInt = 8
    aligned: bool = True
    start: Literal["noise", "prior"] = "noise"
    labels: tuple[NonNegativeInt, ...] = ()

    @classmethod
    def tuned(cls) -> Self:
        """Our setting for some hundred iterations on small images."""
        return cls(
            steps=400, lr=0.3, schedule="cosine", optimizer="unsigned", style_weight=0.1,
            feature_weight=0.01, tv_weight=0.1, aligned=False,
        )  # fmt: skip

    @classmethod
    def variants(cls) -> Mapping[str, Self]:
        """Ours, with heavier priors, from their mean image, and the reconstructed setting."""
        tuned = cls.tuned()
        return {
            "tuned": tuned,
            "heavier": replace(tuned, style_weight=1.0, feature_weight=0.1),
            "from priors": replace(tuned, start="prior"),
            "published": cls(),
        }

    def knowledge(self) -> Knowledge:
        """Images of one's own are needed where they have a weight."""
        used = self.style_weight > 0 or self.feature_weight > 0 or self.start == "prior"
        public = Knowledge.SURROGATE if used else Knowledge(0)
        return Knowledge.UPDATES | Knowledge.BASIC | public

    def outlook(self, view: View) -> Outlook:
        """Layers to read, and images of the right shape."""
        if self.knowledge() & Knowledge.SURROGATE and view.has("surrogate"):
            public, own = view.surrogate.shape, tuple(view.input_shape)
            if public != own:
                return Outlook("hopeless", f"public images are {public}, the client's {own}")
        return Outlook(
            "unknown", "style and features of one's own images help where the gradient is degraded"
        )

    def run(self, view: View, *, generator: torch.Generator, watch: Watch) -> Reconstruction:
        """Labels, priors and their activations, the descent."""
        g = dict(view.update.tensors)
        if not any(bool(tensor.any()) for tensor in g.values()):
            return nothing_found(view.input_shape, "the update is zero; it has no direction")
        like = next(iter(g.values()))
        y = observed.known_labels(view, self.labels)
        held = self.chosen(view, y, like) if self.knowledge() & Knowledge.SURROGATE else None
        penalty = self.penalty(view, held)
        replay = view.replayer()

        def objective(variables: descent.Variables, t: Tensor) -> descent.Value:
            del t
            x = variables["x"]
            match = matching.cosine(replay(x, y), g)
            total = match + self.tv_weight * priors.tv_mean(x)
            return descent.Value(total if penalty is None else total + penalty(x), match)

        start = init.normal(view.batch_shape, generator=generator, like=like)
        if self.start == "prior" and held is not None:
            start = held.mean(1)
        found = descent.descend(
            objective,
            {"x": start},
            optimizer=descent.adam(self.lr),
            steps=self.steps,
            watch=watch,
            schedule=descent.step_decay((3 / 8, 5 / 8, 7 / 8))
            if self.schedule == "steps"
            else descent.cosine_decay(),
            transform=descent.signed if self.optimizer == "adam" else None,
            after=(descent.inside(view.box, "x"),),
        )
        x_hat, loss = found.best["x"], float(found.criterion)
        notes = {"matching_loss": loss, "iterations": float(found.steps)}
        if held is not None:
            pixels, own = view.box.denormalize(x_hat), view.box.denormalize(held)
            error = (own - pixels[:, None]).square().flatten(2).mean(2).amin(1)
            notes["psnr_to_prior"] = float(-10 * error.clamp(min=1e-12).log10().mean())
        return Reconstruction(
            images=x_hat,
            labels=y,
            confidence=torch.full((len(x_hat),), -loss, dtype=torch.float64),
            notes=notes | {"labels_granted": float(view.has("labels"))},
        ).or_failed(found.trouble)

    def chosen(self, view: View, y: Tensor, like: Tensor) -> Tensor:
        """The priors ``(N, M, C, H, W)`` of every example, model space."""
        public = view.surrogate
        x = view.box.normalize(public.images.to(like))
        M = min(self.images, len(public))
        model = view.model
        with in_mode(model, train=False), torch.no_grad():
            likely = torch.cat([model(part).softmax(1) for part in x.split(256)])
        picked = []
        for label in y if y.dim() == 1 else y.argmax(1):
            same = public.labels.to(like.device) == label
            # Its own class first, then what the network takes for it.
            order = (likely[:, int(label)] + 2 * same.to(likely)).argsort(descending=True)
            picked.append(x[order[:M]])
        return torch.stack(picked)

    def penalty(self, view: View, held: Tensor | None) -> Callable[[Tensor], Tensor] | None:
        """Style and feature terms of a candidate batch against ``held`` ``(N, M, C, H, W)``."""
        if held is None or not (self.style_weight or self.feature_weight):
            return None
        style, last = read_layers(view.model, view.input_shape)
        activations = reader(view.model, {*style, last})
        with torch.no_grad():
            seen = activations(held.flatten(0, 1))
        N = len(held)
        wanted_style = {n: gram(seen[n]).unflatten(0, (N, -1)).mean(1) for n in style}
        wanted_features = self.features(seen[last]).unflatten(0, (N, -1)).mean(1)

        def of(x: Tensor) -> Tensor:
            mine = activations(x)
            looks = [(gram(mine[n]) - t).square().sum((1, 2)) for n, t in wanted_style.items()]
            content = (self.features(mine[last]) - wanted_features).square().flatten(1).mean(1)
            total = self.style_weight * torch.stack(looks).sum(0) + self.feature_weight * content
            mean: Tensor = total.mean()
            return mean

        return of

    def features(self, activation: Tensor) -> Tensor:
        """What is compared of ``(N, C, ...)``: every place, or the mean over places."""
        if self.aligned or activation.dim() == 2:
            return activation
        return activation.flatten(2).mean(2)


# -- what the shared network makes of images -------------------------------------------------------


def gram(activation: Tensor) -> Tensor:
    """Gram matrices ``(N, C, C)`` of ``(N, C, ...)``, over channels and places; blind to order."""
    F = activation.flatten(2) if activation.dim() > 2 else activation[:, :, None]
    return F @ F.transpose(1, 2) / (F.shape[1] * F.shape[2])


def read_layers(model: nn.Module, shape: tuple[int, ...]) -> tuple[tuple[str, ...], str]:
    """Names of the layers whose style counts, and of the one whose features do.

    The first convolution of every resolution and the last one; of a network without convolutions,
    its linear layers but for the head.

    Args:
        model: A copy that the caller owns.
        shape: ``(C, H, W)``.
    """
    names: dict[nn.Module, str] = {
        m: n for n, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)
    }
    called: list[tuple[str, nn.Module, tuple[int, ...]]] = []

    def note(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        del inputs
        called.append((names[module], module, tuple(output.shape[2:])))

    with in_mode(model, train=False), hooked(names, note), torch.no_grad():
        model(example_input(model, shape))
    convolutions = [(name, size) for name, m, size in called if isinstance(m, nn.Conv2d)]
    if not convolutions:
        linear = [name for name, _, _ in called]
        return tuple(linear[:-1] or linear), (linear[:-1] or linear)[-1]
    first: dict[tuple[int, ...], str] = {}
    for name, size in convolutions:
        first.setdefault(size, name)
    return tuple(first.values()), convolutions[-1][0]


def reader(model: nn.Module, names: set[str]) -> Activations:
    """What modules give for images ``(N, C, H, W)``, by name, in eval mode, differentiable.

    Args:
        model: A copy that the caller owns; it is put into eval mode.
        names: Of the modules.
    """
    model.eval()
    state = {n: t.detach() for n, t in [*model.named_parameters(), *model.named_buffers()]}
    modules = {model.get_submodule(name): name for name in names}

    def of(x: Tensor) -> dict[str, Tensor]:
        caught: dict[str, Tensor] = {}

        def catch(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            del inputs
            caught[modules[module]] = output

        with hooked(modules, catch):
            functional_call(model, state, (x,))
        return caught

    return of
