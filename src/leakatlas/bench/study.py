"""A study file, checked, and the cases that it describes."""

from __future__ import annotations

import fnmatch
import hashlib
import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from leakatlas import limits, reading, yamlfiles
from leakatlas.bench import names
from leakatlas.bench.schema import Case, StudyFile
from leakatlas.catalogue import loader, registry, results, source
from leakatlas.catalogue.code import CHOOSER, HOOK, own_file
from leakatlas.catalogue.problems import Problem, closest, from_validation
from leakatlas.errors import InvalidInput, UnknownName

FILE = "study.yaml"
MOST_CASES = 10_000


@dataclass(frozen=True)
class Study:
    """A study, checked.

    Args:
        name: Of its folder; results are ``results/<name>.json``.
        folder: Where it lies.
        file: What it says.
        cases: Every combination of its axes, by name.
    """

    name: str
    folder: Path
    file: StudyFile
    cases: Mapping[str, Case]

    @property
    def hook(self) -> Path | None:
        """The study's own Python file, if it has one."""
        path = self.folder / HOOK
        return path if path.is_file() else None

    def code_of(self, case: Case) -> Path | None:
        """The Python file of the study that a case runs, if any."""
        return own_file(self.folder, case.model_dump(mode="json"))

    @property
    def brings(self) -> list[str]:
        """Names of the Python files that come with it."""
        return [name for name in (HOOK, CHOOSER) if (self.folder / name).is_file()]

    @property
    def content_hash(self) -> str:
        """SHA-256 of what the file says."""
        text = json.dumps(self.file.model_dump(mode="json"), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


def default_folder() -> Path:
    """``studies/`` of the checkout, else of the working directory."""
    return (results.repository_root() or Path.cwd()) / "studies"


def find(folder: Path | None = None) -> dict[str, Path]:
    """The study files below a folder, by name."""
    folder = folder or default_folder()
    return {path.parent.name: path for path in sorted(folder.glob(f"*/{FILE}"))}


def load(where: str | Path) -> Study:
    """The study at a path (its folder or its file), or of that name in ``studies/``.

    Raises:
        UnknownName: If there is none.
        InvalidInput: If the file is malformed; every problem is named, each with a way out.
    """
    path = _locate(where)
    study, problems = check(path)
    if problems or study is None:
        raise InvalidInput("\n".join(map(str, problems)))
    return study


def _locate(where: str | Path) -> Path:
    path = Path(where)
    if reading.is_file(path / FILE):
        return path / FILE
    known = find()
    if str(where) in known:  # a file that happens to be called like a study is none
        return known[str(where)]
    if reading.is_file(path):
        return path
    raise UnknownName("study", str(where), known)


def check(path: Path) -> tuple[Study | None, list[Problem]]:
    """The study in a file, and everything that is wrong with it."""
    name = path.resolve().parent.name
    shown = f"{name}/{path.name}"
    content, problem = _read(path, shown)
    if problem is not None:
        return None, [problem]
    try:
        file = StudyFile.model_validate(content)
    except ValidationError as failure:
        return None, from_validation(failure, StudyFile, file=shown, row="", yaml=True)
    cases: dict[str, Case] = {}
    problems: list[Problem] = []
    for label, values, sources in _combinations(file, shown, problems):
        try:
            cases[label] = Case.model_validate(values)
        except ValidationError as failure:
            # The same mistake in the set-up shows in every case; it is said once.
            for found in from_validation(failure, Case, file=shown, row=sources, yaml=True):
                if not any((found.field, found.message) == (p.field, p.message) for p in problems):
                    problems.append(found)
    study = Study(name, path.resolve().parent, file, cases)
    if not problems:
        problems += names.check(study, shown)
    if file.summary is True and study.hook is None:
        fix = f"add a {HOOK} with summarise(study, records), or leave `summary` out."
        problems.append(
            Problem(file=shown, field="summary", message="is computed by nobody.", fix=fix)
        )
    return (None if problems else study), problems


def _read(path: Path, shown: str) -> tuple[Any, Problem | None]:
    def wrong(message: str, fix: str) -> tuple[None, Problem]:
        return None, Problem(file=shown, message=message, fix=fix)

    try:
        text = reading.read_text(path, what="study", limit=limits.CONFIGURATION)
        content = yamlfiles.parse(text, who="It")
    except InvalidInput as problem:
        return wrong(str(problem), "mend that place.")
    if not isinstance(content, dict):
        kind = type(content).__name__
        return wrong(f"holds {kind}, not keys.", "begin with `schema: leakatlas/study/1`.")
    return content, None


def _combinations(
    file: StudyFile, shown: str, problems: list[Problem]
) -> Iterator[tuple[str, dict[str, Any], str]]:
    """Name, merged values and origin of every case."""
    axes = {axis: _values(axis, varied) for axis, varied in file.axes.items()}
    if (total := math.prod(map(len, axes.values()))) > MOST_CASES:
        problems.append(
            Problem(
                file=shown,
                field="axes",
                message=f"make {total:,} cases.",
                fix=f"at most {MOST_CASES:,}; split the study.",
            )
        )
        return
    problems += _idle_patterns(file, shown, {a: list(values) for a, values in axes.items()})
    for combination in itertools.product(*(values.items() for values in axes.values())):
        labels = {axis: label for axis, (label, _) in zip(axes, combination, strict=True)}
        if any(_matches(unwanted, labels) for unwanted in file.exclude):
            continue
        patches = [patch for _, patch in combination]
        patches += [more.lay for more in file.where if _matches(more.match, labels)]
        values: dict[str, Any] = dict(file.setup)
        for patch in patches:
            values = merged(values, patch)
        name = "/".join(labels.values()) or "main"
        yield name, values, f"case {name}" if labels else "setup"


def _values(axis: str, varied: dict[str, dict[str, Any]] | list[Any] | str) -> dict[str, Any]:
    """Every value of an axis: its label, and what it lays over the set-up."""
    if isinstance(varied, dict):
        return dict(varied)
    if isinstance(varied, list):
        return {_label(value): _nested(axis, value) for value in varied}
    found: dict[str, Any] = {"none": {}}
    for row in loader.defenses():
        about = source.of("defense", row.key)
        if about is not None:
            for value in about.strengths:
                chosen = {"key": row.key, about.knob: value}
                label = strength(row.key, about.knob, value)
                found[label] = {"defenses": [chosen], "beside": {"defense": row.key}}
    return found


def published_strengths() -> dict[str, str]:
    """By key of an implemented defense, its default strength as a value of `every defense`."""
    found = {}
    for key in registry.defense_keys():
        plain = registry.load_defense(key)()
        found[key] = strength(key, plain.knob, getattr(plain, plain.knob))
    return found


def strength(key: str, knob: str, value: Any) -> str:
    """A defense at one strength, as `every defense` names it."""
    return f"{key}, {knob}={_short(value)}"


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _matches(patterns: Mapping[str, str], labels: Mapping[str, str]) -> bool:
    return all(_like(labels.get(axis, ""), pattern) for axis, pattern in patterns.items())


def _like(label: str, pattern: str) -> bool:
    """Whether a label fits a pattern, in which only ``*`` means something."""
    return fnmatch.fnmatchcase(label, pattern.replace("[", "[[]").replace("?", "[?]"))


def _idle_patterns(
    file: StudyFile, shown: str, axes: Mapping[str, Sequence[str]]
) -> Iterator[Problem]:
    """Patterns that no value of their axis matches."""
    places = [(f"exclude[{n}]", patterns) for n, patterns in enumerate(file.exclude, 1)]
    places += [(f"where[{n}].match", more.match) for n, more in enumerate(file.where, 1)]
    for field, patterns in places:
        for axis, pattern in patterns.items():
            known = axes.get(axis)
            if known is None:
                message, fix = f"names {axis!r}, which is no axis.", closest(axis, list(axes))
                yield Problem(file=shown, field=field, message=message, fix=fix)
            elif not any(_like(label, pattern) for label in known):
                message = f"names {pattern!r}, which is no value of {axis}."
                fix = closest(pattern, known)
                yield Problem(file=shown, field=field, message=message, fix=fix)


def _label(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _nested(dotted: str, value: Any) -> dict[str, Any]:
    for part in reversed(dotted.split(".")):
        value = {part: value}
    return dict(value)


SHORT = {"model": "builtin", "victims": "set", "surrogate": "set", "attack": "key"}
"""Keys whose value may be a plain text, and what that text then is."""


def merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """``above`` laid over ``below``: tables are merged, everything else is replaced.

    Another model or attack begins anew: settings of the one mean nothing to the other.

    Example:
        >>> merged({"attack": {"key": "dlg", "preset": "tuned"}}, {"attack": {"parameters": {}}})
        {'attack': {'key': 'dlg', 'preset': 'tuned', 'parameters': {}}}
        >>> merged({"attack": {"key": "dlg", "preset": "tuned"}}, {"attack": "idlg"})
        {'attack': {'key': 'idlg'}}
        >>> merged({"beside": {"attack": "dlg"}}, {"beside": {"attack": "idlg"}})
        {'beside': {'attack': 'idlg'}}
    """
    return _laid(below, above, SHORT)


def _laid(
    below: Mapping[str, Any], above: Mapping[str, Any], short: Mapping[str, str]
) -> dict[str, Any]:
    values = dict(below)
    for key, new in above.items():
        old = values.get(key)
        if key in short:
            name = short[key]
            new = {name: new} if isinstance(new, str) else new
            old = {name: old} if isinstance(old, str) else old
            if isinstance(new, dict) and isinstance(old, dict):
                if new.get(name, old.get(name)) != old.get(name):
                    old = None
        if isinstance(old, dict) and isinstance(new, dict) and key != "protocol":
            new = _laid(old, new, {})  # deeper down, the same words mean other things
        elif key == "protocol" and isinstance(old, dict) and isinstance(new, dict):
            same = new.get("algorithm", old.get("algorithm")) == old.get("algorithm")
            new = {**old, **new} if same else new
        values[key] = new
    return values
