r"""mGAN-AI: a GAN grows with the rounds, and its discriminator also asks whose images it sees.

Wang, Song, Zhang, Song, Wang and Qi, "Beyond Inferring Class Representatives: User-Level Privacy
Leakage From Federated Learning", INFOCOM 2019. A server that sees every client's own update over
many rounds, and holds labelled images of the task; the clients' protocol is untouched.

In every round t, from the state :math:`\theta_t` that all clients received:

1. **Labels** of every client k. The rows of the last layer's gradient are a mixture of what images
   of one class leave there, which the auxiliary images show; the class counts are the mixture's
   non-negative least squares.
2. **Representatives**, images that would have given the client's mean gradient :math:`\bar g_k`:

   .. math:: \hat X_k = \arg\min_X \; \lVert \nabla_\theta \mathcal L(X, \hat y_k) - \bar g_k
             \rVert^2 + \lambda \sum \big((\partial_x X)^2 + (\partial_y X)^2\big)^{\beta / 2},

   within the pixel box, by L-BFGS.
3. **The discriminator** is the received model without its last layer, under three heads: real or
   generated, category, and identity (the victim or another client),

   .. math:: L_D = -\mathrm E \log D_r(X_{aux}) - \mathrm E \log(1 - D_r(G))
             + \mathrm{CE}(D_c(X_{aux}), y_{aux}) + \mathrm{CE}(D_c(G), y)
             - \mathrm E \log D_i(\hat X_v) - \mathrm E_{k \ne v} \log(1 - D_i(\hat X_k)).

4. **The generator** :math:`G(z, y)`, labels drawn like the victim's, minimises
   :math:`-\log D_r(G) + \mathrm{CE}(D_c(G), y) - \mu \log D_i(G)`; it lives on over the rounds.

What comes out are samples of the victim's kind, its classes and its style, and no image of its
data set: PSNR against that set says nothing. Negatives are those of the same round.

Measured (study ``mgan_ai``, on ConvNets): what the updates tell is in the representatives. Most of
them are nearest to the portraits of the target person, where portraits of other people hardly ever
are; of clients with two digits each, where any image of these digits does better, after five rounds
twice as many as chance, after twenty no more than it. The GAN adds nothing to them. Its identity
term does move the samples towards the target: of one person's portraits, after twenty rounds, they
are nearest to the target in two trials of three with it and in none without, which is as often as
the representatives are; of digits they end no nearer to it than chance. A trial's samples hit or
miss together, so that it is the three trials that count, not the images of an interval. Why: within
the few hundred steps that rounds allow, the generator gives nearly one picture a label, whatever z
is, through linear and convolutional trunks alike, with group or batch normalisation, and whether or
not the trunk is renewed; which client that picture resembles changes from round to round. The
category head knows a generated image by that picture at once, so that its term soon teaches
nothing. Take ``steps=0``, the representatives alone, which a rehearsal tries too.

Departures:
    - Reconstructed: only the abstract and another library's step 2 could be read; losses and
      hyperparameters of the GAN are ours, after what is told of the paper elsewhere.
    - The discriminator follows the architecture under attack, whatever it is, in evaluation mode;
      the paper's network holds a softmax and 158 million weights.
    - Representatives are at most ``representatives`` images a client, and each round goes on from
      those of the round before.
    - Differences across the border of an image count as zero.
    - The active variant, in which the server trains the victim apart from the others, takes
      MANIPULATION and is not here.

Code: none was published. ``JonasGeiping/breaching``, ``config/attack/beyondinfering.yaml``, has
step 2.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from leakatlas.attacks.api import Attack, Outlook, Reconstruction, attack, nothing_found
from leakatlas.blocks import descent, init, labels, latent, matching, observed
from leakatlas.blocks.watch import Watch
from leakatlas.fl import View, replay
from leakatlas.models import Generator
from leakatlas.models.structure import example_input
from leakatlas.params import NonNegative, NonNegativeInt, Positive, PositiveInt
from leakatlas.priors.lesson import drawn_shape, widths
from leakatlas.threat import Knowledge

LATENT = 100
"""Length of z."""

BETA = 2.5
"""Exponent of the total variation."""

INNER = 20
"""Iterations of L-BFGS between two projections into the box."""

BETAS = (0.5, 0.999)
"""Of Adam, for both sides."""

FEWEST_PUBLIC = 8
"""Auxiliary images below which nothing is learned that could be called a population."""


@attack("mgan_ai", needs=Knowledge.UPDATES | Knowledge.BASIC | Knowledge.SURROGATE)
@dataclass(frozen=True, kw_only=True)
class MGANAI(Attack):
    """Representatives of every client in every round, and a multitask GAN over all rounds.

    Args:
        steps: Steps of discriminator and generator in a round; 0 leaves the GAN out and gives the
            victim's representatives of the last round.
        representative_steps: Steps of L-BFGS, of 20 iterations each, for a client in a round (400
            iterations).
        representatives: Images that stand for one client, at most as many as it has.
        tv_weight: Lambda, of the sum over the pixels of one image, in [0, 1].
        identity_weight: Mu, of the identity term of the generator.
        lr: Adam's step size for both sides (2e-4).
        batch_size: Generated and auxiliary images of a step.
    """

    counts = ("steps", "representative_steps")
    watches_others = True
    draws_on_prior = True

    steps: NonNegativeInt = 50
    representative_steps: PositiveInt = 20
    representatives: PositiveInt = 32
    tv_weight: NonNegative = 1.5e-4
    identity_weight: NonNegative = 1.0
    lr: Positive = 2e-4
    batch_size: PositiveInt = 32

    @classmethod
    def tuned(cls) -> Self:
        """Ours, shorter: fewer, faster steps."""
        return cls(representative_steps=3, representatives=16, lr=1e-3)

    @classmethod
    def variants(cls) -> Mapping[str, Self]:
        """Also the representatives alone, which the GAN seldom repairs where they are bad."""
        alone = cls(steps=0)
        return {"tuned": cls.tuned(), "published": cls(), "representatives": alone}

    def outlook(self, view: View) -> Outlook:
        """Whether there are clients to tell apart, and images of the task to learn from."""
        if len(view.input_shape) != 3:
            return Outlook("hopeless", f"it draws images, not inputs of {view.input_shape}")
        if not view.rounds:
            return Outlook("unknown", "no round was seen yet")
        if len(auxiliary(view)[1]) < FEWEST_PUBLIC:
            return Outlook("hopeless", "no public images bear the labels of the model's classes")
        if not view.has("others"):
            return Outlook(
                "hopeless",
                "it tells the victim's updates from those of other clients, and none are seen "
                "here: it takes a server that reads each client's own update",
            )
        gives = "it gives samples of the client's classes and style, no image of its data set"
        return Outlook(
            "unknown", f"{gives}; {len(view.rounds)} rounds are seen, the more the better"
        )

    def run(self, view: View, *, generator: torch.Generator, watch: Watch) -> Reconstruction:
        """Round by round: labels, representatives, discriminator and generator."""
        x_aux, y_aux = auxiliary(view)
        if len(y_aux) < FEWEST_PUBLIC:
            return nothing_found(
                view.input_shape,
                f"{len(y_aux)} public images bear the labels of the model's classes; it takes "
                f"{FEWEST_PUBLIC}",
            )
        channels, size, _ = drawn_shape(view.input_shape)
        G = Generator(
            latent=LATENT, channels=channels, size=size, widths=widths(size),
            classes=view.classes, seed=_seed(generator),
        ).to(x_aux)  # fmt: skip
        images = latent.to_model_space(view.input_shape, view.box)
        heads = Heads(self.features(view), view.classes, seed=_seed(generator)).to(x_aux)
        optimizer = torch.optim.Adam(G.parameters(), lr=self.lr, betas=BETAS)
        kept: dict[int | None, Tensor] = {}
        met: Met | None = None
        numbers = range(len(view.rounds)) if self.steps else [len(view.rounds) - 1]
        for number, part in zip(numbers, watch.share(len(numbers)), strict=False):
            seen = clients_of(view, number)
            if not self.steps:
                seen = {None: seen[None]}
            parts = part.share([1.0] * len(seen) + [float(len(seen))] * (self.steps > 0))
            now: dict[int | None, Represented] = {}
            for client, own in seen.items():
                piece = next(parts, None)
                if piece is None:
                    break
                now[client] = self.represent(
                    own, x_aux, y_aux, kept.get(client), generator=generator, watch=piece
                )
            kept |= {client: found.x for client, found in now.items()}
            if None not in now:
                break
            D = Discriminator(trunk_of(view.model_at(number), view.input_shape), heads)
            met = Met(D, now[None], [found.x for c, found in now.items() if c is not None])
            for piece in parts:
                self.train(met, G, optimizer, images, x_aux, y_aux, generator, piece)
        if met is None:
            return nothing_found(view.input_shape, "the time ended before the first round was met")
        notes = {
            "clients": float(len(kept)),
            "representative_loss": met.victim.loss,
            "identity_gap": met.gap(),
        }
        if not self.steps:  # nobody taught the discriminator
            x_hat, y_hat = met.victim.x, met.victim.y
            confidence = torch.full((len(y_hat),), -met.victim.loss)
        else:
            y_hat = estimated_labels(clients_of(view, -1)[None], x_aux, y_aux, view.num_examples)
            with torch.no_grad():
                z = init.normal((len(y_hat), LATENT), generator=generator, like=x_aux)
                x_hat = images(G(z, y_hat))
                told = met.D(x_hat)
                confidence = F.logsigmoid(told.real) + F.logsigmoid(told.identity)
        return Reconstruction(
            images=view.box.clip(x_hat.detach()),
            labels=y_hat,
            confidence=confidence.double(),
            notes=notes,
        )

    def features(self, view: View) -> int:
        """Length of what the model's last layer reads."""
        model = view.model
        return labels.find_head(model, example_input(model, view.input_shape)).in_features

    def represent(
        self,
        own: View,
        x_aux: Tensor,
        y_aux: Tensor,
        start: Tensor | None,
        *,
        generator: torch.Generator,
        watch: Watch,
    ) -> Represented:
        """Step 2: images that would have given one client's update.

        Args:
            own: The round with this client for its target.
            x_aux: Auxiliary images ``(A, C, H, W)``, model space.
            y_aux: Their labels ``(A,)``.
            start: Where to go on; noise if None.
            generator: Of the noise.
            watch: Budget.
        """
        count = min(own.num_examples, self.representatives)
        y = estimated_labels(own, x_aux, y_aux, count)
        if start is None or len(start) != count:
            shape = (count, *own.input_shape)
            start = init.uniform(shape, generator=generator, like=x_aux, box=own.box)
        g, mean_gradient = observed.mean_gradient(own), gradient_of(own)

        def objective(variables: descent.Variables, t: Tensor) -> descent.Value:
            del t
            distance = matching.squared_l2(mean_gradient(variables["x"], y), g)
            smooth = total_variation(own.box.denormalize(variables["x"])) / count
            return descent.Value(distance + self.tv_weight * smooth, distance)

        found = descent.descend(
            objective,
            {"x": start},
            optimizer=descent.lbfgs(inner=INNER, line_search=True),
            steps=self.representative_steps,
            watch=watch,
            after=(descent.inside(own.box, "x"),),
        )
        return Represented(found.best["x"], y, float(found.criterion))

    def train(
        self,
        met: Met,
        G: Generator,
        optimizer: torch.optim.Adam,
        images: latent.Images,
        x_aux: Tensor,
        y_aux: Tensor,
        generator: torch.Generator,
        watch: Watch,
    ) -> None:
        """Steps 3 and 4: some steps of both sides in one round."""
        D, y_victim = met.D, met.victim.y
        critic = torch.optim.Adam(D.parameters(), lr=self.lr, betas=BETAS)
        for _ in watch.steps(self.steps, stretches=True):
            y = y_victim[_drawn(len(y_victim), self.batch_size, generator).to(y_victim.device)]
            z = init.normal((len(y), LATENT), generator=generator, like=x_aux)
            real = _drawn(len(y_aux), self.batch_size, generator).to(y_aux.device)
            fake = images(G(z, y))
            loss = discriminator_loss(
                D(x_aux[real]), y_aux[real], D(fake.detach()), y,
                D(met.victim.x), [D(x) for x in met.others],
            )  # fmt: skip
            critic.zero_grad()
            loss.backward()
            critic.step()
            loss = generator_loss(D(fake), y, identity_weight=self.identity_weight)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


# -- what is seen ----------------------------------------------------------------------------------


def auxiliary(view: View) -> tuple[Tensor, Tensor]:
    """Public images in model space, and their labels, of the model's classes alone."""
    like = next(iter(view.update.tensors.values()))
    images = view.surrogate
    if images.labels.dim() != 1:
        return view.box.normalize(images.images[:0].to(like)), images.labels[:0, 0].long()
    ours = images.labels < view.classes
    x = view.box.normalize(images.images[ours].to(like))
    return x, images.labels[ours].to(x.device)


def clients_of(view: View, number: int) -> dict[int | None, View]:
    """One round with every client for its target; the victim is called None."""
    others = view.others[number]
    victim = view.with_rounds([view.rounds[number]], {}).without("labels")
    return {None: victim, **{client: view.beside(client, number) for client in sorted(others)}}


def gradient_of(own: View) -> Callable[[Tensor, Tensor], dict[str, Tensor]]:
    """``(x, y) -> mean gradient`` at the state that the round began with."""
    model = replay.without_running_statistics(own.model)
    parameters = dict(model.named_parameters())
    wanted = {name: parameters[name].detach() for name in own.update.tensors}
    held = {name: buffer.detach() for name, buffer in model.named_buffers()}

    def loss(logits: Tensor, y: Tensor) -> Tensor:
        return own.loss(logits, y, "mean")

    return lambda x, y: replay.gradient(model, wanted, held, x, y, loss=loss)


def estimated_labels(own: View, x_aux: Tensor, y_aux: Tensor, count: int) -> Tensor:
    r"""Step 1: labels ``(count,)`` in ascending order, from the rows of the last layer's gradient.

    A batch of :math:`n_k` images of class k leaves :math:`\sum_k n_k A_k / N` there, where
    :math:`A_k` is the mean over the auxiliary images of class k: of the bias gradient if there is
    a bias, else of the row sums of the weight gradient. Behind several local steps it is the mean
    of what the state before and the client's own state after them say.
    """
    model = own.model
    head = labels.find_head(model, example_input(model, own.input_shape))
    g, update = observed.mean_gradient(own), own.update
    states: list[dict[str, Tensor]] = [{}]
    if update.kind == "delta":
        before = dict(model.named_parameters())
        states.append({n: before[n].detach() + t for n, t in update.quantity().items()})
    rows = (head.weight_grad(g).sum(1) if head.bias_name is None else head.bias_grad(g)).double()
    parts = []
    for weights in states:
        seen = labels.head_pass(model, head, x_aux, y_aux, weights=weights)
        parts.append(
            labels.class_row_sums(seen)
            if head.bias_name is None
            else labels.confusion(seen) - torch.eye(head.classes).to(rows)
        )
    from scipy.optimize import nnls  # half a second to import

    A, ones = torch.stack(parts).mean(0), torch.ones_like(rows)
    shares, _ = nnls(
        torch.cat([A.T, ones[None]]).cpu().numpy(), torch.cat([rows, ones[:1]]).cpu().numpy()
    )
    counts = labels.round_counts(count * torch.from_numpy(shares).to(rows), count)
    return labels.labels_from_counts(counts)


# -- the networks ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Represented:
    """A client's representatives in model space, their labels, and their distance."""

    x: Tensor
    y: Tensor
    loss: float


@dataclass(frozen=True)
class Told:
    """What a discriminator says of images: logits ``(N,)``, ``(N, K)`` and ``(N,)``."""

    real: Tensor
    category: Tensor
    identity: Tensor


class Heads(nn.Module):
    """Three linear maps of features ``(N, features)``; they live on over the rounds."""

    def __init__(self, features: int, classes: int, *, seed: int) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            self.real, self.identity = nn.Linear(features, 1), nn.Linear(features, 1)
            self.category = nn.Linear(features, classes)

    def forward(self, h: Tensor) -> Told:
        """What they say."""
        return Told(self.real(h)[:, 0], self.category(h), self.identity(h)[:, 0])


class Discriminator(nn.Module):
    """The received model without its last layer, under the heads."""

    def __init__(self, trunk: nn.Module, heads: Heads) -> None:
        super().__init__()
        self.trunk, self.heads = trunk, heads

    def forward(self, x: Tensor) -> Told:
        """What it says of images in model space ``(N, C, H, W)``."""
        told: Told = self.heads(self.trunk(x).flatten(1))
        return told


@dataclass(frozen=True)
class Met:
    """One round: its discriminator, the victim's representatives, and those of every other."""

    D: Discriminator
    victim: Represented
    others: Sequence[Tensor]

    def gap(self) -> float:
        """By how much likelier the victim's representatives are called its own than others'."""
        if not self.others:
            return 0.0
        with torch.no_grad():
            own = self.D(self.victim.x).identity.sigmoid().mean()
            return float(own - self.D(torch.cat(list(self.others))).identity.sigmoid().mean())


def trunk_of(model: nn.Module, shape: tuple[int, ...]) -> nn.Module:
    """The model without its last layer, in evaluation mode, all of it trainable; in place."""
    head = labels.find_head(model, example_input(model, shape))
    model.set_submodule(head.module_name, nn.Identity())
    return model.eval().requires_grad_(True)


# -- the losses ------------------------------------------------------------------------------------


def total_variation(x: Tensor) -> Tensor:
    """TV of exponent beta, summed over all pixels and channels of ``(N, C, H, W)``."""
    across = F.pad(x[..., :, 1:] - x[..., :, :-1], (0, 1))
    down = F.pad(x[..., 1:, :] - x[..., :-1, :], (0, 0, 0, 1))
    return (across.square() + down.square()).pow(BETA / 2).sum()


def discriminator_loss(
    real: Told, y_real: Tensor, fake: Told, y_fake: Tensor, victim: Told, others: Sequence[Told]
) -> Tensor:
    """All three tasks; the identity of others is averaged over the clients."""
    loss = F.softplus(-real.real).mean() + F.softplus(fake.real).mean()
    loss = loss + F.cross_entropy(real.category, y_real) + F.cross_entropy(fake.category, y_fake)
    loss = loss + F.softplus(-victim.identity).mean()
    if others:
        loss = loss + torch.stack([F.softplus(o.identity).mean() for o in others]).mean()
    return loss


def generator_loss(fake: Told, y: Tensor, *, identity_weight: float) -> Tensor:
    """To look real, of its label, and the victim's."""
    loss = F.softplus(-fake.real).mean() + F.cross_entropy(fake.category, y)
    return loss + identity_weight * F.softplus(-fake.identity).mean()


def _seed(generator: torch.Generator) -> int:
    return int(torch.randint(2**31, (1,), generator=generator))


def _drawn(size: int, count: int, generator: torch.Generator) -> Tensor:
    """``count`` indices below ``size``, with repetitions."""
    return torch.randint(size, (count,), generator=generator, device=generator.device)
