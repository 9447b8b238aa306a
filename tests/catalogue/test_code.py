"""What makes a figure stale, and what leaves it alone."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

from leakatlas.catalogue import code

FILES = {
    "attacks/mine.py": '''
"""An attack."""
from typing import TYPE_CHECKING
from leakatlas.blocks import helper
from leakatlas.fl import Client
if TYPE_CHECKING:  # never runs
    from leakatlas.report import WORDS

class Mine:
    """Docstring."""
    def run(self, client: Client, words: WORDS) -> float:
        return helper.used(1) + Client.rate
''',
    "blocks/__init__.py": "",
    "blocks/helper.py": """
SCALE = 2.0
def used(x):
    return SCALE * x
def unused(x):
    return x
""",
    "fl/__init__.py": "from leakatlas.fl.rounds import Client as Client\nimport leakatlas.report\n",
    "fl/rounds.py": """
from leakatlas.fl.base import Base
from leakatlas.errors import Wrong
class Client(Base):
    rate = 1.0
    def check(self):
        raise Wrong("no")
class Other:
    pass
""",
    "fl/base.py": "class Base:\n    kept = 1\n",
    "errors.py": "class Wrong(Exception):\n    pass\n",
    "report/__init__.py": "WORDS = 1\n",
    "models/registry.py": """
from leakatlas.models.nets import A, B
_CLASSIFIERS = {"a": A, "b": B}
def build(name):
    return _CLASSIFIERS[name]
""",
    "models/nets.py": "class A:\n    x = 1\nclass B:\n    x = 1\n",
}

Hash = Callable[..., str]


@pytest.fixture
def hashed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hash]:
    """The hash of ``attacks.mine`` (or another root) in a small package, files changed as told."""

    def clear() -> None:
        for cached in (code._used, code._module, code._parsed):
            cached.cache_clear()

    def hash_of(
        changed: Mapping[str, str] | None = None,
        *,
        root: str = "leakatlas.attacks.mine",
        chosen: Mapping[str, tuple[str, ...]] | None = None,
    ) -> str:
        for name, text in {**FILES, **(changed or {})}.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        clear()
        return code.code_hash([root], chosen=chosen)

    monkeypatch.setattr(code, "PACKAGE", tmp_path)
    yield hash_of
    monkeypatch.undo()
    clear()


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("attacks/mine.py", "helper.used(1)", "helper.used(2)"),
        ("blocks/helper.py", "SCALE * x", "x"),
        ("blocks/helper.py", "SCALE = 2.0", "SCALE = 3.0"),
        ("fl/rounds.py", "rate = 1.0", "rate = 2.0"),
        ("fl/base.py", "kept = 1", "kept = 2"),
        ("fl/__init__.py", "leakatlas.fl.rounds import Client", "leakatlas.fl.base import Base"),
    ],
)  # fmt: skip
def test_what_is_used_counts(hashed: Hash, file: str, old: str, new: str) -> None:
    """Directly, through a constant, a base class, or a package that hands it on."""
    text = FILES[file].replace(old, new)
    assert text != FILES[file]
    assert hashed() != hashed({file: text})


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("attacks/mine.py", '"""Docstring."""', '"""Another."""'),
        ("attacks/mine.py", "return helper", "return  (  # why\n            helper"),
        ("blocks/helper.py", "    return x\n", "    return -x\n"),
        ("blocks/helper.py", "SCALE = 2.0", "NEW = 1\nSCALE = 2.0"),
        ("fl/rounds.py", "class Other:\n    pass", "class Other:\n    x = 1"),
        ("errors.py", "pass", "x = 1"),
        ("report/__init__.py", "WORDS = 1", "WORDS = 2"),
    ],
)  # fmt: skip
def test_what_is_not_used_does_not(hashed: Hash, file: str, old: str, new: str) -> None:
    """Texts, layout, neighbours, errors, and a room imported on the way or for types alone."""
    text = FILES[file].replace(old, new)
    if "(  # why" in text:
        text = text.replace("Client.rate", "Client.rate)")
    assert text != FILES[file]
    assert hashed() == hashed({file: text})


def test_of_a_table_of_networks_one_entry_counts(hashed: Hash) -> None:
    """Another network may change, and a new one come; without a name all of them count."""
    root = "leakatlas.models.registry:build"
    other = FILES["models/nets.py"].replace("class B:\n    x = 1", "class B:\n    x = 2")
    own = FILES["models/nets.py"].replace("class A:\n    x = 1", "class A:\n    x = 2")
    more = FILES["models/registry.py"].replace('"b": B', '"b": B, "c": B')
    only = functools.partial(hashed, root=root, chosen={code.NETWORKS: ("a",)})
    assert only() == only({"models/nets.py": other}) == only({"models/registry.py": more})
    assert only() != only({"models/nets.py": own})
    other_way = FILES["models/registry.py"].replace('"a": A', '"a": lambda: A()')
    assert only() != only({"models/registry.py": other_way})
    assert hashed(root=root) != hashed({"models/nets.py": other}, root=root)


def test_every_root_exists() -> None:
    """A renamed function of the harness would drop out of every hash unseen."""
    for root in code.ALWAYS:
        module, _, name = root.partition(":")
        file = code._module(module)
        assert file is not None
        assert file.defining(name), root
    for module, tables in code.TABLES.items():
        file = code._module(module)
        assert file is not None
        assert all(statement.entries for t in tables for statement in file.defining(t))


def test_an_attack_counts_with_the_blocks_that_it_uses() -> None:
    """The rounds, the scores and the matching of DLG; neither reports nor audits."""
    used = code._used(frozenset([*code.ALWAYS, "leakatlas.attacks.optimization.basic.dlg"]), (),
                      frozenset([(code.NETWORKS, frozenset(["lenet"]))]))  # fmt: skip
    names = "\n".join(used)
    for wanted in ("bench.harness ['observe']", "metrics.score ['score']", "fl.rounds ['Fed",
                   "blocks.matching ['squared_l2']", "models.lenet ['LeNet']"):  # fmt: skip
        assert wanted in names
    assert not any(line.startswith(("leakatlas.report", "leakatlas.audit")) for line in used)
    assert "models.convnet" not in names
