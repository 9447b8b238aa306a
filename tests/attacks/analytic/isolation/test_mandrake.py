from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from leakatlas.attacks.analytic.isolation.mandrake import (
    MANDRAKE,
    MIB,
    WEIGHT,
    SparseRows,
    dense_bytes,
    packed,
    sparse_bytes,
    upload_bytes,
)
from leakatlas.bench.harness import Trial, observe, run_trial
from leakatlas.blocks.watch import Watch
from leakatlas.data import Box
from leakatlas.defenses.formal.crypto.secure_aggregation import SecureAggregation
from leakatlas.errors import NotGranted
from leakatlas.fl import FedAVG, FedSGD, Stage, Tampering
from leakatlas.fl.edits import Imprinted, SplitImprint, SplitImprintLayers
from leakatlas.threat import Vantage
from tests.attacks.analytic.support import (
    UNIT,
    alone_in_bin,
    errors,
    extremes,
    likeness,
    outermost,
    psnr,
    same_after_saving,
    small_stage,
)
from tests.attacks.case import LENET, Case
from tests.conftest import BOX

CASE = Case({"bins": 8}, {**LENET, "clients": 2}, boxed=True)

CLIENTS = 4


def _stage(**settings: Any) -> Stage:
    chosen = {
        "letter": "G", "size": 16, "clients": CLIENTS, "examples": 8,
        "vantage": Vantage.AGGREGATE, **settings,
    }  # fmt: skip
    return small_stage(**chosen)


def _alone(trial: Trial, clients: int = CLIENTS) -> Tensor:
    """Who has a bin of their own client's block to themselves, from the true brightness."""
    h = trial.truth.images.double().flatten(1).mean(dim=1)
    return torch.cat([alone_in_bin(part, trial.view.key["edges"]) for part in h.chunk(clients)])


def _cosines(trial: Trial, attack: MANDRAKE) -> Tensor:
    """Of every private image with its most similar row, before the clip to pixels, ``(N,)``."""
    columns = trial.view.update.tensors[WEIGHT].chunk(CLIENTS, dim=1)
    rows = [attack.read_block(part, trial.view.key["edges"], (3, 16, 16))[0] for part in columns]
    truth = torch.nn.functional.normalize(trial.truth.images.double().flatten(1))
    found = torch.nn.functional.normalize(torch.cat(rows).flatten(1))
    best: Tensor = (truth @ found.T).max(dim=1).values
    return best


# -- the arithmetic of the paper -------------------------------------------------------------------


def test_the_ratio_of_the_abstract() -> None:
    setting = {"bins": 256, "clients": 1000}
    dense, sparse = dense_bytes((3, 32, 32), **setting), sparse_bytes((3, 32, 32), **setting)
    assert dense / MIB == pytest.approx(6001, abs=0.5)
    assert sparse / MIB == pytest.approx(18.3, abs=0.05)
    assert dense / sparse == pytest.approx(327.3, abs=0.05)


@pytest.mark.parametrize(
    ("shape", "published"),
    [((1, 28, 28), 153.2), ((3, 32, 32), 600.1), ((3, 64, 64), 2400), ((3, 256, 256), 38_400)],
    ids=["MNIST", "CIFAR-100", "Tiny ImageNet", "ImageNet"],
)
def test_the_dense_column_for_100_clients(shape: tuple[int, ...], published: float) -> None:
    found = dense_bytes(shape, bins=256, clients=100) / MIB
    assert found == pytest.approx(published, rel=4e-4)


def _layers(tampering: Tampering | None, client: int) -> SplitImprintLayers:
    """What a client builds in front of its model."""
    assert tampering is not None and isinstance(tampering.sent, Mapping)
    (edit,) = tampering.sent[client].edits
    assert isinstance(edit, SplitImprint)
    return edit.layers()


def test_the_arithmetic_is_that_of_the_tensors_that_are_sent() -> None:
    stage = _stage(dtype=torch.float32)
    attack = MANDRAKE(bins=24)
    tampering = attack.tamper(stage.view(), generator=torch.Generator(), watch=Watch())
    block = _layers(tampering, 1)
    first = packed(block).coalesce()
    assert first.indices().element_size() == 8
    total = first.values().nbytes + first.indices().nbytes
    rest = (block.first.bias, block.second.weight, block.second.bias)
    total += sum(p.nbytes for p in (*rest, block.conv.weight, block.conv.bias))
    assert total == sparse_bytes((3, 16, 16), bins=24, clients=CLIENTS)
    assert torch.equal(first.to_dense(), block.first.weight)
    assert first.values().numel() == 24 * 768  # whatever the number of clients
    dense = sum(p.nbytes for p in block.parameters())
    assert dense == upload_bytes((3, 16, 16), bins=24, clients=CLIENTS)


def test_a_client_trains_on_the_coordinates_alone_and_gets_the_same_gradient() -> None:
    stage = _stage()
    attack = MANDRAKE(bins=24)
    tampering = attack.tamper(stage.view(), generator=torch.Generator(), watch=Watch())
    x, y = stage.federation.clients[2].x, stage.federation.clients[2].y
    model = stage.federation.model
    whole, block = _layers(tampering, 2), _layers(tampering, 2)
    dense, sparse = Imprinted(whole, model), Imprinted(block, model)
    layer = SparseRows(packed(block), block.first.bias)
    setattr(block, "first", layer)  # noqa: B010  # the attribute's declared type is a dense layer
    assert sum(p.numel() for p in layer.parameters()) == 24 * (768 + 1)
    assert torch.allclose(sparse(x), dense(x), rtol=1e-12, atol=1e-12)
    for model in (sparse, dense):
        torch.nn.functional.cross_entropy(model(x), y).backward()
    own, every = layer.values.grad, whole.first.weight.grad
    assert own is not None and own.shape == (24 * 768,) and every is not None
    assert torch.allclose(layer.coordinates(own).to_dense(), every, rtol=1e-10, atol=1e-15)


def test_memory_grows_with_the_clients_by_one_small_kernel_each() -> None:
    sizes = [sparse_bytes((3, 32, 32), bins=256, clients=n) for n in (1, 2, 1001)]
    assert sizes[1] - sizes[0] == (27 + 1) * 3 * 4
    assert sizes[2] - sizes[0] == 1000 * (27 + 1) * 3 * 4
    grown = [dense_bytes((3, 32, 32), bins=256, clients=n) for n in (1, 2)]
    assert grown[1] - grown[0] > 6 * MIB


# -- the attack ------------------------------------------------------------------------------------


@pytest.mark.parametrize("box", [UNIT, BOX], ids=["plain", "normalised"])
def test_alone_in_a_bin_of_the_own_block_is_the_image_up_to_a_factor(box: Box) -> None:
    attack = MANDRAKE(bins=32)
    trial = run_trial(_stage(box=box), attack)
    alone = _alone(trial)
    assert 0 < int(alone.sum()) < len(alone)
    cosine = _cosines(trial, attack)
    assert float(cosine[alone].min()) > 1 - 1e-12
    assert float(cosine[~alone].max()) < 1 - 1e-6


@pytest.mark.parametrize("box", [UNIT, BOX], ids=["plain", "normalised"])
def test_with_an_anchor_it_is_the_image(box: Box) -> None:
    trial = run_trial(_stage(box=box), MANDRAKE(bins=32, scale="anchor"))
    alone = _alone(trial)
    assert float(errors(trial)[alone].max()) < 1e-6
    assert float(errors(trial)[~alone].min()) > 1e-6


def test_the_middle_of_the_bin_is_closer_than_the_brightest_pixel() -> None:
    quality = {}
    for scale in ("midpoint", "max"):
        trial = run_trial(_stage(), MANDRAKE(bins=64, scale=scale))
        quality[scale] = psnr(trial)[_alone(trial)]
    assert float(quality["midpoint"].median()) > 30
    assert float(quality["midpoint"].mean()) > float(quality["max"].mean())


@pytest.mark.parametrize("box", [UNIT, BOX], ids=["plain", "normalised"])
@pytest.mark.parametrize("scale", ["max", "midpoint", "anchor"])
@pytest.mark.parametrize("tone", ["dark", "bright"])
def test_lone_images_in_the_outermost_bins_are_read(scale: Any, tone: str, box: Box) -> None:
    trial = run_trial(
        _stage(victims=extremes(CLIENTS, 8, tone), box=box), MANDRAKE(bins=32, scale=scale)
    )
    outer = outermost(trial, tone)
    assert int(outer.sum()) == CLIENTS and bool(_alone(trial)[outer].all())
    assert float(likeness(trial)[outer].min()) > 1 - 1e-6


def test_the_other_columns_are_zero_before_the_sum() -> None:
    _, records = observe(_stage(), MANDRAKE(bins=16))
    for position, update in enumerate(records[0].updates.values()):
        for name in (WEIGHT, "block.conv.weight"):
            parts = update.tensors[name].chunk(CLIENTS, dim=1 if name == WEIGHT else 0)
            assert [bool(part.any()) for part in parts] == [
                index == position for index in range(CLIENTS)
            ]


def test_the_sum_reads_like_the_lone_client_bit_for_bit() -> None:
    attack = MANDRAKE(bins=32)
    view, records = observe(_stage(), attack)
    edges = view.key["edges"]
    columns = view.update.tensors[WEIGHT].chunk(CLIENTS, dim=1)
    for client, update in records[0].updates.items():
        own = update.tensors[WEIGHT].chunk(CLIENTS, dim=1)[client]
        together, energy = attack.read_block(columns[client], edges, (3, 16, 16))
        lone, lone_energy = attack.read_block(own, edges, (3, 16, 16))
        # Four equal clients weigh 1/4 each, a power of two: not one bit is rounded.
        assert torch.equal(together, lone) and torch.equal(energy, lone_energy)


def test_one_clients_update_on_the_server_is_read_too() -> None:
    trial = run_trial(_stage(vantage=Vantage.SERVER), MANDRAKE(bins=32, scale="anchor"))
    alone = _alone(trial, 1)
    assert bool(alone.any()) and float(errors(trial)[alone].max()) < 1e-6
    notes = trial.found.notes
    assert notes["candidates/client_0"] == len(trial.images)


def test_secure_aggregation_does_not_help() -> None:
    trial = run_trial(
        _stage(defenses=(SecureAggregation(ring_bits=64),)), MANDRAKE(bins=32, scale="anchor")
    )
    alone = _alone(trial)
    assert bool(alone.any()) and float(errors(trial)[alone].max()) < 1e-4


def test_an_imprint_for_everybody_with_as_few_units_loses_to_columns_of_their_own() -> None:
    """The same 32 units for the pooled batch: every client is put into one block."""
    split = run_trial(_stage(), MANDRAKE(bins=32, scale="anchor"))
    pooled = run_trial(_stage(clients=1, examples=8 * CLIENTS), MANDRAKE(bins=32, scale="anchor"))
    hits = [int((errors(t) < 1e-6).sum()) for t in (split, pooled)]
    assert hits[0] > 1.3 * hits[1]


def test_an_active_kernel_elsewhere_is_cross_talk(monkeypatch: pytest.MonkeyPatch) -> None:
    stage = _stage()
    attack = MANDRAKE(bins=32, scale="anchor")
    clean = run_trial(stage, attack)
    build = SplitImprint.layers

    def crossing(edit: SplitImprint) -> SplitImprintLayers:
        layers = build(edit)
        if edit.group == 1:  # client 1 also feeds the columns of client 0
            with torch.no_grad():
                layers.conv.weight[:3] = layers.conv.weight[4:7]
        return layers

    monkeypatch.setattr(SplitImprint, "layers", crossing)
    exact = [(errors(t) < 1e-6)[:8] for t in (clean, run_trial(_stage(), attack))]
    assert int(exact[1].sum()) < int(exact[0].sum())


def test_candidates_are_traced_to_their_client_and_have_no_copies() -> None:
    trial = run_trial(_stage(), MANDRAKE(bins=32))
    notes = trial.found.notes
    assert sum(notes.values()) == len(trial.images)
    assert set(notes) == {f"candidates/client_{c}" for c in range(CLIENTS)}
    confidence = trial.found.confidence
    assert confidence is not None and bool(((confidence > 0) & (confidence <= 1)).all())


def test_public_images_are_needed() -> None:
    with pytest.raises(NotGranted, match="SURROGATE"):
        run_trial(_stage(letter="F"), MANDRAKE())


def test_outlook_counts_bins_bytes_and_steps() -> None:
    one_step = MANDRAKE(bins=32).outlook(_stage(protocol=FedSGD()).view())
    assert one_step.verdict == "applicable" and "one of 32 bins" in one_step.reason
    steps = MANDRAKE().outlook(_stage(protocol=FedAVG(epochs=2, batch_size=4)).view())
    assert steps.verdict == "unknown" and "4 local steps" in steps.reason
    without = _stage().view().without("surrogate")
    assert MANDRAKE().outlook(without).verdict == "hopeless"
    assert MANDRAKE().outlook(_stage(vantage=Vantage.PEER).view()).verdict == "hopeless"


@pytest.mark.parametrize("scale", ["midpoint", "anchor"])
def test_the_same_from_a_saved_view(scale: Any, tmp_path: Path) -> None:
    attack = MANDRAKE(bins=16, scale=scale)
    view, _ = observe(_stage(), attack)
    same_after_saving(attack, view, tmp_path)
