from __future__ import annotations

import pytest
import torch
from torch import nn

from leakatlas import models
from leakatlas.defenses.heuristic.model.spn import SPN, Polarised, heads, polarisation
from leakatlas.errors import UnsupportedModel
from leakatlas.fl import FedAVG, FedSGD, Protocol
from tests.conftest import build_stage, relative_error
from tests.defenses.heuristic.probes import observed, readout_error, replayed

SMALL = SPN(code_length=8)
WIDTH = {"width": 4}


def _upload(alpha: float, key: int | None = None) -> dict[str, torch.Tensor]:
    stage = build_stage(
        model="convnet", settings=WIDTH, examples=3, defenses=(SPN(code_length=8, alpha=alpha),)
    )
    federation = stage.federation
    if key is not None:
        draw = torch.Generator().manual_seed(key)
        own = federation.clients[0].private
        for name in federation.private_names:
            shape = dict(federation.model.state_dict())[name].shape
            drawn = torch.randn(shape, generator=draw, dtype=torch.float64)
            own[name] = drawn.sign() if name.endswith("codes") else drawn
    return dict(federation.play_round().updates[0].tensors)


def test_the_loss_is_the_formula() -> None:
    draw = torch.Generator().manual_seed(0)
    v = torch.randn(3, 5, generator=draw, dtype=torch.float64)
    codes = torch.randn(4, 5, generator=draw, dtype=torch.float64).sign()
    y = torch.tensor([2, 0, 2])
    total = 0.0
    for i in range(3):
        for j in range(5):
            total += max(0.0, 1 - float(codes[y[i], j]) * float(v[i, j]))
    assert float(polarisation(v, codes, y)) == pytest.approx(total / 3)
    soft = nn.functional.one_hot(y, 4).double()
    assert float(polarisation(v, codes, soft)) == pytest.approx(total / 3)


@pytest.mark.parametrize("protocol", [FedSGD(), FedAVG(epochs=2, batch_size=2, lr=0.1)])
def test_branch_and_codes_stay_and_differ_between_clients(protocol: Protocol) -> None:
    stage = build_stage(
        model="convnet", settings=WIDTH, examples=3, clients=2, protocol=protocol,
        defenses=(SMALL,),
    )  # fmt: skip
    federation = stage.federation
    record = federation.play_round(apply=True)
    assert {n.split(".", 1)[1] for n in federation.private_names} == {
        "branch.weight", "branch.bias", "codes",
    }  # fmt: skip
    for update in record.updates.values():
        sent = {*update.tensors, *update.buffers_before, *update.buffers_after}
        assert not sent & federation.private_names
    ours, theirs = (federation.clients[i].private for i in (0, 1))
    codes = next(n for n in federation.private_names if n.endswith("codes"))
    assert set(ours[codes].unique().tolist()) == {-1.0, 1.0}
    assert not torch.equal(ours[codes], theirs[codes])


def test_the_head_does_not_depend_on_the_key_and_the_backbone_does() -> None:
    a, b = _upload(1.0, key=0), _upload(1.0, key=1)
    public = heads(a)
    assert len(public) == 2
    for name in a:
        assert torch.equal(a[name], b[name]) == (name in public)


def test_the_backbone_is_linear_in_alpha() -> None:
    half, one, two = (_upload(alpha, key=0) for alpha in (0.5, 1.0, 2.0))
    for name in half:
        torch.testing.assert_close(
            two[name] - one[name], 2 * (one[name] - half[name]), rtol=1e-9, atol=1e-12
        )


def test_the_branch_learns_its_codes_and_a_client_predicts_by_them() -> None:
    stage = build_stage(
        model="convnet", settings=WIDTH, examples=4,
        protocol=FedAVG(epochs=60, batch_size=4, lr=0.05),
        defenses=(SPN(code_length=8, predict_by="codes"),),
    )  # fmt: skip
    federation = stage.federation
    x, y = federation.clients[0].x, federation.clients[0].y
    before = (federation.evaluation_model(0)(x).argmax(1) == y).double().mean()
    federation.play_round(apply=True)
    reading = federation.evaluation_model(0)
    assert not any(isinstance(m, Polarised) for m in reading.modules())
    after = (reading(x).argmax(1) == y).double().mean()
    assert float(after) == 1.0 > float(before)


def test_predictions_by_the_head_are_the_public_network() -> None:
    model = models.build("convnet", size=8, **WIDTH).double().eval()
    defended = SMALL.model(model)
    x = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)).double()
    assert torch.equal(SMALL.evaluate(defended, {})(x), model(x))


def test_the_first_layer_is_read_exactly_whatever_the_loss() -> None:
    """Negative: the secret changes the error at a unit, and ratios divide it out."""
    assert readout_error(SPN(code_length=8, alpha=10.0)) < 1e-9


def test_the_head_alone_is_an_exact_zero_at_the_true_batch() -> None:
    view, x = observed(SMALL)
    g = dict(view.update.tensors)
    assert relative_error(replayed(view, x, adaptive=False), g) > 0.05
    assert relative_error(replayed(view, x), g) < 1e-9
    other = torch.zeros_like(x)
    assert relative_error(replayed(view, other), g) > 1e-4


def test_a_model_without_a_linear_head_is_refused() -> None:
    for model in (nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten()), nn.Linear(3, 2)):
        with pytest.raises(UnsupportedModel, match="linear head"):
            SMALL.model(model)


def test_a_head_that_is_not_used_is_said() -> None:
    polarised = Polarised(nn.Linear(3, 2), 4)
    with pytest.raises(UnsupportedModel, match="register the head last"):
        polarised.take()
