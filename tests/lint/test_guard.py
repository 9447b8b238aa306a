"""A client that refuses a round, and changes nothing in any other."""

from typing import Any

import pytest
import torch

from leakatlas import models
from leakatlas.blocks import readout
from leakatlas.data import bundled
from leakatlas.errors import ProtocolError
from leakatlas.fl import Client, FedAVG, Federation, FedSGD, Protocol, TamperedModel, acts_at, edits
from leakatlas.lint import LintGuard, Verdict, lint

SIZE = 16


def federation(protocol: Protocol, *guards: LintGuard) -> Federation:
    images = bundled.patches(SIZE, 16)
    clients = {c: Client(images.images[8 * c : 8 * c + 8], images.labels[8 * c : 8 * c + 8])
               for c in range(2)}  # fmt: skip
    return Federation(models.build("convnet", size=SIZE, width=4), clients, protocol, guards)


N = 3 * SIZE * SIZE
BINS = readout.bin_edges("normal", 32).float()
IMPRINT = edits.Imprint(torch.full((N,), 1 / N), BINS)
TAMPERED = TamperedModel(edits=(IMPRINT,))


@pytest.mark.parametrize("protocol", [FedSGD(), FedAVG(epochs=2, batch_size=4, lr=0.01)])
def test_honest_rounds_are_as_without_the_guard(protocol: Protocol) -> None:
    plain, guarded = federation(protocol), federation(protocol, LintGuard())
    for _ in range(2):
        a, b = plain.play_round(apply=True), guarded.play_round(apply=True)
        for client in a.updates:
            for name, tensor in a.updates[client].tensors.items():
                assert torch.equal(tensor, b.updates[client].tensors[name])
    assert guarded.clients[0].memories["lint_guard"]["judged"] == 1


@pytest.mark.parametrize("use_batch", [True, False])
def test_a_tampered_model_is_refused_with_the_evidence(use_batch: bool) -> None:
    guarded = federation(FedSGD(), LintGuard(use_batch=use_batch))
    with pytest.raises(ProtocolError, match=r"Client 0 refuses round 0.*one direction"):
        guarded.play_round(sent=TAMPERED)


def test_a_model_that_changes_its_architecture_between_rounds_is_refused() -> None:
    guarded = federation(FedSGD(), LintGuard(use_batch=False))
    guarded.play_round()
    with pytest.raises(ProtocolError, match=r"(?s)refuses round 1.*not the agreed one"):
        guarded.play_round(sent=TAMPERED)


def test_who_missed_rounds_is_not_alarmed_by_the_distance() -> None:
    """D17 compares consecutive rounds only; who was there in the last one does get its alarm."""
    guarded = federation(FedSGD(), LintGuard())
    guarded.play_round(cohort=(0,))
    guarded.play_round(cohort=(1,))
    elsewhere = models.build("convnet", size=SIZE, width=4, seed=7)
    guarded.model.load_state_dict(elsewhere.state_dict())
    with pytest.raises(ProtocolError, match=r"Client 1 refuses round 2.*\(D17\)"):
        guarded.play_round(cohort=(0, 1))
    assert guarded.clients[0].memories["lint_guard"]["judged"] == 2


def test_switched_off_it_lets_anything_pass() -> None:
    off = federation(FedSGD(), LintGuard(enabled=False))
    off.play_round(sent=TAMPERED)
    assert off.clients[0].memories.get("lint_guard", {}) == {}


def test_the_model_is_judged_once_a_round(monkeypatch: pytest.MonkeyPatch) -> None:
    rounds: list[int] = []

    def counted(*args: Any, **kwargs: Any) -> Verdict:
        rounds.append(1)
        return lint(*args, **kwargs)

    monkeypatch.setattr("leakatlas.lint.guard.lint", counted)
    federation(FedAVG(epochs=2, batch_size=2, lr=0.01), LintGuard()).play_round(cohort=(0,))
    assert len(rounds) == 1
    assert acts_at(LintGuard()) == ("batch",)
