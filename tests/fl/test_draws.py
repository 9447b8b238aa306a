"""Dropout and its kin: recorded by the client, replayed exactly, averaged by those untold."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import StochasticDepth

from leakatlas.data import ImageSet
from leakatlas.errors import UnsupportedModel
from leakatlas.fl import FedAVG, FedSGD, ModelRef, Protocol, Scenario, Stage, View, draws, stage
from leakatlas.threat import Grant
from tests.conftest import relative_error


class Restless(nn.Module):
    """Every source of draws that a vision model has: modules, functions, attention, depth."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(12, 8)
        self.dropout = nn.Dropout(0.3)
        self.depth = StochasticDepth(0.5, "row")
        self.block = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.2)
        self.alpha = nn.AlphaDropout(0.1)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x.flatten(1)))
        h = F.dropout(self.dropout(h), 0.25, self.training)
        h = self.alpha(h + self.depth(h))
        tokens = self.block(h.reshape(len(h), 1, 8).expand(-1, 3, -1))
        q = tokens.reshape(len(h), 3, 2, 4).transpose(1, 2)
        mixed = F.scaled_dot_product_attention(q, q, q, dropout_p=0.2 if self.training else 0.0)
        flat = mixed.transpose(1, 2).reshape(len(h), 3, 8)
        out: Tensor = self.head(F.dropout1d(flat, 0.2, self.training).mean(1))
        return out


def _model() -> nn.Module:
    torch.manual_seed(2)
    return Restless().double()


def _stage(protocol: Protocol, *grants: Grant) -> Stage:
    generator = torch.Generator().manual_seed(7)
    images = ImageSet(torch.rand(3, 3, 2, 2, generator=generator), torch.arange(3),
                      ("a", "b", "c"), "noise")  # fmt: skip
    scenario = Scenario(model=ModelRef("object", "restless"), letter="C", protocol=protocol,
                        grants=frozenset({Grant.LABELS, *grants}))  # fmt: skip
    return stage(scenario, model=_model(), victims=images)


def test_recording_changes_no_bit_of_plain_dropout() -> None:
    model, x = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.4)), torch.randn(5, 4)
    torch.manual_seed(1)
    plain = model(x)
    torch.manual_seed(1)
    with draws.recorded() as found:
        assert torch.equal(model(x), plain)
    assert [tuple(mask.shape) for mask in found] == [(5, 4)]


def test_a_replay_of_the_draws_is_the_same_pass_and_new_ones_are_another() -> None:
    model, x = _model().train(), torch.randn(4, 3, 2, 2, dtype=torch.float64)
    with draws.recorded() as found:
        once = model(x)
    with draws.replayed(found):
        assert torch.equal(model(x), once)
    assert not torch.allclose(model(x), once)


def test_the_mean_network_is_that_of_eval_mode() -> None:
    model, x = _model().train(), torch.randn(4, 3, 2, 2, dtype=torch.float64)
    with draws.averaged():
        mean = model(x)
    torch.testing.assert_close(mean, model.eval()(x))


def test_draws_of_leaves_model_and_random_state_alone() -> None:
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(12, 2)).train()
    before, state = model[0].running_mean.clone(), torch.get_rng_state()  # type: ignore[operator]  # nn.Sequential's items
    assert draws.draws_of(model, torch.randn(4, 3, 2, 2, generator=torch.Generator())) == ()
    assert torch.equal(model[0].running_mean, before)  # type: ignore[arg-type]  # as above
    assert torch.equal(torch.get_rng_state(), state)
    assert len(draws.draws_of(_model().train(), torch.zeros(2, 3, 2, 2).double())) > 5


def test_places_are_those_of_the_draws_with_their_rates() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 5), nn.Dropout(0.2), nn.Dropout(0.75))
    x, state = torch.zeros(3, 3, 2, 2), torch.get_rng_state()
    found = draws.places(model.train(), x)
    assert [place.shape for place in found] == [(3, 5), (3, 5)]
    assert [place.high for place in found] == pytest.approx([1.25, 4.0])
    assert [place.keep for place in found] == pytest.approx([0.8, 0.25])
    assert torch.equal(torch.get_rng_state(), state)
    assert draws.places(model.eval(), x) == ()


def test_a_draw_without_a_mask_has_no_place() -> None:
    model = nn.Sequential(nn.Flatten(), nn.AlphaDropout(0.5)).train()
    with pytest.raises(UnsupportedModel, match="no mask to take hold of"):
        draws.places(model, torch.zeros(1, 3, 2, 2))


def test_a_mask_may_be_a_variable_of_its_own() -> None:
    model, x = nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.5)).double(), torch.randn(2, 4).double()
    mask = torch.ones(2, 3, dtype=torch.float64, requires_grad=True)
    with draws.replayed([mask]):
        total = model(x).sum()
    (slope,) = torch.autograd.grad(total, mask)
    torch.testing.assert_close(slope, model[0](x))


@pytest.mark.parametrize(
    "protocol",
    [FedSGD(mode="train"), FedAVG(epochs=2, batch_size=2, lr=0.1)],
    ids=["one step", "four steps"],
)
def test_the_masks_settle_the_replay_and_are_hidden_without_the_grant(
    protocol: Protocol, tmp_path: object
) -> None:
    from pathlib import Path

    told = _stage(protocol, Grant.DROPOUT_MASKS)
    view = told.view([told.federation.play_round()])
    x = told.federation.clients[0].x
    assert relative_error(view.replay(x, view.labels), view.update.tensors) < 1e-10
    view.save(Path(str(tmp_path)))
    again = View.load(Path(str(tmp_path)), model=_model())
    assert relative_error(again.replay(x, view.labels), view.update.tensors) < 1e-10

    untold = _stage(protocol)
    view = untold.view([untold.federation.play_round()])
    assert not view.has("dropout_masks")
    first, second = (view.replay(x, view.labels) for _ in range(2))
    assert all(torch.equal(first[n], second[n]) for n in first)
    assert relative_error(first, view.update.tensors) > 1e-2


class Looking(nn.Module):
    """Decides by what it sees, and draws beside a tensor of its own."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.fc, self.p = nn.Linear(12, 3), p

    def forward(self, x: Tensor) -> Tensor:
        h = x.flatten(1) + torch.zeros(12, dtype=x.dtype)
        if float(h.mean()) > 0:
            h = F.dropout(h, self.p, self.training)
        out: Tensor = self.fc(h)
        return out


@pytest.mark.parametrize(
    ("model", "drawn"),
    [
        (_model(), True),
        (_model().eval(), False),
        (nn.Sequential(nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(12, 2)), False),
        (nn.Sequential(nn.BatchNorm2d(3), nn.Dropout(0.1), nn.Flatten()), True),
        (nn.Sequential(nn.Flatten(), nn.Dropout(0.0)), False),
        (Looking(0.5), True),
        (Looking(0.0), False),
    ],
)
def test_whether_anything_is_drawn_is_known_without_running_it(
    model: nn.Module, drawn: bool
) -> None:
    before = {n: t.clone() for n, t in [*model.named_parameters(), *model.named_buffers()]}
    x = torch.rand(2, 3, 2, 2, dtype=next(iter(before.values()), torch.ones(1)).dtype) + 0.1
    state = torch.get_rng_state()
    assert draws.draws_anything(model, x) is drawn
    assert bool(draws.draws_of(model, x)) is drawn
    assert torch.equal(torch.get_rng_state(), state)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        assert torch.equal(tensor, before[name])
