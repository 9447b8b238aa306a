"""A tiny vision transformer.

Dosovitskiy et al. (2021): patches, a class token, learned positions, pre-norm blocks, GELU.
Attention is written out in matrix products: fused attention kernels have no second derivative.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from leakatlas.errors import InvalidParameter, UnknownName
from leakatlas.models.parts import activation, require_positive, require_rate, require_size, seeded


class Attention(nn.Module):
    """Multi-head self-attention on tokens ``(N, T, dim)``."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """``(N, T, dim)`` to ``(N, T, dim)``."""
        n, tokens, dim = x.shape
        heads = self.qkv(x).view(n, tokens, 3, self.heads, dim // self.heads)
        q, k, v = heads.permute(2, 0, 3, 1, 4).unbind(0)
        weights = (q @ k.transpose(-2, -1) / (dim // self.heads) ** 0.5).softmax(-1)
        mixed: Tensor = self.out((weights @ v).transpose(1, 2).reshape(n, tokens, dim))
        return mixed


class Block(nn.Module):
    """Pre-norm attention and a two-layer perceptron, each with dropout and a residual."""

    def __init__(self, dim: int, heads: int, hidden: int, act: str, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attention = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, hidden), activation(act), nn.Linear(hidden, dim))
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """``(N, T, dim)`` to ``(N, T, dim)``."""
        x = x + self.drop(self.attention(self.norm1(x)))
        y: Tensor = x + self.drop(self.mlp(self.norm2(x)))
        return y


class DirectBlock(nn.Module):
    """A block whose attention reads its input as it is: no norm before, no residual around.

    "Architecture A" of APRIL (Lu et al., 2022); its attention determines its input in closed form.
    """

    def __init__(self, dim: int, heads: int, hidden: int, act: str, dropout: float = 0.0) -> None:
        super().__init__()
        self.attention = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, hidden), activation(act), nn.Linear(hidden, dim))
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """``(N, T, dim)`` to ``(N, T, dim)``."""
        x = self.drop(self.attention(x))
        y: Tensor = x + self.drop(self.mlp(self.norm2(x)))
        return y


_FIRST_BLOCKS: dict[str, Callable[[int, int, int, str, float], nn.Module]] = {
    "prenorm": Block,
    "april": DirectBlock,
}


class ViT(nn.Module):
    """Patch embedding, ``depth`` transformer blocks, a linear head on the class token.

    Args:
        in_channels: Channels of an image.
        size: Side of an image; a multiple of ``patch``.
        classes: Number of logits.
        patch: Side of a patch.
        dim: Length of a token; a multiple of ``heads``.
        depth: Number of blocks.
        heads: Attention heads.
        mlp_ratio: Hidden width of a block's perceptron, in units of ``dim``.
        act: Name of the perceptrons' activation.
        first_block: "prenorm", or "april" for a first block whose attention reads the embedded
            tokens directly (:class:`DirectBlock`).
        dropout: Rate p on the embedded tokens and on what every block adds to them.
        seed: Seed of the weights.
    """

    def __init__(
        self,
        *,
        in_channels: int = 3,
        size: int = 32,
        classes: int = 10,
        patch: int = 4,
        dim: int = 64,
        depth: int = 2,
        heads: int = 4,
        mlp_ratio: int = 2,
        act: str = "gelu",
        first_block: str = "prenorm",
        dropout: float = 0.0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if first_block not in _FIRST_BLOCKS:
            raise UnknownName("first block of a ViT", first_block, _FIRST_BLOCKS)
        require_positive(
            "ViT",
            in_channels=in_channels,
            classes=classes,
            patch=patch,
            dim=dim,
            depth=depth,
            heads=heads,
            mlp_ratio=mlp_ratio,
        )
        require_rate("ViT", dropout)
        require_size("ViT", size, at_least=patch, multiple_of=patch)
        if dim % heads:
            raise InvalidParameter(
                f"ViT(dim={dim}, heads={heads}): dim must be divisible by heads."
            )
        tokens = (size // patch) ** 2 + 1
        with seeded(seed):
            self.embed = nn.Conv2d(in_channels, dim, patch, stride=patch)
            self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
            self.positions = nn.Parameter(torch.zeros(1, tokens, dim))
            self.blocks = nn.Sequential(
                _FIRST_BLOCKS[first_block](dim, heads, mlp_ratio * dim, act, dropout),
                *(Block(dim, heads, mlp_ratio * dim, act, dropout) for _ in range(depth - 1)),
            )
            self.drop = nn.Dropout(dropout)
            self.norm = nn.LayerNorm(dim)
            self.fc = nn.Linear(dim, classes)
            for parameter in (self.cls_token, self.positions):
                nn.init.trunc_normal_(parameter, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``(N, classes)`` of images ``(N, C, H, W)``."""
        patches: Tensor = self.embed(x).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.cls_token.expand(len(x), -1, -1), patches], dim=1)
        encoded: Tensor = self.norm(self.blocks(self.drop(tokens + self.positions)))
        logits: Tensor = self.fc(encoded[:, 0])
        return logits
