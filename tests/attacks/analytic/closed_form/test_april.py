from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from leakatlas.attacks.analytic.closed_form.april import (
    APRIL,
    find_front,
    solve_rows,
    token_system,
)
from leakatlas.attacks.api import Reconstruction
from leakatlas.bench.harness import Trial, observe, run_trial
from leakatlas.data.box import CIFAR10
from leakatlas.errors import UnsupportedModel
from leakatlas.fl import FedAVG, FedSGD, Stage, Update, View
from leakatlas.models import LeNet, ViT
from leakatlas.models.vit import Block, DirectBlock
from tests.attacks.analytic.support import errors, same_after_saving, small_stage
from tests.attacks.case import Case
from tests.conftest import BOX, gradients_at

CASE = Case(
    {},
    {
        "model": "vit",
        "settings": {"first_block": "april", "dim": 48, "depth": 1, "patch": 4},
        "examples": 1,
    },
    boxed=True,
)

EXACT = 1e-9
ROOT = Path(__file__).resolve().parents[4]


def _stage(**settings: object) -> Stage:
    model = {"first_block": "april", **settings}
    scene = {
        name: model.pop(name) for name in ("examples", "protocol", "dtype", "size") if name in model
    }
    return small_stage(letter="B", model="vit", settings=model, box=BOX, **scene)  # type: ignore[arg-type]  # settings are those of small_stage


def _tokens(trial: Trial) -> tuple[Tensor, Tensor]:
    """What the client's model embedded, and what the gradient says it embedded."""
    model = trial.view.model
    assert isinstance(model, ViT)
    x = BOX.normalize(trial.truth.images.double())
    patches = model.embed(x).flatten(2).transpose(1, 2)[0]
    z = torch.cat([model.cls_token[0], patches]) + model.positions[0]
    a, b = token_system(trial.view, find_front(trial.view.model, trial.view.input_shape))
    return z.detach(), solve_rows(a.T, b, 1e-11).x


# -- exactness -------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [16, 32])
def test_tokens_and_pixels_are_exact(size: int) -> None:
    """16 or 64 patches of 4x4x3 and d = 96 >= 65 tokens, 48 pixels."""
    trial = run_trial(_stage(size=size, dim=96), APRIL())
    assert trial.found.status == "complete"
    z, z_hat = _tokens(trial)
    assert float((z - z_hat).abs().max()) < EXACT
    assert float(errors(trial).max()) < EXACT
    assert trial.found.notes["known_token_error"] < EXACT
    assert torch.equal(trial.found.labels, trial.truth.labels)  # type: ignore[arg-type]  # not None


def test_the_token_system_holds_for_random_weights() -> None:
    stage = _stage()
    model = stage.federation.model
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    trial = run_trial(stage, APRIL())
    z, _ = _tokens(trial)
    a, b = token_system(trial.view, find_front(trial.view.model, (3, 16, 16)))
    assert float((a.T @ z - b).abs().max()) < 1e-10 * float(b.abs().max())


@pytest.mark.parametrize("loss", ["entropy", "margin", "square"])
def test_neither_label_nor_loss_matters(loss: str) -> None:
    stage = _stage()
    view, _ = observe(stage, APRIL())
    losses = {
        "entropy": lambda o, y: nn.functional.cross_entropy(o, (y + 3) % 10),
        "margin": nn.functional.multi_margin_loss,
        "square": lambda o, y: (o - 2.0).square().sum() * 7,
    }
    client = stage.federation.clients[0]
    g = gradients_at(view.model, client.x, client.y, losses[loss])
    found = APRIL()(_with(view, view.update.with_tensors(g)))
    assert float((found.images - client.x).abs().max()) < EXACT


def test_a_step_of_unknown_length_is_as_good_as_a_gradient_and_two_steps_are_noticed() -> None:
    one = run_trial(_stage(protocol=FedAVG(batch_size=1, lr=0.03)), APRIL())
    assert one.found.status == "complete" and "protocol" not in one.found.reads
    assert float(errors(one).max()) < 1e-8
    two = run_trial(_stage(protocol=FedAVG(batch_size=1, lr=0.3, epochs=2)), APRIL())
    assert two.found.status == "failed" and "contradict" in two.found.reason
    assert float(errors(two).max()) > 1e-4


def test_float32_gives_a_picture() -> None:
    trial = run_trial(_stage(dtype=torch.float32), APRIL())
    assert trial.found.images.dtype == torch.float32
    assert trial.found.status == "complete" and float(errors(trial).max()) < 1e-3


def test_cutting_what_drowns_in_rounding_beats_solving_for_it() -> None:
    matrix = torch.diag(torch.tensor([1.0, 1e-8], dtype=torch.float64))
    truth = torch.tensor([[1.0], [0.5]], dtype=torch.float64)
    right = matrix @ truth + 1e-7
    cut, whole = (solve_rows(matrix, right, tolerance) for tolerance in (1e-6, 1e-12))
    assert (cut.rank, whole.rank) == (1, 2)
    assert float((cut.x - truth).norm()) < float((whole.x - truth).norm()) / 10


def test_the_patches_of_least_norm_are_those_of_the_independent_port() -> None:
    """Stored in results/differential: what breaching's closed form makes of the same gradient."""
    stored = json.loads((ROOT / "results/differential/april.json").read_text(encoding="utf-8"))
    named = {measure["name"]: measure["value"] for measure in stored["measures"]}
    stage = small_stage(
        letter="B", model="vit", settings={"first_block": "april", "dim": 32}, size=16, box=CIFAR10
    )
    trial = run_trial(stage, APRIL())
    official = named["root mean square error of the official image, our ViT of width 32, float64"]
    assert official > 0.1, "a width of 32 does not determine 48 pixels"
    assert float(errors(trial)[0]) == pytest.approx(official, abs=1e-9)


# -- the failures that theory predicts -------------------------------------------------------------


def test_a_narrow_embedding_keeps_tokens_exact_and_pixels_wrong() -> None:
    """d = 32 < P^2 C = 48."""
    trial = run_trial(_stage(dim=32), APRIL())
    z, z_hat = _tokens(trial)
    assert float((z - z_hat).abs().max()) < EXACT
    assert float(errors(trial).min()) > 0.05
    assert trial.found.status == "failed" and "32 of 48 directions of a patch" in trial.found.reason
    outlook = APRIL().outlook(trial.view)
    assert outlook.verdict == "unknown" and "tokens are exact" in outlook.reason


def test_fewer_dimensions_than_tokens_leave_tokens_open() -> None:
    """65 tokens, d = 64."""
    trial = run_trial(_stage(size=32, dim=64), APRIL())
    assert trial.found.status == "failed"
    assert trial.found.notes["token_rank"] == 64 < trial.found.notes["tokens"]
    assert float(errors(trial).min()) > 1e-4
    assert APRIL().outlook(trial.view).verdict == "hopeless"


def test_a_single_block_leaves_rank_two_per_head_and_one() -> None:
    trial = run_trial(_stage(depth=1, heads=4), APRIL())
    assert trial.found.notes["token_rank"] == 2 * 4 + 1
    assert trial.found.status == "failed" and float(errors(trial).min()) > 0.01
    assert "rank 9" in APRIL().outlook(trial.view).reason


class _Residual(DirectBlock):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x


class _Norm(DirectBlock):
    def __init__(self, dim: int, heads: int, hidden: int, act: str) -> None:
        super().__init__(dim, heads, hidden, act)
        self.before = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.before(x))


@pytest.mark.parametrize(
    ("block", "reason"), [(_Residual, "residual around"), (_Norm, "norm before"), (Block, "norm")]
)
def test_a_norm_or_a_residual_breaks_it_and_is_noticed(block: type[nn.Module], reason: str) -> None:
    model = ViT(size=16, first_block="april")
    model.blocks[0] = block(64, 4, 128, "gelu")
    stage = small_stage(letter="B", model="vit", live=model, box=BOX)
    trial = run_trial(stage, APRIL())
    assert trial.found.status == "failed" and reason in trial.found.reason
    assert len(trial.images) == 0
    outlook = APRIL().outlook(trial.view)
    assert outlook.verdict == "hopeless" and outlook.reason == trial.found.reason


@pytest.mark.parametrize("how", ["absent", "zero"])
def test_frozen_positions_make_it_inapplicable(how: str) -> None:
    view, _ = observe(_stage(), APRIL())
    g = dict(view.update.tensors)
    if how == "absent":
        del g["positions"]
    else:
        g["positions"] = torch.zeros_like(g["positions"])
    view = _with(view, view.update.with_tensors(g))
    for attack in (APRIL(), APRIL(variant="optimization")):
        found = attack(view)
        assert (
            found.status == "failed" and found.reason == "the update has no gradient of positions"
        )
        assert attack.outlook(view).verdict == "hopeless"


class _Fixed(ViT):
    """Positions that are not learned."""

    def __init__(self) -> None:
        super().__init__(size=16, first_block="april")
        positions = self.positions.detach().clone()
        del self.positions
        self.register_buffer("positions", positions)


def test_models_without_a_part_are_refused_by_name() -> None:
    with pytest.raises(UnsupportedModel, match="learned position embedding of 17 x 64"):
        find_front(_Fixed(), (3, 16, 16))
    with pytest.raises(UnsupportedModel, match="LeNet does not begin with"):
        find_front(LeNet(), (3, 32, 32))
    with pytest.raises(UnsupportedModel, match="no linear layer of Sequential"):
        find_front(nn.Sequential(nn.Conv2d(3, 4, 4, stride=4)), (3, 16, 16))
    lenet, _ = observe(small_stage(letter="B", model="lenet", settings={}), APRIL())
    assert APRIL().outlook(lenet).verdict == "hopeless"


def test_a_batch_is_refused() -> None:
    trial = run_trial(_stage(examples=2), APRIL())
    assert trial.found.status == "failed" and "holds 2" in trial.found.reason
    assert APRIL().outlook(trial.view).verdict == "hopeless"


def test_a_gradient_of_two_that_claims_to_be_one_is_noticed() -> None:
    view, _ = observe(_stage(examples=2), APRIL())
    rounds = [replace(view.rounds[0], update=replace(view.update, num_examples=1))]
    one, _ = observe(_stage(), APRIL())
    found = APRIL()(one.with_rounds(rounds, {}))
    assert found.status == "failed" and "contradict" in found.reason


# -- the rest --------------------------------------------------------------------------------------


def test_solve_rows_says_what_it_could_not_determine() -> None:
    matrix = torch.tensor([[2.0, 0, 0], [0, 1, 0]], dtype=torch.float64)
    right = torch.tensor([[4.0], [3.0]], dtype=torch.float64)
    solved = solve_rows(matrix, right, 1e-12)
    assert solved.x[:, 0].tolist() == [2.0, 3.0, 0.0]  # minimum norm
    assert (solved.rank, solved.condition, solved.residual) == (2, 2.0, 0.0)
    tall = solve_rows(matrix.T, torch.tensor([[4.0], [3.0], [12.0]], dtype=torch.float64), 1e-12)
    assert tall.x[:, 0].tolist() == [2.0, 3.0] and tall.residual == pytest.approx(12 / 13)


def test_a_saved_view_gives_the_same(tmp_path: Path) -> None:
    view, _ = observe(_stage(), APRIL())
    same_after_saving(APRIL(), view, tmp_path)


def test_the_optimization_form_nears_the_truth_on_the_usual_vit() -> None:
    """Far from converged; the objective at the truth is 0 and must be approached."""
    stage = small_stage(
        letter="B", model="vit", settings={"dim": 48, "heads": 2}, size=8, dtype=torch.float32
    )

    def run(steps: int) -> tuple[Trial, Reconstruction]:
        trial = run_trial(stage, APRIL(variant="optimization", steps=steps))
        return trial, trial.found

    start, first = run(1)
    end, last = run(120)
    assert last.notes["objective"] < 0.1 * first.notes["objective"]
    assert float(errors(end).max()) < float(errors(start).max())
    assert torch.equal(last.labels, end.truth.labels)  # type: ignore[arg-type]  # not None
    x = stage.federation.clients[0].x
    at_truth = end.view.replay(x, stage.federation.clients[0].y)
    for name, g in end.view.update.tensors.items():
        assert torch.allclose(at_truth[name].detach(), g, atol=1e-5)


def test_outlook_names_the_happy_case() -> None:
    view, _ = observe(_stage(protocol=FedSGD()), APRIL())
    assert APRIL().outlook(view).verdict == "applicable"
    assert APRIL().outlook(_stage().view()).verdict == "applicable"  # before any round


def _with(view: View, update: Update) -> View:
    return view.with_rounds([replace(view.rounds[0], update=update)], {})
