"""Our side of the comparisons with official code, on inputs made from seeds.

A function a row, of the row's name: it gives the figures whose official values are kept in
``results/differential``, with repository, commit and tolerance. A tensor stands for its product
with a random direction (:func:`leakatlas.bench.differential.number`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import islice

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d

from leakatlas import models
from leakatlas.attacks.analytic.closed_form.april import APRIL
from leakatlas.attacks.analytic.closed_form.rgap import solve_convolution
from leakatlas.attacks.analytic.isolation import mkor as mkor_row
from leakatlas.attacks.analytic.isolation.scale_mia import Parts, write_bins
from leakatlas.attacks.analytic.isolation.seer import SEER, schedule
from leakatlas.attacks.analytic.sparsification.fishing import CLASS, CUT, Move, set_head
from leakatlas.attacks.generative.direct.fgla import separate
from leakatlas.attacks.generative.direct.grnn import GRNN, TwoBranches
from leakatlas.attacks.generative.direct.grnn import tv as smoothness
from leakatlas.attacks.generative.direct.lti import LTI
from leakatlas.attacks.generative.latent import ggl as ggl_row
from leakatlas.attacks.generative.latent.gifd import project_l1, ramp
from leakatlas.attacks.generative.online import mgan_ai as mgan_ai_row
from leakatlas.attacks.optimization.augmented.gi_pip import Autoencoder, anomaly
from leakatlas.attacks.optimization.augmented.mjolnir import flat, padded, reverse, unflat
from leakatlas.attacks.optimization.augmented.rog import enlarged
from leakatlas.attacks.optimization.basic.cpa import CPA
from leakatlas.attacks.optimization.basic.dia import DIA
from leakatlas.attacks.optimization.basic.dlfa import DLFA, outside
from leakatlas.attacks.optimization.basic.e2egi import stage_lengths, stage_rates
from leakatlas.attacks.optimization.basic.hf_gradinv import HFGradInv, quantised
from leakatlas.attacks.optimization.basic.sme import SME
from leakatlas.bench.differential import (
    Figures,
    along,
    draw,
    filled,
    gradient,
    slope,
    staged,
    uniform,
)
from leakatlas.bench.examine import errors
from leakatlas.bench.harness import run_trial
from leakatlas.blocks import (
    batchnorm,
    descent,
    epochs,
    labels,
    matching,
    observed,
    priors,
    readout,
    separation,
    surgery,
)  # fmt: skip
from leakatlas.blocks.labels.profiles import fitness
from leakatlas.blocks.watch import Watch
from leakatlas.data import CIFAR10, Box
from leakatlas.defenses.formal.dp._mechanism import clip
from leakatlas.defenses.formal.dp.flower_clipping import FlowerClipping
from leakatlas.defenses.formal.dp.local_dp_mod import LocalDpMod
from leakatlas.defenses.formal.dp.svt_privacy import SVTPrivacy
from leakatlas.defenses.heuristic.learning import fragmented_fl as ffl
from leakatlas.defenses.heuristic.learning.ats._search import accuracy_score, privacy_score
from leakatlas.defenses.heuristic.learning.dcs2 import DCS2, drawn_back
from leakatlas.defenses.heuristic.learning.vicinal_augmentation import VicinalAugmentation
from leakatlas.defenses.heuristic.model.fedkl import KeyLock
from leakatlas.defenses.heuristic.model.precode import Bottleneck
from leakatlas.defenses.heuristic.perturbation import grad_defense as slices
from leakatlas.defenses.heuristic.perturbation import outpost as sparing
from leakatlas.defenses.heuristic.perturbation import soteria as features
from leakatlas.defenses.heuristic.perturbation.censor import orthogonal
from leakatlas.defenses.heuristic.perturbation.gradient_pruning import kept
from leakatlas.defenses.heuristic.perturbation.percentile_privacy import filtered
from leakatlas.defenses.heuristic.perturbation.quantization import quantised as quantised_to
from leakatlas.fl import (
    ClientContext,
    FedAVG,
    FedSGD,
    Update,
    batchnorm_statistics,
    edits,
    replay,
    stream,
)  # fmt: skip
from leakatlas.priors.ddpm import noised
from leakatlas.priors.prior import linear_schedule


def april() -> Figures:
    """The image of least norm of a transformer too narrow for its patches."""
    scene = staged("vit", 1, size=16, letter="B", first_block="april", dim=32, classes=8, seed=0)
    return {"error of the image": errors(run_trial(scene, APRIL()))[0]}


def ats() -> Figures:
    """The area of a way of twenty steps, and the score of an untrained network's slopes."""
    model = models.build("convnet", size=8, width=4, classes=10, act="sigmoid", seed=3).double()
    x, way = uniform(300, 6, 3, 8, 8), uniform(301, 1, 3, 8, 8)
    return {
        "privacy score": privacy_score(model, x[:1], torch.tensor([7]), way),
        "accuracy score": accuracy_score(model, x),
    }


def censor() -> Figures:
    """One orthogonal direction, to a gradient of norm 1 and to one of norm 5."""
    g, r = draw(220, 30, 7), draw(221, 30, 7)
    return {
        f"to a gradient of norm {size}": orthogonal(r, size * g / g.norm(), released=True)
        for size in (1, 5)
    }


def cpa() -> Figures:
    """Every term of the separation of four flat images, and on embeddings, and its slope."""
    mixed = draw(63, 16, 4) @ uniform(62, 4, 3, 8, 8).flatten(1)
    u = (torch.eye(4, dtype=torch.float64) + 0.3 * draw(64, 4, 4)).requires_grad_()
    attack = CPA(
        negentropy="off", decorrelation=1.47, temperature=3.0, embedding_decorrelation=1.47,
        embedding_temperature=3.0, tv_weight=3.1, sign_weight=0.13, l1_weight=5.0,
    )  # fmt: skip
    white = separation.whiten(mixed, 4)
    figures: dict[str, Tensor | float] = {"whitened rows, squared": white.Z.square()}
    for reads_image, kind in ((True, "images"), (False, "embeddings")):
        layer = separation.Mixture("fc", nn.Linear(192, 16), reads_image)
        terms = attack.terms(u, white, layer, (3, 8, 8))
        figures |= {f"{name} of {kind}": term for name, term in terms.items()}
        figures[f"slope of {kind}"] = slope(torch.stack(list(terms.values())).sum(), u)
    return figures


def dcs2() -> Figures:
    """Six steps of the search, the gradient of the mixed loss, and a step back."""
    net = models.build("fc", size=4, classes=5, widths=[7], act="gelu", seed=0).double()
    x, y = draw(400, 3, 3, 4, 4), torch.tensor([0, 1, 2])
    y_c, defense = torch.tensor([3, 4]), DCS2(iterations=6, enough=1e9)
    context = ClientContext(0, 0, net, x, y, FedSGD(), stream("dcs2"), {})
    x_c = defense.concealed(context, x[1:], y[1:], draw(401, 2, 3, 4, 4), y_c)

    def loss(logits: Tensor, target: Tensor) -> Tensor:
        return defense.mixed_loss(nn.functional.cross_entropy, logits, target, y[1:])

    weights = {name: p.detach() for name, p in net.named_parameters()}
    both, labels_of_both = torch.cat([x, x_c]), torch.cat([y, y_c])
    sent = replay.gradient(net, weights, {}, both, labels_of_both, loss=loss, create_graph=False)
    a, g = draw(402, 30), draw(403, 30)
    a = a - g * (1 + a @ g / (g @ g))
    return {
        "concealed samples after six steps": x_c,
        "gradient of the mixed loss": torch.cat([t.flatten() for t in sent.values()]),
        "gradient drawn back": drawn_back({"w": a}, {"w": g}, 0.5)["w"],
    }


def dia() -> Figures:
    """The update, and objective and images after twenty steps, as released, dropping a quarter."""
    scene = staged(
        "fc", 2, size=8, protocol=FedSGD(mode="train"), labels=True,
        widths=(48, 32), act="gelu", dropout=0.25,
    )  # fmt: skip
    view = scene.view([scene.federation.play_round()])
    found = DIA(steps=20)(view, seed=0)
    return {
        "update": sum(map(along, view.update.tensors.values())),
        "objective, 20 steps": found.notes["objective"], "images, 20 steps": found.images,
    }  # fmt: skip


def dlfa() -> Figures:
    """The objective with either prior on the order of two epochs of four images; label counts."""
    protocol = FedAVG(epochs=2, batch_size=2, lr=0.05)
    scene = staged("fc", 4, size=8, protocol=protocol, classes=10, widths=(12, 9), act="relu")
    view, x = scene.view([scene.federation.play_round()]), draw(90, 8, 3, 8, 8).requires_grad_()
    kernels, attack = draw(91, 96, 3, 3, 3) / 27**0.5, DLFA()
    sent = attack.simulate(view, 2)(x, torch.tensor([1, 7, 0, 3]).repeat(2))
    match = attack.matching_term(view, 2)(sent)
    variation, leaving = priors.tv_circular(x), outside(x, view.box)
    figures = {"matching": match, "variation": variation, "range": leaving}
    for name, s, weight in (
        ("mean", lambda part: part.mean(0), 1_000.0),
        ("responses", lambda part: conv2d(part, kernels, padding=1).amax(0), 6.075),
    ):
        disorder = epochs.order_prior(x, 2, s, "l2")
        total = 2 * match + 1e-3 * variation + 2 * leaving + weight * disorder
        figures |= {f"order, {name}": disorder, f"slope, {name}": slope(total, x)}
    head, noise = labels.find_head(view.model, x), draw(92, 16, 3, 8, 8)
    moved = {n: p + view.update.tensors[n] for n, p in view.model.named_parameters()}
    start, end = (labels.head_pass(view.model, head, noise, weights=w) for w in (None, moved))
    raw = labels.dimitrov(
        head.weight_grad(observed.mean_gradient(view)), start, end, steps=4, samples=4
    )
    return figures | {"label counts, raw": raw, "label counts": labels.round_counts(raw, 4)}


def dlg() -> Figures:
    """The squared distance at a random start, and its slopes; weights lie in [-0.5, 0.5]."""
    model = models.build("lenet", classes=100, size=32).double()
    with torch.no_grad():
        for seed, parameter in enumerate(model.parameters()):
            parameter.uniform_(-0.5, 0.5, generator=torch.Generator().manual_seed(seed))
    g = gradient(model, uniform(50, 1, 3, 32, 32), torch.tensor([7]))
    x, logits = draw(51, 1, 3, 32, 32).requires_grad_(), draw(52, 1, 100).requires_grad_()
    distance = matching.squared_l2(gradient(model, x, logits.softmax(dim=1), tape=True), g)
    return {
        "distance": distance, "slope of the image": slope(distance, x),
        "slope of the label logits": slope(distance, logits),
    }  # fmt: skip


def e2egi() -> Figures:
    """The objective with exact statistics and its slope; labels; rates of the stages."""
    model = models.build("convnet-bn", width=4, size=16).double().train()
    images, y = uniform(65, 2, 3, 16, 16), torch.tensor([3, 5])
    statistics = batchnorm_statistics(model, dict(model.state_dict()), images)
    x = draw(67, 2, 3, 16, 16).requires_grad_()
    distance = matching.cosine(gradient(model, x, y, tape=True), gradient(model, images, y))
    total = distance + 0.0114 * priors.tv_mean(x)
    total = total + 0.0357 * batchnorm.prior(model, statistics)(x)
    total = total + 0.01 * (x - draw(68, 2, 3, 16, 16)).square().mean()
    head = draw(66, 10, 6).abs() - torch.tensor([3.0, 0, 1, 0, 0, 2, 0, 0, 0, 0]).double()[:, None]
    rates = stage_rates(stage_lengths(100, 10), 0.1046, 1e-3)
    return {
        "cosine distance": distance, "objective": total,
        "slope of the objective": slope(total, x), "label counts": labels.e2egi(head, 6).double(),
        "rates of the stages": torch.tensor(rates, dtype=torch.float64),
    }  # fmt: skip


def fgla() -> Figures:
    """Features of five examples of nine classes, from rows drawn at random, with and without."""
    W, b, y = draw(300, 9, 12), draw(301, 9), torch.tensor([4, 0, 7, 2, 8])
    return {"features": separate(W, b, y, 5, "official")}


def fedkl() -> Figures:
    """A locked convolution in train mode: what it gives, scale and shift."""
    norm, conv = nn.BatchNorm2d(6).double(), draw(311, 6, 3, 3, 3)
    lock = KeyLock(norm, uniform(312, 40), "sigmoid").double()
    filled(lock.scale, 313)
    filled(lock.shift, 315)
    scale, shift = lock.affine()
    given = lock(conv2d(uniform(310, 4, 3, 9, 9), conv, padding=1))
    return {"given": given, "scale": scale, "shift": shift}


def fishing() -> Figures:
    """The head after one round of class fishing, and after one cut of a feature."""
    figures: dict[str, Tensor | float] = {}
    for name, move in (
        ("class", Move(CLASS, 4, gain=0.5, beta=1_000.0)),
        ("feature", Move(CUT, 4, feature=17, theta=0.37, gain=300.0)),
    ):
        model = models.build("convnet", width=4, size=16)
        set_head(model, labels.find_head(model), move)
        *_, weight, bias = model.parameters()
        figures |= {f"weights, {name} head": weight, f"biases, {name} head": bias}
    return figures


def fl_gradinv() -> Figures:
    """Distance of batch statistics, both total variations, and their slopes."""
    model = models.build("convnet-bn", width=4, size=16).double().train()
    target = {
        name: (draw(70 + i, len(mean)), draw(80 + i, len(mean)).abs())
        for i, (name, (mean, _)) in enumerate(batchnorm.running_statistics(model).items())
    }
    x = draw(69, 3, 3, 16, 16).requires_grad_()
    distance, norms = batchnorm.prior(model, target)(x), priors.tv_four(x)
    return {
        "statistics": distance, "slope of statistics": slope(distance, x),
        "variation, norms": norms, "variation, means": priors.tv_four(x, "l1"),
        "slope of variation": slope(norms, x),
    }  # fmt: skip


def grad_defense() -> Figures:
    """Sensitivities of a network's layers, slices of them, and a vector without its noise."""
    model = models.build("lenet", width=4, size=16).double()
    named = {name: p.numel() for name, p in model.named_parameters()}
    found = slices.sensitivity(
        model, list(named), uniform(210, 4, 3, 16, 16), torch.arange(4), nn.functional.cross_entropy
    )
    spans = slices.released_slices(list(named.values()), found, 10)
    ends = [float(end - 1) for _, end in spans]
    return {
        "sensitivities": torch.tensor(found, dtype=torch.float64),
        "borders of slices": torch.tensor([0.0, *ends]),
        "compensated": slices.denoised(draw(212, 600), 0.8**2, 6.0, as_released=True),
    }


def flower_clipping() -> Figures:
    """A clipped change; and what adaptive clipping makes of multiplier and bound."""
    defense = FlowerClipping(adaptive=True, noise_multiplier=1.0, count_std=2.0)
    plain = FlowerClipping()
    return {
        "fixed clipping, C 0.3": flat(clip(_change(), 0.3, "flat")),
        "multiplier beside a count of deviation 2": defense.multiplier(100),
        "bound after a share of 0.8": defense.moved(0.1, 0.8),
        "deviation on the mean of 100": plain.multiplier(100) * plain.clipping_norm / 100,
    }


def ggl() -> Figures:
    """The loss of a latent under a linear generator, plain and through three estimated defenses."""
    model = models.build("fc", size=8, widths=(12,), act="tanh").double()
    y, lines = torch.tensor([3]), 0.1 * draw(310, 10, 3 * 64)
    z = draw(311, 1, 10)
    g = gradient(model, uniform(312, 1, 3, 8, 8), y)
    trial = gradient(model, (z @ lines).reshape(1, 3, 8, 8), y)
    small = {n: t * 0.01 for n, t in g.items()}
    sparse = {n: t * kept(t, 0.5, 0.0) for n, t in g.items()}
    masked = {**g, "fc.weight": g["fc.weight"] * (torch.arange(12) % 3 > 0)}
    kl = 0.1 * float(ggl_row.kl(z))
    defenses: dict[str, tuple[dict[str, Tensor], ggl_row.Transform]] = {
        "plain": (g, dict), "clipping": (small, ggl_row.clipping(small)),
        "pruning": (sparse, ggl_row.pruning(sparse)),
        "soteria": (masked, ggl_row.soteria(masked, "fc.weight")),
    }  # fmt: skip
    return {
        f"loss, {name}": ggl_row.sq_mean(through(trial), seen) + kl
        for name, (seen, through) in defenses.items()
    }


def gias() -> Figures:
    """Distances between two updates with their slopes, and the total variation."""
    model = models.build("lenet", width=4, size=16, classes=12).double()  # counts by four
    y = torch.tensor([3, 7])
    x = uniform(801, 2, 3, 16, 16).requires_grad_()
    g = gradient(model, uniform(800, 2, 3, 16, 16), y)
    trial = gradient(model, x, y, tape=True)
    seen, own = ({n: kept(t, 0.75, 0.0) for n, t in update.items()} for update in (g, trial))
    cut = [{n: t * own[n] for n, t in trial.items()}, {n: t * seen[n] for n, t in g.items()}]
    values = {
        "cosine": matching.cosine(trial, g),
        "cosine, a quarter of the entries": matching.masked(matching.cosine, seen)(trial, g),
        "squared, both sides cut to a quarter": matching.squared_l2(cut[0], cut[1]),
        "squared": matching.squared_l2(trial, g),
        "cosine, four largest tensors": matching.subset(
            matching.cosine, matching.largest(g, 4)
        )(trial, g),
    }  # fmt: skip
    slopes = {f"slope, {name}": slope(value, x) for name, value in values.items()}
    return {**values, **slopes, "total variation": priors.tv_mean(x)}


def gifd() -> Figures:
    """Points projected onto an l1 ball, and the step size along a stage."""
    points = project_l1(draw(320, 6, 40), torch.full((6,), 7.5))
    return {
        "projected points": points,
        "step sizes": torch.tensor([ramp(i / 50) for i in range(50)], dtype=torch.float64),
    }


def grnn() -> Figures:
    """Images, labels and objective of a network with given weights, and after five steps."""
    model = models.build("lenet", width=4, size=16).double()
    g = gradient(model, uniform(330, 2, 3, 16, 16), torch.tensor([3, 7]))
    network = TwoBranches((3, 16, 16), 10, seed=0).double()
    for index, p in enumerate(network.parameters()):
        p.data = 0.1 * draw(331 + index, *p.shape)
    v = draw(330, 2, 128)
    names = [n for n, _ in model.named_parameters()]
    optimizer = torch.optim.RMSprop(network.parameters(), lr=1e-4, momentum=0.99)
    figures: dict[str, Tensor | float] = {}
    for step in range(6):
        pixels, y = network(v)
        loss = -(y * model(pixels).log_softmax(1)).sum(1).mean()
        slopes = torch.autograd.grad(loss, list(model.parameters()), create_graph=True)
        trial = dict(zip(names, slopes, strict=True))
        total = GRNN().measure(trial, g) + 1e-3 * smoothness(pixels)
        if step in (0, 5):
            figures |= {f"images, step {step}": pixels, f"labels, step {step}": y,
                        f"objective, step {step}": total.detach()}  # fmt: skip
        optimizer.zero_grad()
        torch.autograd.backward(total, inputs=list(network.parameters()))
        optimizer.step()
    return figures


def gi_pip() -> Figures:
    """The score of noise and of crops under one autoencoder, and its slope; cosine and prior."""
    network = Autoencoder(3, 12).double()
    with torch.no_grad():
        for number, p in enumerate(network.parameters()):
            p.copy_(draw(110 + number, *p.shape) / 8)
    x = CIFAR10.normalize(uniform(125, 2, 3, 32, 32)).requires_grad_()
    score = anomaly(network, CIFAR10.denormalize(x).clamp(0, 1), 0.001, per_image=False)
    a, b = ({"w": draw(s, 5, 7), "b": draw(s + 1, 5)} for s in (126, 128))
    return {
        "score": score, "slope of the score": slope(score, x), "cosine": matching.cosine(a, b),
        "variation": priors.tv_mean(x),
    }  # fmt: skip


def hcgla() -> Figures:
    """What a tenth of all entries, jointly chosen, leaves, and the masked distance to it."""
    model = models.build("fc", classes=10, size=8, widths=(20,), act="sigmoid").double()
    x, y = uniform(130, 1, 3, 8, 8), torch.tensor([3])
    g = gradient(model, x, y)
    row = torch.cat([t.flatten() for t in g.values()])
    sent = unflat(torch.where(kept(row, 0.9, 0.0), row, 0.0), g)
    start = uniform(131, 1, 3, 8, 8).requires_grad_()
    distance = matching.masked(matching.squared_l2, {n: t != 0 for n, t in sent.items()})
    found = distance(gradient(model, start, y, tape=True), sent)
    head = g["fc.weight"].flatten()
    return {
        "entries sent": float(sum(int((t != 0).sum()) for t in sent.values())), "sent": flat(sent),
        "sent of one tensor": torch.where(kept(head, 0.9, 0.0), head, 0.0),
        "masked distance": found, "slope of the distance": slope(found, start),
    }  # fmt: skip


def fragmented_fl() -> Figures:
    """A pair's swap under a given mask, and the server's scores of five mixtures."""
    shapes = {"first.weight": (6, 5), "first.bias": (6,), "last.weight": (3, 6), "last.bias": (3,)}

    def state(seed: int) -> dict[str, Tensor]:
        return {name: draw(seed + i, *shape) for i, (name, shape) in enumerate(shapes.items())}

    a, b = (
        Update(tensors=state(s), kind="gradient", state_hash="", num_examples=1) for s in (300, 310)
    )
    masks = {name: t >= 0.5 for name, t in state(320).items()}
    pair = [ffl.filled(u, masks, ffl.fragments(v, masks)) for u, v in ((a, b), (b, a))]
    first, second = (torch.cat([t.flatten() for t in u.tensors.values()]) for u in pair)
    scores = ffl.scores({k: state(350 + 10 * k) for k in range(5)})
    return {
        "first of a pair": first, "second of a pair": second,
        "scores of five": torch.tensor(list(scores.values()), dtype=torch.float64),
    }  # fmt: skip


def hf_gradinv() -> Figures:
    """The cosine from layer 6 on, without random masks, both priors, a shaped slope, a fitness."""
    model = models.build("convnet-bn", width=4, size=16).double().eval()
    y, x = torch.tensor([3, 5]), draw(93, 2, 3, 16, 16).requires_grad_()
    g = gradient(model, uniform(92, 2, 3, 16, 16), y)
    window = matching.subset(matching.cosine, list(g)[5:])
    distance, variation = window(gradient(model, x, y, tape=True), g), priors.tv_padded(x)
    statistics = HFGradInv().bn_prior(model)(x)
    rows, profile = draw(95, 3, 20).abs(), draw(96, 1, 20).abs()
    fit = fitness(torch.tensor([[2, 1, 4]]), rows @ profile[0])
    return {
        "windowed cosine": distance, "variation": variation, "statistics": statistics,
        "slope of the objective": slope(distance + 5e-3 * variation + 1e-4 * statistics, x),
        "shaped slope": quantised(draw(94, 1, 3, 16, 16)),
        "fitness of counts": fit / (rows.norm() * profile.norm()),
    }  # fmt: skip


def inverting_gradients() -> Figures:
    """Cosine distance and total variation at a random start, and their slope."""
    model = models.build("convnet", width=4, size=16).double().eval()
    y, x = torch.tensor([3]), draw(61, 1, 3, 16, 16).requires_grad_()
    g = gradient(model, uniform(60, 1, 3, 16, 16), y)
    distance, variation = matching.cosine(gradient(model, x, y, tape=True), g), priors.tv_mean(x)
    return {
        "cosine distance": distance, "total variation": variation,
        "slope of the objective": slope(distance + 0.1 * variation, x),
    }  # fmt: skip


def loki() -> Figures:
    """The second of two clients of six images: kernels, its columns of FC1, their gradients."""
    x = 0.1 + 0.8 * uniform(90, 6, 3, 8, 8)
    edges = x.mean() + 0.02 * draw(91, 17).sort().values
    w = torch.full((192,), 1 / 192, dtype=torch.float64)
    layers = edits.SplitImprint(
        w, edges, (3, 8, 8), clients=2, group=1, kappa=500.0, spread=1.0
    ).layers()
    fired = nn.functional.hardtanh(layers.first(layers.conv(x).flatten(1)), 0.0, 1.0)
    loss = (fired * draw(92, 6, 16)).sum()
    weight, bias = layers.first.weight, layers.first.bias
    return {
        "kernels": layers.conv.weight, "weights, own columns": weight[:, 192:], "biases": bias,
        "gradient of the weights, own columns": slope(loss, weight)[:, 192:],
        "gradient of the biases": slope(loss, bias),
    }  # fmt: skip


def lti() -> Figures:
    """The held-out error and the weights after four epochs on clients of two images."""
    v = draw(60, 80, 30, dtype=torch.float32)  # gradients of single images, and the images
    x = draw(61, 80, 12, dtype=torch.float32).sigmoid()
    attack = LTI(epochs=4, hidden=16, lr=1e-3, batch_size=8)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        learned = attack.fit(
            v.unflatten(0, (-1, 2)).mean(1), x.unflatten(0, (-1, 2)),
            generator=stream("lti", "differential"), watch=Watch(),
        )  # fmt: skip
    weights = [t for n, t in learned.items() if n.startswith("network/body")]
    return {
        "held-out error": 10 ** (-learned["held_out_psnr"] / 10),
        "weights, 4 epochs": sum(map(along, weights)),
    }


def mjolnir() -> Figures:
    """The schedule, a diffused sample, a padded gradient, and two reverse steps, each fed back."""
    kept_share, x = linear_schedule(), draw(140, 1, 1, 8, 8)
    share = kept_share[torch.tensor([300])]
    drawn = torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).double()
    end = reverse(
        x, lambda x, t: 0.3 * x.tanh() + 0.01 * t, 2, kept_share, path="drawn",
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    return {
        "schedule": kept_share, "diffused": noised(x, drawn, share), "two reverse steps": end,
        "padded": padded(draw(141, 13_426), 120),
    }  # fmt: skip


def mgan_ai() -> Figures:
    """Distance and total variation of representatives with black borders, and their slopes."""
    model, y = models.build("lenet", width=4, size=16).double(), torch.tensor([3, 7])
    x = nn.functional.pad(uniform(501, 2, 3, 15, 15), (0, 1, 0, 1)).requires_grad_()
    g = gradient(model, uniform(500, 2, 3, 16, 16), y)
    distance = matching.squared_l2(gradient(model, x, y, tape=True), g)
    variation = mgan_ai_row.total_variation(x)
    inside = slope(variation, x)[..., :-1, :-1]
    return {
        "distance": distance, "slope of the distance": slope(distance, x),
        "total variation": variation, "slope of the total variation inside": inside,
    }  # fmt: skip


def mkor() -> Figures:
    """The decoupling head, its gradient under the official loss, and the features in it."""
    model = models.build("lenet5", in_channels=1, size=28).double()
    layout, modules = mkor_row.plan(model, (1, 28, 28)), dict(model.named_modules())
    mkor_row.set_head(model, layout, Box.unit(1), sink=False)
    layers, h = [modules[name] for name in layout.linear], uniform(120, 5, 400)
    for layer in layers[:-1]:
        h = layer(h).sigmoid()
    loss = nn.functional.nll_loss(layers[-1](h), torch.arange(5))  # of raw logits
    weight, bias = layers[0].parameters()
    g_w = slope(loss, weight)
    rows = readout.ratio_readout(g_w[:5], slope(loss, bias)[:5])
    return {
        "weights of the head": sum(along(p) for layer in layers for p in layer.parameters()),
        "gradient of the first layer": g_w, "features": rows.x[rows.rows.argsort()],
    }  # fmt: skip


def local_dp_mod() -> Figures:
    """A clipped change and noise of given normal numbers."""
    defense = LocalDpMod(clipping_norm=0.3, sensitivity=0.6, epsilon=2.0)
    sent = flat(clip(_change(), defense.clipping_norm, "flat")) + defense.sigma * draw(274, 1240)
    return {"local DP, C 0.3, s 0.6, epsilon 2": sent}


def outpost() -> Figures:
    """Four tensors, as the release of 2023 perturbs them."""
    shapes, risky = [(8, 3, 5, 5), (8,), (10, 40), (10,)], (0.1, 0.5, 2.0, 1.0)
    g, normal = (
        {str(i): draw(seed + i, *s, dtype=torch.float32) for i, s in enumerate(shapes)}
        for seed in (230, 250)
    )
    w = {
        str(i): f * draw(240 + i, *s, dtype=torch.float32)
        for i, (s, f) in enumerate(zip(shapes, risky, strict=True))
    }
    defense = sparing.Outpost(as_released="2023")
    noise = defense.drawn({n: t.square().mean(0, keepdim=True) for n, t in g.items()}, w, normal)
    sent = {n: t * sparing.kept(t, defense.prune) + noise[n] for n, t in g.items()}
    return {"perturbed": torch.cat([t.flatten() for t in sent.values()])}


def percentile_privacy() -> Figures:
    """A change filtered as shipped, and one of three steps more strictly."""
    three = {name: t / 3 for name, t in _change().items()}
    return {
        "percentile, shipped": flat(filtered(_change(), 0.01, 10)),
        "percentile, 40 and 0.005, 3 steps": 3 * flat(filtered(three, 0.005, 40)),
    }


def precode() -> Figures:
    """The bottleneck on given draws, its divergence, and the slope of both on the features."""
    bottleneck = Bottleneck(20, 8, 1.0).double()
    filled(bottleneck.encoder, 321)
    filled(bottleneck.decoder, 323)
    bottleneck.noise, h = draw(325, 5, 8), draw(320, 5, 20).requires_grad_()
    decoded = bottleneck(h)
    penalty = 1e-3 / math.log(2) * bottleneck.take_divergence().mean()
    return {
        "decoded": decoded,
        "penalty": penalty,
        "slope": slope(decoded.sin().sum() + penalty, h),
    }


def quantization() -> Figures:
    """A tensor on 16 magnitudes, rounded at random and to the nearest, and its signs."""
    v = draw(200, 300)
    draws = torch.rand(300, generator=torch.Generator().manual_seed(201), dtype=torch.float64)
    scale = v.abs().max()
    return {
        "random, 16 levels": quantised_to(v, 5, scale, draws),
        "nearest, 16 levels": quantised_to(v, 5, scale),
        "signs": quantised_to(v, 1, torch.ones(())),
    }


def rgap() -> Figures:
    """Inputs of convolutions in float32 from weight gradient and output."""
    figures = {}
    # Channels in and out, kernel, stride, padding and side of the input.
    for number, (inside, outside_, kernel, stride, padding, side) in enumerate(
        ((1, 8, 3, 1, 1, 5), (2, 12, 3, 1, 1, 6), (3, 12, 4, 2, 2, 8))
    ):
        conv = nn.Conv2d(inside, outside_, kernel, stride, padding, bias=False)
        seed, single = 10 * number, torch.float32
        with torch.no_grad():
            conv.weight.copy_(draw(70 + seed, *conv.weight.shape, dtype=single) / 4)
        z = conv(draw(71 + seed, 1, inside, side, side, dtype=single))
        k = draw(72 + seed, *z.shape, dtype=single)
        g = slope((z * k).sum(), conv.weight)
        found = solve_convolution(
            conv, (inside, side, side), k.flatten().double(), g, z.detach().flatten().double()
        )
        figures[f"input of convolution {number}"] = found.x
    return figures


def robbing_the_fed() -> Figures:
    """Thresholds, gradients of the block, and the images read below the top bin."""
    x = uniform(80, 12, 3, 8, 8)
    x = (x - x.mean()) / x.std()
    edges = readout.bin_edges("normal", 32)
    block = edits.Imprint(draw(81, 192) / 192**0.5, edges, spread=None).layers().double()
    loss = (block(x) * draw(82, 12, 192).view(12, 3, 8, 8)).sum()
    g_w, g_b = slope(loss, block.first.weight), slope(loss, block.first.bias)
    read = readout.cumulative_readout(g_w, g_b, edges[:-1])
    below = read.rows < 31
    return {
        "thresholds": edges[:-1], "gradient of the weights": g_w, "gradient of the biases": g_b,
        "images below the top bin": sum(map(along, read.x[below])),
        "their number": float(below.sum()),
    }  # fmt: skip


def rog() -> Figures:
    """Squared distance at an enlarged start, slope, five iterations; of one step and of two."""
    model = models.build("fc", classes=10, size=16, widths=(20,), act="sigmoid", bias=False)
    model, y, lr = model.double(), torch.tensor([3, 5]), 0.05
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    x, z = uniform(97, 2, 3, 16, 16), uniform(98, 2, 3, 4, 4).requires_grad_()
    figures: dict[str, Tensor | float] = {}
    for steps in (1, 2):
        protocol = FedAVG(epochs=steps, batch_size=2, lr=lr)
        g, own = (
            {n: -t / lr for n, t in replay.unroll(model, parameters, {}, i, y, protocol).items()}
            for i in (x, enlarged(z, (3, 16, 16)))
        )
        distance = matching.squared_l2(own, {n: t.detach() for n, t in g.items()})
        figures |= {
            f"distance, {steps} steps": distance, f"slope, {steps} steps": slope(distance, z),
            f"image after five iterations, {steps} steps": _five(model, protocol, g, z, y),
        }  # fmt: skip
    return figures


def _five(model: nn.Module, protocol: FedAVG, g: dict[str, Tensor], z: Tensor, y: Tensor) -> Tensor:
    """Where five iterations of ROG lead, at the released step sizes: the first one twice."""
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    target = {n: t.detach() for n, t in g.items()}

    def objective(variables: descent.Variables, t: Tensor) -> Tensor:
        del t
        image = enlarged(variables["z"], (3, 16, 16))
        moved = replay.unroll(model, parameters, {}, image, y, protocol)
        return matching.squared_l2({n: -t / protocol.lr for n, t in moved.items()}, target)

    falling = descent.cosine_decay()
    end = descent.descend(
        objective, {"z": z.detach()}, optimizer=descent.adam(0.05), steps=5, watch=Watch(),
        schedule=lambda progress: 0.1 + 0.9 * falling(max(progress - 0.2, 0.0)),
    )  # fmt: skip
    return end.last["z"]


def scale_mia() -> Figures:
    """The malicious layers, and twelve latents with a bin each, read from one gradient."""
    z = uniform(100, 12, 1_024) * torch.linspace(0.8, 1.2, 12, dtype=torch.float64)[:, None]
    edges = torch.linspace(0.35, 0.65, 1_024).double()
    first, second, third = nn.Linear(1_024, 1_024), nn.Linear(1_024, 512), nn.Linear(512, 10)
    parts = Parts((), first, second, third, ("first", "second", "third"), (64, 4, 4), dropout=False)
    write_bins(parts, edges, torch.Generator())
    fired = (z.mean(dim=1)[:, None] > edges) * draw(101, 12)[:, None]
    read = readout.cumulative_readout(fired.T @ z, fired.sum(dim=0), edges)
    return {
        "weights of the first layer": first.weight, "biases of the first layer": first.bias,
        "weights of the second layer": second.weight, "biases of the second layer": second.bias,
        "latents": sum(map(along, read.x)), "their number": float(len(read.x)),
    }  # fmt: skip


def seer() -> Figures:
    """The weight of the others over a training of 1,000 epochs, and the image that is picked."""
    x = uniform(110, 16, 3, 8, 8)
    return {
        "weight of the others": torch.tensor([schedule(n / 1_000, 16) for n in range(1_000)]),
        "brightest image": x[int(SEER(form="max").picked(x[None])[0].argmax())],
    }


def sme() -> Figures:
    """The update of eight local steps; loss, images and position after five steps and twenty."""
    protocol = FedAVG(epochs=4, batch_size=2, lr=0.05, mode="eval")
    scene = staged("convnet", 4, size=16, protocol=protocol, labels=True, width=4)
    view = scene.view([scene.federation.play_round()])
    figures: dict[str, Tensor | float] = {"update": sum(map(along, view.update.tensors.values()))}
    for steps in (5, 20):
        attack = SME(steps=steps, lr=0.1, alpha_lr=1e-2, schedule="constant")
        found = attack(view, seed=0)
        figures |= {
            f"matching loss, {steps} steps": found.notes["matching_loss"],
            f"position, {steps} steps": found.notes["alpha"],
            f"images, {steps} steps": found.images,
        }
    return figures


def soteria() -> Figures:
    """Columns that stay where four fifths are to go, of features with signs and without."""
    figures: dict[str, Tensor | float] = {}
    for name, act in (("tanh", "tanh"), ("ReLU", "relu")):
        model = models.build("fc", size=8, widths=(40, 30), act=act).double()
        found = features.sensitivity(model, "fc", uniform(260, 4, 3, 8, 8))
        scores = features.score(*found, 0.1, as_released=True)
        figures[f"columns that stay, {name}"] = features.released_mask(scores, 0.8)
    return figures


def svt_privacy() -> Figures:
    """Both forms on given Laplace numbers and picks, and their budgets."""
    figures: dict[str, Tensor | float] = {}
    stronger = SVTPrivacy(gamma=0.01, epsilon=10.0, noise_var=5.0, tau=0.001)
    forms = {"shipped": SVTPrivacy(), "gamma 0.01 and budgets 10 and 5": stronger}
    picks = torch.randint(10**9, (2_000,), generator=torch.Generator().manual_seed(273))
    for name, defense in forms.items():
        rest = iter(draw(272, 40_000).tolist())

        def laplace(scale: float, size: int, rest: Iterator[float] = rest) -> Tensor:
            return scale * torch.tensor(list(islice(rest, size)), dtype=torch.float64)

        def choose(accepted: Tensor, size: int) -> Tensor:
            return accepted[picks[:size] % len(accepted)]

        figures[f"svt, {name}"] = defense.released(_change()["w"].flatten(), laplace, choose)
        figures[f"svt, {name}, epsilon"] = defense.spent(1_200)
    return figures


def _change() -> dict[str, Tensor]:
    """A client's change of two tensors."""
    return {"w": 0.02 * draw(270, 40, 30), "b": 0.02 * draw(271, 40)}


def trap_weights() -> Figures:
    """The rows on average; no two programs draw the same ones."""
    like, generator = torch.zeros(1), torch.Generator().manual_seed(0)
    rows = surgery.trap_rows(1_000, 3_072, scaling=0.95, sigma=0.5, generator=generator, like=like)
    rows = rows.double()
    positive, negative = rows.clamp(min=0).sum(dim=1), -rows.clamp(max=0).sum(dim=1)
    return {
        "mean sum of a row": rows.sum(dim=1).mean(),
        "positive over negative weights": (positive / negative).mean(),
    }


def vicinal_augmentation() -> Figures:
    """A batch with its mixtures behind it, and with the reversed images alone."""
    x, y = uniform(330, 5, 3, 8, 8), torch.arange(5)
    figures: dict[str, Tensor | float] = {}
    for name, mix in (("mix", 0.8), ("reverse", 1.0)):
        images, targets = VicinalAugmentation(mix=mix).simulate_batch(x, y)
        figures |= {f"images, {name}": images, f"labels, {name}": targets.double()}
    return figures
