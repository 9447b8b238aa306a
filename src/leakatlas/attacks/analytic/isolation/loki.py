r"""LOKI: every client gets columns of its own, and an aggregated FedAVG round still shows images.

Zhao, Sharma, Elkordy, Ezzeldin, Avestimehr and Bagchi, "LOKI: Large-scale Data Reconstruction
Attack against Federated Learning through Model Manipulation", IEEE S&P 2024. FedAVG (and FedSGD),
one round or several, aggregate vantage: only the sum over clients is needed, so secure aggregation
does not help. Letter G: a different model for each client, and public images for the brightness.

1. *Identity mapping set*: a convolution with C kernels per client. In client j's copy only its own
   kernels are non-zero; they copy the image times kappa.
2. FC1 measures brightness: row i is 1 / (kappa n (c_{i+1} - c_i)) on the columns of block j and 0
   elsewhere, its bias -c_i / (c_{i+1} - c_i), behind a hard tanh on [0, 1]: neuron i is active iff
   c_i < h(x) < c_{i+1}. FC2 is constant.
3. *Convolutional scaling factor* kappa >> 1: the forward pass does not change, but the gradient of
   FC1 grows by kappa while its weights shrink by it. Updates survive float32, and one hit moves a
   neuron out of its band (by about eta delta kappa^2 |x|^2), so later local steps do not overwrite
   what it holds.
4. Read-out: block j of (before - after) is client j's, row by row. Biases are summed over clients,
   so a row gives the image up to a factor, which ``scale`` chooses.
5. Over several rounds, mean and spread of brightness are estimated again from the bins that fired.

Since both the kernels and the FC1 columns of the other blocks are zero in a client's copy, their
gradients are exactly zero through all local steps: the sum of updates keeps clients apart.

Which rows hold an image is decided blindly: energy, valid pixels, no near-copies.

Departures:
    * The third-party demo counts and selects hits with the true activations, and stretches |row|
      from its minimum to its maximum. Selection here sees the update only, and the sign of a row is
      the one that makes it brighter than nothing.
    * ``scale="max"`` is the published rule: as bright as the pixel box allows. ``"midpoint"``
      (ours) uses that the bin fixes the brightness, and is right to half a bin. ``"anchor"`` (ours)
      adds a constant channel to every client's set; its column sums the deltas of that client
      alone, so the row ratio is exact again.
    * The kernels also undo the model's normalisation, so a row is an image in [0, 1] times one
      number. The outermost bins reach beyond all images; their middle is that of the part in
      [0, 1].
    * FC2 is scaled so that the block's output has the size of pixels (demo: 1000), and the first
      round's thresholds are empirical quantiles of the surrogate images.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, Self

import torch
from torch import Tensor

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
from leakatlas.fl import View
from leakatlas.params import OpenFraction, Positive, PositiveInt
from leakatlas.threat import Knowledge

WEIGHT = "block.first.weight"


@attack(
    "loki",
    needs=Knowledge.UPDATES | Knowledge.BASIC | Knowledge.SURROGATE | Knowledge.MANIPULATION,
)
@dataclass(frozen=True, kw_only=True)
class LOKI(ActiveAttack):
    """Per-client identity sets, binned brightness, weight-only read-out.

    Args:
        bins: FC1 units k (demo: 4 for each image of a client, 256).
        kappa: Convolutional scaling factor (demo: 500; an independent port: 50).
        scale: How a row becomes an image: ``max`` (paper), ``midpoint`` or ``anchor`` (ours).
        connection: ``linear`` passes the block's output on, ``addition`` adds it to the input.
        spread: Size of the block's output on an average input.
        min_energy: A row holds an image if its norm exceeds this share of its client's largest.
        rounds: Rounds; from the second on, thresholds follow the bins that fired.
    """

    version: ClassVar[int] = 2

    bins: PositiveInt = 256
    kappa: Positive = 500.0
    scale: Literal["max", "midpoint", "anchor"] = "max"
    connection: Literal["linear", "addition"] = "linear"
    spread: Positive = 1.0
    min_energy: OpenFraction = 1e-3
    rounds: PositiveInt = 1

    @classmethod
    def tuned(cls) -> Self:
        """Our exact read-out, for small updates: the anchor channel and a larger kappa."""
        return cls(scale="anchor", kappa=1e4)

    def outlook(self, view: View) -> Outlook:
        """How many images of the target are expected alone in their bin."""
        expected = readout.expected_singletons(view.num_examples, self.bins)
        return Outlook(
            "applicable",
            f"{expected:.1f} of {view.num_examples} images expected alone in one of {self.bins} "
            "bins of their client's own block",
        )

    def tamper(self, view: View, *, generator: torch.Generator, watch: Watch) -> Tampering | None:
        """One model per client, with its own group of kernels and columns."""
        del generator
        if len(view.rounds) == self.rounds:
            return None
        # The global model without the block that earlier rounds had.
        like = next(view.with_rounds((), {}).model.parameters()).detach()
        shape = tuple(view.input_shape)
        if view.rounds:
            edges = self.learned_edges(view, shape)
        else:
            h = view.surrogate.images.to(like).flatten(1).mean(dim=1)
            edges = readout.bin_edges("empirical", self.bins, values=h)
        edges = edges.to(like)
        clients = view.clients
        sent = surgery.columns_of_their_own(
            clients,
            edges,
            view.box,
            shape,
            kappa=self.kappa,
            anchor=self.scale == "anchor",
            spread=self.spread,
            connection=self.connection,
        )
        return Tampering(sent=sent, key={"edges": edges, "clients": torch.tensor(clients)})

    def learned_edges(self, view: View, shape: tuple[int, ...]) -> Tensor:
        """Normal quantiles with mean and spread of the brightness behind the bins that fired."""
        seen = view.rounds[-1].key["edges"].double()
        middle = (seen[:-1] + seen[1:]) / 2
        hits = torch.zeros_like(middle)
        for block in self.blocks(view, -1, shape):
            hits[readout.energetic_rows(block.images, self.min_energy)] += 1
        hits[[0, -1]] = 0  # the outer bins are open; their middle is no brightness
        if float(hits.sum()) < 2:
            return seen
        mean = float((hits * middle).sum() / hits.sum())
        std = float((hits * (middle - mean).square()).sum() / hits.sum()) ** 0.5
        return readout.bin_edges("normal", self.bins, mean=mean, std=max(std, 1e-3))

    def run(self, view: View, *, generator: torch.Generator, watch: Watch) -> Reconstruction:
        """Every block of every round, its rows scaled, sifted and freed of copies."""
        del generator
        shape = tuple(view.input_shape)
        found, sure, owner = [], [], []
        blocks = [(r, b) for r in range(len(view.rounds)) for b in self.blocks(view, r, shape)]
        for part, (number, block) in zip(watch.share(len(blocks)), blocks, strict=False):
            del part
            edges = view.rounds[number].key["edges"]
            images, energy = self.read_block(block, edges, shape)
            found.append(images)
            sure.append(energy)
            owner.append(images.new_full((len(images),), float(block.client)))
        if not found or not sum(len(part) for part in found):
            return nothing_found(shape, "no row of any client's block holds a valid image")
        images, confidence, client = torch.cat(found), torch.cat(sure), torch.cat(owner)
        kept = readout.distinct(images, confidence)
        traced = {
            f"candidates/client_{int(c)}": float((client[kept] == c).sum()) for c in client.unique()
        }
        return Reconstruction(
            images=view.box.normalize(images[kept]), confidence=confidence[kept], notes=traced
        )

    def blocks(self, view: View, number: int, shape: tuple[int, ...]) -> list[Block]:
        """Every client's columns of FC1's change in one round, as views of the update."""
        seen = view.rounds[number]
        change = readout.sent_change(view.update_at(number), seen.state, WEIGHT)
        channels = shape[0] + int(self.scale == "anchor")
        area = shape[1] * shape[2]
        parts = change.split(channels * area, dim=1)
        pixels = shape[0] * area
        return [
            Block(int(client), part[:, :pixels], part[:, pixels:])
            for client, part in zip(seen.key["clients"].tolist(), parts, strict=True)
        ]

    def read_block(
        self, block: Block, edges: Tensor, shape: tuple[int, ...]
    ) -> tuple[Tensor, Tensor]:
        """Images ``(M, C, H, W)`` of one client in [0, 1], each one's energy over the largest."""
        box = Box.unit(shape[0])
        rows = readout.energetic_rows(block.images, self.min_energy)
        if self.scale == "anchor":
            delta = block.anchor.mean(dim=1)[rows]
            rows, delta = rows[delta != 0], delta[delta != 0]
            x = readout.quotients(block.images, rows, delta)
            energy = x.norm(dim=1) * delta.abs()
        else:
            x = block.images[rows]
            energy = x.norm(dim=1)
            if self.scale == "midpoint":
                w = x.new_full(x.shape[1:], 1 / x.shape[1])
                x = readout.scaled_to_measurement(x, w, readout.bin_middles(edges)[rows])
            else:  # an image is brighter than nothing: that fixes the sign of a row
                x = readout.scaled_to_box(x, box, shape, x.sum(dim=1).sign())
        images = x.reshape(-1, *shape)
        valid = readout.plausible(images, box)
        energy = energy / energy.max() if len(energy) else energy
        return images[valid].clamp(0, 1), energy[valid]


@dataclass(frozen=True)
class Block:
    """One client's part of FC1's change.

    Args:
        client: Its id.
        images: ``(k, C H W)``.
        anchor: ``(k, H W)`` of the constant channel; empty without one.
    """

    client: int
    images: Tensor
    anchor: Tensor
