"""The committed label study: complete, well formed, and saying what the documentation says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from leakatlas.blocks.labels import METHODS
from leakatlas.catalogue.measured import StudyResult

STUDY = Path(__file__).parents[2] / "results" / "labels.json"
WITHHELD = STUDY.with_name("labels_withheld.json")


def figures(file: Path) -> dict[str, float]:
    result = StudyResult.model_validate(json.loads(file.read_text(encoding="utf-8")))
    return {
        f"{measure.name}/{case.case}": measure.value
        for case in result.cases
        for measure in case.measures
        if measure.value is not None and measure.name != "refusals"
    }


@pytest.fixture(scope="module")
def irec() -> dict[str, float]:
    return figures(STUDY)


def test_every_rule_is_in_the_study(irec: dict[str, float]) -> None:
    measured = {name.split("/")[0] for name in irec}
    assert measured == set(METHODS) - {"rgap"} | {"even-spread"}  # rgap has a scalar logit


def test_a_single_sample_is_always_exact_by_its_bias(irec: dict[str, float]) -> None:
    rows = {k: v for k, v in irec.items() if k.startswith(("idlg/", "fc-ratio/"))}
    assert len(rows) == 12 and set(rows.values()) == {1.0}


def test_counting_rules_are_near_perfect_untrained_and_far_from_it_trained(
    irec: dict[str, float],
) -> None:
    for key in ("ilrg", "rlu", "bias-uniform"):
        assert irec[f"{key}/digits/relu/untrained/B=8/random"] > 0.95
        assert irec[f"{key}/digits/relu/trained/B=8/random"] < 0.9


def test_weight_rules_need_non_negative_features_and_bias_rules_do_not(
    irec: dict[str, float],
) -> None:
    assert irec["zlg/digits/tanh/untrained/B=32/random"] < 0.1  # refused: features change sign
    assert irec["llg*/digits/tanh/untrained/B=32/random"] < 0.8
    assert irec["zlg-bias/digits/tanh/untrained/B=32/random"] > 0.9


def test_set_rules_say_nothing_once_the_batch_exceeds_the_classes(irec: dict[str, float]) -> None:
    for state in ("untrained", "trained"):
        setting = f"digits/relu/{state}/B=32/random"
        assert irec[f"rlg/{setting}"] <= irec[f"even-spread/{setting}"] + 0.02
        assert irec[f"column-min/{setting}"] == 0  # refused


def test_no_rule_beats_the_even_spread_on_large_batches_of_trained_relu_and_silu(
    irec: dict[str, float],
) -> None:
    """Rules that know the mean outputs of every class do on tanh, by a tenth."""
    for activation in ("relu", "silu"):
        setting = f"digits/{activation}/trained/B=32/random"
        found = {k: v for k, v in irec.items() if k.endswith(setting)}
        assert max(found.values()) < irec[f"even-spread/{setting}"] + 0.05


def test_withholding_the_head_does_not_hide_the_labels_of_an_untrained_network(
    irec: dict[str, float],
) -> None:
    found = {k.removeprefix("gdbr/"): v for k, v in irec.items() if k.startswith("gdbr/digits/")}
    assert len(found) == 38
    for setting, value in found.items():
        even = irec[f"even-spread/{setting}"]
        if "/untrained/" in setting:
            assert value > even + 0.15 and value > 0.95
        elif setting.endswith("/B=32/random") and "tanh" not in setting:  # like the other rules
            assert value < even + 0.05


def test_networks_with_wide_layers_below_a_withheld_head_give_their_labels_away() -> None:
    found = figures(WITHHELD)
    for network in ("lenet5", "convnet", "convnet-bn", "vgg11", "resnet18", "vit"):
        assert found[f"irec_gdbr/{network}/untrained/32"] > 0.95
    # 12 channels for 9 unknowns are barely enough, and training ends what the counts rest on
    for place in ("lenet/untrained", "convnet/trained", "convnet-bn/trained"):
        even = found[f"irec_even_spread/{place}/32"]
        assert even - 0.1 < found[f"irec_gdbr/{place}/32"] < even + 0.15
