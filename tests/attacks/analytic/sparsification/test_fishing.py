from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from leakatlas.attacks.analytic.sparsification import fishing
from leakatlas.attacks.analytic.sparsification.fishing import (
    CLASS,
    CUT,
    FLOOR,
    HONEST,
    Fishing,
    Move,
    double_opponent_tv,
    find_head,
    moves,
    set_head,
    survivors,
)
from leakatlas.bench.harness import observe, run_trial
from leakatlas.data import ImageSet
from leakatlas.errors import UnsupportedModel
from leakatlas.fl import FedAVG, Stage, View, replay
from leakatlas.models import build
from leakatlas.threat import Vantage
from tests.attacks.analytic.support import crops, errors, same_after_saving, small_stage
from tests.attacks.case import LENET, Case
from tests.conftest import BOX

CASE = Case({"steps": 3}, {**LENET, "examples": 3}, boxed=True)

FC = {"widths": (64, 32), "act": "relu"}


def _victims(labels: list[int], size: int = 8) -> ImageSet:
    """Different crops with these labels (of 10 classes)."""
    images = crops(size, len(labels))
    names = tuple(str(c) for c in range(10))
    return ImageSet(images.images, torch.tensor(labels), names, "crops")


def _stage(labels: list[int], model: str = "fc", settings: Any = FC, **more: Any) -> Stage:
    return small_stage(
        letter="F", model=model, settings=settings, size=8, examples=len(labels),
        victims=_victims(labels), box=BOX, **more,
    )  # fmt: skip


def _features(view: View, x: Tensor) -> Tensor:
    """Inputs of the head, ``(N, D)``."""
    model = view.model.eval()
    seen: list[Tensor] = []
    head = dict(model.named_modules())[find_head(model, view).module_name]
    head.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].detach()))
    model(x)
    return seen[0]


def _own_gradient(view: View, x: Tensor, target: int) -> dict[str, Tensor]:
    """One example's gradient of o_c on the last round's model: delta_c = +1."""
    model = view.model
    parameters = {n: p.detach() for n, p in model.named_parameters()}
    return replay.gradient(
        model, parameters, {}, x, torch.tensor([target]),
        loss=lambda logits, y: logits[:, int(y)].sum(), create_graph=False,
    )  # fmt: skip


def _relative_to(view: View, x: Tensor, target: int) -> float:
    """Distance between the isolated gradient and that of ``x``, on extractor and row c."""
    head = find_head(view.model, view)
    got = survivors(view, head, len(view.rounds) - 1)
    own = _own_gradient(view, x, target)
    pairs = [(got.gradient[n], own[n]) for n in own if n not in fishing.head_names(head)]
    pairs.append((got.features, own[head.weight_name][target]))
    difference = sum(float((a - b).square().sum()) for a, b in pairs)
    size = sum(float(b.square().sum()) for _, b in pairs)
    return float((difference / size) ** 0.5)


def test_class_fishing_isolates_the_lone_example_of_a_class() -> None:
    stage = _stage([0, 0, 1, 2, 2, 2, 3, 3])
    trial = run_trial(stage, Fishing())
    x = BOX.normalize(trial.truth.images.double())
    assert [m.stage for m in moves(trial.view)] == [HONEST, CLASS]
    assert moves(trial.view)[-1].target == 1
    assert _relative_to(trial.view, x[2:3], 1) < 1e-6
    assert float(errors(trial)[2]) < 1e-6
    assert trial.found.labels is not None and trial.found.labels.tolist() == [1]


def test_the_head_as_a_whole_stays_mixed() -> None:
    """Rows j != c of the head's gradient hold every other example as well."""
    trial = run_trial(_stage([0, 0, 1, 2, 2, 2, 3, 3]), Fishing())
    head = find_head(trial.view.model, trial.view)
    got = survivors(trial.view, head, 1).gradient[head.weight_name]
    x = BOX.normalize(trial.truth.images[2:3].double())
    own = _own_gradient(trial.view, x, 1)[head.weight_name]
    assert float((got - own).norm() / own.norm()) > 1


@pytest.mark.parametrize("others", [0, 5])
def test_the_search_ends_at_the_smallest_feature(others: int) -> None:
    """Alone in its class or beside other classes (whose examples the plain cut would let in)."""
    labels = [4] * 11 + [7] * others
    stage = _stage(labels)
    attack = Fishing(target_class=4)
    trial = run_trial(stage, attack)
    played = moves(trial.view)
    assert (FLOOR in {m.stage for m in played}) == bool(others)
    assert played[-1].stage == CUT and len(played) < 25
    x = BOX.normalize(trial.truth.images.double())
    f = _features(trial.view, x)[:, played[-1].feature]
    smallest = int(f.argmin())
    assert trial.found.status == "complete" and trial.found.notes["left"] == pytest.approx(1)
    assert _relative_to(trial.view, x[smallest : smallest + 1], 4) < 1e-6
    assert float(errors(trial)[smallest]) < 1e-6


def test_the_published_cut_alone_lets_other_classes_in() -> None:
    """Without the reference round, an example of another class above theta counts as -1."""
    attack = Fishing(target_class=4)
    view, _ = observe(_stage([4] * 6 + [7] * 6), attack)
    head = find_head(view.model, view)
    assert moves(view)[-1].stage == CUT
    assert survivors(view, head, len(view.rounds) - 1).count == pytest.approx(1)
    without_reference = view.with_rounds(view.rounds[-1:], {})
    above = survivors(without_reference, head, 0).count
    assert above == pytest.approx(round(above), abs=1e-5) and above < -1


def test_survivors_shrink_in_every_cut() -> None:
    view, _ = observe(_stage([4] * 12), Fishing(target_class=4))
    head = find_head(view.model, view)
    cuts = [
        (m.gain, survivors(view, head, i).count)
        for i, m in enumerate(moves(view))
        if m.stage == CUT
    ]
    counts = [count for _, count in cuts]
    assert all(b <= a + 1e-6 for a, b in itertools.pairwise(counts))
    assert counts[-1] == pytest.approx(1)


def test_identical_examples_cannot_be_parted_and_the_search_still_ends() -> None:
    images = crops(8, 1).images.repeat(3, 1, 1, 1)
    names = tuple(str(c) for c in range(10))
    twins = ImageSet(images, torch.tensor([2, 2, 2]), names, "twins")
    stage = small_stage(
        letter="F", model="fc", settings=FC, size=8, examples=3, victims=twins, box=BOX
    )
    trial = run_trial(stage, Fishing(target_class=2, features=3))
    assert trial.found.status == "failed" and "examples are left" in trial.found.reason
    assert len({m.feature for m in moves(trial.view) if m.stage == CUT}) == 3


def test_a_class_that_is_absent_gives_nothing() -> None:
    trial = run_trial(_stage([0, 1]), Fishing(target_class=9))
    assert trial.found.status == "failed" and len(trial.images) == 0


def test_isolation_survives_an_average_over_clients() -> None:
    stage = small_stage(
        letter="F", model="fc", settings=FC, size=8, examples=2, clients=3, box=BOX,
        victims=_victims([0, 0, 0, 5, 0, 0]), vantage=Vantage.AGGREGATE,
    )  # fmt: skip
    trial = run_trial(stage, Fishing(target_class=5))
    assert float(errors(trial)[3]) < 1e-6


def test_a_higher_gain_sharpens_the_gradient() -> None:
    """Share of the strongest example in the sum of all gradient norms (D-SNR's idea)."""
    stage = _stage([4] * 6)
    model = stage.federation.model
    view, _ = observe(stage, Fishing(target_class=4))
    head = find_head(view.model, view)
    last = moves(view)[-1]
    x = BOX.normalize(stage.truth().images.double())
    shares = []
    for gain in (1.0, 10.0, 100.0, 10 * last.gain):
        copy = view.model
        set_head(copy, head, Move(CUT, 4, last.feature, last.theta, gain))
        norms = torch.stack(
            [
                replay.gradient(
                    copy, {n: p.detach() for n, p in copy.named_parameters()}, {}, x[i : i + 1],
                    torch.tensor([4]), create_graph=False,
                )[head.weight_name][4].norm()
                for i in range(6)
            ]
        )  # fmt: skip
        shares.append(float(norms.max() / norms.sum()))
    assert shares == sorted(shares) and shares[-1] > 0.999
    assert model is stage.federation.model  # the global model was not touched


def test_matching_inverts_what_was_isolated_behind_convolutions() -> None:
    """With many steps the isolated gradient fits far better than an all-grey image would."""
    stage = _stage([0, 0, 1, 2, 2, 3, 3, 3], "lenet", {"width": 6})
    trial = run_trial(stage, Fishing(steps=250, tv_weight=0.02))
    distance = trial.found.notes["cosine_distance"]
    assert distance < 0.05
    x = trial.truth.images[2].double()
    error = float(errors(trial)[2])
    grey = float((x - x.mean()).square().mean().sqrt())
    assert error < 0.8 * grey


def test_heads_are_those_of_the_paper() -> None:
    model = build("fc", size=8, **FC)
    view, _ = observe(_stage([0, 1]), Fishing(target_class=1))
    head = find_head(model, view)
    bias = float(dict(model.named_parameters())["fc.bias"].detach()[3])
    set_head(model, head, Move(CLASS, 3, gain=0.5, beta=1000.0))
    state = {name: p.detach() for name, p in model.named_parameters()}
    weight, b = state[head.weight_name], state["fc.bias"]
    assert bool((weight[3] == 0.5).all()) and int((weight != 0).any(dim=1).sum()) == 1
    assert float(b[3]) == pytest.approx(bias) and bool((b[torch.arange(10) != 3] == 1000).all())
    set_head(model, head, Move(CUT, 3, 5, 0.25, 300.0))
    assert float(weight[3, 5]) == 300 and int((weight != 0).sum()) == 1
    assert float(b[3]) == -75 and int((b != 0).sum()) == 1


def test_a_head_without_bias_is_refused() -> None:
    stage = _stage([0, 1], settings={**FC, "bias": False})
    with pytest.raises(UnsupportedModel, match="bias"):
        run_trial(stage, Fishing())


def test_weight_changes_are_refused() -> None:
    trial = run_trial(_stage([0, 1], protocol=FedAVG()), Fishing())
    assert trial.found.status == "failed" and "weight changes" in trial.found.reason


def test_double_opponents_count_colour_edges() -> None:
    flat = torch.full((1, 3, 5, 5), 0.4, dtype=torch.float64)
    assert float(double_opponent_tv(flat)) < 1e-5
    x = torch.rand(1, 3, 5, 5, dtype=torch.float64)
    total = 0.0
    channels = [x[0, 0], x[0, 1], x[0, 2], x[0, 0] - x[0, 1], x[0, 0] - x[0, 2], x[0, 1] - x[0, 2]]
    for c in channels:
        for i in range(4):
            for j in range(4):
                dx, dy = float(c[i, j + 1] - c[i, j]), float(c[i + 1, j] - c[i, j])
                total += (dx**2 + dy**2) ** 0.5
    assert float(double_opponent_tv(x)) == pytest.approx(total / (6 * 16), rel=1e-6)


def test_the_same_from_a_saved_view(tmp_path: Path) -> None:
    attack = Fishing(steps=5)
    view, _ = observe(_stage([0, 0, 1, 2], "lenet", {"width": 4}), attack)
    same_after_saving(attack, view, tmp_path)
