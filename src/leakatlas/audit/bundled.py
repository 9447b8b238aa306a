"""The audit that needs no configuration: bundled photos, a small network, FedSGD and FedAVG."""

from __future__ import annotations

from leakatlas import data
from leakatlas.audit.plan import Plan, Setting
from leakatlas.catalogue import registry
from leakatlas.data import Box
from leakatlas.fl import Defense, FedAVG, FedSGD, ModelRef
from leakatlas.threat import LETTERS, Vantage

MODEL = ModelRef("builtin", "convnet", {"in_channels": 3, "size": 32, "classes": 8, "seed": 0})
"""The ReLU network without BN on which the literature's CIFAR-10 figures are made."""


def bundled_plan(
    *, seconds: float | None = 240.0, letters: str = "ABCDEFGH", seed: int = 0
) -> Plan:
    """Four set-ups of growing realism on eight photos that no attack has seen.

    Args:
        seconds: Time budget.
        letters: Threat models.
        seed: Of everything.
    """
    photos = data.photos(32)
    surrogate = data.patches(32, 256, part="surrogate")
    box = Box.unit(3)
    model = MODEL.build()

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
            ),
            setting("FedSGD, batch of four", victims=photos.subset(range(4)), protocol=FedSGD()),
            setting(
                "FedAVG, four photos, 2 epochs of batches of 2",
                victims=photos.subset(range(4)),
                protocol=FedAVG(epochs=2, batch_size=2, lr=0.01, mode="train"),
            ),
            setting(
                "FedAVG, eight clients behind secure aggregation",
                victims=photos,
                protocol=FedAVG(epochs=1, batch_size=1, lr=0.01, mode="train"),
                clients=8,
                defenses=(defense("secure_aggregation", ring_bits=64),),
                vantage=Vantage.AGGREGATE,
            ),
        ),
        letters=tuple(letter for letter in LETTERS if letter in letters),
        alternatives={
            "clipping": (defense("clipping"),),
            "top-k pruning, 99 %": (defense("gradient_pruning", rate=0.99, largest_share=0.0),),
            "Soteria": (defense("soteria"),),
            "PRECODE": (defense("precode"),),
            "client DP on updates": (
                defense("client_dp", unit="update", clip_norm=1.0, noise_multiplier=0.01),
            ),
        },
        seconds=seconds,
        seed=seed,
        command="leakatlas audit",
    )
