"""Whether rows and modules agree: every row has its module, every module its row, on one path.

Modules are read as text, so that a contributor whose module does not import yet gets the same
answers, and nothing is run.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from leakatlas.catalogue import registry, results, source
from leakatlas.catalogue.problems import Problem, closest

if TYPE_CHECKING:
    from leakatlas.catalogue.checks import Draft

KINDS: tuple[registry.Kind, ...] = ("attack", "defense")
_CASE = re.compile(r"^CASE\b.*=", re.MULTILINE)
"""The set-up of its contract, which an attack's test file gives."""


def check(drafts: Sequence[Draft]) -> list[Problem]:
    """Everything in which the modules of this copy and these rows disagree."""
    held = {
        draft.fields["letter"]: draft.fields["knowledge"]
        for draft in drafts
        if draft.kind == "threat_model" and {"letter", "knowledge"} <= draft.fields.keys()
    }
    problems: list[Problem] = []
    for kind in KINDS:
        modules = registry.modules(kind)
        rows: dict[str, Draft] = {}
        for draft in drafts:
            if draft.kind == kind and {"key", "category", "technique"} <= draft.fields.keys():
                rows.setdefault(draft.fields["key"], draft)  # a second one is a duplicate
        for key, draft in rows.items():
            problems += _row(kind, key, draft, modules, held)
        for place, path in modules.items():
            if place.rpartition("/")[2] not in rows:
                problems.append(_orphan(kind, place, path, drafts))
    return problems


def _row(
    kind: registry.Kind,
    key: str,
    draft: Draft,
    modules: dict[str, Path],
    held: dict[str, tuple[str, ...]],
) -> Iterator[Problem]:
    place = f"{draft.fields['category']}/{draft.fields['technique']}/{key}"
    planned = draft.fields.get("planned", False)
    wanted = f"src/leakatlas/{kind}s/{place}.py"
    if place in modules:
        if planned:
            yield draft.problem(
                ("planned", f"is true although {shown(modules[place])} exists.", "delete the line.")
            )
        yield from _module(kind, key, modules[place], draft, held)
        return
    elsewhere = next((p for p in modules if p.rpartition("/")[2] == key), None)
    if elsewhere is not None:
        folder = elsewhere.rpartition("/")[0]
        yield draft.problem(
            (
                "technique",
                f"the row belongs into {place.rpartition('/')[0]}, its module lies in {folder}.",
                f"move {shown(modules[elsewhere])} to {wanted}, or correct category and technique.",
            )
        )
        yield from _module(kind, key, modules[elsewhere], draft, held)
    elif not planned:
        yield draft.problem(
            ("planned", f"is not true, and {wanted} does not exist.", "write planned = true.")
        )


def _module(
    kind: registry.Kind,
    key: str,
    path: Path,
    draft: Draft,
    held: dict[str, tuple[str, ...]],
) -> Iterator[Problem]:
    def problem(message: str, fix: str) -> Problem:
        return Problem(file=shown(path), row=draft.label, message=message, fix=fix)

    try:
        found = source.read(path, key)
    except SyntaxError as error:
        yield problem(f"is no Python: {error.msg}, line {error.lineno}.", "repair that line.")
        return
    if found is None:
        name = "".join(part.capitalize() for part in key.split("_"))
        yield problem("holds no class named like the key.", f"name it {name} (capitals are free).")
        return
    if found.key != key:
        said = "nothing" if not found.key else repr(found.key)
        where = f'@attack("{key}", needs=...)' if kind == "attack" else f'key = "{key}"'
        yield problem(f"is registered as {said}.", f"write {where}.")
    if not found.method:
        yield problem("has no docstring.", "say idea, paper, objective and departures in it.")
    bare = [parameter.name for parameter in found.parameters if not parameter.text]
    if bare:
        yield problem(
            f"has parameters without a line: {', '.join(bare)}.",
            "describe them under Args: of the class, with symbol, unit and source.",
        )
    if kind == "attack":
        yield from _knowledge(found, draft.fields, held, problem)
    elif found.knob not in {parameter.name for parameter in found.parameters}:
        yield problem("has no privacy knob.", 'name one of its fields: knob = "noise".')
    yield from _test(kind, path, problem)


def _knowledge(
    found: source.Source, fields: Any, held: dict[str, tuple[str, ...]], problem: Any
) -> Iterator[Problem]:
    letter = fields.get("threat_model")
    for correction in fields.get("corrections", ()):
        if correction.field == "threat_model":
            letter = correction.corrected
    beyond = sorted(set(found.needs) - set(held.get(letter, found.needs)))
    if beyond and not found.departs_from_letter:
        yield problem(
            f"needs {', '.join(beyond)}, which letter {letter} does not hold.",
            "need less, correct the row, or explain it in `departs_from_letter`.",
        )


def _test(kind: registry.Kind, path: Path, problem: Any) -> Iterator[Problem]:
    root = results.repository_root()
    if root is None:
        return  # an installed copy has no tests
    test = results.test_beside(path)
    if not test.is_file():
        yield problem("has no test.", f"write {shown(test)}.")
    elif kind == "attack" and not _CASE.search(test.read_text(encoding="utf-8")):
        yield problem(
            f"its test {shown(test)} gives no CASE.",
            "write CASE = Case({...}, {...}): parameters and a scene that run in a blink.",
        )


def _orphan(kind: registry.Kind, place: str, path: Path, drafts: Sequence[Draft]) -> Problem:
    key = place.rpartition("/")[2]
    keys = [d.fields["key"] for d in drafts if d.kind == kind and "key" in d.fields]
    return Problem(
        file=shown(path),
        message=f"no {kind} has the key {key!r}.",
        fix=f"add a row with key = {key!r}; {closest(key, keys, several=False)}",
    )


def shown(path: Path) -> str:
    """A path as it stands in the checkout."""
    root = results.repository_root()
    if root is not None and path.is_relative_to(root):
        return path.relative_to(root).as_posix()
    return str(path)
