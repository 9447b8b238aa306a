"""Victims that a prior was trained on are refused; nothing here changes the figures of others."""

from __future__ import annotations

from leakatlas.attacks.api import Attack
from leakatlas.errors import InvalidInput, shown
from leakatlas.fl import Stage


def require_strangers(stage: Stage, attack: Attack) -> None:
    """Refuse victims that a kept prior of the attack has seen: it would score what it memorised.

    Raises:
        InvalidInput: Naming the prior and the number of victims.
    """
    names = attack.priors(tuple(stage.input_shape))
    if not names:
        return
    from leakatlas import priors  # few attacks have one

    for name in names:
        prior = priors.load(name)
        known = sum(int(prior.knows(images.images).sum()) for images in stage.victims.values())
        if known:
            raise InvalidInput(
                f"The prior {shown(name)} of {attack.key} was trained on {known} of the victims, "
                "so its result would be a memory; take other victims, or another prior "
                "(prior='surrogate' learns one from the surrogate images)."
            )
