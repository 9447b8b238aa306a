"""Points, prices and headlines of the frontier, from records made by hand."""

from __future__ import annotations

from typing import Any

import pytest

from leakatlas.bench.frontier import points, summarise
from leakatlas.bench.record import Record
from leakatlas.bench.study import Study

Cases = dict[str, list[Record]]


def attacked(psnr: list[float], *, seed: int = 0, batch: int = 0, **own: Any) -> Record:
    scores = {"images": [{"psnr": value, "candidate": 0} for value in psnr], "baselines": {}}
    return made(seed=seed, batch=batch, scores=scores, own=own)


def trained(accuracy: float, *, seed: int = 0) -> Record:
    return made(seed=seed, batch=0, scores=None, own={"accuracy": accuracy})


def made(**changes: Any) -> Record:
    return Record(cell="", code="", study="", label="", status="complete", recipe={}, **changes)


def cases(**more: list[Record]) -> Cases:
    named = {
        "none/fresh/search": [attacked([30.0, 30.0])],
        "none/fresh/utility": [trained(0.90), trained(0.92, seed=1)],
        "noise, sigma=1/fresh/search": [attacked([10.0, 12.0])],
        "noise, sigma=1/fresh/utility": [trained(0.80), trained(0.80, seed=1)],
        "noise, sigma=0.1/fresh/search": [attacked([10.0, 25.0])],
        "noise, sigma=0.1/fresh/utility": [trained(0.895), trained(0.915, seed=1)],
    }
    return {**named, **more}


def test_an_image_is_recovered_if_any_adversary_recovers_it() -> None:
    found = points(cases(**{"noise, sigma=1/fresh/read-out": [attacked([10.0, 40.0])]}))
    strong = next(p for p in found if p.defense == "noise, sigma=1")
    assert strong.recovered[0] == 0.5 and strong.by == "read-out"
    assert strong.recovered[1] <= 0.5 <= strong.recovered[2] and strong.images == 2


def test_what_was_fitted_around_a_secret_counts() -> None:
    found = points(cases(**{"keyed, k=1/fresh/search": [attacked([9.0], psnr_worst=[33.0])]}))
    assert next(p for p in found if p.key == "keyed").recovered[0] == 1.0


def test_the_price_is_paired_by_seed() -> None:
    weak = next(p for p in points(cases()) if p.defense == "noise, sigma=0.1")
    assert weak.loss is not None
    assert weak.loss[0] == pytest.approx(0.5) and weak.loss[1:] == pytest.approx((0.5, 0.5))


def test_seeds_of_one_image_make_no_narrower_interval() -> None:
    once = points({"none/fresh/search": [attacked([30.0])]})[0]
    thrice = points({"none/fresh/search": [attacked([30.0], seed=s) for s in range(3)]})[0]
    assert thrice.images == once.images == 1 and thrice.recovered == once.recovered


def test_what_costs_more_and_stops_less_is_dominated() -> None:
    more = {
        "bad, k=1/fresh/search": [attacked([30.0, 30.0])],
        "bad, k=1/fresh/utility": [trained(0.5), trained(0.5, seed=1)],
    }
    dominated = {p.defense for p in points(cases(**more)) if p.dominated}
    assert dominated == {"bad, k=1"}


def test_noise_of_equal_size_that_leaves_less_is_said() -> None:
    more = {"pruned, rate=1/fresh/search": [attacked([20.0], psnr_equal_noise=[12.0])]}
    flagged = {p.defense for p in points(cases(**more)) if p.noise}
    assert flagged == {"pruned, rate=1"}


def test_the_headlines_name_the_strength_that_gives_them() -> None:
    study: Study = None  # type: ignore[assignment]  # not looked at
    found = {figure["name"]: figure for figure in summarise(study, cases())}
    private = found["private | fresh | noise"]
    assert private["value"] == 0.5 and private["note"] == "at noise, sigma=0.1"
    price = found["price | fresh | noise"]
    assert price["value"] == pytest.approx(11.0) and price["note"] == "at noise, sigma=1"
    assert "recovered | fresh | none" in found and "loss | fresh | noise, sigma=1" in found
    assert "private | fresh | none" not in found


def test_an_image_without_a_candidate_is_not_recovered() -> None:
    """Whatever the public mean image would score in its place."""
    refused = attacked([30.0])
    assert refused.scores is not None
    refused.scores["images"][0]["candidate"] = None
    assert points({"none/fresh/search": [refused]})[0].recovered[0] == 0.0
