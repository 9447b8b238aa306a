"""What a defense costs: accuracy of a federation trained under it, on a small reference task.

The task is fixed so that defenses can be compared: scikit-learn's 8x8 digits, ten clients, a
network with one hidden layer, plain FedSGD or FedAVG. It answers "how much accuracy does this
mechanism cost at this setting", not "how accurate will your model be".
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from leakatlas import data, sealed
from leakatlas.attacks.api import cache_folder
from leakatlas.blocks.watch import Watch
from leakatlas.errors import LeakAtlasError
from leakatlas.fl import Client, Defense, FedAVG, Federation, FedSGD, ModelRef, Protocol, stream
from leakatlas.params import checked

CLIENTS = 10
TRAIN = 1_000
FEDAVG_ROUNDS = 12
FEDSGD_ROUNDS = 40
MODEL = ModelRef("builtin", "fc", {"in_channels": 1, "size": 8, "classes": 10, "widths": [64]})


_UNREADABLE: tuple[type[Exception], ...] = (*sealed.MALFORMED, OSError)


@dataclass(frozen=True)
class Utility:
    """Accuracy under a set of defenses.

    Args:
        accuracy: On 797 held-out digits, after the last round; None if training was refused.
        reason: Why there is none.
    """

    accuracy: float | None
    reason: str = ""


def price_of(
    defenses: Sequence[Defense], *, local: bool = True, seed: int = 0, watch: Watch | None = None
) -> Utility:
    """:func:`accuracy_under`, kept from audit to audit: it depends on the defenses alone.

    Args:
        defenses: As there.
        local: As there.
        seed: As there.
        watch: Budget; what it cut short is neither kept nor reported as a price.
    """
    names = [[d.key, d.version, d.to_json()] for d in defenses]
    facts = [names, local, seed, CLIENTS, TRAIN, FEDAVG_ROUNDS, FEDSGD_ROUNDS, torch.__version__]
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    file = cache_folder() / "prices" / f"{digest}.json"
    try:
        return Utility(**checked(Utility, json.loads(file.read_text(encoding="utf-8"))))
    except _UNREADABLE:  # none, or damaged: measured again
        pass
    watch = watch or Watch()
    found = accuracy_under(defenses, local=local, seed=seed, watch=watch)
    if watch.cut_short:
        return Utility(None, "the budget ended before its price was measured")
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".partial")
    partial.write_text(json.dumps(vars(found)), encoding="utf-8")
    partial.replace(file)
    return found


def accuracy_under(
    defenses: Sequence[Defense], *, local: bool = True, seed: int = 0, watch: Watch | None = None
) -> Utility:
    """Train the reference task under ``defenses`` and measure test accuracy.

    Args:
        defenses: All in force together.
        local: FedAVG with one local epoch; one FedSGD gradient a round otherwise, which is what
            single-batch defenses are defined on.
        seed: Of the split, the training and the noise.
        watch: Budget and stop switch.
    """
    digits = data.digits()
    order = torch.randperm(len(digits), generator=stream(seed, "utility split")).tolist()
    train, test = digits.subset(order[:TRAIN]), digits.subset(order[TRAIN:])
    protocol: Protocol = (
        FedAVG(epochs=1, batch_size=20, lr=0.5, mode="train", shuffle=True)
        if local
        else FedSGD(lr=0.5, mode="train")
    )
    share = TRAIN // CLIENTS
    clients = {
        c: Client(train.images[c * share : (c + 1) * share],
                  train.labels[c * share : (c + 1) * share])
        for c in range(CLIENTS)
    }  # fmt: skip
    model = replace(MODEL, kwargs={**MODEL.kwargs, "seed": seed}).build()
    try:
        federation = Federation(model, clients, protocol, defenses, seed=seed)
        for _ in (watch or Watch()).steps(FEDAVG_ROUNDS if local else FEDSGD_ROUNDS):
            federation.play_round(apply=True)
    except LeakAtlasError as problem:
        return Utility(None, str(problem))
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        predicted = federation.evaluation_model(0)(test.images).argmax(1)
    return Utility(float((predicted == test.labels).float().mean()))
