"""What is wrong with a row, said so that a contributor can act on it."""

from __future__ import annotations

import difflib
import json
import re
import typing
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One thing to repair.

    Args:
        file: The file it stands in.
        row: The row, as ``attack "dlg"`` or ``attack (entry 3)``; empty for the whole file.
        field: The field, as ``batch.size``; empty for the whole row.
        message: What is wrong.
        fix: What to write instead.
    """

    file: str
    row: str = ""
    field: str = ""
    message: str
    fix: str

    def __str__(self) -> str:
        where = ": ".join(part for part in (self.file, self.row, self.field) if part)
        return f"{where}: {self.message} Fix: {self.fix}"

    def to_json(self) -> dict[str, str]:
        """The problem as plain JSON."""
        return asdict(self)


def from_validation(
    failure: ValidationError, model: type[BaseModel], *, file: str, row: str, yaml: bool = False
) -> list[Problem]:
    """The problems behind a pydantic failure, one a field, each with its way out.

    Args:
        failure: What pydantic raised.
        model: The schema that was not met.
        file: The file it is about.
        row: The part of the file.
        yaml: Whether fixes are written in YAML; TOML if not.
    """
    problems: dict[str, Problem] = {}
    errors = failure.errors(include_url=False)
    for error in errors:
        if error["type"] == "too_short" and any(
            other is not error and other["loc"][: len(error["loc"])] == error["loc"]
            for other in errors
        ):
            continue  # a list whose entries were refused looks empty; the entries are the matter
        loc, info, owner = _resolve(model, error["loc"], error["type"] == "extra_forbidden")
        field = _path(loc)
        if field in problems:  # a union reports every branch; one message is enough
            continue
        message, fix = _explain(error, loc, info, owner, yaml)
        problems[field] = Problem(file=file, row=row, field=field, message=message, fix=fix)
    return list(problems.values())


def closest(name: object, known: Iterable[str], *, several: bool = True) -> str:
    """``did you mean 'x'?`` where something known is close, without regard to case.

    Args:
        name: What was written.
        known: What could have been meant.
        several: Whether to list what is known where nothing is close.
    """
    spelled = {str(one).casefold(): str(one) for one in known}
    close = difflib.get_close_matches(str(name).casefold(), spelled, n=1, cutoff=0.6)
    if close:
        return f"did you mean {spelled[close[0]]!r}?"
    return f"one of: {', '.join(spelled.values())}." if several else "none is spelled alike."


def _resolve(
    model: type[BaseModel], loc: Sequence[int | str], foreign: bool
) -> tuple[tuple[int | str, ...], FieldInfo | None, type[BaseModel]]:
    """The part of ``loc`` that names fields, the last field, and the model that owns it.

    Args:
        model: Where ``loc`` starts.
        loc: As pydantic gives it; members of a union stand in it under the names of their types.
        foreign: Whether its last part is a name that no field has.
    """
    kept: list[int | str] = []
    info: FieldInfo | None = None
    owner: type[BaseModel] = model
    current: type[BaseModel] | None = model
    for number, part in enumerate(loc):
        if isinstance(part, int):
            if current is None:
                break  # an entry of a plain tuple: the field itself says what belongs there
            kept.append(part)
        elif current is not None and part in (fields := _written(current)):
            kept.append(part)
            info, owner = fields[part], current
            current = _nested(info.annotation)
        elif current is not None and foreign and number == len(loc) - 1:
            kept.append(part)
            return tuple(kept), None, current
        elif current is None:
            break
    return tuple(kept), info, owner


def _written(model: type[BaseModel]) -> dict[str, FieldInfo]:
    """The fields of a model under the names that files use."""
    return {info.alias or name: info for name, info in model.model_fields.items()}


def _nested(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for argument in typing.get_args(annotation):
        found = _nested(argument)
        if found is not None:
            return found
    return None


def _path(loc: Sequence[int | str]) -> str:
    text = ""
    for part in loc:
        text += f"[{part + 1}]" if isinstance(part, int) else f".{part}" if text else part
    return text


def _explain(
    error: Any,
    loc: Sequence[int | str],
    info: FieldInfo | None,
    owner: type[BaseModel],
    yaml: bool,
) -> tuple[str, str]:
    name = str(loc[-1]) if loc else ""
    kind, got = error["type"], _shown(error.get("input"))
    if kind == "missing":
        return "is missing.", f"add {_example(name, info, yaml)}"
    if kind == "extra_forbidden":
        return f"is no {'key' if yaml else 'field of this row'}.", closest(name, _written(owner))
    if kind == "literal_error":
        expected = re.findall(r"'([^']*)'", error["ctx"]["expected"])
        return f"{got} is not allowed.", closest(error.get("input"), expected)
    if yaml and kind == "value_error":  # a rule in words, often about several keys at once
        return f"{error['msg'].removeprefix('Value error, ')}.", "change one of the two."
    reason = _YAML.get(error["type"]) if yaml else None
    return f"got {got}; {reason or _reason(error)}.", f"write {_example(name, info, yaml)}"


# In the words of TOML, which is what a contributor writes.
_REASONS = {
    "model_type": "expected a table in braces",
    "dict_type": "expected a table in braces",
    "tuple_type": "expected a list in brackets",
    "int_type": "expected a whole number",
    "int_from_float": "expected a whole number",
    "float_type": "expected a number",
    "float_parsing": "expected a number",
    "string_type": "expected text in quotes",
    "bool_type": "expected true or false",
    "bool_parsing": "expected true or false",
    "string_pattern_mismatch": "it does not have the expected form",
    "string_too_short": "it is empty",
    "too_short": "the list is too short",
    "too_long": "the list is too long",
}

_YAML = {
    "model_type": "expected keys and values",
    "dict_type": "expected keys and values",
    "tuple_type": "expected a list",
    "string_type": "expected text",
}


def _reason(error: Any) -> str:
    plain = error["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
    return _REASONS.get(error["type"], f"expected a value {plain[:1].lower()}{plain[1:]}")


def _example(name: str, info: FieldInfo | None, yaml: bool) -> str:
    """``name = example`` (``name: example`` in YAML) with the field's description."""
    sign = ":" if yaml else " ="
    if info is None:
        return f"{name}{sign} ..."
    examples = info.examples or []
    write = json.dumps if yaml else toml  # JSON is YAML
    shown = write(examples[0]) if examples else "..."
    described = (
        f" ({info.description[0].lower()}{info.description[1:].rstrip('.')})"
        if (info.description)
        else ""
    )
    return f"{name}{sign} {shown}{described}."


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def toml(value: Any) -> str:
    """A value as TOML writes it inline."""
    if isinstance(value, dict):
        inside = ", ".join(f"{key} = {toml(item)}" for key, item in value.items())
        return f"{{ {inside} }}" if inside else "{}"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(toml, value))}]"
    return json.dumps(value, ensure_ascii=False)
