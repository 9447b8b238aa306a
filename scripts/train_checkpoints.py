"""Train the classifiers that LeakAtlas ships, and those that its studies attack.

    python scripts/train_checkpoints.py --data cifar10/train.parquet

SGD with Nesterov momentum (AdamW for the sigmoid LeNet and the ViT) and a one-cycle step size,
random flips and 4-pixel shifts, label smoothing 0.1, bfloat16 matrix products. The last 5,000
images are held out for the figures. Weights that only a study needs go beside it, by ``--out``.
"""

from __future__ import annotations

import argparse
import datetime
import time
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from leakatlas.data.box import CIFAR10
from leakatlas.data.loaders import parquet
from leakatlas.models.checkpoints import WEIGHTS, Card, save_weights
from leakatlas.models.registry import build

HELD_OUT = 5_000
BATCH = 128
# Name of the weights -> (model, optimizer, largest step size). Without normalisation 0.2 diverges.
SHIPPED = {
    "convnet-bn-cifar10": ("convnet-bn", "sgd", 0.2),
    "convnet-cifar10": ("convnet", "sgd", 0.03),
}
STUDIED = {
    "lenet-cifar10": ("lenet", "adamw", 5e-3),
    "vit-cifar10": ("vit", "adamw", 2e-3),
    "resnet20-cifar10": ("resnet20", "sgd", 0.3),
}


def augment(x: Tensor, draws: torch.Generator) -> Tensor:
    """Random horizontal flips and one shift of up to 4 pixels for the batch ``(N, C, H, W)``."""
    flip = torch.rand(len(x), 1, 1, 1, generator=draws) < 0.5
    x = torch.where(flip, x.flip(3), x)
    down, right = torch.randint(0, 9, (2,), generator=draws).tolist()
    padded = F.pad(x, (4, 4, 4, 4))
    return padded[:, :, down : down + x.shape[2], right : right + x.shape[3]]


@torch.no_grad()
def evaluate(model: nn.Module, x: Tensor, y: Tensor) -> tuple[float, float]:
    """Mean cross-entropy and accuracy in eval mode."""
    model.eval()
    logits = torch.cat([model(x[first : first + 500]) for first in range(0, len(x), 500)])
    model.train()
    return float(F.cross_entropy(logits, y)), float((logits.argmax(1) == y).float().mean())


def train(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    epochs: int,
    optimizer: torch.optim.Optimizer,
    draws: torch.Generator,
) -> None:
    """Fit ``model`` in place to normalised images ``x`` ``(N, C, H, W)`` and labels ``y``."""
    model.to(memory_format=torch.channels_last)
    per_epoch = len(x) // BATCH
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=optimizer.param_groups[0]["lr"], total_steps=per_epoch * epochs
    )
    start = time.monotonic()
    for epoch in range(epochs):
        total = torch.zeros(())
        order = torch.randperm(len(x), generator=draws)[: per_epoch * BATCH]
        for batch in order.view(per_epoch, BATCH):
            images = augment(x[batch], draws).contiguous(memory_format=torch.channels_last)
            with torch.autocast("cpu", torch.bfloat16):
                loss = F.cross_entropy(model(images), y[batch], label_smoothing=0.1)
            optimizer.zero_grad(set_to_none=True)
            torch.autograd.backward(loss)
            nn.utils.clip_grad_norm_(model.parameters(), 5.0)
            optimizer.step()
            schedule.step()
            total += loss.detach()
        print(
            f"epoch {epoch + 1}: loss {float(total) / per_epoch:.3f}, "
            f"{time.monotonic() - start:.0f} s",
            flush=True,
        )
    model.to(memory_format=torch.contiguous_format)


def optimizer_of(model: nn.Module, kind: str, lr: float) -> torch.optim.Optimizer:
    """The optimizer of a model's row in the tables above."""
    if kind == "adamw":
        return torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=1e-2)
    return torch.optim.SGD(
        model.parameters(), lr=lr, momentum=0.9, weight_decay=5e-4, nesterov=True
    )


def main() -> None:
    """Read the arguments, train each model, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--data", type=Path, required=True, help="CIFAR-10 train, as Parquet")
    parser.add_argument("--only", choices=(*SHIPPED, *STUDIED), help="train this one alone")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=WEIGHTS)
    parser.add_argument("--date", default=datetime.date.today().isoformat())
    arguments = parser.parse_args()

    torch.set_num_threads(1)
    images = parquet(arguments.data, 32)
    x, y = CIFAR10.normalize(images.images), images.labels
    chosen = SHIPPED
    if arguments.only is not None:
        chosen = {arguments.only: {**SHIPPED, **STUDIED}[arguments.only]}
    for name, (architecture, kind, lr) in chosen.items():
        start = time.monotonic()
        model = build(architecture, seed=arguments.seed)
        draws = torch.Generator().manual_seed(arguments.seed)
        optimizer = optimizer_of(model, kind, lr)
        train(
            model, x[:-HELD_OUT], y[:-HELD_OUT],
            epochs=arguments.epochs, optimizer=optimizer, draws=draws,
        )  # fmt: skip
        loss, accuracy = evaluate(model, x[-HELD_OUT:], y[-HELD_OUT:])
        about = Card(
            name=name,
            model=architecture,
            settings={},
            box=CIFAR10.to_json(),
            data="CIFAR-10 training images (Krizhevsky 2009), JPEG-encoded copies",
            split="first 45,000 of the training file; last 5,000 held out; no test image",
            recipe=f"python scripts/train_checkpoints.py --data cifar10/train.parquet "
            f"--only {name} --epochs {arguments.epochs} --seed {arguments.seed}",
            seed=arguments.seed,
            epochs=arguments.epochs,
            figures={
                "held_out_loss": round(loss, 4),
                "held_out_accuracy": round(accuracy, 4),
                "wall_seconds": round(time.monotonic() - start),
            },
            date=arguments.date,
            license="Apache-2.0",
            sha256="",
        )
        print(save_weights(model, about, arguments.out))


if __name__ == "__main__":
    main()
