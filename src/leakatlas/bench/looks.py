"""What a study may look at in a trial beyond its scores, by name; computed where the truth is."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from leakatlas.attacks.api import Attack
from leakatlas.bench import examine, harness, scene, secrets
from leakatlas.bench.harness import Trial
from leakatlas.blocks.watch import Conduct, Watch
from leakatlas.data import ImageSet
from leakatlas.fl import ClientContext, Defense, Stage, Update, View, state
from leakatlas.fl import stage as staged
from leakatlas.metrics.assignment import pairwise_mse
from leakatlas.metrics.baselines import mean_image
from leakatlas.metrics.identification import cosine
from leakatlas.metrics.images import psnr_of_mse
from leakatlas.vulnerability import Case as VulnerabilityCase
from leakatlas.vulnerability import assess

T = TypeVar("T")
SUCCESS, RECOGNISABLE = 19.0, 20.0
STEPS = 200
"""Iterations of the attack on a secret, if the attack itself has none."""


@dataclass(frozen=True, kw_only=True)
class EqualNoise(Defense):
    """Gaussian noise whose norm is a fixed share of the update's norm."""

    key: ClassVar[str] = "equal_noise"
    knob: ClassVar[str] = "ratio"
    neutral: ClassVar[float] = 0.0
    ratio: float

    def update(self, update: Update, context: ClientContext) -> Update:
        """Add it."""
        noise = {
            name: torch.randn(t.shape, generator=context.generator, dtype=t.dtype)
            for name, t in update.tensors.items()
        }
        factor = self.ratio * _flat(update.tensors).norm() / _flat(noise).norm()
        return update.with_tensors({n: t + factor * noise[n] for n, t in update.tensors.items()})


def _flat(tensors: Mapping[str, Tensor]) -> Tensor:
    return torch.cat([t.flatten() for t in tensors.values()])


def under(stage: Stage, view: View, *defenses: Defense) -> Stage:
    """The same clients under other defenses, at the weights that they received.

    Args:
        stage: Whose clients.
        view: What the adversary saw of the round; weights that only the present defenses' network
            has are left out, those that only the plain one has are fresh.
        defenses: The others.
    """
    parts = list(stage.victims.values())
    victims = ImageSet(
        torch.cat([p.images for p in parts]), torch.cat([p.labels for p in parts]),
        parts[0].classes, parts[0].name,
    )  # fmt: skip
    model, received = stage.scenario.model.build(), view.rounds[-1].state
    kind = next((t.dtype for t in received.values() if t.is_floating_point()), torch.float32)
    fresh = state.model_state(model.to(kind))
    fits = {n: t for n, t in received.items() if n in fresh and t.shape == fresh[n].shape}
    return staged(
        replace(stage.scenario, defenses=defenses), model=state.load_into(model, fresh | fits),
        victims=victims, surrogate=stage.surrogate, box=stage.box,
    )  # fmt: skip


Pair = tuple[Tensor, Tensor]
"""What a client sent and what it sends undefended, both flat."""


def uploads(view: View, stage: Stage, target: int) -> Pair | None:
    """What a client sent, and what it sends undefended; None if they do not compare."""
    plain = under(stage, view)
    undefended = plain.view([plain.federation.play_round()], target=target)
    a, b = view.update.tensors, undefended.update.tensors
    return None if a.keys() != b.keys() else (_flat({name: a[name] for name in b}), _flat(b))


def distance(pair: Pair | None) -> float:
    """Relative to the undefended upload; not a number where nothing compares."""
    return math.nan if pair is None else float((pair[0] - pair[1]).norm() / pair[1].norm())


@dataclass(frozen=True)
class Look:
    """One trial, looked at.

    Args:
        trial: The trial.
        stage: Its stage.
        attack: What was run.
        target: The client under attack.
        kept: What was computed.
    """

    trial: Trial
    stage: Stage
    attack: Attack
    target: int = 0
    kept: dict[Any, Any] = field(default_factory=dict, repr=False)

    def once(self, function: Callable[[Look], T]) -> T:
        """What a function makes of this look, computed once."""
        if function not in self.kept:
            self.kept[function] = function(self)
        found: T = self.kept[function]
        return found

    @staticmethod
    def psnr(trial: Trial, stage: Stage) -> list[float]:
        """Of every victim, by the common protocol."""
        scores = harness.scored(trial, stage, public=scene.public_images(stage))
        return [image.psnr for image in scores.images]


# -- the upload beside the undefended one ----------------------------------------------------------


def _sent(look: Look) -> Pair | None:
    if not look.stage.scenario.defenses:
        return None
    return uploads(look.trial.view, look.stage, look.target)


def _error(look: Look) -> float | list[float]:
    pair = look.once(_sent)
    return [] if pair is None else distance(pair)


def _cosine(look: Look) -> float | list[float]:
    pair = look.once(_sent)
    return [] if pair is None else float(torch.cosine_similarity(*pair, dim=0))


def _size(look: Look) -> float | list[float]:
    pair = look.once(_sent)
    return [] if pair is None else float(pair[0].norm() / pair[1].norm())


def _psnr_equal_noise(look: Look) -> list[float]:
    ratio = _error(look)
    if not isinstance(ratio, float):
        return []
    noisy = under(look.stage, look.trial.view, EqualNoise(ratio=ratio))
    seed = look.stage.scenario.seed
    watch = Watch(conduct=Conduct(execution="eager"))
    trial = harness.run_trial(noisy, look.attack, target=look.target, seed=seed, watch=watch)
    return look.psnr(trial, noisy)


def _worst(look: Look) -> list[float]:
    """The better of the attack and the one on the defense's secret, in dB."""
    reached = look.psnr(look.trial, look.stage)
    steps = int(look.attack.to_json().get("steps", STEPS))
    found = secrets.fitted(look.trial.view, steps=steps, seed=look.stage.scenario.seed)
    if found is None:
        return reached
    images = look.stage.box.denormalize(found)
    around = look.psnr(replace(look.trial, images=images), look.stage)
    return [max(pair) for pair in zip(reached, around, strict=True)]


# -- examples alone in a unit of the first linear layer --------------------------------------------


def _tampered(look: Look) -> tuple[list[float], list[float]]:
    # Behind an inserted block the view has no model to build: its rows are in no first layer.
    inserted = int(look.trial.view.key.get("layer", 0)) < 0
    return ([], []) if inserted else _alone(look.trial.view.model, look.trial.truth.images)


def _untouched(look: Look) -> tuple[list[float], list[float]]:
    return _alone(look.stage.federation.model, look.trial.truth.images)


def _alone(model: nn.Module, images: Tensor) -> tuple[list[float], list[float]]:
    """Alone in a unit, for every example; and the share of firing units with one example.

    Empty where the first linear layer does not see the pixels.
    """
    layer = next(m for m in model.modules() if isinstance(m, nn.Linear))
    flat = images.flatten(1).to(layer.weight)
    if layer.in_features != flat.shape[1]:
        return [], []
    with torch.no_grad():
        fires = layer(flat) > 0
    count = fires.sum(dim=0)
    alone = (fires & (count == 1)).any(dim=1)
    return examine.share(alone), [float((count == 1).sum() / (count > 0).sum().clamp(min=1))]


# -- copies that a defense turned ------------------------------------------------------------------


def _any_turn(look: Look) -> list[float]:
    """DB of the candidate nearest to every victim, turned as suits best.

    A copy may come back for the original; whoever sees it sees the image. The mean public image is
    among the candidates: nothing found counts as that.
    """
    truth = look.trial.truth.images
    null = mean_image(scene.public_images(look.stage)[0]).to(truth)[None]
    found = look.trial.images.to(null).clamp(0, 1)
    turned = [found.rot90(quarters, (-2, -1)) for quarters in range(4)]
    cost = pairwise_mse(torch.cat([null, *turned]), truth).min(0).values
    return [float(value) for value in psnr_of_mse(cost).clamp(max=100.0)]


# -- whose images the candidates resemble ---------------------------------------------------------


def _hits(look: Look, images: Tensor) -> list[float]:
    """Whether the private image that each resembles most is the target's, among all clients'.

    By the cosine of pixels without their mean, so that brightness and contrast decide nothing: in
    plain distance a grey client is everybody's neighbour.
    """
    held = [look.stage.victims[client] for client in sorted(look.stage.victims)]
    gallery = torch.cat([part.images for part in held])
    owners = [client for client, part in zip(sorted(look.stage.victims), held, strict=True)
              for _ in range(len(part))]  # fmt: skip
    nearest = cosine(_centred(images.to(gallery)), _centred(gallery)).argmax(1)
    return [float(owners[int(index)] == look.target) for index in nearest]


def _centred(images: Tensor) -> Tensor:
    flat = images.flatten(1)
    return flat - flat.mean(1, keepdim=True)


def _client_hits(look: Look) -> list[float]:
    found = look.trial.images
    return _hits(look, found.clamp(0, 1)) if len(found) else [0.0]


def _client_hits_public(look: Look) -> list[float]:
    images, labels = scene.public_images(look.stage)
    if labels is not None and labels.dim() == 1:
        own = torch.isin(labels, look.trial.truth.labels)
        images = images[own] if bool(own.any()) else images
    return _hits(look, images)


def _client_hits_mean(look: Look) -> list[float]:
    return _hits(look, mean_image(scene.public_images(look.stage)[0])[None])


# -- what the attack says --------------------------------------------------------------------------


def _complete(look: Look) -> float:
    return float(look.trial.found.status == "complete")


def _whole(look: Look) -> float:
    return _complete(look) * float(examine.exact(look.trial).all())


# -- measures before any attack --------------------------------------------------------------------

EACH = ", by example"


def _vulnerability(look: Look) -> dict[str, list[float]]:
    """Every measure of the attacked batch, and by example; empty where one is not defined.

    To six digits: what differs less is rounding, not rank.
    """
    found: dict[str, list[float]] = {}
    case = VulnerabilityCase.of_stage(look.stage, target=look.target, record=look.trial.records[-1])
    for measure in assess(case, tier="spectral", limit=64, steps=20, probes=2):
        each = [value for name, value in measure.values.items() if name.startswith("example ")]
        whole = [] if measure.value is None else [measure.value]
        found[measure.name] = [float(f"{value:.6g}") for value in whole]
        found[measure.name + EACH] = [float(f"{value:.6g}") for value in each]
    return found


LOOKS: dict[str, tuple[str, Callable[[Look], Any]]] = {
    "error": ("of the upload, relative to that of the client undefended", _error),
    "cosine": ("of the upload with the undefended one", _cosine),
    "size": ("norm of the upload over that of the undefended one", _size),
    "psnr_equal_noise": ("the attack on noise of the upload's error instead", _psnr_equal_noise),
    "psnr_worst": (
        "the better of the attack and the one on the defense's secret",
        lambda look: look.once(_worst),
    ),
    "worst_above_19": (
        "whether that reaches 19 dB",
        lambda look: [float(value >= SUCCESS) for value in look.once(_worst)],
    ),
    "psnr_any_turn": ("of the nearest candidate in any quarter turn", _any_turn),
    "recognisable_in_any_turn": (
        "whether that reaches 20 dB",
        lambda look: [float(value >= RECOGNISABLE) for value in _any_turn(look)],
    ),
    "recall": ("examples alone in a unit of the first linear layer", lambda x: _tampered(x)[0]),
    "precision": ("units with one example, of those that fire", lambda x: _tampered(x)[1]),
    "passive_recall": ("recall before anything was tampered with", lambda x: _untouched(x)[0]),
    "passive_precision": ("precision before that", lambda x: _untouched(x)[1]),
    "vulnerability": ("a measure taken before any attack, by its own name", _vulnerability),
    "client_hits": (
        "candidates whose nearest image among all clients' is the target's",
        _client_hits,
    ),
    "client_hits_public": (
        "the same of public images: of the target's classes, where there are any",
        _client_hits_public,
    ),
    "client_hits_mean": ("the same of the mean public image", _client_hits_mean),
    "complete": ("the attack says that it succeeded", _complete),
    "whole": ("it says so, and every image is exact", _whole),
    "falsely_complete": (
        "it says so, and one is not",
        lambda look: _complete(look) - _whole(look),
    ),
}
"""What each says and how it is computed: a number, a list with one an image, a table of such."""


def of(
    trial: Trial, stage: Stage, attack: Attack, names: Collection[str], *, target: int = 0
) -> dict[str, Any]:
    """The looks of these names."""
    look = Look(trial, stage, attack, target)
    return {name: LOOKS[name][1](look) for name in names}
