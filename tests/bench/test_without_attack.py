"""Label rules and trainings in place of an attack."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from leakatlas.bench import labelling, run, scene, utility
from leakatlas.bench import study as studies
from leakatlas.bench.adversary import Here
from leakatlas.bench.cells import Cell
from leakatlas.bench.figures import mean_and_interval
from leakatlas.bench.schema import Case, Utility
from leakatlas.fl import Federation, RoundRecord, state_hash
from leakatlas.fl.state import model_state

DIGITS: dict[str, dict[str, Any]] = {
    "model": {"builtin": "fc", "kwargs": {"in_channels": 1, "size": 8, "widths": [16]}},
    "victims": {"set": "digits", "first": 1100, "count": 200},
    "surrogate": {"set": "digits", "first": 700, "count": 60},
}


def cell(measures: list[dict[str, str]], **settings: Any) -> Cell:
    case = Case.model_validate({**DIGITS, "measures": measures, **settings})
    return Cell("here", "main", case, seed=0, batch=0)


def test_the_sign_of_the_bias_names_every_single_label() -> None:
    one = cell(
        [{"name": "hits", "by": "idlg"}, {"name": "even-spread"}, {"name": "refusals"}],
        labelling={"batches": 4, "draw": "in order", "anew": True, "dummies": 0},
    )
    record = run.run_cell(one, Here())
    assert record.status == "complete", record.reason
    assert record.own["hits"] == [1.0] * 4 and record.own["refusals"] == [0.0] * 4
    assert sum(record.own["even-spread"]) < 4
    assert record.costs["cpu_seconds"] > 0


def test_networks_that_train_differently_from_the_same_start_are_not_taken_for_one() -> None:
    """Dropout is no part of a state; the first training of a process stood for all rates."""
    trained = {"images": {"set": "digits", "count": 64}, "epochs": 2}

    def weights(rate: float) -> str:
        kwargs = {**DIGITS["model"]["kwargs"], "dropout": rate}
        one = cell(
            [{"name": "refusals"}], labelling={"batches": 1}, pixels={"mean": [0.5], "std": [0.5]},
            model={**DIGITS["model"], "kwargs": kwargs, "train": trained},
        )  # fmt: skip
        return state_hash(model_state(scene.network(one)[1]))

    first = weights(0.25)
    assert first != weights(0.5)
    scene._TRAINED.clear()
    torch.rand(1)  # what the process drew before decides nothing
    assert weights(0.25) == first


def test_another_rule_is_another_cell_and_a_note_is_not() -> None:
    labels = {"batches": 4}
    one = cell([{"name": "rule", "by": "idlg"}], labelling=labels)
    assert one.name == cell([{"name": "x", "by": "idlg", "note": "n"}], labelling=labels).name
    assert one.name != cell([{"name": "rule", "by": "llg"}], labelling=labels).name


def test_a_rule_that_refuses_scores_nothing_and_is_counted() -> None:
    one = cell(
        [{"name": "idlg"}, {"name": "refusals"}], labelling={"batches": 2, "dummies": 0},
        model={"builtin": "fc", "kwargs": {"in_channels": 1, "size": 8, "bias": False}},
    )  # fmt: skip
    assert labelling.measure(one) == {"idlg": [0.0, 0.0], "refusals": [1.0, 1.0]}


@pytest.mark.parametrize(("draw", "distinct"), [("one class", 1), ("distinct classes", 6)])
def test_batches_are_drawn_as_told(draw: str, distinct: int) -> None:
    one = cell([{"name": "llg"}], labelling={"batches": 3, "draw": draw, "dummies": 0}, batch=6)
    counts = [(true > 0).sum() for _, true in labelling._images(one)]
    assert counts == [distinct] * 3


def test_local_steps_and_aligned_heads_give_every_rule_what_it_reads() -> None:
    rules = [{"name": "dimitrov"}, {"name": "rlu"}, {"name": "refusals"}]
    local = cell(
        rules, labelling={"batches": 1, "dummies": 20}, batch=8,
        protocol={"algorithm": "fedavg", "epochs": 2, "batch_size": 4, "lr": 0.1},
    )  # fmt: skip
    assert labelling.measure(local)["refusals"] == [0.0]
    even, fresh, aligned = (
        sum(labelling.measure(cell([{"name": rule}], labelling=told, batch=32))[rule])
        for rule, told in (
            ("even-spread", {"batches": 4, "synthetic": {"classes": 10}}),
            ("zlg", {"batches": 4, "synthetic": {"classes": 10}}),
            ("zlg", {"batches": 4, "synthetic": {"classes": 10, "aligned": True}}),
        )
    )
    assert fresh > even and fresh > aligned  # its assumption holds before training alone


def trained(**defended: Any) -> dict[str, float]:
    told = {
        "train": {"set": "digits", "count": 320}, "rounds": 6, "rates": [0.5, 1e-6],
        "validation": {"set": "digits", "first": 320, "count": 100},
        "test": {"set": "digits", "first": 420, "count": 200},
    }  # fmt: skip
    return utility.measure(cell([{"name": "accuracy"}], utility=told, **defended))


def test_noise_costs_accuracy_and_the_step_is_chosen() -> None:
    plain = trained()
    assert plain["lr"] == 0.5 and plain["accuracy"] > 0.3
    noisy = trained(
        defenses=[{"key": "client_dp", "noise_multiplier": 5.0}],
        protocol={"algorithm": "fedsgd", "mode": "train"},
    )
    assert noisy["accuracy"] < plain["accuracy"]


def test_of_many_clients_some_take_part(monkeypatch: pytest.MonkeyPatch) -> None:
    """User-level noise is little among many; a cell that samples nobody keeps its name."""
    told = {
        "train": {"set": "digits", "count": 320}, "test": {"set": "digits", "first": 420},
        "clients": 320, "rounds": 5, "rates": [0.1],
    }  # fmt: skip
    sizes: list[int] = []
    really = Federation.play_round

    def counted(self: Federation, **named: Any) -> RoundRecord:
        sizes.append(len(named["cohort"]))
        return really(self, **named)

    monkeypatch.setattr(Federation, "play_round", counted)
    some = cell([{"name": "accuracy"}], utility={**told, "sampled": 0.05})
    assert utility.measure(some) == utility.measure(some)
    assert sizes[:5] == sizes[5:] and len(set(sizes)) > 1 and 5 < sum(sizes[:5]) / 5 < 30
    everyone = cell([{"name": "accuracy"}], utility=told)
    assert "sampled" not in json.dumps(everyone.recipe) and some.name != everyone.name
    nobody = cell([{"name": "accuracy"}], utility={**told, "sampled": 1e-9})
    sizes.clear()
    assert utility.measure(nobody)["accuracy"] < 0.3 and not sizes


def dealt(split: float | None, seed: int = 0, clients: int = 20) -> tuple[Tensor, Tensor]:
    """Shares of 2,000 images of ten classes, and how much of each its commonest class is."""
    told: dict[str, Any] = {
        "train": "digits", "test": "digits", "rounds": 1, "rates": [0.1], "clients": clients
    }  # fmt: skip
    labels = torch.arange(2000) % 10
    shares = torch.stack(utility.shares(labels, Utility(**told, split=split), seed))
    counts = torch.stack([torch.bincount(labels[s], minlength=10) for s in shares])
    return shares, counts.double().max(1).values / shares.shape[1]


@pytest.mark.parametrize("split", [None, 1e-6, 0.5, 1e6])
def test_equal_shares_hold_every_image_once(split: float | None) -> None:
    shares, _ = dealt(split)
    assert shares.shape == (20, 100)
    assert sorted(shares.flatten().tolist()) == list(range(2000))


def test_the_concentration_goes_from_one_class_to_all_alike() -> None:
    """Commonest class of a share: E max of Dir(0.5, ..., 0.5) over ten classes is 0.38."""
    assert dealt(1e6)[1].mean() < 0.2  # of multinomial counts around 10 of 100
    assert 0.25 < dealt(0.5)[1].mean() < 0.5
    one_sided = dealt(1e-6, clients=10)[1]
    assert one_sided[:2].min() == 1.0 and one_sided.mean() > 0.5  # late ones take what is left
    means = [dealt(split)[1].mean() for split in (0.1, 1.0, 10.0)]
    assert means == sorted(means, reverse=True)


def test_a_split_is_its_seeds_and_leaves_the_names_of_other_cells() -> None:
    first, again, other = dealt(0.5)[0], dealt(0.5)[0], dealt(0.5, seed=1)[0]
    assert torch.equal(first, again) and not torch.equal(first, other)
    told = {
        "train": {"set": "digits", "count": 128}, "test": {"set": "digits", "first": 420},
        "rounds": 2, "rates": [0.5],
    }  # fmt: skip
    local = {"algorithm": "fedavg", "mode": "train", "batch_size": 8}

    def both(protocol: dict[str, Any]) -> tuple[Cell, Cell]:
        measures = [{"name": "accuracy"}]
        return (
            cell(measures, utility=told, protocol=protocol),
            cell(measures, utility={**told, "split": 0.1}, protocol=protocol),
        )

    even, split = both(local)
    assert "split" not in json.dumps(even.recipe) and split.name != even.name
    assert utility.measure(split) == utility.measure(split) != utility.measure(even)
    # The mean of one gradient each over equal shares is that of all images, however they are dealt.
    alike, dealt_out = (utility.measure(one)["accuracy"] for one in both({"algorithm": "fedsgd"}))
    assert alike == pytest.approx(dealt_out, abs=0.01)


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("by: idlg-paper", "by: idlg-papr", "there is no 'idlg-papr'"),
        ("letter: A", "letter: A\n  attack: dlg", "one of `attack`"),
        ("anew: true", "anew: yes please", "labelling"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_told(tmp_path: Path, old: str, new: str, told: str) -> None:
    text = (studies.find()["idlg"]).read_text(encoding="utf-8")
    assert old in text
    path = tmp_path / "idlg" / "study.yaml"
    path.parent.mkdir()
    path.write_text(text.replace(old, new), encoding="utf-8")
    study, problems = studies.check(path)
    assert study is None and told in "\n".join(map(str, problems))


def test_of_a_single_training_the_interval_is_over_seeds() -> None:
    """There are no images to resample, and no interval would be one of width zero."""
    mean, low, high = mean_and_interval({(0, ""): [0.6, 0.7, 0.8]}, "accuracy")
    assert mean == pytest.approx(0.7) and low < 0.65 and high > 0.75
    once = mean_and_interval({(0, ""): [0.6, 0.8], (1, ""): [0.7, 0.7]}, "psnr")
    assert once == pytest.approx((0.7, 0.7, 0.7))  # seeds of one image move together


def test_of_step_sizes_that_validate_alike_the_first_counts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The test images choose nothing: the better accuracy on them, at the second, is left."""
    found = {0.5: (0.8, 0.6), 0.1: (0.8, 0.9), 0.01: (0.7, 1.0)}
    monkeypatch.setattr(utility, "_trained", lambda cell, told, lr: found[lr])
    told = {
        "train": {"set": "digits", "count": 320}, "test": {"set": "digits", "count": 100},
        "validation": {"set": "digits", "first": 320, "count": 100},
        "rounds": 1, "rates": list(found),
    }  # fmt: skip
    one = cell([{"name": "accuracy"}], utility=told)
    assert utility.measure(one) == {"accuracy": 0.6, "lr": 0.5}
