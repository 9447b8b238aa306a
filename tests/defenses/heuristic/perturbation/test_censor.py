from __future__ import annotations

import dataclasses

import pytest
import torch

from leakatlas.defenses.heuristic.perturbation.censor import CENSOR, orthogonal
from leakatlas.errors import IncompatibleDefenses
from leakatlas.fl import FedAVG
from leakatlas.threat import Grant
from tests.conftest import build_stage, relative_error
from tests.defenses.heuristic.probes import a_context, an_update, observed, readout_error, replayed

SECRET = frozenset({Grant.LABELS, Grant.DEFENSE_SECRETS})


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3])
def test_what_is_sent_is_orthogonal_and_as_long(size: float) -> None:
    g, r = size * draw(40, 9), draw(40, 9, seed=1)
    o = orthogonal(r, g, released=False)
    assert abs(float((o * g).sum())) <= 1e-6 * float(g.square().sum())
    assert float(o.norm()) == pytest.approx(float(g.norm()))


def test_the_released_projection_is_right_for_norm_one_alone() -> None:
    g, r = draw(40, 9), draw(40, 9, seed=1)
    for size, bound in ((1.0, 1e-9), (100.0, None)):
        scaled = size * g / g.norm()
        o = orthogonal(r, scaled, released=True)
        cosine = abs(float((o * scaled).sum() / (o.norm() * scaled.norm())))
        assert cosine < bound if bound is not None else cosine > 0.9


def test_one_entry_and_zero_gradients_send_zero() -> None:
    assert float(orthogonal(draw(1), torch.ones(1).double(), released=False)) == 0
    assert not bool(orthogonal(draw(5), torch.zeros(5).double(), released=False).any())


def test_every_tensor_of_a_round_is_orthogonal_to_the_true_one() -> None:
    plain = build_stage(model="lenet").federation.play_round().updates[0].tensors
    sent = build_stage(model="lenet", defenses=(CENSOR(),)).federation.play_round().updates[0]
    for name, g in plain.items():
        o = sent.tensors[name]
        assert abs(float((o * g).sum())) <= 1e-6 * float(g.square().sum())
        assert float(o.norm()) == pytest.approx(float(g.norm()))


def test_more_trials_never_raise_the_loss() -> None:
    """With nested draws the best of K cannot be worse than the best of fewer."""
    stage = build_stage(model="lenet", examples=4)
    record = stage.federation.play_round()
    client, model = stage.federation.clients[0], stage.federation.model
    losses = []
    for trials in (1, 5, 20):
        defense = CENSOR(trials=trials, step=1e-2)
        context = a_context(model, client.x)
        context.y = client.y
        sent = defense.update(record.updates[0], context)
        losses.append(defense._loss(context, sent.tensors))
    assert losses == sorted(losses, reverse=True)
    assert losses[0] > losses[-1]


def test_the_release_sends_the_raw_gradient_when_no_trial_helps_and_the_paper_never() -> None:
    model = torch.nn.Linear(4, 2, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(1e4 * torch.tensor([[1.0, 0, 0, 0], [-1.0, 0, 0, 0]]))
    context = a_context(model, draw(40, 4))
    context.y = model(context.x).argmax(1)  # right and sure of it: any large step is worse
    g = {"weight": draw(2, 4, seed=2)}
    huge = CENSOR(as_released=True, step=1e6, trials=3)
    sent = huge.update(an_update(g), context).tensors
    assert all(torch.equal(sent[name], t) for name, t in g.items())
    assert context.memory["raw gradients sent"] == 1
    paper = dataclasses.replace(huge, as_released=False).update(an_update(g), context).tensors
    assert not any(torch.equal(paper[name], t) for name, t in g.items())
    assert context.memory["raw gradients sent"] == 1


def test_later_rounds_are_unprotected() -> None:
    stage = build_stage(model="lenet", defenses=(CENSOR(rounds=1),))
    plain = build_stage(model="lenet").federation
    first, second = (stage.federation.play_round().updates[0].tensors for _ in range(2))
    reference = plain.play_round().updates[0].tensors
    assert not torch.equal(first["fc.weight"], reference["fc.weight"])
    assert all(torch.equal(second[name], t) for name, t in reference.items())


@pytest.mark.parametrize("mix", [1.0, 0.5])
def test_the_true_batch_meets_both_equations(mix: float) -> None:
    view, x = observed(CENSOR(mix=mix), model="lenet")
    assert relative_error(replayed(view, x), view.update.tensors) < 1e-8
    assert relative_error(replayed(view, x, adaptive=False), view.update.tensors) > 0.1
    other = replayed(view, x.flip(0))
    assert relative_error(other, view.update.tensors) > 1e-3


def test_with_the_draws_the_true_batch_is_an_exact_zero_and_others_are_not() -> None:
    view, x = observed(CENSOR(), model="lenet", grants=SECRET)
    assert relative_error(replayed(view, x), view.update.tensors) < 1e-9
    assert relative_error(replayed(view, x.flip(0)), view.update.tensors) > 1e-3


def test_the_mode_of_the_model_is_as_it_was() -> None:
    stage = build_stage(model="convnet-bn", settings={"width": 4}, defenses=(CENSOR(),))
    model = stage.federation.model.train()
    CENSOR().update(
        an_update({n: p.detach() for n, p in model.named_parameters()}),
        a_context(model, torch.rand(2, 3, 8, 8).double()),
    )
    assert all(module.training for module in model.modules())


def test_the_readout_dies() -> None:
    assert readout_error(CENSOR(mix=0)) < 1e-9
    assert readout_error(CENSOR()) > 0.5


def test_local_steps_are_refused() -> None:
    with pytest.raises(IncompatibleDefenses, match="FedSGD"):
        build_stage(protocol=FedAVG(), defenses=(CENSOR(),))
