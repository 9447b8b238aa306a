from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from leakatlas import models
from leakatlas.errors import InvalidInput, UnknownName
from leakatlas.fl import ModelRef, load_into, model_state, state_hash
from leakatlas.fl.state import held, require_finite


def _state() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "a.weight": torch.randn(3, 2, generator=generator),
        "b": torch.arange(4),
        "flag": torch.tensor(True),
        "scalar": torch.tensor(1.5, dtype=torch.float64),
        "none": torch.empty(0),
    }


@pytest.mark.parametrize("name", ["a.weight", "b", "scalar"])
def test_the_hash_changes_with_one_bit(name: str) -> None:
    state = _state()
    before = state_hash(state)
    state[name].reshape(-1).view(torch.uint8)[0] ^= 1
    assert state_hash(state) != before
    state[name].reshape(-1).view(torch.uint8)[0] ^= 1
    assert state_hash(state) == before


def test_the_hash_ignores_order_and_memory_layout() -> None:
    state = _state()
    other = dict(reversed(state.items()))
    other["a.weight"] = state["a.weight"].t().contiguous().t()
    assert not other["a.weight"].is_contiguous()
    assert state_hash(other) == state_hash(state)


def test_the_hash_tells_names_shapes_and_types_apart() -> None:
    zeros = torch.zeros(4)
    variants = [
        {"w": zeros},
        {"v": zeros},
        {"w": zeros.reshape(2, 2)},
        {"w": zeros.to(torch.int32)},
        {"w": torch.zeros(2), "x": torch.zeros(2)},
        {"w": -zeros},
    ]
    assert len({state_hash(v) for v in variants}) == len(variants)


def test_model_state_is_a_copy_without_graph() -> None:
    model = models.build("convnet-bn", size=8)
    held = model_state(model)
    name, parameter = next(iter(model.named_parameters()))
    assert not held[name].requires_grad
    assert held[name].data_ptr() != parameter.data_ptr()
    assert any("running_mean" in n for n in held)


def test_load_into_leaves_both_sides_alone_and_takes_the_dtype() -> None:
    model = models.build("convnet-bn", size=8, seed=0)
    before = state_hash(model_state(model))
    other = models.build("convnet-bn", size=8, seed=1).double()
    wanted = model_state(other)
    loaded = load_into(model, wanted)
    assert state_hash(model_state(loaded)) == state_hash(wanted)
    assert state_hash(model_state(model)) == before
    for name, tensor in model_state(loaded).items():
        assert tensor.data_ptr() != wanted[name].data_ptr()


@pytest.mark.parametrize("change", ["missing", "extra", "shape"])
def test_a_state_that_does_not_fit_is_named(change: str) -> None:
    model = nn.Linear(2, 3)
    state = model_state(model)
    match change:
        case "missing":
            del state["bias"]
            message = r"at 'bias' the model expects \(3,\), the state holds nothing"
        case "extra":
            state["more"] = torch.zeros(1)
            message = r"at 'more' the model expects nothing, the state holds \(1,\)"
        case _:
            state["bias"] = torch.zeros(4)
            message = r"at 'bias' the model expects \(3,\), the state holds \(4,\)"
    with pytest.raises(InvalidInput, match=message):
        load_into(model, state)


def test_a_builtin_reference_builds_what_it_names() -> None:
    model = ModelRef("builtin", "lenet", {"size": 8, "classes": 3}).build()
    assert isinstance(model, models.LeNet)
    assert model(torch.zeros(1, 3, 8, 8)).shape == (1, 3)


def test_a_python_file_is_a_reference(tmp_path: Path) -> None:
    file = tmp_path / "net.py"
    file.write_text("from torch import nn\ndef make(width):\n    return nn.Linear(width, 2)\n")
    model = ModelRef("python", f"{file}:make", {"width": 5}).build(trust_code=True)
    assert isinstance(model, nn.Linear) and model.in_features == 5
    with pytest.raises(UnknownName, match="Did you mean 'make'"):
        ModelRef("python", f"{file}:mak").build(trust_code=True)


@pytest.mark.parametrize(
    ("kind", "name", "message"),
    [
        ("object", "MyNet", "live object and cannot be rebuilt"),
        ("python", "torch.nn", "is 'file.py:factory'"),
        ("python", "no_such_module_here:make", "not importable"),
        ("python", "missing.py:make", "does not exist"),
        ("python", "builtins:dict", "is Python's own and was not run"),
    ],
)
def test_references_that_build_nothing(kind: str, name: str, message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        ModelRef(kind, name).build(trust_code=True)  # type: ignore[arg-type]  # parametrised Literal


def test_whole_numbers_are_no_weights_but_floats_may_count() -> None:
    model = nn.BatchNorm1d(2)
    state = {n: t.float() for n, t in model.state_dict().items()}  # as arrays come from a server
    assert load_into(model, state).get_buffer("num_batches_tracked").dtype == torch.int64
    state["weight"] = torch.ones(2, dtype=torch.int8)
    with pytest.raises(InvalidInput, match=r"'weight' the model expects torch.float32.*torch.int8"):
        load_into(model, state)


class _Masked(nn.Module):
    """An attention's mask is a buffer of infinities, which is no fault."""

    mask: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(2)
        self.register_buffer("mask", torch.tensor([0.0, -torch.inf]))


def test_infinite_constants_of_an_architecture_are_no_fault() -> None:
    require_finite(held(_Masked()), _Masked(), "x")


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("mask", [torch.nan, -torch.inf]),
        ("mask", [-torch.inf, 0.0]),
        ("mask", [0.0, torch.inf]),
        ("norm.running_var", [1.0, torch.inf]),
        ("norm.weight", [1.0, torch.nan]),
    ],
)
def test_other_infinities_are_refused_by_name(name: str, values: list[float]) -> None:
    state = {**model_state(_Masked()), name: torch.tensor(values)}
    with pytest.raises(InvalidInput, match=f"^x holds . values at '{name}' that are not finite"):
        require_finite(state, _Masked(), "x")


def test_running_statistics_are_refused_although_the_architecture_has_them() -> None:
    model = _Masked()
    model.norm.running_var = torch.tensor([1.0, torch.inf])
    with pytest.raises(InvalidInput, match="running_var"):
        require_finite(held(model), model, "x")
