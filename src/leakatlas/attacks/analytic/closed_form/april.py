r"""APRIL: the gradient of the position embedding gives away every token of a vision transformer.

Lu, Zhang, Zhao, He and Cheng, "APRIL: Finding the Achilles' Heel on Privacy for Vision
Transformers", CVPR 2022. FedSGD, one example, one round, passive. Letter B: the gradient, the
weights, the pixel box.

Tokens z = [cls; E x_p + e] + E_pos, ``(T, d)``, feed nothing but the linear maps Q, K, V of the
first attention ("architecture A": no LayerNorm before it, no residual around it). Then

.. math:: A := \frac{\partial L}{\partial E_{pos}} = \frac{\partial L}{\partial z}
          = \sum_\bullet G^\bullet W_\bullet , \qquad
          \frac{\partial L}{\partial W_\bullet} = G^{\bullet T} z
          \quad\Longrightarrow\quad
          A^T z = \sum_\bullet W_\bullet^T \frac{\partial L}{\partial W_\bullet} =: b .

1. z by least squares; unique if rank A = T. That needs T <= d and, with a head on the class token,
   a second block: behind the last one, only the class token's query is used, so A has at most rank
   2 * heads + 1.
2. Patches: subtract what an empty image would give, x_p = E^+ (z - z_0); unique if d >= P^2 C.

No label, no loss, no scale enters: a weight change of one SGD step does as well as a gradient.
*Optimization form*, for any vision transformer with learned positions:

.. math:: \min_x \; \lVert \nabla' - \nabla \rVert^2
          + \alpha \Bigl(1 - \cos\bigl(\partial L'/\partial E_{pos},
                                       \partial L/\partial E_{pos}\bigr)\Bigr),

with the label by iDLG.

What the closed form needs is found on the adversary's own copy: a random image is embedded, and
the two identities above must hold for it to rounding. So a LayerNorm, a residual, or an unusual
embedding is noticed before anything is claimed. On the observed gradient, the tokens that no image
changes (the class token) must come out as the model has them.

Departures:
    - Names of layers play no part: the maps are those that read the tokens, fused or not; the
      ported version takes gradients by position in a list.
    - Singular values of A below ``tolerance`` are cut (``token_rank`` counts the others): on a
      float32 gradient that is better than solving for directions that drown in rounding. Where the
      *model* leaves the rank below T or below P^2 C, the minimum-norm tokens or patches come as
      ``failed``, with the ranks in the notes.
    - Optimizer, step size and alpha of the optimization form are not known to us; Adam at 0.1 and
      alpha = 1 are ours, as is the number of steps. On small untrained transformers the position
      term changes nothing that we can measure, for alpha from 0 to 100. It adds no equation, as
      the squared distance holds the positions' gradient too; it only weighs it more, and a bounded
      cosine has a slope thousands of times smaller than a distance of gradients of that size.

Independent port: ``JonasGeiping/breaching``, ``breaching/attacks/analytic_attack.py``. The
authors' code is not published.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from leakatlas.attacks.api import Attack, Outlook, Reconstruction, attack, nothing_found
from leakatlas.blocks import descent, init, labels, matching, readout
from leakatlas.blocks.observed import mean_gradient
from leakatlas.blocks.watch import Watch
from leakatlas.errors import UnsupportedModel
from leakatlas.fl import View, task_loss
from leakatlas.models.structure import example_input
from leakatlas.params import NonNegative, Positive, PositiveInt
from leakatlas.threat import Knowledge

IDENTITY = 1e-8
"""Largest relative error, in float64, at which the identities count as holding on a probe."""


@attack("april", needs=Knowledge.UPDATES | Knowledge.BASIC)
@dataclass(frozen=True, kw_only=True)
class APRIL(Attack):
    """Two linear systems: tokens, then patches; or matching with a term on the positions.

    Args:
        variant: ``closed_form``, or ``optimization`` for other vision transformers.
        tolerance: Singular values below this share of the largest count as zero; None for 1e-11
            if the gradient came in float64 and 1e-6 otherwise.
        largest_residual: Relative misfit of the token system, or of the known tokens, above which
            the result is called failed.
        alpha: Weight of the position term (optimization).
        steps: Iterations (optimization).
        lr: Step size of Adam, in model space (optimization).
    """

    variant: Literal["closed_form", "optimization"] = "closed_form"
    tolerance: Positive | None = None
    largest_residual: Positive = 1e-2
    alpha: NonNegative = 1.0
    steps: PositiveInt = 4_000
    lr: Positive = 0.1

    def outlook(self, view: View) -> Outlook:
        """The preconditions: one example, learned positions, direct feed, and the two ranks."""
        if view.num_examples != 1:
            return Outlook(
                "hopeless", f"APRIL inverts one example; the update holds {view.num_examples}"
            )
        try:
            front = find_front(view.model, view.input_shape)
        except UnsupportedModel as problem:
            return Outlook("hopeless", str(problem))
        if view.rounds and not bool(positions_gradient(view, front)):
            return Outlook("hopeless", f"the update has no gradient of {front.positions}")
        if self.variant == "optimization":
            return Outlook("unknown", "gradient matching with the positions; nothing is promised")
        broken = front.broken()
        if broken:
            return Outlook("hopeless", broken)
        if front.tokens > front.width:
            return Outlook(
                "hopeless",
                f"{front.tokens} tokens exceed the width {front.width}, so they are not determined",
            )
        if front.rank < front.tokens:
            return Outlook(
                "hopeless",
                f"on a random image the positions' gradient has rank {front.rank}, so "
                f"{front.tokens} tokens are not determined (is the first block the last?)",
            )
        if front.width < front.pixels:
            return Outlook(
                "unknown",
                f"the tokens are exact, but a width of {front.width} determines only "
                f"{front.width} of {front.pixels} directions of a patch",
            )
        return Outlook("applicable", "attention reads the embedded tokens; both systems are square")

    def run(self, view: View, *, generator: torch.Generator, watch: Watch) -> Reconstruction:
        """Tokens, patches, picture."""
        shape = tuple(view.input_shape)
        if view.num_examples != 1:
            return nothing_found(
                shape, f"APRIL inverts one example; the update holds {view.num_examples}"
            )
        front = find_front(view.model, shape)
        if not positions_gradient(view, front):
            return nothing_found(shape, f"the update has no gradient of {front.positions}")
        if self.variant == "optimization":
            return self.match(view, front, generator, watch)
        broken = front.broken()
        if broken:
            return nothing_found(shape, broken, identity_error=front.identity_error)
        a, b = token_system(view, front)
        like = view.update.tensors[front.positions]
        cut = self.tolerance or (1e-11 if like.dtype == torch.float64 else 1e-6)
        solved = solve_rows(a.T, b, cut)
        z = solved.x
        patches = solve_rows(front.embedding, (z - front.empty)[front.prefix :].T, 1e-12)
        x_hat = F.fold(patches.x[None], shape[1:], kernel_size=front.kernel, stride=front.kernel)
        known = z[: front.prefix] - front.empty[: front.prefix]
        scale = front.empty[: front.prefix].norm().clamp(min=torch.finfo(z.dtype).tiny)
        notes = {
            "residual": solved.residual,
            "condition": solved.condition,
            "token_rank": float(solved.rank),
            "tokens": float(front.tokens),
            "patch_rank": float(patches.rank),
            "patch_length": float(front.pixels),
        }
        reasons = []
        if front.prefix:
            notes["known_token_error"] = float(known.norm() / scale)
        if max(solved.residual, notes.get("known_token_error", 0.0)) > self.largest_residual:
            reasons.append("the equations contradict each other")
        if front.rank < front.tokens:
            reasons.append(
                f"the position gradient determines {front.rank} of {front.tokens} tokens"
            )
        if patches.rank < front.pixels:
            reasons.append(
                f"the embedding determines {patches.rank} of {front.pixels} directions of a patch"
            )
        return Reconstruction(
            images=view.box.clip(x_hat.to(like)),
            labels=label_of(view) if view.update.kind == "gradient" else None,
            confidence=torch.tensor([-solved.residual], dtype=torch.float64),
            notes=notes,
        ).or_failed("; ".join(reasons))

    def match(
        self, view: View, front: Front, generator: torch.Generator, watch: Watch
    ) -> Reconstruction:
        """The optimization form."""
        g = dict(view.update.tensors)
        y = label_of(view)
        replay = view.replayer()
        on_positions = matching.subset(matching.cosine, [front.positions])

        def objective(variables: descent.Variables, t: Tensor) -> descent.Value:
            del t
            mine = replay(variables["x"], y)
            total = matching.squared_l2(mine, g) + self.alpha * on_positions(mine, g)
            return descent.Value(total, total)

        start = init.normal(view.batch_shape, generator=generator, like=g[front.positions])
        found = descent.descend(
            objective,
            {"x": start},
            optimizer=descent.adam(self.lr),
            steps=self.steps,
            watch=watch,
            after=(descent.inside(view.box, "x"),),
        )
        loss = float(found.criterion)
        return Reconstruction(
            images=found.best["x"],
            labels=y,
            confidence=torch.tensor([-loss], dtype=torch.float64),
            notes={"objective": loss, "iterations": float(found.steps)},
        ).or_failed(found.trouble)


def label_of(view: View) -> Tensor:
    """The label ``(1,)``: granted, else by the rule of iDLG."""
    if view.has("labels"):
        return view.labels
    g = mean_gradient(view)
    head = labels.find_head(view.model, example_input(view.model, view.input_shape))
    return labels.target_of_one(view.loss, g, head, view.model)


# -- the front of a vision transformer -------------------------------------------------------------


@dataclass(frozen=True)
class Front:
    """Where the image enters, found on the adversary's own copy of the model, in float64.

    Args:
        positions: Parameter name of the position embedding.
        readers: Weight names of the linear maps that read the tokens.
        weights: Their weights, by name, ``(out, d)``.
        embedding: E ``(d, P^2 C)``.
        kernel: Side lengths of a patch.
        empty: z of an all-zero image ``(T, d)``.
        prefix: Leading tokens that hold no patch.
        rank: Of A on a random image.
        identity_error: Of A^T z = b on a random image, relative.
        embedding_error: Of z - z_0 = E x_p on a random image, relative.
    """

    positions: str
    readers: tuple[str, ...]
    weights: Mapping[str, Tensor]
    embedding: Tensor
    kernel: tuple[int, int]
    empty: Tensor
    prefix: int
    rank: int
    identity_error: float
    embedding_error: float

    @property
    def tokens(self) -> int:
        """How many there are, T."""
        return self.empty.shape[0]

    @property
    def width(self) -> int:
        """Length of a token, d."""
        return self.empty.shape[1]

    @property
    def pixels(self) -> int:
        """P^2 C."""
        return self.embedding.shape[1]

    def broken(self) -> str:
        """Why the closed form does not hold on this model; empty if it does."""
        if self.embedding_error > IDENTITY:
            return (
                "what the first attention reads is not an affine function of the patches (a norm "
                f"before it?): relative error {self.embedding_error:.1e} on a random image"
            )
        if self.identity_error > IDENTITY:
            return (
                "the tokens feed more than the first attention (a residual around it?): relative "
                f"error {self.identity_error:.1e} of the token system on a random image"
            )
        return ""


def find_front(model: nn.Module, shape: tuple[int, ...]) -> Front:
    """Patch embedding, positions and the maps that read the tokens, and how well they fit.

    Args:
        model: A copy that the caller owns; it ends up in float64 and eval mode.
        shape: ``(C, H, W)``.

    Raises:
        UnsupportedModel: If a part is missing.
    """
    model = model.double().eval()
    names = {module: name for name, module in model.named_modules()}
    name, conv = patch_convolution(model)
    probe = torch.Generator().manual_seed(0)
    x = torch.rand(1, *shape, generator=probe, dtype=torch.float64)
    x = x.to(conv.weight.device)
    empty, _ = tokens_of(model, torch.zeros_like(x))
    z, readers = tokens_of(model, x)
    places = [
        parameter_name
        for parameter_name, p in model.named_parameters()
        if p.shape[-2:] == z.shape and p.numel() == z.numel()
    ]
    if not places:
        raise UnsupportedModel(
            f"APRIL needs a learned position embedding of {z.shape[0]} x {z.shape[1]}; "
            f"{type(model).__name__} has no such parameter."
        )
    weights = {f"{names[reader]}.weight": reader.weight.detach() for reader in readers}
    wanted = {places[0], *weights}
    named = {n: p for n, p in model.named_parameters() if n in wanted}
    loss = task_loss(model(x), torch.zeros(1, dtype=torch.int64, device=x.device))
    g = dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))
    kernel = (conv.kernel_size[0], conv.kernel_size[1])
    patches = F.unfold(x, kernel, stride=kernel)[0].T  # (patches, P^2 C)
    embedding = conv.weight.detach().flatten(1)
    prefix = z.shape[0] - len(patches)
    if prefix < 0:
        raise UnsupportedModel(
            f"{name} makes {len(patches)} patches, but the first attention reads {z.shape[0]} "
            "tokens; APRIL needs every patch as a token."
        )
    moved = z - empty
    expected = torch.cat([torch.zeros_like(moved[:prefix]), patches @ embedding.T])
    a = g[places[0]].reshape(z.shape)
    b = sum((w.T @ g[n] for n, w in weights.items()), torch.zeros_like(a.T @ z))
    return Front(
        positions=places[0],
        readers=tuple(weights),
        weights=weights,
        embedding=embedding,
        kernel=kernel,
        empty=empty,
        prefix=prefix,
        rank=int(torch.linalg.matrix_rank(a, rtol=1e-10)),
        identity_error=relative(a.T @ z - b, b),
        embedding_error=relative(moved - expected, expected),
    )


def patch_convolution(model: nn.Module) -> tuple[str, nn.Conv2d]:
    """The convolution that cuts an image into disjoint patches.

    Raises:
        UnsupportedModel: If the first convolution is none.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            disjoint = module.kernel_size == module.stride and module.dilation == (1, 1)
            if disjoint and module.padding in ((0, 0), "valid") and module.groups == 1:
                return name, module
            break
    raise UnsupportedModel(
        f"APRIL inverts vision transformers; {type(model).__name__} does not begin with a "
        "convolution whose stride is its kernel."
    )


def tokens_of(model: nn.Module, x: Tensor) -> tuple[Tensor, tuple[nn.Linear, ...]]:
    """What the first linear map over tokens reads, ``(T, d)``, and all that read the same.

    Raises:
        UnsupportedModel: If no linear layer reads a ``(1, T, d)`` tensor.
    """
    seen: list[tuple[nn.Linear, Tensor]] = []

    def note(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        del output
        if isinstance(module, nn.Linear) and inputs[0].dim() == 3:
            seen.append((module, inputs[0].detach()))

    handles = [m.register_forward_hook(note) for m in model.modules() if isinstance(m, nn.Linear)]
    try:
        with torch.no_grad():
            model(x)
    finally:
        for handle in handles:
            handle.remove()
    if not seen:
        raise UnsupportedModel(
            f"APRIL inverts vision transformers; no linear layer of {type(model).__name__} reads "
            "a sequence of tokens."
        )
    first = seen[0][1]
    readers = tuple(m for m, given in seen if given.data_ptr() == first.data_ptr())
    return first[0].clone(), readers


def relative(error: Tensor, to: Tensor) -> float:
    """Norm of an error, over the norm of what it is an error of."""
    return float(error.norm() / to.norm().clamp(min=torch.finfo(to.dtype).tiny))


# -- the two systems -------------------------------------------------------------------------------


def positions_gradient(view: View, front: Front) -> bool:
    """Whether the update moves the positions at all; a frozen embedding does not."""
    name = front.positions
    if name not in view.update.tensors:
        return False
    return bool(readout.sent_change(view.update, view.rounds[-1].state, name).any())


def token_system(view: View, front: Front) -> tuple[Tensor, Tensor]:
    """A ``(T, d)`` and b ``(d, d)`` of A^T z = b, up to one common factor."""
    update, state = view.update, view.rounds[-1].state
    a = readout.sent_change(update, state, front.positions).double()
    a = a.reshape(front.tokens, front.width)
    b = torch.zeros(front.width, front.width, dtype=a.dtype, device=a.device)
    for name in front.readers:
        b = b + front.weights[name].T @ readout.sent_change(update, state, name).double()
    return a, b


@dataclass(frozen=True)
class Solved:
    """A least-squares solution of minimum norm.

    Args:
        x: ``(n, k)``.
        rank: Directions that the matrix determines.
        condition: Largest over smallest kept singular value.
        residual: Relative to the right-hand side.
    """

    x: Tensor
    rank: int
    condition: float
    residual: float


def solve_rows(matrix: Tensor, right: Tensor, tolerance: float) -> Solved:
    """``argmin |matrix x - right|`` without singular values below ``tolerance`` of the largest.

    Args:
        matrix: ``(m, n)``.
        right: ``(m, k)``.
        tolerance: Relative.
    """
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    kept = s > tolerance * s[0]
    x = vh[kept].T @ ((u[:, kept].T @ right) / s[kept][:, None])
    rank = int(kept.sum())
    condition = float(s[0] / s[rank - 1]) if rank else float("inf")
    return Solved(x, rank, condition, relative(matrix @ x - right, right))
