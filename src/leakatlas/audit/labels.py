"""Label rules, rehearsed: which one reads such an update best, and how far it can be trusted.

Where labels are not granted and an update holds several examples, an attack needs their labels
first, and the rule that fits a fresh network fails on a trained one. The adversary tries every rule
of :data:`~leakatlas.blocks.labels.METHODS` that its knowledge and public images allow on updates of
its own, whose labels it knows, takes the best, and reads the victim's update with it.

The rule is chosen on one half of these updates, and what it can be trusted with is measured on the
other. Of rules that guess how sure the network is of the victims' images, strangers' still promise
too much on a trained network, which is surer of images like those that trained it. Not so of
``factored``, which guesses nothing and certifies each answer; where it cannot, the next best rule
answers. The study ``labels_rehearsed`` holds what was expected against what was read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from leakatlas.blocks import labels, observed
from leakatlas.blocks.labels.requirements import Requirement
from leakatlas.data import ImageSet
from leakatlas.errors import LeakAtlasError
from leakatlas.fl import View, stream

BATCHES = 16
"""Updates of the adversary's own: half of them choose the rules, half judge the choice."""

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


class Reader:
    """The rule that rehearsed best, ready to read any update of the same clients.

    Args:
        view: The adversary's side of the real game; its labels are neither granted nor single.
        public: Images in the victims' shape; half of them are attacked, half are evidence.
        seed: Of batches and labels.

    Raises:
        UnsupportedModel: If the client's loss or the model's head lets no rule read labels.
        NotGranted: If the view holds too little to imitate the client.
    """

    def __init__(self, view: View, public: ImageSet, *, seed: int = 0) -> None:
        labels.require_plain(view.loss, "Counting labels")
        self.evidence = Evidence(view, public)
        N, draws = view.num_examples, stream(seed, "rehearsal", "labels")
        games: list[tuple[View, Tensor]] = []
        for number in range(BATCHES):
            x, y = self.evidence.draw(N, draws)
            own = view.rehearse(x, y, seed=seed + number)
            games.append((own, torch.bincount(y, minlength=view.classes).cpu()))
        self.rules = self._chosen(games[::2])
        self.rule = self.rules[0]
        judged = [self._shared(own, wanted) for own, wanted in games[1::2]]
        self.right = sum(shared == N for shared in judged) / len(judged)
        self.overlap = sum(judged) / N / len(judged)
        view.forget_reads()

    def _chosen(self, games: Sequence[tuple[View, Tensor]]) -> list[str]:
        """All rules that answer, the one that reads most first."""
        overlap = dict.fromkeys(candidates(), 0)
        right = dict.fromkeys(overlap, 0)
        for own, wanted in games:
            for key, counts in self.evidence.answers(own, list(overlap)).items():
                shared = int(torch.minimum(counts, wanted).sum())
                overlap[key] += shared
                right[key] += shared == own.num_examples
        # Among equals, the one that knows when it is wrong.
        return sorted(overlap, key=lambda key: (-overlap[key], -right[key], key != CERTIFIED))

    def _shared(self, own: View, wanted: Tensor) -> int:
        """How many labels of a batch are read."""
        read = torch.tensor(self(own), dtype=torch.int64)
        return int(torch.minimum(torch.bincount(read, minlength=len(wanted)), wanted).sum())

    def __call__(self, view: View) -> tuple[int, ...]:
        """The labels behind a view's update, ascending; empty if every rule refuses it."""
        for rule in self.rules:
            found = self.evidence.answers(view, [rule]).get(rule)
            whole = found is not None and int(found.sum()) == view.num_examples
            view.forget_reads()
            if found is not None and whole:
                return tuple(labels.labels_from_counts(found).tolist())
        return ()

    def to_json(self) -> dict[str, Any]:
        """Which rule, and how far it can be trusted here, as plain JSON values."""
        return {"rule": self.rule, "right": self.right, "overlap": self.overlap,
                "batches": BATCHES // 2}  # fmt: skip


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

    def draw(self, count: int, draws: torch.Generator) -> tuple[Tensor, Tensor]:
        """Images for one batch of the adversary's own, labelled as the model believes."""
        chosen = torch.randint(len(self.attacked), (count,), generator=draws)
        y = torch.multinomial(self.beliefs[chosen], 1, generator=draws).flatten()
        return self.attacked[chosen], y.to(self.attacked.device)

    def answers(self, view: View, rules: Sequence[str]) -> Mapping[str, Tensor]:
        """Class counts ``(K,)`` by rule, of those that take this model and settle."""
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
            if not isinstance(answer, labels.Counts) or answer.settled:
                found[rule] = labels.as_counts(answer).cpu()
        return found
