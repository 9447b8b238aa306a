from __future__ import annotations

import pytest
import torch
from torch import nn

from leakatlas import models
from leakatlas.blocks import matching
from leakatlas.defenses.heuristic.perturbation.soteria import (
    Soteria,
    column_mask,
    heads,
    released_mask,
    score,
    sensitivity,
)
from leakatlas.errors import IncompatibleDefenses, UnknownName, UnsupportedModel
from leakatlas.fl import FedAVG, model_state
from tests.conftest import build_stage, relative_error
from tests.defenses.heuristic.probes import a_context, an_update, observed, readout_error, replayed

NAME = "fc.weight"


def lenet() -> nn.Module:
    return models.build("lenet", size=8, width=4).double()


def photos(count: int = 2) -> torch.Tensor:
    return torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(0)).double()


def test_the_sensitivity_of_a_linear_map_has_a_closed_form() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 30, bias=False), nn.Linear(30, 10)).double()
    x = photos(1)
    r, slope = sensitivity(model, "2", x)
    layer = model[1]
    assert isinstance(layer, nn.Linear)
    A = layer.weight.detach()
    torch.testing.assert_close(r, x.flatten(1) @ A.T)
    torch.testing.assert_close(slope, A.norm(dim=1)[None])
    expected = A.norm(dim=1) / (A @ x.flatten()).abs()
    torch.testing.assert_close(score(r, slope, 1e-12), expected)


def test_the_sensitivity_is_the_jacobians_row_norm_example_by_example() -> None:
    model, x = lenet().eval(), photos()
    r, slope = sensitivity(model, "fc", x)
    body = model.body
    assert isinstance(body, nn.Module)

    def features(image: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = body(image[None])
        return out.flatten()

    for index, image in enumerate(x):
        jacobian = torch.autograd.functional.jacobian(features, image)
        assert isinstance(jacobian, torch.Tensor)
        torch.testing.assert_close(slope[index], jacobian.flatten(1).norm(dim=1))
        torch.testing.assert_close(r[index], features(image).detach())


def test_measuring_leaves_the_model_and_the_random_state_alone() -> None:
    model = models.build("convnet-bn", size=8, width=4).double().train()
    state, rng = model_state(model), torch.get_rng_state()
    update = an_update({NAME: torch.randn(10, 64, dtype=torch.float64)})
    torch.set_rng_state(rng)
    Soteria().update(update, a_context(model, photos()))
    assert all(torch.equal(t, state[name]) for name, t in model_state(model).items())
    assert torch.equal(torch.get_rng_state(), rng)


def test_exactly_the_masked_columns_are_zero_and_all_else_is_bitwise_equal() -> None:
    plain = build_stage(model="lenet").federation.play_round().updates[0].tensors
    sent = (
        build_stage(model="lenet", defenses=(Soteria(prune=0.25),))
        .federation.play_round()
        .updates[0]
        .tensors
    )
    columns = (sent[NAME] == 0).all(0)
    assert int(columns.sum()) == round(0.25 * plain[NAME].shape[1])
    assert torch.equal(sent[NAME][:, ~columns], plain[NAME][:, ~columns])
    assert all(torch.equal(sent[name], t) for name, t in plain.items() if name != NAME)


def test_the_smallest_scores_go_and_ties_keep_the_count() -> None:
    mask = column_mask(torch.tensor([3.0, 1.0, 2.0, 0.5]), 0.5)
    assert mask.tolist() == [True, False, True, False]
    assert int(column_mask(torch.ones(10), 0.3).sum()) == 7


def test_dead_features_go_last_unless_as_released() -> None:
    r = torch.tensor([[0.0, 1.0, 2.0]])
    slope = torch.tensor([[0.0, 1.0, 1.0]])
    assert column_mask(score(r, slope, 0.1), 1 / 3).tolist() == [True, True, False]
    released = score(r, slope, 0.1, as_released=True)
    assert released_mask(released, 1 / 3).tolist() == [False, True, True]


def test_of_features_with_signs_the_release_masks_less_than_it_is_asked_for() -> None:
    scores = torch.tensor([-3.0, -1.0, 0.5, 2.0, 4.0])
    assert int(released_mask(scores, 0.75).sum()) == 3  # percentile 2: 1 and 0.5 go, -3 stays
    assert bool(released_mask(scores, 0.2).all())  # the percentile is negative
    assert int(column_mask(scores.abs(), 0.6).sum()) == 2
    unsigned = scores.abs()
    assert torch.equal(released_mask(unsigned, 0.5), unsigned >= 2.0)


def test_signed_denominators_cancel_as_released() -> None:
    r = torch.tensor([[0.4], [-0.6]])
    slope = torch.ones(2, 1)
    assert float(score(r, slope, 0.1, as_released=True)) == pytest.approx(0, abs=1e-6)
    assert float(score(r, slope, 0.1)) == pytest.approx(1 / 0.5 + 1 / 0.7)


def test_even_one_percent_changes_the_upload_of_a_relu_network() -> None:
    plain, _ = observed(None)
    view, _ = observed(Soteria(prune=0.02))
    assert not torch.equal(plain.update.tensors[NAME], view.update.tensors[NAME])


@pytest.mark.parametrize("model", ["lenet", "convnet", "fc", "vit"])
def test_the_true_batch_is_an_exact_zero_of_the_adaptive_objective(model: str) -> None:
    settings = {"widths": (12, 9)} if model == "fc" else {"width": 4}
    if model == "vit":
        settings = {"dim": 16, "heads": 2}
    view, x = observed(Soteria(prune=0.5), model=model, settings=settings)
    g = dict(view.update.tensors)
    assert relative_error(replayed(view, x), g) < 1e-9
    oblivious = replayed(view, x, adaptive=False)
    assert float(matching.relative_l2(oblivious, g)) > 0.01


def test_leaving_the_layer_out_gives_the_same_objective_with_and_without() -> None:
    plain, x = observed(None, model="lenet", letter="B")
    view, _ = observed(Soteria(prune=0.8), model="lenet", letter="B")
    y = view.labels
    candidate = x + 0.3

    def without_layer(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: t for name, t in tensors.items() if name != NAME}

    values = [
        matching.cosine(
            without_layer(v.replay(candidate, y)), without_layer(dict(v.update.tensors))
        )
        for v in (plain, view)
    ]
    assert torch.equal(values[0], values[1])


def test_the_head_is_found_from_the_update_alone() -> None:
    for model, settings in (("fc", {"widths": (12, 9)}), ("lenet", {"width": 4})):
        view, _ = observed(None, model=model, settings=settings)
        assert heads(view.update.tensors) == [NAME]


def test_an_earlier_layers_readout_is_not_touched_and_the_defended_one_is() -> None:
    assert readout_error(Soteria(prune=0.8)) < 1e-9
    assert readout_error(Soteria(prune=0.8, layer="hidden.1")) > 0.5


def test_a_named_layer_is_defended_and_an_unknown_one_refused() -> None:
    plain = build_stage(model="fc").federation.play_round().updates[0].tensors
    stage = build_stage(model="fc", defenses=(Soteria(layer="hidden.1"),))
    sent = stage.federation.play_round().updates[0].tensors
    changed = {name for name in plain if not torch.equal(plain[name], sent[name])}
    assert changed == {"hidden.1.weight"}
    with pytest.raises(UnknownName, match=r"hidden\.1"):
        build_stage(model="fc", defenses=(Soteria(layer="hidden.7"),))


def test_a_model_without_a_linear_layer_is_refused_with_a_way_out() -> None:
    with pytest.raises(UnsupportedModel, match="gradient_pruning"):
        Soteria().model(nn.Sequential(nn.Conv2d(3, 10, 8), nn.Flatten()))


def test_fedavg_is_refused() -> None:
    with pytest.raises(IncompatibleDefenses, match="FedSGD"):
        build_stage(protocol=FedAVG(), defenses=(Soteria(),))
