"""Label rules, rehearsed: which one reads such an update best, and how far it can be trusted.

Where labels are not granted and an update holds several examples, an attack needs their labels
first, and the rule that fits a fresh network fails on a trained one. The adversary tries every rule
of :data:`~leakatlas.blocks.labels.METHODS` that its knowledge and public images allow on updates of
its own, whose labels it knows, takes the best, and reads the victim's update with it.

A trained network is surer of images like those that trained it than of a stranger's, and rules that
guess how sure it is err with that. How much it was surprised shows in the update itself: in the
slope of the head's bias, the mean of prediction minus label (:meth:`Evidence.surprise`). So own
batches are made of images that the network is more or less sure of, and of them count those which
surprised it as much as the victim's batch did. One half of these chooses the order of the rules; on
the other half, which chose nothing, it is counted how often the rule that answered was right.
Stated is the lower end of the Wilson interval of that share. ``factored`` answers only where one
set of labels explains the update; where it cannot, the next best rule answers. A rule for which
there is no time is left out, and named. The study
``labels_rehearsed`` holds what was stated against what was read.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from leakatlas.blocks import labels, observed
from leakatlas.blocks.labels.requirements import Requirement
from leakatlas.blocks.watch import Watch
from leakatlas.data import ImageSet
from leakatlas.errors import LeakAtlasError
from leakatlas.fl import View, stream
from leakatlas.metrics.intervals import binomial

BATCHES = 96
"""Updates of the adversary's own, if time allows."""

LEAST = 16
"""The fewest from which anything is said."""

NEAR = 0.5
"""Share of them that count for an update: those that surprised the network as much."""

SURE = (1.0, 0.5, 0.25, 0.125)
"""Own batches are made of these shares of the public images, the surest ones, in turn."""

CERTIFIED = "factored"
"""Answers only where one set of labels explains the update."""

HELD = frozenset(
    {Requirement.BIAS, Requirement.NONNEG_FEATURES, Requirement.BATCH_SIZE, Requirement.WEIGHTS,
     Requirement.ARCHITECTURE, Requirement.AUX_DATA}
)  # fmt: skip
"""What an adversary with the received model and public images brings; whether features are
non-negative shows in how the rule does."""


def candidates() -> list[str]:
    """Rules that answer with a multiset of labels from what such an adversary holds."""
    return [
        key
        for key, method in labels.METHODS.items()
        if method.output in ("counts", "multiset") and method.requires <= HELD
    ]


@dataclass(frozen=True)
class Reading:
    """What was read of an update.

    Args:
        labels: Ascending; empty if every rule refused.
        rule: That answered; empty likewise.
        right: Of how many own batches like this one that rule read every label.
        batches: How many there were, none of which chose the rule.
        overlap: Share of their labels that it read.
        untried: Rules for which there was no time.
    """

    labels: tuple[int, ...]
    rule: str
    right: int
    batches: int
    overlap: float
    untried: tuple[str, ...] = ()

    @property
    def trust(self) -> float:
        """How often such a reading is right at least: the lower end of its Wilson interval."""
        return binomial(self.right, self.batches).low if self.batches else 0.0

    def to_json(self) -> dict[str, Any]:
        """Which rule, and how far it can be trusted here, as plain JSON values."""
        share = self.right / self.batches if self.batches else 0.0
        told = {"rule": self.rule, "right": share, "trust": self.trust, "overlap": self.overlap,
                "batches": self.batches}  # fmt: skip
        return {**told, "untried": list(self.untried)} if self.untried else told


@dataclass(frozen=True)
class _Own:
    """One update of the adversary's own: its surprise, and how many labels each rule read."""

    surprise: float
    read: Mapping[str, int]


class Reader:
    """Rules that were tried, ready to read any update of the same clients.

    Args:
        view: The adversary's side of the real game; its labels are neither granted nor single.
        public: Images in the victims' shape; half of them are attacked, half are evidence.
        seed: Of batches and labels.
        watch: When to stop trying. :data:`LEAST` batches are tried in any case, but without the
            rules that would take longer than there is.
        rules: Which are tried; :func:`candidates` if None.

    Raises:
        UnsupportedModel: If the client's loss or the model's head lets no rule read labels.
        NotGranted: If the view holds too little to imitate the client.
    """

    def __init__(
        self,
        view: View,
        public: ImageSet,
        *,
        seed: int = 0,
        watch: Watch | None = None,
        rules: Sequence[str] | None = None,
    ) -> None:
        labels.require_plain(view.loss, "Counting labels")
        self.evidence = Evidence(view, public)
        self.rules = candidates() if rules is None else list(rules)
        self._size = view.num_examples
        self._own: list[_Own] = []
        self._untried: tuple[str, ...] = ()
        draws = stream(seed, "rehearsal", "labels")
        for number in range(BATCHES):
            if number >= LEAST and watch is not None and (watch.over or watch.stopped):
                break
            x, y = self.evidence.draw(self._size, SURE[number % len(SURE)], draws)
            own = view.rehearse(x, y, seed=seed + number)
            if number == 0 and watch is not None:
                self._leave_out_the_slow(own, watch)
            wanted = torch.bincount(y, minlength=view.classes).cpu()
            read = {
                rule: int(torch.minimum(counts, wanted).sum())
                for rule, counts in self.evidence.answers(own, self.rules).items()
            }
            self._own.append(_Own(self.evidence.surprise(own), read))
        view.forget_reads()

    def _leave_out_the_slow(self, own: View, watch: Watch) -> None:
        """Only rules that can read the fewest batches in the time that there is, the fastest first.

        One is kept however slow: without labels there is nothing to rehearse.
        """
        seconds: dict[str, float] = {}
        for rule in self.rules:
            begun = time.perf_counter()
            self.evidence.answers(own, [rule])
            seconds[rule] = time.perf_counter() - begun
        left = watch.remaining()
        spent = 0.0
        kept: list[str] = []
        for rule in sorted(self.rules, key=lambda rule: seconds[rule]):
            spent += (LEAST - 1) * seconds[rule]
            if not kept or left is None or spent <= left:
                kept.append(rule)
        self._untried = tuple(rule for rule in self.rules if rule not in kept)
        self.rules = [rule for rule in self.rules if rule in kept]

    def __call__(self, view: View) -> Reading:
        """The labels behind a view's update, and what the reading is worth."""
        surprise = self.evidence.surprise(view)
        alike = sorted(self._own, key=lambda own: abs(own.surprise - surprise))
        alike = alike[: max(LEAST, int(NEAR * len(alike)))]
        order = self._order(alike[::2])
        answers = self.evidence.answers(view, order)
        view.forget_reads()
        for place, rule in enumerate(order):
            if rule in answers:
                earlier = set(order[:place])
                judged = [
                    own.read[rule]
                    for own in alike[1::2]
                    if rule in own.read and not earlier & own.read.keys()
                ]
                return Reading(
                    labels=tuple(labels.labels_from_counts(answers[rule]).tolist()),
                    rule=rule,
                    right=sum(read == self._size for read in judged),
                    batches=len(judged),
                    overlap=sum(judged) / self._size / max(len(judged), 1),
                    untried=self._untried,
                )
        return Reading((), "", 0, 0, 0.0, self._untried)

    def _order(self, alike: Sequence[_Own]) -> list[str]:
        """The rules, the one that reads most of such updates first."""
        overlap = {rule: sum(own.read.get(rule, 0) for own in alike) for rule in self.rules}
        right = {
            rule: sum(own.read.get(rule) == self._size for own in alike) for rule in self.rules
        }
        # Among equals, the one that knows when it is wrong.
        return sorted(overlap, key=lambda rule: (-overlap[rule], -right[rule], rule != CERTIFIED))


def needed(view: View) -> bool:
    """Whether labels must be read by a rule that may err: several examples, none granted."""
    return view.num_examples > 1 and not view.has("labels")


class Evidence:
    """What the adversary brings to label recovery, besides an update.

    Args:
        view: The adversary's side.
        public: Images in the victims' shape.
    """

    def __init__(self, view: View, public: ImageSet) -> None:
        model = view.model
        like = next(model.parameters())
        images = public.images.to(like)
        inputs = view.box.normalize(images) if view.has("box") else images
        self.head = labels.find_head(model, like.new_zeros(1, *view.input_shape))
        held = dict(model.named_parameters())
        self.weight = held[self.head.weight_name].detach()
        bias = self.head.bias_name
        self.bias = None if bias is None else held[bias].detach()
        with torch.no_grad():
            self.attacked, evidence = inputs[::2], inputs[1::2]
            self.beliefs = model.eval()(self.attacked).softmax(1).double().cpu()
            guessed = model(evidence).argmax(1)
        self.public = labels.head_pass(model, self.head, evidence, guessed)
        noise = torch.randn(evidence.shape, generator=stream("rehearsal", "dummies")).to(like)
        self.dummy = labels.head_pass(model, self.head, noise)

    def draw(self, count: int, share: float, draws: torch.Generator) -> tuple[Tensor, Tensor]:
        """Images for one batch of the adversary's own, labelled as the model believes.

        Args:
            count: N.
            share: Of the images, those that the model is surest of.
            draws: Of images and labels.
        """
        surest = self.beliefs.max(1).values.argsort(descending=True, stable=True)
        part = surest[: max(int(share * len(surest)), min(count, len(surest)))]
        chosen = part[torch.randint(len(part), (count,), generator=draws)]
        y = torch.multinomial(self.beliefs[chosen], 1, generator=draws).flatten()
        return self.attacked[chosen], y.to(self.attacked.device)

    def surprise(self, view: View) -> float:
        """How far the model's mean prediction was from the labels of a batch, in [0, 1].

        Without a bias, the size of the slope of the head's weights, which grows with it.
        """
        g = observed.mean_gradient(view)
        if self.head.bias_name is not None and self.head.bias_name in g:
            return float(g[self.head.bias_name].abs().sum()) / 2
        return float(g[self.head.weight_name].norm())

    def answers(self, view: View, rules: Sequence[str]) -> Mapping[str, Tensor]:
        """Class counts ``(K,)`` by rule, of those that take this model, settle and count N."""
        gathered = labels.Evidence(
            gradients=observed.mean_gradient(view),
            head=self.head,
            batch_size=view.num_examples,
            weight=self.weight,
            bias=self.bias,
            public=self.public,
            dummy=self.dummy,
            generator=stream("rehearsal", "rule"),
        )
        found: dict[str, Tensor] = {}
        for rule in rules:
            try:
                answer = labels.recover(rule, gathered)
            except LeakAtlasError:  # no bias, features that change sign: not a rule for this model
                continue
            if isinstance(answer, labels.Counts) and not answer.settled:
                continue
            counts = labels.as_counts(answer).cpu()
            if int(counts.sum()) == view.num_examples:
                found[rule] = counts
        return found
