"""Models by name: ``build("convnet", norm="batch", classes=10, seed=0)``."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

from leakatlas.errors import InvalidParameter, UnknownName
from leakatlas.models.cnn6 import CNN6
from leakatlas.models.convnet import ConvNet
from leakatlas.models.fc import FCNet
from leakatlas.models.generators import Generator
from leakatlas.models.lenet import LeNet
from leakatlas.models.lenet5 import LeNet5
from leakatlas.models.resnet import CIFAR8, CIFAR20, CIFAR32, RESNET18, ResNet
from leakatlas.models.vgg import DEPTHS, VGG
from leakatlas.models.vit import ViT

_CLASSIFIERS: dict[str, Callable[..., nn.Module]] = {
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
    "vgg6": partial(VGG, groups=DEPTHS[6]),
    "vgg11": partial(VGG, groups=DEPTHS[11]),
    "vgg13": partial(VGG, groups=DEPTHS[13]),
    "vgg16": partial(VGG, groups=DEPTHS[16]),
    "vit": ViT,
}
_GENERATORS: dict[str, Callable[..., nn.Module]] = {"generator": Generator}


def names() -> tuple[str, ...]:
    """Names of the classifiers that :func:`build` knows, sorted."""
    return tuple(sorted(_CLASSIFIERS))


def build(name: str, **settings: Any) -> nn.Module:
    """A freshly initialised model, on the CPU, in float32 and in train mode.

    Every classifier takes ``in_channels``, ``size`` (side of a square image), ``classes`` and
    ``seed``; the rest is its own (see the class). ``"generator"`` maps latents to images and
    takes ``channels`` instead.

    Raises:
        UnknownName: If there is no model of that name.
        InvalidParameter: If the model does not take one of the settings, or not that value.
    """
    builders = {**_CLASSIFIERS, **_GENERATORS}
    if name not in builders:
        raise UnknownName("model", name, builders)
    known = tuple(inspect.signature(builders[name]).parameters)
    unknown = [setting for setting in settings if setting not in known]
    if unknown:
        raise InvalidParameter(
            f"Model {name!r} has no setting {unknown[0]!r}; it has: {', '.join(known)}."
        )
    return builders[name](**settings)
