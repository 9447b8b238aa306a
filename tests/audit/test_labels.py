"""Label rules are rehearsed: what is chosen reads better than the rule for fresh networks."""

from __future__ import annotations

import pytest
import torch

from leakatlas import models
from leakatlas.attacks.optimization.basic.inverting_gradients import InvertingGradients
from leakatlas.audit.games import CROPS
from leakatlas.audit.labels import BATCHES, Reader, candidates, needed
from leakatlas.blocks.labels import METHODS
from leakatlas.blocks.observed import known_labels
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


def test_the_chosen_rule_beats_the_one_for_fresh_networks_on_a_trained_one() -> None:
    view = _view()
    reader = Reader(view, strangers(photos(32), CROPS))
    told = reader.to_json()
    assert told["rule"] in candidates() and told["batches"] == BATCHES // 2
    assert told["overlap"] > 0.8
    assert 0 <= told["right"] <= told["overlap"] <= 1
    read = reader(view)
    assert view.reads == frozenset()
    assert len(read) == 4 and list(read) == sorted(read)
    torch.testing.assert_close(known_labels(view, read), torch.tensor(read))


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
