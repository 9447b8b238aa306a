"""The code behind a figure: one hash over a module and everything it imports inside the project.

Read from the text of the files: nothing is imported or run. Comments, docstrings and layout do not
count, because they cannot change a figure.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import inspect
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from leakatlas.catalogue import registry

PACKAGE = Path(__file__).resolve().parent.parent
ALWAYS = ("leakatlas.bench.harness", "leakatlas.bench.scene", "leakatlas.metrics.score")
"""What every cell runs, whatever its attack: the rounds and the scores."""


def of_case(case: Mapping[str, Any], hook: Path | None = None) -> str:
    """Hash of the code that the cells of a study's case run.

    Args:
        case: The case as JSON; its attack and defenses count.
        hook: The study's own Python file.

    Raises:
        UnknownName: If an attack or defense does not exist.
    """
    files = [] if hook is None else [hook]
    rows: list[tuple[registry.Kind, str]] = [("defense", d["key"]) for d in case["defenses"]]
    if case["attack"] is not None:
        rows.append(("attack", case["attack"]["key"]))
    modules = list(ALWAYS)
    for kind, key in rows:
        if "/" in key:  # an outsider's: its file counts, the rest of its package does not
            cls = registry.load_attack(key) if kind == "attack" else registry.load_defense(key)
            files.append(Path(inspect.getfile(cls)))
        else:
            modules.append(registry.module_path(kind, key))
    return code_hash(modules, files)


def code_hash(modules: Iterable[str], files: Iterable[Path] = ()) -> str:
    """SHA-256 over modules, files, and all that these import from the project.

    Args:
        modules: Dotted names inside the package.
        files: Sources outside it, such as a study's own Python file.
    """
    digest = hashlib.sha256()
    outside = [(path.name, _parsed(path)) for path in sorted(files)]
    reached = set(modules)
    for _, (_, imports) in outside:
        reached |= imports
    for name in sorted(_closure(frozenset(reached))):
        digest.update(f"{name}={_parsed(_file(name) or PACKAGE)[0]}\n".encode())
    for name, (own, _) in outside:
        digest.update(f"{name}={own}\n".encode())
    return digest.hexdigest()


@functools.cache
def _closure(modules: frozenset[str]) -> frozenset[str]:
    found: set[str] = set()
    left = [name for name in modules if _file(name) is not None]
    while left:
        name = left.pop()
        if name in found:
            continue
        found.add(name)
        file = _file(name)
        assert file is not None
        left += [other for other in _parsed(file)[1] if _file(other) is not None]
    return frozenset(found)


def _file(module: str) -> Path | None:
    if module.partition(".")[0] != "leakatlas":
        return None
    stem = PACKAGE.joinpath(*module.split(".")[1:])
    for path in (stem.with_suffix(".py"), stem / "__init__.py"):
        if path.is_file():
            return path
    return None


@functools.cache
def _parsed(path: Path) -> tuple[str, frozenset[str]]:
    """Hash of the code in a file, and the modules of the project that it names."""
    tree = ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
    imports: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imports.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module is not None and node.level == 0:
            imports.add(node.module)
            imports.update(f"{node.module}.{alias.name}" for alias in node.names)
        _drop_docstring(node)
    own = {name for name in imports if name.partition(".")[0] == "leakatlas"}
    return hashlib.sha256(ast.dump(tree).encode()).hexdigest(), frozenset(own)


def _drop_docstring(node: ast.AST) -> None:
    if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        return
    if node.body and isinstance(node.body[0], ast.Expr):
        first = node.body[0].value
        if isinstance(first, ast.Constant) and isinstance(first.value, str):
            node.body[0] = ast.Pass()
