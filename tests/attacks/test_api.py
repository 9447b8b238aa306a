from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

import leakatlas
from leakatlas import models
from leakatlas.attacks.api import (
    ActiveAttack,
    Attack,
    Outlook,
    Recipe,
    Reconstruction,
    Tampering,
    attack,
    cache_folder,
    nothing_found,
)
from leakatlas.blocks.watch import Watch
from leakatlas.data import ImageSet
from leakatlas.errors import InvalidParameter, NotGranted
from leakatlas.fl import View
from leakatlas.params import PositiveInt, PositiveOrInf
from leakatlas.sealed import DamagedFile
from leakatlas.threat import Grant, Knowledge
from tests.conftest import build_stage, surrogate


@attack("noise", needs=Knowledge.UPDATES)
@dataclass(frozen=True, kw_only=True)
class Noise(Attack):
    """Random candidates: some of it from the given generator, some from the global one."""

    steps: PositiveInt = 3
    clip: PositiveOrInf = math.inf

    def run(self, view: View, *, generator: torch.Generator, watch: Watch) -> Reconstruction:
        images = torch.zeros(view.batch_shape)
        for _ in watch.steps(self.steps):
            images += torch.randn(view.batch_shape, generator=generator)
            images += torch.randn(view.batch_shape)
        return Reconstruction(images=images, confidence=torch.arange(len(images)).float())


@attack("damaged", needs=Knowledge.UPDATES)
@dataclass(frozen=True, kw_only=True)
class Damaged(Attack):
    """Its second candidate is not finite, and one carries a graph."""

    def run(self, view: View, *, generator: torch.Generator, watch: Watch) -> Reconstruction:
        images = torch.ones(view.batch_shape, requires_grad=True).clone()
        images = torch.cat([images[:1], images[1:2] * torch.nan, images[2:]])
        count = len(images)
        return Reconstruction(
            images=images, labels=torch.arange(count), confidence=torch.arange(count).float()
        )


@attack("greedy", needs=Knowledge.UPDATES | Knowledge.BASIC | Knowledge.SURROGATE)
@dataclass(frozen=True, kw_only=True)
class Greedy(Attack):
    """Needs more than most letters give; learns from public data."""

    bn_weight: float = 0.1
    rate: float = 1.0
    learned: ClassVar[list[str]] = []

    def grants(self) -> frozenset[Grant]:
        return frozenset({Grant.BATCH_BN}) if self.bn_weight else frozenset()

    def prepare(
        self, surrogate: ImageSet, model: nn.Module, *, generator: torch.Generator, watch: Watch
    ) -> dict[str, Tensor]:
        self.learned.append(surrogate.name)
        for _ in watch.steps(5):
            torch.rand(1)
        return {
            "mean": surrogate.images.mean(0),
            "own": torch.rand(2, generator=generator),
            "global": torch.rand(2),
        }

    def run(self, view: View, *, generator: torch.Generator, watch: Watch) -> Reconstruction:
        mean = self.artefact(view.surrogate, view.model, watch=watch)["mean"]
        return Reconstruction(images=view.box.normalize(mean[None]))


def _view(letter: str = "C", examples: int = 2, **more: Any) -> View:
    stage = build_stage(letter=letter, examples=examples, **more)
    return stage.view([stage.federation.play_round()])


# -- the final __call__ --------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_result_whatever_the_global_state() -> None:
    view = _view()
    torch.manual_seed(1)
    first = Noise()(view, seed=5)
    torch.manual_seed(2)
    before = torch.get_rng_state()
    second = Noise()(view, seed=5)
    assert torch.equal(first.images, second.images)
    assert torch.equal(before, torch.get_rng_state())
    assert not torch.equal(first.images, Noise()(view, seed=6).images)


def test_the_result_is_stamped() -> None:
    view = _view()
    _ = view.protocol  # read before the run: not the attack's doing
    found = Noise(steps=2)(view, seed=3, scenario={"name": "s"})
    assert found.reads == {"num_examples", "input_shape"}
    assert found.seconds > 0 and found.status == "complete"
    assert found.recipe is not None
    assert found.recipe.to_json() == {
        "attack": {"key": "noise", "version": 1, "parameters": {"steps": 2, "clip": "Infinity"}},
        "scenario": {"name": "s"},
        "seed": 3,
        "versions": {"leakatlas": leakatlas.__version__, "torch": torch.__version__},
        "rehearsal": {},
        "conditions": {},
    }


def test_candidates_that_are_not_finite_are_dropped_and_counted() -> None:
    found = Damaged()(_view(examples=3))
    assert found.status == "failed" and found.reason == "1 candidates are not finite"
    assert len(found.images) == 2 and not found.images.requires_grad
    assert found.labels is not None and found.labels.tolist() == [0, 2]
    assert found.confidence is not None and found.confidence.tolist() == [0.0, 2.0]


def test_a_short_budget_is_seen_in_the_status() -> None:
    found = Noise(steps=10**9)(_view(), watch=Watch(0.01))
    assert found.status == "cut short" and "budget" in found.reason
    assert torch.isfinite(found.images).all()


def test_nothing_found_says_why() -> None:
    found = nothing_found((3, 8, 8), "rank 2 of 5", rank=2.0)
    assert found.images.shape == (0, 3, 8, 8) and found.status == "failed"
    assert found.reason == "rank 2 of 5" and found.notes == {"rank": 2.0}


def test_an_attack_without_opinion_has_an_open_outlook() -> None:
    assert Noise().outlook(_view()).verdict == "unknown"
    assert Noise.tuned() == Noise()
    assert Outlook("hopeless", "rank").reason == "rank"


# -- what it needs -------------------------------------------------------------------------------


@pytest.mark.parametrize("letter", "ABCF")
def test_a_letter_that_lacks_something_is_refused_before_any_work(letter: str) -> None:
    grants = frozenset({Grant.BATCH_BN})
    missing = {"A": "BASIC, SURROGATE"}.get(letter, "SURROGATE")
    with pytest.raises(NotGranted, match=f"Greedy needs {missing}, which threat model {letter}"):
        Greedy()(_view(letter, grants=grants))


@pytest.mark.parametrize("letter", "DEGH")
def test_a_letter_that_has_everything_is_accepted(letter: str, cache: Path) -> None:
    view = _view(letter, grants=frozenset({Grant.BATCH_BN}), public=surrogate())
    assert Greedy()(view).status == "complete"


def test_a_missing_grant_names_itself_and_the_way_out(cache: Path) -> None:
    view = _view("D", public=surrogate())
    with pytest.raises(
        NotGranted, match=r"needs the grant batch_bn.*add it to `grants`, or change"
    ):
        Greedy()(view)
    assert Greedy(bn_weight=0.0)(view).status == "complete"


def test_the_pixel_range_may_be_granted_instead_of_basic_knowledge() -> None:
    @attack("framed", needs=Knowledge.UPDATES | Knowledge.BASIC)
    @dataclass(frozen=True, kw_only=True)
    class Framed(Attack):
        def run(self, view: View, *, generator: torch.Generator, watch: Watch) -> Reconstruction:
            return Reconstruction(images=view.box.clip(torch.zeros(view.batch_shape)))

    with pytest.raises(NotGranted, match="Framed needs BASIC"):
        Framed()(_view("A"))
    found = Framed()(_view("A", grants=frozenset({Grant.PIXEL_RANGE})))
    assert "box" in found.reads


def test_reading_what_is_not_declared_fails_in_the_run() -> None:
    @attack("sneaky", needs=Knowledge.UPDATES)
    @dataclass(frozen=True, kw_only=True)
    class Sneaky(Attack):
        def run(self, view: View, *, generator: torch.Generator, watch: Watch) -> Reconstruction:
            return Reconstruction(images=torch.zeros(view.batch_shape), labels=view.labels)

    with pytest.raises(NotGranted, match=r"view\.labels is not granted to threat model H"):
        Sneaky()(_view("H"))


# -- declaration ---------------------------------------------------------------------------------


def test_an_attack_is_active_exactly_if_it_needs_manipulation() -> None:
    class Passive(Attack):
        def run(self, view: View, *, generator: torch.Generator, watch: Watch) -> Reconstruction:
            raise AssertionError("never run")

    class Active(ActiveAttack):
        def tamper(
            self, view: View, *, generator: torch.Generator, watch: Watch
        ) -> Tampering | None:
            return None

        def run(self, view: View, *, generator: torch.Generator, watch: Watch) -> Reconstruction:
            raise AssertionError("never run")

    with pytest.raises(InvalidParameter, match="Passive must be an ActiveAttack exactly if"):
        attack("p", needs=Knowledge.UPDATES | Knowledge.MANIPULATION)(Passive)
    with pytest.raises(InvalidParameter, match="Active must be an ActiveAttack exactly if"):
        attack("a", needs=Knowledge.UPDATES)(Active)
    needs = Knowledge.UPDATES | Knowledge.MANIPULATION
    assert attack("a", needs=needs)(Active).needs == needs


def test_an_attack_without_run_cannot_be_made() -> None:
    class Empty(Attack):
        pass

    with pytest.raises(TypeError, match="abstract"):
        Empty()  # type: ignore[abstract]  # the point of the test


# -- recipes -------------------------------------------------------------------------------------


def test_a_recipe_survives_json_and_rebuilds_the_attack() -> None:
    recipe = Noise(steps=7, clip=2.5).recipe(4, {"letter": "A", "grants": ["labels"]})
    again = Recipe.from_json(json.loads(json.dumps(recipe.to_json(), allow_nan=False)))
    assert again == recipe and again.content_hash == recipe.content_hash
    assert Noise.from_json(again.attack["parameters"]) == Noise(steps=7, clip=2.5)


def test_the_hash_names_the_run_and_not_the_software() -> None:
    recipe = Noise().recipe(0, {"a": 1, "b": 2})
    same = [
        Noise().recipe(0, {"b": 2, "a": 1}),
        replace(recipe, versions={"leakatlas": "9", "torch": "9"}),
    ]
    other = [
        Noise(steps=4).recipe(0, {"a": 1, "b": 2}),
        Noise().recipe(1, {"a": 1, "b": 2}),
        Noise().recipe(0, {"a": 1}),
        Damaged().recipe(0, {"a": 1, "b": 2}),
    ]
    assert {r.content_hash for r in same} == {recipe.content_hash}
    assert len({r.content_hash for r in [recipe, *other]}) == 5


# -- artefacts -----------------------------------------------------------------------------------


def _model(seed: int = 0) -> nn.Module:
    return models.build("fc", size=8, widths=(), seed=seed)


def test_what_was_learned_is_found_again(cache: Path) -> None:
    Greedy.learned.clear()
    first = Greedy().artefact(surrogate(), _model())
    torch.manual_seed(99)
    again = Greedy().artefact(surrogate(), _model())
    assert len(Greedy.learned) == 1
    assert first.keys() == again.keys()
    assert all(torch.equal(first[n], again[n]) for n in first)
    assert [f.suffix for f in cache.iterdir()] == [".sealed"]
    (file,) = cache.iterdir()
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.warns(DamagedFile, match="SHA-256"):  # a flipped bit is learned anew, not believed
        mended = Greedy().artefact(surrogate(), _model())
    assert len(Greedy.learned) == 2
    assert all(torch.equal(first[n], mended[n]) for n in first)


def test_learning_depends_on_no_global_state_and_leaves_it_alone(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(1)
    first = Greedy().artefact(surrogate(), _model())
    monkeypatch.setenv("LEAKATLAS_CACHE", str(cache / "other"))
    torch.manual_seed(2)
    before = torch.get_rng_state()
    second = Greedy().artefact(surrogate(), _model())
    assert all(torch.equal(first[n], second[n]) for n in first)
    assert torch.equal(before, torch.get_rng_state())


def test_other_parameters_data_or_weights_are_learned_anew(cache: Path) -> None:
    Greedy.learned.clear()
    Greedy().artefact(surrogate(), _model())
    Greedy(rate=2.0).artefact(surrogate(), _model())
    Greedy().artefact(surrogate().subset(range(5)), _model())
    Greedy().artefact(surrogate(), _model(seed=1))
    assert len(Greedy.learned) == len(list(cache.iterdir())) == 4


def test_half_learned_artefacts_are_not_kept(cache: Path) -> None:
    Greedy.learned.clear()
    watch = Watch()
    watch.stop()
    assert "mean" in Greedy().artefact(surrogate(), _model(), watch=watch)
    assert not cache.exists() or not list(cache.iterdir())
    Greedy().artefact(surrogate(), _model())
    assert len(Greedy.learned) == 2


def test_the_cache_lies_where_the_environment_says(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cache_folder() == cache
    monkeypatch.delenv("LEAKATLAS_CACHE")
    assert cache_folder() == Path.home() / ".cache" / "leakatlas"
