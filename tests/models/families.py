"""Every registered classifier at a size at which its tests take a moment."""

from typing import Any

from leakatlas.models import names

_NARROW: dict[str, dict[str, Any]] = {
    "convnet": {"width": 4},
    "convnet-bn": {"width": 4},
    "resnet18": {"width": 4},
    "resnet20": {"width": 4},
    "resnet32": {"width": 4},
    "resnet8": {"width": 4},
    "vgg6": {"width": 4},
    "vgg11": {"width": 4},
    "vgg13": {"width": 4},
    "vgg16": {"width": 4},
    "vit": {"dim": 16, "heads": 2, "patch": 8},
    "fc": {"widths": (12, 8)},
}
SMALL = {name: _NARROW.get(name, {}) for name in names()}
