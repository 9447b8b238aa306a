from __future__ import annotations

import math
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from leakatlas.blocks import matching
from leakatlas.errors import InvalidInput

DISTANCES = (
    matching.squared_l2,
    matching.relative_l2,
    matching.cosine,
    matching.layerwise_l2,
)


def updates(seed: int, *, requires_grad: bool = False) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"conv.weight": (2, 1, 3, 3), "conv.bias": (2,), "fc.weight": (3, 4)}
    return {
        name: torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_(
            requires_grad
        )
        for name, shape in shapes.items()
    }


def joined(update: Mapping[str, Tensor]) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in update.values()])


A, B = updates(1), updates(2)


def test_squared_l2_is_that_of_the_joined_vector() -> None:
    torch.testing.assert_close(
        matching.squared_l2(A, B), (joined(A) - joined(B)).square().sum(), rtol=1e-14, atol=0
    )


def test_relative_l2_by_hand() -> None:
    a, b = {"w": torch.tensor([3.0, 4.0])}, {"w": torch.tensor([0.0, 2.0])}
    assert float(matching.relative_l2(a, b)) == pytest.approx((9 + 4) / 4)


def test_cosine_joins_all_tensors_before_it_normalises() -> None:
    expected = 1 - torch.nn.functional.cosine_similarity(joined(A), joined(B), dim=0)
    torch.testing.assert_close(matching.cosine(A, B), expected, rtol=1e-12, atol=0)
    per_layer = [
        1 - torch.nn.functional.cosine_similarity(A[n].flatten(), B[n].flatten(), dim=0) for n in A
    ]
    assert abs(float(sum(per_layer) / len(per_layer)) - float(expected)) > 1e-3


def test_layerwise_l2_by_hand() -> None:
    a = {"v": torch.tensor([3.0, 4.0]), "w": torch.tensor([[1.0]])}
    b = {"v": torch.zeros(2), "w": torch.tensor([[-1.0]])}
    assert float(matching.layerwise_l2(a, b)) == pytest.approx(5 + 2, rel=1e-6)


@pytest.mark.parametrize("distance", DISTANCES)
def test_zero_with_zero_slope_where_both_agree(distance: matching.Distance) -> None:
    a = {name: tensor.clone().requires_grad_() for name, tensor in B.items()}
    value = distance(a, B)
    assert abs(float(value.detach())) < 1e-14
    for slope in torch.autograd.grad(value, list(a.values())):
        assert float(slope.abs().max()) < 1e-14


@pytest.mark.parametrize("distance", DISTANCES)
def test_gradient_against_finite_differences(distance: matching.Distance) -> None:
    a = updates(3, requires_grad=True)

    def of(*tensors: Tensor) -> Tensor:
        return distance(dict(zip(a, tensors, strict=True)), B)

    assert torch.autograd.gradcheck(of, tuple(a.values()))


def test_cosine_is_blind_to_a_positive_factor_and_the_others_are_not() -> None:
    scaled = {name: 7.5 * tensor for name, tensor in B.items()}
    torch.testing.assert_close(matching.cosine(A, B), matching.cosine(A, scaled))
    for distance in (matching.squared_l2, matching.relative_l2, matching.layerwise_l2):
        assert float(distance(A, B)) != pytest.approx(float(distance(A, scaled)), rel=1e-2)


def test_relative_l2_has_no_unit() -> None:
    larger_a, larger_b = ({n: 100 * t for n, t in u.items()} for u in (A, B))
    torch.testing.assert_close(matching.relative_l2(larger_a, larger_b), matching.relative_l2(A, B))


def test_cosine_of_opposites_is_two() -> None:
    opposite = {name: -tensor for name, tensor in A.items()}
    assert float(matching.cosine(A, opposite)) == pytest.approx(2, abs=1e-14)


@pytest.mark.parametrize("distance", DISTANCES)
def test_names_decide_not_positions(distance: matching.Distance) -> None:
    torch.testing.assert_close(
        distance(dict(reversed(A.items())), B), distance(A, B), rtol=1e-14, atol=0
    )
    foreign = {**A, "other": torch.ones(3, dtype=torch.float64)}
    torch.testing.assert_close(distance(foreign, B), distance(A, B), rtol=1e-14, atol=0)


def test_a_missing_tensor_is_named() -> None:
    with pytest.raises(InvalidInput, match=r"lacks 'fc\.weight'"):
        matching.squared_l2({n: t for n, t in A.items() if n != "fc.weight"}, B)
    with pytest.raises(InvalidInput, match="without tensors"):
        matching.squared_l2(A, {})


def test_subset_sees_only_its_names() -> None:
    only = matching.subset(matching.squared_l2, ["conv.bias"])
    torch.testing.assert_close(only(A, B), (A["conv.bias"] - B["conv.bias"]).square().sum())
    changed = {**A, "fc.weight": A["fc.weight"] + 1}
    assert float(only(changed, B)) == float(only(A, B))
    with pytest.raises(InvalidInput, match="at least one"):
        matching.subset(matching.squared_l2, [])


def test_largest_orders_by_norm() -> None:
    b = {"a": torch.ones(2), "b": torch.ones(9), "c": torch.ones(4)}
    assert matching.largest(b, 2) == ("b", "c")


def test_masked_ignores_what_was_pruned() -> None:
    kept = {name: torch.where(tensor.abs() > 0.5, tensor, 0.0) for name, tensor in B.items()}
    masks = {name: tensor != 0 for name, tensor in kept.items()}
    distance = matching.masked(matching.squared_l2, masks)
    assert float(distance(B, kept)) == 0
    assert float(matching.squared_l2(B, kept)) > 0
    expected = sum(float(((A[n] - B[n]) * masks[n]).square().sum()) for n in B)
    assert float(distance(A, kept)) == pytest.approx(expected, rel=1e-12)


def test_norm_along_dimensions() -> None:
    x = torch.tensor([[3.0, 4.0], [0.0, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(
        matching.norm(x, (1,)), torch.tensor([5.0, 0.0], dtype=torch.float64), rtol=1e-6, atol=0
    )
    assert matching.ROOT_EPSILON <= 1e-12
    assert math.isfinite(float(matching.norm(x)))


@pytest.mark.parametrize("distance", [matching.cosine, matching.squared_l2, matching.relative_l2])
def test_the_hand_written_derivatives_pass_gradcheck_twice(distance: matching.Distance) -> None:
    generator = torch.Generator().manual_seed(0)
    draw = [torch.randn(3, 2, generator=generator, dtype=torch.float64) for _ in range(4)]
    b = {"w": draw[2], "v": draw[3][0]}

    def of(w: Tensor, v: Tensor) -> Tensor:
        return distance({"w": w, "v": v}, b)

    leaves = (draw[0].requires_grad_(), draw[1][0].clone().requires_grad_())
    assert torch.autograd.gradcheck(of, leaves)
    assert torch.autograd.gradgradcheck(of, leaves)
