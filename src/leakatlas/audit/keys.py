"""Every key of an audit's YAML: its JSON Schema, its page in the guide, and a commented file.

All three come from the pydantic models of :mod:`leakatlas.audit.config`, from the protocols'
fields and from the catalogue, so that a key cannot be described that does not exist.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
import textwrap
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import BaseModel, TypeAdapter
from pydantic.errors import PydanticInvalidForJsonSchema
from pydantic.fields import FieldInfo

from leakatlas.audit.config import AuditConfig, DataConfig, ModelConfig, UtilityConfig
from leakatlas.catalogue import registry, source
from leakatlas.fl.losses import LOSSES
from leakatlas.fl.protocol import PROTOCOLS
from leakatlas.report import Context
from leakatlas.threat import LETTERS, Grant, Vantage

SCHEMA_FILE = "audit.schema.json"
PAGE = "docs/guide/yaml-keys.md"
PARTS: dict[str, type[BaseModel]] = {
    "model": ModelConfig, "data": DataConfig, "utility": UtilityConfig, "context": Context
}  # fmt: skip
"""Keys that hold keys of their own."""


@dataclasses.dataclass(frozen=True)
class Key:
    """One key.

    Args:
        name: As it is written.
        default: As JSON; empty where there is none.
        text: What it is, one or more sentences.
    """

    name: str
    default: str
    text: str


def keys_of(model: type[BaseModel]) -> list[Key]:
    """The keys that a part of the file takes."""
    return [
        Key(name, _default(field), _sentence(field.description or ""))
        for name, field in model.model_fields.items()
    ]


def protocol_keys(algorithm: str) -> list[Key]:
    """The keys of ``protocol`` under one algorithm."""
    cls = PROTOCOLS[algorithm]
    texts = source.arguments(inspect.getdoc(cls) or "")
    plain = cls().to_json()
    return [
        Key(name, json.dumps(value), _sentence(_plain(texts.get(name, ""))))
        for name, value in plain.items()
    ]


def json_schema() -> dict[str, Any]:
    """JSON Schema of the file, for editors; the program itself checks more."""
    whole = AuditConfig.model_json_schema()
    whole["properties"]["protocol"] = {
        "description": whole["properties"]["protocol"].get("description", ""),
        "anyOf": [_protocol_schema(name) for name in PROTOCOLS],
    }
    one = {"anyOf": [_defense_schema(key) for key in registry.defense_keys()]}
    some = {"type": "array", "items": {"$ref": "#/$defs/Defense"}}
    whole["$defs"]["Defense"] = one
    for name, value in (("defenses", some), ("alternatives", {"additionalProperties": some})):
        described = whole["properties"][name]
        kept = {k: described[k] for k in ("description", "default") if k in described}
        whole["properties"][name] = {**kept, **value}
    whole["properties"]["grants"]["items"] = {"enum": [grant.value for grant in Grant]}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **whole}


def _protocol_schema(algorithm: str) -> dict[str, Any]:
    return {
        "title": PROTOCOLS[algorithm].__name__,
        "type": "object",
        "additionalProperties": False,
        "properties": {
            "algorithm": {"const": algorithm},
            **_fields(PROTOCOLS[algorithm], protocol_keys(algorithm)),
        },
    }


def _defense_schema(key: str) -> dict[str, Any]:
    cls = registry.load_defense(key)
    texts = source.arguments(inspect.getdoc(cls) or "")
    keys = [Key(name, "", _plain(texts.get(name, ""))) for name in _names(cls)]
    return {
        "title": key,
        "type": "object",
        "additionalProperties": False,
        "required": ["key"],
        "properties": {"key": {"const": key}, **_fields(cls, keys)},
    }


def _names(cls: type[Any]) -> list[str]:
    return [field.name for field in dataclasses.fields(cls)]


def _fields(cls: type[Any], keys: list[Key]) -> dict[str, Any]:
    from typing import get_type_hints

    hints = get_type_hints(cls, include_extras=True)
    found = {}
    for key in keys:
        try:
            shape = TypeAdapter(hints[key.name]).json_schema()
        except PydanticInvalidForJsonSchema:  # a loss or an augmentation: many forms, own messages
            shape = {}
        found[key.name] = {**shape, "description": key.text} if key.text else shape
    return found


def page() -> str:
    """The page of every key, as Markdown."""
    out = [INTRODUCTION]
    out += [_table(keys_of(AuditConfig), nested=True)]
    for name, model in PARTS.items():
        out += [f"## `{name}`", _first(model), _table(keys_of(model))]
    for algorithm, cls in PROTOCOLS.items():
        out += [f"## `protocol` with `algorithm: {algorithm}`", _first(cls)]
        out += [_table(protocol_keys(algorithm))]
    out += ["## `protocol: loss`", LOSS_WORDS, _losses()]
    out += ["## `defenses` and `alternatives`", DEFENSE_WORDS, _defenses()]
    out += ["## `grants`", GRANT_WORDS, _bullets(_members(Grant))]
    out += ["## `vantage`", _bullets(_members(Vantage))]
    out += ["## `threat`", THREAT_WORDS, _bullets((m.letter, m.name) for m in LETTERS.values())]
    return "\n\n".join(out) + "\n"


INTRODUCTION = """# Every key of the audit's YAML

<!-- generated by scripts/generate.py; do not edit -->

`leakatlas init` writes a commented file with these keys, and `audit.schema.json` beside it, which
editors with a YAML language server use to complete and check as you type. An unknown key, a value
out of range or a key without effect is an error that names its place (exit code 2)."""
LOSS_WORDS = (
    "A name, or `{name: ..., ...}` with parameters; `mine.py:my_loss` runs a function of yours, "
    "which takes the outputs and the targets."
)
DEFENSE_WORDS = (
    "Each entry is `{key: ..., ...}`. `defenses` are in force; `alternatives` maps a name to a "
    "list of them, and the report compares the lists."
)
GRANT_WORDS = (
    "Facts that the adversary is given on top of its letter. All but `pixel_range` are oracles: "
    "with one of them the set-up is a diagnostic upper bound, and is reported as that."
)
THREAT_WORDS = "Letters and ranges, such as `A-E` or `B,F`."


def _table(keys: list[Key], *, nested: bool = False) -> str:
    rows = ["| Key | If left out | What it is |", "|---|---|---|"]
    for key in keys:
        default = f"`{key.default}`" if key.default else "required"
        if nested and key.name in (*PARTS, "protocol"):
            default = "required" if key.name == "model" else "see below"
        rows.append(f"| `{key.name}` | {_cell(default)} | {_cell(key.text)} |")
    return "\n".join(rows)


def _losses() -> str:
    rows = []
    for name, cls in LOSSES.items():
        if name == "python":
            continue
        given = ", ".join(f"`{k}: {json.dumps(v)}`" for k, v in cls().to_json().items())
        rows.append((name, f"{_plain(_first(cls))}{f' Parameters: {given}.' if given else ''}"))
    return _bullets(rows)


def _defenses() -> str:
    rows = []
    for key in registry.defense_keys():
        given = [name for name in _names(registry.load_defense(key))]
        words = f"[page](../defenses/{key}.md). Parameters: {', '.join(f'`{g}`' for g in given)}."
        rows.append((key, words))
    return _bullets(rows)


def _bullets(rows: Any) -> str:
    return "\n".join(f"- `{name}`: {text}" for name, text in rows)


def _members(cls: type[Grant] | type[Vantage]) -> Iterator[tuple[str, str]]:
    """Values of an enumeration with the docstrings that stand below them."""
    text = inspect.getsource(cls)
    for member in cls:
        said = re.search(rf"{member.name} = \"[^\"]+\"\n\s+\"\"\"(.*?)\"\"\"", text, re.DOTALL)
        assert said is not None, f"{member} has no docstring"
        yield member.value, " ".join(said[1].split())


def starter(values: Mapping[str, Any]) -> str:
    """A commented file that sets ``values`` and shows every other key with its default.

    Args:
        values: Keys with their values; those of ``model``, ``data`` and ``protocol`` nested.
    """
    lines = [f"# yaml-language-server: $schema={SCHEMA_FILE}", *_comment(HEAD), ""]
    for key in keys_of(AuditConfig):
        lines += _comment(key.text)
        part = PARTS.get(key.name)
        given = values.get(key.name, {})
        if key.name == "protocol":
            algorithm = given["algorithm"]
            lines += ["protocol:", f"  algorithm: {algorithm}  # or {_other(algorithm)}"]
            lines += _inner(protocol_keys(algorithm), given)
        elif part is not None and (key.name in values or key.name == "context"):
            # A part whose keys are all left out would be no mapping: it stays a comment itself.
            off = "" if key.name in values else "# "
            lines += [f"{off}{key.name}:", *_inner(keys_of(part), given, off)]
        elif key.name in values:
            lines.append(f"{key.name}: {_yaml(values[key.name])}")
        else:
            lines.append(f"# {key.name}: {key.default}")
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


HEAD = (
    "An audit for LeakAtlas. `leakatlas doctor FILE` checks it in seconds, `leakatlas audit FILE` "
    "attacks it. Lines that begin with # show what holds if a key is left out."
)


def _inner(keys: list[Key], given: Mapping[str, Any], off: str = "") -> Iterator[str]:
    for key in keys:
        yield from (f"{off}  {line}" for line in _comment(key.text))
        if key.name in given:
            yield f"{off}  {key.name}: {_yaml(given[key.name])}"
        else:
            yield f"{off or '  # '}{'  ' if off else ''}{key.name}: {key.default or 'null'}"


def _other(algorithm: str) -> str:
    return next(name for name in PROTOCOLS if name != algorithm)


def _comment(text: str) -> list[str]:
    return [f"# {line}" for line in textwrap.wrap(text.replace("``", ""), 90)]


def _yaml(value: Any) -> str:
    """A value in flow style; JSON is YAML."""
    if isinstance(value, str) and re.fullmatch(r"[A-Za-z][\w./-]*", value):
        return value
    return json.dumps(value, ensure_ascii=False)


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return ""
    value = field.get_default(call_default_factory=True)
    plain = value.model_dump(mode="json") if isinstance(value, BaseModel) else value
    return json.dumps(plain, ensure_ascii=False)


def _first(cls: type[Any]) -> str:
    return (inspect.getdoc(cls) or "").split("\n\n")[0].replace("\n", " ")


def _plain(text: str) -> str:
    """Docstring markup as Markdown."""
    text = re.sub(r":\w+:`~?([^`]+)`", r"`\1`", text)
    return text.replace("``", "`")


def _sentence(text: str) -> str:
    return " ".join(text.split())


def _cell(text: str) -> str:
    return text.replace("``", "`").replace("|", "\\|")
