"""Train the image generator that the attacks with a generative prior use, and ship it.

A variational autoencoder with a 128-dimensional latent; the decoder is the generator. The
reconstruction term is a Gaussian likelihood whose variance is the batch's own optimum (the
"optimal sigma-VAE" of Rybkin et al., 2021). The KL term has a weight above one: at weight one the
latents of real images fill the space so sparsely that samples from the prior are mere blobs.

    python scripts/train_generator.py --data cifar10/train.parquet

The last 5,000 images of the file are held out; figures are measured on them.
"""

from __future__ import annotations

import argparse
import datetime
import math
import time
from pathlib import Path

import torch
from torch import Tensor, nn

from leakatlas.data.loaders import parquet
from leakatlas.models.checkpoints import WEIGHTS, Card, save_weights
from leakatlas.models.generators import Generator
from leakatlas.models.parts import seeded

NAME = "generator-cifar10"
HELD_OUT = 5_000
BATCH = 128
LATENT = 128


class Encoder(nn.Module):
    """Mean and log variance of the latent, ``(N, latent)`` each, of images ``(N, 3, 32, 32)``."""

    def __init__(self, *, latent: int, seed: int) -> None:
        super().__init__()
        with seeded(seed):
            self.body = nn.Sequential(
                nn.Conv2d(3, 32, 3, stride=2, padding=1),
                nn.SiLU(),
                nn.Conv2d(32, 64, 3, stride=2, padding=1),
                nn.SiLU(),
                nn.Conv2d(64, 128, 3, stride=2, padding=1),
                nn.SiLU(),
                nn.Flatten(),
                nn.Linear(2048, 2 * latent),
            )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log variance."""
        mean, log_variance = self.body(2 * x - 1).chunk(2, dim=1)
        return mean, log_variance.clamp(-12, 6)


def loss_terms(x: Tensor, x_hat: Tensor, mean: Tensor, log_variance: Tensor) -> tuple[Tensor, ...]:
    """Negative log likelihood per image at the optimal variance (up to a constant), and KL."""
    error = (x - x_hat).square().mean()
    likelihood = 0.5 * math.prod(x.shape[1:]) * error.log()
    kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum(1).mean()
    return likelihood, kl


def psnr(x: Tensor, x_hat: Tensor) -> float:
    """Mean over images of 10 log10(1 / MSE)."""
    return float(-10 * (x - x_hat).square().flatten(1).mean(1).log10().mean())


def search(generator: Generator, x: Tensor, steps: int = 300, lr: float = 0.05) -> float:
    """PSNR of the best latent that Adam finds from z = 0 with the image in sight: the prior's cap.

    Args:
        generator: The generator.
        x: Images ``(N, 3, 32, 32)``.
        steps: Steps of Adam.
        lr: Its step size.
    """
    z = torch.zeros(len(x), generator.latent, requires_grad=True)
    optimizer = torch.optim.Adam([z], lr=lr)
    for _ in range(steps):
        optimizer.zero_grad()
        torch.autograd.backward((generator(z) - x).square().flatten(1).mean(1).sum())
        optimizer.step()
    return psnr(x, generator(z.detach()))


def main() -> None:
    """Read the arguments, train, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--data", type=Path, required=True, help="CIFAR-10 train, as Parquet")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--kl-weight", type=float, default=3.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=WEIGHTS)
    parser.add_argument("--date", default=datetime.date.today().isoformat())
    arguments = parser.parse_args()

    torch.set_num_threads(1)
    images = parquet(arguments.data, 32).images
    train, held_out = images[:-HELD_OUT], images[-HELD_OUT:]
    draws = torch.Generator().manual_seed(arguments.seed)
    encoder = Encoder(latent=LATENT, seed=arguments.seed).to(memory_format=torch.channels_last)
    generator = Generator(latent=LATENT, seed=arguments.seed).to(memory_format=torch.channels_last)
    parameters = [*encoder.parameters(), *generator.parameters()]
    optimizer = torch.optim.Adam(parameters)
    per_epoch = len(train) // BATCH
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=3e-3, total_steps=per_epoch * arguments.epochs
    )
    start = time.monotonic()
    for epoch in range(arguments.epochs):
        totals = torch.zeros(2)
        order = torch.randperm(len(train), generator=draws)[: per_epoch * BATCH]
        for batch in order.view(per_epoch, BATCH):
            x = train[batch]
            flip = torch.rand(len(x), 1, 1, 1, generator=draws) < 0.5
            x = torch.where(flip, x.flip(3), x).contiguous(memory_format=torch.channels_last)
            mean, log_variance = encoder(x)
            noise = torch.randn(mean.shape, generator=draws)
            x_hat = generator(mean + noise * (0.5 * log_variance).exp())
            likelihood, kl = loss_terms(x, x_hat, mean, log_variance)
            optimizer.zero_grad(set_to_none=True)
            torch.autograd.backward(likelihood + arguments.kl_weight * kl)
            nn.utils.clip_grad_norm_(parameters, 1_000.0)
            optimizer.step()
            schedule.step()
            totals += torch.stack([likelihood.detach(), kl.detach()])
        likelihood_mean, kl_mean = (totals / per_epoch).tolist()
        mse = math.exp(2 * likelihood_mean / (3 * 32 * 32))
        print(
            f"epoch {epoch + 1}: train PSNR {-10 * math.log10(mse):.2f} dB, KL {kl_mean:.1f}, "
            f"{time.monotonic() - start:.0f} s",
            flush=True,
        )

    generator = generator.to(memory_format=torch.contiguous_format).eval().requires_grad_(False)
    with torch.no_grad():
        mean, log_variance = encoder(held_out)
        _, kl = loss_terms(held_out, held_out + 1e-3, mean, log_variance)
        reconstructed = psnr(held_out, generator(mean))
        samples = generator(torch.randn(1_000, LATENT, generator=draws))
        average = train[:5_000].mean(0)
    figures = {
        "held_out_psnr_db_of_encoded_latent": round(reconstructed, 2),
        "held_out_psnr_db_of_searched_latent_first_64": round(search(generator, held_out[:64]), 2),
        "held_out_psnr_db_of_mean_train_image": round(psnr(held_out, average), 2),
        "held_out_kl_nats": round(float(kl), 1),
        "pixel_std_of_samples": round(float(samples.std()), 4),
        "pixel_std_of_held_out": round(float(held_out.std()), 4),
        "wall_seconds": round(time.monotonic() - start),
    }
    about = Card(
        name=NAME,
        model="generator",
        settings={"latent": LATENT},
        box=None,
        data="CIFAR-10 training images (Krizhevsky 2009), JPEG-encoded copies",
        split="surrogate: first 45,000 of the training file; last 5,000 held out; no test image",
        recipe=f"python scripts/train_generator.py --data cifar10/train.parquet "
        f"--epochs {arguments.epochs} --kl-weight {arguments.kl_weight:g} --seed {arguments.seed}",
        seed=arguments.seed,
        epochs=arguments.epochs,
        figures=figures,
        date=arguments.date,
        license="Apache-2.0",
        sha256="",
    )
    print(save_weights(generator, about, arguments.out, half=True))


if __name__ == "__main__":
    main()
