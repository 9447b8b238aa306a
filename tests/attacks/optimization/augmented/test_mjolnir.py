from __future__ import annotations

import math
import pathlib
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from leakatlas.attacks.optimization.augmented import mjolnir
from leakatlas.attacks.optimization.augmented.mjolnir import Mjolnir, Path
from leakatlas.bench import harness
from leakatlas.blocks.watch import Watch
from leakatlas.data import bundled
from leakatlas.defenses.formal.dp.client_dp import ClientDP
from leakatlas.fl import Stage, View
from leakatlas.priors.prior import linear_schedule
from leakatlas.threat import Grant, Knowledge
from tests.attacks.case import Case
from tests.conftest import build_stage, photos, surrogate

SCENE = {"model": "lenet", "settings": {"width": 2}}
LITTLE: dict[str, Any] = {
    "steps": 2, "base": "inverting_gradients", "gradients": 4, "epochs": 1, "width": 2,
    "noise": 0.01,
}  # fmt: skip
CASE = Case(LITTLE, SCENE, boxed=True)
SHORT = Mjolnir(**LITTLE)
LABELS = frozenset({Grant.LABELS})
KEPT = linear_schedule()


@pytest.fixture(autouse=True)
def own_cache(cache: pathlib.Path) -> None:
    del cache


def noisy(multiplier: float = 0.05) -> ClientDP:
    return ClientDP(
        unit="update", clipping="flat", clip_norm=1.0, noise_multiplier=multiplier
    )  # fmt: skip


def stage_of(**changes: Any) -> Stage:
    given = {
        **SCENE, "letter": "D", "grants": LABELS, "public": surrogate(), "examples": 1,
        "defenses": (noisy(),),
    }  # fmt: skip
    return build_stage(**{**given, **changes})


def seen(**changes: Any) -> View:
    view, _ = harness.observe(stage_of(**changes), SHORT)
    return view


def draws(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# -- the reverse chain -----------------------------------------------------------------------------


@pytest.mark.parametrize(("epsilon", "expected"), [(0.1, 233), (0.5, 51), (1, 24), (5, 3), (10, 1)])
def test_the_first_step_of_published_gaussian_noise(epsilon: float, expected: int) -> None:
    M = 2 * 1e-3 * 10 * math.sqrt(2 * math.log(1.25 / 1e-4)) / epsilon
    assert mjolnir.first_step(1 / (1 + M**2), KEPT) == expected


@pytest.mark.parametrize(("epsilon", "expected"), [(0.1, 59), (0.5, 9), (1, 4), (5, 1)])
def test_the_first_step_of_published_laplace_noise(epsilon: float, expected: int) -> None:
    """Its scale taken for a deviation, as the release does."""
    M = 2 * 1e-3 * 10 / epsilon
    assert mjolnir.first_step(1 / (1 + M**2), KEPT) == expected


@pytest.mark.parametrize("path", ["mean", "single"])
@pytest.mark.parametrize("t", [1, 24, 233])
def test_with_the_true_noise_the_chain_returns_the_gradient(path: Path, t: int) -> None:
    g, n = draws(1, 1, 8, 8), draws(1, 1, 8, 8, seed=1)
    kept = float(KEPT[t - 1])
    M = math.sqrt(1 / kept - 1)
    start = math.sqrt(kept) * (g + M * n)
    end = mjolnir.reverse(start, lambda x, t: n, t, KEPT, path=path, generator=torch.Generator())
    torch.testing.assert_close(end, g, rtol=1e-5, atol=1e-5)


def test_every_step_reads_the_last_one() -> None:
    """The release applies each step to the input; then the number of steps would not matter."""
    x = draws(1, 1, 4, 4)
    ends = [
        mjolnir.reverse(x, lambda x, t: 0.1 * x, t, KEPT, path="mean", generator=torch.Generator())
        for t in (1, 2, 50)
    ]
    assert not torch.allclose(ends[0], ends[1]) and not torch.allclose(ends[1], ends[2])
    read: list[Tensor] = []

    def noting(x: Tensor, t: int) -> Tensor:
        del t
        read.append(x)
        return 0.5 * x

    mjolnir.reverse(x, noting, 3, KEPT, path="drawn", generator=torch.Generator().manual_seed(0))
    assert len(read) == 3 and not torch.equal(read[0], read[1])


def test_without_noise_nothing_changes() -> None:
    x = draws(1, 1, 4, 4)
    end = mjolnir.reverse(
        x, lambda x, t: torch.zeros_like(x), 1, KEPT, path="single", generator=torch.Generator()
    )
    torch.testing.assert_close(end, x, rtol=1e-4, atol=1e-4)
    plain, view = replace(SHORT, noise=None), seen(defenses=())
    direct = plain.inversion()
    expected = direct.run(view, generator=torch.Generator().manual_seed(0), watch=Watch())
    found = plain.run(view, generator=torch.Generator().manual_seed(0), watch=Watch())
    assert torch.equal(found.images, expected.images)
    assert found.notes["noise"] == 0.0


def test_the_ideal_denoiser_of_gaussian_data_is_wiener_shrinkage() -> None:
    v, M = 0.3, 0.7
    g = draws(1, 1, 8, 8)
    share = 1 / (1 + M**2)
    kept = torch.tensor([share], dtype=torch.float64)

    def ideal(x: Tensor, t: int) -> Tensor:
        del t
        return math.sqrt(1 - share) * x / (share * v + 1 - share)

    end = mjolnir.reverse(
        math.sqrt(share) * g, ideal, 1, kept, path="single", generator=torch.Generator()
    )
    wiener = mjolnir.shrunk(g.flatten(), M, torch.tensor(0.0), torch.tensor(v))
    torch.testing.assert_close(end.flatten(), wiener)


def test_a_trained_denoiser_comes_near_wiener_shrinkage(monkeypatch: pytest.MonkeyPatch) -> None:
    """On Gaussian data, for which no denoiser does better."""
    side, v, M = 4, 0.25, 0.5
    attack = Mjolnir(gradients=512, epochs=60, batch_size=64, width=8, lr=5e-3, path="single")
    view = seen()
    rows = iter(0.5 * draws(10_000, side * side, seed=3))

    def stand_in(**options: bool) -> Any:
        del options
        return lambda x, y: {"entries": next(rows)}

    monkeypatch.setattr(view, "replayer", stand_in)
    learned = attack.lesson(view, generator=torch.Generator().manual_seed(0), watch=Watch())
    wrong = {"network": 0.0, "wiener": 0.0}
    for number in range(100):
        g = next(rows)
        sent = g + M * draws(side * side, seed=1_000 + number)
        end = attack.denoised(sent, M, learned, torch.Generator())
        wrong["network"] += float((end - g).square().mean())
        shrunk = mjolnir.shrunk(sent, M, torch.tensor(0.0), torch.tensor(v))
        wrong["wiener"] += float((shrunk - g).square().mean())
    assert wrong["network"] < 1.1 * wrong["wiener"]


# -- gradients as images ---------------------------------------------------------------------------


@pytest.mark.parametrize("entries", [1, 15, 16, 17, 145, 13_426])
def test_flattening_and_padding_come_back(entries: int) -> None:
    row = draws(entries)
    side = mjolnir.side_of(entries)
    assert side % 4 == 0 and side**2 >= entries and (side - 4) ** 2 < entries
    image = mjolnir.padded(row, side)
    assert torch.equal(image.flatten()[:entries], row)
    torch.testing.assert_close(image.flatten()[entries:].unique(), row.mean()[None].expand(
        int(side**2 > entries)))  # fmt: skip
    g = {"a": row[: entries // 2].reshape(1, -1), "b": row[entries // 2 :]}
    back = mjolnir.unflat(mjolnir.flat(g), g)
    assert all(torch.equal(back[name], t) for name, t in g.items())


# -- in front of an inversion ----------------------------------------------------------------------


def test_the_noise_is_measured_by_playing_the_client() -> None:
    for multiplier in (0.02, 0.1):
        assert SHORT.noise_of(seen(defenses=(noisy(multiplier),))) == pytest.approx(
            multiplier, rel=0.15
        )


@pytest.mark.parametrize("denoiser", ["diffusion", "wiener"])
def test_a_denoised_gradient_is_nearer_than_the_noisy_one(denoiser: Any) -> None:
    crops = bundled.patches(8, 320)
    stage = stage_of(public=crops, defenses=(noisy(0.02),))
    view, _ = harness.observe(stage, SHORT)
    client = stage.federation.clients[0]
    clean = mjolnir.flat(view.replay(client.x, client.y, adaptive=False))
    attack = Mjolnir(
        denoiser=denoiser, standardised=True, path="single", gradients=192, epochs=12, width=8,
        batch_size=32, lr=5e-3,
    )  # fmt: skip
    learned = attack.lesson(view, generator=torch.Generator().manual_seed(0), watch=Watch())
    sent = mjolnir.flat(view.update.tensors)
    found = attack.denoised(sent, attack.noise_of(view), learned, torch.Generator())

    def cosine(row: Tensor) -> float:
        return float(torch.nn.functional.cosine_similarity(row, clean, dim=0))

    assert cosine(sent) < 0.95
    assert cosine(found) > cosine(sent) + 0.02


def test_no_victim_teaches_the_denoiser() -> None:
    lessons = []
    for victims in (photos(1, 8), photos(6, 8).subset([4])):
        generator = torch.Generator().manual_seed(0)
        view = seen(victims=victims)
        lessons.append(SHORT.lesson(view, generator=generator, watch=Watch()))
    assert all(torch.equal(t, lessons[1][name]) for name, t in lessons[0].items())


def test_what_it_needs_depends_on_the_denoiser_and_on_what_stands_behind() -> None:
    bare = Mjolnir(denoiser="none", base="dlg")
    assert bare.knowledge() == Knowledge.UPDATES
    assert SHORT.knowledge() & Knowledge.SURROGATE
    assert SHORT.outlook(seen(public=surrogate(16))).verdict == "hopeless"
    several = replace(SHORT, base="idlg").outlook(seen(examples=2))
    assert several.verdict == "hopeless" and "idlg" in several.reason
    assert replace(SHORT, steps=7).inversion().length == 7
