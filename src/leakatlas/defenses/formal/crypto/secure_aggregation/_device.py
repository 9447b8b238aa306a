"""A client's side of the protocol: everything secret stays in here."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace

from cryptography.exceptions import InvalidSignature, InvalidTag
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from leakatlas.defenses.formal.crypto._header import Header
from leakatlas.defenses.formal.crypto.secure_aggregation import _masking, _shamir
from leakatlas.defenses.formal.crypto.secure_aggregation._masking import Entropy, Words
from leakatlas.defenses.formal.crypto.secure_aggregation._plan import (
    Advert,
    Plan,
    Revealed,
    Terms,
    advert_text,
    agreed,
    commitment,
    letter_text,
    pair_key,
    self_key,
)
from leakatlas.errors import ProtocolError


class Device:
    """One client in one round.

    Args:
        client: Its id.
        plan: The round.
        root: 32 secret bytes from which its keys are made.
        identity: Its long-lived signing key, in the signed protocol.
        terms: What it insists on.

    Raises:
        ProtocolError: If the plan falls short of the terms, or lists a key twice.
    """

    def __init__(
        self,
        client: int,
        plan: Plan,
        root: bytes,
        identity: Ed25519PrivateKey | None,
        terms: Terms,
    ) -> None:
        members = len(plan.cohort)
        least = terms.least_threshold(members)
        if members < terms.least_cohort or plan.threshold < least:
            raise ProtocolError(
                f"Client {client} joins no cohort of {members} with threshold {plan.threshold}; "
                f"it takes at least {terms.least_cohort} members (least_cohort) and, among "
                f"{members}, a threshold of {least}."
            )
        if client not in plan.cohort or len(set(plan.cohort)) < members:
            raise ProtocolError(f"Client {client} is not one of the cohort {list(plan.cohort)}.")
        if len(set(plan.directory.values())) < len(plan.directory):
            raise ProtocolError(f"Client {client}: two members have the same signing key.")
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
        self._listed: tuple[int, ...] | None = None

    # -- step 1: advertise ---------------------------------------------------------------------

    def advertise(self) -> Advert:
        """Publish the two public keys, signed in the signed protocol."""
        advert = Advert(
            self._letters.public_key().public_bytes_raw(),
            self._masks.public_key().public_bytes_raw(),
            commitment(self.plan, self._seed),
        )
        if self._identity is None:
            return advert
        about = advert_text(self.plan, self.client, advert)
        return replace(advert, signature=self._identity.sign(about))

    # -- step 2: share -------------------------------------------------------------------------

    def share(self, adverts: Mapping[int, Advert]) -> dict[int, bytes]:
        """Sealed shares of the self-mask seed and of the mask key, one letter per other member.

        Raises:
            ProtocolError: If an advert is missing, is not signed by whom it names, or repeats the
                key of another one; or if shares were dealt before.
        """
        if self._adverts:
            raise ProtocolError(f"Client {self.client} deals its shares once a round.")
        for member in self.plan.cohort:
            if member not in adverts:
                raise ProtocolError(f"Client {self.client}: no keys of client {member} arrived.")
            if self._identity is not None:
                advert = adverts[member]
                about = advert_text(self.plan, member, advert)
                self._verify(member, advert.signature, about, "keys")
        keys = [key for member in self.plan.cohort for key in adverts[member].keys]
        if len(set(keys)) < len(keys):
            raise ProtocolError(
                f"Client {self.client}: the same public key was shown twice, so somebody stands "
                "in for another member."
            )
        # A copy: what is shown later changes nothing.
        self._adverts = {member: adverts[member] for member in self.plan.cohort}
        points = [self.plan.point(member) for member in self.plan.cohort]
        seeds, masks = (
            _shamir.share(
                int.from_bytes(secret, "big"), self.plan.threshold, points, self._entropy.below
            )
            for secret in (self._seed, self._mask_secret)
        )
        letters = {}
        for member in self.plan.cohort:
            mine = (seeds[self.plan.point(member)], masks[self.plan.point(member)])
            if member == self.client:
                self._held[member] = mine
                continue
            content = b"".join(value.to_bytes(_shamir.BYTES, "big") for value in mine)
            letters[member] = _masking.seal(
                self._letter_key(member),
                self._entropy.take(_masking.NONCE),
                content,
                letter_text(self.plan, self.client, member),
            )
        return letters

    def receive(self, sender: int, letter: bytes) -> None:
        """Open and keep another member's shares.

        Raises:
            ProtocolError: If the letter was damaged or is not from ``sender``.
        """
        if sender not in self._adverts:
            raise ProtocolError(f"Client {self.client}: client {sender} is not of this round.")
        about = letter_text(self.plan, sender, self.client)
        try:
            content = _masking.unseal(self._letter_key(sender), letter, about)
        except InvalidTag:
            raise ProtocolError(
                f"Client {self.client}: the shares from client {sender} were changed on the way."
            ) from None
        if len(content) != 2 * _shamir.BYTES:
            raise ProtocolError(
                f"Client {self.client}: the letter from client {sender} holds no two shares."
            )
        self._held[sender] = (
            int.from_bytes(content[: _shamir.BYTES], "big"),
            int.from_bytes(content[_shamir.BYTES :], "big"),
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
        """y_u = x_u + masks. The input is not kept.

        Raises:
            ProtocolError: If it sent before: two vectors under one mask show their difference.
        """
        if self.header is not None:
            raise ProtocolError(f"Client {self.client} sends one masked input a round.")
        self.header = header
        masked: Words = words + self.mask(len(words))
        return masked

    # -- step 4: unmask ------------------------------------------------------------------------

    def confirm(self, survivors: Sequence[int]) -> bytes:
        """Sign the list of survivors that the server shows (signed protocol).

        Raises:
            ProtocolError: As for :meth:`reveal`.
        """
        listed = self._accept(survivors)
        return self._identity.sign(self._survivors_text(listed)) if self._identity else b""

    def reveal(self, survivors: Sequence[int], confirmations: Mapping[int, bytes]) -> Revealed:
        """Shares of seeds of survivors and of mask keys of the others, never both of anyone.

        Raises:
            ProtocolError: If the list is too short, leaves this client off, differs from the one
                that it saw before, or, in the signed protocol, was not confirmed by t survivors;
                or if shares never arrived.
        """
        listed = self._accept(survivors)
        if self._identity is not None:
            about = self._survivors_text(listed)
            signers = [m for m in confirmations if m in listed]
            if len(signers) < self.plan.threshold:
                raise ProtocolError(
                    f"Client {self.client}: {len(signers)} survivors confirmed the list, "
                    f"expected at least {self.plan.threshold}."
                )
            for member in signers:
                self._verify(member, confirmations[member], about, "list of survivors")
        missing = [m for m in self.plan.cohort if m not in self._held]
        if missing:
            raise ProtocolError(f"Client {self.client} never got shares from client {missing[0]}.")
        gone = [m for m in self.plan.cohort if m not in listed]
        return Revealed(
            {member: self._held[member][0] for member in listed},
            {member: self._held[member][1] for member in gone},
        )

    def _accept(self, survivors: Sequence[int]) -> tuple[int, ...]:
        """The one list of this round: what was confirmed or answered once stays."""
        listed = tuple(sorted(set(survivors)))
        if len(listed) < self.plan.threshold or not set(listed) <= set(self.plan.cohort):
            raise ProtocolError(
                f"Client {self.client} opens no sum over {len(listed)} clients; it takes at "
                f"least {self.plan.threshold} of its cohort of {len(self.plan.cohort)}."
            )
        if self.client not in listed:
            raise ProtocolError(
                f"Client {self.client} was left off the list of survivors that it is asked about."
            )
        if self._listed not in (None, listed):
            raise ProtocolError(
                f"Client {self.client} was asked about a second list of survivors in round "
                f"{self.plan.round}; two lists would give both secrets of a client away."
            )
        self._listed = listed
        return listed

    def _survivors_text(self, listed: tuple[int, ...]) -> bytes:
        """What a confirmation binds: the run, the keys of all members, and the list."""
        shown = hashlib.sha256()
        for member in self.plan.cohort:
            if member in self._adverts:
                shown.update(advert_text(self.plan, member, self._adverts[member]))
        return self.plan.text("survivors", shown.hexdigest(), list(listed))

    # -- keys ----------------------------------------------------------------------------------

    def _letter_key(self, member: int) -> bytes:
        public = self._adverts[member].letter_key
        return agreed(self._letters, member, public, "letter", self.plan.round)

    def _pair_key(self, member: int) -> bytes:
        return pair_key(self.plan, self._masks, member, self._adverts[member])

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
