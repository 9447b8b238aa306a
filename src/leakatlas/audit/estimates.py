"""What is wrong with a description, estimated from the update where it cannot be tried."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from leakatlas.audit.described import (
    Described,
    attempted,
    relative_residual,
    residual_of,
    tolerance_of,
    with_protocol,
)
from leakatlas.fl import FedAVG, FedSGD
from leakatlas.fl.draws import draws_anything, moving_buffers
from leakatlas.fl.state import trained


def example_clipping(d: Described) -> tuple[str, str] | None:
    """Every example's gradient clipped to one norm before the mean, as DP-SGD does it.

    The norm follows from that of the update, which grows with it; whether it explains the update
    is then a matter of directions, so that nothing is fitted.
    """
    N = len(d.x)
    if not isinstance(d.protocol, FedSGD) or d.clients > 1 or N < 2 or d.drawn or d.seeds:
        return None
    names = list(d.update.tensors)
    each = [replace(d, x=d.x[i : i + 1], y=d.y[i : i + 1]).send() for i in range(N)]
    one = 1 if d.update.reduction == "sum" else N
    g = torch.stack([torch.cat([e[n].double().flatten() for n in names]) for e in each]) / one
    norms = g.norm(dim=1) * one / d.update.scale
    seen = torch.cat([d.update.tensors[n].double().flatten() for n in names])

    def clipped(bound: float) -> Tensor:
        found: Tensor = (bound / norms).clamp(max=1.0) @ g
        return found

    low, high = 0.0, float(norms.max())
    for _ in range(60):
        bound = (low + high) / 2
        low, high = (bound, high) if clipped(bound).norm() < seen.norm() else (low, bound)
    left = float((clipped(high) - seen).norm() / seen.norm().clamp(min=1e-300))
    if left > tolerance_of(d) or float(norms.max()) <= high * (1 + 1e-6):
        return None
    return (
        "example clipping",
        f"every example's gradient was clipped to norm {high:.4g} before the mean, as DP-SGD does "
        "it, and no noise was added: a defense without noise, which no budget of privacy describes",
    )


STILL = 0.05
"""Largest residual that buffers held still are blamed for."""


def learning_rate(d: Described) -> tuple[str, str] | None:
    """Several local steps at another rate: no common factor, but a fixed point of factors."""
    if d.update.kind != "delta":
        return None
    rate = d.protocol.lr
    for _ in range(8):
        found = attempted(with_protocol(d, lr=rate))
        if found is None or not 1e-3 < found.factor < 1e3:
            return None
        if found.plain <= tolerance_of(d):
            return "learning rate", f"the learning rate was {rate:.4g}, not {d.protocol.lr:.4g}"
        rate *= found.factor
    return None


def weight_decay(d: Described) -> tuple[str, str] | None:
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
        found = attempted(changed)
        if found is not None and found.plain <= tolerance_of(d):
            return "weight decay", f"the client's optimizer had a weight decay of {decay:.3g}"
    return None


def _decaying(d: Described, decay: float) -> Described:
    if isinstance(d.protocol, FedAVG):
        return with_protocol(d, weight_decay=decay)
    return replace(d, weight_decay=decay)


def _slope_in_decay(d: Described, plain: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """How the upload moves with the penalty."""
    if isinstance(d.protocol, FedAVG):
        small = 1e-4
        more = with_protocol(d, weight_decay=d.protocol.weight_decay + small).send()
        return {n: (more[n].double() - plain[n].double()) / small for n in plain}
    factor, named = d.update.sign * d.update.scale, trained(d.model)
    return {n: factor * named[n].detach().double() for n in plain}


def parameter_order(d: Described) -> tuple[str, str] | None:
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


def dropout(d: Described, draws: int = 6) -> str:
    """Whether the update lies among replays with random masks, as far apart as they are.

    Returns:
        The finding; empty if the model draws nothing, or the update is another matter.
    """
    if d.protocol.mode != "train":
        return ""
    d.model.train()
    if not draws_anything(d.model, d.x[:2]):
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


def moving(d: Described) -> str:
    """Whether forward passes move buffers that a replay of several steps holds still.

    Returns:
        The finding; empty if there are none, or they cannot be what is left over.
    """
    local_steps = d.protocol.steps(len(d.x) // d.clients)
    if d.protocol.mode != "train" or local_steps == 1:
        return ""
    names = moving_buffers(d.model.train(), d.x[:2])
    left = residual_of(d).plain
    if not names or left > STILL:
        return ""
    return (
        f"every forward pass in train mode moves {names[0]!r} (spectral normalisation does so), "
        "and a replay of several steps holds it where the round began; what is left over, "
        f"{left:.1%} of the update, may be that or a small mistake, and nothing closer can be said"
    )


def looks_like(d: Described) -> str:
    """What the part that nothing explains looks like."""
    sent, observed = d.send(), d.update.tensors
    alone = [n for n, t in observed.items() if not sent[n].any() and t.any()]
    if alone:
        return (
            f"The update moves {alone[0]!r}, on which the described loss does not depend: another "
            "output of the model takes part in the client's loss"
        )
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
    factor = residual_of(d).factor
    scaled = "" if abs(factor - 1) < 0.02 else f", on {factor:.3g} times what the client sends"
    for words, times in (("", 1.0), (scaled, factor)):
        if (deviation := noise_on(d, times, sent)) is not None:
            return (
                f"What is left over has the same deviation ({deviation:.2g}) in every tensor: it "
                f"looks like added noise{words} (declare the defense)"
            )
    return ""


def noise_on(
    d: Described, factor: float = 1.0, sent: Mapping[str, Tensor] | None = None
) -> float | None:
    """The deviation of what is left over, if it is the same in every tensor, as noise's is.

    Args:
        d: The description.
        factor: Of what its client sends.
        sent: That, if it is at hand.
    """
    sent, observed = d.send() if sent is None else sent, d.update.tensors
    large = [n for n, t in observed.items() if t.numel() >= 64]
    spread = torch.tensor([float((observed[n] - factor * sent[n]).double().std()) for n in large])
    if len(large) > 1 and float(spread.std() / spread.mean().clamp(min=1e-30)) < 0.15:
        return float(spread.mean())
    return None
