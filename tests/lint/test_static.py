"""Each static check against a hand-built tampered layer and its benign twin."""

import math

import pytest
import torch
from torch import Tensor, nn

from leakatlas import models
from leakatlas.blocks import readout, surgery
from leakatlas.data import Box
from leakatlas.fl import edits
from leakatlas.lint import Score, static
from leakatlas.lint.layers import Layer, anatomy


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=generator(seed))


def layer(weight: Tensor, bias: Tensor | None = None, name: str = "fc1") -> Layer:
    return Layer(name, f"{name}.weight", weight, bias)


def default(m: int, n: int, seed: int = 0) -> Layer:
    """PyTorch's own initialisation."""
    weight = (2 * torch.rand(m, n, generator=generator(seed)) - 1) / n**0.5
    bias = (2 * torch.rand(m, generator=generator(seed + 1)) - 1) / n**0.5
    return layer(weight, bias)


def binning(m: int = 256, n: int = 192) -> Layer:
    """All rows one direction, biases on Normal quantiles."""
    edges = readout.bin_edges("normal", m)
    weight, bias = edits.binning_rows(torch.full((n,), 1 / n), edges, "cumulative")
    return layer(weight, bias)


def traps(m: int = 64, n: int = 192, s: float = 0.95) -> Tensor:
    return surgery.trap_rows(m, n, scaling=s, sigma=0.5, generator=generator(), like=torch.zeros(1))


def one(scores: list[Score], statistic: str) -> Score:
    found = [score for score in scores if score.statistic == statistic]
    assert len(found) == 1
    return found[0]


# -- D1 --------------------------------------------------------------------------------------------


def test_d1_names_what_differs_from_the_reference() -> None:
    agreed = {"fc.weight": (10, 4), "fc.bias": (10,)}
    assert one(static.d1_reference(agreed, agreed), "D1/reference").value == 0
    added = static.d1_reference({**agreed, "block.weight": (4, 4)}, agreed)[0]
    assert added.value == 1 and "not in the reference: block.weight" in added.words
    missing = static.d1_reference({"fc.weight": (10, 4)}, agreed)[0]
    assert missing.value == 1 and "missing: fc.bias" in missing.words
    wider = static.d1_reference({**agreed, "fc.weight": (11, 4)}, agreed)[0]
    assert wider.value == 1 and "(11, 4) and should be (10, 4)" in wider.words
    swapped = static.d1_reference(
        agreed, agreed, types={"act": "Hardtanh"}, expected_types={"act": "ReLU"}
    )[0]
    assert swapped.value == 1 and "act is Hardtanh and should be ReLU" in swapped.words


def imprinted(model: nn.Module, shape: tuple[int, ...] = (3, 32, 32)) -> nn.Module:
    n = math.prod(shape)
    block = edits.Imprint(torch.full((n,), 1 / n), readout.bin_edges("normal", 64))
    return edits.Imprinted(block.layers(), model)


@pytest.mark.parametrize("name", ["fc", "lenet", "convnet", "vgg6", "resnet8", "vit"])
def test_d1_sees_a_detour_through_linear_layers_and_no_benign_architecture(name: str) -> None:
    model = models.build(name)
    assert one(static.d1_detour(anatomy(model)), "D1/detour").value == 0
    found = one(static.d1_detour(anatomy(imprinted(model))), "D1/detour")
    assert found.value == 1 and found.place == "block.first"
    assert "3072 inputs back to 3072" in found.words


def test_d1_sees_a_detour_behind_a_convolution_that_multiplies_channels() -> None:
    block = edits.SplitImprint(
        torch.full((192,), 1 / 192), readout.bin_edges("normal", 16), shape=(3, 8, 8), clients=4,
        group=1, kappa=10.0,
    )  # fmt: skip
    for behind in (models.build("fc", size=8), models.build("convnet", size=8, width=4)):
        found = one(static.d1_detour(anatomy(edits.Imprinted(block.layers(), behind))), "D1/detour")
        assert found.value == 1 and "768 inputs back to 192" in found.words


@pytest.mark.parametrize("shape", [(64, 16, 64), (192, 768, 192)])
def test_d1_lets_squeeze_and_excitation_and_mixing_blocks_pass(shape: tuple[int, ...]) -> None:
    outer, inner, _ = shape
    model = nn.Sequential(
        nn.Conv2d(3, outer, 3), nn.Linear(outer, inner), nn.ReLU(), nn.Linear(inner, outer),
        nn.Conv2d(outer, outer, 7, groups=outer), nn.Conv2d(outer, 2 * outer, 2),
        nn.Linear(2 * outer, 10),
    )  # fmt: skip
    assert one(static.d1_detour(anatomy(model)), "D1/detour").value == 0


def test_d1_does_not_judge_the_order_of_sorted_names() -> None:
    state = dict(sorted(imprinted(models.build("convnet", width=4)).state_dict().items()))
    assert static.d1_detour(anatomy(state)) == []


# -- D2 --------------------------------------------------------------------------------------------


def test_d2_sees_one_direction_and_not_random_rows() -> None:
    found = static.d2_repeated_rows(binning())
    assert one(found, "D2/partners").value == 1
    assert one(found, "D2/partners").words == "all 256 rows are one direction"
    assert one(found, "D2/rank").value == pytest.approx(1)
    benign = static.d2_repeated_rows(default(256, 192))
    assert one(benign, "D2/partners").value == 0
    assert one(benign, "D2/rank").value < 0.05


def test_d2_counts_partners_among_other_rows_whatever_their_sign_and_scale() -> None:
    weight = default(64, 100).weight
    weight[10:20] = torch.linspace(-3, 4, 10)[:, None] * weight[0]
    assert one(static.d2_repeated_rows(layer(weight)), "D2/partners").value == 11 / 64


@pytest.mark.parametrize("shape", [(40, 90), (90, 40)])
def test_stable_rank_is_that_of_the_singular_values(shape: tuple[int, int]) -> None:
    w = normal(*shape) @ torch.diag(torch.linspace(0.1, 3, shape[1]))
    values = torch.linalg.svdvals(w.double())
    expected = float(values.square().sum() / values.max() ** 2)
    assert static.stable_rank(w) == pytest.approx(expected, rel=1e-2)


def test_d2_looks_at_a_sample_of_a_large_layer() -> None:
    found = static.d2_repeated_rows(binning(4000, 6000))
    assert one(found, "D2/partners").value == 1
    assert "(of 4000, sampled)" in one(found, "D2/partners").words


# -- D3 --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("law", ["normal", "laplace"])
def test_d3_recognises_laid_out_quantiles(law: readout.Quantiles) -> None:
    edges = readout.bin_edges(law, 256)
    weight, bias = edits.binning_rows(torch.full((100,), 0.01), edges, "cumulative")
    found = one(static.d3_bias_pattern(layer(weight, bias)), "D3/quantiles")
    assert found.value > 0.9
    assert law in found.words.lower() and ("R2 1.0000" in found.words or "R2 0.9999" in found.words)


@pytest.mark.parametrize("seed", range(5))
def test_d3_lets_samples_of_the_same_laws_pass(seed: int) -> None:
    drawn = [normal(256, seed=seed), torch.rand(256, generator=generator(seed))]
    for bias in drawn:
        found = one(static.d3_bias_pattern(layer(normal(256, 64), bias)), "D3/quantiles")
        assert found.value < 0.6


def test_d3_measures_biases_in_units_of_weights() -> None:
    assert one(static.d3_bias_pattern(default(256, 192)), "D3/spread").value == pytest.approx(
        0.5, abs=0.05
    )
    assert one(static.d3_bias_pattern(binning()), "D3/spread").value > 0.95
    assert static.d3_bias_pattern(layer(normal(32, 32))) == []


# -- D4 --------------------------------------------------------------------------------------------


def test_d4_sees_constants_and_zeros() -> None:
    constant = static.d4_value_entropy(layer(torch.full((64, 64), 1 / 64)))
    assert one(constant, "D4/constant").value == 1
    sparse = torch.zeros(64, 400)
    sparse[:, :100] = normal(64, 1)  # a constant of its own in every row, columns of one client
    found = static.d4_value_entropy(layer(sparse))
    assert one(found, "D4/zeros").value == 0.75
    assert one(found, "D4/constant").value == 1 and "row by row" in one(found, "D4/constant").words
    benign = static.d4_value_entropy(default(64, 400))
    assert one(benign, "D4/zeros").value == 0 and one(benign, "D4/constant").value < 0.1


def test_d4_tolerates_a_zero_initialised_layer_and_half_precision() -> None:
    assert static.d4_value_entropy(layer(torch.zeros(64, 64))) == []
    rounded = default(256, 1024).weight.half().float()
    assert one(static.d4_value_entropy(layer(rounded)), "D4/constant").value < 0.1


# -- D5 --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("s", [0.7, 0.95, 0.99])
def test_d5_reads_the_constant_of_trap_rows(s: float) -> None:
    found = static.d5_trap_fingerprint(layer(traps(s=s)))
    assert one(found, "D5/fingerprint").value > 0.999
    assert f"times {s:.3g}, shuffled" in one(found, "D5/fingerprint").words
    assert one(found, "D5/row_sums").value == 1
    assert "100% of the row sums are negative" in one(found, "D5/row_sums").words


def test_d5_undoes_a_normalisation_folded_into_the_rows() -> None:
    std = torch.tensor((0.25, 0.22, 0.3)).repeat_interleave(1024)
    weight = traps(64, 3072) * std
    found = one(static.d5_trap_fingerprint(layer(weight)), "D5/fingerprint")
    assert found.value > 0.7
    box = Box(mean=(0.5, 0.5, 0.5), std=(0.25, 0.22, 0.3))
    known = one(static.d5_trap_fingerprint(layer(weight), box), "D5/fingerprint")
    assert known.value > 0.999


@pytest.mark.parametrize("seed", range(3))
def test_d5_lets_random_rows_pass(seed: int) -> None:
    for benign in (default(64, 3072, seed), layer(normal(64, 192, seed=seed))):
        found = static.d5_trap_fingerprint(benign)
        assert one(found, "D5/fingerprint").value < 0.6
        assert one(found, "D5/row_sums").value < 0.5


# -- D6 --------------------------------------------------------------------------------------------


def test_d6_is_the_transmit_snr() -> None:
    kernel = torch.full((1, 3, 3, 3), 0.1)
    kernel[0, 0, 1, 1] = 5.2  # 5.2 against 2.6
    found = one(static.d6_transmit_snr(layer(kernel), first=True), "D6/tap")
    assert found.value == pytest.approx(2 / 3) and "transmit-SNR 2" in found.words


def test_d6_sees_copies_in_any_convolution_and_skips_silent_channels() -> None:
    conv = nn.Conv2d(3, 8, 3)
    benign = one(static.d6_transmit_snr(layer(conv.weight.detach()), first=False), "D6/tap")
    assert benign.value < 0.2
    surgery.copying_kernels(conv, 3, gain=[1.0] * 3, shift=[0.0] * 3)
    found = one(static.d6_transmit_snr(layer(conv.weight.detach()), first=False), "D6/tap")
    assert found.value == 1 and "3 kernels copy one tap" in found.words


def test_d6_leaves_depthwise_kernels_behind_the_first_layer_alone() -> None:
    kernel = torch.zeros(8, 1, 3, 3)
    kernel[:, 0, 1, 1] = 1
    assert static.d6_transmit_snr(layer(kernel), first=False) == []
    assert one(static.d6_transmit_snr(layer(kernel), first=True), "D6/tap").value == 1


# -- D7 --------------------------------------------------------------------------------------------


def test_d7_sees_a_head_that_singles_out_a_class() -> None:
    weight = torch.zeros(10, 64)
    weight[3] = 0.5
    bias = torch.full((10,), 1000.0)
    bias[3] = 0
    found = static.d7_head(layer(weight, bias))
    assert one(found, "D7/zero_rows").value == 0.9
    assert one(found, "D7/zero_rows").words == "9 of 10 head rows are exactly zero"
    assert one(found, "D7/row_norms").value == 1
    assert one(found, "D7/biases").value > 0.99


def test_d7_lets_random_and_zero_heads_pass() -> None:
    found = static.d7_head(default(10, 64))
    assert one(found, "D7/zero_rows").value == 0
    assert one(found, "D7/row_norms").value < 0.4 and one(found, "D7/biases").value < 0.4
    assert static.d7_head(layer(torch.zeros(10, 64), torch.zeros(10))) == []


@pytest.mark.parametrize("factor", [1e-6, 1e4])
def test_the_size_of_all_weights_does_not_matter(factor: float) -> None:
    for built in (binning(64), default(64, 192), layer(traps(), normal(64))):
        assert built.bias is not None
        scaled = layer(factor * built.weight, factor * built.bias)
        for check in (static.d2_repeated_rows, static.d3_bias_pattern, static.d4_value_entropy,
                      static.d5_trap_fingerprint, static.d7_head):  # fmt: skip
            plain, other = check(built), check(scaled)
            assert [s.statistic for s in plain] == [s.statistic for s in other]
            for a, b in zip(plain, other, strict=True):
                assert a.value == pytest.approx(b.value, abs=2e-2), a.statistic
