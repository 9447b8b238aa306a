"""The whole examination: the rows at default strength, benign models, and what cannot be judged."""

import functools
import importlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from leakatlas import models
from leakatlas.attacks.api import ActiveAttack
from leakatlas.bench import harness
from leakatlas.catalogue import registry
from leakatlas.data import Box, bundled
from leakatlas.errors import InvalidInput
from leakatlas.fl import (
    Client,
    FedAVG,
    Federation,
    FedSGD,
    ModelRef,
    RoundRecord,
    Scenario,
    Stage,
    Update,
    model_state,
    stage,
)
from leakatlas.lint import RoundFacts, Verdict, lint
from leakatlas.threat import Knowledge, Vantage

SIZE, EXAMPLES = 16, 16
BOX = Box(mean=(0.5, 0.45, 0.4), std=(0.25, 0.25, 0.2))


@functools.cache
def public() -> Any:
    return bundled.patches(SIZE, 256, part="surrogate")


@functools.cache
def private() -> Any:
    return bundled.patches(SIZE, 4 * EXAMPLES)


def played(key: str, model: str, settings: Mapping[str, Any]) -> tuple[Stage, RoundRecord]:
    """What a row sends at default strength."""
    attack: ActiveAttack = registry.load_attack(key)()
    reference = ModelRef("builtin", model, {"size": SIZE, "classes": 10, **settings})
    fedavg = key == "loki"
    scenario = Scenario(
        model=reference,
        letter="H" if attack.needs & Knowledge.SELECTION else "G",
        clients=4,
        examples=EXAMPLES,
        protocol=FedAVG(batch_size=EXAMPLES, lr=1e-4) if fedavg else FedSGD(),
        vantage=Vantage.AGGREGATE if fedavg else Vantage.SERVER,
    )
    made = stage(scenario, model=reference.build(), victims=private(), surrogate=public(), box=BOX)
    return made, harness.observe(made, attack)[1][-1]


CASES = [
    ("robbing_the_fed", "convnet", {"width": 4}, {"D1", "D2", "D3"}, "[28]/[33] kind"),
    ("robbing_the_fed", "vit", {"dim": 16, "patch": 4}, {"D1", "D2", "D3"}, "[28]/[33] kind"),
    ("fishing", "convnet", {"width": 4}, {"D7", "D4"}, "[29] kind"),
    ("fishing", "resnet8", {"width": 4}, {"D7", "D4"}, "[29] kind"),
    ("sybils", "fc", {"widths": (64,)}, {"D5"}, "[30]/[31] kind"),
    ("loki", "lenet", {"width": 4}, {"D1", "D2", "D3", "D4", "D6"}, "[33] kind"),
]


@pytest.mark.parametrize(("key", "model", "settings", "checks", "kind"), CASES)
def test_the_rows_are_detected_by_their_weights_alone_and_named(
    key: str, model: str, settings: Mapping[str, Any], checks: set[str], kind: str
) -> None:
    _, record = played(key, model, settings)
    verdict = lint(record.received[0], box=BOX)
    assert verdict.alarm and checks <= set(verdict.checks)
    assert kind in str(verdict)
    # A bare file is judged by the same weights, though without the order of the layers.
    bare = lint(model_state(record.received[0]), box=BOX)
    assert checks - {"D1"} <= set(bare.checks)


def test_the_evidence_is_said_in_words() -> None:
    _, record = played("robbing_the_fed", "convnet", {"width": 4})
    first = next(line for line in lint(record.received[0]).lines() if "block.first" in line)
    assert first.startswith("block.first: ")
    assert "all 64 rows are one direction" in first and "times as wide as weights" in first
    assert first.endswith("binning attack of the [28]/[33] kind")


def test_own_batch_update_reference_and_other_clients_add_their_checks() -> None:
    made, record = played("loki", "convnet", {"width": 4})
    client = made.federation.clients[0]
    verdict = lint(
        record.received[0],
        reference=made.federation.model,
        batch=(client.x, client.y),
        update=record.updates[0],
        others=[record.states[c] for c in (1, 2, 3)],
        box=BOX,
    )
    assert {"D1", "D9", "D10", "D12"} <= set(verdict.checks)
    words = str(verdict)
    assert "not in the reference: block." in words
    assert "3 of 3 other clients received a different model" in words
    assert any("D14/hidden" == name for name in verdict.scores)
    assert verdict.scores["D14/hidden"].value > 0.5
    assert set(verdict.skipped) == {"D13", "D16", "D17"}


def test_self_inversion_alone_detects_binning() -> None:
    """Not one weight check is needed: the update holds what the layer was fed."""
    made, record = played("robbing_the_fed", "resnet8", {"width": 4})
    client = made.federation.clients[0]
    verdict = lint(record.received[0], batch=(client.x, client.y), update=record.updates[0])
    found = verdict.scores["D14/hidden"]
    assert "D14" in verdict.checks and "own" in found.words and "chance weights" in found.words


def benign() -> list[nn.Module]:
    """Random weights of every family, and what honest rounds make of them."""
    kinds: list[tuple[str, dict[str, Any]]] = [
        ("fc", {"widths": (64, 32)}), ("lenet", {}), ("convnet", {"width": 4}),
        ("vgg6", {"width": 4, "groups": (1, 1, 1, 1)}), ("resnet8", {"width": 4}),
        ("vit", {"dim": 16, "patch": 4}), ("convnet-bn", {"width": 4}),
    ]  # fmt: skip
    found = [models.build(n, size=SIZE, seed=s, **kw) for s in (0, 1) for n, kw in kinds]
    for name, settings in kinds[:6]:
        own = [private().subset(range(8 * c, 8 * c + 8)) for c in range(2)]
        clients = {c: Client(BOX.normalize(s.images), s.labels) for c, s in enumerate(own)}
        federation = Federation(
            models.build(name, size=SIZE, seed=2, **settings), clients,
            FedAVG(batch_size=4, lr=0.02),
        )  # fmt: skip
        for _ in range(3):
            federation.play_round(apply=True)
        found.append(federation.model)
    return found


def test_twenty_benign_models_raise_no_alarm() -> None:
    tested = benign()
    assert len(tested) == 20
    batch = private().subset(range(EXAMPLES))
    verdicts: list[Verdict] = [lint(model, batch=batch, box=BOX) for model in tested]
    assert [str(v) for v in verdicts if v.alarm] == []
    assert all(str(v).startswith("No sign of tampering") for v in verdicts)


@pytest.mark.parametrize("name", models.shipped())
def test_shipped_checkpoints_raise_no_alarm(name: str) -> None:
    assert not lint(models.load_weights(name)).alarm


def test_lint_leaves_model_and_global_randomness_alone() -> None:
    model = nn.Sequential(models.build("convnet-bn", size=SIZE, width=4), nn.Dropout(0.1)).train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    state = torch.get_rng_state()
    lint(model, batch=private().subset(range(4)))
    assert torch.equal(torch.get_rng_state(), state) and model.training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_a_verdict_is_json() -> None:
    _, record = played("fishing", "lenet", {"width": 4})
    values = json.loads(json.dumps(lint(record.received[0]).to_json(), allow_nan=False))
    assert values["schema"] == "leakatlas/lint/1" and values["alarm"] is True
    assert {"D7"} <= set(values["checks"])
    finding = values["findings"][0]
    assert finding["value"] > finding["threshold"] and finding["words"]
    assert values["skipped"]["D14"] == "no batch"


def test_a_state_dict_runs_on_the_reference_of_the_same_shape(tmp_path: Path) -> None:
    model, batch = models.build("lenet", size=SIZE, width=4), private().subset(range(8))
    file = tmp_path / "model.safetensors"
    save_file(model.state_dict(), file)
    state = models.load_state(file)
    verdict = lint(state, reference=models.build("lenet", size=SIZE, width=4, seed=1), batch=batch)
    assert not verdict.alarm and "D11/loss" in verdict.scores and "D8/d_snr" in verdict.scores
    with pytest.raises(InvalidInput, match="a state dict alone cannot be run"):
        lint(state, batch=batch)
    with pytest.raises(InvalidInput, match="a state dict alone cannot be run"):
        lint(state, reference=models.build("convnet", size=SIZE), batch=batch)


def test_the_previous_state_may_be_a_state_dict() -> None:
    model, batch = models.build("lenet", size=SIZE, width=4), private().subset(range(8))
    same = lint(model, reference=model.state_dict(), batch=batch)
    assert same.scores["D11/loss"].value == 0 and same.scores["D1/reference"].value == 0
    other = lint(model, reference=models.build("convnet", size=SIZE).state_dict(), batch=batch)
    assert "D1" in other.checks and other.skipped["D11"] == "no previous model as a module"


def test_facts_of_the_round_are_judged() -> None:
    facts = RoundFacts(clip_norm=1.0, noise_std=0.1, epsilon=1.0)
    verdict = lint(models.build("lenet", size=SIZE, width=4), facts=facts)
    assert verdict.checks == ("D13",) and "own noise alone" in str(verdict)


def test_fully_connected_models_are_told_of_their_honest_leak() -> None:
    batch = private().subset(range(4))
    verdict = lint(models.build("fc", size=SIZE, widths=(256,)), batch=batch)
    assert not verdict.alarm
    assert any("gives away" in note and "honest layers" in note for note in verdict.notes)


def test_other_names_and_shapes_are_read_too() -> None:
    state = {
        "W1": torch.randn(32, 48), "emb.weight": torch.randn(100, 16), "pos": torch.zeros(1, 5, 16),
        "count": torch.tensor(3), "scale": torch.ones(4), "half.weight": torch.randn(16, 16).half(),
        "attn.in_proj_weight": torch.randn(48, 16), "attn.in_proj_bias": torch.zeros(48),
    }  # fmt: skip
    assert not lint(state).alarm


def test_the_room_itself_can_be_called() -> None:
    room: Any = importlib.import_module("leakatlas.lint")
    assert not room(models.build("lenet", size=SIZE, width=4)).alarm


def bad_update(model: nn.Module, **tensors: torch.Tensor) -> Update:
    return Update(tensors=tensors, kind="gradient", state_hash="", num_examples=1)


def test_bad_input_is_explained() -> None:
    model, batch = models.build("lenet", size=SIZE, width=4), private().subset(range(4))
    with pytest.raises(InvalidInput, match="no weight with two or more dimensions"):
        lint({"bias": torch.zeros(3)})
    with pytest.raises(InvalidInput, match="'w' holds 2 values that are not finite"):
        lint({"w": torch.tensor([[1.0, torch.nan], [torch.inf, 0]])})
    with pytest.raises(InvalidInput, match="is a int"):
        lint({"w": 3})  # type: ignore[dict-item]  # what an untyped caller may do
    with pytest.raises(InvalidInput, match="give `batch` beside `update`"):
        lint(model, update=bad_update(model, w=torch.zeros(2)))
    with pytest.raises(InvalidInput, match="the model lacks"):
        lint(model, batch=batch, update=bad_update(model, w=torch.zeros(2)))
    with pytest.raises(InvalidInput, match="4 inputs and 3 labels"):
        lint(model, batch=(batch.images, batch.labels[:3]))
    with pytest.raises(InvalidInput, match="batch holds values that are not finite"):
        lint(model, batch=(batch.images * torch.nan, batch.labels))
    with pytest.raises(InvalidInput, match="Label 10 is out of range"):
        lint(model, batch=(batch.images, torch.full((4,), 10)))
    with pytest.raises(InvalidInput, match="cannot read the batch"):
        lint(model, batch=(batch.images[:, :1], batch.labels))
    with pytest.raises(InvalidInput, match="from 0 on, or probabilities"):
        lint(model, batch=(batch.images, torch.full((4,), -1)))
    with pytest.raises(InvalidInput, match="from 0 on, or probabilities"):
        lint(model, batch=(batch.images, batch.labels.float()))
    for odd in (batch.images, (batch.images,), (batch.images, 3), (batch.images, "y")):
        with pytest.raises(InvalidInput, match="as an ImageSet or as two tensors"):
            lint(model, batch=odd)  # type: ignore[arg-type]  # what an untyped caller may do


class Raising(nn.Module):
    """A user's model with a fault of its own."""

    def __init__(self, problem: Exception) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)
        self.problem = problem

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise self.problem


@pytest.mark.parametrize("kind", [RuntimeError, ValueError, TypeError, KeyError, AttributeError])
def test_a_model_that_raises_is_reported_in_words(kind: type[Exception]) -> None:
    with pytest.raises(InvalidInput, match=f"Raising cannot read .*{kind.__name__}.*no such key"):
        lint(Raising(kind("no such key")), batch=private().subset(range(4)))
