"""What the real Flower library carried is read, replayed, measured and guarded without it."""

from __future__ import annotations

import math

import pytest
import torch

import leakatlas
from leakatlas.audit.promises import checked
from leakatlas.fl import FedAVG
from leakatlas.fl.recording import Place, protocol_of, read_recording
from leakatlas.integrations.guard import Guard, judged
from tests.integrations.recorded import FLOWER, SETTINGS, batch, make


def test_the_round_is_what_the_described_client_sends() -> None:
    recording = read_recording(FLOWER, place="raw")
    assert recording.last.framework.startswith("flwr ")
    assert recording.last.examples == 4
    protocol = protocol_of(recording.last.settings, kind=recording.last.kind)
    assert protocol == FedAVG(epochs=2, batch_size=2, lr=0.05)
    found = leakatlas.doctor(
        make(), batch(), captured=recording.capture(make()), protocol=protocol, threat="B"
    ).replay
    assert found.residual is not None
    assert found.residual <= 1e-5
    wrong = FedAVG(epochs=2, batch_size=2, lr=0.1)
    told = leakatlas.doctor(
        make(), batch(), captured=recording.capture(make()), protocol=wrong, threat="B"
    ).replay
    assert not told.expected


@pytest.mark.parametrize("place", ["raw", "wire"])
def test_counters_arrive_as_they_are(place: Place) -> None:
    last = read_recording(FLOWER, place=place).last
    counter = last.received["1.num_batches_tracked"]
    assert (counter.shape, counter.dtype) == ((), torch.int64)
    raw = read_recording(FLOWER, place="raw").last
    assert raw.sent["1.num_batches_tracked"] == 4


def test_the_difference_of_the_places_is_the_noise() -> None:
    raw, wire = (read_recording(FLOWER, place=place).last for place in ("raw", "wire"))
    moved = {n: (t - raw.received[n]).double() for n, t in raw.sent.items()}
    norm = math.sqrt(sum(float(t.square().sum()) for t in moved.values()))
    clip = min(1.0, float(SETTINGS["dp-clipping-norm"]) / norm)
    floats = [n for n, t in raw.sent.items() if t.is_floating_point()]
    added = [wire.sent[n].double() - raw.received[n] - clip * moved[n] for n in floats]
    noise = torch.cat([t.flatten() for t in added])
    promised = 0.01 * math.sqrt(2 * math.log(1.25 / 1e-5)) / 5.0
    assert float(noise.std()) == pytest.approx(promised, rel=5 / math.sqrt(2 * len(noise)))


def test_what_the_noise_promised_is_judged() -> None:
    (said,) = checked(read_recording(FLOWER, place="wire"))
    assert "NOT given" in said
    assert "each of 3 rounds" in said


def test_a_guard_judges_what_arrived() -> None:
    received = dict(read_recording(FLOWER, place="wire").last.received)
    guard = Guard(model=make, on_alarm="refuse")
    assert judged(guard, received, client="77") == ""
    rows = torch.full((3, 144), 1.0 / 144)
    received |= {"4.weight": rows, "4.bias": -torch.linspace(0.0, 0.5, 3)}
    assert "looks tampered with" in judged(guard, received, client="77")
