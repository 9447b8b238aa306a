"""Attacks on the secret of a defense, for defenses that their mirror alone does not undo.

PRECODE's draws, FedKL's locks, SPN's branch and codes and the samples that DCS-2 conceals others
with are unknown to the server, but everything else of the client's computation is known: they are
fitted together with the image, by gradient matching.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from leakatlas.blocks import descent, init, matching, priors
from leakatlas.blocks.watch import Watch
from leakatlas.defenses.heuristic.learning.dcs2 import DCS2
from leakatlas.defenses.heuristic.model.fedkl import FedKL, merged
from leakatlas.defenses.heuristic.model.precode import PRECODE, Bottleneck
from leakatlas.defenses.heuristic.model.spn import SPN, Polarised, polarisation
from leakatlas.fl import Defense, View, replay, stream

Replay = Callable[[Tensor, Mapping[str, Tensor]], Mapping[str, Tensor]]
"""``(x, secret) -> update``."""


def fitted(view: View, *, steps: int, seed: int) -> Tensor | None:
    """Images ``(N, C, H, W)`` in model space, fitted together with a defense's secret.

    Args:
        view: Of an adversary that knows the defenses and the labels; FedSGD.
        steps: Iterations.
        seed: Of the start.

    Returns:
        None if no known defense of the view has a secret of this kind.
    """
    fits = [ADAPTIVE[type(d)] for d in view.defenses if type(d) in ADAPTIVE]
    return fits[0](view, seed, steps) if fits else None


def _joint(
    view: View, seed: int, steps: int, unknown: Mapping[str, Tensor], sent: Replay
) -> Tensor:
    g = dict(view.update.tensors)

    def objective(variables: Mapping[str, Tensor], t: Tensor) -> descent.Value:
        del t
        secret = {name: t for name, t in variables.items() if name != "x"}
        match = matching.relative_l2(sent(variables["x"], secret), g)
        return descent.Value(match + 1e-4 * priors.tv_mean(variables["x"]), match)

    rates = {"x": 0.1, **dict.fromkeys(unknown, 0.05)}
    like = next(iter(g.values()))
    start = init.normal(view.batch_shape, generator=stream("joint", seed), like=like)
    found = descent.descend(
        objective, {"x": start, **unknown}, optimizer=descent.sgd(rates), steps=steps,
        watch=Watch(),
        schedule=descent.cosine_decay(), transform=descent.signed,
        after=(descent.inside(view.box, "x"),),
    )  # fmt: skip
    return found.best["x"]


def _fit_noise(view: View, seed: int, steps: int) -> Tensor:
    """Against PRECODE: the draws of its bottleneck."""
    model, (defense,), y = view.model, view.defenses, view.labels
    (bottleneck,) = (m for m in model.modules() if isinstance(m, Bottleneck))
    parameters = {n: p.detach() for n, p in model.named_parameters()}
    buffers = dict(model.named_buffers())

    def loss(logits: Tensor, target: Tensor) -> Tensor:
        return defense.simulate_loss(nn.functional.cross_entropy(logits, target), model)

    def sent(x: Tensor, secret: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        bottleneck.noise = secret["noise"]
        return replay.gradient(model, parameters, buffers, x, y, loss=loss)

    latent = bottleneck.decoder.in_features
    return _joint(view, seed, steps, {"noise": torch.zeros(view.num_examples, latent)}, sent)


def _fit_locks(view: View, seed: int, steps: int) -> Tensor:
    """Against FedKL: scale and shift of every locked layer."""
    plain, y = merged(view.model), view.labels
    parameters = {n: p.detach() for n, p in plain.named_parameters()}
    buffers, shared = dict(plain.named_buffers()), view.update.tensors
    # Half the channels are expected to be alive; no guess is better than the mean of the locks.
    start = {
        n.replace(".", "/"): torch.full_like(p, 0.25 if n.endswith("weight") else 0.1)
        for n, p in parameters.items()
        if n not in shared
    }

    def sent(x: Tensor, secret: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        held = {**parameters, **{n.replace("/", "."): t for n, t in secret.items()}}
        found = replay.gradient(plain, held, buffers, x, y)
        return {name: found[name] for name in shared}

    return _joint(view, seed, steps, start, sent)


def _fit_branch(view: View, seed: int, steps: int) -> Tensor:
    """Against SPN: a branch of one's own, and codes between -1 and 1."""
    model, y, shared = view.model, view.labels, view.update.tensors
    (defense,) = (d for d in view.defenses if isinstance(d, SPN))
    ((path, place),) = ((n, m) for n, m in model.named_modules() if isinstance(m, Polarised))
    parameters = {n: p.detach() for n, p in model.named_parameters()}
    buffers = dict(model.named_buffers())
    branch = {"weight": f"{path}.branch.weight", "bias": f"{path}.branch.bias"}

    def sent(x: Tensor, secret: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        def loss(logits: Tensor, target: Tensor) -> Tensor:
            pull = polarisation(place.take(), secret["codes"].tanh(), target)
            return nn.functional.cross_entropy(logits, target) + defense.alpha * pull

        held = {**parameters, **{name: secret[part] for part, name in branch.items()}}
        found = replay.gradient(model, held, buffers, x, y, loss=loss)
        return {name: found[name] for name in shared}

    start = {part: parameters[name] for part, name in branch.items()}
    return _joint(view, seed, steps, {**start, "codes": place.codes.detach()}, sent)


def _fit_twins(view: View, seed: int, steps: int) -> Tensor:
    """Against DCS-2: the concealed samples, and how likely their classes are."""
    model, y = view.model, view.labels
    (defense,) = (d for d in view.defenses if isinstance(d, DCS2))
    parameters = {n: p.detach() for n, p in model.named_parameters()}
    buffers = dict(model.named_buffers())
    hidden = defense.sensitive(len(y))
    own = nn.functional.one_hot(y, view.classes).to(next(iter(parameters.values())))
    y_s = own[-hidden:].repeat_interleave(defense.per_image, 0)

    def sent(x: Tensor, secret: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        def loss(logits: Tensor, target: Tensor) -> Tensor:
            return defense.mixed_loss(nn.functional.cross_entropy, logits, target, y_s)

        both = torch.cat([x, secret["twins"]])
        targets = torch.cat([own, secret["classes"].softmax(1)])
        return replay.gradient(model, parameters, buffers, both, targets, loss=loss)

    shape = (len(y_s), *view.batch_shape[1:])
    twins = init.normal(shape, generator=stream("twins", seed), like=own)
    return _joint(view, seed, steps, {"twins": twins, "classes": torch.zeros_like(y_s)}, sent)


ADAPTIVE: dict[type[Defense], Callable[[View, int, int], Tensor]] = {
    PRECODE: _fit_noise, FedKL: _fit_locks, SPN: _fit_branch, DCS2: _fit_twins
}  # fmt: skip
