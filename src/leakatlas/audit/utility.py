"""What a defense costs: accuracy of a federation trained under it.

By default on a small reference task, which is fixed so that defenses can be compared:
scikit-learn's 8x8 digits, ten clients, a network with one hidden layer, plain FedSGD or FedAVG. It
answers "how much accuracy does this mechanism cost at this setting", not "how accurate will your
model be". For that there is ``utility: own``: the model, the protocol and images of the audit
itself, at the step size that suits each set of defenses best on images held back for it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from leakatlas import data, sealed
from leakatlas.attacks.api import cache_folder
from leakatlas.blocks.watch import Watch
from leakatlas.data import Box, ImageSet
from leakatlas.errors import InvalidInput, LeakAtlasError
from leakatlas.fl import (
    Client,
    Defense,
    FedAVG,
    Federation,
    FedSGD,
    ModelRef,
    Protocol,
    model_state,
    state_hash,
    stream,
)
from leakatlas.params import checked

CLIENTS = 10
TRAIN = 1_000
FEDAVG_ROUNDS = 12
FEDSGD_ROUNDS = 40
MODEL = ModelRef("builtin", "fc", {"in_channels": 1, "size": 8, "classes": 10, "widths": [64]})
REFERENCE = "a reference task (8x8 digits, ten clients)"

EVALUATED = 500
"""Images that a model predicts at a time."""

_UNREADABLE: tuple[type[Exception], ...] = (*sealed.MALFORMED, OSError)


@dataclass(frozen=True)
class Utility:
    """Accuracy under a set of defenses.

    Args:
        accuracy: On held-out images, after the last round; None if training was refused.
        reason: Why there is none.
    """

    accuracy: float | None
    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class Task:
    """A federation that trains.

    Args:
        name: For people, as in "accuracy of ...".
        model: With the weights that it starts from.
        train: Dealt to the clients evenly, in order; what does not divide is left out.
        validation: Images on which one of several step sizes is chosen; None if there is one.
        test: Images whose accuracy counts.
        protocol: How clients train; its step size is one of ``rates``.
        clients: How many.
        rounds: How many, all clients in each.
        rates: Step sizes tried.
        box: Pixel space of the model.

    Raises:
        InvalidInput: If there are fewer training images than clients.
    """

    name: str
    model: nn.Module
    train: ImageSet
    validation: ImageSet | None
    test: ImageSet
    protocol: Protocol
    clients: int
    rounds: int
    rates: tuple[float, ...]
    box: Box

    def __post_init__(self) -> None:
        if len(self.train) < self.clients:
            raise InvalidInput(
                f"utility: {len(self.train)} training images cannot be dealt to {self.clients} "
                "clients; give more images, or fewer clients."
            )

    def facts(self) -> list[object]:
        """All that decides an accuracy, defenses and seed aside."""
        parts = (self.train, self.validation, self.test)
        return [
            type(self.model).__qualname__, state_hash(model_state(self.model)),
            [None if part is None else part.fingerprint() for part in parts],
            type(self.protocol).__name__, repr(self.protocol), self.clients, self.rounds,
            list(self.rates), repr(self.box),
        ]  # fmt: skip


def reference_task(*, local: bool, seed: int) -> Task:
    """The digits.

    Args:
        local: FedAVG with one local epoch; one FedSGD gradient a round otherwise, which is what
            single-batch defenses are defined on.
        seed: Of the split and the network.
    """
    digits = data.digits()
    order = torch.randperm(len(digits), generator=stream(seed, "utility split")).tolist()
    protocol: Protocol = (
        FedAVG(epochs=1, batch_size=20, lr=0.5, mode="train", shuffle=True)
        if local
        else FedSGD(lr=0.5, mode="train")
    )
    return Task(
        name=REFERENCE,
        model=replace(MODEL, kwargs={**MODEL.kwargs, "seed": seed}).build(),
        train=digits.subset(order[:TRAIN]),
        validation=None,
        test=digits.subset(order[TRAIN:]),
        protocol=protocol,
        clients=CLIENTS,
        rounds=FEDAVG_ROUNDS if local else FEDSGD_ROUNDS,
        rates=(0.5,),
        box=Box.unit(1),
    )


def price_of(
    defenses: Sequence[Defense],
    *,
    local: bool = True,
    seed: int = 0,
    watch: Watch | None = None,
    task: Task | None = None,
) -> Utility:
    """:func:`accuracy_under`, kept from audit to audit by all that decides it.

    Args:
        defenses: As there.
        local: Of the reference task.
        seed: As there.
        watch: Budget; what it cut short is neither kept nor reported as a price.
        task: The reference task if None.
    """
    task = task or reference_task(local=local, seed=seed)
    names = [[d.key, d.version, d.to_json()] for d in defenses]
    facts = [names, task.facts(), seed, torch.__version__]
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    file = cache_folder() / "prices" / f"{digest}.json"
    try:
        return Utility(**checked(Utility, json.loads(file.read_text(encoding="utf-8"))))
    except _UNREADABLE:  # none, or damaged: measured again
        pass
    watch = watch or Watch()
    found = accuracy_under(defenses, task, seed=seed, watch=watch)
    if watch.cut_short:
        return Utility(None, "the budget ended before its price was measured")
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".partial")
    partial.write_text(json.dumps(vars(found)), encoding="utf-8")
    partial.replace(file)
    return found


def accuracy_under(
    defenses: Sequence[Defense], task: Task, *, seed: int = 0, watch: Watch | None = None
) -> Utility:
    """Train the task under ``defenses``, and measure test accuracy.

    Of several step sizes, the one that is best on the validation images counts, for these defenses
    by themselves: many of them change how far a step goes.

    Args:
        defenses: All in force together.
        task: What is trained.
        seed: Of the training and the noise.
        watch: Budget and stop switch.
    """
    watch = watch or Watch()
    best, accuracy = -1.0, -1.0
    try:
        for lr, part in zip(task.rates, watch.share(len(task.rates)), strict=False):
            federation = _federation(defenses, task, lr, seed)
            for _ in part.steps(task.rounds):
                federation.play_round(apply=True)
            held = 0.0 if task.validation is None else _accuracy(federation, task, task.validation)
            if held > best:  # of equals the first: the test images have no say
                best, accuracy = held, _accuracy(federation, task, task.test)
    except LeakAtlasError as problem:
        return Utility(None, str(problem))
    return Utility(accuracy) if accuracy >= 0 else Utility(None, "there was no time to train")


def _federation(defenses: Sequence[Defense], task: Task, lr: float, seed: int) -> Federation:
    share = len(task.train) // task.clients
    like = next(task.model.parameters())
    x = task.box.normalize(task.train.images).to(like)
    y = task.train.labels.to(like.device)
    clients = {
        c: Client(x[c * share : (c + 1) * share], y[c * share : (c + 1) * share])
        for c in range(task.clients)
    }
    protocol = replace(task.protocol, lr=lr)
    return Federation(task.model, clients, protocol, defenses, seed=seed, box=task.box)


@torch.no_grad()
def _accuracy(federation: Federation, task: Task, images: ImageSet) -> float:
    like = next(task.model.parameters())
    model = federation.evaluation_model(0)
    with torch.random.fork_rng(devices=[]):
        right = sum(
            int((model(task.box.normalize(x).to(like)).argmax(1).cpu() == y).sum())
            for x, y in zip(
                images.images.split(EVALUATED), images.labels.split(EVALUATED), strict=True
            )
        )
    return right / len(images)
