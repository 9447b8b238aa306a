"""Losses against the formulas of their papers, written out entry by entry."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from leakatlas.errors import InvalidInput, InvalidParameter, UnknownName
from leakatlas.fl import FedAVG, FedSGD, View
from leakatlas.fl.losses import LOSSES, Loss, PythonLoss, as_loss, loss_json, with_code
from leakatlas.threat import Grant
from tests.conftest import build_stage, relative_error

N, K = 5, 4


def _outputs() -> Tensor:
    return torch.randn(N, K, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def _classes() -> Tensor:
    return torch.tensor([0, 3, 1, 3, 2])


def _many() -> Tensor:
    return (_outputs() > 0.3).double()


def _naive(key: str, z: Tensor, y: Tensor) -> float:
    """The mean over the batch, one number at a time."""
    total = 0.0
    for row, target in zip(z.tolist(), y.tolist(), strict=True):
        p = [math.exp(v) for v in row]
        p = [v / sum(p) for v in p]
        if key == "cross_entropy":
            total += -math.log(p[target])
        elif key == "focal":
            total += -((1 - p[target]) ** 2) * math.log(p[target])
        elif key == "nll":
            total += -row[target]
        elif key == "bce":
            for v, t in zip(row, target, strict=True):
                s = 1 / (1 + math.exp(-v))
                total += -(t * math.log(s) + (1 - t) * math.log(1 - s)) / K
        else:
            total += sum((v - t) ** 2 for v, t in zip(row, target, strict=True)) / K
    return total / len(z)


@pytest.mark.parametrize("key", ["cross_entropy", "focal", "nll", "bce", "mse"])
def test_every_loss_is_its_formula_and_its_sum_is_the_mean_times_what_it_divided_by(
    key: str,
) -> None:
    loss = as_loss(key)
    z, y = _outputs(), _many() if loss.multilabel else _classes()
    assert float(loss(z, y)) == pytest.approx(_naive(key, z, y), rel=1e-12)
    divisor = N * K if loss.multilabel else N
    assert float(loss(z, y, "sum")) == pytest.approx(float(loss(z, y)) * divisor, rel=1e-12)


@pytest.mark.parametrize("key", sorted(set(LOSSES) - {"python"}))
def test_class_indices_equal_their_one_hot_vectors(key: str) -> None:
    loss, z, y = as_loss(key), _outputs(), _classes()
    hot = nn.functional.one_hot(y, K).double()
    torch.testing.assert_close(loss(z, y), loss(z, hot))


def test_one_output_takes_its_targets_as_they_are() -> None:
    z, y = _outputs()[:, :1], torch.tensor([1, 0, 0, 1, 1])
    expected = nn.functional.binary_cross_entropy_with_logits(z[:, 0], y.double())
    torch.testing.assert_close(as_loss("bce")(z, y), expected)


def test_smoothing_and_class_weights_are_those_of_torch() -> None:
    z, y = _outputs(), _classes()
    loss = as_loss(
        {"name": "cross_entropy", "label_smoothing": 0.2, "class_weights": [1, 2, 0.5, 3]}
    )
    weights = torch.tensor([1, 2, 0.5, 3]).double()
    expected = nn.functional.cross_entropy(z, y, weight=weights, label_smoothing=0.2)
    torch.testing.assert_close(loss(z, y), expected)
    with pytest.raises(InvalidInput, match=r"2 class weights were given, the model has 4"):
        as_loss({"name": "nll", "class_weights": [1, 2]})(z, y)


def test_focal_without_its_exponent_is_cross_entropy() -> None:
    plain = as_loss({"name": "focal", "gamma": 0.0})
    z, y = _outputs(), _classes()
    torch.testing.assert_close(plain(z, y), as_loss("cross_entropy")(z, y))


def test_probabilities_enter_bce_without_a_second_sigmoid() -> None:
    z, y = _outputs(), _many()
    ends_with_sigmoid = as_loss({"name": "bce", "from_logits": False})
    torch.testing.assert_close(ends_with_sigmoid(z.sigmoid(), y), as_loss("bce")(z, y))
    with pytest.raises(InvalidParameter, match="positive_weights take logits"):
        as_loss({"name": "bce", "from_logits": False, "positive_weights": [1, 2, 1, 1]})


def test_descriptions_come_back_as_the_same_loss() -> None:
    for value in ("focal", {"name": "focal", "gamma": 1.0}, {"name": "bce"}):
        loss = as_loss(value)
        assert as_loss(loss_json(loss)) == loss
        for protocol in (FedSGD(loss=value), FedAVG(loss=loss)):
            assert type(protocol).from_json(protocol.to_json()) == protocol


def test_mistakes_are_answered_with_the_names_that_exist() -> None:
    with pytest.raises(UnknownName, match="Did you mean 'cross_entropy'"):
        FedSGD(loss="crossentropy")
    with pytest.raises(InvalidParameter, match="Focal has no parameter 'gama'"):
        FedSGD(loss={"name": "focal", "gama": 1})
    with pytest.raises(InvalidInput, match=r"targets have shape \(5, 3\), the outputs \(5, 4\)"):
        as_loss("bce")(_outputs(), _many()[:, :3])


def _hinge(outputs: Tensor, y: Tensor) -> Tensor:
    return nn.functional.multi_margin_loss(outputs, y, reduction="none")


def test_a_function_may_give_one_value_per_example_or_their_mean() -> None:
    z, y = _outputs(), _classes()
    each = as_loss(_hinge)
    mean = as_loss(lambda outputs, y: _hinge(outputs, y).mean())
    torch.testing.assert_close(each(z, y), mean(z, y))
    torch.testing.assert_close(each(z, y, "sum"), mean(z, y, "sum"))
    assert each.describe().endswith(":_hinge")
    with pytest.raises(InvalidInput, match=r"returned \(5, 4\); expected one value per example"):
        as_loss(lambda outputs, y: outputs)(z, y)


def test_code_named_in_a_file_runs_only_when_its_owner_asks(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "from torch.nn.functional import multi_margin_loss\n"
        "def hinge(outputs, y):\n    return multi_margin_loss(outputs, y)\n"
    )
    described = as_loss("mine.py:hinge")
    with pytest.raises(InvalidInput, match="not run from a file"):
        described(_outputs(), _classes())
    trusted = with_code(described, tmp_path)
    torch.testing.assert_close(
        trusted(_outputs(), _classes()), _hinge(_outputs(), _classes()).mean()
    )
    with pytest.raises(UnknownName, match="Did you mean 'hinge'"):
        with_code(as_loss("mine.py:heinge"), tmp_path)
    with pytest.raises(InvalidInput, match="does not exist"):
        with_code(as_loss("yours.py:hinge"), tmp_path)


LOSSES_OF_CLIENTS: dict[str, object] = {
    "smoothed": {"name": "cross_entropy", "label_smoothing": 0.1},
    "focal": "focal",
    "one-hot bce": "bce",
    "mse": "mse",
    "own": _hinge,
}


@pytest.mark.parametrize("name", list(LOSSES_OF_CLIENTS))
@pytest.mark.parametrize("algorithm", [FedSGD, FedAVG])
def test_a_replay_follows_the_clients_own_loss_and_no_other(
    name: str, algorithm: type[FedSGD] | type[FedAVG], tmp_path: Path
) -> None:
    loss = as_loss(LOSSES_OF_CLIENTS[name])
    stage = build_stage(protocol=algorithm(loss=loss), examples=3, grants=frozenset({Grant.LABELS}))
    view = stage.view([stage.federation.play_round()])
    x = stage.federation.clients[0].x
    assert view.loss == loss
    assert relative_error(view.replay(x, view.labels), view.update.tensors) < 1e-10
    other = build_stage(protocol=algorithm(), examples=3, grants=frozenset({Grant.LABELS}))
    plain = other.view([other.federation.play_round()])
    assert relative_error(plain.replay(x, view.labels), view.update.tensors) > 1e-2
    view.save(tmp_path)
    reread = View.load(tmp_path, model=stage.federation.base_model, loss=_kept(loss))
    assert relative_error(reread.replay(x, view.labels), view.update.tensors) < 1e-10


def _kept(loss: Loss) -> Loss | None:
    """Code does not travel with a file; its owner passes it again."""
    return loss if isinstance(loss, PythonLoss) else None
