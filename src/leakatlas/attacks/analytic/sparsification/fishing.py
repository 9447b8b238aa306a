r"""Fishing: a head that lets one class, then one example, carry the whole gradient.

Wen, Geiping, Fowl, Goldblum and Goldstein, "Fishing for User Data in Large-Batch Federated Learning
via Gradient Magnification", ICML 2022. FedSGD, several rounds with the same client and batch
(cross-silo). Letter F: the weights of the last layer are changed, nothing else.

With features f, logits o = W f + b, target class c, and everything else in W zero:

1. *Class fishing*: W[c, :] = gamma_c, b[j != c] = beta. Then p_c ~ 0: examples of other classes
   send nothing into row c or the extractor, those of c have delta_c = -1. One occurrence: isolated.
2. *Feature fishing*: W[c, k] = gamma_f, b[c] = -gamma_f theta, other biases 0. Examples with
   f_k > theta are called c with certainty, the others are not: a cut on one feature.
3. *Search*: the mean feature of the examples still active is G_W[c] / G_b[c]. Start with
   k = argmax of it and theta = its value; take the survivors' mean as the next theta, until one is
   left (about log2 n rounds). The smallest f_k survives.
4. The isolated gradient is inverted as a batch of one: exactly, by a row ratio, if the image meets
   a linear layer first; otherwise by gradient matching (cosine distance, signed Adam, total
   variation with double opponents) on extractor and row c. Head rows j != c mix all examples and
   are left out.

Departures:
    * In a batch of several classes the published cut lets examples of *other* classes above theta
      in, with delta_c = +1. One more round with theta below all features shows exactly those, and
      their difference E = G(-inf) - G(theta) is the sum over all examples below theta, whatever
      their class. In a batch of one class G(-inf) = 0 and E is the paper's.
    * beta is 0 for feature fishing, as in the analytic notebook; 1000 moves the cut by
      beta / gamma_f.
    * Counts N E_b are integers if the cut is sharp; where they are not, gamma_f (or beta) is raised
      tenfold and the round repeated. Where all survivors share one value, the next feature is used.
    * The search of the released code fetches labels from the user; here an honest first round and
      the bias gradient give the classes, or the labels if they are granted.
    * Inversion starts from plain noise, not from the code's repeated patches; extractor gradients
      are divided by gamma_f.
    * The cross-device variant (thresholds from many other users' features) and the full bisection
      (every example's gradient) are left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from leakatlas.attacks.api import (
    ActiveAttack,
    Outlook,
    Reconstruction,
    TamperedModel,
    Tampering,
    attack,
    nothing_found,
)
from leakatlas.blocks import descent, init, labels, matching, readout, surgery
from leakatlas.blocks.watch import Watch
from leakatlas.errors import UnsupportedModel
from leakatlas.fl import FedAVG, View, replay
from leakatlas.models.structure import example_input, has_batchnorm
from leakatlas.params import NonNegative, NonNegativeInt, Positive, PositiveInt
from leakatlas.threat import Knowledge

HONEST, CLASS, FLOOR, CUT = range(4)
"""What a round was for: labels, class fishing, the reference below all features, a cut."""

SHARPEST = 1e9
"""Factors are raised up to here; beyond it, float32 logits lose the features."""


@attack("fishing", needs=Knowledge.UPDATES | Knowledge.BASIC | Knowledge.MANIPULATION)
@dataclass(frozen=True, kw_only=True)
class Fishing(ActiveAttack):
    """Class and feature fishing with the cross-silo search, then inversion of one gradient.

    Args:
        class_gain: gamma_c.
        feature_gain: gamma_f (first value; see *Departures*).
        class_bias: beta during class fishing (first value).
        target_class: c; None takes the rarest class that the honest round shows.
        features: How many features are tried before the search gives up.
        rounds: Most rounds in all.
        steps: Iterations of the inverter, if it is needed.
        lr: Step size of signed Adam, in model space.
        tv_weight: Weight of the total variation.
    """

    class_gain: Positive = 0.5
    feature_gain: Positive = 300.0
    class_bias: Positive = 1_000.0
    target_class: NonNegativeInt | None = None
    features: PositiveInt = 8
    rounds: PositiveInt = 100
    steps: PositiveInt = 24_000
    lr: Positive = 0.1
    tv_weight: NonNegative = 0.2

    plain_loss_only = True

    def outlook(self, view: View) -> Outlook:
        """A gradient, and a biased head by which a class or a cut is chosen."""
        if view.protocol.steps(view.num_examples) > 1 or isinstance(view.protocol, FedAVG):
            return Outlook("hopeless", "it reads gradients; these clients send weight changes")
        find_head(view.model, view)
        if has_batchnorm(view.model) and view.protocol.mode == "train":
            return Outlook("unknown", "train-mode batch normalisation mixes the other images in")
        return Outlook(
            "unknown",
            "one example can be isolated exactly; inverting its gradient is the hard part",
        )

    def tamper(self, view: View, *, generator: torch.Generator, watch: Watch) -> Tampering | None:
        """The next head, from what the earlier ones showed; None once one example is alone."""
        del generator
        if len(view.rounds) >= self.rounds:
            return None
        model = view.model
        head = find_head(model, view)
        move = self.next_move(view, head)
        if move is None:
            return None
        set_head(model, head, move)
        return Tampering(sent=TamperedModel.of(model), key={"move": move.to_tensor()})

    def run(self, view: View, *, generator: torch.Generator, watch: Watch) -> Reconstruction:
        """Check that one example is alone, and invert its gradient."""
        shape = tuple(view.input_shape)
        model = view.model
        head = find_head(model, view)
        rounds = float(len(view.rounds))
        if any(seen.update is not None and seen.update.kind != "gradient" for seen in view.rounds):
            return nothing_found(shape, "fishing reads gradients; the clients sent weight changes")
        move = Move.of(view, len(view.rounds) - 1)
        if move.stage not in (CLASS, CUT):
            return nothing_found(shape, "no class of the batch was found", rounds=rounds)
        alone = survivors(view, head, len(view.rounds) - 1)
        if round(alone.count) != 1 or abs(alone.count - 1) > 1e-3:
            return nothing_found(
                shape, f"{alone.count:.3f} examples are left", rounds=rounds, left=alone.count
            )
        notes = {"rounds": rounds, "left": alone.count}
        label = torch.tensor([move.target]) if move.stage == CLASS else None
        x_hat = behind_linear(model, alone.gradient, shape)
        if x_hat is None:
            found = self.match(view, head, move, alone, generator, watch)
            notes["cosine_distance"] = float(found.criterion)
            x_hat = found.best["x"]
        return Reconstruction(
            images=view.box.clip(x_hat),
            labels=label,
            confidence=torch.tensor([-notes.get("cosine_distance", 0.0)]),
            notes=notes,
        )

    def next_move(self, view: View, head: labels.Head) -> Move | None:
        """The search, as a function of all rounds so far."""
        if not view.rounds:
            if self.target_class is not None or view.has("labels"):
                return self.cast(self.candidates(view, head)[0])
            return Move(HONEST)
        last = len(view.rounds) - 1
        if view.rounds[last].update is None or view.update_at(last).kind != "gradient":
            return None
        move = Move.of(view, last)
        if move.stage == HONEST:
            return self.cast(self.candidates(view, head)[0])
        if move.stage == FLOOR:
            return Move(CUT, move.target, move.feature, self.first_cut(view, head, move), move.gain)
        left = survivors(view, head, last)
        rounding = 1e-9 if left.features.dtype == torch.float64 else 1e-6
        sharp = abs(left.count - round(left.count)) <= rounding * max(left.examples, 10)
        if not sharp and max(move.gain, move.beta) < SHARPEST:
            return move.sharper()
        if move.stage == CLASS:
            if round(left.count) < 1:  # the class is not in the batch after all
                tried = {m.target for m in moves(view) if m.stage == CLASS}
                rest = [c for c in self.candidates(view, head) if c not in tried]
                return self.cast(rest[0]) if rest else None
            return None if round(left.count) == 1 else self.start_cuts(view, head, move.target, 0)
        if round(left.count) == 1 and float(left.features[move.feature]) > 0:
            return None
        theta = float(left.features[move.feature]) if round(left.count) > 1 else move.theta
        if theta <= 0 or abs(theta - move.theta) <= 1e-6 * abs(move.theta):
            # All survivors share one value (or none is left, or the feature is dead in them).
            tried_features = {m.feature for m in moves(view) if m.stage == CUT}
            if len(tried_features) >= self.features:
                return None
            return self.start_cuts(view, head, move.target, len(tried_features))
        return Move(CUT, move.target, move.feature, theta, move.gain)

    def cast(self, target: int) -> Move:
        """Class fishing for one class."""
        return Move(CLASS, target, gain=self.class_gain, beta=self.class_bias)

    def candidates(self, view: View, head: labels.Head) -> list[int]:
        """Classes worth fishing for, the rarest present one first, absent ones last."""
        if self.target_class is not None:
            return [self.target_class]
        if view.has("labels"):
            counts = torch.bincount(view.labels, minlength=head.classes)
        else:
            update = view.update_at(0)
            counts = labels.uniform_counts(head.bias_grad(update.gradient()), update.num_examples)
        present = [c for c in counts.argsort(stable=True).tolist() if int(counts[c]) > 0]
        return present + [c for c in range(head.classes) if c not in present]

    def start_cuts(self, view: View, head: labels.Head, target: int, rank: int) -> Move:
        """The first round on a feature: the reference if other classes are there, else a cut."""
        left = survivors(view, head, class_round(view))
        feature = int(left.features.argsort(descending=True, stable=True)[rank])
        if round(left.count) == left.examples:
            return Move(CUT, target, feature, float(left.features[feature]), self.feature_gain)
        return Move(FLOOR, target, feature, gain=self.feature_gain)

    def first_cut(self, view: View, head: labels.Head, move: Move) -> float:
        """The mean of the feature over the target class."""
        return float(survivors(view, head, class_round(view)).features[move.feature])

    def match(
        self,
        view: View,
        head: labels.Head,
        move: Move,
        alone: Survivors,
        generator: torch.Generator,
        watch: Watch,
    ) -> descent.Descended:
        """Gradient matching of one example on extractor and row c."""
        model = view.model
        # At b[c] far below every logit, label c has delta_c = -1 for any candidate.
        set_head(model, head, Move(CLASS, move.target, gain=1.0, beta=SHARPEST))
        with torch.no_grad():
            row = dict(model.named_parameters())[head.weight_name]
            if move.stage == CUT:
                row[move.target] = 0
                row[move.target, move.feature] = 1.0
        parameters = {n: p.detach() for n, p in model.named_parameters()}
        buffers = {n: b.detach() for n, b in model.named_buffers()}
        y = torch.tensor([move.target], device=alone.features.device)
        target = {n: -g / move.gain for n, g in alone.gradient.items() if n not in head_names(head)}
        target["row"] = -alone.features
        like = next(iter(target.values()))

        def objective(variables: Mapping[str, Tensor], t: Tensor) -> descent.Value:
            del t
            x = variables["x"]
            g = replay.gradient(model, parameters, buffers, x, y)
            mine = {n: g[n] for n in target if n != "row"}
            mine["row"] = g[head.weight_name][move.target]
            distance = matching.cosine(mine, target)
            total = distance + self.tv_weight * double_opponent_tv(x)
            return descent.Value(total, distance)

        start = init.normal((1, *view.input_shape), generator=generator, like=like)
        return descent.descend(
            objective,
            {"x": view.box.clip(start)},
            optimizer=descent.adam(self.lr),
            steps=self.steps,
            watch=watch,
            schedule=descent.cosine_decay(min(50 / self.steps, 0.5)),
            transform=descent.signed,
            after=[descent.inside(view.box, "x")],
        )


# -- heads -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Move:
    """One round's head.

    Args:
        stage: HONEST, CLASS, FLOOR or CUT.
        target: Class c.
        feature: k.
        theta: The cut.
        gain: gamma_c or gamma_f.
        beta: Bias of the other classes.
    """

    stage: int
    target: int = 0
    feature: int = 0
    theta: float = 0.0
    gain: float = 0.0
    beta: float = 0.0

    def to_tensor(self) -> Tensor:
        """For the read-out key."""
        values = [self.stage, self.target, self.feature, self.theta, self.gain, self.beta]
        return torch.tensor(values, dtype=torch.float64)

    @classmethod
    def of(cls, view: View, number: int) -> Move:
        """What was noted for a round."""
        stage, target, feature, theta, gain, beta = view.rounds[number].key["move"].tolist()
        return cls(int(stage), int(target), int(feature), theta, gain, beta)

    def sharper(self) -> Move:
        """The same round with ten times the contrast."""
        if self.stage == CLASS:
            return Move(CLASS, self.target, gain=self.gain, beta=10 * self.beta)
        return Move(CUT, self.target, self.feature, self.theta, 10 * self.gain)


def moves(view: View) -> list[Move]:
    """Every round so far."""
    return [Move.of(view, number) for number in range(len(view.rounds))]


def class_round(view: View) -> int:
    """The last round of class fishing."""
    return max(number for number, move in enumerate(moves(view)) if move.stage == CLASS)


def find_head(model: nn.Module, view: View) -> labels.Head:
    """The last linear layer.

    Raises:
        UnsupportedModel: If it has no bias, by which a class or a cut is chosen.
    """
    head = labels.find_head(model, example_input(model, view.input_shape))
    if head.bias_name is None:
        raise UnsupportedModel(
            f"Fishing sets thresholds by the bias of the head; {head.module_name} has none."
        )
    return head


def head_names(head: labels.Head) -> set[str | None]:
    """Parameter names of the head."""
    return {head.weight_name, head.bias_name}


def set_head(model: nn.Module, head: labels.Head, move: Move) -> None:
    """Write a move into the head, in place; an honest round leaves it alone."""
    if move.stage == HONEST:
        return
    assert head.bias_name is not None
    named = dict(model.named_parameters())
    with torch.no_grad():
        weight, bias = named[head.weight_name], named[head.bias_name]
        weight.zero_()
        if move.stage == CLASS:
            kept = float(bias[move.target])
            weight[move.target] = move.gain
            bias.fill_(move.beta)
            bias[move.target] = kept
            return
        weight[move.target, move.feature] = move.gain
        bias.zero_()
        # FLOOR: above every logit that a feature could reach from below.
        bias[move.target] = SHARPEST if move.stage == FLOOR else -move.gain * move.theta


# -- what a round shows ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Survivors:
    """Sum over the active examples, each with delta_c = +1.

    Args:
        count: How many there are.
        examples: N.
        features: ``(D,)`` their mean feature; zeros if there are none.
        gradient: Sum of their gradients, by name; meaningless in head rows j != c.
    """

    count: float
    examples: int
    features: Tensor
    gradient: dict[str, Tensor]


def survivors(view: View, head: labels.Head, number: int) -> Survivors:
    """The examples that a round of class fishing or a cut left active."""
    move = Move.of(view, number)
    update = view.update_at(number)
    n = update.num_examples
    gradient = {name: -n * g for name, g in update.gradient().items()}
    if move.stage == CUT:
        floor = [
            (i, m)
            for i, m in enumerate(moves(view)[:number])
            if m.stage == FLOOR and (m.target, m.feature) == (move.target, move.feature)
        ]
        if floor:
            at, reference = floor[-1]
            for name, g in view.update_at(at).gradient().items():
                # The head's weight enters the extractor's gradient as a factor, never its own.
                factor = 1.0 if name in head_names(head) else move.gain / reference.gain
                gradient[name] = gradient[name] + n * factor * g
    count = float(head.bias_grad(gradient)[move.target])
    row = head.weight_grad(gradient)[move.target]
    features = row / count if count > 0.5 else torch.zeros_like(row)
    return Survivors(count, n, features, gradient)


# -- inversion of a batch of one -------------------------------------------------------------------


def behind_linear(
    model: nn.Module, gradient: Mapping[str, Tensor], shape: tuple[int, ...]
) -> Tensor | None:
    """The input ``(1, C, H, W)`` by the row ratio of a first linear layer, or None without one."""
    names = {module: name for name, module in model.named_modules()}
    linear = next((m for m in model.modules() if isinstance(m, nn.Linear)), None)
    example = example_input(model, shape)
    try:
        links = surgery.chain(model, example)
    except UnsupportedModel:
        return None
    first = next((link for link in links if not isinstance(link.module, nn.Flatten)), None)
    if first is None or first.module is not linear or first.module is links[-1].module:
        return None
    name = names[first.module]
    if f"{name}.bias" not in gradient:
        return None
    g_w, g_b = gradient[f"{name}.weight"], gradient[f"{name}.bias"]
    if not bool(g_b.abs().max() > 0):
        return None
    return readout.combined_ratio(g_w, g_b).reshape(1, *shape)


def double_opponent_tv(x: Tensor) -> Tensor:
    """Total variation, p = 2, q = 0.5, of the channels and of their differences.

    The mean over ``(N, channels and differences, H - 1, W - 1)`` of the length of the gradient
    ``(right - here, below - here)``.

    Args:
        x: ``(N, C, H, W)``.
    """
    if x.shape[1] == 3:
        red, green, blue = x[:, 0:1], x[:, 1:2], x[:, 2:3]
        x = torch.cat([x, red - green, red - blue, green - blue], dim=1)
    right = x[..., :-1, 1:] - x[..., :-1, :-1]
    below = x[..., 1:, :-1] - x[..., :-1, :-1]
    return (right.square() + below.square() + matching.ROOT_EPSILON).sqrt().mean()
