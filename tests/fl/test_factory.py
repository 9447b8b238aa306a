from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy
import pytest
from torch import nn

from leakatlas.errors import InvalidInput, UnknownName
from leakatlas.fl import factory

HEAD = "import sys\nfrom torch import nn\n"


def test_a_factory_makes_the_model(tmp_path: Path) -> None:
    file = tmp_path / "net.py"
    file.write_text(HEAD + "def make(width):\n    return nn.Linear(width, 2)\n")
    model = factory.make(f"{file}:make", {"width": 5})
    assert isinstance(model, nn.Linear) and model.in_features == 5
    with pytest.raises(UnknownName, match="Did you mean 'make'"):
        factory.make(f"{file}:mak", {})
    assert isinstance(factory.make("torch.nn:Identity", {}), nn.Identity)


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("def make(:\n", r"net\.py, line 3: SyntaxError"),
        ("import no_such_thing\n", r"net\.py, line 3: ModuleNotFoundError: .*no_such_thing"),
        ("def make():\n    raise KeyError('x')\n", r"net\.py, line 4: KeyError: 'x'"),
        ("def make():\n    return nn.Linear(-1, 'x')\n", r"net\.py, line 4: "),
        ("def make(width):\n    return nn.ReLU()\n", r"failed: TypeError: .*width"),
        ("sys.exit(0)\n", r"net\.py, line 3: it calls sys\.exit\(0\)"),
        ("def make():\n    sys.exit(0)\n", r"net\.py, line 4: it calls sys\.exit\(0\)"),
        ("def make():\n    return make()\n", "line 4: RecursionError"),
        ("def make():\n    return 7\n", "returned int, expected a torch.nn.Module"),
        ("make = 7\n", "Unknown model factory"),
        ("x = '\udc80'\n", "SyntaxError"),
    ],
)
def test_what_a_users_code_does_wrong_is_told_with_file_and_line(
    code: str, words: str, tmp_path: Path
) -> None:
    file = tmp_path / "net.py"
    file.write_bytes((HEAD + code).encode("utf-8", "surrogateescape"))
    with pytest.raises((InvalidInput, UnknownName), match=words):
        factory.make(f"{file}:make", {})


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("torch.nn", "is 'file.py:factory'"),
        (":make", "is 'file.py:factory'"),
        ("a.py:", "is 'file.py:factory'"),
        ("no_such_module_here:make", "not importable"),
        ("..:make", "failed|not importable"),
        ("missing.py:make", "does not exist"),
        ("a\x00.py:make", "does not exist|failed"),
        ("builtins:dict", "is Python's own and was not run"),
    ],
)
def test_names_that_lead_nowhere(name: str, words: str) -> None:
    with pytest.raises(InvalidInput, match=words):
        factory.make(name, {})


@pytest.mark.parametrize(
    ("name", "kwargs", "words"),
    [
        ("os:mkdir", {"path": "owned"}, "The model module 'os' is Python's own and was not run"),
        ("subprocess:getoutput", {"cmd": "mkdir owned"}, "Python's own and was not run"),
        ("builtins:exec", {}, "Python's own"),
        ("pathlib:Path", {}, "Python's own"),
        # imported elsewhere, it is still what it is
        ("leakatlas.sealed:write_whole", {"file": "owned", "content": b""}, "was not run: of an"),
        ("torch.serialization:pickle", {}, "Unknown|was not run"),
        ("torch.hub:load", {"repo_or_dir": "a/b", "model": "m"}, "was not run: of an installed"),
        ("torch:load", {"f": "owned", "weights_only": False}, "'-> nn.Module'"),
        ("torch:save", {"obj": 1, "f": "owned"}, "was not run"),
        ("numpy:save", {"file": "owned", "arr": [1]}, "was not run"),
        ("torch.nn:init", {}, "Unknown|was not run"),
    ],
)
def test_what_is_no_factory_of_models_is_not_run(
    name: str,
    kwargs: dict[str, object],
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises((InvalidInput, UnknownName), match=words):
        factory.make(name, kwargs)
    assert list(tmp_path.iterdir()) == []


def test_a_module_of_the_standard_library_is_not_even_imported() -> None:
    sys.modules.pop("antigravity", None)  # it would open a browser
    with pytest.raises(InvalidInput, match="Python's own"):
        factory.find("antigravity:fly", "loss")
    assert "antigravity" not in sys.modules


@pytest.mark.parametrize("module", [subprocess, numpy])
def test_an_installed_file_is_nobodys_own(module: ModuleType) -> None:
    with pytest.raises(InvalidInput, match="belongs to Python or to an installed package"):
        factory.make(f"{module.__file__}:getoutput", {"cmd": "mkdir owned"})


def test_what_says_that_it_makes_a_model_is_run() -> None:
    assert isinstance(factory.make("torch.nn:Identity", {}), nn.Module)
    made = factory.make("torchvision.models:squeezenet1_1", {"num_classes": 3})  # '-> SqueezeNet'
    assert isinstance(made, nn.Module)
