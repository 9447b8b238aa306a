"""Any t shares give the secret; fewer fit every secret equally well."""

from __future__ import annotations

from itertools import combinations

from hypothesis import given
from hypothesis import strategies as st

from leakatlas.defenses.formal.crypto.secure_aggregation import _shamir
from leakatlas.defenses.formal.crypto.secure_aggregation._masking import Entropy
from leakatlas.defenses.formal.crypto.secure_aggregation._shamir import PRIME

roots = st.binary(min_size=32, max_size=32)


@given(secret=st.integers(0, 2**256 - 1), root=roots, threshold=st.integers(1, 5))
def test_every_set_of_enough_shares_reconstructs(secret: int, root: bytes, threshold: int) -> None:
    shares = _shamir.share(secret, threshold, range(1, 6), Entropy(root).below)
    for size in range(threshold, 6):
        for chosen in combinations(shares, size):
            assert _shamir.reconstruct({p: shares[p] for p in chosen}) == secret


@given(secret=st.integers(0, 2**256 - 1), other=st.integers(0, 2**256 - 1), root=roots)
def test_too_few_shares_fit_any_other_secret(secret: int, other: int, root: bytes) -> None:
    shares = _shamir.share(secret, 3, range(1, 6), Entropy(root).below)
    # Two shares and any claimed secret lie on a polynomial of degree 2: take its value at 3 ...
    two = {1: shares[1], 2: shares[2]}
    at_zero = _shamir.lagrange_weights([1, 2, 3])
    rest = sum(at_zero[p] * v for p, v in two.items())
    third = (other - rest) * pow(at_zero[3], -1, PRIME) % PRIME
    # ... and the three together reconstruct that other secret.
    assert _shamir.reconstruct({**two, 3: third}) == other
    if secret:
        assert _shamir.reconstruct(two) != secret  # true but for one polynomial in 2^521


def test_shares_differ_from_the_secret_and_from_draw_to_draw() -> None:
    entropy = Entropy(bytes(32))
    one = _shamir.share(7, 3, range(1, 6), entropy.below)
    two = _shamir.share(7, 3, range(1, 6), entropy.below)
    assert not set(one.values()) & set(two.values())
    assert 7 not in one.values()
    assert set(_shamir.share(7, 1, range(1, 6), entropy.below).values()) == {7}
