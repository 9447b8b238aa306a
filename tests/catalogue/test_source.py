"""What is read from a module's text, without importing it."""

from pathlib import Path

import pytest

from leakatlas.catalogue import registry, source

MODULE = '''r"""Lantern: annealed matching.

Departures: none.
"""

import nothing_that_exists

@attack("lantern", needs=Knowledge.UPDATES | Knowledge.BASIC)
@dataclass(frozen=True, kw_only=True)
class Lantern(Attack):
    """Signed descent with a fading prior.

    Args:
        steps: Iterations T
            (Sec. 5.1).
        lr (float): Step size.
    """

    version: ClassVar[int] = 3
    departs_from_letter: ClassVar[str] = (
        "It needs "
        "less."
    )
    steps: PositiveInt = 4_800
    lr: Positive
    _hidden: int = 0

    def run(self, view, *, generator, watch):
        return view.replay(view.update.tensors)
'''


@pytest.fixture
def module(tmp_path: Path) -> Path:
    path = tmp_path / "lantern.py"
    path.write_text(MODULE, encoding="utf-8")
    return path


def test_everything_a_page_shows_is_found(module: Path) -> None:
    found = source.read(module, "lantern")
    assert found is not None
    assert found.class_name == "Lantern"
    assert found.method.startswith("Lantern: annealed matching.")
    assert found.summary == "Signed descent with a fading prior."
    assert [(p.name, p.annotation, p.default, p.text) for p in found.parameters] == [
        ("steps", "PositiveInt", "4800", "Iterations T (Sec. 5.1)."),
        ("lr", "Positive", "", "Step size."),
    ]
    assert found.needs == ("updates", "basic")
    assert found.reads == ("replay", "update")
    assert found.version == 3
    assert found.departs_from_letter == "It needs less."


def test_a_module_without_its_class_gives_nothing(module: Path) -> None:
    assert source.read(module, "candle") is None


def test_a_version_that_is_not_written_is_the_first(tmp_path: Path) -> None:
    path = tmp_path / "plain.py"
    path.write_text("class Plain:\n    pass\n", encoding="utf-8")
    found = source.read(path, "plain")
    assert found is not None and (found.version, found.needs, found.parameters) == (1, (), ())


def test_a_row_without_a_module_has_no_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "PACKAGE", tmp_path)
    assert source.of("attack", "dlg") is None
