"""The generator against a critic.

Spectrally normalised (Miyato et al., 2018), with labels their projection; hinge loss, Adam 2e-4
(.5, .999), one step each, differentiable augmentation (Zhao et al., 2020), exponential mean of the
generator's weights, of which those are kept that draw unseen images best (:mod:`.stopping`).

Departure: the generator normalises groups of feature maps of each image, where the usual recipe has
batch statistics; a search then finds no mode to ask about, and no image depends on its neighbours.
In the few thousand steps that were tried it draws nearly one picture a label.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from leakatlas.models import Generator
from leakatlas.priors.lesson import Draws, Lesson, average, widths


class Critic(nn.Module):
    """How real images ``(N, C, S, S)`` of [-1, 1] look, ``(N,)``; spectrally normalised.

    Args:
        channels: Channels of an image.
        size: Its side S.
        classes: Labels of the projection; none if 0.
    """

    def __init__(self, *, channels: int, size: int, classes: int = 0) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for width in (32, 64, 128) if size < 64 else (16, 32, 64, 128):
            convolution = nn.Conv2d(channels, width, 4, stride=2, padding=1)
            layers += [parametrizations.spectral_norm(convolution), nn.LeakyReLU(0.2)]
            channels, size = width, size // 2
        self.body = nn.Sequential(*layers, nn.Flatten())
        features = channels * size * size
        self.head = parametrizations.spectral_norm(nn.Linear(features, 1))
        self.projection = (
            parametrizations.spectral_norm(nn.Embedding(classes, features)) if classes else None
        )

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """The critic's scores."""
        h = self.body(x)
        score: Tensor = self.head(h).squeeze(1)
        if self.projection is not None:
            score = score + (self.projection(y) * h).sum(1)
        return score


class Adversaries(Lesson):
    """A generator against a critic.

    Args:
        shape: ``(C, S, S)``.
        latent: Length of the latent.
        classes: Labels; 0 for none.
        width: Factor on the generator's feature maps.
        batch: Images in a step.
        lr: Step size of both.
        decay: Of the exponential mean of the generator's weights, at most.
    """

    measured = "the critic's loss"

    def __init__(
        self,
        shape: tuple[int, int, int],
        latent: int,
        classes: int = 0,
        *,
        width: int = 1,
        batch: int = 64,
        lr: float = 2e-4,
        decay: float = 0.999,
    ) -> None:
        channels, size, _ = shape
        self.batch = batch
        settings: dict[str, Any] = {
            "latent": latent, "channels": channels, "size": size, "classes": classes,
            "widths": widths(size, width),
        }  # fmt: skip
        self.generator, self.mean = Generator(**settings), Generator(**settings)
        self.critic = Critic(channels=channels, size=size, classes=classes)
        self.nets = nn.ModuleDict(
            {"generator": self.generator, "mean": self.mean, "critic": self.critic}
        )
        self.optimizers = [
            torch.optim.Adam(net.parameters(), lr=lr, betas=(0.5, 0.999))
            for net in (self.critic, self.generator)
        ]
        self.decay = decay

    def step(self, x: Tensor, y: Tensor, draws: Draws, progress: float) -> Tensor:
        """One step of the critic, one of the generator; the critic's loss."""
        judge, draw = self.optimizers

        def fake() -> Tensor:
            z = draws.normal(len(x), self.generator.latent)
            drawn: Tensor = self.generator(z, y if self.generator.classes else None)
            return drawn

        with torch.no_grad():
            made = fake()
        both = augmented(torch.cat([x, made]), draws)
        real, false = self.critic(2 * both - 1, torch.cat([y, y])).chunk(2)
        loss = F.relu(1 - real).mean() + F.relu(1 + false).mean()
        judge.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        judge.step()
        score = -self.critic(2 * augmented(fake(), draws) - 1, y).mean()
        draw.zero_grad(set_to_none=True)
        torch.autograd.backward(score)
        draw.step()
        average(self.mean, self.generator, self.decay, progress)
        return loss.detach()

    def result(self) -> Generator:
        """The generator with the mean weights."""
        return self.mean.eval()


def augmented(x: Tensor, draws: Draws) -> Tensor:
    """Images of [0, 1] with other brightness and contrast, shifted, and with a square cut out."""
    count, _, height, width = x.shape
    x = x + 0.5 * (draws.uniform(count, 1, 1, 1) - 0.5)
    middle = x.mean((1, 2, 3), keepdim=True)
    x = (x - middle) * (draws.uniform(count, 1, 1, 1) + 0.5) + middle
    rows, columns = (torch.arange(side, device=x.device) for side in (height, width))
    reach = height // 8
    by = draws.whole(-reach, reach + 1, 2, count, 1, 1)
    # Products with 0 and 1 instead of an index: the slope of an index adds up in no fixed order.
    down = (rows == rows[:, None] + by[0]).to(x)
    right = (columns == columns[:, None] + by[1]).to(x)
    x = torch.einsum("nij,ncjk,nlk->ncil", down, x, right)
    corner = draws.uniform(2, count, 1)
    cut_rows = (rows - (height * corner[0]).floor()).abs() <= height // 6
    cut_columns = (columns - (width * corner[1]).floor()).abs() <= height // 6
    return x * ~(cut_rows[:, :, None] & cut_columns[:, None, :])[:, None]
