"""Keys and masks on standard primitives, against published vectors and plain algebra."""

from __future__ import annotations

import numpy as np
import pytest
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from leakatlas.defenses.formal.crypto.secure_aggregation._masking import (
    Entropy,
    Ring,
    agree,
    derive,
    expand,
    seal,
    sign,
    unseal,
)


def test_expansion_is_the_chacha20_keystream() -> None:
    # RFC 8439, appendix A.1, test vector 1: key, counter and nonce all zero.
    vector = bytes.fromhex("76b8e0ada0f13d90405d6ae55386bd28bdd219b8a08ded1aa836efcc8b770dc7")
    for bits in (32, 64):
        words = expand(bytes(32), 256 // bits, Ring(bits))
        assert words.tobytes() == vector
        assert words.dtype.itemsize * 8 == bits


def test_both_sides_agree_for_one_purpose_and_round_only() -> None:
    one, two = X25519PrivateKey.generate(), X25519PrivateKey.generate()
    publics = [key.public_key().public_bytes_raw() for key in (one, two)]
    assert agree(one, publics[1], "mask", 0) == agree(two, publics[0], "mask", 0)
    keys = {agree(one, publics[1], *p) for p in (("mask", 0), ("mask", 1), ("letter", 0))}
    assert len(keys) == 3


def test_masks_of_a_pair_cancel_in_the_ring() -> None:
    for bits in (32, 64):
        mask = expand(b"k" * 32, 1000, Ring(bits))
        total = np.zeros_like(mask)
        for own, other in ((3, 8), (8, 3)):
            total = total + mask if sign(own, other) > 0 else total - mask
        assert not total.any()
        assert len(np.unique(mask)) > 990


def test_letters_open_only_unchanged_and_in_their_place() -> None:
    key, nonce = derive(b"secret", "letter"), bytes(12)
    letter = seal(key, nonce, b"two shares", b"from 1 to 2")
    assert unseal(key, letter, b"from 1 to 2") == b"two shares"
    assert b"two shares" not in letter
    changed = letter[:-1] + bytes([letter[-1] ^ 1])
    for content, about, opener in (
        (changed, b"from 1 to 2", key),
        (letter, b"from 1 to 3", key),
        (letter, b"from 1 to 2", derive(b"other", "letter")),
    ):
        with pytest.raises(InvalidTag):
            unseal(opener, content, about)


def test_entropy_is_uniform_below_the_bound() -> None:
    entropy = Entropy(b"r" * 32)
    counts = np.bincount([entropy.below(5) for _ in range(5000)], minlength=5)
    assert counts.sum() == 5000 and len(counts) == 5
    assert np.abs(counts - 1000).max() < 150  # five deviations
    assert entropy.take(16) != entropy.take(16)
