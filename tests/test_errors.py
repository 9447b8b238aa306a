from __future__ import annotations

import pickle
import re

import pytest

from leakatlas import errors
from leakatlas.errors import LeakAtlasError, UnknownName


def _classes() -> dict[str, type[LeakAtlasError]]:
    return {
        name: value
        for name, value in vars(errors).items()
        if isinstance(value, type) and issubclass(value, LeakAtlasError)
    }


def test_the_drawn_tree_is_the_real_one() -> None:
    drawn = re.findall(r"[├└]── (\w+)\s+\((\w+)\)", errors.__doc__ or "")
    real = {
        name: cls.__mro__[2].__name__
        for name, cls in _classes().items()
        if cls is not LeakAtlasError
    }
    assert dict(drawn) == real


@pytest.mark.parametrize("name", sorted(set(_classes()) - {"LeakAtlasError"}))
def test_each_is_also_the_builtin_that_a_stranger_would_catch(name: str) -> None:
    cls = _classes()[name]
    builtins = [base for base in cls.__bases__ if base is not LeakAtlasError]
    assert len(builtins) == 1 and builtins[0].__module__ == "builtins"


def test_an_unknown_name_suggests_what_was_meant() -> None:
    error = UnknownName("attack", "Inverting_Gradient", ["dlg", "inverting_gradients"])
    assert "Unknown attack 'Inverting_Gradient'" in str(error)
    assert "Did you mean 'inverting_gradients'?" in str(error)
    assert str(error).endswith("Known: dlg, inverting_gradients.")


def test_an_unknown_name_far_from_all_is_not_guessed() -> None:
    error = UnknownName("attack", "zzz", ["dlg", "gias"])
    assert "Did you mean" not in str(error)


def test_a_lookup_error_prints_its_message_without_quotes() -> None:
    # KeyError would show repr(message); LookupError shows the message itself.
    assert str(UnknownName("letter", "Z", "AB")).startswith("Unknown letter")


def test_a_message_is_printable_and_bounded() -> None:
    error = errors.InvalidInput("a\x1b[2Jb\udc80 " + "x" * 10_000)
    assert str(error).startswith("a\\x1b[2Jb\\udc80 xxx")
    assert str(error).endswith("... (6,008 more characters)")
    assert len(str(UnknownName("attack", "x" * 5_000_000, ["dlg"]))) < 300


def test_errors_cross_process_borders() -> None:
    for error in (UnknownName("attack", "dgl", ["dlg"]), errors.InvalidInput("damaged")):
        again = pickle.loads(pickle.dumps(error))
        assert type(again) is type(error) and str(again) == str(error)


class _Silent:
    def __repr__(self) -> str:
        raise ValueError


def test_any_value_is_shown_in_a_short_line() -> None:
    deep: list[object] = []
    for _ in range(5000):
        deep = [deep]
    for value in (deep, "x" * 10**6, 16**5000, {"a": deep}, "a\nb\x00", [1] * 10**6, _Silent()):
        text = errors.shown(value)
        assert len(text) <= 160 and text.isprintable()
    assert errors.shown(-3) == "-3" and errors.shown({"a": [1, "b"]}) == "{'a': [1, 'b']}"
