"""The doctor finds the one thing that is wrong, whichever it is."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch

from leakatlas import data, models
from leakatlas.audit import audit, diagnosis, doctor
from leakatlas.audit.consistency import check_replay
from leakatlas.audit.described import relative_residual
from leakatlas.audit.diagnosis import SPECTRAL_LEFT_OUT, best_informed, examine
from leakatlas.errors import InvalidInput, UnsupportedModel
from leakatlas.fl import Client, FedAVG, Federation, FedSGD, ModelRef, Protocol, Scenario, Update
from leakatlas.fl.scenario import Stage


def captured(protocol: Protocol, **model: Any) -> tuple[Federation, Update, Any]:
    photos = data.photos(32).subset(range(5))
    net = models.build("convnet", in_channels=3, size=32, classes=8, width=4, **model)
    federation = Federation(net, {0: Client(photos.images, photos.labels)}, protocol)
    record = federation.play_round()
    return federation, record.updates[0], record


@pytest.mark.parametrize(
    "protocol",
    [
        FedSGD(),
        FedSGD(reduction="sum", mode="train"),
        FedAVG(epochs=2, batch_size=2, lr=0.05),
        FedAVG(epochs=2, batch_size=2, lr=0.05, shuffle=True, momentum=0.9),
        FedAVG(epochs=1, batch_size=2, lr=0.01, optimizer="adam"),
    ],
)
def test_a_true_description_is_consistent(protocol: Protocol) -> None:
    federation, update, record = captured(protocol, norm="batch")
    client = federation.clients[0]
    check = check_replay(
        record.received[0], update, client.x, client.y, protocol, order=record.order[0]
    )
    assert check.consistent and check.culprit == ""


@pytest.mark.parametrize(
    ("real", "claimed", "culprit"),
    [
        (FedSGD(mode="train"), FedSGD(mode="eval"), "mode"),
        (FedSGD(reduction="sum"), FedSGD(reduction="mean"), "reduction"),
        (
            FedAVG(epochs=2, batch_size=2, lr=0.05, optimizer="adam"),
            FedAVG(epochs=2, batch_size=2, lr=0.05),
            "optimizer",
        ),
        (
            FedAVG(epochs=2, batch_size=2, lr=0.05, momentum=0.9),
            FedAVG(epochs=2, batch_size=2, lr=0.05),
            "momentum",
        ),
    ],
)
def test_a_wrong_description_is_named(real: Protocol, claimed: Protocol, culprit: str) -> None:
    federation, update, record = captured(real, norm="batch")
    update = replace(update, reduction="mean")  # the message does not say
    client = federation.clients[0]
    check = check_replay(
        record.received[0], update, client.x, client.y, claimed, order=record.order[0]
    )
    assert not check.consistent
    assert check.culprit == culprit, check.explanation


def test_sign_scale_and_weights_are_named() -> None:
    federation, update, record = captured(FedSGD())
    client, model = federation.clients[0], record.received[0]

    def check(changed: Update) -> Any:
        return check_replay(model, changed, client.x, client.y, FedSGD())

    turned = update.with_tensors({n: -t for n, t in update.tensors.items()})
    assert check(turned).culprit == "sign"
    scaled = update.with_tensors({n: 0.01 * t for n, t in update.tensors.items()})
    found = check(scaled)
    assert found.culprit == "scale" and "0.01 times" in found.explanation
    with torch.no_grad():
        next(model.parameters()).add_(0.1)
    found = check(update)
    assert found.culprit == "weights" and "before its first step" in found.explanation


def test_a_wrong_order_is_named() -> None:
    protocol = FedAVG(epochs=1, batch_size=2, lr=0.5, mode="eval")
    federation, update, record = captured(protocol)
    client = federation.clients[0]
    wrong = tuple(reversed(record.order[0]))
    check = check_replay(record.received[0], update, client.x, client.y, protocol, order=wrong)
    assert check.culprit == "order"


class Coarse(torch.nn.Module):
    """Loses the last digits of pixels in single precision, and none in double."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = torch.nn.Linear(3 * 32 * 32, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scores: torch.Tensor = self.fc(((x + 2.0**14) - 2.0**14).flatten(1))
        return scores


def test_what_hangs_on_the_last_digit_is_no_wrong_description() -> None:
    torch.manual_seed(0)
    model, photos = Coarse(), data.photos(32).subset(range(4))
    claimed = FedAVG(epochs=1, batch_size=2, lr=0.01)
    played = Federation(
        copy.deepcopy(model).double(), {0: Client(photos.images.double(), photos.labels)}, claimed
    ).play_round()  # fmt: skip
    sent = played.updates[0]
    update = sent.with_tensors({n: t.float() for n, t in sent.tensors.items()})
    update = replace(update, state_hash="")

    def check(protocol: Protocol, x: torch.Tensor = photos.images) -> Any:
        return check_replay(model, update, x, photos.labels, protocol)

    found = check(claimed)
    assert found.residual > 1e-3
    assert (found.culprit, found.expected, found.consistent) == ("rounding", True, False)
    assert "the last digit" in found.explanation
    # Of anything larger it explains nothing.
    for wrong in (replace(claimed, lr=0.02), replace(claimed, momentum=0.9)):
        assert not check(wrong).expected
    assert not check(claimed, photos.images.flip(0)).expected


def test_nonsense_is_called_unknown() -> None:
    federation, update, record = captured(FedSGD())
    client = federation.clients[0]
    noise = torch.Generator().manual_seed(0)
    other = update.with_tensors(
        {n: torch.randn(t.shape, generator=noise) for n, t in update.tensors.items()}
    )
    check = check_replay(record.received[0], other, client.x, client.y, FedSGD())
    assert check.culprit == "unknown" and "preprocessing" in check.explanation


def test_residual_of_two_zeros_is_zero() -> None:
    zero = {"w": torch.zeros(3)}
    assert relative_residual(zero, zero) == 0.0
    assert relative_residual({"w": torch.ones(3)}, zero) == 1.0


def stage(protocol: Protocol, labels: list[int], **model: Any) -> Stage:
    reference = ModelRef(
        "builtin", "convnet", {"in_channels": 3, "size": 32, "classes": 8, "width": 4, **model}
    )
    photos = data.photos(32).subset(range(len(labels)))
    victims = replace(photos, labels=torch.tensor(labels))
    scenario = Scenario(model=reference, protocol=protocol)
    return Stage(scenario, reference.build(), {0: victims}, data.Box.unit(3))


def test_findings_name_duplicates_steps_and_batchnorm() -> None:
    found = examine(stage(FedAVG(epochs=2, batch_size=2), [0, 0, 1, 2], norm="batch"))
    text = " ".join(found.findings)
    assert "1 of 4 labels repeat" in text
    assert "4 local steps" in text
    assert "batch normalisation in train mode" in text
    assert found.facts["unknown pixels"] == 4 * 3 * 32 * 32
    assert found.facts["expected singleton bins (4 bins per image)"] == pytest.approx(
        4 * (1 - 1 / 16) ** 3
    )


@pytest.mark.parametrize(
    ("protocol", "said"),
    [
        (FedAVG(epochs=2, batch_size=2), "give them away, as their mean over 2 local steps"),
        (FedSGD(mode="train"), "give them away, as they are"),
        (FedSGD(mode="train", shared=("!@BatchNorm*",)), "does not hold unless they are granted"),
        (FedSGD(mode="eval"), "serve the adversary as an image prior"),
    ],
)
def test_whether_the_upload_tells_the_batchs_statistics_is_said(
    protocol: Protocol, said: str
) -> None:
    found = examine(stage(protocol, [0, 1], norm="batch"))
    assert said in " ".join(found.findings)


def test_too_few_equations_are_said() -> None:
    found = examine(stage(FedSGD(), [0, 1, 2, 3]))
    assert found.facts["equations per unknown"] < 1
    assert "Fewer equations than unknown pixels" in " ".join(found.findings)


def test_a_captured_update_with_nan_is_refused() -> None:
    live = stage(FedSGD(), [0, 1])
    update = live.federation.play_round().updates[0]
    name = next(iter(update.tensors))
    broken = dict(update.tensors)
    broken[name] = torch.full_like(broken[name], float("nan"))
    with pytest.raises(InvalidInput, match="non-finite"):
        examine(live, captured=update.with_tensors(broken))


# -- measures before any attack --------------------------------------------------------------------


@pytest.mark.parametrize("name", ["features", "running_var"])
def test_doctor_and_audit_refuse_a_model_that_is_not_finite(name: str) -> None:
    net = models.build("convnet", in_channels=3, size=8, classes=8, width=4, norm="batch")
    tensors = {**dict(net.named_parameters()), **dict(net.named_buffers())}
    spoiled = next(n for n in tensors if name in n)
    tensors[spoiled].data.view(-1)[0] = torch.inf
    photos = data.photos(8).subset(range(2))
    batch = (photos.images, photos.labels)
    for ask in (doctor, audit):
        with pytest.raises(InvalidInput, match=f"model ConvNet holds 1 values at '{spoiled}'"):
            ask(net, batch, threat="A")


def test_measures_of_the_quick_tiers_come_with_direction_assumption_and_words() -> None:
    found = examine(stage(FedSGD(), [0, 1, 2]), letters=("A", "E"))
    by_name = {m.name: m for m in found.measures}
    assert {m.tier for m in found.measures} == {"static", "forward"}
    assert by_name["label_exposure"].value == 1.0  # an untrained network with a bias
    assert by_name["linear_recall"].value == 0.0  # one ReLU-free head, all rows shared
    assert "threat model E" in by_name["label_rules"].note  # the better informed of the two
    assert found.left_out == SPECTRAL_LEFT_OUT and "minutes" in found.left_out
    for entry in found.to_json()["measures"]:
        assert entry["meaning"] and entry["title"] and entry["assumption"]
        assert entry["direction"] in ("higher", "lower", "neither")


def test_measures_read_the_captured_update_not_the_simulated_one() -> None:
    live = stage(FedSGD(), [0, 1])
    update = live.federation.play_round().updates[0]
    kept = {n: t for n, t in update.tensors.items() if n not in ("fc.weight", "fc.bias")}
    found = examine(live, captured=replace(update, tensors=kept))
    rules = next(m for m in found.measures if m.name == "label_rules")
    full = next(m for m in examine(live).measures if m.name == "label_rules")
    assert rules.value is not None and full.value is not None
    assert rules.value < full.value  # the head's gradient was not in it


def test_gradients_too_large_for_seconds_are_left_out_by_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(diagnosis, "ENTRIES", 1_000)
    found = {m.name: m for m in examine(stage(FedSGD(), [0, 1])).measures}
    assert found["gradient_norm"].value is None
    assert "more than the 1,000" in found["gradient_norm"].note
    assert found["label_exposure"].value == 1.0  # needs no gradient of a single example


def test_a_model_that_no_measure_understands_keeps_its_other_findings(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise UnsupportedModel("weights of another kind")

    monkeypatch.setattr(diagnosis, "assess", refuse)
    found = examine(stage(FedSGD(), [0, 0]))
    assert found.measures == () and "weights of another kind" in found.left_out
    assert found.replay.consistent and "1 of 2 labels repeat" in " ".join(found.findings)


def test_the_best_informed_letter_is_a_set_not_an_order() -> None:
    assert best_informed("ABCD") == "D"
    assert best_informed("EF") == "E"  # F tampers, but lacks surrogate data and distribution
    assert best_informed("A") == "A"
