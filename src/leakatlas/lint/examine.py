"""The whole examination: which checks can run on what the client holds, and their verdict."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from leakatlas import devices
from leakatlas.data import Box, ImageSet
from leakatlas.errors import InvalidInput
from leakatlas.fl import Update, load_into, model_state, task_loss
from leakatlas.fl.state import on_device, parameters
from leakatlas.lint import behaviour, consistency, inversion, published, static, thresholds
from leakatlas.lint.behaviour import Batch
from leakatlas.lint.consistency import Received, RoundFacts
from leakatlas.lint.findings import Score, Verdict, judge
from leakatlas.lint.inversion import Leak
from leakatlas.lint.layers import Anatomy, anatomy
from leakatlas.lint.published import Dynamics

State = Mapping[str, Tensor]
ModelOrState = nn.Module | State
Examples = ImageSet | tuple[Tensor, Tensor]


def lint(
    model: ModelOrState,
    *,
    reference: ModelOrState | None = None,
    batch: Examples | None = None,
    update: Update | None = None,
    others: Sequence[Received] | None = None,
    box: Box | None = None,
    facts: RoundFacts | None = None,
    previous: ModelOrState | None = None,
    history: Sequence[Dynamics] = (),
    device: str | torch.device | None = None,
) -> Verdict:
    """Was this model tampered with? Ask before training on it, or before sending the update.

    The weights alone give D1 to D7 and D15. The client's own batch adds D8 to D10 and the
    self-inversion D14; a reference adds D1's comparison and, as a module, D11; other clients D12;
    what is known of the round D13; the model of the round before D17; what was kept of earlier
    rounds D16.

    Args:
        model: The received model, or its state dict (names and tensors: no batch checks then,
            unless ``reference`` is a module of the same architecture).
        reference: The agreed architecture, best the previous round's model.
        batch: Own examples: an :class:`~leakatlas.data.ImageSet` (normalised with ``box``), or
            ``(x, y)`` in model space.
        update: The update that the client is about to send; computed from ``batch`` (one gradient
            in the model's own mode) if left out.
        others: What other clients received: states, modules, or hashes.
        box: Pixel space of the model.
        facts: What is known of the round.
        previous: What was received in the round before; the reference, if there is none.
        history: Of earlier rounds, oldest first on the same examples (:func:`dynamics`).
        device: Where the checks run, by a name of :func:`leakatlas.devices.chosen`; where the
            model lies if None.

    Returns:
        The verdict; ``verdict.alarm`` says whether to refuse.

    Raises:
        InvalidInput: If the model, the batch or the update cannot be used, or there is no such
            device.
    """
    if device is not None:
        model = _moved(model, devices.chosen(device))
    scores, skipped, leaks = measure(
        model, reference=reference, batch=batch, update=update, others=others, box=box,
        facts=facts, previous=previous, history=history,
    )  # fmt: skip
    return judge(
        scores, thresholds.shipped().thresholds, skipped=skipped, notes=_notes(leaks, skipped)
    )


def measure(
    model: ModelOrState,
    *,
    reference: ModelOrState | None = None,
    batch: Examples | None = None,
    update: Update | None = None,
    others: Sequence[Received] | None = None,
    box: Box | None = None,
    facts: RoundFacts | None = None,
    previous: ModelOrState | None = None,
    history: Sequence[Dynamics] = (),
) -> tuple[list[Score], dict[str, str], list[Leak]]:
    """All scores, without thresholds; see :func:`lint`.

    Returns:
        Scores, the checks that were not run with the reason, and what the update gives away.
    """
    body = anatomy(model)
    place = _place(model)
    reference = None if reference is None else _moved(reference, place)
    previous = None if previous is None else _moved(previous, place)
    reference = previous if reference is None else reference
    skipped: dict[str, str] = {}
    scores = static.check_weights(body, box)
    for layer in body.linear:
        scores += published.d15_improbable_rows(layer)
    if not body.ordered:
        skipped["D1/detour"] = "the names are sorted, so the order of the layers is unknown"
    rough = [layer.name for layer in body.linear if static.coarse(layer)]
    if rough:
        skipped["D5/fingerprint"] = f"too few different values in {static.some(rough)}"
    if body.passed_over:
        skipped["integers"] = f"by their names no weights: {static.some(body.passed_over)}"
    module = _module(model, body.state, reference)
    if reference is None:
        skipped["D1/reference"] = "no reference"
    else:
        scores += _compare(body, model, reference)
    if previous is None:
        skipped["D17"] = "no model of the round before"
    else:
        scores += published.d17_change(body, anatomy(previous))
    leaks: list[Leak] = []
    if batch is None and update is None:
        skipped.update(dict.fromkeys(("D8", "D9", "D10", "D14"), "no batch"))
        skipped["D11"] = skipped["D16"] = "no batch"
    elif batch is None:
        raise InvalidInput(
            "lint compares an update with the examples behind it; give `batch` beside `update`."
        )
    elif module is None:
        raise InvalidInput(
            "The checks on a batch run the model, and a state dict alone cannot be run; give an "
            "nn.Module, or one of the same architecture as `reference`."
        )
    else:
        own = as_batch(batch, module, box)
        previous = _previous(module, reference)
        with torch.random.fork_rng(devices=[]):  # dropout draws from the caller's generator
            found, leaks = _on_batch(module, own, update, previous, body, history, skipped)
        scores += found
    if others:
        scores += consistency.d12_consistency(body.state, others)
    else:
        skipped["D12"] = "no other client's model"
    if facts is None:
        skipped["D13"] = "nothing known of the round"
    else:
        scores += consistency.d13_protocol(facts)
    return scores, skipped, leaks


def dynamics(model: nn.Module, batch: Examples, *, box: Box | None = None) -> Dynamics:
    """Loss and gradient of a received model on own examples: what D16 asks of earlier rounds.

    Args:
        model: As received.
        batch: See :func:`lint`; the same examples every round.
        box: Pixel space of the model.
    """
    own = as_batch(batch, model, box)
    logits = behaviour.logits_of(model, own.x)
    with torch.random.fork_rng(devices=[]):
        return _dynamics(model, own, logits, behaviour.batch_gradient(model, own))


def _dynamics(model: nn.Module, batch: Batch, logits: Tensor, gradient: State) -> Dynamics:
    size = behaviour.relative_size(gradient, parameters(model))
    return Dynamics(float(task_loss(logits, batch.y)), size)


def as_batch(batch: Examples, model: nn.Module, box: Box | None) -> Batch:
    """The client's examples in the model's space, dtype and device.

    Raises:
        InvalidInput: If inputs and labels do not fit each other or hold non-finite values.
    """
    like = next(model.parameters(), None)
    if like is None:
        raise InvalidInput(f"{type(model).__name__} has no parameters; there is nothing to train.")
    if isinstance(batch, ImageSet):
        space = box or Box.unit(batch.channels)
        x, y = space.normalize(batch.images), batch.labels
    elif isinstance(batch, tuple) and len(batch) == 2 and all(map(_is_plain, batch)):
        x, y = batch
    else:
        raise InvalidInput(
            f"lint takes own examples as an ImageSet or as two tensors (x, y) of numbers, got a "
            f"{type(batch).__name__}."
        )
    if len(x) == 0 or len(x) != len(y):
        raise InvalidInput(
            f"lint got {len(x)} inputs and {len(y)} labels; expected the same number, at least one."
        )
    if not bool(torch.isfinite(x).all()):
        raise InvalidInput("The batch holds values that are not finite.")
    if not (y.dim() == 2 or (y.dim() == 1 and not y.is_floating_point() and int(y.min()) >= 0)):
        raise InvalidInput(
            f"Labels must be classes (N,) from 0 on, or probabilities (N, K); got {y.dtype} of "
            f"shape {tuple(y.shape)}."
        )
    return Batch(x.detach().to(like), y.to(like.device))


def _is_plain(part: object) -> bool:
    return (
        isinstance(part, Tensor)
        and part.dim() > 0
        and part.layout == torch.strided
        and not (part.is_meta or part.is_quantized or part.is_complex())
    )


def _on_batch(
    module: nn.Module,
    batch: Batch,
    update: Update | None,
    previous: nn.Module | None,
    body: Anatomy,
    history: Sequence[Dynamics],
    skipped: dict[str, str],
) -> tuple[list[Score], list[Leak]]:
    logits = behaviour.logits_of(module, batch.x)
    if batch.y.dim() == 1 and int(batch.y.max()) >= logits.shape[1]:
        raise InvalidInput(
            f"Label {int(batch.y.max())} is out of range for a model with {logits.shape[1]} "
            "classes."
        )
    hidden = frozenset(f"{layer.name}.weight" for layer in body.linear if layer.name != body.head)
    norms = behaviour.row_norms(module, batch)
    gradient = behaviour.batch_gradient(module, batch)
    linear = {p: gradient[p] for p in (x.parameter for x in body.linear) if p in gradient}
    scores = behaviour.d7_saturation(logits, batch.y)
    scores += behaviour.d8_d_snr(norms)
    scores += behaviour.d9_activations(norms, hidden)
    scores += behaviour.d10_gradient_sparsity(linear)
    now = _dynamics(module, batch, logits, gradient)
    scores += published.d16_dynamics(now, history)
    if len(history) < published.EARLIER:
        skipped["D16"] = f"{len(history)} earlier rounds of {published.EARLIER}"
    if previous is None:
        skipped["D11"] = "no previous model as a module"
    else:
        scores += behaviour.d11_dynamics(
            logits,
            behaviour.logits_of(previous, batch.x),
            batch.y,
            now.gradient,
            behaviour.relative_size(
                behaviour.batch_gradient(previous, batch), parameters(previous)
            ),
        )
    if len(batch.x) < behaviour.FEWEST:
        skipped["D8"] = skipped["D9"] = f"{len(batch.x)} examples are too few"
    sent = gradient if update is None else _sent(update, module)
    found, leaks, unjudged = inversion.d14_self_inversion(module, batch, sent, head=body.head)
    if unjudged:
        skipped["D14"] = unjudged
    return scores + found, leaks


def _sent(update: Update, module: nn.Module) -> dict[str, Tensor]:
    own = parameters(module)
    update.check().check_fits(own)
    update = update.with_tensors({n: t.to(own[n].device) for n, t in update.tensors.items()})
    return dict(update.as_delta(own).tensors)


def _place(model: ModelOrState) -> torch.device:
    """Where a model lies; the CPU for one that holds nothing."""
    held = model.state_dict() if isinstance(model, nn.Module) else model
    return next((t.device for t in held.values() if isinstance(t, Tensor)), torch.device("cpu"))


def _moved(model: ModelOrState, device: torch.device) -> ModelOrState:
    """The same on another device; what lies on ``meta`` holds nothing to move, and is judged so."""
    if "meta" in (device.type, _place(model).type):
        return model
    if isinstance(model, nn.Module):
        return on_device(model, device)
    return {n: t.to(device) if isinstance(t, Tensor) else t for n, t in model.items()}


def _module(model: ModelOrState, state: State, reference: ModelOrState | None) -> nn.Module | None:
    """Something to run: the model itself, or the reference holding the received state."""
    if isinstance(model, nn.Module):
        return model
    if isinstance(reference, nn.Module) and _shapes(reference) == _shapes(state):
        return load_into(reference, state)
    return None


def _previous(module: nn.Module, reference: ModelOrState | None) -> nn.Module | None:
    if reference is None or isinstance(reference, nn.Module):
        return reference
    return load_into(module, reference) if _shapes(module) == _shapes(reference) else None


def _compare(body: Anatomy, model: ModelOrState, reference: ModelOrState) -> list[Score]:
    both = isinstance(model, nn.Module) and isinstance(reference, nn.Module)
    return static.d1_reference(
        _shapes(body.state),
        _shapes(reference),
        types=_types(model) if both else None,
        expected_types=_types(reference) if both else None,
    )


def _shapes(model: ModelOrState) -> dict[str, tuple[int, ...]]:
    state = model_state(model) if isinstance(model, nn.Module) else model
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def _types(model: ModelOrState) -> dict[str, str]:
    assert isinstance(model, nn.Module)
    return {name: type(module).__name__ for name, module in model.named_modules()}


def _notes(leaks: list[Leak], skipped: Mapping[str, str]) -> tuple[str, ...]:
    notes = [
        f"{leak.place}: the update gives away {int(leak.found.sum())} of {len(leak.found)} own "
        "images by row ratios; a small batch leaks so from honest layers too"
        for leak in leaks
        if leak.pixels and leak.share > 0
    ]
    if "D14" in skipped and skipped["D14"] == "no batch":
        notes.append("weights alone were judged; give a batch for the checks that know no attack")
    return tuple(notes)
