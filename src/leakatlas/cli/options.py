"""What the help of several commands says in the same words."""

from __future__ import annotations

DEVICE = (
    "Where to compute: auto (a CUDA GPU if there is one, else the CPU), cpu, cuda, cuda:1, mps."
)
