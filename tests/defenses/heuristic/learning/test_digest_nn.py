from __future__ import annotations

import pytest
import torch

from leakatlas.defenses.heuristic.learning.digest_nn import Digest, DigestNN, digested, nearness
from leakatlas.fl import FedAVG, FedSGD
from leakatlas.threat import Grant
from tests.conftest import build_stage, gradients_at, relative_error
from tests.defenses.heuristic.probes import a_context, observed, readout_error, replayed

FAST = DigestNN(first_steps=20, steps=1, lr=0.02)
SECRET = frozenset({Grant.LABELS, Grant.DEFENSE_SECRETS})


def photos() -> torch.Tensor:
    return torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)).double()


def test_an_untrained_network_is_next_to_the_identity() -> None:
    x = photos()
    digest = Digest(3, 16, x, torch.Generator().manual_seed(1))
    assert 0 < float((digest(x) - x).detach().abs().max()) < 0.3


def test_nearness_is_bounded_by_the_margin() -> None:
    x = photos()
    assert float(nearness(x, x, 1.0)) == 1.0
    assert float(nearness(x + 0.5, x, 1.0)) == pytest.approx(0.75)
    assert float(nearness(x + 5, x, 1.0)) == 0.0


def test_training_moves_its_images_away_and_keeps_the_loss_low() -> None:
    stage = build_stage(model="convnet", settings={"width": 4}, examples=4)
    client, model = stage.federation.clients[0], stage.federation.model
    context = a_context(model, client.x)
    start, _ = DigestNN(first_steps=1).batch(client.x, client.y, context)
    context = a_context(model, client.x)
    end, y = DigestNN().batch(client.x, client.y, context)
    apart = [(t - client.x).square().mean() for t in (start, end)]
    assert float(apart[1]) > 0.5 > 5 * float(apart[0])
    assert y is client.y
    loss = [
        float(torch.nn.functional.cross_entropy(model(t), client.y).detach())
        for t in (client.x, end)
    ]
    assert loss[1] < loss[0]


def test_the_upload_is_that_of_training_on_the_changed_images() -> None:
    stage = build_stage(model="lenet", defenses=(FAST,))
    sent = stage.federation.play_round().updates[0].tensors
    client = stage.federation.clients[0]
    digest = client.memories["digest_nn"]["digest"]
    with torch.no_grad():
        changed = digest(client.x)
    expected = gradients_at(
        stage.federation.model, changed, client.y, torch.nn.functional.cross_entropy
    )
    assert relative_error(sent, expected) < 1e-9
    assert sent.keys() == expected.keys()  # and nothing of D


def test_buffers_do_not_move_while_it_learns() -> None:
    settings = {"width": 4}
    plain = build_stage(model="convnet-bn", settings=settings, protocol=FedSGD(mode="train"))
    stage = build_stage(
        model="convnet-bn", settings=settings, protocol=FedSGD(mode="train"), defenses=(FAST,)
    )
    a, b = (s.federation.play_round().updates[0].buffers_after for s in (plain, stage))
    counters = [name for name in a if name.endswith("num_batches_tracked")]
    assert counters
    assert all(int(a[name]) == int(b[name]) == 1 for name in counters)


def test_clients_have_networks_of_their_own_and_predict_with_them() -> None:
    stage = build_stage(model="lenet", clients=2, defenses=(FAST,))
    federation = stage.federation
    federation.play_round()
    one, other = (federation.clients[c].memories["digest_nn"]["digest"] for c in (0, 1))
    assert not torch.equal(one.first, other.first)
    x = federation.clients[0].x
    expected = federation.model.eval()(one(x))
    torch.testing.assert_close(federation.evaluation_model(0)(x), expected)


def test_later_steps_go_on_with_the_same_network() -> None:
    stage = build_stage(
        model="lenet", defenses=(FAST,), protocol=FedAVG(epochs=2, batch_size=2, lr=0.1)
    )
    stage.federation.play_round()
    first = stage.federation.clients[0].memories["digest_nn"]["digest"]
    stage.federation.play_round()
    assert stage.federation.clients[0].memories["digest_nn"]["digest"] is first


def test_whoever_knows_the_network_searches_through_it() -> None:
    view, x = observed(FAST, model="lenet", grants=SECRET)
    assert relative_error(replayed(view, x), view.update.tensors) < 1e-9
    assert relative_error(replayed(view, x, adaptive=False), view.update.tensors) > 0.01


def test_without_it_the_changed_images_are_the_exact_zero() -> None:
    view, x = observed(FAST, model="lenet")
    secret, _ = observed(FAST, model="lenet", grants=SECRET)
    weights = {n.removeprefix("digest_nn/"): t for n, t in secret.secrets.items()}
    assert relative_error(replayed(view, digested(x, weights)), view.update.tensors) < 1e-9
    assert relative_error(replayed(view, x), view.update.tensors) > 0.01


def test_a_network_that_only_turns_channels_is_undone_exactly() -> None:
    """The bound of what D can hide: the read-out gives x', and an orthogonal D takes it back."""
    x, small = photos(), 1e-5
    turn = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(2)).double()).Q
    weights = {"first": torch.zeros(3, 3, 3, 3).double(), "last": torch.zeros(3, 3, 3, 3).double()}
    weights["first"][:, :, 1, 1] = small * torch.eye(3)  # where tanh is the identity
    weights["last"][:, :, 1, 1] = (turn - torch.eye(3)) / small
    changed = digested(x, {**weights, "shift": torch.zeros(3).double()})
    assert float((changed - x).abs().max()) > 0.5
    torch.testing.assert_close(torch.einsum("dc,ndhw->nchw", turn, changed), x)


def test_the_readout_gives_the_changed_image_and_not_the_true_one() -> None:
    assert readout_error(DigestNN(distance=0)) < 1e-9
    assert readout_error(FAST) > 0.3
