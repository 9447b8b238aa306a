"""A client's side of the protocol: everything secret stays in here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from cryptography.exceptions import InvalidSignature, InvalidTag
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from leakatlas.defenses.formal.crypto.secure_aggregation import _masking, _shamir
from leakatlas.defenses.formal.crypto.secure_aggregation._masking import Entropy, Ring, Words
from leakatlas.defenses.formal.crypto.secure_aggregation._quantization import Header
from leakatlas.errors import ProtocolError

_SHARE = 66
"""Bytes of a field element."""


@dataclass(frozen=True)
class Advert:
    """What a client publishes: X25519 public keys for letters and for masks, and a signature."""

    letter_key: bytes
    mask_key: bytes
    signature: bytes = b""


@dataclass(frozen=True)
class Plan:
    """What all members of a round agree on.

    Args:
        round: Round number; enters every key, so that nothing is reused.
        cohort: Members, sorted.
        threshold: t.
        ring: Of the masked vectors.
        directory: Ed25519 public keys by client, from outside the server; empty if the protocol
            runs unsigned.
    """

    round: int
    cohort: tuple[int, ...]
    threshold: int
    ring: Ring
    directory: Mapping[int, bytes]

    def point(self, client: int) -> int:
        """Where this client's shares are evaluated."""
        return self.cohort.index(client) + 1


@dataclass(frozen=True)
class Revealed:
    """A survivor's answer: shares of self-mask seeds of survivors, of mask keys of the others."""

    seeds: Mapping[int, int]
    keys: Mapping[int, int]


class Device:
    """One client in one round.

    Args:
        client: Its id.
        plan: The round.
        root: 32 secret bytes from which its keys are made.
        identity: Its long-lived signing key, in the signed protocol.
    """

    def __init__(
        self, client: int, plan: Plan, root: bytes, identity: Ed25519PrivateKey | None
    ) -> None:
        self.client = client
        self.plan = plan
        self.header: Header | None = None
        self._entropy = Entropy(root)
        self._letters = X25519PrivateKey.from_private_bytes(self._entropy.take(_masking.KEY))
        self._mask_secret = self._entropy.take(_masking.KEY)
        self._masks = X25519PrivateKey.from_private_bytes(self._mask_secret)
        self._seed = self._entropy.take(_masking.KEY)
        self._identity = identity
        self._adverts: Mapping[int, Advert] = {}
        self._held: dict[int, tuple[int, int]] = {}
        self._answered: tuple[int, ...] | None = None

    # -- step 1: advertise ---------------------------------------------------------------------

    def advertise(self) -> Advert:
        """Publish the two public keys, signed in the signed protocol."""
        letter_key = self._letters.public_key().public_bytes_raw()
        mask_key = self._masks.public_key().public_bytes_raw()
        about = _advert_text(self.plan, self.client, letter_key, mask_key)
        return Advert(letter_key, mask_key, self._identity.sign(about) if self._identity else b"")

    # -- step 2: share -------------------------------------------------------------------------

    def share(self, adverts: Mapping[int, Advert]) -> dict[int, bytes]:
        """Sealed shares of the self-mask seed and of the mask key, one letter per other member.

        Raises:
            ProtocolError: If an advert is missing, or is not signed by whom it names.
        """
        for member in self.plan.cohort:
            if member not in adverts:
                raise ProtocolError(f"Client {self.client}: no keys of client {member} arrived.")
            if self._identity is not None:
                advert = adverts[member]
                about = _advert_text(self.plan, member, advert.letter_key, advert.mask_key)
                self._verify(member, advert.signature, about, "keys")
        self._adverts = adverts
        points = [self.plan.point(member) for member in self.plan.cohort]
        seeds, keys = (
            _shamir.share(
                int.from_bytes(secret, "big"), self.plan.threshold, points, self._entropy.below
            )
            for secret in (self._seed, self._mask_secret)
        )
        letters = {}
        for member in self.plan.cohort:
            mine = (seeds[self.plan.point(member)], keys[self.plan.point(member)])
            if member == self.client:
                self._held[member] = mine
                continue
            content = b"".join(value.to_bytes(_SHARE, "big") for value in mine)
            letters[member] = _masking.seal(
                self._letter_key(member),
                self._entropy.take(_masking.NONCE),
                content,
                _letter_text(self.plan, self.client, member),
            )
        return letters

    def receive(self, sender: int, letter: bytes) -> None:
        """Open and keep another member's shares.

        Raises:
            ProtocolError: If the letter was damaged or is not from ``sender``.
        """
        about = _letter_text(self.plan, sender, self.client)
        try:
            content = _masking.unseal(self._letter_key(sender), letter, about)
        except InvalidTag:
            raise ProtocolError(
                f"Client {self.client}: the shares from client {sender} were changed on the way."
            ) from None
        self._held[sender] = (
            int.from_bytes(content[:_SHARE], "big"),
            int.from_bytes(content[_SHARE:], "big"),
        )

    # -- step 3: masked input ------------------------------------------------------------------

    def mask(self, size: int) -> Words:
        """The sum of this client's masks: PRG(b_u) + sum over v of ±PRG(s_uv)."""
        ring = self.plan.ring
        total = _masking.expand(self._own_key(), size, ring).copy()
        for member in self.plan.cohort:
            if member != self.client:
                pairwise = _masking.expand(self._pair_key(member), size, ring)
                if _masking.sign(self.client, member) > 0:
                    total += pairwise
                else:
                    total -= pairwise
        return total

    def send(self, words: Words, header: Header) -> Words:
        """y_u = x_u + masks. The input is not kept."""
        self.header = header
        masked: Words = words + self.mask(len(words))
        return masked

    # -- step 4: unmask ------------------------------------------------------------------------

    def confirm(self, survivors: Sequence[int]) -> bytes:
        """Sign the list of survivors that the server shows (signed protocol)."""
        if self._identity is None:
            return b""
        return self._identity.sign(_survivors_text(self.plan, survivors))

    def reveal(self, survivors: Sequence[int], confirmations: Mapping[int, bytes]) -> Revealed:
        """Shares of seeds of survivors and of mask keys of the others, never both of anyone.

        Raises:
            ProtocolError: If the list is too short, differs from an earlier one, or, in the
                signed protocol, was not confirmed by t survivors.
        """
        listed = tuple(sorted(set(survivors)))
        if len(listed) < self.plan.threshold or not set(listed) <= set(self.plan.cohort):
            raise ProtocolError(
                f"Client {self.client} opens no sum over {len(listed)} clients; it takes at "
                f"least {self.plan.threshold} of its cohort of {len(self.plan.cohort)}."
            )
        if self._answered not in (None, listed):
            raise ProtocolError(
                f"Client {self.client} was asked to open round {self.plan.round} for a second "
                "list of survivors, which would give both secrets of a client away."
            )
        if self._identity is not None:
            about = _survivors_text(self.plan, listed)
            signers = [m for m in confirmations if m in listed]
            if len(signers) < self.plan.threshold:
                raise ProtocolError(
                    f"Client {self.client}: {len(signers)} survivors confirmed the list, "
                    f"expected at least {self.plan.threshold}."
                )
            for member in signers:
                self._verify(member, confirmations[member], about, "list of survivors")
        self._answered = listed
        gone = [m for m in self.plan.cohort if m not in listed]
        return Revealed(
            {member: self._held[member][0] for member in listed},
            {member: self._held[member][1] for member in gone},
        )

    # -- keys ----------------------------------------------------------------------------------

    def _letter_key(self, member: int) -> bytes:
        public = self._adverts[member].letter_key
        return _masking.agree(self._letters, public, "letter", self.plan.round)

    def _pair_key(self, member: int) -> bytes:
        return pair_key(self.plan, self._masks, self._adverts[member])

    def _own_key(self) -> bytes:
        return self_key(self.plan, self._seed)

    def _verify(self, member: int, signature: bytes, about: bytes, what: str) -> None:
        public = Ed25519PublicKey.from_public_bytes(self.plan.directory[member])
        try:
            public.verify(signature, about)
        except InvalidSignature:
            raise ProtocolError(
                f"Client {self.client}: the {what} of client {member} do not carry its signature; "
                "somebody in between changed them."
            ) from None


def self_key(plan: Plan, seed: bytes) -> bytes:
    """Key of a client's own mask, from b_u."""
    return _masking.derive(seed, "self mask", plan.round)


def pair_key(plan: Plan, masks: X25519PrivateKey, other: Advert) -> bytes:
    """Key s_uv of a pair's mask, from one private and the other public key."""
    return _masking.agree(masks, other.mask_key, "pairwise mask", plan.round)


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
                pair_key(plan, key, adverts[survivor]), len(clear), plan.ring
            )
            if _masking.sign(survivor, gone) > 0:
                clear -= pairwise
            else:
                clear += pairwise
    return clear


def _advert_text(plan: Plan, client: int, letter_key: bytes, mask_key: bytes) -> bytes:
    return f"keys|{plan.round}|{client}|".encode() + letter_key + mask_key


def _letter_text(plan: Plan, sender: int, receiver: int) -> bytes:
    return f"shares|{plan.round}|{sender}|{receiver}".encode()


def _survivors_text(plan: Plan, survivors: Sequence[int]) -> bytes:
    return f"survivors|{plan.round}|{sorted(survivors)}".encode()
