"""Small, real set-ups that the tests of several rooms share."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch
from torch import Tensor

from leakatlas.audit import process
from leakatlas.bench.adversary import Here
from leakatlas.data import Box, ImageSet, bundled
from leakatlas.fl import Defense, FedSGD, ModelRef, Protocol, Scenario, Stage, stage
from leakatlas.threat import Grant, Vantage

BOX = Box(mean=(0.5, 0.45, 0.4), std=(0.25, 0.25, 0.2))
"""A pixel space in which a forgotten normalisation shows."""


# No example is too slow on a busy machine, and every run of the gate tries the same ones.
hypothesis.settings.register_profile(
    "gate", deadline=None, derandomize=True, database=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)  # fmt: skip
hypothesis.settings.load_profile("gate")


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> Iterator[None]:
    """Sums of floats depend on how many threads share them; bitwise tests need one answer."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def attacks_here(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Audits attack in this process, where a test can patch an attack, unless it says otherwise.

    The boundary has tests of its own; starting a process for every audit here would take minutes.
    """
    if request.node.get_closest_marker("own_process") is None:
        monkeypatch.setattr(process, "adversary", lambda plan: Here())


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder for learned artefacts, so that no test meets another's."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("LEAKATLAS_CACHE", str(folder))
    return folder


@functools.cache
def _victims(size: int) -> ImageSet:
    return bundled.photos(size)


@functools.cache
def _surrogates(size: int) -> ImageSet:
    return bundled.patches(size, 32, part="surrogate")


def photos(count: int = 2, size: int = 8) -> ImageSet:
    """The first victim photos; image i has label i."""
    return _victims(size).subset(range(count))


def surrogate(size: int = 8) -> ImageSet:
    """Crops of photos of which no victim is made."""
    return _surrogates(size)


def build_stage(
    *,
    model: str = "fc",
    settings: Mapping[str, Any] | None = None,
    protocol: Protocol | None = None,
    examples: int = 2,
    clients: int = 1,
    size: int = 8,
    letter: str = "C",
    vantage: Vantage = Vantage.SERVER,
    grants: frozenset[Grant] = frozenset(),
    defenses: tuple[Defense, ...] = (),
    victims: ImageSet | None = None,
    public: ImageSet | None = None,
    dtype: torch.dtype = torch.float64,
    rounds: int = 1,
    seed: int = 0,
    device: torch.device | None = None,
) -> Stage:
    """A stage with photos of ``size`` pixels, a tiny model, and exact arithmetic by default."""
    reference = ModelRef(
        "builtin", model, {"size": size, "classes": 10, **(settings or SMALL.get(model, {}))}
    )
    scenario = Scenario(
        model=reference,
        examples=examples,
        clients=clients,
        protocol=protocol or FedSGD(),
        defenses=defenses,
        letter=letter,
        vantage=vantage,
        grants=grants,
        rounds=rounds,
        seed=seed,
    )
    return stage(
        scenario,
        model=reference.build().to(dtype),
        victims=victims or photos(examples * clients, size),
        surrogate=public,
        box=BOX,
        device=device or torch.device("cpu"),
    )


SMALL: dict[str, dict[str, Any]] = {"fc": {"widths": (12,), "act": "tanh"}, "lenet": {"width": 4}}
"""Settings that make a model small enough for loops in double precision."""


def relative_error(got: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """Largest absolute difference over the largest value of any tensor.

    Not tensor by tensor: a bias in front of a batch normalisation has an exact gradient of zero,
    and both sides hold nothing but rounding there.
    """
    assert got.keys() == expected.keys()
    largest = max(float(expected[n].detach().abs().max()) for n in expected)
    return max(float((got[n] - expected[n]).detach().abs().max()) for n in expected) / largest


def gradients_at(
    model: torch.nn.Module, x: Tensor, y: Tensor, loss: Callable[[Tensor, Tensor], Tensor]
) -> dict[str, Tensor]:
    """What plain autograd says: the oracle for replays and training."""
    named = dict(model.named_parameters())
    found = torch.autograd.grad(loss(model(x), y), list(named.values()))
    return dict(zip(named, found, strict=True))
