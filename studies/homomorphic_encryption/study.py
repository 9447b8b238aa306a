"""Traffic, processor time and error of encrypted sums, on gradients of real networks."""

from __future__ import annotations

import time
from typing import Any

import torch

from leakatlas.bench import scene
from leakatlas.bench.cells import Cell
from leakatlas.defenses.formal.crypto._ckks import Adder, Key
from leakatlas.defenses.formal.crypto.homomorphic_encryption import HomomorphicEncryption
from leakatlas.fl import stream
from leakatlas.fl.plain import defense_from_json


def measure(cell: Cell) -> dict[str, Any]:
    """Two clients, a server, and what each takes."""
    defense = defense_from_json(cell.case.defenses[0])
    assert isinstance(defense, HomomorphicEncryption)
    model = scene.network(cell)[1]
    vectors = []
    for client in range(2):
        x = torch.rand(8, 3, 32, 32, generator=stream(cell.seed, client))
        loss = torch.nn.functional.cross_entropy(model(x), torch.arange(8))
        found = torch.autograd.grad(loss, list(model.parameters()))
        vectors.append(torch.cat([g.flatten() for g in found]).double())
    key = Key(defense.ring)
    adder, size = Adder(key.public()), len(vectors[0])
    start = time.process_time()
    uploads = [key.encrypt(v) for v in vectors]
    encrypted = time.process_time()
    total = adder.add(uploads)
    added = time.process_time()
    opened = key.open(total)
    return {
        "parameters": size,
        "bytes_per_parameter": sum(map(len, uploads[0])) / size,
        "encrypt_seconds": (encrypted - start) / 2,
        "add_seconds": added - encrypted,
        "open_seconds": time.process_time() - added,
        "largest_error": float((opened - vectors[0] - vectors[1]).abs().max()),
        "error_bound": defense.ring.error_bound(2),
    }
