r"""MANDRAKE: a secure sum over many clients read as many small batches, at a bearable model size.

Zhao, Sharma, Elkordy, Ezzeldin, Avestimehr and Bagchi, "The Resource Problem of Using Linear Layer
Leakage Attack in Federated Learning", CVPR 2023. One local step, one round, aggregate vantage.
Letter G: a different model for each client, and public images for the quantiles of brightness.

An imprint layer for the sum over N clients needs as many units as there are images in all of it.
MANDRAKE keeps the number of units and gives every client columns of its own:

1. A convolution with C kernels per client stands in front. In client j's copy only kernels
   jC ... jC + C - 1 are non-zero; they copy the C channels.
2. The first linear layer has 4 units per image of *one* client. Row i measures brightness on the
   columns that block j feeds, and is zero in the N - 1 others: 1/N of it is non-zero, and it
   travels as a list of coordinates. The second linear layer maps back to the input's size.
3. The other clients' columns see zeros, so their gradient is zero, and the sum holds in

   .. math:: \sum_j G_W^{(j)} = \bigl[\, G_W^{(1)}[:, 1] \;\big|\; \cdots \;\big|\;
             G_W^{(N)}[:, N] \,\bigr]

   every client's rows side by side.
4. Block j is read alone. Biases are summed over clients, so a row gives its image up to a factor.

:func:`dense_bytes` and :func:`sparse_bytes` are the arithmetic of the paper's tables: with 1,000
clients, 256 units for each and inputs of 3x32x32, 6,001 MiB against 18.3 MiB, 327.3 times less. The
way back is dense (:func:`upload_bytes`): masks of secure aggregation have no zeros.

Which rows hold an image is decided blindly: energy, valid pixels, no near-copies.

Departures (no code is published; reconstructed from the paper's description):
    * The activation is a hard tanh on [0, 1] with rows divided by their bin's width, so that an
      image excites its own row only and rows are read alone.
    * The published factor of a row is not known to us. ``scale="midpoint"`` uses that the bin fixes
      the brightness and is right to half a bin; ``"max"`` makes the brightest pixel 1; ``"anchor"``
      (ours) gives every client one more, constant channel, whose column sums the deltas of that
      client alone, so that the ratio is exact.
    * The kernels also undo the normalisation, so the linear layer sees pixels in [0, 1] and every
      row is an image times one number.
    * Thresholds are quantiles of the surrogate images' brightness. The outermost bins reach beyond
      all images; their middle is that of the part in [0, 1].
    * What is sent is a list of coordinates (:func:`packed`), and a client can train on it as it is
      (:class:`SparseRows`). The simulation plays the rounds densely, zeros included, since masked
      updates are dense anyway; the read-out takes each block as a view of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from leakatlas.attacks.api import (
    ActiveAttack,
    Outlook,
    Reconstruction,
    Tampering,
    attack,
    nothing_found,
)
from leakatlas.blocks import readout, surgery
from leakatlas.blocks.watch import Watch
from leakatlas.data import Box
from leakatlas.fl import View, edits
from leakatlas.params import OpenFraction, Positive, PositiveInt
from leakatlas.threat import Knowledge, Vantage

WEIGHT = "block.first.weight"
MIB = 2**20


@attack(
    "mandrake",
    needs=Knowledge.UPDATES | Knowledge.BASIC | Knowledge.SURROGATE | Knowledge.MANIPULATION,
)
@dataclass(frozen=True, kw_only=True)
class MANDRAKE(ActiveAttack):
    """Per-client kernels and columns, weight-only read-out.

    Args:
        bins: Units of the first linear layer (paper: 4 for each of a client's 64 images).
        scale: How a row becomes an image: ``midpoint``, ``max`` or ``anchor``.
        connection: ``linear`` passes the block's output on, ``addition`` adds it to the input.
        spread: Size of the block's output on an average input.
        min_energy: A row holds an image if its norm exceeds this share of its client's largest.
    """

    version: ClassVar[int] = 2

    bins: PositiveInt = 256
    scale: Literal["midpoint", "max", "anchor"] = "midpoint"
    connection: Literal["linear", "addition"] = "linear"
    spread: Positive = 1.0
    min_energy: OpenFraction = 1e-3

    def outlook(self, view: View) -> Outlook:
        """Local steps, bins for a client's examples, and the size of what is sent."""
        if not view.has("surrogate"):
            return Outlook("hopeless", "the quantiles of brightness take surrogate images")
        if view.vantage == Vantage.PEER:
            return Outlook("hopeless", "a peer cannot give every client a model of its own")
        clients, n = len(view.clients), view.num_examples
        alone = readout.expected_singletons(n, self.bins)
        size = sparse_bytes(tuple(view.input_shape), bins=self.bins, clients=clients) / MIB
        told = (
            f"about {alone:.1f} of each client's {n} images have one of {self.bins} bins to "
            f"themselves; {size:.1f} MiB per client if sent sparsely"
        )
        steps = view.protocol.steps(n) if view.has("protocol") else 1
        if steps > 1:
            return Outlook("unknown", f"{told}; {steps} local steps overwrite rows")
        return Outlook("applicable", told)

    def tamper(self, view: View, *, generator: torch.Generator, watch: Watch) -> Tampering | None:
        """One model per client, with its own group of kernels and columns; one round."""
        del generator
        if view.rounds:
            return None
        like = next(view.model.parameters()).detach()
        h = view.surrogate.images.to(like).flatten(1).mean(dim=1)
        edges = readout.bin_edges("empirical", self.bins, values=h).to(like)
        clients = view.clients
        sent = surgery.columns_of_their_own(
            clients,
            edges,
            view.box,
            tuple(view.input_shape),
            kappa=1.0,
            anchor=self.scale == "anchor",
            spread=self.spread,
            connection=self.connection,
        )
        return Tampering(sent=sent, key={"edges": edges, "clients": torch.tensor(clients)})

    def run(self, view: View, *, generator: torch.Generator, watch: Watch) -> Reconstruction:
        """Every block of the sum, its rows scaled, sifted and freed of copies."""
        del generator
        shape = tuple(view.input_shape)
        change = readout.sent_change(view.update, view.rounds[-1].state, WEIGHT)
        edges, clients = view.key["edges"], view.key["clients"].tolist()
        found, sure, owner = [], [], []
        blocks = change.split(change.shape[1] // len(clients), dim=1)  # views: nothing is copied
        for part, client, block in zip(watch.share(len(clients)), clients, blocks, strict=False):
            del part
            images, energy = self.read_block(block, edges, shape)
            found.append(images)
            sure.append(energy)
            owner.append(torch.full((len(images),), client, device=images.device))
        images, energy, client = torch.cat(found), torch.cat(sure), torch.cat(owner)
        if not len(images):
            return nothing_found(shape, "no row of any client's block holds a valid image")
        # Copies are looked for within a client: two clients may well hold the same image.
        kept = torch.cat(
            [
                at[readout.distinct(images[at], energy[at])]
                for c in clients
                if len(at := torch.nonzero(client == c).flatten())
            ]
        )
        traced = {f"candidates/client_{c}": float((client[kept] == c).sum()) for c in clients}
        return Reconstruction(
            images=view.box.clip(view.box.normalize(images[kept])),
            confidence=energy[kept],
            notes=traced,
        )

    def read_block(
        self, block: Tensor, edges: Tensor, shape: tuple[int, ...]
    ) -> tuple[Tensor, Tensor]:
        """Images ``(M, C, H, W)`` of one client in [0, 1], and each one's energy over the largest.

        Args:
            block: ``(k, (C + anchor) H W)`` the client's columns of the change.
            edges: ``(k + 1,)``.
            shape: ``(C, H, W)``.
        """
        n = shape[0] * shape[1] * shape[2]
        rows = readout.energetic_rows(block[:, :n], self.min_energy)
        if self.scale == "anchor":
            delta = block[:, n:].mean(dim=1)[rows]
            rows, delta = rows[delta != 0], delta[delta != 0]
            x = readout.quotients(block[:, :n], rows, delta)
            energy = x.norm(dim=1) * delta.abs()
        else:
            x = block[rows, :n]
            energy = x.norm(dim=1)
        if self.scale == "midpoint":
            middle = readout.bin_middles(edges)[rows]
            x = readout.scaled_to_measurement(x, x.new_full((n,), 1 / n), middle)
        elif self.scale == "max":
            x = readout.scaled_to_box(x, Box.unit(shape[0]), shape, x.sum(dim=1).sign())
        images = x.reshape(-1, *shape)
        valid = readout.plausible(images, Box.unit(shape[0]))
        if not bool(valid.any()):
            return images[:0], energy[:0]
        return images[valid], energy[valid] / energy[valid].max()


# -- the resource problem, as arithmetic -----------------------------------------------------------


def dense_bytes(shape: tuple[int, ...], *, bins: int, clients: int, value_bytes: int = 4) -> int:
    """What an imprint layer for the whole sum adds to every model: both linear layers, dense.

    Args:
        shape: ``(C, H, W)``.
        bins: Units per client.
        clients: N; the layer needs ``bins * clients`` units.
        value_bytes: Of one weight.
    """
    n = _size(shape)
    units = bins * clients
    return (2 * units * n + units + n) * value_bytes


def sparse_bytes(
    shape: tuple[int, ...],
    *,
    bins: int,
    clients: int,
    value_bytes: int = 4,
    index_bytes: int = 8,
) -> int:
    """What MANDRAKE adds to a client's model, the first linear layer as coordinates.

    The number of non-zero weights does not depend on the number of clients; the width of an index
    and one small kernel per client do.

    Args:
        shape: ``(C, H, W)``.
        bins: Units.
        clients: N.
        value_bytes: Of one weight.
        index_bytes: Of each of the two indices of a non-zero weight.
    """
    channels, n = shape[0], _size(shape)
    first = bins * n * (value_bytes + 2 * index_bytes) + bins * value_bytes
    second = (bins * n + n) * value_bytes
    kernels = (9 * channels + 1) * channels * clients * value_bytes
    return first + second + kernels


def upload_bytes(shape: tuple[int, ...], *, bins: int, clients: int, value_bytes: int = 4) -> int:
    """What the same layers cost on the way back, where masks leave no zero to skip."""
    channels, n = shape[0], _size(shape)
    first = bins * n * clients + bins
    kernels = (9 * channels + 1) * channels * clients
    return (first + bins * n + n + kernels) * value_bytes


def packed(block: edits.SplitImprintLayers) -> Tensor:
    """The first linear layer as coordinates, ``(k, C N H W)`` sparse, as it would be sent."""
    coordinates: Tensor = block.first.weight.detach().to_sparse_coo()
    return coordinates


class SparseRows(nn.Module):
    """The first linear layer as a client computes with it: the coordinates that it was sent.

    Neither the layer nor its gradient takes room for the columns of the other clients. Put in the
    place of ``first`` in the layers of a :class:`~leakatlas.fl.edits.SplitImprint`, it gives the
    same outputs and, at the coordinates, the same gradient.

    Args:
        weight: ``(k, C N H W)`` coordinates, from :func:`packed`.
        bias: ``(k,)``.
    """

    indices: Tensor

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        weight = weight.detach().coalesce()
        self.size = tuple(weight.shape)
        self.register_buffer("indices", weight.indices())
        self.values = nn.Parameter(weight.values().clone())
        self.bias = nn.Parameter(bias.detach().clone())

    def coordinates(self, values: Tensor) -> Tensor:
        """``values`` ``(nonzeros,)``, of the layer or of its gradient, as a sparse matrix."""
        # The indices are those of a coalesced tensor, so there is nothing to check.
        return torch.sparse_coo_tensor(
            self.indices, values, self.size, is_coalesced=True, check_invariants=False
        )

    def forward(self, x: Tensor) -> Tensor:
        """``(N, C N H W)`` to ``(N, k)``."""
        product: Tensor = torch.sparse.mm(self.coordinates(self.values), x.T)
        return product.T + self.bias


def _size(shape: tuple[int, ...]) -> int:
    channels, height, width = shape
    return channels * height * width
