"""What cannot end in this budget, or in this memory, is refused with the arithmetic, not tried."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

from leakatlas import limits
from leakatlas.attacks.api import Attack
from leakatlas.errors import InvalidParameter
from leakatlas.fl import FedSGD, Stage, load_into, model_state

REPLAYS = 10
"""How often one client's computation is repeated before any attack: the simulated round, and the
doctor's check of it under every hypothesis. Each attack repeats it far more often."""

QUIET = 1_000
"""Local steps that are not worth timing."""

DAY = 86_400.0
"""Seconds that count as the budget of who set none."""

COPIES = 6
"""Tensors of a candidate's size in a descent: the candidate, its slope, the best so far, two
moments, and a step's own."""


def require_feasible(live: Stage, attacks: Sequence[Attack], seconds: float | None) -> None:
    """Refuse a set-up whose honest clients alone, or whose attacks' candidates, are too much.

    Args:
        live: The set-up.
        attacks: Who will be tried.
        seconds: Budget; a day if None.

    Raises:
        InvalidParameter: With the arithmetic and the ways out.
    """
    _require_time(live, DAY if seconds is None else seconds)
    _require_memory(live, attacks)


def _require_time(live: Stage, seconds: float) -> None:
    protocol, clients = live.scenario.protocol, len(live.federation.clients)
    examples = len(next(iter(live.federation.clients.values())).x)
    steps = protocol.steps(examples) * clients * live.scenario.rounds
    if steps <= QUIET:
        return
    step = step_seconds(live)
    needed = REPLAYS * steps * step
    if needed > seconds:
        local = "1 step" if isinstance(protocol, FedSGD) else (
            f"{protocol.epochs:,} epochs x {protocol.steps(examples) // protocol.epochs:,} batches"
        )  # fmt: skip
        raise InvalidParameter(
            f"{type(protocol).__name__}: {local} x {clients:,} clients x {live.scenario.rounds:,} "
            f"rounds = {steps:,} local steps of {1e3 * step:.3g} ms, {REPLAYS} times over before "
            f"any attack: {duration(needed)}; the budget is {duration(seconds)}. Lower epochs, "
            "rounds or clients, or raise the budget."
        )


def _require_memory(live: Stage, attacks: Sequence[Attack]) -> None:
    x = next(iter(live.federation.clients.values())).x
    for attack in attacks:
        for name in ("restarts", "seeds"):
            count = getattr(attack, name, 1)
            if isinstance(count, int) and count > 1:
                needed = float(COPIES) * count * x.numel() * x.element_size()
                shape = " x ".join(map(str, x.shape))
                limits.require_memory(
                    f"{attack.key}({name}={count:,})",
                    needed,
                    f"{count:,} candidates x {shape} values x {x.element_size()} bytes x {COPIES}",
                )


def step_seconds(live: Stage) -> float:
    """Seconds of one local step here: the faster of two, so that a pause does not count."""
    client = next(iter(live.federation.clients.values()))
    protocol = live.scenario.protocol
    size = len(client.x) if isinstance(protocol, FedSGD) else protocol.batch_size
    x = client.x[:size]
    # A copy in eval mode: timing must not move the running statistics of a batch norm.
    model = load_into(live.federation.model, model_state(live.federation.model)).eval()
    parameters = [p for p in model.parameters() if p.requires_grad]
    taken = []
    with torch.random.fork_rng(devices=[]):
        for _ in range(2):
            begun = time.perf_counter()
            torch.autograd.grad(model(x).sum(), parameters, allow_unused=True)
            taken.append(time.perf_counter() - begun)
    return min(taken)


def duration(seconds: float) -> str:
    """Seconds for people.

    >>> duration(90), duration(40_000_000)
    ('1.5 minutes', '1.27 years')
    """
    for size, unit in ((31_557_600, "years"), (86_400, "days"), (3_600, "hours"), (60, "minutes")):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.3g} seconds"
