"""The fifty sub-policies from which transformation policies are made, on pixels in [0, 1].

Operation and index of magnitude as in ``gaow0007/ATSPrivacy`` (``policy.py``, ``autoaugment.py`` at
6e64532), whose order the published policies count by. The probabilities that stand there too are
never used: an operation is always applied, and only its sign is random.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

LIBRARY: tuple[tuple[str, int], ...] = tuple(
    (word.rstrip("0123456789"), int(word.lstrip("abcdefghijklmnopqrstuvwxyzXY")))
    for word in """
    invert7 contrast6 rotate2 translateX9 sharpness1 sharpness3 shearY2 translateY2 autocontrast5
    equalize2 shearY5 posterize5 color3 brightness5 sharpness9 brightness9 equalize5 equalize1
    contrast7 sharpness5 color5 translateX5 equalize7 autocontrast8 translateY3 sharpness6
    brightness6 color8 solarize0 invert0 equalize0 autocontrast0 equalize8 equalize4 color5
    equalize5 autocontrast4 solarize4 brightness3 color0 solarize1 autocontrast0 translateY3
    translateY3 autocontrast1 solarize1 equalize5 invert0 translateY3 autocontrast1
    """.split()
)
"""``(operation, index of magnitude)``, by index."""

STRONGEST: Mapping[str, float] = {
    "shearX": 0.3, "shearY": 0.3, "translateX": 150 / 331, "translateY": 150 / 331, "rotate": 30.0,
    "color": 0.5, "contrast": 0.5, "sharpness": 0.5, "brightness": 0.5,
}  # fmt: skip
"""The magnitude of index 9; index i has i/9 of it."""

GREY = 128 / 255
"""What a rotation leaves at the corners."""

FEWEST_BITS, MOST_BITS = 4, 8


def transformed(image: Tensor, policy: Sequence[int], signs: Sequence[int]) -> Tensor:
    """One image under the sub-policies of a policy, one after the other.

    Args:
        image: ``(C, H, W)`` in [0, 1], one channel or three.
        policy: Indices into :data:`LIBRARY`.
        signs: +1 or -1 for each of them.
    """
    for index, sign in zip(policy, signs, strict=True):
        name, magnitude = LIBRARY[index]
        image = OPERATIONS[name](image, magnitude, sign).clamp(0, 1)
    return image


def _signed(name: str, magnitude: int, sign: int) -> float:
    return STRONGEST[name] * magnitude / 9 * sign


def _enhanced(name: str, adjust: str) -> Callable[[Tensor, int, int], Tensor]:
    def apply(image: Tensor, magnitude: int, sign: int) -> Tensor:
        from torchvision.transforms.v2 import functional  # a second to import

        changed: Tensor = getattr(functional, adjust)(image, 1 + _signed(name, magnitude, sign))
        return changed

    return apply


def _plain(name: str) -> Callable[[Tensor, int, int], Tensor]:
    def apply(image: Tensor, magnitude: int, sign: int) -> Tensor:
        from torchvision.transforms.v2 import functional

        changed: Tensor = getattr(functional, name)(image)
        return changed

    return apply


def _moved(name: str) -> Callable[[Tensor, int, int], Tensor]:
    """Shears and translations; what comes in from outside is black."""

    def apply(image: Tensor, magnitude: int, sign: int) -> Tensor:
        from torchvision.transforms.v2 import InterpolationMode, functional

        amount = _signed(name, magnitude, sign)
        along_x = name.endswith("X")
        side = image.shape[-1] if along_x else image.shape[-2]
        vector = [amount * side, 0.0] if along_x else [0.0, amount * side]
        angle = math.degrees(math.atan(amount))
        shear = name.startswith("shear")
        changed: Tensor = functional.affine(
            image,
            angle=0.0,
            translate=[0.0, 0.0] if shear else vector,
            scale=1.0,
            shear=([angle, 0.0] if along_x else [0.0, angle]) if shear else [0.0, 0.0],
            interpolation=InterpolationMode.BILINEAR if shear else InterpolationMode.NEAREST,
        )
        return changed

    return apply


def _rotate(image: Tensor, magnitude: int, sign: int) -> Tensor:
    from torchvision.transforms.v2 import functional

    # The release's one-sided rotation: its sign is never drawn.
    changed: Tensor = functional.rotate(
        image, _signed("rotate", magnitude, 1), fill=[GREY] * len(image)
    )
    return changed


def _posterize(image: Tensor, magnitude: int, sign: int) -> Tensor:
    bits = round(MOST_BITS - (MOST_BITS - FEWEST_BITS) * magnitude / 9)
    shift = 2 ** (8 - bits)
    levels = (image * 255).round().div(shift, rounding_mode="floor")
    return levels.mul(shift).div(255)


def _solarize(image: Tensor, magnitude: int, sign: int) -> Tensor:
    threshold = 256 * (1 - magnitude / 9)
    return torch.where((image * 255).round() < threshold, image, 1 - image)


OPERATIONS: Mapping[str, Callable[[Tensor, int, int], Tensor]] = {
    "shearX": _moved("shearX"),
    "shearY": _moved("shearY"),
    "translateX": _moved("translateX"),
    "translateY": _moved("translateY"),
    "rotate": _rotate,
    "color": _enhanced("color", "adjust_saturation"),
    "contrast": _enhanced("contrast", "adjust_contrast"),
    "sharpness": _enhanced("sharpness", "adjust_sharpness"),
    "brightness": _enhanced("brightness", "adjust_brightness"),
    "posterize": _posterize,
    "solarize": _solarize,
    "autocontrast": _plain("autocontrast"),
    "equalize": _plain("equalize"),
    "invert": _plain("invert"),
}
"""``(image, index of magnitude, sign) -> image``."""
