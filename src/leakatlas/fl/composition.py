"""Which defenses may stand together, and with which protocol: refused before a round, not after."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from leakatlas.errors import IncompatibleDefenses
from leakatlas.fl.hooks import ActsOn, Defense, Trait, acts_at
from leakatlas.fl.protocol import FedSGD, Protocol

ByTrait = Mapping[Trait, Sequence[Defense]]

_BATCHNORM = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


def ordered(defenses: Sequence[Defense]) -> tuple[Defense, ...]:
    """Defenses in the order of a client: data, model, step, clip, sparsify, noise, encode."""
    return tuple(sorted(defenses, key=lambda defense: defense.stage))


def check_composition(
    defenses: Sequence[Defense], protocol: Protocol, model: nn.Module | None = None
) -> None:
    """Refuse pipelines in which one defense breaks another's guarantee.

    Rules: noise that is accounted must come after every data-dependent step it covers (stages
    enforce the order); error feedback voids DP; a server that cannot read updates cannot clip
    or score them; noise that the server adds fits a weighted mean and no other aggregate;
    per-example DP needs a model and batches that do not mix examples; a defense declares
    whether it acts on steps or on whole updates.

    Raises:
        IncompatibleDefenses: Naming the pair and the way out.
    """
    by_trait = {t: [d for d in defenses if t in d.active_traits()] for t in Trait}
    _check_accounting(by_trait)
    _check_server(by_trait)
    _check_examples(by_trait, defenses, model)
    for defense in defenses:
        if not isinstance(protocol, FedSGD) and defense.modes == {ActsOn.SINGLE_BATCH}:
            raise IncompatibleDefenses(
                f"{defense.key} is defined on the gradient of one batch; under FedAVG the upload "
                "mixes several. Use FedSGD."
            )
    keys = [defense.key for defense in defenses]
    for key in keys:
        if keys.count(key) > 1:
            raise IncompatibleDefenses(f"{key} appears {keys.count(key)} times; use it once.")


def _check_accounting(by_trait: ByTrait) -> None:
    """What is sent later must have gone through the noise as well."""
    dp, feedback = by_trait[Trait.DP_NOISE], by_trait[Trait.ERROR_FEEDBACK]
    if dp and feedback:
        raise IncompatibleDefenses(
            f"{feedback[0].key} keeps unprotected residuals (error feedback) and sends them in "
            f"later rounds, which voids the accounting of {dp[0].key}; set error_feedback=False."
        )


def _check_server(by_trait: ByTrait) -> None:
    """What the server must read it can read, and its noise fits what it computes."""
    hiding, reading = by_trait[Trait.HIDES_UPDATES], by_trait[Trait.READS_UPDATES]
    if hiding and reading:
        raise IncompatibleDefenses(
            f"{reading[0].key} must read each client's update on the server, which {hiding[0].key} "
            "prevents; move it to the clients (client_dp, clipping) or drop one of the two."
        )
    if len(hiding) > 1:
        raise IncompatibleDefenses(
            f"{hiding[0].key} and {hiding[1].key} both encode the message; choose one."
        )
    central = [d for d in by_trait[Trait.DP_NOISE] if d in reading]
    others = [d for d in reading if d not in central]
    if central and others:
        raise IncompatibleDefenses(
            f"{central[0].key} adds noise to a weighted mean, whose sensitivity is not that of "
            f"what {others[0].key} makes of the updates; use one of the two, or client_dp, whose "
            "noise is in every update already."
        )


def _check_examples(
    by_trait: ByTrait, defenses: Sequence[Defense], model: nn.Module | None
) -> None:
    """Where every example is accounted for, nothing may mix examples or look at them again."""
    example_dp = by_trait[Trait.EXAMPLE_DP]
    if not example_dp:
        return
    rebatching = [
        d
        for d in defenses
        if "batch" in acts_at(d) and not _neutral(d) and d not in by_trait[Trait.ONLY_REFUSES]
    ]
    if rebatching:
        raise IncompatibleDefenses(
            f"{example_dp[0].key} bounds what one example adds to a step, but {rebatching[0].key} "
            "changes the batch and may put an example into several of its members; drop one of "
            "the two, or use client_dp(unit='update')."
        )
    if peeking := by_trait[Trait.READS_BATCH]:
        raise IncompatibleDefenses(
            f"{peeking[0].key} looks at the batch again after {example_dp[0].key} has added its "
            "noise, which no accounting covers; drop one of the two."
        )
    modules = [] if model is None else list(model.named_modules())
    mixing = [name for name, module in modules if isinstance(module, _BATCHNORM)]
    if mixing:
        raise IncompatibleDefenses(
            f"{example_dp[0].key} needs per-example gradients, but {mixing[0]!r} is a batch "
            "normalisation, which mixes examples; use a GroupNorm model (norm='group')."
        )


def _neutral(defense: Defense) -> bool:
    return bool(getattr(defense, defense.knob) == defense.neutral)
