"""Keys, masks and sealed letters, on the primitives of ``cryptography``.

X25519 agrees a secret between two clients, HKDF-SHA256 turns it into a key for one purpose and
round, ChaCha20 expands a key into the mask of a whole update, ChaCha20-Poly1305 seals shares.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

Words = np.ndarray[tuple[int], np.dtype[Any]]
"""A vector of ring elements, as unsigned integers that wrap."""

KEY = 32
"""Bytes of every key and seed."""

NONCE = 12
"""Bytes of an AEAD nonce."""


@dataclass(frozen=True)
class Ring:
    """The integers modulo 2^bits: machine words, so that wrapping is the modulus."""

    bits: int

    @property
    def unsigned(self) -> np.dtype[Any]:
        """How elements are stored and added."""
        return np.dtype(f"<u{self.bits // 8}")

    @property
    def signed(self) -> np.dtype[Any]:
        """How a sum is read: the representative next to 0."""
        return np.dtype(f"<i{self.bits // 8}")


def derive(secret: bytes, *purpose: object) -> bytes:
    """A key for one purpose (HKDF-SHA256)."""
    info = "|".join(["leakatlas secure aggregation", *map(str, purpose)]).encode()
    return HKDF(algorithm=hashes.SHA256(), length=KEY, salt=None, info=info).derive(secret)


def agree(private: X25519PrivateKey, public: bytes, *purpose: object) -> bytes:
    """The key that only the owners of the two X25519 keys can compute.

    Raises:
        ValueError: If ``public`` is no key, or one of low order, with which everybody agrees on
            the same secret.
    """
    return derive(private.exchange(X25519PublicKey.from_public_bytes(public)), *purpose)


def public_of(private: bytes) -> bytes:
    """The X25519 public key of a private one."""
    return X25519PrivateKey.from_private_bytes(private).public_key().public_bytes_raw()


def expand(key: bytes, size: int, ring: Ring) -> Words:
    """PRG: ``size`` ring elements from a key that is used for nothing else (ChaCha20)."""
    keystream = _chacha20(key).update(bytes(size * ring.unsigned.itemsize))
    return np.frombuffer(keystream, dtype=ring.unsigned)


def sign(own: int, other: int) -> int:
    """+1 for the member of a pair with the smaller id, -1 for the other, so that masks cancel."""
    return 1 if other > own else -1


def seal(key: bytes, nonce: bytes, content: bytes, about: bytes) -> bytes:
    """Encrypt and authenticate; ``about`` is bound to it in the clear."""
    return nonce + ChaCha20Poly1305(key).encrypt(nonce, content, about)


def unseal(key: bytes, letter: bytes, about: bytes) -> bytes:
    """The content of :func:`seal`; raises ``InvalidTag`` if anything was changed."""
    return ChaCha20Poly1305(key).decrypt(letter[:NONCE], letter[NONCE:], about)


class Entropy:
    """A client's random bytes for one round: a ChaCha20 keystream from one root.

    Args:
        root: 32 secret bytes.
    """

    def __init__(self, root: bytes) -> None:
        self._stream = _chacha20(root)

    def take(self, count: int) -> bytes:
        """The next ``count`` bytes."""
        drawn: bytes = self._stream.update(b"\0" * count)
        return drawn

    def below(self, bound: int) -> int:
        """Uniform integer in [0, bound), by rejection."""
        bits = bound.bit_length()
        while True:
            drawn = int.from_bytes(self.take(-(-bits // 8)), "big") & ((1 << bits) - 1)
            if drawn < bound:
                return drawn


def _chacha20(key: bytes) -> Any:
    # The 16 bytes are block counter and nonce; both may be 0, since no key is used twice.
    return Cipher(algorithms.ChaCha20(key, bytes(16)), mode=None).encryptor()
