r"""Vectors under CKKS, as TenSEAL has it: encrypted in parts, added, opened.

Cheon, Kim, Kim and Song, "Homomorphic Encryption for Arithmetic of Approximate Numbers",
ASIACRYPT 2017.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from leakatlas.errors import InvalidParameter, Unavailable
from leakatlas.params import Configured, Positive, PositiveInt

_SIGMA = 3.2  # standard deviation of the errors, in SEAL as in the standard


@dataclass(frozen=True, kw_only=True)
class Ring(Configured):
    """Parameters of CKKS; the moduli and the degree decide security, the scale precision.

    Args:
        degree: Of the polynomials, N, a power of two; N/2 numbers fit a ciphertext.
        moduli: Bits of the primes of the modulus; the last one serves keys alone.
        scale_bits: Numbers are multiplied by two to this power before they are rounded.
    """

    degree: PositiveInt = 8192
    moduli: tuple[PositiveInt, ...] = (60, 40, 40, 60)
    scale_bits: Positive = 40

    @property
    def slots(self) -> int:
        """Numbers in a ciphertext."""
        return self.degree // 2

    @property
    def largest(self) -> float:
        """No number that is added up may exceed this, or it wraps around."""
        return float(2.0 ** (sum(self.moduli[:-1]) - 1 - self.scale_bits))

    def error_bound(self, ciphertexts: int) -> float:
        r"""How far a sum of fresh ciphertexts may be off, in any entry.

        Lemma 1 of the paper for each, and ternary keys, of which :math:`h = 2N/3` entries are not
        zero on average: :math:`8\sqrt 2 \sigma N + 6 \sigma \sqrt N + 16 \sigma \sqrt{h N}`, over
        the scale; and half a unit for each rounded coefficient.
        """
        N = float(self.degree)
        fresh = _SIGMA * (8 * 2**0.5 * N + 6 * N**0.5 + 16 * (2 / 3 * N * N) ** 0.5)
        return float(ciphertexts * (fresh + N / 2) / 2.0**self.scale_bits)


class Key:
    """What a client holds: it encrypts and opens.

    Args:
        ring: The parameters.

    Raises:
        Unavailable: If TenSEAL is not installed.
        InvalidParameter: If SEAL finds the parameters insecure or impossible.
    """

    def __init__(self, ring: Ring) -> None:
        tenseal = _tenseal()
        self.ring = ring
        try:
            self.context = tenseal.context(
                tenseal.SCHEME_TYPE.CKKS, ring.degree, coeff_mod_bit_sizes=list(ring.moduli),
                n_threads=1,
            )  # fmt: skip
        except (ValueError, RuntimeError) as problem:
            raise InvalidParameter(
                f"CKKS with degree {ring.degree} and moduli {ring.moduli}: {problem}. Their bits "
                "may sum to 109 for degree 4096, 218 for 8192, 438 for 16384 (128-bit security)."
            ) from None
        self.context.global_scale = 2.0**ring.scale_bits

    def public(self) -> bytes:
        """What a server gets to add ciphertexts, and nothing that opens one."""
        made: bytes = self.context.serialize(
            save_secret_key=False, save_galois_keys=False, save_relin_keys=False
        )
        return made

    def secret(self) -> bytes:
        """Everything, the secret key among it."""
        made: bytes = self.context.serialize(save_secret_key=True)
        return made

    def encrypt(self, values: Tensor) -> list[bytes]:
        """Ciphertexts of ``(D,)`` numbers, N/2 in each; no two encryptions are alike.

        Raises:
            InvalidParameter: If a number is too large for the modulus.
        """
        if len(values) and float(values.abs().max()) >= self.ring.largest:
            raise InvalidParameter(
                f"A value of {float(values.abs().max()):.3g} does not fit: below "
                f"{self.ring.largest:.3g} with moduli {self.ring.moduli} and a scale of "
                f"2^{self.ring.scale_bits:g}."
            )
        tenseal = _tenseal()
        parts = values.double().split(self.ring.slots)
        return [tenseal.ckks_vector(self.context, part.tolist()).serialize() for part in parts]

    def open(self, ciphertexts: Sequence[bytes]) -> Tensor:
        """The numbers ``(D,)`` float64 behind them, but for the noise."""
        tenseal = _tenseal()
        return torch.tensor(
            [
                value
                for ciphertext in ciphertexts
                for value in tenseal.ckks_vector_from(self.context, ciphertext).decrypt()
            ],
            dtype=torch.float64,
        )


class Adder:
    """What a server holds: it adds what it cannot read.

    Args:
        public: From :meth:`Key.public`.
    """

    def __init__(self, public: bytes) -> None:
        self.context: Any = _tenseal().context_from(public, n_threads=1)

    def add(self, uploads: Sequence[Sequence[bytes]]) -> list[bytes]:
        """Ciphertexts of the sum, part by part."""
        tenseal = _tenseal()
        total = []
        for parts in zip(*uploads, strict=True):
            vectors = [tenseal.ckks_vector_from(self.context, part) for part in parts]
            sum_ = vectors[0]
            for vector in vectors[1:]:
                sum_ += vector
            total.append(sum_.serialize())
        return total


def packed(ciphertexts: Sequence[bytes]) -> dict[str, Tensor]:
    """Ciphertexts as tensors: their bytes one behind the other, and their lengths."""
    return {
        "ciphertexts": torch.frombuffer(bytearray(b"".join(ciphertexts)), dtype=torch.uint8),
        "lengths": torch.tensor([len(c) for c in ciphertexts]),
    }


def unpacked(payload: dict[str, Tensor]) -> list[bytes]:
    """The inverse of :func:`packed`."""
    parts = payload["ciphertexts"].cpu().split(payload["lengths"].tolist())
    return [part.numpy().tobytes() for part in parts]


def _tenseal() -> Any:
    try:
        import tenseal
    except ModuleNotFoundError:
        raise Unavailable(
            "homomorphic_encryption needs TenSEAL, which is not installed: "
            "pip install 'leakatlas[he]'"
        ) from None
    return tenseal
