"""Shamir's secret sharing over a prime field: any t of n shares give the secret, fewer nothing.

Shamir, "How to Share a Secret", CACM 1979. Written here because ``cryptography`` has none: the one
well-kept implementation (PyCryptodome) shares 16-byte secrets and would be a second cryptographic
package for the thirty lines below.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

PRIME = 2**521 - 1
"""A Mersenne prime; holds the 32-byte secrets of the protocol with room to spare."""

BYTES = 66
"""Bytes of a field element."""


def share(
    secret: int, threshold: int, points: Sequence[int], below: Callable[[int], int]
) -> dict[int, int]:
    """A random polynomial of degree ``threshold - 1`` through ``(0, secret)``, at ``points``.

    Args:
        secret: In [0, PRIME).
        threshold: Shares that reconstruct it.
        points: Distinct and non-zero.
        below: Uniform random integers below a bound.
    """
    coefficients = [secret] + [below(PRIME) for _ in range(threshold - 1)]
    return {point: _evaluate(coefficients, point) for point in points}


def reconstruct(shares: Mapping[int, int], weights: Mapping[int, int] | None = None) -> int:
    """The secret behind shares by point; some other number if there are too few.

    Args:
        shares: ``{point: value}``.
        weights: :func:`lagrange_weights` of exactly these points, if computed before.
    """
    weights = lagrange_weights(list(shares)) if weights is None else weights
    return sum(weights[point] * value for point, value in shares.items()) % PRIME


def lagrange_weights(points: Sequence[int]) -> dict[int, int]:
    """The weight of each point's value in the interpolation at 0."""
    weights = {}
    for point in points:
        above, below = 1, 1
        for other in points:
            if other != point:
                above = above * -other % PRIME
                below = below * (point - other) % PRIME
        weights[point] = above * pow(below, -1, PRIME) % PRIME
    return weights


def _evaluate(coefficients: Sequence[int], point: int) -> int:
    value = 0
    for coefficient in reversed(coefficients):
        value = (value * point + coefficient) % PRIME
    return value
