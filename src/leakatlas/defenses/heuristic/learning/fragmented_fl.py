r"""Fragmented federated learning: pairs of clients swap encrypted fragments of their updates.

Jebreel, Domingo-Ferrer, Blanco-Justicia and Sánchez, "Enhanced Security and Privacy via Fragmented
Federated Learning", IEEE TNNLS 2022.

The server pairs the clients; a pair (k, j) agrees on a secret mask m over coordinates, and each
sends the other what lies under it, encrypted, through the server. What they upload is mixed:

.. math:: w_k' = (1 - m) \odot w_k + m \odot w_j, \qquad w_j' = (1 - m) \odot w_j + m \odot w_k .

The server scores what it received, :math:`d` being how far the norm of an update is from the
median norm (over the largest such distance) and c the cosine of its last layer to the median one,

.. math:: s_k = 0.2 \, (1 - d_k) + 0.8 \, (c_k + 1)/2, \qquad s_k \leftarrow s_k - Q_1(s),

and adds the score to the reputation of both. It takes the coordinate-wise median in the first 20
rounds, and then the mean with weights :math:`\tanh(\rho_k - Q_1(\rho))_+`. A client swaps with
partners whose reputation, in its own book, is in the upper three quarters.

What an adversary does about it: it adds the two messages of a pair. :math:`w_k' + w_j' = w_k + w_j`
coordinate by coordinate, so that all that hides a client is one other client: any attack on the sum
of two goes on as if nothing were swapped (:func:`unmixed`). A partner that colludes opens the rest.
And the server sees, for every coordinate, which two values there are.

Keys are agreed by X25519, masks are ChaCha20 keystreams, fragments are sealed with
ChaCha20-Poly1305: the server relays letters that it cannot open.

Departures:
    * The released mask swaps 30.9 % of the coordinates (a normal draw above 0.5); here the share is
      the knob. Released pads are floats, added and taken off again in one process, which rounds;
      here letters are encrypted, and what comes out is the partner's value bit for bit.
    * With an odd number of clients the last three swap in a ring; released code lets one drop out.
    * Who finds no partner of good reputation swaps with whoever is left, rather than with nobody.
    * Clients of a group count with the mean of their examples: else the weighted mean would not be
      that of the unmixed updates.
    * Floating-point buffers are swapped like parameters.
    * The median of an even number is the mean of the two in the middle; where the release scores,
      it takes the lower one.
    * Whom the server selects is the scenario's affair.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar

import numpy as np
import torch
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from pydantic import Field
from torch import Tensor

from leakatlas.errors import ProtocolError
from leakatlas.fl import (
    ActsOn,
    Defense,
    Memory,
    Message,
    RoundSetup,
    ServerContext,
    Trait,
    Update,
    average,
)
from leakatlas.params import NonNegativeInt

KEY = 32
"""Bytes of every key."""

Letters = dict[tuple[int, int], tuple[bytes, ...]]
"""What the server relays, by sender and receiver."""


@dataclass(frozen=True, kw_only=True)
class FragmentedFL(Defense):
    """Mixes the updates of pairs of clients, and combines what arrives by reputation.

    Args:
        density: Share of the coordinates that a pair swaps; 0 swaps nothing and takes the plain
            mean.
        robust: Whether the server combines by median and reputation, or by the plain mean.
        median_rounds: Rounds in which it takes the median.
    """

    key: ClassVar[str] = "fragmented_fl"
    knob: ClassVar[str] = "density"
    neutral: ClassVar[float] = 0.0
    strengths: ClassVar[tuple[float, ...]] = (0.1, 0.309, 0.5)
    stage: ClassVar[int] = 80
    modes: ClassVar[frozenset[ActsOn]] = frozenset({ActsOn.PER_UPDATE})

    density: Annotated[float, Field(ge=0, le=0.5)] = 0.5
    robust: bool = True
    median_rounds: NonNegativeInt = 20

    def active_traits(self) -> frozenset[Trait]:
        """Scores are computed from updates that the server reads."""
        reads = self.robust and self.density > 0
        return frozenset({Trait.READS_UPDATES}) if reads else frozenset()

    # -- between clients -----------------------------------------------------------------------

    def peer(self, updates: Mapping[int, Update], setup: RoundSetup) -> Mapping[int, Update]:
        """What every client uploads after the swap.

        Raises:
            ProtocolError: If there is nobody to swap with.
        """
        if self.density == 0:
            return updates
        if len(updates) < 2:
            raise ProtocolError(
                f"fragmented_fl swaps fragments between clients, and round {setup.round} has "
                "one; take part with two clients or more."
            )
        _remember(setup)
        groups = partners(sorted(updates), setup.clients, setup.generator)
        setup.server["groups"], setup.server["letters"] = groups, {}
        mixed = dict(updates)
        for group in groups:
            exchange = Exchange(group, self.density, setup)
            mixed.update(exchange.mixed({member: updates[member] for member in group}))
            setup.server["letters"].update(exchange.letters)
        return mixed

    def secrets(self, memory: Memory) -> dict[str, Tensor]:
        """Where this client's upload is its partner's."""
        return {f"mask/{name}": mask for name, mask in memory.get("mask", {}).items()}

    # -- on the server -------------------------------------------------------------------------

    def aggregate(
        self,
        messages: Mapping[int, Message],
        combine: Callable[[Mapping[int, Message]], Update],
        context: ServerContext,
    ) -> Update:
        """The median, or the mean by reputation."""
        updates = {c: m.update for c, m in messages.items() if m.update is not None}
        if Trait.READS_UPDATES not in self.active_traits() or len(updates) < len(messages):
            return combine(messages)
        told = scores({c: u.tensors for c, u in updates.items()})
        book: dict[int, float] = context.server.setdefault("reputation", {})
        for group in context.server["groups"]:
            # A mixture is as much one client's as the other's: both are credited with both.
            total = sum(told.get(member, 0.0) for member in group)
            for member in group:
                book[member] = book.get(member, 0.0) + total
        context.server["told"] = told
        if context.round < self.median_rounds:
            return _median(updates, combine(messages))
        weights = trust({c: book[c] for c in updates}, list(book.values()))
        return average(updates, weights) if any(weights.values()) else combine(messages)


class Exchange:
    """One group's swap in one round, every step of it through the server.

    Args:
        group: Two members or more; each gets fragments of the next.
        density: Share of the coordinates.
        setup: The round.
    """

    def __init__(self, group: Sequence[int], density: float, setup: RoundSetup) -> None:
        self.group = tuple(group)
        self.density = density
        self.clients = setup.clients
        self.about = f"leakatlas fragmented fl|{setup.round}".encode()
        self.letters: Letters = {}
        draw = _entropy(setup)
        self._keys = {m: X25519PrivateKey.from_private_bytes(draw()) for m in self.group}
        self._public = {m: k.public_key().public_bytes_raw() for m, k in self._keys.items()}
        self._mask_key = draw()
        """Drawn by the first member, who sends it to the others."""

    def mixed(self, updates: Mapping[int, Update]) -> dict[int, Update]:
        """Uploads of the group, by member."""
        first = self.group[0]
        examples = sum(u.num_examples for u in updates.values())
        found: dict[int, Update] = {}
        for member, after in zip(self.group, (*self.group[1:], first), strict=True):
            own = updates[member]
            masks = coordinate_masks(own, self._known_to(member), self.density)
            fragment = self._sent(after, member, fragments(updates[after], masks))
            found[member] = replace(
                filled(own, masks, fragment),
                num_examples=max(1, round(examples / len(self.group))),
            )
            self.clients[member]["mask"] = {n: masks[n] for n in own.tensors}
        return found

    def _known_to(self, member: int) -> bytes:
        """The group's mask key, as it reaches a member."""
        first = self.group[0]
        return self._mask_key if member == first else self._sent(first, member, self._mask_key)

    def _sent(self, sender: int, receiver: int, content: bytes) -> bytes:
        """A letter, sealed by one, relayed by the server, and opened by the other."""
        earlier = self.letters.get((sender, receiver), ())
        # A key belongs to one direction and one round: its letters are numbered.
        nonce = len(earlier).to_bytes(12, "big")
        sealed = ChaCha20Poly1305(self._shared(sender, receiver, sender)).encrypt(
            nonce, content, self.about
        )
        self.letters[sender, receiver] = (*earlier, sealed)
        return ChaCha20Poly1305(self._shared(receiver, sender, sender)).decrypt(
            nonce, sealed, self.about
        )

    def _shared(self, own: int, other: int, sender: int) -> bytes:
        """The key that two members agree on, for what one of them sends."""
        secret = self._keys[own].exchange(X25519PublicKey.from_public_bytes(self._public[other]))
        info = self.about + f"|{sender}|{sorted((own, other))}".encode()
        return HKDF(algorithm=hashes.SHA256(), length=KEY, salt=None, info=info).derive(secret)


def partners(
    members: Sequence[int], memories: Mapping[int, Memory], generator: torch.Generator
) -> list[tuple[int, ...]]:
    """Pairs who accept each other, as far as there are any; an odd number ends in a group of three.

    Args:
        members: At least two.
        memories: Each with its ``book`` of other clients' reputations.
        generator: Of the server's order.
    """
    order = torch.randperm(len(members), generator=generator).tolist()
    left = [members[i] for i in order]
    groups: list[tuple[int, ...]] = []
    while len(left) > 3:
        k = left.pop(0)
        willing = [j for j in left if _accepts(memories[k], j) and _accepts(memories[j], k)]
        j = (willing or left)[0]
        left.remove(j)
        groups.append((k, j))
    return [*groups, tuple(left)]


def _accepts(memory: Memory, other: int) -> bool:
    """Whether a partner's reputation is in the upper three quarters of a client's book."""
    book: dict[int, float] = memory.get("book", {})
    if not book:
        return True
    return book.get(other, 0.0) >= float(np.quantile(list(book.values()), 0.25))


def _remember(setup: RoundSetup) -> None:
    """Clients note how the server scored their last swap."""
    told: dict[int, float] = setup.server.pop("told", {})
    for group in setup.server.get("groups", ()):
        for member in group:
            book = setup.clients[member].setdefault("book", {}) if member in setup.clients else {}
            for other in group:
                if other != member:
                    book[other] = book.get(other, 0.0) + told.get(member, 0.0)


def _entropy(setup: RoundSetup) -> Callable[[], bytes]:
    """Fresh keys: from the operating system, and in a simulation from its seed."""
    if not setup.simulated:
        return lambda: os.urandom(KEY)
    return lambda: bytes(torch.randint(256, (KEY,), generator=setup.generator).tolist())


# -- fragments -----------------------------------------------------------------------------------


def _parts(update: Update) -> dict[str, Tensor]:
    """What is swapped: parameters, and buffers that are no counters."""
    moved = {n: b for n, b in update.buffers_after.items() if b.is_floating_point()}
    return {**update.tensors, **moved}


def coordinate_masks(update: Update, key: bytes, density: float) -> dict[str, Tensor]:
    """Which coordinates are swapped, from a key that is used for nothing else."""
    stream: Any = Cipher(algorithms.ChaCha20(key, bytes(16)), mode=None).encryptor()
    masks = {}
    for name, tensor in _parts(update).items():
        words = np.frombuffer(stream.update(bytes(4 * tensor.numel())), dtype="<u4")
        chosen = torch.from_numpy(words < round(density * 2**32))
        masks[name] = chosen.reshape(tensor.shape).to(tensor.device)
    return masks


def fragments(update: Update, masks: Mapping[str, Tensor]) -> bytes:
    """The values under the masks, one tensor after the other."""
    return b"".join(
        t.detach()[masks[n]].contiguous().view(torch.uint8).cpu().numpy().tobytes()
        for n, t in _parts(update).items()
    )


def filled(update: Update, masks: Mapping[str, Tensor], fragment: bytes) -> Update:
    """An update whose values under the masks are those of a fragment."""
    made, start = {}, 0
    for name, tensor in _parts(update).items():
        size = int(masks[name].sum()) * tensor.element_size()
        part = bytearray(fragment[start : start + size])
        start += size
        values = tensor.detach().clone()
        if part:
            values[masks[name]] = torch.frombuffer(part, dtype=tensor.dtype).to(tensor.device)
        made[name] = values
    return replace(
        update,
        tensors={n: made[n] for n in update.tensors},
        buffers_after={n: made.get(n, b) for n, b in update.buffers_after.items()},
    )


def unmixed(mixed: Mapping[int, Update]) -> dict[str, Tensor]:
    """The bypass: the sum over a group, which no swap has changed.

    Args:
        mixed: Uploads of all its members.
    """
    first = next(iter(mixed.values()))
    return {n: torch.stack([u.tensors[n] for u in mixed.values()]).sum(0) for n in first.tensors}


# -- what the server makes of it -----------------------------------------------------------------


def scores(updates: Mapping[int, Mapping[str, Tensor]]) -> dict[int, float]:
    """How much every update is like the others, less the first quartile."""
    flat = {c: torch.cat([t.flatten().double() for t in u.values()]) for c, u in updates.items()}
    norms = torch.stack([v.norm() for v in flat.values()])
    away = (norms - _middle(norms)).abs()
    away = away / away.max().clamp(min=torch.finfo(away.dtype).tiny)
    last = torch.stack([_last_layer(u) for u in updates.values()])
    cosines = torch.nn.functional.cosine_similarity(last, _middle(last)[None])
    found = 0.2 * (1 - away) + 0.8 * (cosines + 1) / 2
    found = found - found.quantile(0.25)
    return dict(zip(updates, found.tolist(), strict=True))


def _last_layer(tensors: Mapping[str, Tensor]) -> Tensor:
    """Weight and bias of the last layer, as one float64 vector."""
    last = list(tensors)[-1].rpartition(".")[0]
    return torch.cat(
        [t.flatten().double() for n, t in tensors.items() if n.rpartition(".")[0] == last]
    )


def trust(reputations: Mapping[int, float], known: Sequence[float]) -> dict[int, float]:
    """Weights ``tanh(reputation - Q1)``, at least 0."""
    quartile = float(np.quantile(list(known), 0.25))
    return {c: max(0.0, float(np.tanh(r - quartile))) for c, r in reputations.items()}


def _median(updates: Mapping[int, Update], like: Update) -> Update:
    """The coordinate-wise median of tensors and buffers."""

    def middle(parts: Sequence[Tensor]) -> Tensor:
        return _middle(torch.stack(list(parts)))

    return replace(
        like,
        tensors={n: middle([u.tensors[n] for u in updates.values()]) for n in like.tensors},
        buffers_after={
            n: middle([u.buffers_after[n] for u in updates.values()])
            if b.is_floating_point()
            else b
            for n, b in like.buffers_after.items()
        },
    )


def _middle(stacked: Tensor) -> Tensor:
    """The median along dimension 0, the mean of the two in the middle; of tensors of any size."""
    ranked = stacked.sort(0).values
    n = len(ranked)
    return (ranked[(n - 1) // 2] + ranked[n // 2]) / 2
