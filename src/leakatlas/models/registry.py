"""Models by name: ``build("convnet", norm="batch", classes=10, seed=0)``."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from leakatlas import limits
from leakatlas.errors import InvalidParameter, LeakAtlasError, UnknownName, shown
from leakatlas.models.allconv import AllConv
from leakatlas.models.cnn6 import CNN6
from leakatlas.models.convnet import ConvNet
from leakatlas.models.denoiser import Denoiser
from leakatlas.models.fc import FCNet
from leakatlas.models.generators import Generator
from leakatlas.models.lenet import LeNet
from leakatlas.models.lenet5 import LeNet5
from leakatlas.models.resnet import CIFAR8, CIFAR20, CIFAR32, RESNET18, ResNet
from leakatlas.models.strided import StridedNet
from leakatlas.models.vgg import DEPTHS, VGG
from leakatlas.models.vit import ViT

_CLASSIFIERS: dict[str, Callable[..., nn.Module]] = {
    "allconv": AllConv,
    "cnn6": CNN6,
    "cnn6-d": partial(CNN6, second=20),
    "convnet": ConvNet,
    "convnet-bn": partial(ConvNet, norm="batch"),
    "fc": FCNet,
    "lenet": LeNet,
    "lenet5": LeNet5,
    "resnet8": partial(ResNet, blocks=CIFAR8),
    "resnet20": partial(ResNet, blocks=CIFAR20),
    "resnet32": partial(ResNet, blocks=CIFAR32),
    "resnet18": partial(ResNet, blocks=RESNET18, width=64),
    "strided": StridedNet,
    "vgg6": partial(VGG, groups=DEPTHS[6]),
    "vgg11": partial(VGG, groups=DEPTHS[11]),
    "vgg13": partial(VGG, groups=DEPTHS[13]),
    "vgg16": partial(VGG, groups=DEPTHS[16]),
    "vit": ViT,
}
_GENERATORS: dict[str, Callable[..., nn.Module]] = {"generator": Generator, "denoiser": Denoiser}


def names() -> tuple[str, ...]:
    """Names of the classifiers that :func:`build` knows, sorted."""
    return tuple(sorted(_CLASSIFIERS))


def build(name: str, /, **settings: Any) -> nn.Module:
    """A freshly initialised model, on the CPU, in float32 and in train mode.

    Every classifier takes ``in_channels``, ``size`` (side of a square image), ``classes`` and
    ``seed``; the rest is its own (see the class). ``"generator"`` maps latents to images,
    ``"denoiser"`` finds the noise in images; both take ``channels`` instead.

    Raises:
        UnknownName: If there is no model of that name.
        InvalidParameter: If the model does not take one of the settings, or not that value, or
            if this machine's memory cannot hold it.
    """
    builders = {**_CLASSIFIERS, **_GENERATORS}
    if not isinstance(name, str) or name not in builders:
        raise UnknownName("model", name, builders)
    known = tuple(inspect.signature(builders[name]).parameters)
    unknown = [setting for setting in settings if setting not in known]
    if unknown:
        raise InvalidParameter(
            f"Model {name!r} has no setting {shown(unknown[0])}; it has: {', '.join(known)}."
        )
    who = f"Model {name!r} with {', '.join(f'{k}={shown(v)}' for k, v in settings.items())}"
    _require_bounds(settings, who)
    try:
        if _is_large(settings):
            with torch.device("meta"):
                blank = builders[name](**settings)
            count = sum(parameter.numel() for parameter in blank.parameters())
            limits.require_memory(who, 4.0 * count, f"{count:,} parameters x 4 bytes")
        return builders[name](**settings)
    except LeakAtlasError:
        raise
    # What Python and torch say of values that a constructor cannot take.
    except (TypeError, ValueError, RuntimeError, OverflowError, MemoryError) as problem:
        reason = " ".join(str(problem).split())[:300]
        raise InvalidParameter(f"{who} cannot be built: {reason}.") from None


LARGEST = 2**24
"""No count, width or side of a network is larger; ImageNet's largest lists of classes are 2**15."""
LAYERS = 1_000
"""Layers that one setting may ask for; ResNet-152 has 152."""


def _numbers(value: object) -> list[int]:
    values = value if isinstance(value, (list, tuple)) else [value]
    return [v for v in values if isinstance(v, int)]


def _require_bounds(settings: Mapping[str, Any], who: str) -> None:
    for name, value in settings.items():
        if name == "seed":
            continue
        numbers = _numbers(value)
        if any(number > LARGEST for number in numbers):
            raise InvalidParameter(f"{who}: {name} is larger than {LARGEST:,}.")
        layers = sum(numbers) if name in ("blocks", "groups", "depth") else len(numbers)
        if layers > LAYERS:
            raise InvalidParameter(f"{who}: {name} asks for {layers:,} layers, beyond {LAYERS:,}.")


def _is_large(settings: Mapping[str, Any]) -> bool:
    """Whether a model may be too large to try: then it is first built without memory."""
    return any(n > 256 for name, v in settings.items() if name != "seed" for n in _numbers(v))
