"""What a module says about itself, read from its text.

Docs pages, the site and the staleness of results need the docstring, the parameters and the
version of a class. Parsing gives them without importing torch, and without running anything.
"""

from __future__ import annotations

import ast
import functools
import re
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from leakatlas.catalogue import registry

if TYPE_CHECKING:
    from leakatlas.catalogue.registry import Kind

_VIEW_NAMES = ("view",)


@dataclass(frozen=True, kw_only=True)
class Parameter:
    """One field of a configured class.

    Args:
        name: Field name.
        annotation: Its type, as written.
        default: Its default, as written; empty if there is none.
        text: Its line of the ``Args:`` section.
    """

    name: str
    annotation: str
    default: str
    text: str


@dataclass(frozen=True, kw_only=True)
class Source:
    """What the text of a module tells.

    Args:
        class_name: The class that carries the row's key.
        key: What it is registered as: ``@attack("key")``, or the constant ``key`` of a defense.
        method: The module docstring.
        summary: First paragraph of the class docstring.
        parameters: The fields of the class.
        needs: The knowledge named in the class decorator, as written; empty if none.
        reads: What the module reads from the view.
        version: ``version`` of the class (1 where it inherits the base's).
        departs_from_letter: Why the needs differ from the row's letter; empty if they do not.
        knob: The parameter that trades privacy for utility (defenses).
        strengths: Its values that are worth trying, weakest first (defenses).
    """

    class_name: str
    key: str
    method: str
    summary: str
    parameters: tuple[Parameter, ...]
    needs: tuple[str, ...]
    reads: tuple[str, ...]
    version: int
    departs_from_letter: str
    knob: str
    strengths: tuple[Any, ...]


def of(kind: Kind, key: str) -> Source | None:
    """The source facts of a row, or None where it has no module."""
    path = registry.module_file(kind, key)
    return None if path is None else read(path, key)


@functools.cache
def read(path: Path, key: str) -> Source | None:
    """The source facts of a module, or None where no class carries the key.

    Raises:
        SyntaxError: If it is no Python.
    """
    tree = ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
    wanted = registry.class_name_matches(key)
    unit = next(
        (n for n in tree.body if isinstance(n, ast.ClassDef) and n.name.lower() == wanted), None
    )
    if unit is None:
        return None
    docstring = ast.get_docstring(unit) or ""
    texts = arguments(docstring)
    parameters = tuple(
        Parameter(
            name=field.target.id,
            annotation=ast.unparse(field.annotation),
            default="" if field.value is None else ast.unparse(field.value),
            text=texts.get(field.target.id, ""),
        )
        for field in unit.body
        if isinstance(field, ast.AnnAssign)
        and isinstance(field.target, ast.Name)
        and "ClassVar" not in ast.unparse(field.annotation)
        and not field.target.id.startswith("_")
    )
    return Source(
        class_name=unit.name,
        key=_registered(unit) or _constant(unit, "key"),
        method=ast.get_docstring(tree) or "",
        summary=docstring.split("\n\n")[0].replace("\n", " "),
        parameters=parameters,
        needs=_needs(unit),
        reads=_reads(tree),
        version=_version(unit),
        departs_from_letter=_constant(unit, "departs_from_letter"),
        knob=_constant(unit, "knob"),
        strengths=_strengths(unit),
    )


def arguments(docstring: str) -> dict[str, str]:
    r"""The ``Args:`` section of a Google docstring, as name to text.

    Example:
        >>> arguments("Do it.\n\nArgs:\n    steps: How many\n        of them.\n    lr: Rate.")
        {'steps': 'How many of them.', 'lr': 'Rate.'}
    """
    section = re.search(r"^Args:\n((?:[ \t]+.*\n?|\n)+)", docstring, flags=re.MULTILINE)
    if section is None:
        return {}
    found: dict[str, str] = {}
    name = ""
    for line in textwrap.dedent(section[1]).splitlines():
        start = re.match(r"(\w+)(?: \([^)]*\))?:\s*(.*)", line)
        if start:
            name = start[1]
            found[name] = start[2].strip()
        elif name and line.strip():
            found[name] = f"{found[name]} {line.strip()}".strip()
    return found


def _needs(unit: ast.ClassDef) -> tuple[str, ...]:
    """``Knowledge.X | Knowledge.Y`` of the decorator, as lower-case names."""
    for decorator in unit.decorator_list:
        if isinstance(decorator, ast.Call):
            for keyword in decorator.keywords:
                if keyword.arg == "needs":
                    return tuple(
                        node.attr.lower()
                        for node in ast.walk(keyword.value)
                        if isinstance(node, ast.Attribute) and node.attr.isupper()
                    )
    return ()


def _registered(unit: ast.ClassDef) -> str:
    """``key`` of the class decorator ``@attack("key", ...)``; empty if there is none."""
    for decorator in unit.decorator_list:
        if isinstance(decorator, ast.Call) and getattr(decorator.func, "id", "") == "attack":
            first = decorator.args[0] if decorator.args else None
            if isinstance(first, ast.Constant):
                return str(first.value)
    return ""


def _reads(tree: ast.Module) -> tuple[str, ...]:
    """Every attribute of ``view`` that the module touches, sorted."""
    return tuple(
        sorted(
            {
                node.attr
                for node in ast.walk(tree)
                if isinstance(node, ast.Attribute)
                and isinstance(node.value, ast.Name)
                and node.value.id in _VIEW_NAMES
            }
        )
    )


def _assigned(unit: ast.ClassDef, name: str) -> ast.expr | None:
    for node in unit.body:
        if isinstance(node, ast.AnnAssign):
            if isinstance(node.target, ast.Name) and node.target.id == name:
                return node.value
        elif isinstance(node, ast.Assign):
            if any(isinstance(t, ast.Name) and t.id == name for t in node.targets):
                return node.value
    return None


def _version(unit: ast.ClassDef) -> int:
    value = _assigned(unit, "version")
    if isinstance(value, ast.Constant) and isinstance(value.value, int):
        return value.value
    return 1


def _constant(unit: ast.ClassDef, name: str) -> str:
    value = _assigned(unit, name)
    if value is None:
        return ""
    found = ast.literal_eval(value)  # implicit string concatenation is one constant
    return str(found)


def _strengths(unit: ast.ClassDef) -> tuple[Any, ...]:
    value = _assigned(unit, "strengths")
    return () if value is None else tuple(ast.literal_eval(value))
