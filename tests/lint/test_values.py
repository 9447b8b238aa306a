"""Any number format and layout is judged by its numbers or refused in words."""

import warnings
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from leakatlas.blocks import surgery
from leakatlas.errors import InvalidInput, LeakAtlasError
from leakatlas.lint import lint
from leakatlas.lint.layers import anatomy


def drawn(m: int, n: int, seed: int = 0) -> Tensor:
    return torch.randn(m, n, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    "dtype",
    [torch.float64, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2],
)
def test_floats_of_any_width_are_judged(dtype: torch.dtype) -> None:
    benign = {"a.weight": drawn(64, 256).to(dtype), "b.weight": drawn(10, 64, 1).to(dtype)}
    verdict = lint(benign)
    assert not verdict.alarm and verdict.scores["D2/partners"].value == 0
    rough = dtype.itemsize == 1
    assert ("D5/fingerprint" in verdict.skipped) == rough
    if rough:
        assert "too few different values in a, b" in verdict.skipped["D5/fingerprint"]
    same = torch.rand(1, 256).expand(64, 256).to(dtype).contiguous()
    assert "D2" in lint({**benign, "a.weight": same}).checks


def test_integers_called_weights_are_judged_and_indices_named() -> None:
    """A module copies integers into its floats, so a server may well send them."""
    rows = (30 * drawn(64, 256)).round().clamp(-127, 127)
    for dtype in (torch.int8, torch.int16, torch.int64):
        verdict = lint({"a.weight": rows.to(dtype), "table": torch.ones(9, 9, dtype=torch.int64)})
        assert not verdict.alarm and "D2/partners" in verdict.scores
        assert verdict.skipped["integers"] == "by their names no weights: table"
    imprint = {"a.weight": torch.arange(1, 257).expand(64, 256).contiguous().to(torch.int32)}
    assert "D2" in lint(imprint).checks


def test_traps_are_read_in_half_precision() -> None:
    rows = surgery.trap_rows(
        64, 192, scaling=0.95, sigma=0.5, generator=torch.Generator(), like=torch.zeros(1)
    )
    assert "D5" in lint({"a.weight": rows.bfloat16()}).checks


def unusual() -> tuple[Tensor, Tensor]:
    """Rows and quantized values in forms that PyTorch warns of, and old files hold."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantized: Tensor = torch.quantize_per_tensor(drawn(8, 8), 0.1, 0, torch.qint8)
        return drawn(8, 8).to_sparse_csr(), quantized


CSR, QUANTIZED = unusual()


def packed() -> Tensor:
    return torch.zeros(8, 8, dtype=torch.uint8).view(torch.float4_e2m1fn_x2)


REFUSED: list[tuple[Any, str]] = [
    (torch.zeros(8, 8, device="meta"), "meta device and holds no values"),
    (drawn(8, 8).to_sparse(), "stored as sparse_coo; call .to_dense"),
    (CSR, "stored as sparse_csr"),
    (torch.zeros(1).expand(10**6, 10**6), "repeats 4 stored bytes"),
    (torch.zeros(8, 8, dtype=torch.complex64), "is complex64"),
    (QUANTIZED, "is qint8"),
    (packed(), "is float4_e2m1fn_x2"),
    (nn.LazyLinear(8).weight, "has no shape yet"),
    (torch.full((8, 8), torch.nan), "64 values that are not finite"),
    ([[1.0]], "is a list"),
    (None, "is a NoneType"),
]


@pytest.mark.parametrize(("tensor", "words"), REFUSED, ids=[words for _, words in REFUSED])
def test_what_has_no_numbers_is_refused_in_words(tensor: Any, words: str) -> None:
    with pytest.raises(InvalidInput, match=words):
        lint({"fc.weight": tensor, "other.weight": drawn(8, 8)})


@pytest.mark.parametrize("model", [None, 3, "model.pt", [drawn(8, 8)], {3: drawn(8, 8)}])
def test_no_state_at_all_is_refused(model: Any) -> None:
    with pytest.raises(InvalidInput, match="lint expects"):
        lint(model)


def test_a_small_view_that_repeats_is_judged() -> None:
    assert "D2" in lint({"a.weight": torch.rand(256).expand(64, 256)}).checks


def test_columns_take_the_size_of_what_feeds_them() -> None:
    weights = {"2.weight": drawn(16, 32), "10.weight": drawn(8, 16, 1), "10.bias": torch.zeros(8)}
    ordered = anatomy(weights).layers
    assert ordered[0].fed is None
    expected = drawn(16, 32).double().norm(dim=1) * 3**0.5
    assert ordered[1].fed is not None and torch.allclose(ordered[1].fed, expected)
    # Sorted names are read in their natural order, 2 before 10.
    by_name = {layer.name: layer for layer in anatomy(dict(sorted(weights.items()))).layers}
    assert by_name["2"].fed is None
    assert by_name["10"].fed is not None and torch.allclose(by_name["10"].fed, expected)
    # A normalisation undoes any size; among sorted names its place is not known.
    normed = {"2.weight": weights["2.weight"], "3.weight": torch.ones(16), **weights}
    assert all(layer.fed is None for layer in anatomy(dict(sorted(normed.items()))).layers)


# -- whatever a file may hold ----------------------------------------------------------------------

NAMES = st.one_of(
    st.sampled_from(["fc.weight", "fc.bias", "0.weight", "1.weight", "10.weight", "a.b.weight"]),
    st.text(max_size=12),
)
DTYPES = st.sampled_from(
    [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn,
     torch.float8_e5m2, torch.int8, torch.uint8, torch.int64, torch.bool, torch.complex64]
)  # fmt: skip
SIZES = st.lists(st.one_of(st.integers(0, 5), st.sampled_from([8, 16, 33])), max_size=5)


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    shape, dtype = draw(SIZES), draw(DTYPES)
    made = torch.randn(shape, generator=torch.Generator().manual_seed(draw(st.integers(0, 99))))
    special = draw(st.sampled_from(["as drawn", "zero", "constant", "one row", "nan", "infinite"]))
    if special == "zero":
        made = torch.zeros(shape)
    elif special == "constant":
        made = torch.full(shape, 0.25)
    elif special == "one row" and made.dim():
        made = made[:1].expand(shape) if made.numel() else made
    elif special in ("nan", "infinite") and draw(st.booleans()):
        made = made * float("nan" if special == "nan" else "inf")
    if dtype.is_floating_point and dtype.itemsize > 2:
        made = made.to(dtype) * 10.0 ** draw(st.integers(-38, 38))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # NaN as an integer
        made = made.to(dtype)
    layout = draw(st.sampled_from(["dense"] * 6 + ["sparse", "meta", "transposed", "expanded"]))
    if layout == "sparse" and not dtype.is_floating_point:
        layout = "dense"
    if layout == "sparse" and dtype.itemsize > 2:
        return made.to_sparse() if made.dim() else made
    if layout == "meta":
        return made.to("meta")
    if layout == "transposed" and made.dim() > 1:
        return made.transpose(0, 1)
    if layout == "expanded":
        return made.expand(3, *shape)
    return made


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(state=st.dictionaries(NAMES, tensors(), max_size=6))
def test_any_state_gives_a_verdict_or_words(state: dict[str, Tensor]) -> None:
    try:
        verdict = lint(state)
    except LeakAtlasError as problem:
        assert 10 < len(str(problem)) < 2_000
    else:
        assert verdict.to_json()["alarm"] is verdict.alarm
        assert all(0 <= score.value <= 1 for score in verdict.scores.values())
