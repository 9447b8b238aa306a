"""What all recipes share: provenance, and a network that is no larger than its weights."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, ClassVar, Literal, TypeVar

import torch
from pydantic import Field, ValidationError
from torch import Tensor, nn

from leakatlas import models, sealed
from leakatlas.catalogue.schema import Strict, Text
from leakatlas.errors import InvalidInput, LeakAtlasError
from leakatlas.models import Card
from leakatlas.priors.prior import CEILING, Diffusion, Part, Prior

FileName = Annotated[str, Field(pattern=r"^[\w-][\w.-]*(/[\w-][\w.-]*)*$", max_length=200)]
"""A file below the folder of the recipe, nowhere else."""

LAYERS = 1_000
"""Layers of one network."""


Checked = TypeVar("Checked", bound=Strict)


def checked(form: type[Checked], values: object, who: str) -> Checked:
    """Values of a file in their form.

    Raises:
        InvalidInput: If they do not have it.
    """
    try:
        return form.model_validate(values)
    except ValidationError as problem:
        first = problem.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise InvalidInput(f"{who}: {where}: {first['msg']}.") from None


class Kind(Strict):
    """A recipe; every kind adds what it needs."""

    ceiling: ClassVar[str] = CEILING

    schema_: Annotated[
        Literal["leakatlas/prior/1"], Field(alias="schema", description="Version of the format.")
    ]
    kind: str
    weights: Annotated[FileName, Field(description="Safetensors, or a torch file of tensors.")]
    data: Annotated[Text, Field(description="What it was trained on, with its source.")]
    split: Annotated[str, Field(description="Which part of that data.")] = ""
    license: Annotated[Text, Field(description="Licence of the weights.")]
    inversion_psnr: Annotated[
        float | None,
        Field(
            ge=0, allow_inf_nan=False,
            description="PSNR in dB of its best pictures of held-out images, if that is known.",
        ),
    ] = None  # fmt: skip

    @abstractmethod
    def build(
        self, card: Card, folder: Path, state: Mapping[str, Tensor], who: str
    ) -> Prior | Diffusion:
        """The prior.

        Args:
            card: Its provenance.
            folder: Where more files may lie.
            state: The weights by name.
            who: The prior, for messages.

        Raises:
            InvalidInput: If these do not belong together.
        """


class Pixels(nn.Module):
    """A network that draws images of [-1, 1], drawing them in [0, 1].

    What overshoots is not clipped: a search would lose its slope there.

    Args:
        network: Takes latents, and labels if it is conditional.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, z: Tensor, y: Tensor | None = None) -> Tensor:
        """Images ``(N, C, S, S)`` of [0, 1]."""
        drawn: Tensor = self.network(z) if y is None else self.network(z, y)
        return (drawn + 1) / 2


def in_pixels(stages: Sequence[Part]) -> tuple[Part, ...]:
    """Stages of a network that draws images of [-1, 1], so that they draw them in [0, 1]."""
    *inner, last = stages
    return (*inner, lambda *state: ((last(*state)[0] + 1) / 2,))


def filled(make: Callable[[], nn.Module], state: Mapping[str, Tensor], who: str) -> nn.Module:
    """A network with these weights, frozen, in eval mode.

    It is laid out without memory first: a file that describes a network larger than its weights
    costs nothing.

    Raises:
        InvalidInput: If it cannot be built, or is another one than that of the weights.
    """
    try:
        with torch.device("meta"):
            network = make()
    except LeakAtlasError:
        raise
    # What a package says of settings that it cannot take.
    except sealed.MALFORMED as problem:
        reason = " ".join(str(problem).split())[:300]
        raise InvalidInput(f"{who} cannot be built: {type(problem).__name__}: {reason}.") from None
    described = sum(t.numel() for t in network.state_dict().values())
    held = sum(t.numel() for t in state.values())
    if described != held:
        raise InvalidInput(
            f"{who}: its description has {described:,} numbers, its weights hold {held:,}; they "
            "are of different networks."
        )
    network.to_empty(device="cpu")
    models.apply_state(network, state, source=who)
    return network.eval().requires_grad_(False)


def drawn_shape(
    network: nn.Module, latent: tuple[int, ...], who: str, *more: Tensor
) -> tuple[int, int, int]:
    """``(C, H, W)`` of what a network draws of one latent.

    Raises:
        InvalidInput: If it cannot, or if that is no image.
    """
    try:
        with torch.no_grad():
            drawn = network(torch.zeros(1, *latent), *more)
    except sealed.MALFORMED as problem:
        reason = " ".join(str(problem).split())[:300]
        raise InvalidInput(f"{who} does not draw from latents {latent}: {reason}.") from None
    if not isinstance(drawn, Tensor) or drawn.dim() != 4 or drawn.shape[1] not in (1, 3):
        raise InvalidInput(f"{who} draws no images (N, C, H, W) of one or three channels.")
    _, channels, height, width = drawn.shape
    return channels, height, width
