from __future__ import annotations

import pytest

from leakatlas.errors import UnknownName
from leakatlas.threat import Grant, Vantage


@pytest.mark.parametrize("members", [Grant, Vantage])
def test_values_are_the_lower_case_names_that_files_use(
    members: type[Grant] | type[Vantage],
) -> None:
    for member in members:
        assert member.value == member.name.lower()
        assert members.named(member.value) is member


def test_an_unknown_name_suggests_the_right_one() -> None:
    with pytest.raises(UnknownName, match=r"Unknown grant 'lables'\. Did you mean 'labels'"):
        Grant.named("lables")
    with pytest.raises(UnknownName, match="Known: aggregate, peer, server, wire"):
        Vantage.named("moon")
