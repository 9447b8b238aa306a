"""Points, prices, colours and headlines of the frontier, from records made by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from leakatlas.bench.frontier import Point, points, summarise
from leakatlas.bench.record import Record

Cases = dict[str, list[Record]]


def attacked(
    psnr: list[float], *, seed: int = 0, batch: int = 0, letter: str = "C",
    grants: tuple[str, ...] = (), protocol: str = "fedsgd", **own: Any,
) -> Record:  # fmt: skip
    scores = {"images": [{"psnr": value, "candidate": 0} for value in psnr], "baselines": {}}
    case = {
        "letter": letter, "vantage": "server", "grants": list(grants),
        "protocol": {"algorithm": protocol},
    }  # fmt: skip
    return made(seed=seed, batch=batch, scores=scores, own=own, recipe={"case": case})


def trained(accuracy: float, *, seed: int = 0, protocol: str = "fedsgd") -> Record:
    recipe = {"case": {"protocol": {"algorithm": protocol}}}
    return made(seed=seed, batch=0, scores=None, own={"accuracy": accuracy}, recipe=recipe)


def made(**changes: Any) -> Record:
    plain: dict[str, Any] = {"cell": "", "code": "", "study": "", "label": "", "recipe": {}}
    return Record(**{**plain, "status": "complete", **changes})


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


def point(defense: str, **more: list[Record]) -> Point:
    return next(p for p in points(cases(**more)) if p.defense == defense)


def figures(records: Cases, published: dict[str, str] | None = None) -> dict[str, dict[str, Any]]:
    return {figure["name"]: figure for figure in summarise(records, published or {}, {})}


def test_an_image_is_recovered_if_any_adversary_recovers_it() -> None:
    strong = point("noise, sigma=1", **{"noise, sigma=1/fresh/read-out": [attacked([10.0, 40.0])]})
    assert strong.recovered[0] == 0.5 and strong.by == "read-out"
    assert strong.recovered[1] <= 0.5 <= strong.recovered[2] and strong.images == 2


def test_what_was_fitted_around_a_secret_counts() -> None:
    keyed = point("keyed, k=1", **{"keyed, k=1/fresh/search": [attacked([9.0], psnr_worst=[33.0])]})
    assert keyed.recovered[0] == 1.0


def test_who_holds_the_secret_is_a_bound_and_does_not_count() -> None:
    oracle = attacked([50.0, 50.0], grants=("labels", "defense_secrets"))
    more = {"noise, sigma=1/fresh/with its secret": [oracle]}
    assert point("noise, sigma=1", **more).recovered[0] == 0.0
    found = figures(cases(**more))
    level = found["level | fresh | noise, sigma=1 | with its secret"]
    assert level["value"] == 1.0 and "a bound" in level["note"]


def test_a_price_is_not_taken_from_a_network_that_is_normalised_otherwise() -> None:
    normed = attacked([30.0, 30.0])
    normed.recipe["case"]["model"] = {"kwargs": {"norm": "batch"}}
    found = {
        p.network: p
        for p in points(cases(**{"noise, sigma=1/batch norm/statistics": [normed]}))
        if p.defense == "noise, sigma=1"
    }
    assert found["fresh"].loss is not None and found["batch norm"].loss is None
    assert not found["batch norm"].dominated


def test_who_was_refused_has_tried_nothing_and_is_named() -> None:
    scores = attacked([5.0]).scores
    refused = made(seed=0, batch=0, status="refused", reason="no key", scores=scores)
    alone = cases(**{"odd, k=1/fresh/search": [refused]})
    assert not [p for p in points(alone) if p.key == "odd"]
    untried = figures(alone)["untried | fresh | odd, k=1"]
    assert untried["value"] == 1 and untried["note"] == "no key"
    beside = {"noise, sigma=0.1/fresh/imprint": [refused, refused]}
    found = figures(cases(**beside))["recovered | fresh | noise, sigma=0.1"]
    assert found["value"] == 0.5 and "imprint: 2 of 2 refused" in found["note"]


def test_what_has_no_record_yet_is_told() -> None:
    planned = {"none/fresh/search": 1, "noise, sigma=1/fresh/search": 3, "odd, k=1/fresh/search": 2}
    named = {figure["name"]: figure for figure in summarise(cases(), {}, planned)}
    found = named["unmeasured | fresh | search"]
    assert found["value"] == 4 and found["n"] == 6
    assert found["note"] == "noise, sigma=1 (2 of 3); odd, k=1 (2 of 2)"
    assert not [name for name in figures(cases()) if name.startswith("unmeasured")]


def test_the_price_is_paired_by_seed() -> None:
    weak = point("noise, sigma=0.1")
    assert weak.loss is not None
    assert weak.loss[0] == pytest.approx(0.5) and weak.loss[1:] == pytest.approx((0.5, 0.5))


def test_the_price_is_that_of_the_same_local_training() -> None:
    more = {
        "noise, sigma=1/trained/search": [attacked([10.0])],
        "noise, sigma=1/local/search": [attacked([10.0], protocol="fedavg")],
        "none/local/utility": [trained(0.9, protocol="fedavg")],
        "noise, sigma=1/local/utility": [trained(0.6, protocol="fedavg")],
    }
    lost = {p.network: p.loss for p in points(cases(**more)) if p.defense == "noise, sigma=1"}
    assert lost["trained"] == lost["fresh"] is not None
    assert lost["local"] is not None and lost["local"][0] == pytest.approx(30.0)


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
    more = {
        "pruned, rate=1/fresh/search": [attacked([20.0], psnr_equal_noise=[12.0])],
        "better, rate=1/fresh/search": [attacked([8.0], psnr_equal_noise=[12.0])],
    }
    found = figures(cases(**more))
    assert "no better than noise" in found["recovered | fresh | pruned, rate=1"]["note"]
    assert found["noise | fresh | pruned, rate=1"]["value"] == pytest.approx(8.0)
    assert "no better than noise" not in found["recovered | fresh | better, rate=1"]["note"]


def test_the_headlines_name_the_strength_that_gives_them() -> None:
    found = figures(cases())
    private = found["private | fresh | noise"]
    assert private["value"] == 0.5 and private["note"] == "at noise, sigma=0.1"
    price = found["price | fresh | noise"]
    assert price["value"] == pytest.approx(11.0) and price["note"] == "at noise, sigma=1"
    assert "recovered | fresh | none" in found and "loss | fresh | noise, sigma=1" in found
    assert "private | fresh | none" not in found


def test_a_colour_is_of_who_knows_no_more_than_the_letter() -> None:
    """D knows what C knows; F does not know what D knows; nobody has less than B here."""
    more = {
        "noise, sigma=1/fresh/blind": [attacked([10.0, 10.0], letter="B")],
        "noise, sigma=1/fresh/search": [attacked([10.0, 25.0])],
        "noise, sigma=1/fresh/inverter": [attacked([25.0, 25.0], letter="D")],
        "noise, sigma=1/trained/search": [attacked([10.0, 10.0])],
    }
    found = figures(cases(**more), {"noise": "noise, sigma=1"})
    shares = {name.split(" | ")[1]: f["value"] for name, f in found.items() if "colour" in name}
    assert shares == {"B": 0.0, "C": 0.5, "D": 1.0, "E": 1.0, "F": 0.5, "G": 1.0, "H": 1.0}
    assert found["colour | H | noise"]["note"] == (
        "inverter (D, server) on fresh, at noise, sigma=1, which costs +11.0 points of accuracy"
    )


def test_what_was_run_and_on_what_is_told() -> None:
    record = attacked([30.0])
    case: dict[str, Any] = {
        **record.recipe["case"], "batch": 2, "victims": {"set": "digits"},
        "model": {"builtin": "fc", "kwargs": {"size": 8}, "weights": None, "train": None},
    }  # fmt: skip
    ran = replace(record, recipe={"case": case}, costs={"cpu_seconds": 1800.0})
    learned = {"epochs": 3, "images": {"count": 50}}
    local = {
        "model": {**case["model"], "train": learned}, "protocol": {"algorithm": "fedavg"}
    }  # fmt: skip
    found = {
        figure["name"]: figure
        for figure in summarise(
            {
                "none/fresh/search": [ran, replace(ran, seed=1)],
                "none/local/search": [replace(ran, recipe={"case": {**case, **local}})],
            },
            {},
            {"none/fresh/search": 3, "none/local/search": 1},
        )
    }
    assert found["run | cells"]["value"] == 3 and found["run | cells"]["note"] == "of 4"
    assert found["run | CPU hours"]["value"] == pytest.approx(1.5)
    assert found["network | fresh"]["value"] == 2
    assert found["network | fresh"]["note"] == (
        "fc (size 8), fresh weights; one gradient a round (FedSGD), 2 images a client of digits"
    )
    assert found["network | local"]["note"].startswith(
        "fc (size 8), 3 epochs on 50 public images; local epochs a round: 1 (FedAVG)"
    )


def test_the_undefended_training_is_shown_with_what_its_seeds_reach() -> None:
    found = figures(cases())["accuracy | fresh | none"]
    assert found["value"] == pytest.approx(91.0) and found["note"] == "seeds reach 90.0, 92.0"


def test_null_baselines_are_those_of_the_undefended_victims() -> None:
    record = attacked([30.0])
    assert record.scores is not None
    record.scores["baselines"]["mean_image"] = {"psnr": 9.5}
    found = figures({"none/fresh/search": [record]})["null | fresh | mean_image"]
    assert found["value"] == pytest.approx(9.5) and found["n"] == 1


def test_an_image_without_a_candidate_is_not_recovered() -> None:
    """Whatever the public mean image would score in its place."""
    refused = attacked([30.0])
    assert refused.scores is not None
    refused.scores["images"][0]["candidate"] = None
    assert points({"none/fresh/search": [refused]})[0].recovered[0] == 0.0
