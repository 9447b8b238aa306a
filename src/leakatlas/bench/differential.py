"""Our figures held against those of official code, on equal inputs made from seeds.

The official figures are data in ``results/differential``, each with repository, commit and
tolerance; ours are computed anew by ``studies/differential/ours.py``. No official code is needed.
What the functions of that file share (inputs, gradients, a tensor in one number) is here as well.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from leakatlas.bench.study import default_folder
from leakatlas.catalogue import results
from leakatlas.catalogue.measured import Differential
from leakatlas.data import CIFAR10, patches
from leakatlas.errors import InvalidInput, UnknownName
from leakatlas.fl import FedSGD, ModelRef, Protocol, Scenario, Stage, replay, stage
from leakatlas.threat import Grant

FILE = Path("differential", "ours.py")

Figures = Mapping[str, Tensor | float]
"""Of a row, by name; a tensor counts as its product with a random direction."""

Ours = Mapping[str, Callable[[], Figures]]


@dataclass(frozen=True)
class Comparison:
    """One figure of both sides.

    Args:
        row: The row.
        name: What was compared.
        official: The official value.
        ours: Our value, computed now.
        tolerance: Largest relative difference that counts as equal.
    """

    row: str
    name: str
    official: float
    ours: float
    tolerance: float

    @property
    def difference(self) -> float:
        """Relative to the official value."""
        return abs(self.ours - self.official) / abs(self.official)

    @property
    def equal(self) -> bool:
        """Whether the two agree; a figure that is no number never does."""
        return self.difference <= self.tolerance


def stored(folder: Path | None = None) -> dict[str, Differential]:
    """What is known of the official side, by row.

    Raises:
        InvalidInput: If a file is malformed.
    """
    found = {}
    for path in sorted(((folder or results.default_folder()) / "differential").glob("*.json")):
        differential = results.differential(path)
        found[differential.key] = differential
    return found


def ours(folder: Path | None = None) -> Ours:
    """Our side of the rows whose comparison can be made again: a function of the row's name each.

    Raises:
        InvalidInput: If the checkout's file is missing.
    """
    path = (folder or default_folder()) / FILE
    spec = importlib.util.spec_from_file_location("leakatlas_differential", path)
    if not path.is_file() or spec is None or spec.loader is None:
        raise InvalidInput(f"There is no {path}; comparisons are made in a checkout of LeakAtlas.")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    functions = {
        name: function
        for name, function in vars(module).items()
        if callable(function) and getattr(function, "__module__", "") == spec.name
    }
    return {name: function for name, function in functions.items() if not name.startswith("_")}


def compare(row: str, known: Mapping[str, Differential], mine: Ours) -> list[Comparison]:
    """Both sides of a row; empty if its official figures cannot be compared again.

    Raises:
        UnknownName: If there is no differential of that row.
        InvalidInput: If the two sides name different figures.
    """
    if row not in known:
        raise UnknownName("differential", row, known)
    official = known[row].official
    if not official:
        return []
    computed = {n: number(v) for n, v in mine[row]().items()} if row in mine else {}
    if computed.keys() != official.keys():
        raise InvalidInput(
            f"Differential {row!r}: the official side has {sorted(official)}, ours gives "
            f"{sorted(computed)}; mend {FILE}."
        )
    return [
        Comparison(row, name, figure.value, computed[name], figure.tolerance)
        for name, figure in official.items()
    ]


# -- what our side is made of ----------------------------------------------------------------------


def draw(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Standard normal numbers of a seed."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def uniform(seed: int, *shape: int) -> Tensor:
    """Numbers in [0, 1) of a seed, drawn in float32, in float64."""
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)).double()


def filled(layer: nn.Module, seed: int) -> None:
    """Write small numbers of a seed into the parameters of a layer, one seed after the other."""
    with torch.no_grad():
        for place, parameter in enumerate(layer.parameters()):
            parameter.copy_(0.3 * draw(seed + place, *parameter.shape))


def along(tensor: Tensor) -> float:
    """A tensor in one number that moves with every entry: its product with a random direction."""
    flat = tensor.detach().flatten().double()
    return float(flat @ draw(99, len(flat)))


def number(figure: Tensor | float) -> float:
    """A figure as it is compared; a scalar counts as it is."""
    if isinstance(figure, Tensor) and figure.numel() != 1:
        return along(figure)
    return float(figure.detach() if isinstance(figure, Tensor) else figure)


def gradient(model: nn.Module, x: Tensor, y: Tensor, *, tape: bool = False) -> dict[str, Tensor]:
    """What a client sends for one batch, on the network's own weights and buffers."""
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    buffers = {name: b.detach() for name, b in model.named_buffers()}
    return replay.gradient(model, parameters, buffers, x, y, create_graph=tape)


def slope(value: Tensor, *of: Tensor) -> Tensor:
    """The derivative of a value, whose graph is kept; of several tensors one behind the other."""
    slopes = torch.autograd.grad(value, of, retain_graph=True)
    return slopes[0] if len(of) == 1 else torch.cat([part.flatten() for part in slopes])


def staged(
    network: str, examples: int, *, size: int, protocol: Protocol | None = None, letter: str = "C",
    labels: bool = False, seed: int = 0, **settings: Any,
) -> Stage:  # fmt: skip
    """A client with the first bundled crops, on a network in float64.

    Args:
        network: A builtin network.
        examples: Of the client.
        size: Side of its images and of the network's input.
        protocol: One gradient if left out.
        letter: The threat model.
        labels: Whether they are granted.
        seed: Of the scenario.
        settings: Of the network.
    """
    reference = ModelRef("builtin", network, {"size": size, **settings})
    scenario = Scenario(
        model=reference, letter=letter, examples=examples, protocol=protocol or FedSGD(), seed=seed,
        grants=frozenset({Grant.LABELS} if labels else ()),
    )  # fmt: skip
    victims = patches(size, examples)
    return stage(scenario, model=reference.build().double(), victims=victims, box=CIFAR10)
