from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from leakatlas.defenses.heuristic.perturbation.quantization import (
    Quantization,
    levels,
    quantised,
)
from leakatlas.errors import IncompatibleDefenses, InvalidParameter
from leakatlas.fl import FedAVG, FedSGD, Protocol, Trait
from tests.conftest import build_stage, relative_error
from tests.defenses.heuristic.probes import (
    a_context,
    an_update,
    ledger,
    observed,
    random_tensors,
    readout_error,
    replayed,
)

MEMBERS = {
    "qsgd": Quantization(bits=3),
    "qsgd, norm": Quantization(bits=3, scale="norm"),
    "random signs": Quantization(bits=1),
    "uniform": Quantization.uniform(3),
    "uniform, norm": Quantization(bits=3, rounding="nearest", scale="norm"),
    "sign": Quantization.sign(),
    "scaled sign": Quantization.sign("mean"),
}
NEAREST = {n: d for n, d in MEMBERS.items() if d.rounding == "nearest"}
ROUNDS: dict[str, Protocol] = {
    "fedsgd": FedSGD(),
    "fedavg": FedAVG(epochs=2, batch_size=2, lr=0.1),
}


def sent_by(defense: Quantization, tensors: dict[str, Tensor], seed: int = 0) -> dict[str, Tensor]:
    return dict(defense.update(an_update(tensors), a_context(seed=seed)).tensors)


@pytest.mark.parametrize("defense", MEMBERS.values(), ids=MEMBERS)
def test_every_entry_is_a_level_next_to_it(defense: Quantization) -> None:
    tensors = random_tensors()
    for name, q in sent_by(defense, tensors).items():
        v = tensors[name]
        if name == "zeros":
            assert torch.equal(q, v if defense.scale != "one" else torch.ones_like(v))
            continue
        scale = {
            "largest": v.abs().max(), "norm": v.norm(), "mean": v.abs().mean(),
            "one": torch.ones(()).double(),
        }[defense.scale]  # fmt: skip
        s = levels(defense.bits)
        steps = torch.arange(-s, s + 1).double() / s if s else torch.tensor([-1.0, 1.0]).double()
        assert float((q[..., None] - steps * scale).abs().min(dim=-1).values.max()) < 1e-12
        step = scale / s if s else 2 * scale
        if defense.scale not in ("one", "mean"):  # nothing lies beyond the lattice
            assert float((q - v).abs().max()) <= float(step) * (1 + 1e-12)
        if defense.rounding == "nearest" and s:
            assert float((q - v).abs().max()) <= float(step) / 2 * (1 + 1e-12)


@pytest.mark.parametrize("bits", [1, 2, 3, 5])
def test_random_rounding_is_unbiased_exactly(bits: int) -> None:
    """Every pattern of ups and downs, with its probability."""
    v = torch.tensor([0.9, -0.35, 0.0, 0.2], dtype=torch.float64)
    scale = v.abs().max()
    s = levels(bits)
    place = v.abs() / scale * s
    up = place - place.floor() if s else (1 + v / scale) / 2
    mean, total = torch.zeros_like(v), 0.0
    for pattern in itertools.product([False, True], repeat=len(v)):
        taken = torch.tensor(pattern)
        probability = float(torch.where(taken, up, 1 - up).prod())
        draws = torch.where(taken, 0.0, 1.0 - 1e-15).double()  # below or above every distance
        if probability:
            mean += probability * quantised(v, bits, scale, draws)
            total += probability
    assert total == pytest.approx(1)
    torch.testing.assert_close(mean, v, rtol=0, atol=1e-12)


def test_the_noise_of_random_rounding_is_what_theory_says() -> None:
    """At the truth the residual is sum step^2 f (1 - f), f the distance to the lower level."""
    view, x = observed(Quantization(bits=4), examples=2)
    g = {n: t.double() for n, t in view.update.tensors.items()}
    own = replayed(view, x)
    expected = 0.0
    for v in own.values():
        step = v.abs().max() / levels(4)
        f = v / step - (v / step).floor()
        expected += float((step.square() * f * (1 - f)).sum())
    residual = sum(float((own[n] - g[n]).square().sum()) for n in g)
    assert residual == pytest.approx(expected, rel=0.2)


def test_signs_do_not_change_with_a_positive_scale_and_ties_go_up() -> None:
    tensors = random_tensors()
    small = {name: 1e-3 * t for name, t in tensors.items()}
    one, other = sent_by(Quantization.sign(), tensors), sent_by(Quantization.sign(), small)
    for name, v in tensors.items():
        assert torch.equal(one[name], other[name])
        assert torch.equal(one[name], torch.where(v >= 0, 1.0, -1.0).double())


def test_fedavg_sends_signs_in_the_units_of_its_steps() -> None:
    protocol = FedAVG(epochs=2, batch_size=2, lr=0.1)
    view, _ = observed(Quantization.sign(), protocol=protocol)
    entries = torch.cat([t.flatten() for t in view.update.tensors.values()])
    torch.testing.assert_close(entries.abs(), torch.full_like(entries, 0.1))


@pytest.mark.parametrize("protocol", ROUNDS.values(), ids=ROUNDS)
@pytest.mark.parametrize("defense", NEAREST.values(), ids=NEAREST)
def test_the_true_batch_is_rounded_to_the_observation(
    defense: Quantization, protocol: Protocol
) -> None:
    view, x = observed(defense, protocol=protocol)
    assert relative_error(replayed(view, x), view.update.tensors) < 1e-9
    assert relative_error(replayed(view, x, adaptive=False), view.update.tensors) > 0.05


def test_slopes_pass_as_if_nothing_were_rounded() -> None:
    defense = Quantization.uniform(3)
    tensors = {"w": random_tensors()["weight"].requires_grad_()}
    seen = an_update({"w": torch.ones_like(tensors["w"])})
    mirrored = defense.simulate(tensors, torch.empty(0), torch.empty(0), seen)["w"]
    torch.testing.assert_close(
        mirrored.detach(), sent_by(defense, {"w": tensors["w"].detach()})["w"]
    )
    cotangent = random_tensors(1)["weight"]
    (slope,) = torch.autograd.grad(mirrored, tensors["w"], cotangent)
    assert torch.equal(slope, cotangent)


def test_the_direction_is_kept_by_many_bits_and_lost_by_few() -> None:
    tensors = random_tensors()
    cosines = [ledger(sent_by(Quantization(bits=b), tensors), tensors)[0] for b in (8, 5, 3, 1)]
    assert cosines == sorted(cosines, reverse=True)
    assert cosines[0] > 0.9999
    assert cosines[-1] < 0.7


def test_with_error_feedback_nothing_is_lost() -> None:
    defense, context = Quantization.sign("mean", error_feedback=True), a_context()
    rounds = [random_tensors(seed) for seed in range(5)]
    sent = [defense.update(an_update(tensors), context).tensors for tensors in rounds]
    for name in rounds[0]:
        total = torch.stack([s[name] for s in sent]).sum(0) + context.memory["residual"][name]
        torch.testing.assert_close(
            total, torch.stack([r[name] for r in rounds]).sum(0), rtol=0, atol=1e-12
        )
    assert defense.active_traits() == {Trait.ERROR_FEEDBACK}
    assert Quantization().active_traits() == frozenset()
    assert Quantization(bits=32, error_feedback=True).active_traits() == frozenset()


def test_buffers_are_not_rounded() -> None:
    def after(*defenses: Quantization) -> dict[str, Tensor]:
        stage = build_stage(model="convnet-bn", settings={"width": 4}, defenses=defenses,
                            protocol=FedSGD(mode="train"))  # fmt: skip
        return dict(stage.federation.play_round().updates[0].buffers_after)

    plain, defended = after(), after(Quantization(bits=1))
    assert plain
    assert all(torch.equal(plain[name], defended[name]) for name in plain)


def test_the_readout_is_exact_without_and_as_coarse_as_the_lattice_with() -> None:
    assert readout_error(Quantization(bits=32)) < 1e-9
    fine, coarse = readout_error(Quantization.uniform(8)), readout_error(Quantization.uniform(3))
    assert 1e-4 < fine < 0.1 < coarse


def test_scales_that_entries_exceed_are_for_signs_alone() -> None:
    for settings in ({"bits": 4, "rounding": "nearest"}, {"bits": 1}):
        with pytest.raises(InvalidParameter, match="scale='mean'"):
            Quantization(scale="mean", **settings)


def test_error_feedback_and_accounted_noise_are_refused_together() -> None:
    from leakatlas.defenses.formal.dp.client_dp import ClientDP

    feedback = Quantization.sign("mean", error_feedback=True)
    with pytest.raises(IncompatibleDefenses, match="error_feedback=False"):
        build_stage(defenses=(ClientDP(unit="update"), feedback))
