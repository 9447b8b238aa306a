from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from leakatlas.errors import InvalidInput
from leakatlas.fl import Update, average


def _update(**changes: Any) -> Update:
    generator = torch.Generator().manual_seed(1)
    base = Update(
        tensors={
            "fc.weight": torch.randn(3, 4, generator=generator, dtype=torch.float64),
            "fc.bias": torch.randn(3, generator=generator, dtype=torch.float64),
        },
        kind="gradient",
        state_hash="00ff",
        num_examples=4,
        buffers_before={"bn.mean": torch.zeros(2), "bn.count": torch.tensor(3)},
        buffers_after={"bn.mean": torch.ones(2), "bn.count": torch.tensor(4)},
    )
    return replace(base, **changes)


def _same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.allclose(a[n], b[n], rtol=1e-12) for n in a)


@pytest.mark.parametrize(("sign", "scale"), list(itertools.product((1, -1), (1.0, 0.25, 8.0))))
def test_quantity_undoes_sign_and_scale(sign: Literal[1, -1], scale: float) -> None:
    plain = _update()
    sent = _update(
        sign=sign,
        scale=scale,
        tensors={n: sign * scale * t for n, t in plain.tensors.items()},
    )
    assert _same(sent.quantity(), dict(plain.tensors))
    assert _same(sent.gradient(), dict(plain.tensors))


def test_a_sum_reduced_gradient_becomes_a_mean() -> None:
    plain = _update()
    summed = _update(reduction="sum", tensors={n: 4 * t for n, t in plain.tensors.items()})
    assert _same(summed.gradient(), dict(plain.tensors))


def test_a_delta_becomes_the_mean_gradient_of_its_steps() -> None:
    gradient = dict(_update().tensors)
    lr, steps = 0.05, 3
    delta = _update(
        kind="delta", sign=-1, scale=2.0,
        tensors={n: -1 * 2.0 * (-lr * steps * t) for n, t in gradient.items()},
    )  # fmt: skip
    assert _same(delta.gradient(lr=lr, steps=steps), gradient)


@pytest.mark.parametrize(("kind", "lr"), [("delta", None), ("weights", None), ("weights", 0.1)])
def test_a_gradient_cannot_be_read_without_what_it_takes(
    kind: Literal["delta", "weights"], lr: float | None
) -> None:
    with pytest.raises(InvalidInput, match=f"kind '{kind}'.*needs the local learning rate"):
        _update(kind=kind).gradient(lr=lr)


def test_save_and_load_keep_everything(tmp_path: Path) -> None:
    update = _update(kind="delta", sign=-1, scale=0.3, reduction="sum", clients=5)
    update.save(tmp_path / "u.safetensors")
    loaded = Update.load(tmp_path / "u.safetensors")
    for group in ("tensors", "buffers_before", "buffers_after"):
        ours, theirs = getattr(update, group), getattr(loaded, group)
        assert ours.keys() == theirs.keys()
        assert group != "tensors" or list(ours) == list(theirs)  # sums round by their order
        assert all(torch.equal(ours[n], theirs[n]) for n in ours)
        assert all(ours[n].dtype == theirs[n].dtype for n in ours)
    for fact in ("kind", "state_hash", "num_examples", "sign", "scale", "reduction", "clients"):
        assert getattr(update, fact) == getattr(loaded, fact)


@pytest.mark.parametrize("kept", [0, 4, 8, 100, -1])
def test_a_truncated_file_is_refused_and_says_so(tmp_path: Path, kept: int) -> None:
    file = tmp_path / "u.safetensors"
    _update().save(file)
    content = file.read_bytes()
    file.write_bytes(content[:kept])
    with pytest.raises(InvalidInput, match=r"no safetensors file; ask for it again"):
        Update.load(file)


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="does not exist"):
        Update.load(tmp_path / "none.safetensors")
    with pytest.raises(InvalidInput, match="is not a file"):
        Update.load(tmp_path)


def test_a_foreign_safetensors_file_is_refused(tmp_path: Path) -> None:
    save_file({"w": torch.zeros(2)}, tmp_path / "weights.safetensors")
    with pytest.raises(InvalidInput, match=r"lacks 'leakatlas\.update'"):
        Update.load(tmp_path / "weights.safetensors")


@pytest.mark.parametrize("facts", ["[1]", "null", "3", "{broken", '{"kind": "gradient"}',
                                   '{"kind": 1, "surprise": 2}'])  # fmt: skip
def test_damaged_facts_are_refused(tmp_path: Path, facts: str) -> None:
    file = tmp_path / "u.safetensors"
    save_file({"tensors/w": torch.ones(2)}, file, metadata={"leakatlas.update": facts})
    with pytest.raises(InvalidInput):
        Update.load(file)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("kind", "thought"),
        ("sign", 0),
        ("sign", 2),
        ("scale", 0.0),
        ("scale", float("nan")),
        ("num_examples", 0),
        ("num_examples", "four"),
        ("reduction", "median"),
        ("clients", 0),
    ],
)
def test_facts_outside_their_range_are_refused_by_name(
    tmp_path: Path, name: str, value: object
) -> None:
    _update(**{name: value}).save(tmp_path / "u.safetensors")
    with pytest.raises(InvalidInput, match=name):
        Update.load(tmp_path / "u.safetensors")


def test_a_description_of_other_tensors_is_refused() -> None:
    tensors, facts = _update().pack()
    del tensors["tensors/fc.bias"]
    with pytest.raises(InvalidInput, match=r"description and its tensors differ: 'fc\.bias'"):
        Update.unpack(tensors, facts)


@pytest.mark.parametrize("key", ["w", "tensors/", "elsewhere/w"])
def test_a_tensor_outside_the_groups_is_refused(key: str) -> None:
    facts = _update().pack()[1]
    with pytest.raises(InvalidInput, match="not a tensor of an update file"):
        Update.unpack({key: torch.ones(1)}, facts)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_values_are_counted_and_named(tmp_path: Path, bad: float) -> None:
    update = _update()
    update.tensors["fc.bias"][1:] = bad
    with pytest.raises(InvalidInput, match=r"'fc\.bias' has 2 non-finite of 3 values"):
        update.check()
    update.save(tmp_path / "u.safetensors")
    with pytest.raises(InvalidInput, match=r"'fc\.bias' has 2 non-finite of 3 values"):
        Update.load(tmp_path / "u.safetensors")


def test_no_tensors_and_integers_are_refused() -> None:
    with pytest.raises(InvalidInput, match="holds no tensors"):
        _update(tensors={}).check()
    with pytest.raises(InvalidInput, match=r"'w' is torch\.int64, expected floats"):
        _update(tensors={"w": torch.ones(2, dtype=torch.int64)}).check()


def test_a_wrong_shape_and_an_unknown_name_are_refused() -> None:
    parameters = {"fc.weight": torch.zeros(3, 4), "fc.bias": torch.zeros(3)}
    _update().check_fits(parameters)
    with pytest.raises(InvalidInput, match=r"'fc\.bias' has shape \(3,\).*parameter has \(2,\)"):
        _update().check_fits({**parameters, "fc.bias": torch.zeros(2)})
    with pytest.raises(InvalidInput, match=r"'fc\.bias' that the model lacks.*has: fc\.weight"):
        _update().check_fits({"fc.weight": torch.zeros(3, 4)})


def test_the_average_weighs_by_examples_and_adds_them_up() -> None:
    a, b = _update(num_examples=1), _update(num_examples=3)
    b = b.with_tensors({n: 5 * t for n, t in b.tensors.items()})
    mean = average({7: a, 9: b})
    assert _same(dict(mean.tensors), {n: (t + 3 * 5 * t) / 4 for n, t in a.tensors.items()})
    assert (mean.num_examples, mean.clients) == (4, 2)


def test_the_average_of_sums_and_given_weights() -> None:
    a, b = _update(num_examples=1, reduction="sum"), _update(num_examples=3, reduction="sum")
    b = b.with_tensors({n: 3 * t for n, t in b.tensors.items()})
    assert _same(dict(average({0: a, 1: b}).tensors), {n: 2 * t for n, t in a.tensors.items()})
    weighted = average({0: a, 1: b}, {0: 3.0, 1: 1.0})
    assert _same(dict(weighted.tensors), {n: 1.5 * t for n, t in a.tensors.items()})


def test_buffers_are_averaged_and_counters_kept() -> None:
    a = _update(num_examples=1)
    b = _update(num_examples=3, buffers_after={"bn.mean": torch.full((2,), 5.0),
                                               "bn.count": torch.tensor(4)})  # fmt: skip
    after = average({0: a, 1: b}).buffers_after
    assert torch.allclose(after["bn.mean"], torch.full((2,), 4.0))
    assert after["bn.count"] == 4 and after["bn.count"].dtype == torch.int64


@pytest.mark.parametrize(
    "other",
    [
        {"kind": "delta"},
        {"sign": -1},
        {"scale": 2.0},
        {"reduction": "sum"},
        {"tensors": {"fc.weight": torch.zeros(3, 4)}},
    ],
)
def test_messages_of_different_meaning_are_not_averaged(other: dict[str, Any]) -> None:
    with pytest.raises(InvalidInput, match="Client 2's update"):
        average({1: _update(), 2: _update(**other)})


def test_nothing_to_average_is_refused() -> None:
    with pytest.raises(InvalidInput, match="no updates"):
        average({})
