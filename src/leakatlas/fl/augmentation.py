"""What a client does to its images before every local step: transforms of torchvision, by name.

``augment: [{name: RandomHorizontalFlip}, {name: RandomCrop, size: 32, padding: 4}]`` in a protocol.
They act on pixels in [0, 1], example by example, with draws of their own for every local step. The
adversary may know the recipe (it is part of the protocol); what was drawn it knows by
``Grant.AUGMENTATION`` alone, and replays the images as they are otherwise.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from pydantic import PlainSerializer, PlainValidator
from torch import Tensor, nn

from leakatlas.data import Box
from leakatlas.errors import InvalidInput, InvalidParameter, UnknownName, shown

CLOSED = {"Lambda", "Identity", "Transform", "Compose"}
"""Names of torchvision.transforms.v2 that are no recipe: code of one's own, or nothing."""


@dataclass(frozen=True)
class Augmentation:
    """One transform.

    Args:
        name: Of a class of ``torchvision.transforms.v2``.
        arguments: Its arguments, as JSON text.
    """

    name: str
    arguments: str = "{}"

    def build(self) -> nn.Module:
        """The transform.

        Raises:
            UnknownName: If torchvision has none of that name.
            InvalidParameter: If it does not take these arguments.
        """
        from torchvision.transforms import v2  # a second that only clients who augment wait for

        cls = getattr(v2, self.name, None)
        known = [
            name for name, value in vars(v2).items()
            if isinstance(value, type) and issubclass(value, v2.Transform) and name not in CLOSED
        ]  # fmt: skip
        if cls is None or self.name not in known:
            raise UnknownName("augmentation", self.name, known)
        arguments = json.loads(self.arguments)
        try:
            made: nn.Module = cls(**arguments)
        except (TypeError, ValueError) as problem:
            raise InvalidParameter(
                f"augment: {self.name}({shown(arguments)}) is refused by torchvision: {problem}."
            ) from None
        return made


def as_augmentations(value: object) -> tuple[Augmentation, ...]:
    """Transforms from what people write: names, or mappings with ``name:``.

    >>> as_augmentations(["RandomHorizontalFlip", {"name": "RandomRotation", "degrees": 9}])[1]
    Augmentation(name='RandomRotation', arguments='{"degrees": 9}')

    Raises:
        UnknownName: If torchvision has none of that name.
        InvalidParameter: If one is written otherwise, or does not take its arguments.
    """
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise InvalidParameter(f"augment is a list of transforms, got {shown(value)}.")
    made = []
    for one in value:
        if isinstance(one, str):
            one = {"name": one}
        if isinstance(one, Mapping) and isinstance(one.get("name"), str):
            rest = {str(k): v for k, v in one.items() if k != "name"}
            try:
                one = Augmentation(one["name"], json.dumps(rest, sort_keys=True))
            except TypeError:
                raise InvalidParameter(
                    f"augment: the arguments of {one['name']} are plain values, got {shown(rest)}."
                ) from None
        if not isinstance(one, Augmentation):
            raise InvalidParameter(
                f"augment: a transform is a name or {{name: ..., arguments}}, got {shown(one)}."
            )
        one.build()
        made.append(one)
    return tuple(made)


def augmentations_json(value: tuple[Augmentation, ...]) -> list[Any]:
    """Transforms as plain JSON."""
    return [{"name": one.name, **json.loads(one.arguments)} for one in value]


AugmentField = Annotated[Any, PlainValidator(as_augmentations), PlainSerializer(augmentations_json)]
"""The type of a protocol's field: takes what :func:`as_augmentations` takes."""


def augmented(
    x: Tensor, transforms: Sequence[Augmentation], seed: int, box: Box | None = None
) -> Tensor:
    """A batch after its transforms; differentiable where they are.

    Args:
        x: ``(N, C, H, W)``, model space.
        transforms: In order.
        seed: Of all that they draw; examples draw one after the other.
        box: Between pixels and model space; none if None.

    Raises:
        InvalidInput: If they change the shape of the images.
    """
    chain = [one.build() for one in transforms]
    pixels = x if box is None else box.denormalize(x)
    images = []
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        for image in pixels:
            for transform in chain:
                image = transform(image)
            images.append(image)
    found = torch.stack(images)
    if found.shape != x.shape:
        raise InvalidInput(
            f"augment: {', '.join(one.name for one in transforms)} turn images of "
            f"{tuple(x.shape[1:])} into {tuple(found.shape[1:])}; the model reads one shape, so "
            "end with a crop or a resize to it."
        )
    return found if box is None else box.normalize(found)
