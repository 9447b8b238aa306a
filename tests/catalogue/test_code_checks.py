"""Rows beside modules: what ``leakatlas validate`` says of a contributor's files."""

from collections.abc import Callable
from pathlib import Path

import pytest

from leakatlas.catalogue import code_checks, loader, registry, results, source
from leakatlas.catalogue.problems import Problem
from tests.catalogue.test_broken_rows import DEFENSE, ROW

ATTACK_MODULE = '''"""Beacon: annealed matching."""

@attack("beacon", needs=Knowledge.UPDATES | Knowledge.BASIC)
class Beacon(Attack):
    """Signed descent.

    Args:
        steps: Iterations T.
    """

    steps: PositiveInt = 4_800
'''
DEFENSE_MODULE = '''"""Curtain: hides."""

class Curtain(Defense):
    """Hides.

    Args:
        opacity: The knob.
    """

    key: ClassVar[str] = "curtain"
    knob: ClassVar[str] = "opacity"
    opacity: float = 0.5
'''
ATTACK_PLACE = "attacks/optimization/basic/beacon.py"
DEFENSE_PLACE = "defenses/heuristic/model/curtain.py"


class Checkout:
    """A checkout with one attack and one defense, both whole."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.rows = (ROW + DEFENSE).replace("planned = true\n", "")
        self.package = root / "src" / "leakatlas"
        self.write(self.package / ATTACK_PLACE, ATTACK_MODULE)
        self.write(self.package / DEFENSE_PLACE, DEFENSE_MODULE)
        self.write(self.test(ATTACK_PLACE), "CASE = Case()\n")
        self.write(self.test(DEFENSE_PLACE), "")

    def test(self, place: str) -> Path:
        path = self.root / "tests" / place
        return path.with_name(f"test_{path.name}")

    def write(self, path: Path, text: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")

    def change(self, place: str, old: str, new: str) -> None:
        path = self.package / place
        text = path.read_text(encoding="utf-8")
        assert old in text
        path.write_text(text.replace(old, new), encoding="utf-8")

    def move(self, place: str, folder: str) -> None:
        path = self.package / place
        target = path.parents[2] / folder / path.name
        target.parent.mkdir(parents=True, exist_ok=True)
        path.rename(target)
        self.write(self.test(f"{place.partition('/')[0]}/{folder}/{path.name}"), "CASE = 1\n")

    def problems(self) -> list[Problem]:
        source.read.cache_clear()
        texts = {
            name: text
            for name, text in loader.shipped_texts().items()
            if name in ("threat_models.toml", "references.toml")
        }
        drafts, problems = loader.read_texts({**texts, "mine.toml": self.rows})
        return problems + code_checks.check(drafts)


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Checkout:
    found = Checkout(tmp_path)
    monkeypatch.setattr(registry, "PACKAGE", found.package)
    monkeypatch.setattr(results, "repository_root", lambda: tmp_path)
    return found


def test_whole_rows_have_no_problems(checkout: Checkout) -> None:
    assert checkout.problems() == []


def _leftover(c: Checkout) -> None:
    c.rows = c.rows.replace('summary = "A', 'planned = true\nsummary = "A')


def _add_orphan(c: Checkout) -> None:
    c.write(c.package / "attacks/optimization/basic/becon.py", ATTACK_MODULE)


BROKEN: dict[str, tuple[Callable[[Checkout], object], tuple[str, ...]]] = {
    "leftover planned": (_leftover, ('attack "beacon": planned: is true although src', "delete")),
    "no module and not planned": (
        lambda c: (c.package / ATTACK_PLACE).unlink(),
        (f"src/leakatlas/{ATTACK_PLACE} does not exist", "planned = true"),
    ),
    "wrong folder": (
        lambda c: c.move(ATTACK_PLACE, "analytic/closed_form"),
        ("optimization/basic", "lies in analytic/closed_form", f"to src/leakatlas/{ATTACK_PLACE}"),
    ),
    "orphan": (_add_orphan, ("basic/becon.py: no attack has the key", "did you mean 'beacon'")),
    "wrong decorator": (
        lambda c: c.change(ATTACK_PLACE, '@attack("beacon"', '@attack("dlg"'),
        ("registered as 'dlg'", '@attack("beacon", needs=...)'),
    ),
    "no decorator": (
        lambda c: c.change(ATTACK_PLACE, "@attack", "@other"), ("registered as nothing",),
    ),
    "wrong constant": (
        lambda c: c.change(DEFENSE_PLACE, '= "curtain"', '= "soteria"'),
        ("registered as 'soteria'", 'key = "curtain"'),
    ),
    "wrong class": (
        lambda c: c.change(ATTACK_PLACE, "class Beacon", "class Lamp"), ("name it Beacon",),
    ),
    "no docstring": (
        lambda c: c.change(DEFENSE_PLACE, '"""Curtain: hides."""', ""), ("has no docstring",),
    ),
    "undescribed parameter": (
        lambda c: c.change(ATTACK_PLACE, "= 4_800", "= 4_800\n    lr: float = 0.1"),
        ("without a line: lr", "Args:"),
    ),
    "needs beyond its letter": (
        lambda c: c.change(ATTACK_PLACE, "BASIC", "SURROGATE"),
        ("needs surrogate, which letter B does not hold", "departs_from_letter"),
    ),
    "no knob": (
        lambda c: c.change(DEFENSE_PLACE, '= "opacity"', '= "opcity"'), ("no privacy knob",),
    ),
    "no test": (
        lambda c: c.test(DEFENSE_PLACE).unlink(),
        ("has no test", "tests/defenses/heuristic/model/test_curtain.py"),
    ),
    "no case": (
        lambda c: c.write(c.test(ATTACK_PLACE), "case = 1\n"), ("gives no CASE", "CASE = Case("),
    ),
    "no Python": (
        lambda c: c.change(ATTACK_PLACE, "class Beacon", "class class"), ("is no Python", "line"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_a_disagreement_is_named_with_a_way_out(name: str, checkout: Checkout) -> None:
    breaking, words = BROKEN[name]
    breaking(checkout)
    problems = checkout.problems()
    assert len(problems) == 1, [str(problem) for problem in problems]
    for word in words:
        assert word in str(problems[0]), str(problems[0])
    assert problems[0].fix


def test_they_come_together_with_errors_of_fields(checkout: Checkout) -> None:
    _leftover(checkout)
    _add_orphan(checkout)
    checkout.change(DEFENSE_PLACE, '= "opacity"', '= "opcity"')
    checkout.rows = checkout.rows.replace('threat_model = "B"', 'threat_model = "Z"')
    assert sorted(problem.field for problem in checkout.problems()) == [
        "", "", "planned", "threat_model",
    ]  # fmt: skip
