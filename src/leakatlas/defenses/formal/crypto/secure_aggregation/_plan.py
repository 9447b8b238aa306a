"""What the members of a round agree on and show to each other, and the keys that follow from it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from leakatlas.defenses.formal.crypto.secure_aggregation import _masking
from leakatlas.defenses.formal.crypto.secure_aggregation._masking import Ring
from leakatlas.errors import ProtocolError


@dataclass(frozen=True)
class Advert:
    """What a client publishes, and its signature.

    Args:
        letter_key: X25519 public key, for letters.
        mask_key: X25519 public key, for masks.
        commitment: To the seed of its own mask, by which a wrongly opened seed is noticed.
        signature: In the signed protocol.
    """

    letter_key: bytes
    mask_key: bytes
    commitment: bytes
    signature: bytes = b""

    @property
    def keys(self) -> tuple[bytes, bytes]:
        """The two public keys."""
        return self.letter_key, self.mask_key


@dataclass(frozen=True)
class Plan:
    """What all members of a round agree on.

    Args:
        session: Random bytes, fresh for every run of the protocol.
        round: Round number; enters every key, so that nothing is reused.
        cohort: Members, sorted.
        threshold: t.
        ring: Of the masked vectors.
        directory: Ed25519 public keys by client, from outside the server; empty if the protocol
            runs unsigned.
    """

    session: bytes
    round: int
    cohort: tuple[int, ...]
    threshold: int
    ring: Ring
    directory: Mapping[int, bytes]

    def point(self, client: int) -> int:
        """Where this client's shares are evaluated."""
        return self.cohort.index(client) + 1

    def text(self, what: str, *more: object) -> bytes:
        """What a signature or a seal is about: this run of the protocol and nothing else."""
        parts = (what, self.session.hex(), self.round, self.threshold, list(self.cohort), *more)
        return "|".join(map(str, parts)).encode()


@dataclass(frozen=True)
class Terms:
    """What a client insists on, whatever the server plans.

    Args:
        least_cohort: Fewest members of a cohort.
        least_threshold: Smallest t for a cohort of a given size.
    """

    least_cohort: int
    least_threshold: Callable[[int], int]


@dataclass(frozen=True)
class Revealed:
    """A survivor's answer: shares of self-mask seeds of survivors, of mask keys of the others."""

    seeds: Mapping[int, int]
    keys: Mapping[int, int]


def self_key(plan: Plan, seed: bytes) -> bytes:
    """Key of a client's own mask, from b_u."""
    return _masking.derive(seed, "self mask", plan.round)


def commitment(plan: Plan, seed: bytes) -> bytes:
    """What is published of b_u: 256 random bits do not show through a hash."""
    return _masking.derive(seed, "commitment", plan.round)


def pair_key(plan: Plan, masks: X25519PrivateKey, member: int, other: Advert) -> bytes:
    """Key s_uv of a pair's mask, from one private key and the public one of ``member``."""
    return agreed(masks, member, other.mask_key, "pairwise mask", plan.round)


def agreed(private: X25519PrivateKey, member: int, public: bytes, *purpose: object) -> bytes:
    """The key that ``private`` and the public key of ``member`` agree on.

    Raises:
        ProtocolError: If the public key is none, or of low order.
    """
    try:
        return _masking.agree(private, public, *purpose)
    except ValueError:
        raise ProtocolError(
            f"The public key of client {member} is none, or of low order: everybody would agree "
            "with it on one known secret."
        ) from None


def advert_text(plan: Plan, client: int, advert: Advert) -> bytes:
    """What the signature of an advert is about."""
    return plan.text("keys", client, *(p.hex() for p in (*advert.keys, advert.commitment)))


def letter_text(plan: Plan, sender: int, receiver: int) -> bytes:
    """What the seal of a letter is about."""
    return plan.text("shares", sender, receiver)
