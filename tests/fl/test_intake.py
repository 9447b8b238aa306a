"""Models in wrappers, lazy ones, and outputs that are no tensor."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from leakatlas.errors import InvalidInput
from leakatlas.fl import ModelRef
from leakatlas.fl.intake import Selector, take_in


def _net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 6), nn.ReLU(), nn.Linear(6, 3))


def _opacus(model: nn.Module) -> nn.Module:
    grad_sample = pytest.importorskip("opacus.grad_sample")
    wrapped: nn.Module = grad_sample.GradSampleModule(model)
    return wrapped


def _both(model: nn.Module) -> nn.Module:
    compiled = torch.compile(model)
    assert isinstance(compiled, nn.Module)
    return nn.DataParallel(compiled)


@pytest.mark.parametrize(
    "wrap",
    [nn.DataParallel, torch.compile, _opacus, _both],
    ids=["DataParallel", "compiled", "Opacus", "both"],
)
def test_wrappers_come_off_with_a_note_and_names_stay_the_users(
    wrap: Callable[[nn.Module], nn.Module],
) -> None:
    inner, x = _net(), torch.randn(2, 3, 2, 2)
    wrapped = wrap(inner)
    taken = take_in(wrapped)
    assert list(dict(taken.model.named_parameters())) == list(dict(_net().named_parameters()))
    assert taken.notes and all("unwrapped" in note for note in taken.notes)
    torch.testing.assert_close(taken.model(x), _net()(x))
    assert not any(m._forward_hooks or m._backward_hooks for m in taken.model.modules())


def test_a_plain_model_is_taken_as_it_is() -> None:
    model = _net()
    taken = take_in(model)
    assert taken.model is model and taken.notes == ()


def test_lazy_layers_take_their_sizes_from_the_images() -> None:
    lazy = nn.Sequential(nn.LazyConv2d(4, 3), nn.Flatten(), nn.LazyLinear(3))
    taken = take_in(lazy, torch.zeros(1, 3, 8, 8))
    assert taken.model(torch.zeros(2, 3, 8, 8)).shape == (2, 3)
    assert "drew their weights now" in taken.notes[0]
    again = take_in(lazy, torch.zeros(1, 3, 8, 8)).model
    assert all(torch.equal(a, b) for a, b in
               zip(taken.model.parameters(), again.parameters(), strict=True))  # fmt: skip
    with pytest.raises(InvalidInput, match="run the model once"):
        take_in(lazy)


@dataclass
class Output:
    """As Hugging Face models answer."""

    loss: None
    logits: Tensor


class Wrapped(nn.Module):
    """A net whose answer is packed."""

    def __init__(self, pack: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.net = _net()
        self.pack = pack

    def forward(self, x: Tensor) -> Any:
        return self.pack(self.net(x))


@pytest.mark.parametrize(
    ("pack", "output"),
    [
        (lambda z: (z, "aux"), 0),
        (lambda z: {"aux": 1, "out": z}, "out"),
        (lambda z: {"aux": 1, "out": z}, 1),
        (lambda z: Output(None, z), "logits"),
    ],
)
def test_the_logits_are_selected_and_the_choice_survives_copies(
    pack: Callable[[Tensor], Any], output: Selector
) -> None:
    model, x = Wrapped(pack), torch.randn(2, 3, 2, 2)
    taken = take_in(model, output=output).model
    for chosen in (taken, take_in(taken).model):
        torch.testing.assert_close(chosen(x), model.net(x))
    assert not isinstance(model(x), Tensor)


def test_a_choice_that_does_not_exist_shows_what_there_is() -> None:
    model = take_in(Wrapped(lambda z: {"out": z, "aux": 3}), output="logits").model
    with pytest.raises(InvalidInput, match=r"no tensor at 'logits'.*'out' \(2, 3\), 'aux' int"):
        model(torch.zeros(2, 3, 2, 2))


def test_the_choice_is_part_of_how_a_model_is_described() -> None:
    reference = ModelRef("python", "tests.fl.test_intake:packed", {}, 0)
    assert ModelRef.from_json(reference.to_json()) == reference
    assert reference.build(trust_code=True)(torch.zeros(1, 3, 2, 2)).shape == (1, 3)


def packed() -> nn.Module:
    """A factory for the test above."""
    return Wrapped(lambda z: (z,))
