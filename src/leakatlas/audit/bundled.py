"""The audit that needs no configuration: bundled photos, a small network, FedSGD and FedAVG."""

from __future__ import annotations

from leakatlas import data
from leakatlas.audit.plan import Plan, Setting
from leakatlas.catalogue import registry
from leakatlas.data import Box
from leakatlas.fl import Defense, FedAVG, FedSGD, ModelRef
from leakatlas.threat import LETTERS, Vantage

ITERATING = ("inverting_gradients", "gias")
"""On one gradient, beside the first of all: DLG, and for one image iDLG, which reads its label.
Through local steps or a sum of clients an iteration of all but Inverting Gradients takes seconds;
it alone is tried there."""

HOURS = "seer"
"""Learns shared weights over a thousand and more steps, of which five minutes hold twenty."""

MODEL = ModelRef("builtin", "convnet", {"in_channels": 3, "size": 32, "classes": 8, "seed": 0})
"""The ReLU network without BN on which the literature's CIFAR-10 figures are made."""


def bundled_plan(
    *, seconds: float | None = 300.0, letters: str = "ABCDEFGH", seed: int = 0
) -> Plan:
    """Four set-ups of growing realism on four photos that no attack has seen.

    Attacks are those of which five minutes hold a try, on a machine that is busy with other things
    too: all closed forms but :data:`HOURS`, and few that iterate. ``attacks:`` in a configuration
    of one's own names others.

    Args:
        seconds: Time budget.
        letters: Threat models.
        seed: Of everything.
    """
    photos = data.photos(32)
    surrogate = data.patches(32, 256, part="surrogate")
    box = Box.unit(3)
    model = MODEL.build()
    closed = tuple(
        key
        for key in registry.attack_keys()
        if registry.module_path("attack", key).split(".")[2] == "analytic" and key != HOURS
    )
    one_image = (*closed, "idlg", *ITERATING)
    one_gradient = (*closed, "dlg", *ITERATING)
    local_steps = (*closed, "inverting_gradients")

    def setting(name: str, **changes: object) -> Setting:
        return Setting(
            name=name,
            model=model,
            model_ref=MODEL,
            box=box,
            surrogate=surrogate,
            **changes,  # type: ignore[arg-type]  # the fields of Setting, by name
        )

    def defense(key: str, **parameters: object) -> Defense:
        made: Defense = registry.defense(key, **parameters)
        return made

    return Plan(
        settings=(
            setting(
                "FedSGD, one photo per client",
                victims=photos.subset(range(3)),
                protocol=FedSGD(),
                clients=3,
                targets=(0, 1, 2),
                attacks=one_image,
            ),
            setting(
                "FedSGD, batch of four",
                victims=photos.subset(range(4)),
                protocol=FedSGD(),
                attacks=one_gradient,
            ),
            setting(
                "FedAVG, four photos, 2 epochs of batches of 2",
                victims=photos.subset(range(4)),
                protocol=FedAVG(epochs=2, batch_size=2, lr=0.01, mode="train"),
                attacks=local_steps,
            ),
            setting(
                "FedAVG, four clients behind secure aggregation",
                victims=photos.subset(range(4)),
                protocol=FedAVG(epochs=1, batch_size=1, lr=0.01, mode="train"),
                attacks=local_steps,
                clients=4,
                defenses=(defense("secure_aggregation", ring_bits=64),),
                vantage=Vantage.AGGREGATE,
            ),
        ),
        letters=tuple(letter for letter in LETTERS if letter in letters),
        alternatives={
            "clipping": (defense("clipping"),),
            "top-k pruning, 99 %": (defense("gradient_pruning", rate=0.99, largest_share=0.0),),
            "vicinal augmentation": (defense("vicinal_augmentation"),),
            "PRECODE": (defense("precode"),),
            "client DP on updates": (
                defense("client_dp", unit="update", clip_norm=1.0, noise_multiplier=0.01),
            ),
        },
        seconds=seconds,
        seed=seed,
        command="leakatlas audit",
    )
