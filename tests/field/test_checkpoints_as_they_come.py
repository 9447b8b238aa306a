"""Weights as trainers leave them: wrapped, prefixed, with more beside them than a model."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from leakatlas.audit import AuditConfig
from leakatlas.audit.config import make_plan
from leakatlas.errors import InvalidInput
from leakatlas.fl.naming import by_name
from leakatlas.models import fit_state, load_for

State = dict[str, Tensor]


def _net(width: int = 3) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, width, 2), nn.BatchNorm2d(width), nn.Flatten(), nn.Linear(width * 9, 2)
    )


class Wrapped(nn.Module):
    """A user's own class around the model."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = _net()

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.backbone(x)
        return logits


def _trained() -> State:
    torch.manual_seed(11)
    return {n: torch.randn(t.shape).abs().to(t.dtype) for n, t in _net().state_dict().items()}


def _under(prefix: str, state: Mapping[str, Tensor]) -> State:
    return {prefix + name: tensor for name, tensor in state.items()}


def _adam(state: State) -> dict[str, Any]:
    return {"state": {0: {"exp_avg": state["0.weight"]}}, "param_groups": [{"params": [0]}]}


FORMS: Mapping[str, tuple[Callable[[State], Any], str]] = {
    "as it is": (lambda s: s, ""),
    "Lightning": (
        lambda s: {
            "state_dict": _under("model.", s), "epoch": 4, "optimizer_states": [_adam(s)],
        },
        "prefix 'model.'",
    ),
    "Lightning with a metric": (
        lambda s: {"state_dict": {**_under("net.", s), "accuracy.total": torch.ones(2)}},
        "1 tensors were left out: accuracy.total",
    ),
    "DataParallel": (lambda s: _under("module.", s), "prefix 'module.'"),
    "compiled": (lambda s: _under("_orig_mod.", s), "prefix '_orig_mod.'"),
    "compiled in DataParallel": (lambda s: _under("module._orig_mod.", s), "'module._orig_mod.'"),
    "Opacus": (lambda s: {"model_state_dict": _under("_module.", s)}, "prefix '_module.'"),
    "one level more": (lambda s: {"round": 3, "global_weights": s}, "under global_weights"),
    "two levels more": (lambda s: {"server": {"best": s}, "lr": 0.1}, "under server/best"),
    "beside an optimiser": (lambda s: {"net": s, "optimizer": _adam(s)}, "under net"),
    "named model beside ema": (lambda s: {"ema": s, "model": s}, "under model"),
    "averaged": (
        lambda s: {n: t for n, t in s.items() if "batches" not in n},
        "1 counters of batch normalisation are missing",
    ),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_a_checkpoint_holds_the_same_weights(tmp_path: Path, form: str) -> None:
    make, words = FORMS[form]
    state, model = _trained(), _net()
    torch.save(make(state), tmp_path / "last.ckpt")
    held = load_for(model, tmp_path / "last.ckpt")
    assert held.state.keys() == state.keys()
    for name, tensor in state.items():
        if "batches" not in name:
            assert held.state[name].equal(tensor)
    assert words in " ".join(held.notes)
    assert bool(held.notes) == (form != "as it is")


def test_a_bare_checkpoint_fits_a_model_that_wraps_it() -> None:
    for outer in ("", "module."):
        held = fit_state(_under(outer, _trained()), Wrapped(), source="x.pt")
        assert held.state["backbone.3.weight"].equal(_trained()["3.weight"])
        assert any("got the model's prefix 'backbone.'" in note for note in held.notes)


def test_buffers_that_are_never_saved_and_tied_weights_are_no_obstacle() -> None:
    model = _net()
    model.register_buffer("positions", torch.arange(4), persistent=False)
    tied = nn.ModuleDict({"a": model, "b": model[3]})
    held = fit_state(_under("module.", tied.state_dict()), tied, source="x.pt")
    assert held.state["a.positions"].tolist() == [0, 1, 2, 3]
    assert "b.weight" not in held.state  # the same tensor under its first name


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: {"x": s, "y": s}, "several mappings hold tensors: x, y"),
        (lambda s: {**_under("student.", s), **_under("teacher.", s)}, "'student.', 'teacher.'"),
        (lambda s: {**_under("m.", s), "m.9.weight": torch.ones(1)}, r"not in the model: .* more"),
        (lambda s: {**s, "9.weight": torch.ones(1)}, "not in the model: 9.weight"),
        (lambda s: {n: t for n, t in s.items() if n != "3.bias"}, "missing 3.bias; not in"),
        (
            lambda s: {f"layer{n}": t for n, t in s.items()},
            r"0\.bias, 0\.weight, 1\.bias and 5 more",
        ),
        (
            lambda s: {**s, "3.weight": torch.ones(2, 5), "3.bias": torch.ones(3)},
            r"3\.weight has shape \(2, 5\).*expects \(2, 27\); 1 more differ",
        ),
    ],
)
def test_what_does_not_fit_is_shown_from_both_sides(
    tmp_path: Path, change: Callable[[State], Any], words: str
) -> None:
    torch.save(change(_trained()), tmp_path / "w.pt")
    with pytest.raises(InvalidInput, match=words):
        load_for(_net(), tmp_path / "w.pt")


def test_an_audit_says_what_it_did_to_the_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(
        "from torch import nn\n"
        "def make():\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))\n"
    )
    weights = {"model.1.weight": torch.full((10, 64), 0.25), "model.1.bias": torch.zeros(10)}
    torch.save({"state_dict": weights}, tmp_path / "last.ckpt")
    keys = {
        "model": {"python": "net.py:make", "weights": "last.ckpt"},
        "data": {"victims": "digits:8", "limit": 2},
    }
    plan = make_plan(AuditConfig.model_validate(keys), base=tmp_path, command="")
    (setting,) = plan.settings
    assert bool((setting.model.state_dict()["1.weight"] == 0.25).all())
    notes = " ".join(setting.stage(letter="B", seed=0).notes)
    assert "under state_dict" in notes and "lost their prefix 'model.'" in notes


def test_captured_updates_may_carry_any_common_prefix() -> None:
    model = _net()
    gradients = {n: torch.randn_like(p) for n, p in model.named_parameters()}
    for prefix in ("module.", "model.", "net._orig_mod."):
        named = by_name(_under(prefix, gradients), copy.deepcopy(model), "update")
        assert named.parameters.keys() == gradients.keys()
        assert repr(prefix) in named.order
