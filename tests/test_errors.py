from __future__ import annotations

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
