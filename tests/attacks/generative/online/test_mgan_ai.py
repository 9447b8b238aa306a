"""mGAN-AI: what a round shows of every client, and what the identity task adds."""

from __future__ import annotations

from tests.attacks.case import LENET, Case

CASE = Case(
    {"steps": 2, "representative_steps": 1, "batch_size": 4},
    {**LENET, "size": 8, "clients": 3, "rounds": 2},
    boxed=True,
)
