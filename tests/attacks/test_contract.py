"""What every attack promises, asked of every attack that the catalogue can load.

The set-up comes from the attack's own test file: ``CASE``, a :class:`tests.attacks.case.Case` that
it can handle in a blink. An implemented attack without one fails here.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast, get_type_hints

import pytest
import torch
from pydantic import TypeAdapter
from safetensors.torch import load_file
from torch import Tensor

from leakatlas import catalogue
from leakatlas.attacks.api import ActiveAttack, Attack, Recipe, Reconstruction
from leakatlas.bench import harness
from leakatlas.blocks.watch import Watch
from leakatlas.catalogue import registry, results
from leakatlas.errors import InvalidParameter, NotGranted
from leakatlas.fl import Stage, Tampering, View, stream
from leakatlas.fl.view import SOURCES
from leakatlas.threat import LETTERS, Knowledge, threat_model
from tests.attacks.case import Case
from tests.conftest import build_stage, surrogate

ROOT = Path(__file__).resolve().parents[2]
SEED = 3


def _cases() -> Iterator[tuple[str, Case]]:
    for row in catalogue.attacks():
        path = results.test_file("attack", row.key)
        if path is None:
            continue
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        case = getattr(importlib.import_module(name), "CASE", None)
        if isinstance(case, Case):
            yield row.key, case


KEYS = registry.attack_keys()
CASES = dict(_cases())
TABLED = [key for key in KEYS if key in CASES]


def test_every_implemented_attack_has_a_case() -> None:
    missing = sorted(set(KEYS) - set(CASES))
    assert not missing, f"give CASE in the test files of: {', '.join(missing)}"


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LEAKATLAS_CACHE", str(tmp_path_factory.getbasetemp() / "here"))


def _make(key: str) -> Attack:
    return cast(Attack, registry.attack(key, **CASES[key].parameters))


@dataclass(frozen=True)
class Played:
    """An attack, what it saw, and what it read while it tampered."""

    attack: Attack
    view: View
    tamper_reads: frozenset[str]


def _stage(key: str, dtype: torch.dtype = torch.float32) -> Stage:
    return build_stage(
        letter=catalogue.attack(key).threat_model,
        grants=_make(key).grants(),
        dtype=dtype,
        public=surrogate(int(CASES[key].scene.get("size", 8))),
        **CASES[key].scene,
    )


@functools.cache
def _play(key: str, dtype: torch.dtype = torch.float32) -> Played:
    """The row's own letter, the grants that the parameters need, nothing more."""
    attack, stage = _make(key), _stage(key, dtype)
    reads: set[str] = set()
    if isinstance(attack, ActiveAttack):
        original = type(attack).tamper

        def tamper(
            self: ActiveAttack, view: View, *, generator: torch.Generator, watch: Watch
        ) -> Any:
            answer = original(self, view, generator=generator, watch=watch)
            reads.update(view.reads)
            return answer

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(type(attack), "tamper", tamper)
            view, _ = harness.observe(stage, attack)
    else:
        view, _ = harness.observe(stage, attack)
    return Played(attack, view, frozenset(reads))


@functools.cache
def _found(key: str, dtype: torch.dtype = torch.float32) -> Reconstruction:
    played = _play(key, dtype)
    return played.attack(played.view, seed=SEED)


def _tensors(found: Reconstruction) -> dict[str, Tensor]:
    named = {
        "images": found.images,
        "labels": found.labels,
        "label_counts": found.label_counts,
        "confidence": found.confidence,
    }
    return {name: tensor for name, tensor in named.items() if tensor is not None}


def _identical(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(
        a[n].dtype == b[n].dtype and a[n].shape == b[n].shape and bool((a[n] == b[n]).all())
        for n in a
    )


# -- results -------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", TABLED)
def test_the_result_is_well_formed(key: str) -> None:
    found, view = _found(key), _play(key).view
    count = len(found.images)
    assert found.images.shape == (count, *view.input_shape)
    assert found.status in ("complete", "failed") and bool(found.reason) == (
        found.status == "failed"
    )
    assert found.labels is None or found.labels.shape == (count,)
    assert found.confidence is None or found.confidence.shape == (count,)
    assert found.label_counts is None or found.label_counts.shape == (view.classes,)
    if found.labels is not None and count:
        assert 0 <= int(found.labels.min()) and int(found.labels.max()) < view.classes
    assert not any(t.requires_grad for t in _tensors(found).values())
    assert all(isinstance(value, float | int) for value in found.notes.values())


@pytest.mark.parametrize("key", TABLED)
def test_in_its_own_setting_it_finds_candidates(key: str) -> None:
    found = _found(key)
    assert found.status == "complete", found.reason
    assert len(found.images) > 0


@pytest.mark.parametrize("key", TABLED)
def test_the_same_seed_gives_the_same_and_nothing_is_touched(key: str, tmp_path: Path) -> None:
    played = _play(key)
    first = _found(key)
    played.view.save(tmp_path / "before")
    torch.manual_seed(1234)
    state = torch.get_rng_state()
    again = played.attack(played.view, seed=SEED)
    assert torch.equal(state, torch.get_rng_state())
    assert _identical(_tensors(first), _tensors(again))
    assert first.notes == again.notes and first.status == again.status
    played.view.save(tmp_path / "after")
    for name in ("view.json", "view.safetensors"):
        before, after = (tmp_path / side / name for side in ("before", "after"))
        assert before.read_bytes() == after.read_bytes()


@pytest.mark.parametrize("key", TABLED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_dtype_follows_the_model(key: str, dtype: torch.dtype) -> None:
    assert _found(key, dtype).images.dtype == dtype


@pytest.mark.parametrize("key", [key for key in TABLED if CASES[key].boxed])
def test_a_promised_box_is_respected(key: str) -> None:
    assert _play(key).view.box.contains(_found(key).images)


@pytest.mark.parametrize("key", TABLED)
def test_the_recipe_rebuilds_the_run(key: str) -> None:
    recipe = _found(key).recipe
    assert recipe is not None and recipe.seed == SEED
    again = Recipe.from_json(json.loads(json.dumps(recipe.to_json(), allow_nan=False)))
    assert again == recipe and again.content_hash == recipe.content_hash
    assert again.attack["key"] == key == _make(key).key
    assert type(_make(key)).from_json(dict(again.attack["parameters"])) == _make(key)


# -- a process that never saw the client ---------------------------------------------------------

WORKER = """
import json, sys
import torch
from safetensors.torch import save_file
from leakatlas.catalogue import registry
from leakatlas.fl import Stage, Tampering, View, stream

torch.set_num_threads(1)
for line in sys.stdin:
    order = json.loads(line)
    attack = registry.load_attack(order["key"]).from_json(order["parameters"])
    found = attack(View.load(order["folder"]), seed=order["seed"])
    named = {n: getattr(found, n) for n in ("images", "labels", "label_counts", "confidence")}
    tensors = {n: t.clone().contiguous() for n, t in named.items() if t is not None}
    save_file(tensors, order["answer"])
    print(json.dumps({"status": found.status, "reads": sorted(found.reads)}), flush=True)
"""


class Stranger:
    """A Python process that knows LeakAtlas and is handed saved views, nothing else."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.process: subprocess.Popen[str] | None = None

    def ask(self, order: dict[str, Any]) -> dict[str, Any]:
        if self.process is None or self.process.poll() is not None:
            # Its own cache: what the attack learns offline is learned again, not handed over.
            environment = {**os.environ, "LEAKATLAS_CACHE": str(self.folder / "cache")}
            with (self.folder / "stderr").open("w") as errors:
                self.process = subprocess.Popen(
                    [sys.executable, "-c", WORKER],
                    stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True,
                    env=environment,
                )  # fmt: skip
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        assert answer, (self.folder / "stderr").read_text()[-2000:]
        return cast(dict[str, Any], json.loads(answer))

    def close(self) -> None:
        if self.process is not None:
            assert self.process.stdin is not None and self.process.stdout is not None
            self.process.stdin.close()
            self.process.wait()
            self.process.stdout.close()


@pytest.fixture(scope="module")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stranger]:
    stranger = Stranger(tmp_path_factory.mktemp("stranger"))
    yield stranger
    stranger.close()


@pytest.mark.parametrize("key", TABLED)
def test_a_process_without_the_client_finds_the_same_bit_for_bit(
    key: str, stranger: Stranger, tmp_path: Path
) -> None:
    here = _found(key)
    _play(key).view.save(tmp_path / "view")
    answer = stranger.ask(
        {
            "key": key,
            "parameters": _make(key).to_json(),
            "folder": str(tmp_path / "view"),
            "seed": SEED,
            "answer": str(tmp_path / "found.safetensors"),
        }
    )
    assert _identical(_tensors(here), load_file(tmp_path / "found.safetensors"))
    assert answer == {"status": here.status, "reads": sorted(here.reads)}


ACTIVE = [key for key in TABLED if issubclass(registry.load_attack(key), ActiveAttack)]


@pytest.mark.parametrize("key", ACTIVE)
def test_what_it_sends_is_data_and_a_file_brings_it_to_the_clients(
    key: str, tmp_path: Path
) -> None:
    attack = _make(key)
    assert isinstance(attack, ActiveAttack)
    stage = _stage(key)
    generator = stream(key, "tamper", 0)  # as the harness draws
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(generator.initial_seed())
        tampering = attack.tamper(stage.view(), generator=generator, watch=Watch())
    assert tampering is not None
    tampering.save(tmp_path / "sent.safetensors")
    read = Tampering.load(tmp_path / "sent.safetensors")
    assert _identical(tampering.key, read.key)
    # Sybils send zeros; they change nothing about what the target holds.
    record = stage.federation.play_round(cohort=read.cohort, sent=read.sent)
    assert _identical(record.states[0], _play(key).view.rounds[0].state)


# -- knowledge -----------------------------------------------------------------------------------


COMPUTED = [
    key
    for key in TABLED
    if {"knowledge", "grants"} & vars(registry.load_attack(key)).keys()
    and not issubclass(registry.load_attack(key), ActiveAttack)
]


@pytest.mark.parametrize("key", COMPUTED)
def test_every_preset_gets_by_with_the_knowledge_that_its_parameters_ask_for(key: str) -> None:
    """Where options change the needs: all else is taken from the view, and it still runs."""
    cls = registry.load_attack(key)
    small = {n: v for n, v in CASES[key].parameters.items() if type(v) in (int, float)}
    for preset in {"published": cls(), "tuned": cls.tuned(), **cls.variants()}.values():
        # A stage that a preset leaves out stays out.
        short = {n: v for n, v in small.items() if getattr(preset, n) != 0}
        attack = cls.from_json({**preset.to_json(), **short})
        stage = build_stage(
            letter=catalogue.attack(key).threat_model,
            grants=attack.grants(),
            public=surrogate(int(CASES[key].scene.get("size", 8))),
            **CASES[key].scene,
        )
        view, _ = harness.observe(stage, attack)
        for name, (knowledge, grant) in SOURCES.items():
            if not knowledge & attack.knowledge() and grant not in attack.grants():
                view = view.without(name)
        if attack.outlook(view).verdict != "hopeless":
            assert attack(view, seed=SEED).status in ("complete", "failed")


@pytest.mark.parametrize("key", TABLED)
def test_a_field_that_is_taken_away_is_missed_or_not_used(key: str) -> None:
    played = _play(key)
    for name in sorted(_found(key).reads):
        less = played.view.without(name)
        try:
            found = played.attack(less, seed=SEED)
        except NotGranted as problem:
            assert f"view.{name} " in str(problem)
        else:
            assert name not in found.reads


@pytest.mark.parametrize("key", [key for key in TABLED if not ACTIVE.count(key)])
def test_only_who_asks_for_the_other_clients_updates_sees_them(key: str) -> None:
    several = {**CASES[key].scene, "clients": 3, "examples": 1}
    stage = build_stage(letter="E", **several)
    view, _ = harness.observe(stage, _make(key))
    assert view.has("others") == type(_make(key)).watches_others


@pytest.mark.parametrize("key", TABLED)
def test_a_field_that_was_not_read_changes_nothing(key: str) -> None:
    played, found = _play(key), _found(key)
    unread = [n for n in SOURCES if played.view.has(n) and n not in found.reads]
    less = played.view
    for name in unread:
        less = less.without(name)
    assert _identical(_tensors(played.attack(less, seed=SEED)), _tensors(found))


@pytest.mark.parametrize("key", TABLED)
def test_a_letter_without_what_is_needed_is_refused_and_the_others_are_not(key: str) -> None:
    attack = _make(key)
    for letter, model in LETTERS.items():
        stage = build_stage(letter=letter, grants=attack.grants(), **CASES[key].scene)
        missing = attack.knowledge() & ~model.knowledge
        if not missing:
            attack.check(stage.view())
            continue
        with pytest.raises(NotGranted, match=f"needs {', '.join(missing.names()).upper()}, which"):
            attack.check(stage.view())


@pytest.mark.parametrize("key", KEYS)
def test_no_preset_needs_more_than_its_class_declares(key: str) -> None:
    cls = registry.load_attack(key)
    presets = [cls(), cls.tuned(), *cls.variants().values()]
    assert not any(preset.knowledge() & ~cls.needs for preset in presets)


@pytest.mark.parametrize("key", TABLED)
def test_every_grant_that_the_parameters_need_is_asked_for(key: str) -> None:
    attack = _make(key)
    letter = catalogue.attack(key).threat_model
    for grant in attack.grants():
        stage = build_stage(letter=letter, grants=attack.grants() - {grant}, **CASES[key].scene)
        with pytest.raises(NotGranted, match=f"needs the grant {grant.value}"):
            attack.check(stage.view())


@pytest.mark.parametrize("key", TABLED)
def test_what_is_needed_and_read_fits_the_rows_letter_or_is_explained(key: str) -> None:
    attack = _make(key)
    letter = threat_model(catalogue.attack(key).threat_model)
    beyond: list[str] = list((attack.knowledge() & ~letter.knowledge).names())
    undeclared: list[str] = []
    for name in sorted(_found(key).reads | _play(key).tamper_reads):
        knowledge, grant = SOURCES[name]
        granted = grant is not None and grant in attack.grants()
        if not (knowledge & letter.knowledge or granted):
            beyond.append(name)
        if not (knowledge & (attack.knowledge() | Knowledge.UPDATES) or granted):
            undeclared.append(name)
    assert not beyond or attack.departs_from_letter
    for name in undeclared:  # read if it is there, done without if it is not
        less = _play(key).view.without(name)
        assert attack(less, seed=SEED).status == "complete"


# -- parameters ----------------------------------------------------------------------------------


def _invalid(schema: Mapping[str, Any]) -> list[object]:
    """Values just outside what a JSON schema allows."""
    if "anyOf" in schema:
        choices = [s for s in schema["anyOf"] if s.get("type") != "null"]
        return _invalid(choices[0]) if len(choices) == 1 else [object()]
    if "enum" in schema or "const" in schema:
        return ["no such choice"]
    match schema.get("type"):
        case "integer" | "number":
            values: list[object] = ["many"]
            values += [schema["minimum"] - 1] if "minimum" in schema else []
            for most in [schema["maximum"]] if "maximum" in schema else []:
                values.append(max(most + 1, math.nextafter(most, math.inf)))  # 1e30 + 1 is 1e30
            values += [schema[k] for k in ("exclusiveMinimum", "exclusiveMaximum") if k in schema]
            return [*values, float("nan")]
        case "boolean":
            return ["perhaps"]
        case _:
            return [object()]


PARAMETERS = [(key, f.name) for key in KEYS for f in dataclasses.fields(registry.load_attack(key))]


@pytest.mark.parametrize(("key", "name"), PARAMETERS)
def test_a_parameter_refuses_what_is_outside_its_range_by_name(key: str, name: str) -> None:
    cls = registry.load_attack(key)
    hint = get_type_hints(cls, include_extras=True)[name]
    for value in _invalid(TypeAdapter(hint).json_schema()):
        with pytest.raises(InvalidParameter) as caught:
            cls(**{name: value})
        assert str(caught.value).startswith(f"{cls.__name__}({name}=")


@pytest.mark.parametrize("key", KEYS)
def test_the_published_defaults_and_the_presets_survive_json(key: str) -> None:
    cls = registry.load_attack(key)
    for attack in (cls(), cls.tuned()):
        again = cls.from_json(json.loads(json.dumps(attack.to_json(), allow_nan=False)))
        assert again == attack
        assert dataclasses.is_dataclass(attack) and cls.__dataclass_params__.frozen
