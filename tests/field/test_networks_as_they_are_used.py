"""Networks that people really train, as small as their blocks allow: no attack trips over one.

The blocks of torchvision's ResNet-50, EfficientNet, ConvNeXt, Swin and vision transformer, and
networks that normalise by groups and by layers. What cannot work on one is refused in words.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import ConvNeXt, EfficientNet, ResNet, SwinTransformer, VisionTransformer
from torchvision.models.convnext import CNBlockConfig
from torchvision.models.efficientnet import MBConvConfig
from torchvision.models.resnet import Bottleneck

import leakatlas
from leakatlas.audit import Plan, Setting, Watch, presets
from leakatlas.audit.jobs import Job, held_back, run_job
from leakatlas.audit.listener import Silent
from leakatlas.audit.start import Adversaries, can_start
from leakatlas.data import IMAGENET, ImageSet
from leakatlas.errors import InvalidInput
from leakatlas.fl import FedAVG, FedSGD, ModelRef, Protocol
from leakatlas.report import Run
from leakatlas.threat import LETTERS

SIZE, CLASSES = 32, 5


class Grouped(nn.Module):
    """Group normalisation and a residual sum."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.GroupNorm(2, 8), nn.SiLU())
        self.body = nn.Sequential(nn.Conv2d(8, 8, 3, 1, 1), nn.GroupNorm(4, 8), nn.SiLU())
        self.fc = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x)
        out: Tensor = self.fc((h + self.body(h)).mean((2, 3)))
        return out


class Layered(nn.Module):
    """Layer normalisation over tokens, as mixers have it, and no attention."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 12, 8, 8)
        self.norm, self.out = nn.LayerNorm(12), nn.LayerNorm(12)
        self.tokens, self.channels = nn.Linear(16, 16), nn.Linear(12, 12)
        self.fc = nn.Linear(12, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        t = self.patches(x).flatten(2).transpose(1, 2)
        t = t + self.tokens(self.norm(t).transpose(1, 2)).transpose(1, 2)
        t = t + self.channels(nn.functional.gelu(self.norm(t)))
        out: Tensor = self.fc(self.out(t).mean(1))
        return out


def _efficient() -> nn.Module:
    blocks = [MBConvConfig(1, 3, 1, 8, 8, 1), MBConvConfig(2, 5, 2, 8, 8, 1)]
    made: nn.Module = EfficientNet(blocks, dropout=0.2, num_classes=CLASSES, last_channel=16)
    return made


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "vit": partial(VisionTransformer, SIZE, 8, 1, 2, 16, 32, num_classes=CLASSES),
    "resnet50": partial(ResNet, Bottleneck, [1, 1, 0, 0], CLASSES, width_per_group=8),
    "efficientnet": _efficient,
    "convnext": partial(
        ConvNeXt, [CNBlockConfig(8, 12, 1), CNBlockConfig(12, None, 1)], num_classes=CLASSES
    ),
    "swin": partial(SwinTransformer, [4, 4], 8, [2, 2], [2, 2], [4, 4], num_classes=CLASSES),
    "group norm": Grouped,
    "layer norm": Layered,
}


def _made(name: str) -> nn.Module:
    torch.manual_seed(6)
    return NETWORKS[name]()


def _batch() -> ImageSet:
    images = torch.rand(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(3))
    return ImageSet(images, torch.tensor([4, 1]), tuple("abcde"), "batch")


TRAINING = FedAVG(epochs=1, batch_size=2, lr=0.01, mode="train")
"""Batch normalisation, dropout and stochastic depth at work."""

CLIENTS: list[tuple[str, Protocol]] = [
    *((name, FedSGD()) for name in NETWORKS),
    *((name, TRAINING) for name in ("resnet50", "efficientnet", "swin")),
]


@pytest.mark.parametrize(("name", "protocol"), CLIENTS)
def test_the_doctor_finds_the_client_consistent(name: str, protocol: Protocol) -> None:
    found = leakatlas.doctor(_made(name), _batch(), box=IMAGENET, protocol=protocol)
    assert found.replay.consistent, found.replay
    assert not [key for key, start in found.outlooks.items() if start.obstacle == "error"]
    assert sum(start.obstacle is None for start in found.outlooks.values()) >= 3


def _outcomes(model: nn.Module, victims: ImageSet, protocol: Protocol) -> dict[str, Run]:
    """What comes of every attack that may start, ended at once."""
    setting = Setting(
        name="net", model=model, model_ref=ModelRef("object", "net"), victims=victims,
        protocol=protocol, box=IMAGENET,
    )  # fmt: skip
    plan = Plan(settings=(setting,), letters=tuple(LETTERS), seconds=1.0, rehearsal=False)
    live = setting.stage(letter="A", seed=0)
    found = {}
    adversaries = Adversaries(live, live.federation.play_round())
    for attack in presets(None, {}, published=False):
        start = can_start(adversaries, attack, plan.letters)
        if start.obstacle is None:
            job = Job(setting, attack, start.letter, 0)
            found[attack.key] = run_job(job, plan, 1e-9, None, Silent(), Watch())
    return found


def _crashes(found: Mapping[str, Run]) -> list[tuple[str, str, str]]:
    return [(key, run.reason, run.trace) for key, run in found.items() if run.status == "error"]


@pytest.mark.parametrize("name", NETWORKS)
def test_whatever_may_start_runs(name: str, tmp_path: object, cache: object) -> None:
    assert not _crashes(_outcomes(_made(name), _batch(), FedSGD()))


@pytest.mark.parametrize(
    ("shared", "count", "misses"),
    [("3.*", 1, {"rgap", "seer"}), ("!3.*", 2, {"dlfa", "seer"})],
)
def test_attacks_are_judged_on_what_is_shared(
    shared: str, count: int, misses: set[str], cache: object
) -> None:
    """Only the head is sent, or all but the head: who reads what stays home does not apply."""
    torch.manual_seed(1)
    flat = nn.Linear(3 * SIZE * SIZE, 24)
    model = nn.Sequential(nn.Flatten(), flat, nn.ReLU(), nn.Linear(24, CLASSES))
    found = _outcomes(model, _batch().subset(range(count)), FedSGD(shared=(shared,)))
    assert not _crashes(found)
    home = {key for key, run in found.items() if "never leaves the client" in run.reason}
    assert home == misses and all(found[key].status == "not applicable" for key in misses)


def test_the_last_words_of_a_process_say_what_was_missed() -> None:
    setting = Setting(
        name="net", model=_made("layer norm"), model_ref=ModelRef("object", "net"),
        victims=_batch(), protocol=FedSGD(shared=("fc.*",)), box=IMAGENET,
    )  # fmt: skip
    ended = "AttackCrashed: the attack's process ended: KeyError: '%s' (exit code 1)"
    assert held_back(setting, ended % "tokens.weight") == "tokens.weight"
    assert held_back(setting, ended % "1.tokens.weight") == "tokens.weight"  # as a wrapper has it
    assert held_back(setting, ended % "fc.weight") == ""
    assert held_back(setting, ended % "weights") == ""


def test_a_second_input_is_refused_with_a_way_out() -> None:
    class WithAge(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3 * SIZE * SIZE + 1, CLASSES)

        def forward(self, x: Tensor, age: Tensor) -> Tensor:
            out: Tensor = self.fc(torch.cat([x.flatten(1), age], dim=1))
            return out

    for ask in (leakatlas.doctor, leakatlas.audit):
        with pytest.raises(InvalidInput, match=r"one tensor of images: put a model of several"):
            ask(WithAge(), _batch(), box=IMAGENET)
