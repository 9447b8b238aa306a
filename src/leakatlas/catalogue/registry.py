"""From a row to the class that implements it, computed and not maintained.

``category / technique / key`` of a row *is* the module path, and the class carries the key as its
name (``inverting_gradients`` -> ``InvertingGradients``). Nothing is imported until a class is
asked for, so torch is not loaded by listing. Other packages join with entry points in the groups
``leakatlas.attacks`` and ``leakatlas.defenses``; their names are ``package/name``.
"""

from __future__ import annotations

import functools
import importlib
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from leakatlas.catalogue import loader
from leakatlas.errors import CatalogueError, UnknownName, needing

Kind = Literal["attack", "defense"]

_ROOM: dict[str, str] = {"attack": "attacks", "defense": "defenses"}
PACKAGE = Path(__file__).resolve().parent.parent


def module_path(kind: Kind, key: str) -> str:
    """The dotted path of the module behind a row, whether or not it exists."""
    row = loader.attack(key) if kind == "attack" else loader.defense(key)
    return f"leakatlas.{_ROOM[kind]}.{row.category}.{row.technique}.{row.key}"


def module_file(kind: Kind, key: str) -> Path | None:
    """The source behind a row (a module, or a package's ``__init__``), if it exists."""
    stem = PACKAGE.joinpath(*module_path(kind, key).split(".")[1:])
    for path in (stem.with_suffix(".py"), stem / "__init__.py"):
        if path.is_file():
            return path
    return None


def implemented(key: str) -> bool:
    """Whether the row with this key has a module (found by its file; nothing is imported)."""
    kind: Kind = "attack" if any(row.key == key for row in loader.attacks()) else "defense"
    return module_file(kind, key) is not None


def modules(kind: Kind) -> dict[str, Path]:
    """Every attack or defense module in the package, as ``category/technique/key`` to its file."""
    room = PACKAGE / _ROOM[kind]
    found = {}
    for path in sorted([*room.glob("*/*/*.py"), *room.glob("*/*/*/__init__.py")]):
        unit = path.parent if path.name == "__init__.py" else path
        parts = unit.relative_to(room).with_suffix("").parts
        if len(parts) == 3 and not parts[2].startswith("_"):
            found["/".join(parts)] = path
    return found


def load_attack(key: str) -> type[Any]:
    """The class of an attack, by key, alias, number, or ``package/name`` for an outsider.

    Raises:
        UnknownName: If there is no such attack, or none that is implemented.
    """
    return _load("attack", key)


def load_defense(key: str) -> type[Any]:
    """The class of a defense, by key, alias, or ``package/name`` for an outsider.

    Raises:
        UnknownName: If there is no such defense, or none that is implemented.
    """
    return _load("defense", key)


def attack(key: str, **parameters: Any) -> Any:
    """An attack with its published defaults, changed where ``parameters`` say so."""
    return load_attack(key)(**parameters)


def defense(key: str, **parameters: Any) -> Any:
    """A defense with its published defaults, changed where ``parameters`` say so."""
    return load_defense(key)(**parameters)


def attack_keys() -> tuple[str, ...]:
    """Every attack that can be loaded: implemented rows, then outsiders."""
    return _keys("attack")


def defense_keys() -> tuple[str, ...]:
    """Every defense that can be loaded: implemented rows, then outsiders."""
    return _keys("defense")


def _keys(kind: Kind) -> tuple[str, ...]:
    rows = loader.attacks() if kind == "attack" else loader.defenses()
    inside = (row.key for row in rows if module_file(kind, row.key) is not None)
    return (*inside, *_outsiders(kind))


@functools.cache
def _load(kind: Kind, key: str) -> type[Any]:
    outsiders = _outsiders(kind)
    if key in outsiders:
        found = outsiders[key].load()
        if not isinstance(found, type):
            raise CatalogueError(
                f"Entry point {key!r} gives {found!r}; it must name a class, as module:Class."
            )
        return found
    try:
        row = loader.attack(key) if kind == "attack" else loader.defense(key)
    except UnknownName:
        raise UnknownName(kind, key, _keys(kind)) from None
    if module_file(kind, row.key) is None:
        raise UnknownName(f"implemented {kind}", key, _keys(kind))
    with needing(f"the {kind} {row.key!r}"):
        module = importlib.import_module(module_path(kind, row.key))
    return class_of(module, row.key)


def class_of(module: Any, key: str) -> type[Any]:
    """The class in ``module`` that carries ``key`` as its name.

    Raises:
        CatalogueError: If there is none.
    """
    wanted = class_name_matches(key)
    for name, value in vars(module).items():
        if isinstance(value, type) and name.lower() == wanted:
            return value
    raise CatalogueError(
        f"{module.__name__} holds no class named like the key {key!r}; "
        f"name it {''.join(part.capitalize() for part in key.split('_'))} (capitals are free)."
    )


def class_name_matches(key: str) -> str:
    """What the class name must be in lower case."""
    return key.replace("_", "")


@functools.cache
def _outsiders(kind: Kind) -> dict[str, metadata.EntryPoint]:
    found = {}
    for point in metadata.entry_points(group=f"leakatlas.{_ROOM[kind]}"):
        package = point.dist.name if point.dist is not None else point.module.partition(".")[0]
        found[f"{package}/{point.name}"] = point
    return found
