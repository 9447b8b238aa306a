"""Rows and modules agree: as ``leakatlas validate`` reads them, and as they are imported."""

import pytest

from leakatlas import catalogue
from leakatlas.catalogue import loader, registry, source
from leakatlas.threat import LETTERS, Knowledge

IMPLEMENTED = [
    row.key for row in catalogue.attacks() if registry.module_file("attack", row.key) is not None
]
DEFENDING = [
    row.key for row in catalogue.defenses() if registry.module_file("defense", row.key) is not None
]


def test_rows_and_modules_agree() -> None:
    _, problems = loader.check_files([])
    assert [str(problem) for problem in problems] == []


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
