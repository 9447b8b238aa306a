"""mGAN-AI: what a round shows of every client, and what the identity task adds."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor

from leakatlas.attacks.generative.online import mgan_ai
from leakatlas.attacks.generative.online.mgan_ai import MGANAI, Told
from leakatlas.bench import harness
from leakatlas.blocks import matching, observed
from leakatlas.blocks.watch import Watch
from leakatlas.data import ImageSet, bundled
from leakatlas.errors import NotGranted
from leakatlas.fl import FedAVG, FedSGD, Protocol, Stage
from leakatlas.threat import Vantage
from tests.attacks.case import LENET, Case
from tests.conftest import build_stage, surrogate

CASE = Case(
    {"steps": 2, "representative_steps": 1, "batch_size": 4},
    {**LENET, "size": 8, "clients": 3, "rounds": 2},
    boxed=True,
)

STYLES, EACH = 3, 8


def styled(x: Tensor, style: int) -> Tensor:
    """Digits as they are, in negative, or pale and moved."""
    return (x, 1 - x, 0.25 + 0.5 * x.roll((3, 3), (2, 3)))[style]


@functools.cache
def _images() -> tuple[ImageSet, ImageSet, Tensor]:
    """Victims, client after client; the public images of all styles, and theirs by number."""
    digits = bundled.digits(8)
    twos = [i for i in range(600) if int(digits.labels[i]) < 2][: STYLES * EACH]
    parts = [styled(digits.images[twos[s * EACH : (s + 1) * EACH]], s) for s in range(STYLES)]
    public = [styled(digits.images[600 + 100 * s : 700 + 100 * s], s) for s in range(STYLES)]
    return (
        ImageSet(_rgb(torch.cat(parts)), digits.labels[twos], digits.classes, "styled"),
        ImageSet(_rgb(torch.cat(public)), digits.labels[600:900], digits.classes, "public"),
        torch.arange(STYLES).repeat_interleave(100),
    )


def _rgb(x: Tensor) -> Tensor:
    return x.expand(-1, 3, -1, -1).contiguous()


def scene(rounds: int = 1, protocol: Protocol | None = None, **changes: Any) -> Stage:
    victims, public, _ = _images()
    settings: dict[str, Any] = {
        "model": "convnet", "settings": {"width": 8}, "letter": "D", "examples": EACH,
        "clients": STYLES, "victims": victims, "public": public, "rounds": rounds,
        "dtype": torch.float32, "protocol": protocol or FedSGD(lr=0.1),
    }  # fmt: skip
    return build_stage(**{**settings, **changes})


@functools.cache
def style_reader() -> tuple[Tensor, Tensor]:
    """A linear classifier of the style, fitted on public images only."""
    _, public, styles = _images()
    x = public.images.flatten(1)
    W, b = torch.zeros(STYLES, x.shape[1]), torch.zeros(STYLES)
    W.requires_grad_(), b.requires_grad_()
    optimizer = torch.optim.Adam([W, b], lr=0.02)
    for _ in range(150):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(x @ W.T + b, styles).backward()
        optimizer.step()
    assert float(((x @ W.T + b).argmax(1) == styles).float().mean()) > 0.98
    return W.detach(), b.detach()


def hits(images: Tensor, style: int) -> float:
    W, b = style_reader()
    read = (images.clamp(0, 1).flatten(1) @ W.T + b).argmax(1)
    return float((read == style).float().mean())


QUICK = MGANAI(steps=60, representative_steps=2, representatives=EACH, lr=1e-3)


@functools.cache
def sampled(target: int, identity_weight: float) -> Tensor:
    attack = MGANAI(
        steps=60, representative_steps=3, representatives=EACH, lr=2e-3, batch_size=16,
        identity_weight=identity_weight,
    )  # fmt: skip
    stage = scene(rounds=2, model="fc", settings={"widths": (64,), "act": "relu"})
    return harness.run_trial(stage, attack, target=target).images


# -- the verify lines ----------------------------------------------------------------------------


def test_swapping_client_ids_moves_the_identity_target() -> None:
    """The same federation, the same seed: only who is the target differs."""
    for target in (0, 1):
        own, other = hits(sampled(target, 1.0), target), hits(sampled(1 - target, 1.0), target)
        assert own > other + 0.3


def test_without_the_identity_weight_the_victims_share_drops_towards_chance() -> None:
    with_it = sum(hits(sampled(target, 1.0), target) for target in (0, 1)) / 2
    without = sum(hits(sampled(target, 0.0), target) for target in (0, 1)) / 2
    assert with_it > 0.7 and without < 0.6
    assert with_it > without + 0.3


def test_step_2_on_a_one_sample_gradient_passes_the_tests_of_dlg() -> None:
    """The distance and its slope vanish at the truth, and from noise it comes back."""
    stage = build_stage(
        model="lenet", settings={"width": 6}, letter="D", examples=1, clients=2, size=8,
        public=surrogate(8),
    )  # fmt: skip
    attack = MGANAI(steps=0, representative_steps=12, tv_weight=0.0)
    view, _ = harness.observe(stage, attack)
    client = stage.federation.clients[0]
    g, gradient = observed.mean_gradient(view), mgan_ai.gradient_of(view)
    x = client.x.clone().requires_grad_()
    value = matching.squared_l2(gradient(x, client.y), g)
    (slope,) = torch.autograd.grad(value, x)
    assert float(value.detach()) < 1e-20 and float(slope.norm()) < 1e-8
    trial = harness.run_trial(stage, attack)
    assert trial.found.labels is not None and torch.equal(trial.found.labels, client.y)
    assert float((trial.images - trial.truth.images).square().mean()) < 1e-4


# -- its parts -----------------------------------------------------------------------------------


def test_total_variation_against_a_loop() -> None:
    x = torch.rand(2, 3, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    total = 0.0
    for image in x:
        for channel in image:
            for i in range(4):
                for j in range(5):
                    across = float(channel[i, j + 1] - channel[i, j]) if j < 4 else 0.0
                    down = float(channel[i + 1, j] - channel[i, j]) if i < 3 else 0.0
                    total += (across**2 + down**2) ** 1.25
    assert float(mgan_ai.total_variation(x)) == pytest.approx(total, rel=1e-12)


def _told(generator: torch.Generator, count: int) -> Told:
    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return Told(draw(count), draw(count, 4), draw(count))


def test_the_losses_are_those_of_the_formulas() -> None:
    draws = torch.Generator().manual_seed(0)
    real, fake, victim = (_told(draws, 5) for _ in range(3))
    others = [_told(draws, 3), _told(draws, 7)]
    y, y_fake = torch.tensor([0, 1, 2, 3, 0]), torch.tensor([3, 3, 1, 0, 2])

    def category(told: Told, labels: Tensor) -> Tensor:
        return -told.category.softmax(1)[torch.arange(5), labels].log().mean()

    expected = -real.real.sigmoid().log().mean() - (1 - fake.real.sigmoid()).log().mean()
    expected = expected + category(real, y) + category(fake, y_fake)
    expected = expected - victim.identity.sigmoid().log().mean()
    expected = expected - sum((1 - o.identity.sigmoid()).log().mean() for o in others) / 2
    got = mgan_ai.discriminator_loss(real, y, fake, y_fake, victim, others)
    assert torch.allclose(got, expected)
    expected = -fake.real.sigmoid().log().mean() + category(fake, y_fake)
    expected = expected - 3 * fake.identity.sigmoid().log().mean()
    assert torch.allclose(mgan_ai.generator_loss(fake, y_fake, identity_weight=3), expected)


@pytest.mark.parametrize("protocol", [FedSGD(lr=0.1), FedAVG(epochs=1, batch_size=4, lr=0.05)])
def test_every_clients_labels_are_counted(protocol: Protocol) -> None:
    """Clients of other classes; the model's probabilities on public images are all it takes."""
    digits = bundled.digits(8)
    chosen = torch.cat([(digits.labels[:600] == c).nonzero()[:EACH, 0] for c in (3, 5, 8)])
    victims = digits.subset(chosen).with_channels(3)
    stage = scene(protocol=protocol, victims=victims)
    view, _ = harness.observe(stage, QUICK)
    x_aux, y_aux = mgan_ai.auxiliary(view)
    for client, own in mgan_ai.clients_of(view, 0).items():
        found = mgan_ai.estimated_labels(own, x_aux, y_aux, EACH)
        assert torch.equal(found, stage.federation.clients[client or 0].y)


def test_representatives_resemble_their_own_client() -> None:
    stage = scene(model="lenet", settings={"width": 6})
    attack = MGANAI(steps=0, representative_steps=4)
    records = [stage.federation.play_round()]
    for target in range(STYLES):
        found = attack(stage.view(records, target=target, others=True))
        assert len(found.images) == EACH
        assert hits(stage.box.denormalize(found.images), target) > 0.7


def test_the_trunk_is_the_model_without_its_last_layer() -> None:
    view, _ = harness.observe(scene(), QUICK)
    x = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    model = view.model.eval()
    trunk = mgan_ai.trunk_of(view.model, view.input_shape)
    last = [m for m in model.modules() if isinstance(m, torch.nn.Linear)][-1]
    with torch.no_grad():
        assert torch.allclose(last(trunk(x).flatten(1)), model(x))


# -- what it may see -----------------------------------------------------------------------------


def test_it_takes_a_server_that_reads_several_clients() -> None:
    for changes in ({"vantage": Vantage.WIRE}, {"clients": 1}):
        stage = scene(**changes)
        view, _ = harness.observe(stage, QUICK)
        assert QUICK.outlook(view).verdict == "hopeless"
        assert "reads each client's own update" in QUICK.outlook(view).reason
        with pytest.raises(NotGranted, match=r"view\.others is absent"):
            QUICK(view)


def test_its_outlook_promises_samples_and_no_images() -> None:
    view, _ = harness.observe(scene(rounds=2), QUICK)
    outlook = QUICK.outlook(view)
    assert outlook.verdict == "unknown"
    assert "no image of its data set; 2 rounds" in outlook.reason


def test_before_any_round_nothing_is_promised() -> None:
    assert QUICK.outlook(scene().view()).verdict == "unknown"


def test_public_images_without_the_models_labels_teach_nothing() -> None:
    _, public, _ = _images()
    strange = ImageSet(public.images, public.labels + 10, tuple(map(str, range(20))), "strange")
    view, _ = harness.observe(scene(public=strange), QUICK)
    assert QUICK.outlook(view).verdict == "hopeless"
    found = QUICK(view)
    assert found.status == "failed" and "0 public images" in found.reason


def test_time_that_ends_is_said_and_what_was_learned_is_kept() -> None:
    view, _ = harness.observe(scene(rounds=2), QUICK)
    watch = Watch()
    watch.stop()
    found = QUICK(view, watch=watch)
    assert found.status == "cut short" and len(found.images) in (0, EACH)
