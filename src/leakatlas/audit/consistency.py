"""Is an update what the described client would have sent for the true batch; if not, why not?

The harness-side check puts the true batch into the client's own computation and compares it with
the update. A residual that is not ~0 means that the description is wrong somewhere, and every
attack would chase a target that does not exist. So single mistakes that people make are tried,
each as another description, until one explains the update; then several at once.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from leakatlas.data import Box
from leakatlas.data.box import CIFAR10, IMAGENET
from leakatlas.errors import LeakAtlasError
from leakatlas.fl import Defense, FedAVG, FedSGD, Protocol, Trait, Update, replay, state_hash
from leakatlas.fl.augmentation import augmented
from leakatlas.fl.draws import Draws, draws_of
from leakatlas.fl.losses import PLAIN, CrossEntropy, as_loss
from leakatlas.fl.state import buffers, load_into, model_state, parameters, trained

TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-3, torch.float16: 5e-2, torch.bfloat16: 5e-2}
"""Largest relative residual that rounding explains, by dtype of the update."""

ADAM_TOLERANCE = 0.1
"""The same for Adam below float64: it divides by the gradient's size, so that units whose gradient
is pure rounding error move by a full step."""

NORMALISATIONS = {
    "that of ImageNet": IMAGENET,
    "that of CIFAR-10": CIFAR10,
    "mean 0.5, deviation 0.5": Box(mean=(0.5,) * 3, std=(0.5,) * 3),
}
"""What people normalise with, tried where none was described."""

AT_ONCE = 3
"""Mistakes that are looked for together."""

PAIRS = 5_000_000
"""Numbers in the gradients of single examples up to which any two mistakes are tried together:
some hundreds of replays."""

BETTER = 0.7
"""A change counts as part of an explanation if it brings the residual below this share."""


@dataclass(frozen=True)
class ReplayCheck:
    """Whether an update is what the described client would have sent for the true batch.

    Args:
        residual: ``|replay - update| / |update|`` under the description; None if there is no batch
            to replay.
        consistent: Whether rounding explains the residual.
        culprit: What is wrong, in a word or two (``sign``, ``momentum``, ``several``, ...), or
            ``unknown``; empty if consistent.
        explanation: The finding in words.
    """

    residual: float | None
    consistent: bool
    culprit: str = ""
    explanation: str = ""

    @property
    def expected(self) -> bool:
        """Whether nothing speaks against the description, as far as it can be checked."""
        return self.consistent or self.culprit in ("defense", "dropout", "augmentation")


@dataclass(frozen=True, kw_only=True)
class Described:
    """A client as somebody describes it, and what it sent.

    Args:
        model: Holding the state that it received.
        update: A gradient or a delta.
        x: Its inputs, model space.
        y: Its targets.
        protocol: What it ran.
        order: Example indices of every local step, if known.
        drawn: What its model drew in every local step, if known.
        defenses: Whose mirrors are applied.
        seeds: Of its transforms in every local step, if known.
        box: The pixel space that they act in.
        weight_decay: L2 penalty in a single gradient, which no protocol describes.
        clients: Who hold equal parts of the batch, one after the other, and whose mean was seen.
    """

    model: nn.Module
    update: Update
    x: Tensor
    y: Tensor
    protocol: Protocol
    order: Sequence[Tensor] | None = None
    drawn: Sequence[Draws] | None = None
    defenses: tuple[Defense, ...] = ()
    seeds: Sequence[int] | None = None
    box: Box | None = None
    weight_decay: float = 0.0
    clients: int = 1

    def _augment(self, x: Tensor, step: int) -> Tensor:
        assert self.seeds is not None
        return augmented(x, self.protocol.augment, self.seeds[step], self.box)

    def send(self, *, new: bool = False) -> dict[str, Tensor]:
        """What this client sends.

        Args:
            new: Whether its model draws anew, where nothing was recorded.
        """
        self.model.train(self.protocol.mode == "train")
        run = replay.client(
            self.model, self.protocol, self.update,
            defenses=self.defenses,
            order=self.order,
            augment=self._augment if self.seeds else None,
            drawn=self.drawn if self.drawn is not None else ("new" if new else "mean"),
        )  # fmt: skip
        size = len(self.x) // self.clients
        parts = [run(x, y) for x, y in zip(self.x.split(size), self.y.split(size), strict=True)]
        sent = {
            name: torch.stack([part[name].detach() for part in parts]).mean(0)
            if len(parts) > 1
            else tensor.detach()
            for name, tensor in parts[0].items()
        }
        if self.weight_decay:
            named, factor = trained(self.model), self.update.sign * self.update.scale
            penalty = self.weight_decay * factor
            sent = {n: t + penalty * named[n].detach() for n, t in sent.items()}
        return sent


@dataclass(frozen=True)
class Residual:
    """How far an update is from a description.

    Args:
        plain: Relative distance.
        scaled: The same after the best common factor.
        factor: That factor.
    """

    plain: float
    scaled: float
    factor: float


Mistake = tuple[str, str, Described]
"""A culprit, the finding in words, and the description without the mistake."""


def relative_residual(simulated: Mapping[str, Tensor], observed: Mapping[str, Tensor]) -> float:
    """``|simulated - observed| / |observed|`` over the observed tensors; 0/0 is 0."""
    difference = sum(float((simulated[n] - t).double().square().sum()) for n, t in observed.items())
    size = sum(float(t.double().square().sum()) for t in observed.values())
    return float((difference / size) ** 0.5) if size > 0 else float(difference > 0)


def residual_of(described: Described) -> Residual:
    """How far the update is from what this client sends."""
    sent, observed = described.send(), described.update.tensors
    inner = sum(float((sent[n] * t).double().sum()) for n, t in observed.items())
    size = sum(float(sent[n].double().square().sum()) for n in observed)
    factor = inner / size if size > 0 else 1.0
    return Residual(
        relative_residual(sent, observed),
        relative_residual({n: t * factor for n, t in sent.items()}, observed),
        factor,
    )


def tolerance_of(described: Described) -> float:
    """The largest residual that rounding explains."""
    dtype = next(iter(described.update.tensors.values())).dtype
    protocol = described.protocol
    adam = isinstance(protocol, FedAVG) and protocol.optimizer == "adam"
    tolerance = TOLERANCE.get(dtype, 1e-3)
    return max(tolerance, ADAM_TOLERANCE) if adam and dtype != torch.float64 else tolerance


def check_replay(
    model: nn.Module,
    update: Update,
    x: Tensor,
    y: Tensor,
    protocol: Protocol,
    *,
    order: Sequence[Tensor] | None = None,
    drawn: Sequence[Draws] | None = None,
    defenses: Sequence[Defense] = (),
    defended: bool = False,
    seeds: Sequence[int] | None = None,
    box: Box | None = None,
    clients: int = 1,
) -> ReplayCheck:
    """Compare an update with the described client's computation on the true batch.

    Args:
        model: Holding the state at which the update is said to have been computed.
        update: The observed update; weights are taken as the change that they are.
        x: True inputs ``(N, C, H, W)``, model space.
        y: True targets.
        protocol: The learning algorithm as described.
        order: Example indices of every local step, if known.
        drawn: What the model drew in every local step, if known.
        defenses: Declared for a captured update; it is replayed through their mirrors.
        defended: Whether a defense changed a simulated upload on purpose.
        seeds: Of the client's transforms in every local step, if known.
        box: The normalisation behind ``x``.
        clients: Who hold equal parts of the batch and whose mean was seen.
    """
    own = {**parameters(model), **buffers(model)}
    described = Described(
        model=load_into(model, model_state(model)),
        update=update.as_delta(own),
        x=x,
        y=y,
        protocol=protocol,
        order=order,
        drawn=drawn,
        defenses=tuple(defenses),
        seeds=seeds,
        box=box,
        clients=clients,
    )
    first = residual_of(described)
    if first.plain <= tolerance_of(described):
        return ReplayCheck(first.plain, True)

    def wrong(culprit: str, words: str) -> ReplayCheck:
        return ReplayCheck(first.plain, False, culprit, words)

    if update.state_hash and not _computed_here(update, model):
        return wrong(
            "weights",
            f"the update says it was computed at state {update.state_hash[:12]}, the model "
            f"holds {state_hash(own)[:12]}: capture the weights that the client received, "
            "before its first step",
        )
    if defended:
        words = f"the defense changes the upload by {first.plain:.1%} of its norm, as it should"
        return wrong("defense", words)
    noisy = [d.key for d in defenses if Trait.DP_NOISE in d.active_traits()]
    if noisy:
        return wrong(
            "defense",
            f"{noisy[0]} adds noise, which is {first.plain:.1%} of the upload's norm if all else "
            "is as described; nobody can check that any closer",
        )
    if protocol.augment and seeds is None:
        names = ", ".join(one.name for one in protocol.augment)
        return wrong(
            "augmentation",
            f"the client transforms its images ({names}) and nobody recorded what it drew, so the "
            "update cannot be replayed",
        )
    if drawn is None and (words := _dropout(described)):
        return wrong("dropout", words)
    tried = []
    for culprit, words, changed in mistakes(described, box):
        found = _try(changed)
        if found is not None:
            tried.append((culprit, words, changed, found))
            if found.plain <= tolerance_of(changed):
                return wrong(culprit, words)
    scalable = [("", "", described, first), *tried]
    for culprit, words, changed, found in scalable:
        if found.scaled <= tolerance_of(changed):
            return wrong(*_factor(found.factor, words if culprit else ""))
    for estimate in (_learning_rate, _weight_decay, _parameter_order):
        if (guess := estimate(described)) is not None:
            return wrong(*guess)
    if (several := _several(described, box, first)) is not None:
        return wrong("several", several)
    seen = _looks_like(described)
    return wrong(
        "unknown",
        "no single change of mode, labels, normalisation, loss, order, reduction, optimizer, sign, "
        "scale, defense or parameter order explains it, nor several together; check the weights, "
        "and the preprocessing of the batch" + (f". {seen}" if seen else ""),
    )


def _computed_here(update: Update, model: nn.Module) -> bool:
    """Whether the state hash of the update is that of the model, or of the part it shares."""
    own = {**parameters(model), **buffers(model)}
    fixed = {n for n, p in model.named_parameters() if not p.requires_grad}
    kept = {*update.tensors, *update.buffers_before}
    parts = [own, {n: t for n, t in own.items() if n in kept or n in buffers(model)},
             {n: t for n, t in own.items() if n in kept or n in fixed}]  # fmt: skip
    return any(update.state_hash == state_hash(part) for part in parts)


def _try(changed: Described) -> Residual | None:
    try:
        return residual_of(changed)
    except (LeakAtlasError, ValueError, RuntimeError, IndexError):
        return None  # a description that this client cannot even carry out explains nothing


def _factor(factor: float, words: str) -> tuple[str, str]:
    also = f", and {words}" if words else ""
    turned = factor < 0
    return (
        "sign" if turned else "scale",
        f"the update is {factor:.6g} times what the described client sends: "
        + ("the sign is reversed" if turned else "a factor is missing")
        + f" (learning rate, step count, clipping or weighting){also}",
    )


# -- single mistakes ------------------------------------------------------------------------------


def mistakes(d: Described, box: Box | None) -> Iterator[Mistake]:
    """Single changes of a description, likeliest first."""
    other = "train" if d.protocol.mode == "eval" else "eval"
    yield "mode", f"the client ran in {other} mode, not {d.protocol.mode}", _run(d, mode=other)
    reduced: Any = "sum" if d.update.reduction == "mean" else "mean"
    if isinstance(d.protocol, FedSGD):
        yield (
            "reduction",
            f"the client's loss is the {reduced}, not the {d.update.reduction}",
            replace(d, update=replace(d.update, reduction=reduced)),
        )
    else:
        yield from _training(d)
    yield from _labels(d)
    yield from _inputs(d, box)
    yield from _losses(d)
    for defense in d.defenses:
        left = tuple(other for other in d.defenses if other is not defense)
        yield (
            "defense missing",
            f"{defense.key} is declared, but the update did not go through it",
            replace(d, defenses=left),
        )
    if d.update.kind == "delta":
        after = model_state(d.model)
        before = {
            n: t - d.update.quantity()[n].to(t) if n in d.update.tensors else t
            for n, t in after.items()
        }
        yield (
            "weights after",
            "the model holds the weights after training, not those before it",
            replace(d, model=load_into(d.model, before)),
        )


def _run(d: Described, **changes: Any) -> Described:
    return replace(d, protocol=replace(d.protocol, **changes))


def _training(d: Described) -> Iterator[Mistake]:
    if d.order is not None:
        yield (
            "order",
            "the batches were taken in the order given, not in the recorded one",
            replace(d, order=None),
        )
    changes: list[tuple[str, str, dict[str, Any]]] = [
        ("optimizer", "plain SGD", {"optimizer": "sgd", "momentum": 0.0, "weight_decay": 0.0}),
        *(("momentum", f"SGD with momentum {m}", {"optimizer": "sgd", "momentum": m})
          for m in (0.9, 0.5, 0.95, 0.99)),
        ("optimizer", "Adam", {"optimizer": "adam"}),
    ]  # fmt: skip
    for culprit, words, change in changes:
        changed = _run(d, **change)
        if changed.protocol != d.protocol:
            yield culprit, f"the client's optimizer was {words}", changed


def _labels(d: Described) -> Iterator[Mistake]:
    if d.y.dim() != 1 or d.y.is_floating_point():
        return
    d.model.eval()
    with torch.no_grad():
        classes = int(d.model(d.x[:1]).shape[1])
    for words, y in (
        ("one too small: they count from 1 in one place and from 0 in the other",
         (d.y + 1) % classes),
        ("one too large: they count from 1 in one place and from 0 in the other",
         (d.y - 1) % classes),
        ("numbered the other way round", classes - 1 - d.y),
    ):  # fmt: skip
        if int(y.min()) >= 0:
            yield "labels", f"the labels are {words}", replace(d, y=y)
    count = len(d.y)
    orders = (
        list(itertools.permutations(range(count)))
        if count <= 4
        else [tuple(range(count))[::-1], *((*range(s, count), *range(s)) for s in range(1, count))]
    )
    for order in orders:
        y = d.y[torch.tensor(order, device=d.y.device)]
        if not torch.equal(y, d.y):
            yield (
                "labels",
                f"the labels belong to the images in another order ({order})",
                replace(d, y=y),
            )


def _inputs(d: Described, box: Box | None) -> Iterator[Mistake]:
    plain = d.x if box is None else box.denormalize(d.x)
    given = box is not None and box != Box.unit(box.channels)
    if given:
        yield (
            "normalisation",
            "the client did not normalise its images; it trained on [0, 1]",
            replace(d, x=plain),
        )
    for words, known in NORMALISATIONS.items():
        if known.channels == plain.shape[1] and known != box:
            missing = "" if given else ", which was not described"
            yield (
                "normalisation",
                f"the client's normalisation is {words}{missing}",
                replace(d, x=known.normalize(plain)),
            )
    yield "normalisation", "the client trained on bytes, 0 to 255", replace(d, x=plain * 255)
    if d.x.shape[1] == 3:
        yield "channels", "the client's channels come as BGR", replace(d, x=d.x.flip(1))


def _losses(d: Described) -> Iterator[Mistake]:
    candidates = [
        *(as_loss(key) for key in ("cross_entropy", "nll", "bce", "mse", "focal")),
        *(CrossEntropy(label_smoothing=s) for s in (0.05, 0.1, 0.2)),
    ]
    for loss in candidates:
        if loss != d.protocol.loss and not (d.y.dim() == 2 and loss == PLAIN):
            yield "loss", f"the client's loss is {loss.describe()}", _run(d, loss=loss)


# -- what is estimated instead of tried -----------------------------------------------------------


def _learning_rate(d: Described) -> tuple[str, str] | None:
    """Several local steps at another rate: no common factor, but a fixed point of factors."""
    if d.update.kind != "delta":
        return None
    rate = d.protocol.lr
    for _ in range(8):
        found = _try(_run(d, lr=rate))
        if found is None or not 1e-3 < found.factor < 1e3:
            return None
        if found.plain <= tolerance_of(d):
            return "learning rate", f"the learning rate was {rate:.4g}, not {d.protocol.lr:.4g}"
        rate *= found.factor
    return None


def _weight_decay(d: Described) -> tuple[str, str] | None:
    """The penalty lambda theta that an optimizer adds, by least squares (Gauss-Newton) on it."""
    decay = before = d.protocol.weight_decay if isinstance(d.protocol, FedAVG) else 0.0
    changed = d
    for _ in range(4):
        plain = changed.send()
        slope = _slope_in_decay(changed, plain)
        left = {n: t - plain[n] for n, t in d.update.tensors.items()}
        size = sum(float(t.double().square().sum()) for t in slope.values())
        inner = sum(float((left[n].double() * slope[n]).sum()) for n in left)
        decay += inner / size if size > 0 else 0.0
        if not 0 < decay < 10 or abs(decay - before) < 1e-12:
            return None
        changed = _decaying(d, decay)
        found = _try(changed)
        if found is not None and found.plain <= tolerance_of(d):
            return "weight decay", f"the client's optimizer had a weight decay of {decay:.3g}"
    return None


def _decaying(d: Described, decay: float) -> Described:
    if isinstance(d.protocol, FedAVG):
        return _run(d, weight_decay=decay)
    return replace(d, weight_decay=decay)


def _slope_in_decay(d: Described, plain: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """How the upload moves with the penalty."""
    if isinstance(d.protocol, FedAVG):
        small = 1e-4
        more = _run(d, weight_decay=d.protocol.weight_decay + small).send()
        return {n: (more[n].double() - plain[n].double()) / small for n in plain}
    factor, named = d.update.sign * d.update.scale, trained(d.model)
    return {n: factor * named[n].detach().double() for n in plain}


def _parameter_order(d: Described) -> tuple[str, str] | None:
    """Tensors of equal shape under each other's names."""
    sent, observed = d.send(), d.update.tensors
    swapped: dict[str, str] = {}
    for name, tensor in observed.items():
        if relative_residual({name: sent[name]}, {name: tensor}) <= tolerance_of(d):
            continue
        match = next(
            (other for other, t in sent.items() if other != name and t.shape == tensor.shape
             and relative_residual({name: t}, {name: tensor}) <= tolerance_of(d)),
            None,
        )  # fmt: skip
        if match is None:
            return None
        swapped[name] = match
    if not swapped:
        return None
    pairs = ", ".join(f"{name!r} holds what belongs to {other!r}"
                      for name, other in list(swapped.items())[:3])  # fmt: skip
    return "parameter order", f"the tensors are in another order: {pairs}"


def _dropout(d: Described, draws: int = 6) -> str:
    """Whether the update lies among replays with random masks, as far apart as they are.

    Returns:
        The finding; empty if the model draws nothing, or the update is another matter.
    """
    if d.protocol.mode != "train":
        return ""
    d.model.train()
    if not draws_of(d.model, d.x[:2]):
        return ""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        sent = [d.send(new=True) for _ in range(draws)]
    names = list(d.update.tensors)
    mean = {n: torch.stack([s[n] for s in sent]).mean(0) for n in names}
    unbiased = (draws / (draws - 1)) ** 0.5
    typical = unbiased * sum(relative_residual(s, mean) for s in sent) / draws
    observed = relative_residual(d.update.tensors, mean) / (1 + 1 / draws) ** 0.5
    if not 0.5 * typical <= observed <= 1.5 * typical:
        return ""
    return (
        "the model draws dropout masks that nobody recorded; the update is as far from replays "
        f"with random masks ({observed:.0%}) as these are from one another ({typical:.0%}), so "
        "nothing speaks against the description, and nothing closer can be said"
    )


# -- several at once, and none --------------------------------------------------------------------


def _several(d: Described, box: Box | None, first: Residual) -> str | None:
    """Mistakes together: each by how far it brings the residual down, or any two of them."""
    now, best, words = d, first.scaled, list[str]()
    for _ in range(AT_ONCE):
        found = [
            (residual.scaled, text, changed, residual)
            for _, text, changed in mistakes(now, box)
            if (residual := _try(changed)) is not None
        ]
        scaled, text, now, residual = min(found, key=lambda f: f[0])
        if scaled > BETTER * best:
            break
        best = scaled
        words.append(text)
        if scaled <= tolerance_of(now):
            return _listed(words, residual, now)
    entries = len(d.x) * sum(t.numel() for t in d.update.tensors.values())
    if entries > PAIRS:
        return None
    for culprit, text, changed in list(mistakes(d, box)):
        for other, more, both in mistakes(changed, box):
            if other == culprit or (residual := _try(both)) is None:
                continue
            if residual.scaled <= tolerance_of(both):
                return _listed([text, more], residual, both)
    return None


def _listed(words: list[str], residual: Residual, d: Described) -> str:
    if abs(residual.factor - 1) > tolerance_of(d):
        words = [*words, _factor(residual.factor, "")[1]]
    return "; ".join(words)


def _looks_like(d: Described) -> str:
    """What the part that nothing explains looks like."""
    sent, observed = d.send(), d.update.tensors
    whole = torch.cat([t.reshape(-1) for t in observed.values()])
    zeros, expected = (
        float((torch.cat([t.reshape(-1) for t in group]) == 0).double().mean())
        for group in (observed.values(), sent.values())
    )
    if zeros > 0.5 and zeros > expected + 0.2:
        return (
            f"{zeros:.0%} of the update is exactly 0, of the replay {expected:.0%}: it looks "
            "pruned or sparsified (declare the defense)"
        )
    if len(whole.abs().unique()) <= max(2, 2 * len(observed)):
        return "The update has one size per tensor: it looks sign-compressed"
    large = [n for n, t in observed.items() if t.numel() >= 64]
    spread = torch.tensor([float((observed[n] - sent[n]).double().std()) for n in large])
    if len(large) > 1 and float(spread.std() / spread.mean().clamp(min=1e-30)) < 0.15:
        return (
            f"What is left over has the same deviation ({float(spread.mean()):.2g}) in every "
            "tensor: it looks like added noise (declare the defense)"
        )
    return ""
