"""What every study in ``studies/`` promises."""

from __future__ import annotations

from pathlib import Path

import pytest

from leakatlas.bench import study as studies

FOUND = studies.find()


@pytest.mark.parametrize("path", FOUND.values(), ids=FOUND.keys())
def test_it_is_sound(path: Path) -> None:
    study, problems = studies.check(path)
    assert study is not None, "\n".join(map(str, problems))
    assert study.cases
