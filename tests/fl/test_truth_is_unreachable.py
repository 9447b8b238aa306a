"""Law 1: from a view, no chain of references leads to a private tensor."""

from __future__ import annotations

import gc
import types
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from leakatlas.data import ImageSet
from leakatlas.fl import (
    Client,
    ClientContext,
    Defense,
    FedAVG,
    Federation,
    FedSGD,
    ModelRef,
    Protocol,
    RoundRecord,
    RoundView,
    Scenario,
    Stage,
    TamperedModel,
    Truth,
    Update,
    View,
    stage,
)
from leakatlas.threat import LETTERS, Grant, Vantage
from tests.conftest import BOX, build_stage, photos, surrogate

HARNESS = (Client, Federation, Stage, RoundRecord, Truth, ClientContext)
"""Objects that hold private data; none may be reachable."""


def reachable(root: object) -> Iterator[object]:
    """Every object that can be reached from ``root``, through C level references too.

    Stops at modules, types and functions' global names, which lead to the whole interpreter and
    belong to no scenario; follows closures, defaults, bound objects, tensors' graphs, gradients,
    hooks and base tensors.
    """
    seen: set[int] = set()
    keep: list[object] = []  # ids are only unique while their objects live
    queue: list[object] = [root]
    while queue:
        item = queue.pop()
        if id(item) in seen or isinstance(item, types.ModuleType | type):
            continue
        seen.add(id(item))
        keep.append(item)
        yield item
        if isinstance(item, types.FunctionType):
            queue += [item.__closure__, item.__defaults__, item.__kwdefaults__, item.__dict__]
            continue
        queue += gc.get_referents(item)
        if isinstance(item, Tensor):
            queue += [item.grad_fn, item._base, item._backward_hooks]
            if item.is_leaf or item.retains_grad:
                queue.append(item.grad)
        elif isinstance(item, torch.autograd.graph.Node):
            queue += [function for function, _ in item.next_functions]
            queue.append(getattr(item, "variable", None))
            queue += _saved(item)


def _saved(node: torch.autograd.graph.Node) -> list[object]:
    """What a node of the graph keeps for its backward pass."""
    found: list[object] = []
    for name in (n for n in dir(node) if n.startswith("_saved_")):
        try:
            found.append(getattr(node, name))
        except RuntimeError as freed:  # by an earlier backward pass: nothing is held any more
            assert "already been freed" in str(freed)
    return found


class Secrets:
    """What must not be found, and how to recognise it."""

    def __init__(self, scene: Stage, record: RoundRecord) -> None:
        federation = scene.federation
        self.images: list[Tensor] = []
        self.labels: list[Tensor] = []
        self.others: list[Tensor] = []
        for index, client in federation.clients.items():
            self.images += [client.x, scene.truth(index).images]
            self.labels += [client.y]
            self.others += [i for i in record.order[index] if len(i) > 1]
            for memory in client.memories.values():
                self.others += [v for v in memory.values() if isinstance(v, Tensor)]
            self.others += list(client.private.values())
        everything = [*self.images, *self.labels, *self.others]
        self.storages = {t.untyped_storage().data_ptr() for t in everything} - {0}
        self.rows = [row.double().flatten() for batch in self.images for row in batch]

    def name(self, found: Tensor) -> str:
        """What ``found`` gives away, or nothing."""
        if found.layout != torch.strided or found.numel() == 0:
            return ""
        if found.untyped_storage().data_ptr() in self.storages:
            return "memory of a private tensor"
        flat = found.detach().double().flatten()
        for row in self.rows:
            if flat.numel() % row.numel() == 0:
                parts = flat.view(-1, row.numel())
                if bool((parts - row).abs().amax(1).min() < 1e-6):
                    return "a private image"
        for y in self.labels:
            soft = nn.functional.one_hot(y, 10).double().flatten()
            # One or two labels equal some counter or index of the model by chance.
            if len(y) > 2 and any(
                len(flat) == len(t) and bool((flat == t).all()) for t in (y.double(), soft)
            ):
                return "private labels"
        for other in self.others:
            same = flat.numel() == other.numel()
            if same and bool((flat == other.detach().double().flatten()).all()):
                return "a private order, memory or weight"
        return ""


def leaks(root: object, secrets: Secrets) -> list[str]:
    """Everything private that ``root`` leads to."""
    found: list[str] = []
    for item in reachable(root):
        if isinstance(item, Tensor):
            name = secrets.name(item)
            found += [name] if name else []
        elif isinstance(item, HARNESS):
            found.append(type(item).__name__)
    return found


class _Keeper(Defense):
    """Keeps a drawn mask, a copy of the batch and a private head on every client."""

    key = "keeper"
    knob = "level"
    neutral = 0
    level: int = 0

    def batch(self, x: Tensor, y: Tensor, context: ClientContext) -> tuple[Tensor, Tensor]:
        context.memory["mask"] = torch.rand(7, generator=context.generator)
        context.memory["batch"] = x
        return x, y

    def private(self, model: nn.Module) -> frozenset[str]:
        return frozenset({"fc.bias"})

    def update(self, update: Update, context: ClientContext) -> Update:
        context.memory["residual"] = torch.rand(5, generator=context.generator)
        return update

    def secrets(self, memory: dict[str, Any]) -> dict[str, Tensor]:
        return {"mask": memory["mask"].clone()}


def _play(letter: str = "C", **more: Any) -> tuple[View, Secrets, Stage]:
    settings: dict[str, Any] = {
        "model": "convnet-bn", "settings": {}, "examples": 4, "clients": 2, "public": surrogate(),
        "protocol": FedAVG(epochs=2, batch_size=3, shuffle=True), "defenses": (_Keeper(),),
    }  # fmt: skip
    settings.update(more)
    if settings["examples"] == 4:  # labels that no counting gives by chance
        settings["victims"] = replace(photos(8), labels=torch.tensor([7, 2, 4, 1, 6, 0, 5, 3]))
    scene = build_stage(letter=letter, **settings)
    # One private weight moves away from its public initial value before the round that is seen.
    scene.federation.play_round()
    record = scene.federation.play_round()
    return scene.view([record], target=1), Secrets(scene, record), scene


@pytest.mark.parametrize("letter", LETTERS)
def test_no_letter_reaches_the_truth(letter: str) -> None:
    view, secrets, _ = _play(letter)
    assert leaks(view, secrets) == []


@pytest.mark.parametrize("vantage", list(Vantage))
@pytest.mark.parametrize("protocol", [FedSGD(mode="train"), FedAVG(batch_size=3, shuffle=True)])
def test_no_vantage_reaches_the_truth(vantage: Vantage, protocol: Protocol) -> None:
    view, secrets, _ = _play("H", vantage=vantage, protocol=protocol)
    assert leaks(view, secrets) == []


def test_single_examples_are_not_reached_through_their_statistics() -> None:
    view, secrets, _ = _play("E", examples=1, protocol=FedSGD())
    assert leaks(view, secrets) == []


def test_replaying_and_tampering_rounds_lead_nowhere_private() -> None:
    view, secrets, scene = _play("H", grants=frozenset({Grant.PIXEL_RANGE}))
    x = torch.rand(4, 3, 8, 8, dtype=torch.float64, requires_grad=True)
    replayer = view.replayer()
    sent = replayer(x, torch.tensor([9, 8, 7, 6]))
    model = view.model
    record = scene.federation.play_round(sent=TamperedModel.of(model))
    later = scene.view([record], target=1, keys=[{"trap": torch.ones(3)}])
    assert leaks([replayer, sent, model, later, view.without("box")], secrets) == []


@pytest.mark.parametrize(
    ("grant", "expected"),
    [
        (Grant.LABELS, "private labels"),
        (Grant.BATCH_ORDER, "a private order, memory or weight"),
        (Grant.DEFENSE_SECRETS, "a private order, memory or weight"),
        (Grant.BATCH_BN, ""),
    ],
)
def test_a_grant_opens_its_own_door_only(grant: Grant, expected: str) -> None:
    view, secrets, _ = _play("A", grants=frozenset({grant}))
    assert set(leaks(view, secrets)) == ({expected} if expected else set())


class _Remembers(nn.Module):
    """A model that keeps its last input, as instrumented models do."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(192, 10)
        self.last: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.last = x.detach()
        logits: Tensor = self.fc(x.flatten(1))
        return logits


def test_a_model_that_remembers_its_input_does_not_carry_it_into_the_view() -> None:
    scene = stage(
        Scenario(model=ModelRef("object", "Remembers"), letter="C"),
        model=_Remembers(), victims=photos(2), box=BOX,
    )  # fmt: skip
    record = scene.federation.play_round()
    assert leaks(scene.view([record]), Secrets(scene, record)) == []


# -- the walk itself must be able to find what is planted ----------------------------------------


def _in_a_closure(secret: Tensor) -> object:
    return lambda: secret.sum()


def _in_a_default(secret: Tensor) -> object:
    def function(x: int = 0, *, hidden: Tensor = secret) -> Tensor:
        return hidden * x

    return function


def _in_a_bound_method(secret: Tensor) -> object:
    return secret.sum


def _in_a_graph(secret: Tensor) -> object:
    weight = torch.ones_like(secret, requires_grad=True)
    return (weight * secret).sum()


def _in_a_gradient(secret: Tensor) -> object:
    weight = torch.zeros_like(secret, requires_grad=True)
    torch.autograd.backward((weight * secret).sum())
    return weight


def _in_a_forward_hook(secret: Tensor) -> object:
    module = nn.Linear(1, 1)
    module.register_forward_hook(lambda m, args, out: out + secret.sum())
    return nn.Sequential(module)


def _in_a_backward_hook(secret: Tensor) -> object:
    weight = torch.zeros(1, requires_grad=True)
    weight.register_hook(lambda g: g * secret.sum())
    return weight


def _in_a_module_attribute(secret: Tensor) -> object:
    module = nn.Linear(1, 1)
    module.note = {"seen": [secret]}  # type: ignore[assignment]  # what instrumented models do
    return module


def _as_a_view_of_the_same_memory(secret: Tensor) -> object:
    return secret.reshape(-1)[3:5]


def _as_a_row_of_a_larger_tensor(secret: Tensor) -> object:
    return torch.cat([torch.zeros_like(secret[:1]), secret[:1].clone()])


def _in_public_data(secret: Tensor) -> object:
    pixels = secret.float().clamp(0, 1)
    return ImageSet(pixels, torch.zeros(len(pixels), dtype=torch.int64), ("a",), "public")


@pytest.mark.parametrize(
    "plant",
    [
        _in_a_closure,
        _in_a_default,
        _in_a_bound_method,
        _in_a_graph,
        _in_a_gradient,
        _in_a_forward_hook,
        _in_a_backward_hook,
        _in_a_module_attribute,
        _as_a_view_of_the_same_memory,
        _as_a_row_of_a_larger_tensor,
        _in_public_data,
    ],
)
def test_the_walk_finds_what_is_planted(plant: Callable[[Tensor], object]) -> None:
    view, secrets, scene = _play()
    seen = view.rounds[0]
    assert leaks(view, secrets) == []
    # Pixels rather than model inputs: a public image set must lie in [0, 1].
    planted = plant(scene.truth(1).images)
    spoiled = RoundView(0, {**seen.state}, 2, seen.update)
    object.__setattr__(spoiled, "hidden_by", planted)
    assert leaks(view.with_rounds([spoiled], {}), secrets)


@pytest.mark.parametrize("what", ["labels", "one-hot labels", "order", "memory", "private weight"])
def test_the_walk_finds_copies_of_everything_private(what: str) -> None:
    view, secrets, scene = _play()
    client = scene.federation.clients[1]
    copies: dict[str, Tensor] = {
        "labels": client.y.clone(),
        "one-hot labels": nn.functional.one_hot(client.y, 10).float(),
        "order": secrets.others[0].clone(),
        "memory": client.memories["keeper"]["residual"].clone(),
        "private weight": client.private["fc.bias"].clone(),
    }
    assert leaks([view, {"deep": (copies[what],)}], secrets)


@pytest.mark.parametrize("kind", HARNESS)
def test_the_walk_finds_the_harness(kind: type) -> None:
    view, secrets, scene = _play()
    record = scene.federation.play_round()
    context = ClientContext(0, 0, view.model, torch.zeros(1), torch.zeros(1), FedSGD(),
                            torch.Generator(), {})  # fmt: skip
    objects = (
        scene.federation.clients[0], scene.federation, scene, record, scene.truth(1), context
    )  # fmt: skip
    (chosen,) = [o for o in objects if isinstance(o, kind)]
    assert kind.__name__ in leaks([view, lambda: chosen], secrets)
