"""Labels of batches although the head's gradient is withheld, beside an even spread.

The value is IRec, the multiset overlap with the true labels; a refusal scores 0 and is counted.
Auxiliary labels are not used.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from leakatlas.bench import scene
from leakatlas.bench.cells import Cell
from leakatlas.blocks import labels
from leakatlas.errors import InvalidInput, UnsupportedModel
from leakatlas.metrics import counts_of, irec

TRIALS, CLASSES = 4, 10


def measure(cell: Cell) -> dict[str, list[float]]:
    """IRec of the rule and of the even spread on random batches, and where the rule refused."""
    torch.set_num_threads(1)
    if cell.case.surrogate is None:
        raise InvalidInput("The rule needs auxiliary images: name them as `surrogate`.")
    victims = scene.images(cell.case.victims, cell.data)
    box = scene.pixel_space(cell.case, victims.channels)
    x, y, batch = box.normalize(victims.images), victims.labels, cell.case.batch
    auxiliary = box.normalize(scene.images(cell.case.surrogate, cell.data).images)
    model = scene.network(cell)[1].eval()
    head = labels.find_head(model, x[:1])
    own = (head.weight_name, head.bias_name)
    held = {name: p for name, p in model.named_parameters() if name not in own}
    bridge = labels.build_bridge(model, head, auxiliary, shared=list(held))
    generator = torch.Generator().manual_seed(1_000 * cell.seed + batch)
    found: dict[str, list[float]] = {"irec_gdbr": [], "irec_even_spread": [], "refused": []}
    for _ in range(TRIALS):
        pick = torch.randperm(len(x), generator=generator)[:batch]
        true = counts_of(y[pick], CLASSES)
        even = labels.round_counts(torch.zeros(CLASSES), batch)
        found["irec_even_spread"].append(irec(even, true))
        loss = F.cross_entropy(model(x[pick]), y[pick])
        sent = dict(zip(held, torch.autograd.grad(loss, list(held.values())), strict=True))
        try:
            score = irec(labels.round_counts(labels.gdbr(sent, bridge, batch), batch), true)
            refused = 0.0
        except UnsupportedModel:
            score, refused = 0.0, 1.0
        found["irec_gdbr"].append(score)
        found["refused"].append(refused)
    return found
