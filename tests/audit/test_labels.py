"""Label rules are rehearsed: what is chosen reads better than the rule for fresh networks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from leakatlas import models
from leakatlas.attacks.optimization.basic.inverting_gradients import InvertingGradients
from leakatlas.audit.games import CROPS
from leakatlas.audit.labels import (
    CERTIFIED,
    LEAST,
    Evidence,
    Reader,
    Reading,
    _Own,
    candidates,
    needed,
)
from leakatlas.blocks.labels import METHODS
from leakatlas.blocks.observed import known_labels
from leakatlas.blocks.watch import Watch
from leakatlas.data import CIFAR10, photos, strangers
from leakatlas.errors import InvalidParameter
from leakatlas.fl import FedSGD, ModelRef, Scenario, View, stage
from leakatlas.threat import Grant


def _view(count: int = 4, grants: frozenset[Grant] = frozenset()) -> View:
    """A batch of photos at the shipped trained ConvNet, labelled by the network itself."""
    reference = ModelRef("builtin", "convnet", {})
    model = reference.build()
    model.load_state_dict(models.load_weights("convnet-cifar10"))
    victims = photos(32).subset(range(count))
    scenario = Scenario(
        model=reference, letter="B", protocol=FedSGD(), examples=count, grants=grants
    )
    made = stage(scenario, model=model, victims=victims, box=CIFAR10)
    return made.view([made.federation.play_round()])


def _no_more_batches() -> Watch:
    """No hurry, but no batch beyond the fewest."""
    watch = Watch()
    watch.stop()
    return watch


def test_the_chosen_rule_beats_the_one_for_fresh_networks_on_a_trained_one() -> None:
    view = _view()
    read = Reader(view, strangers(photos(32), CROPS), watch=_no_more_batches())(view)
    assert view.reads == frozenset()
    told = read.to_json()
    assert told["rule"] in candidates() and 0 < told["batches"] <= LEAST // 2
    assert told["overlap"] > 0.8
    assert 0 <= told["trust"] <= told["right"] <= told["overlap"] <= 1
    assert len(read.labels) == 4 and list(read.labels) == sorted(read.labels)
    torch.testing.assert_close(known_labels(view, read.labels), torch.tensor(read.labels))


class Hours(Evidence):
    """One rule takes hours by the clock."""

    now = 0.0

    def answers(self, view: View, rules: Sequence[str]) -> Mapping[str, Tensor]:
        type(self).now += 3_600.0 * (CERTIFIED in rules)
        return super().answers(view, rules)


def test_a_rule_that_takes_longer_than_there_is_is_left_out_and_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("leakatlas.audit.labels.Evidence", Hours)
    monkeypatch.setattr("leakatlas.audit.labels.time.perf_counter", lambda: Hours.now)
    view = _view()
    reader = Reader(view, strangers(photos(32), CROPS), watch=Watch(7_200.0))
    assert CERTIFIED not in reader.rules and len(reader.rules) == len(candidates()) - 1
    told = reader(view).to_json()
    assert told["untried"] == [CERTIFIED] and told["rule"] in reader.rules
    assert Hours.now == 3_600.0


def test_one_rule_is_kept_however_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("leakatlas.audit.labels.Evidence", Hours)
    monkeypatch.setattr("leakatlas.audit.labels.time.perf_counter", lambda: Hours.now)
    rules = [CERTIFIED]
    reader = Reader(_view(), strangers(photos(32), CROPS), watch=Watch(0.0), rules=rules)
    assert reader.rules == rules


def test_trust_is_the_lower_end_of_what_own_batches_allow() -> None:
    assert Reading((1,), "x", 8, 8, 1.0).trust == pytest.approx(0.676, abs=1e-3)
    assert Reading((1,), "x", 48, 48, 1.0).trust == pytest.approx(0.926, abs=1e-3)
    assert Reading((1,), "x", 0, 24, 0.5).trust == 0.0
    assert Reading((), "", 0, 0, 0.0).trust == 0.0


def made_reader(own: list[tuple[float, dict[str, int]]], surprise: float, answers: Any) -> Reader:
    """Of batches of four: their surprise, and how many labels each rule read."""
    reader = Reader.__new__(Reader)
    reader.rules, reader._size = ["guess", CERTIFIED], 4
    reader._untried = ()
    reader._own = [_Own(seen, read) for seen, read in own]

    class Known:
        def surprise(self, view: object) -> float:
            return surprise

        def answers(self, view: object, rules: object) -> Any:
            return answers

    reader.evidence = Known()  # type: ignore[assignment]
    return reader


class Silent:
    def forget_reads(self) -> None: ...


def test_batches_that_surprised_as_much_judge_and_those_that_chose_do_not() -> None:
    counts = torch.tensor([2, 2])
    sure = [(0.1, {"guess": 4 if n % 2 else 3}) for n in range(32)]
    lost = [(0.9, {"guess": 4}) for _ in range(32)]
    reader = made_reader(sure + lost, 0.1, {"guess": counts})
    found = reader(Silent())  # type: ignore[arg-type]
    assert found.labels == (0, 0, 1, 1)
    assert (found.right, found.batches, found.overlap) == (16, 16, 1.0)
    flipped = made_reader([(s, {"guess": 7 - r["guess"]}) for s, r in sure] + lost, 0.1,
                          {"guess": counts})(Silent())  # type: ignore[arg-type]  # fmt: skip
    assert (flipped.right, flipped.batches) == (0, 16)  # those that chose were all right


def test_a_rule_is_judged_where_those_before_it_were_silent() -> None:
    counts = torch.tensor([2, 2])
    own = [(0.5, {CERTIFIED: 4, "guess": 4} if n % 4 < 2 else {"guess": 1}) for n in range(64)]
    certain = made_reader(own, 0.5, {CERTIFIED: counts, "guess": counts})
    certain._order = lambda alike: [CERTIFIED, "guess"]  # type: ignore[method-assign]
    found = certain(Silent())  # type: ignore[arg-type]
    assert (found.rule, found.right, found.batches) == (CERTIFIED, 8, 8)
    silent = made_reader(own, 0.5, {"guess": counts})
    silent._order = certain._order  # type: ignore[method-assign]
    found = silent(Silent())  # type: ignore[arg-type]
    assert (found.rule, found.right, found.batches) == ("guess", 0, 8)


def test_how_sure_the_network_was_shows_in_the_update() -> None:
    """Half the sum of the bias's slope, by hand."""
    view = _view()
    model = view.model.eval()
    truth = photos(32).subset(range(4))
    with torch.no_grad():
        p = model(CIFAR10.normalize(truth.images)).softmax(1).mean(0)
    expected = (p - torch.bincount(truth.labels, minlength=10) / 4).abs().sum() / 2
    evidence = Evidence(view, strangers(photos(32), CROPS))
    assert evidence.surprise(view) == pytest.approx(float(expected), rel=1e-4)
    surest, _ = evidence.draw(6, 0.125, torch.Generator().manual_seed(0))
    any_, _ = evidence.draw(6, 1.0, torch.Generator().manual_seed(0))
    assert _sureness(model, surest) > _sureness(model, any_)


def _sureness(model: nn.Module, x: torch.Tensor) -> float:
    with torch.no_grad():
        return float(model(x).softmax(1).max(1).values.mean())


def test_rules_take_what_every_recipient_of_the_model_holds() -> None:
    assert "bias-uniform" in candidates() and "llg*" in candidates()
    for key in candidates():
        assert METHODS[key].output in ("counts", "multiset") and METHODS[key].reads_head


def test_granted_and_single_labels_need_no_rule() -> None:
    assert needed(_view())
    assert not needed(_view(count=1))
    assert not needed(_view(grants=frozenset({Grant.LABELS})))


def test_labels_that_cannot_be_those_of_the_batch_are_refused() -> None:
    view = _view(count=2)
    for wrong in ((1,), (1, 2, 3), (0, 10)):
        with pytest.raises(InvalidParameter, match="give 2 labels from 0 to 9"):
            InvertingGradients(steps=1, labels=wrong)(view)


def test_what_was_read_is_what_the_attack_takes() -> None:
    view = _view(count=2)
    found = InvertingGradients(steps=1, labels=(3, 7))(view)
    assert found.labels is not None and found.labels.tolist() == [3, 7]
