"""Every label rule under one signature, with what it needs and what it returns.

Attacks name a label stage by its key; any stage whose output suffices can be swapped in.

>>> sorted(METHODS["idlg"].requires, key=lambda r: r.value)
[<Requirement.BIAS: 'bias'>]
>>> METHODS["zlg"].letters, METHODS["llg+"].letters, METHODS["dimitrov"].letters
(('A',), ('D',), ('C',))
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Literal, TypeVar

import torch
from torch import Tensor

from leakatlas.blocks.labels import (
    bridge,
    equations,
    estimates,
    factors,
    greedy,
    profiles,
    rank,
    signs,
    single,
)
from leakatlas.blocks.labels.counts import (
    counts_from_bias,
    labels_from_counts,
    round_counts,
    uniform,
)
from leakatlas.blocks.labels.head import Head
from leakatlas.blocks.labels.moments import HeadPass, confusion
from leakatlas.blocks.labels.outputs import Counts, LabelSet, Multiset, Order, Recovered, Soft
from leakatlas.blocks.labels.requirements import Requirement, minimal_letters
from leakatlas.errors import InvalidInput, NotGranted, UnknownName

Kind = Literal["counts", "multiset", "set", "order", "soft"]
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """What the adversary brings to label recovery; None is what it does not hold.

    Args:
        gradients: Mean-reduced gradient by parameter name, protocol already undone.
        head: The classification head.
        batch_size: Samples behind the update.
        weight: W of the global model ``(K, D)``.
        bias: b of the global model ``(K,)``.
        dummy: A pass of dummy inputs at the global weights.
        dummy_end: The same inputs at the client's weights (FedAVG).
        public: A pass of labelled public data, or one a simulated local step.
        bridge: What public data say of the layers above the highest shared one.
        steps: Local steps T.
        generator: Source of randomness for the rules that search.
    """

    gradients: Mapping[str, Tensor]
    head: Head
    batch_size: int | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None
    dummy: HeadPass | None = None
    dummy_end: HeadPass | None = None
    public: HeadPass | tuple[HeadPass, ...] | None = None
    bridge: bridge.Bridge | None = None
    steps: int | None = None
    generator: torch.Generator | None = None

    @property
    def weight_grad(self) -> Tensor:
        """The gradient of the head's weight ``(K, D)``."""
        return self.head.weight_grad(self.gradients)

    @property
    def bias_grad(self) -> Tensor:
        """The gradient of the head's bias ``(K,)``."""
        return self.head.bias_grad(self.gradients)

    @property
    def size(self) -> int:
        """The batch size, where it is held."""
        return _held(self.batch_size, "batch_size")

    @property
    def public_pass(self) -> HeadPass:
        """Public data at the global weights: the first pass if there are several."""
        return self.public_passes[0]

    @property
    def public_passes(self) -> list[HeadPass]:
        """Public data at the weights of each simulated local step; at least one pass."""
        if isinstance(self.public, HeadPass):
            return [self.public]
        return list(_held(self.public or None, "public"))


def _held(value: T | None, name: str) -> T:
    if value is None:
        raise NotGranted(
            f"this label rule reads evidence.{name}, which was not given; grant it, or choose a "
            "rule that does without (leakatlas.blocks.labels.METHODS lists what each needs)."
        )
    return value


@dataclass(frozen=True, kw_only=True)
class Method:
    """A label rule.

    Args:
        key: Its name.
        output: What its answer is.
        requires: What it must hold or presuppose.
        run: The rule itself.
    """

    key: str
    output: Kind
    requires: frozenset[Requirement]
    run: Callable[[Evidence], Recovered]

    @property
    def reads_head(self) -> bool:
        """Whether it needs the head's own gradient in the update."""
        return Requirement.BRIDGE not in self.requires

    @property
    def letters(self) -> tuple[str, ...]:
        """The least threat models that hold what the rule needs."""
        return minimal_letters(self.requires)


def _rounded(raw: Tensor, batch_size: int) -> Counts:
    return Counts(values=round_counts(raw, batch_size), raw=raw)


def _idlg(e: Evidence) -> Order:
    return Order(labels=signs.idlg_bias(e.bias_grad).reshape(1), classes=e.head.classes)


def _idlg_sum(e: Evidence) -> Order:
    return Order(labels=signs.idlg_sum(e.weight_grad).reshape(1), classes=e.head.classes)


def _idlg_paper(e: Evidence) -> Order:
    return Order(labels=signs.idlg_paper(e.weight_grad).reshape(1), classes=e.head.classes)


def _column_min(e: Evidence) -> Multiset:
    labels = signs.column_min(e.gradients, e.head, e.size)
    return Multiset(labels=labels.sort().values, classes=e.head.classes)


def _column_min_set(e: Evidence) -> LabelSet:
    return LabelSet(present=signs.column_min_set(e.gradients, e.head))


def _sum_sign_set(e: Evidence) -> LabelSet:
    return LabelSet(present=signs.sum_sign_set(e.gradients, e.head))


def _bias_uniform(e: Evidence) -> Counts:
    g = e.bias_grad
    return _rounded(counts_from_bias(g, uniform(len(g), like=g), e.size), e.size)


def _unit(counts: Tensor) -> Multiset:
    return Multiset(labels=labels_from_counts(counts), classes=len(counts))


def _llg(e: Evidence) -> Multiset:
    return _unit(greedy.llg(e.weight_grad, e.size))


def _llg_star(e: Evidence) -> Multiset:
    return _unit(greedy.llg_white_box(e.weight_grad, _held(e.dummy, "dummy"), e.size))


def _llg_plus(e: Evidence) -> Multiset:
    if e.public_pass.labels is None:
        raise InvalidInput("llg+: needs labelled public data, got a pass without labels.")
    return _unit(greedy.llg_white_box(e.weight_grad, e.public_pass, e.size))


def _e2egi(e: Evidence) -> Multiset:
    return _unit(greedy.e2egi(e.weight_grad, e.size))


def _bias_corrected(e: Evidence) -> Multiset:
    return _unit(greedy.bias_corrected(e.bias_grad, e.size))


def _bias_corrected_released(e: Evidence) -> Multiset:
    return _unit(greedy.bias_corrected(e.bias_grad, e.size, as_released=True))


def _zlg(e: Evidence) -> Counts:
    return _rounded(estimates.zlg(e.weight_grad, _held(e.dummy, "dummy"), e.size), e.size)


def _zlg_bias(e: Evidence) -> Counts:
    return _rounded(estimates.zlg_bias(e.bias_grad, _held(e.dummy, "dummy"), e.size), e.size)


def _dimitrov(e: Evidence) -> Counts:
    start, end = _held(e.dummy, "dummy"), _held(e.dummy_end, "dummy_end")
    steps = _held(e.steps, "steps")
    return _rounded(
        estimates.dimitrov(e.weight_grad, start, end, steps=steps, samples=e.size), e.size
    )


def _dimitrov_bias(e: Evidence) -> Counts:
    start, end = _held(e.dummy, "dummy"), _held(e.dummy_end, "dummy_end")
    steps = _held(e.steps, "steps")
    return _rounded(
        estimates.dimitrov_bias(e.bias_grad, start, end, steps=steps, samples=e.size), e.size
    )


def _rlg(e: Evidence) -> LabelSet:
    return LabelSet(present=rank.rlg(e.weight_grad).present)


def _ilrg(e: Evidence) -> Counts:
    raw = equations.ilrg(
        e.weight_grad, e.bias_grad, _held(e.weight, "weight"), _held(e.bias, "bias"), e.size
    )
    return _rounded(raw, e.size)


def _rlu(e: Evidence) -> Counts:
    return _rounded(equations.rlu(e.bias_grad, e.public_passes, e.size), e.size)


def _fixed_point(e: Evidence) -> Counts:
    found = equations.fixed_point(e.bias_grad, confusion(e.public_pass), e.size)
    return replace(_rounded(found.counts, e.size), settled=found.converged)


def _factored(e: Evidence) -> Counts:
    found = factors.factored(
        e.weight_grad, e.bias_grad, _held(e.weight, "weight"), _held(e.bias, "bias"), e.size,
        generator=_held(e.generator, "generator"),
    )  # fmt: skip
    return Counts(values=found.counts, settled=found.settled)


def _gdbr(e: Evidence) -> Counts:
    return _rounded(bridge.gdbr(e.gradients, _held(e.bridge, "bridge"), e.size), e.size)


def _hf_gradinv(e: Evidence) -> Multiset:
    profile = profiles.reference_profile(e.public_pass)
    generator = _held(e.generator, "generator")
    return _unit(profiles.hf_gradinv(e.weight_grad, profile, e.size, generator=generator))


def _fc_ratio(e: Evidence) -> Soft:
    y = single.fc_soft_label(
        e.weight_grad, e.bias_grad, _held(e.weight, "weight"), _held(e.bias, "bias")
    )
    return Soft(probabilities=y[None])


def _rgap(e: Evidence) -> Order:
    """The rule's -1 and +1 as classes 0 and 1."""
    if e.head.classes != 1:
        raise InvalidInput(
            f"rgap: needs a head with one logit, got {e.head.classes} classes; use fc_ratio."
        )
    label = (single.rgap_label(e.weight_grad[0]) + 1) // 2
    return Order(labels=torch.tensor([label], device=e.weight_grad.device), classes=2)


_R = Requirement


def _method(
    key: str, output: Kind, run: Callable[[Evidence], Recovered], *needs: Requirement
) -> Method:
    return Method(key=key, output=output, requires=frozenset(needs), run=run)


METHODS: Mapping[str, Method] = {
    method.key: method
    for method in (
        _method("bias-uniform", "counts", _bias_uniform, _R.BIAS, _R.BATCH_SIZE),
        _method("idlg", "order", _idlg, _R.BIAS),
        _method("idlg-sum", "order", _idlg_sum, _R.NONNEG_FEATURES),
        _method("idlg-paper", "order", _idlg_paper),
        _method("column-min", "multiset", _column_min, _R.NONNEG_FEATURES, _R.BATCH_SIZE),
        _method("column-min-set", "set", _column_min_set, _R.NONNEG_FEATURES),
        _method("sum-sign-set", "set", _sum_sign_set, _R.NONNEG_FEATURES),
        _method("llg", "multiset", _llg, _R.NONNEG_FEATURES, _R.BATCH_SIZE),
        _method(
            "llg*", "multiset", _llg_star,
            _R.NONNEG_FEATURES, _R.BATCH_SIZE, _R.WEIGHTS, _R.ARCHITECTURE,
        ),
        _method(
            "llg+", "multiset", _llg_plus,
            _R.NONNEG_FEATURES, _R.BATCH_SIZE, _R.WEIGHTS, _R.ARCHITECTURE, _R.AUX_DATA,
        ),
        _method("e2egi", "multiset", _e2egi, _R.NONNEG_FEATURES, _R.BATCH_SIZE),
        _method("bias-corrected", "multiset", _bias_corrected, _R.BIAS, _R.BATCH_SIZE),
        _method(
            "bias-corrected-released", "multiset", _bias_corrected_released,
            _R.BIAS, _R.BATCH_SIZE,
        ),
        _method(
            "zlg", "counts", _zlg,
            _R.NONNEG_FEATURES, _R.BATCH_SIZE, _R.WEIGHTS, _R.ARCHITECTURE,
        ),
        _method(
            "zlg-bias", "counts", _zlg_bias, _R.BIAS, _R.BATCH_SIZE, _R.WEIGHTS, _R.ARCHITECTURE
        ),
        _method(
            "dimitrov", "counts", _dimitrov,
            _R.NONNEG_FEATURES, _R.BATCH_SIZE, _R.WEIGHTS, _R.ARCHITECTURE, _R.TRAINING,
        ),
        _method(
            "dimitrov-bias", "counts", _dimitrov_bias,
            _R.BIAS, _R.BATCH_SIZE, _R.WEIGHTS, _R.ARCHITECTURE, _R.TRAINING,
        ),
        _method("rlg", "set", _rlg),
        _method("ilrg", "counts", _ilrg, _R.BIAS, _R.BATCH_SIZE, _R.WEIGHTS),
        _method("factored", "counts", _factored, _R.BIAS, _R.BATCH_SIZE, _R.WEIGHTS),
        _method(
            "rlu", "counts", _rlu,
            _R.BIAS, _R.BATCH_SIZE, _R.WEIGHTS, _R.ARCHITECTURE, _R.AUX_DATA, _R.TRAINING,
        ),
        _method(
            "fixed-point", "counts", _fixed_point,
            _R.BIAS, _R.BATCH_SIZE, _R.WEIGHTS, _R.ARCHITECTURE, _R.AUX_DATA,
        ),
        _method(
            "hf-gradinv", "multiset", _hf_gradinv,
            _R.NONNEG_FEATURES, _R.BATCH_SIZE, _R.WEIGHTS, _R.ARCHITECTURE, _R.AUX_DATA,
        ),
        _method(
            "gdbr", "counts", _gdbr,
            _R.BRIDGE, _R.BATCH_SIZE, _R.WEIGHTS, _R.ARCHITECTURE, _R.AUX_DATA,
        ),
        _method("fc-ratio", "soft", _fc_ratio, _R.BIAS, _R.WEIGHTS),
        _method("rgap", "order", _rgap, _R.NONNEG_FEATURES),
    )
}  # fmt: skip
"""Every rule that answers from an update in one go; joint optimisation is an attack's own loop."""


def recover(key: str, evidence: Evidence) -> Recovered:
    """Run one rule.

    Raises:
        UnknownName: If there is no such rule.
        NotGranted: If the evidence lacks what the rule reads.
        UnsupportedModel: If the model lacks what it presupposes (no bias, sign-changing features).
    """
    if key not in METHODS:
        raise UnknownName("label method", key, METHODS)
    return METHODS[key].run(evidence)
