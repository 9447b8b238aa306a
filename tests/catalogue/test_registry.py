"""From a row to its class, computed from category, technique and key."""

import importlib
import sys
import types
from pathlib import Path

import pytest

from leakatlas.catalogue import loader, registry
from leakatlas.errors import CatalogueError, UnknownName


def test_the_path_is_category_technique_key() -> None:
    assert registry.module_path("attack", "loki") == "leakatlas.attacks.analytic.isolation.loki"
    assert registry.module_path("defense", "fedkl") == "leakatlas.defenses.heuristic.model.fedkl"


def test_implemented_is_read_from_the_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "PACKAGE", tmp_path)
    assert not registry.implemented("dlg")
    folder = tmp_path / "attacks" / "optimization" / "basic"
    folder.mkdir(parents=True)
    (folder / "dlg.py").touch()
    (folder / "_shared.py").touch()
    room = folder / "cpa"
    room.mkdir()
    (room / "__init__.py").touch()
    assert registry.implemented("dlg") and registry.implemented("cpa")
    assert not registry.implemented("idlg")
    assert set(registry.modules("attack")) == {
        "optimization/basic/dlg",
        "optimization/basic/cpa",
    }


def test_the_class_carries_the_key_as_its_name() -> None:
    module = types.ModuleType("somewhere")
    for name in ("HFGradInv", "Helper"):
        setattr(module, name, type(name, (), {}))
    assert registry.class_of(module, "hf_gradinv").__name__ == "HFGradInv"
    with pytest.raises(CatalogueError, match="name it DigestNn"):
        registry.class_of(module, "digest_nn")


def test_what_is_not_implemented_is_said_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "PACKAGE", tmp_path)
    registry._load.cache_clear()
    with pytest.raises(UnknownName, match="implemented attack 'dlg'"):
        registry.load_attack("dlg")
    with pytest.raises(UnknownName, match="Unknown defense 'nothing'"):
        registry.load_defense("nothing")


def test_outsiders_join_by_entry_point(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "lantern_pkg.py").write_text("class Lantern:\n    steps = 7\nnotype = 3\n")
    info = tmp_path / "lantern_pkg-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: lantern-pkg\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[leakatlas.attacks]\nlantern = lantern_pkg:Lantern\nbroken = lantern_pkg:notype\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()
    registry._outsiders.cache_clear()
    registry._load.cache_clear()
    try:
        assert "lantern-pkg/lantern" in registry.attack_keys()
        assert registry.load_attack("lantern-pkg/lantern").steps == 7
        with pytest.raises(CatalogueError, match="must name a class"):
            registry.load_attack("lantern-pkg/broken")
    finally:
        registry._outsiders.cache_clear()
        registry._load.cache_clear()
        sys.modules.pop("lantern_pkg", None)


def test_every_row_has_a_home() -> None:
    for row in loader.attacks():
        assert registry.module_path("attack", row.key).endswith(
            f"{row.category}.{row.technique}.{row.key}"
        )
