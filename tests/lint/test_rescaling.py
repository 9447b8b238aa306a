"""Lint cannot be scaled away: no verdict changes by ``s w`` and, behind a ReLU, ``w' / s``."""

import copy
import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from leakatlas.blocks import readout, surgery
from leakatlas.fl import edits
from leakatlas.lint import behaviour, examine, findings, lint
from leakatlas.lint.findings import Score

PIXELS = 3 * 8 * 8
EXPONENTS = st.floats(-30, 30, allow_nan=False)
"""Powers of ten by which a layer is scaled."""


def chain(seed: int = 0) -> nn.Sequential:
    """A convolution, a hidden layer behind the flattened image, another one, a head."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
            nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10),
        )  # fmt: skip


LAYERS = ("0", "4", "6", "8")


def put(model: nn.Module, name: str, value: Tensor) -> None:
    with torch.no_grad():
        model.get_parameter(name).copy_(value)


def binning() -> nn.Sequential:
    """An imprint behind a hidden layer."""
    model = chain()
    edges = readout.bin_edges("normal", 32)
    weight, bias = edits.binning_rows(
        torch.rand(64, generator=torch.Generator().manual_seed(2)), edges, "cumulative"
    )
    put(model, "6.weight", weight)
    put(model, "6.bias", bias)
    return model


def traps() -> nn.Sequential:
    """Trap rows behind kernels that copy."""
    model = chain()
    rows = surgery.trap_rows(
        64, 64, scaling=0.95, sigma=0.5, generator=torch.Generator(), like=torch.zeros(1)
    )
    put(model, "4.weight", rows)
    kernel = torch.zeros(4, 3, 3, 3)
    kernel[range(4), [0, 1, 2, 0], 1, 1] = 1
    put(model, "0.weight", kernel)
    return model


def fishing() -> nn.Sequential:
    """A head that singles out one class."""
    model = chain()
    weight, bias = torch.zeros(10, 32), torch.full((10,), 1000.0)
    weight[3], bias[3] = model.get_parameter("8.weight")[3].detach(), 0
    put(model, "8.weight", weight)
    put(model, "8.bias", bias)
    return model


KINDS: dict[str, tuple[Callable[[], nn.Sequential], set[str]]] = {
    "benign": (chain, set()),
    "binning": (binning, {"D2", "D3"}),
    "traps": (traps, {"D5", "D6"}),
    "fishing": (fishing, {"D4", "D7"}),
}


def rescaled(model: nn.Sequential, layer: int, sizes: Tensor) -> nn.Sequential:
    """The same function of its inputs: one layer's neurons times sizes, the next one's undone.

    Args:
        model: As :func:`chain`.
        layer: Place among the layers, 0 to 2.
        sizes: One for every neuron, or one for all.
    """
    model = copy.deepcopy(model)
    own, following = LAYERS[layer], LAYERS[layer + 1]
    weight, bias = model.get_parameter(f"{own}.weight"), model.get_parameter(f"{own}.bias")
    behind = model.get_parameter(f"{following}.weight")
    sizes = sizes.double().expand(len(weight))
    block = behind.shape[1] // len(weight)
    put(model, f"{own}.weight", weight.double() * sizes.view(-1, *[1] * (weight.dim() - 1)))
    put(model, f"{own}.bias", bias.double() * sizes)
    put(model, f"{following}.weight", behind.double() / sizes.repeat_interleave(block))
    return model


def scores_of(model: nn.Module) -> dict[tuple[str, str], float]:
    found, _, _ = examine.measure(model)
    return {(score.statistic, score.place): score.value for score in found}


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(exponent=EXPONENTS, layer=st.integers(0, 2))
def test_scaling_a_layer_changes_no_score(kind: str, exponent: float, layer: int) -> None:
    build, checks = KINDS[kind]
    model = build()
    plain, expected = lint(model), scores_of(model)
    other = rescaled(model, layer, torch.tensor(10.0**exponent, dtype=torch.float64))
    assert checks <= set(plain.checks) and plain.alarm == bool(checks)
    assert scores_of(other) == pytest.approx(expected, abs=1e-3)
    assert lint(other).checks == plain.checks


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(seed=st.integers(0, 2**16), decades=st.floats(0, 25), layer=st.integers(0, 2))
def test_scaling_neurons_changes_no_score_but_that_of_equal_values(
    kind: str, seed: int, decades: float, layer: int
) -> None:
    model = KINDS[kind][0]()
    places = 2 * torch.rand(
        len(model.get_parameter(f"{LAYERS[layer]}.weight")),
        generator=torch.Generator().manual_seed(seed), dtype=torch.float64,
    ) - 1  # fmt: skip
    other = scores_of(rescaled(model, layer, 10 ** (decades * places)))
    expected = scores_of(model)
    for key, value in expected.items():
        if key[0] != "D4/constant":
            assert other[key] == pytest.approx(value, abs=1e-3), key


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("s", [1e-30, 1e-25, 1e-3, 1e25, 1e30])
def test_an_imprint_scaled_out_of_range_still_rings(s: float, dtype: torch.dtype) -> None:
    """Field report: an imprint times 1e25, undone behind it, once lost four of five alarms."""
    block = edits.Imprint(torch.full((PIXELS,), 1 / PIXELS), readout.bin_edges("normal", 64))
    state = dict(
        nn.Sequential(block.layers(), nn.Flatten(), nn.Linear(PIXELS, 10)).to(dtype).state_dict()
    )
    plain = lint(state)
    state["0.first.weight"], state["0.first.bias"] = (
        s * state["0.first.weight"],
        s * state["0.first.bias"],
    )
    state["0.second.weight"] = state["0.second.weight"] / s
    verdict = lint(state)
    assert len(plain.checks) >= 3 and verdict.checks == plain.checks
    assert len(verdict.findings) == len(plain.findings)


@pytest.mark.parametrize("s", [1e-30, 1e-15, 1e15, 1e30])
@pytest.mark.parametrize("layer", [0, 1, 2])
def test_the_checks_on_a_batch_hold_too(layer: int, s: float) -> None:
    """Even where float32 cannot square the gradients: 1e30 in one layer, 1e-30 in the next."""
    generator = torch.Generator().manual_seed(1)
    batch = (torch.rand(24, 3, 8, 8, generator=generator), torch.arange(24) % 8)
    for kind in ("benign", "binning"):
        model = KINDS[kind][0]()
        found = [
            {(score.statistic, score.place): score.value for score in measured}
            for measured, _, _ in (
                examine.measure(made, batch=batch, reference=model)
                for made in (model, rescaled(model, layer, torch.tensor(s)))
            )
        ]
        assert found[1] == pytest.approx(found[0], abs=2e-3)
        assert ("D14/hidden", "6") in found[0] and ("D11/gradient", "") in found[0]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_score_that_is_not_finite_is_an_alarm(value: float) -> None:
    score = Score("D10/rank", "fc", value, "effective rank of the gradient")
    verdict = findings.judge([score], {"D10/rank": 1.0}, skipped={})
    assert verdict.alarm and verdict.checks == ("D10",)
    assert verdict.scores["D10/rank"].value == 1.0
    assert "a number beyond all range" in str(verdict) and str(value) in str(verdict)


def test_weights_beyond_float64_are_an_alarm_and_no_crash() -> None:
    model = chain().double()
    for name in LAYERS:
        put(model, f"{name}.weight", 1e300 * model.get_parameter(f"{name}.weight"))
    assert lint(model).alarm


def test_norms_do_not_overflow_or_vanish() -> None:
    norms = {"a.weight": torch.full((4, 3), 1e-25, dtype=torch.float64)}
    norms["a.weight"][0] = 3e-25
    assert behaviour.d8_d_snr(norms)[0].value == pytest.approx(0.5)


@pytest.mark.parametrize("s", [1e-15, 1e-3, 1e15])
@pytest.mark.parametrize("layer", [0, 1, 2])
def test_what_is_compared_with_earlier_rounds_holds_for_whole_layers(layer: int, s: float) -> None:
    """D16's loss and gradient, and D17 against the model as it was before the rescaling."""
    generator = torch.Generator().manual_seed(1)
    batch = (torch.rand(8, 3, 8, 8, generator=generator), torch.arange(8))
    model = chain()
    other = rescaled(model, layer, torch.tensor(s))
    plain, scaled = (examine.dynamics(one, batch) for one in (model, other))
    assert scaled.loss == pytest.approx(plain.loss, rel=1e-3)
    assert scaled.gradient == pytest.approx(plain.gradient, rel=1e-3)
    found, _, _ = examine.measure(other, previous=model)
    assert max(score.value for score in found if score.statistic == "D17/change") < 1e-3


def test_d17_sees_neurons_that_were_rescaled_between_two_rounds() -> None:
    model = chain()
    sizes = torch.ones(32, dtype=torch.float64)
    sizes[0] = 1e6
    found, _, _ = examine.measure(rescaled(model, 2, sizes), previous=model)
    assert max(score.value for score in found if score.statistic == "D17/change") > 0.7
