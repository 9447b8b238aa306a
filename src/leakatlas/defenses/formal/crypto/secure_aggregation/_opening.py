"""The server's side of the last step: secrets from shares, and the sum from behind the masks."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from leakatlas.defenses.formal.crypto._header import Header
from leakatlas.defenses.formal.crypto.secure_aggregation import _masking, _shamir
from leakatlas.defenses.formal.crypto.secure_aggregation._device import Device
from leakatlas.defenses.formal.crypto.secure_aggregation._masking import Words
from leakatlas.defenses.formal.crypto.secure_aggregation._plan import (
    Advert,
    Plan,
    Revealed,
    commitment,
    pair_key,
    self_key,
)
from leakatlas.errors import ProtocolError


def open_secrets(
    plan: Plan, answers: Mapping[int, Revealed], adverts: Mapping[int, Advert]
) -> tuple[dict[int, bytes], dict[int, bytes]]:
    """Seeds of survivors and mask keys of the others, from the survivors' shares.

    Args:
        plan: The round.
        answers: By survivor, who are those that answered.
        adverts: What the secrets must fit.

    Raises:
        ProtocolError: If a share is missing, or a secret is not the one that was published.
    """
    # Any t shares do; one set of them for all secrets needs the weights once.
    chosen = sorted(answers)[: plan.threshold]
    weights = _shamir.lagrange_weights([plan.point(member) for member in chosen])

    def opened(
        owners: list[int],
        what: str,
        shares: Callable[[Revealed], Mapping[int, int]],
        fits: Callable[[bytes, Advert], bool],
    ) -> dict[int, bytes]:
        secrets = {}
        for owner in owners:
            silent = [m for m in chosen if owner not in shares(answers[m])]
            if silent:
                raise ProtocolError(
                    f"Client {silent[0]} gave no share of client {owner}'s {what}; the sum stays "
                    "closed."
                )
            found = _shamir.reconstruct(
                {plan.point(m): shares(answers[m])[owner] for m in chosen}, weights
            )
            secret = found.to_bytes(_shamir.BYTES, "big")[-_masking.KEY :]
            if found >= 1 << 8 * _masking.KEY or not fits(secret, adverts[owner]):
                raise ProtocolError(
                    f"The shares of client {owner}'s {what} do not give what it published; a share "
                    f"of one of the clients {chosen}, or its own dealing, is wrong."
                )
            secrets[owner] = secret
        return secrets

    survivors = sorted(answers)
    gone = [member for member in plan.cohort if member not in answers]
    return (
        opened(
            survivors, "seed", lambda answer: answer.seeds,
            lambda secret, advert: commitment(plan, secret) == advert.commitment,
        ),
        opened(
            gone, "mask key", lambda answer: answer.keys,
            lambda secret, advert: _masking.public_of(secret) == advert.mask_key,
        ),
    )  # fmt: skip


def sum_words(vectors: list[Words]) -> Words:
    """The sum in the ring, which is the wrap-around of machine words."""
    total = vectors[0].copy()
    for vector in vectors[1:]:
        total += vector
    return total


def remove_masks(
    plan: Plan,
    total: Words,
    adverts: Mapping[int, Advert],
    seeds: Mapping[int, bytes],
    mask_secrets: Mapping[int, bytes],
) -> Words:
    """The sum of inputs behind a sum of masked inputs.

    Args:
        plan: The round.
        total: Sum of the survivors' masked vectors.
        adverts: Public keys of the cohort.
        seeds: b_u of every survivor.
        mask_secrets: Mask key of every client that did not survive.
    """
    clear: Words = np.array(total)
    for seed in seeds.values():
        clear -= _masking.expand(self_key(plan, seed), len(clear), plan.ring)
    for gone, secret in mask_secrets.items():
        key = X25519PrivateKey.from_private_bytes(secret)
        for survivor in seeds:
            pairwise = _masking.expand(
                pair_key(plan, key, survivor, adverts[survivor]), len(clear), plan.ring
            )
            if _masking.sign(survivor, gone) > 0:
                clear -= pairwise
            else:
                clear += pairwise
    return clear


def common_header(lines: Mapping[int, Device]) -> Header:
    """The layout of every survivor's masked input.

    Raises:
        ProtocolError: If one sent none, or they differ.
    """
    headers = {member: line.header for member, line in lines.items()}
    first_member, first = next(iter(headers.items()))
    for member, header in headers.items():
        if header is None or first is None:
            raise ProtocolError(f"Client {member} sent no masked input.")
        if header.layout() != first.layout():
            raise ProtocolError(
                f"Client {member}'s masked update has another layout (kind, scale, names or "
                f"shapes) than client {first_member}'s; their sum has no meaning."
            )
    assert first is not None  # checked in the loop, which runs at least once
    return first
