"""Rows and modules agree; this file alone imports the attack classes."""

import pytest

from leakatlas import catalogue
from leakatlas.catalogue import registry, results, source
from leakatlas.threat import LETTERS, Knowledge

ROWS = [
    *(("attack", row) for row in catalogue.attacks()),
    *(("defense", row) for row in catalogue.defenses()),
]
IMPLEMENTED = [
    row.key for row in catalogue.attacks() if registry.module_file("attack", row.key) is not None
]
DEFENDING = [
    row.key for row in catalogue.defenses() if registry.module_file("defense", row.key) is not None
]


@pytest.mark.parametrize("kind", ["attack", "defense"])
def test_every_row_has_its_module_or_is_planned(kind: registry.Kind) -> None:
    wrong = [
        row.key
        for found, row in ROWS
        if found == kind and row.planned == (registry.module_file(kind, row.key) is not None)
    ]
    assert wrong == [], "a row is planned exactly as long as its module does not exist"


@pytest.mark.parametrize("kind", ["attack", "defense"])
def test_every_module_has_its_row_on_its_path(kind: registry.Kind) -> None:
    rows = {f"{row.category}/{row.technique}/{row.key}" for found, row in ROWS if found == kind}
    assert sorted(set(registry.modules(kind)) - rows) == []


@pytest.mark.parametrize("kind", ["attack", "defense"])
def test_every_module_says_what_it_is(kind: registry.Kind) -> None:
    for path in registry.modules(kind):
        key = path.rpartition("/")[2]
        found = source.of(kind, key)
        assert found is not None, f"{path} holds no class named like its key"
        assert found.method, f"{path} has no module docstring"
        undocumented = [p.name for p in found.parameters if not p.text]
        assert undocumented == [], f"{path}: parameters without a line under Args"


@pytest.mark.parametrize("kind", ["attack", "defense"])
def test_every_module_has_its_test(kind: registry.Kind) -> None:
    untested = [
        path
        for path in registry.modules(kind)
        if results.test_file(kind, path.rpartition("/")[2]) is None
    ]
    assert untested == []


@pytest.mark.parametrize("key", IMPLEMENTED)
def test_needs_fit_the_letter_or_the_module_explains(key: str) -> None:
    cls = registry.load_attack(key)
    assert cls.key == key
    letter = LETTERS[catalogue.attack(key).corrected().threat_model]
    needs: Knowledge = cls.needs
    beyond = needs & ~letter.knowledge
    assert not beyond or cls.departs_from_letter, (
        f"{key} needs {', '.join(beyond.names())} beyond {letter.letter}; explain it in "
        "`departs_from_letter`"
    )
    assert source.of("attack", key) is not None
    found = source.of("attack", key)
    assert found is not None and Knowledge.from_names(found.needs) == needs
    assert found.version == cls.version


@pytest.mark.parametrize("key", DEFENDING)
def test_a_defense_carries_its_key_and_one_knob(key: str) -> None:
    cls = registry.load_defense(key)
    assert cls.key == key
    found = source.of("defense", key)
    assert found is not None and found.version == cls.version
    assert cls.knob in {parameter.name for parameter in found.parameters}
