"""The code behind a figure: one hash over all that it runs inside the project.

Read from the text of the files: nothing is imported or run. What is followed are names: a module
counts with the definitions that are used, with what these use, and with what importing it does.
Comments, docstrings, layout and order do not count, because they cannot change a figure; nor do
types, limits and texts of errors (what they would refuse ran), and the published facts.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import inspect
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from leakatlas import reading
from leakatlas.catalogue import registry

HOOK, CHOOSER = "study.py", "choose.py"
REHEARSED = "rehearsed"
"""The preset of which ``choose(cell)`` says what it is."""

PACKAGE = Path(__file__).resolve().parent.parent
ALWAYS = (
    "leakatlas.bench.harness:run_trial",
    "leakatlas.bench.harness:control_trial",
    "leakatlas.bench.harness:scored",
    "leakatlas.bench.harness:nothing_scored",
    "leakatlas.bench.scene:staged",
    "leakatlas.bench.scene:attack_of",
    "leakatlas.bench.scene:public_images",
)
"""What every cell with an attack runs: the rounds and the scores."""

WITHOUT_ATTACK = {"utility": "leakatlas.bench.utility", "labelling": "leakatlas.bench.labelling"}
"""What runs in place of an attack, by the key of the case."""

COURSE = "leakatlas.bench.course"
"""What runs in place of ``utility`` where the training is followed."""

UNSEEN = (
    "leakatlas.errors",
    "leakatlas.limits",
    "leakatlas.reading",
    "leakatlas.catalogue",
    "leakatlas.bench.strangers",
    "leakatlas.priors.foreign",
)
"""Rooms that no figure depends on: texts, what is refused, facts of the literature, and networks of
others, which no study takes."""

NETWORKS, LOOKS = "leakatlas.models.registry", "leakatlas.bench.looks"
TABLES = {NETWORKS: ("_CLASSIFIERS", "_GENERATORS"), LOOKS: ("LOOKS",)}
"""Dictionaries of which some entries are used: a new network leaves the figures of others alone."""


def own_file(folder: Path, case: Mapping[str, Any]) -> Path | None:
    """The study's own Python that a case runs, if any.

    ``study.py`` counts for every case. ``choose.py``, which holds ``choose(cell)`` alone, counts
    for those that rehearse: a study can be given one without touching its other figures.

    Args:
        folder: Of the study.
        case: As JSON.
    """
    rehearses = (case["attack"] or {}).get("preset") == REHEARSED
    found = [folder / HOOK, *([folder / CHOOSER] if rehearses else [])]
    return next((path for path in found if reading.is_file(path)), None)


def of_case(case: Mapping[str, Any], hook: Path | None = None) -> str:
    """Hash of the code that the cells of a study's case run.

    Args:
        case: The case as JSON; its attack, defenses, network and measures count.
        hook: The study's own Python file.

    Raises:
        UnknownName: If an attack or defense does not exist.
    """
    files = [] if hook is None else [hook]
    rows: list[tuple[registry.Kind, str]] = [("defense", d["key"]) for d in case["defenses"]]
    if case["attack"] is not None:
        rows.append(("attack", case["attack"]["key"]))
    instead = [module for key, module in WITHOUT_ATTACK.items() if case.get(key) is not None]
    if (case.get("utility") or {}).get("course") is not None:
        instead = [COURSE]
    modules = instead or list(ALWAYS)
    for kind, key in rows:
        if "/" in key:  # an outsider's: its file counts, the rest of its package does not
            cls = registry.load_attack(key) if kind == "attack" else registry.load_defense(key)
            files.append(Path(inspect.getfile(cls)))
        else:
            modules.append(registry.module_path(kind, key))
    chosen = {} if files else {NETWORKS: [case["model"]["builtin"]]}
    looked = _entries(LOOKS, "LOOKS") & set(case.get("described") or ())
    if looked and not instead:
        modules.append(f"{LOOKS}:of")
        chosen[LOOKS] = sorted(looked)
    return code_hash(modules, files, chosen=chosen)


def code_hash(
    modules: Iterable[str],
    files: Iterable[Path] = (),
    *,
    chosen: Mapping[str, Collection[str]] | None = None,
) -> str:
    """SHA-256 over modules, files, and all that these use of the project.

    Args:
        modules: Dotted names inside the package; ``module:name`` is one definition of it.
        files: Sources outside it, such as a study's own Python file.
        chosen: By module, the only entries of its :data:`TABLES` that are used, where known.
    """
    digest = hashlib.sha256()
    outside = sorted(set(files))
    kept = frozenset((module, frozenset(names)) for module, names in (chosen or {}).items())
    for line in _used(frozenset(modules), tuple(outside), kept):
        digest.update(line.encode())
    return digest.hexdigest()


Chain = tuple[str, ...]
"""A name and the attributes taken of it: ``scene.images`` is ``("scene", "images")``."""


@dataclass(frozen=True)
class _Entry:
    """One value of a dictionary: hash of its code, and the names that it looks up."""

    digest: str
    uses: frozenset[Chain]


@dataclass(frozen=True)
class _Statement:
    """One statement at the top of a file.

    Args:
        digest: Hash of its code.
        uses: The names that running it may look up.
        imports: What its own import statements bind.
        binds: The names that it defines; none if it only does something.
        entries: If it is a dictionary with texts for keys: its values.
    """

    digest: str
    uses: frozenset[Chain]
    imports: Mapping[str, Chain]
    binds: frozenset[str]
    entries: Mapping[str, _Entry]


@dataclass(frozen=True)
class _File:
    statements: tuple[_Statement, ...]
    imports: Mapping[str, Chain]

    def defining(self, name: str) -> list[_Statement]:
        return self._by_name.get(name, [])

    @functools.cached_property
    def _by_name(self) -> dict[str, list[_Statement]]:
        found: dict[str, list[_Statement]] = {}
        for statement in self.statements:
            for name in statement.binds:
                found.setdefault(name, []).append(statement)
        return found


@functools.lru_cache(maxsize=1024)
def _used(
    modules: frozenset[str], files: tuple[Path, ...], chosen: frozenset[tuple[str, frozenset[str]]]
) -> tuple[str, ...]:
    """A line for every statement that counts, sorted."""
    lines: set[str] = set()
    entries = dict(chosen)
    entered: set[str] = set()
    done: set[tuple[str, str]] = set()
    left: list[tuple[str, _File, _Statement]] = []

    def reach(module: str, chain: Chain) -> None:
        """Everything that ``chain``, looked up in a module, stands for."""
        file = _module(module)
        if file is None or module.startswith(UNSEEN):
            return
        if module not in entered:
            entered.add(module)
            left.extend((module, file, s) for s in file.statements if not s.binds)
        if chain:
            name, *rest = chain
            defining = file.defining(name)
            target = file.imports.get(name, (module, name))
            if not defining and target != (module, name):
                return follow(target, tuple(rest))
            if not defining and _module(f"{module}.{name}") is not None:
                return reach(f"{module}.{name}", tuple(rest))
            if defining:
                left.extend((module, file, s) for s in defining)
                return None
        left.extend((module, file, s) for s in file.statements)
        return None

    def follow(target: Chain, rest: Chain) -> None:
        """What an import statement binds: a module, or a name in one."""
        if target[0].partition(".")[0] == "leakatlas":
            reach(target[0], (*target[1:], *rest))

    for path in files:
        source = _parsed(path)
        left.extend((path.name, source, statement) for statement in source.statements)
    for wanted in modules:
        module, _, name = wanted.partition(":")
        reach(module, (name,) if name else ())
    while left:
        module, file, statement = left.pop()
        if (module, statement.digest) in done:
            continue
        done.add((module, statement.digest))
        uses, only = statement.uses, entries.get(module)
        if only is not None and statement.binds & set(TABLES[module]):
            taken = {key: statement.entries[key] for key in sorted(only & statement.entries.keys())}
            uses = frozenset().union(*(entry.uses for entry in taken.values()))
            digests = {key: entry.digest for key, entry in taken.items()}
            lines.add(f"{module} {sorted(statement.binds)}={digests}\n")
        else:
            lines.add(f"{module} {sorted(statement.binds)}={statement.digest}\n")
        for name, *rest in uses:
            bound = statement.imports.get(name) or file.imports.get(name)
            if bound is not None and not file.defining(name):
                follow(bound, tuple(rest))
            left.extend((module, file, s) for s in file.defining(name))
    return tuple(sorted(lines))


def _entries(module: str, table: str) -> set[str]:
    file = _module(module)
    return {key for s in (file.defining(table) if file else ()) for key in s.entries}


@functools.cache
def _module(name: str) -> _File | None:
    if name.partition(".")[0] != "leakatlas":
        return None
    stem = PACKAGE.joinpath(*name.split(".")[1:])
    for path in (stem.with_suffix(".py"), stem / "__init__.py"):
        if path.is_file():
            return _parsed(path)
    return None


@functools.cache
def _parsed(path: Path) -> _File:
    tree = ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
    imports: dict[str, Chain] = {}
    statements = []
    for node in tree.body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            imports.update(_bindings(node))
        elif not (_is_text(node) or _is_for_types(node)):
            statements.append(_statement(node))
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                imports.update(statements[-1].imports)  # of `try: import` and the like
    return _File(tuple(statements), imports)


def _statement(node: ast.stmt) -> _Statement:
    imports: dict[str, Chain] = {}
    for inner in ast.walk(node):
        if isinstance(inner, ast.Import | ast.ImportFrom):
            imports.update(_bindings(inner))
    entries: dict[str, _Entry] = {}
    value = getattr(node, "value", None)
    if isinstance(value, ast.Dict):
        entries = {
            key.value: _Entry(_digest(entry), frozenset(_chains(entry)))
            for key, entry in zip(value.keys, value.values, strict=True)
            if isinstance(key, ast.Constant) and isinstance(key.value, str)
        }
    return _Statement(
        digest=_digest(node),
        uses=frozenset(_chains(node)),
        imports=imports,
        binds=frozenset(_bound(node)),
        entries=entries,
    )


def _bindings(node: ast.Import | ast.ImportFrom) -> Iterator[tuple[str, Chain]]:
    """The names that an import binds, each with its module and the name in it."""
    for alias in node.names:
        if isinstance(node, ast.ImportFrom):
            yield alias.asname or alias.name, (node.module or "", alias.name)
        elif alias.asname is None:  # `import a.b` binds a, of which b is taken
            top = alias.name.partition(".")[0]
            yield top, (top,)
        else:
            yield alias.asname, (alias.name,)


def _bound(node: ast.stmt) -> Iterator[str]:
    """The names that a statement at the top of a file defines."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        yield node.name
        return
    for inner in ast.walk(node):
        if isinstance(inner, ast.Name) and isinstance(inner.ctx, ast.Store):
            yield inner.id
        elif isinstance(inner, ast.FunctionDef | ast.ClassDef):
            yield inner.name


def _chains(node: ast.AST) -> Iterator[Chain]:
    """The names below a node, types left out, each with the attributes taken of it."""
    if isinstance(node, ast.Name):
        yield (node.id,)
        return
    if isinstance(node, ast.Attribute):
        attributes: list[str] = []
        inner: ast.expr = node
        while isinstance(inner, ast.Attribute):
            attributes.append(inner.attr)
            inner = inner.value
        if isinstance(inner, ast.Name):
            yield (inner.id, *reversed(attributes))
            return
    for name, value in ast.iter_fields(node):
        if name in ("annotation", "returns"):
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST):
                yield from _chains(child)


def _digest(node: ast.AST) -> str:
    return hashlib.sha256(_plain(node).encode()).hexdigest()


def _plain(node: object) -> str:
    """The code of a node, equal on every version of Python that can run it."""
    if not isinstance(node, ast.AST):
        return repr(node)
    parts = []
    for name, value in ast.iter_fields(node):
        if isinstance(value, list):
            value = [child for child in value if not _is_text(child)]
            text = ",".join(map(_plain, value))
        else:
            text = "" if value is None or name in ("ctx", "kind") else _plain(value)
        if text:
            parts.append(f"{name}={text}")
    return f"{type(node).__name__}({';'.join(parts)})"


def _is_text(node: object) -> bool:
    """Whether a statement is nothing but a text: a docstring."""
    return (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    )


def _is_for_types(node: ast.stmt) -> bool:
    """Whether a statement is ``if TYPE_CHECKING``, which never runs."""
    return (
        isinstance(node, ast.If)
        and isinstance(node.test, ast.Name)
        and node.test.id == "TYPE_CHECKING"
    )
