"""What one field cannot tell: rows that contradict each other or themselves.

A rule is a function whose parameters are the fields it reads. It runs on every row in which these
fields are sound, so that a mistake elsewhere in the row hides nothing.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_type_hints

from pydantic import TypeAdapter, ValidationError

from leakatlas.catalogue.problems import Problem, closest, toml
from leakatlas.catalogue.schema import (
    ATTACK_TECHNIQUES,
    DEFENSE_TECHNIQUES,
    Batch,
    Code,
    Correction,
    Evidence,
    LabelRecovery,
    Row,
    Stances,
)

Finding = tuple[str, str, str]
"""Field, message, fix."""

Rule = Callable[..., Iterator[Finding]]


@dataclass(frozen=True, kw_only=True)
class Draft:
    """A row as far as it could be understood.

    Args:
        kind: ``attack``, ``defense``, ``reference`` or ``threat_model``.
        file: Where it stands.
        label: How messages name it.
        model: Its type.
        fields: The fields that are sound; all of them if the row is.
        row: The row, or None where a field was refused.
    """

    kind: str
    file: str
    label: str
    model: type[Row]
    fields: Mapping[str, Any]
    row: Row | None

    def problem(self, finding: Finding) -> Problem:
        """A finding about this row."""
        field, message, fix = finding
        return Problem(file=self.file, row=self.label, field=field, message=message, fix=fix)


@dataclass(frozen=True, kw_only=True)
class Known:
    """What rows may name, refused rows included: one mistake, one message.

    Args:
        references: Printed number (or None) of every reference, by key.
        rows: Keys of attacks and of defenses, by kind.
    """

    references: Mapping[str, int | None]
    rows: Mapping[str, Sequence[str]]


def sound_fields(model: type[Row], raw: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a refused row that are valid taken alone, defaults included."""
    found = {}
    for name, info in model.model_fields.items():
        if name in raw:
            try:
                found[name] = _adapter(model, name).validate_python(raw[name])
            except ValidationError:
                continue  # the row's own message names it
        elif not info.is_required():
            found[name] = info.get_default()
    return found


def cross_check(drafts: Sequence[Draft]) -> list[Problem]:
    """Every contradiction within and between rows."""
    references: dict[str, int | None] = {}
    for draft in drafts:
        if draft.kind == "reference" and "key" in draft.fields:
            references.setdefault(draft.fields["key"], draft.fields.get("number"))
    known = Known(
        references=references,
        rows={
            kind: [d.fields["key"] for d in drafts if d.kind == kind and "key" in d.fields]
            for kind in ("attack", "defense")
        },
    )
    problems = [
        draft.problem(finding)
        for draft in drafts
        for rule in RULES[draft.kind]
        for finding in _apply(rule, draft, known)
    ]
    for draft in drafts:
        problems += map(draft.problem, _corrections(draft))
    return problems + list(_duplicates(drafts))


def _apply(rule: Rule, draft: Draft, known: Known) -> Iterator[Finding]:
    given = {**draft.fields, "known": known, "kind": draft.kind}
    wanted = inspect.signature(rule).parameters
    if all(name in given for name in wanted):
        yield from rule(**{name: given[name] for name in wanted})


# --- rules: the parameters are the fields they read ------------------------------------------


def _knowledge(knowledge: tuple[str, ...]) -> Iterator[Finding]:
    if "updates" not in knowledge:
        yield "knowledge", "lacks 'updates'.", 'add "updates": without them there is no attack.'
    if len(set(knowledge)) < len(knowledge):
        yield "knowledge", "names something twice.", "name each kind of knowledge once."


def _path(kind: str, category: str, technique: str) -> Iterator[Finding]:
    techniques = ATTACK_TECHNIQUES if kind == "attack" else DEFENSE_TECHNIQUES
    if technique not in techniques[category]:
        yield (
            "technique",
            f"{technique!r} does not belong to category {category!r}.",
            closest(technique, techniques[category]),
        )


def _code(code: Code) -> Iterator[Finding]:
    if code.kind in ("link", "colab") and code.url is None:
        yield (
            "code.url",
            f"does not fit kind = {code.kind!r}.",
            'write code = { kind = "link", url = "https://..." }, or leave code out.',
        )
    if code.kind in ("none", "various", "promised") and code.url is not None:
        yield "code.url", f"does not fit kind = {code.kind!r}.", 'write kind = "link".'


def _superseded(kind: str, key: str, superseded_by: str | None, known: Known) -> Iterator[Finding]:
    if superseded_by is None:
        return
    if superseded_by == key:
        yield "superseded_by", "is this row itself.", "name the row that replaces it."
    elif superseded_by not in known.rows[kind]:
        yield (
            "superseded_by",
            f"there is no {kind} {superseded_by!r}.",
            closest(superseded_by, known.rows[kind]),
        )


def _nothing_printed(origin: str, corrections: tuple[Correction, ...]) -> Iterator[Finding]:
    if origin != "published" and corrections:
        yield (
            "corrections",
            "correct a print that there is not.",
            "write the right value into the field itself; explain it in `notes`.",
        )


def _named(field: str, key: str, known: Known) -> Iterator[Finding]:
    if key not in known.references:
        yield (
            field,
            f"there is no reference {key!r}.",
            f"add a [[reference]] with key = {toml(key)}, or correct the key; "
            + closest(key, known.references, several=False),
        )


def _attack_origin(origin: str, reference: str, known: Known) -> Iterator[Finding]:
    if origin == "deployed":
        yield "origin", "attacks are not deployed.", "leave it out: the row is newer."
    if (
        origin == "published"
        and reference in known.references
        and known.references[reference] is None
    ):
        yield "origin", "the published table has no such row.", "leave it out: the row is newer."


def _attack_reference(reference: str, known: Known) -> Iterator[Finding]:
    yield from _named("reference", reference, known)


def _batch_size(batch: Batch) -> Iterator[Finding]:
    if batch.size is None:
        yield "batch.size", "is missing.", "write batch = { size = 8 }, the largest batch."


def _local_work(algorithm: str, batch: Batch) -> Iterator[Finding]:
    if algorithm == "fedsgd" and (batch.epochs or batch.local_steps):
        yield (
            "batch",
            "counts local work although the algorithm is fedsgd.",
            f"write batch = {{ size = {batch.size} }}, or correct the algorithm.",
        )
    if algorithm == "fedavg" and not (batch.epochs or batch.local_steps):
        yield (
            "batch",
            "lacks the local work of fedavg.",
            f"write batch = {{ epochs = 5, size = {batch.size or 8} }} (E x B).",
        )


def _labels(key: str, label_recovery: LabelRecovery, known: Known) -> Iterator[Finding]:
    kind, row = label_recovery.kind, label_recovery.row
    if kind == "row":
        if row is None:
            yield "label_recovery.row", "is missing.", 'name it: { kind = "row", row = "idlg" }.'
        elif row == key:
            yield "label_recovery.row", "is this row itself.", 'write { kind = "new" }.'
        elif row not in known.rows["attack"]:
            yield (
                "label_recovery.row",
                f"there is no attack {row!r}.",
                f"name a row's key; {closest(row, known.rows['attack'], several=False)}",
            )
    elif row is not None:
        yield (
            "label_recovery.row",
            f"means nothing with kind = {kind!r}.",
            'write kind = "row", or leave it out.',
        )
    if (kind == "outside") != (label_recovery.url is not None):
        yield (
            "label_recovery.url",
            "belongs to kind = 'outside', and only there.",
            'write { kind = "outside", url = "https://..." }.',
        )


def _defense_works(
    origin: str, works: tuple[str, ...], evidence: tuple[Evidence, ...], known: Known
) -> Iterator[Finding]:
    if not works and origin != "deployed":
        yield "works", "is missing.", 'name the references: works = ["sun2021soteria"].'
    for key in works:
        yield from _named("works", key, known)
    for entry, found in enumerate(evidence, 1):
        for key in found.works:
            yield from _named(f"evidence[{entry}].works", key, known)


def _stance(origin: str, stance: Stances | None) -> Iterator[Finding]:
    if origin == "published" and stance is None:
        yield "stance", "is missing.", "the published table colours every letter; repeat it."
    if origin != "published" and stance is not None:
        yield (
            "stance",
            "repeats a print that there is not.",
            "leave it out: write what the paper claims as [[defense.evidence]]; colours are "
            "measured.",
        )


def _shipped(origin: str, ships_in: str) -> Iterator[Finding]:
    if (origin == "deployed") != bool(ships_in):
        yield (
            "ships_in",
            "belongs to deployed defenses, and only there.",
            'write origin = "deployed" and ships_in = "Framework 1.0: module.Class".',
        )


def _authors(authors: tuple[str, ...]) -> Iterator[Finding]:
    if authors[0] == "others":
        yield "authors", "begins with 'others'.", "name the first author as 'Family, Given'."


def _unpublished(entry: str, eprint: str) -> Iterator[Finding]:
    if entry == "misc" and not eprint:
        yield "eprint", "is missing.", 'an unpublished work needs it: eprint = "1906.08935".'


def _print(number: int | None, printed: str | None) -> Iterator[Finding]:
    if (number is None) != (printed is None):
        yield (
            "number" if number is None else "printed",
            "number and printed text belong together.",
            "give both for a reference of the systematization, neither for any other.",
        )


_UNIT: tuple[Rule, ...] = (_path, _code, _superseded, _nothing_printed)
RULES: dict[str, tuple[Rule, ...]] = {
    "threat_model": (_knowledge,),
    "attack": (
        *_UNIT, _attack_origin, _attack_reference, _batch_size, _local_work, _labels,
    ),
    "defense": (*_UNIT, _defense_works, _stance, _shipped),
    "reference": (_authors, _unpublished, _print),
}  # fmt: skip


# --- corrections -----------------------------------------------------------------------------


def _corrections(draft: Draft) -> Iterator[Finding]:
    fields = draft.model.model_fields
    for entry, correction in enumerate(draft.fields.get("corrections", ()), 1):
        where = f"corrections[{entry}]"
        name = correction.field
        if name not in fields or name in ("corrections", "notes"):
            yield f"{where}.field", f"{name!r} is no field of this row.", closest(name, fields)
            continue
        if name not in draft.fields:
            continue  # the field itself was refused
        present = _plain(draft.fields[name])
        if _typed(draft.model, name, correction.printed) != present:
            yield (
                f"{where}.printed",
                f"does not repeat the row's {name}.",
                f"write printed = {toml(present)}.",
            )
        corrected = _typed(draft.model, name, correction.corrected)
        if corrected is None:
            yield (
                f"{where}.corrected",
                f"{correction.corrected!r} is no value for {name}.",
                f"write it as the row does, like {toml(present)}.",
            )
        elif corrected == present:
            yield f"{where}.corrected", "equals the printed value.", "remove the correction."


@functools.cache
def _adapter(model: type[Row], name: str) -> TypeAdapter[Any]:
    return TypeAdapter(get_type_hints(model, include_extras=True)[name])


def _typed(model: type[Row], name: str, value: Any) -> Any:
    """``value`` as the field holds it, in plain form; None if it does not fit."""
    try:
        return _plain(_adapter(model, name).validate_python(value))
    except ValidationError:
        return None


def _plain(value: Any) -> Any:
    return TypeAdapter(Any).dump_python(value, mode="json", exclude_none=True)


# --- duplicates ------------------------------------------------------------------------------


def _duplicates(drafts: Sequence[Draft]) -> Iterator[Problem]:
    units = [draft for draft in drafts if draft.kind in ("attack", "defense")]
    yield from _taken(units, "key")
    yield from _taken(units, "name", _names)
    yield from _taken([d for d in drafts if d.kind == "threat_model"], "letter")
    references = [draft for draft in drafts if draft.kind == "reference"]
    yield from _taken(references, "key")
    yield from _taken(references, "number")


def _names(draft: Draft) -> set[str]:
    """Every name by which people find a row."""
    names = (draft.fields.get("key"), draft.fields.get("name"), *draft.fields.get("aliases", ()))
    return {name.casefold() for name in names if name}


def _taken(
    drafts: Iterable[Draft], field: str, of: Callable[[Draft], Iterable[object]] | None = None
) -> Iterator[Problem]:
    """Values that two rows claim; the one that came later is the one to change."""
    first: dict[object, Draft] = {}
    for draft in drafts:
        values = of(draft) if of is not None else [draft.fields.get(field)]
        for value in sorted(values, key=str):
            if value is None:
                continue
            holder = first.setdefault(value, draft)
            same_key = holder.fields.get("key") == draft.fields.get("key")
            if holder is not draft and not (field == "name" and same_key):
                yield draft.problem(
                    (
                        field,
                        f"{value!r} is taken by {holder.label} in {holder.file}.",
                        f"choose another {field}.",
                    )
                )
