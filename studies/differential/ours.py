"""Our side of the comparisons with official code, on inputs made from seeds.

Every function gives the figures whose official values are kept in ``results/differential``, with
repository, commit and tolerance. Its ``*_inputs`` are what the official code was given as well.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

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
from leakatlas.attacks.generative.direct.lti import LTI
from leakatlas.attacks.optimization.augmented.rog import enlarged
from leakatlas.attacks.optimization.basic.cpa import CPA, Mixture, whiten
from leakatlas.attacks.optimization.basic.dia import DIA
from leakatlas.attacks.optimization.basic.dlfa import DLFA, order_prior, outside
from leakatlas.attacks.optimization.basic.e2egi import stage_lengths, stage_rates
from leakatlas.attacks.optimization.basic.hf_gradinv import HFGradInv, quantised
from leakatlas.attacks.optimization.basic.sme import SME
from leakatlas.bench.examine import errors
from leakatlas.bench.harness import run_trial
from leakatlas.blocks import batchnorm, init, labels, matching, priors, readout, surgery
from leakatlas.blocks.labels.profiles import fitness
from leakatlas.blocks.watch import Watch
from leakatlas.data import CIFAR10, Box, patches
from leakatlas.defenses.heuristic.perturbation import quantization as quantization_row
from leakatlas.fl import (
    FedAVG,
    FedSGD,
    ModelRef,
    Scenario,
    batchnorm_statistics,
    edits,
    replay,
    stage,
    stream,
)
from leakatlas.threat import Grant


def draw(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Standard normal numbers of a seed."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def along(tensor: Tensor, seed: int = 99) -> float:
    """A tensor in one number that moves with every entry: its product with a random direction."""
    flat = tensor.detach().flatten()
    return float(flat.double() @ draw(seed, len(flat)))


def april() -> dict[str, float]:
    """The image of least norm of a transformer too narrow for its patches."""
    settings = {"first_block": "april", "dim": 32, "size": 16, "classes": 8, "seed": 0}
    reference = ModelRef("builtin", "vit", settings)
    scenario = Scenario(model=reference, letter="B", examples=1)
    victims = patches(16, 1)
    scene = stage(scenario, model=reference.build().double(), victims=victims, box=CIFAR10)
    return {"error of the image": float(errors(run_trial(scene, APRIL()))[0])}


def cpa_inputs() -> dict[str, Any]:
    """A mixture of four flat images, and an unmixing matrix away from the start."""
    images = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(62)).double()
    return {
        "gradient": draw(63, 16, 4) @ images.flatten(1),
        "u": torch.eye(4, dtype=torch.float64) + 0.3 * draw(64, 4, 4),
        "weights": {"decorrelation": 1.47, "temperature": 3.0, "tv": 3.1, "sign": 0.13, "l1": 5.0},
    }


def cpa() -> dict[str, float]:
    """Every term of the separation, on images and on embeddings, and its slope."""
    given = cpa_inputs()
    weights, u = given["weights"], given["u"].requires_grad_()
    attack = CPA(
        negentropy="off",
        decorrelation=weights["decorrelation"],
        temperature=weights["temperature"],
        embedding_decorrelation=weights["decorrelation"],
        embedding_temperature=weights["temperature"],
        tv_weight=weights["tv"],
        sign_weight=weights["sign"],
        l1_weight=weights["l1"],
    )
    white = whiten(given["gradient"], 4)
    figures: dict[str, float] = {"whitened rows, squared": along(white.Z.square())}
    for reads_image, kind in ((True, "images"), (False, "embeddings")):
        layer = Mixture("fc", nn.Linear(192, 16), reads_image)
        terms = attack.terms(u, white, layer, (3, 8, 8))
        (slope,) = torch.autograd.grad(torch.stack(list(terms.values())).sum(), u)
        figures |= {f"{name} of {kind}": float(term.detach()) for name, term in terms.items()}
        figures[f"slope of {kind}"] = along(slope)
    return figures


def dlfa_inputs() -> dict[str, Any]:
    """Two epochs of four images for a network of three layers, and an update to match."""
    model = models.build("fc", size=8, classes=10, widths=(12, 9), act="relu").double()
    settings = {"size": 8, "classes": 10, "widths": (12, 9), "act": "relu"}
    scenario = Scenario(
        model=ModelRef("builtin", "fc", settings),
        letter="C",
        examples=4,
        protocol=FedAVG(epochs=2, batch_size=2, lr=0.05),
    )
    scene = stage(scenario, model=model, victims=patches(8, 4), box=CIFAR10)
    return {
        "view": scene.view([scene.federation.play_round()]),
        "x": draw(90, 8, 3, 8, 8),
        "y": torch.tensor([1, 7, 0, 3]).repeat(2),
        "responses": draw(91, 96, 3, 3, 3) / 27**0.5,
    }


def dlfa() -> dict[str, float]:
    """The objective with either prior on the order, at f = 2, and its slope."""
    given = dlfa_inputs()
    view, x = given["view"], given["x"].requires_grad_()
    attack = DLFA()
    match = attack.matching_term(view, 2)(attack.simulate(view, 2)(x, given["y"]))
    variation, leaving = priors.tv_circular(x), outside(x, view.box)
    figures = {
        "matching": float(match.detach()),
        "variation": float(variation.detach()),
        "range": float(leaving.detach()),
    }
    for name, s, weight in (
        ("mean", lambda part: part.mean(0), 1_000.0),
        ("responses", lambda part: conv2d(part, given["responses"], padding=1).amax(0), 6.075),
    ):
        disorder = order_prior(x, 2, s, "l2")
        total = 2 * match + 1e-3 * variation + 2 * leaving + weight * disorder
        figures[f"order, {name}"] = float(disorder.detach())
        figures[f"slope, {name}"] = along(torch.autograd.grad(total, x, retain_graph=True)[0])
    return figures


def dlg_inputs() -> dict[str, Any]:
    """A LeNet with weights in [-0.5, 0.5], an image, and a random start."""
    model = models.build("lenet", classes=100, size=32).double()
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            generator = torch.Generator().manual_seed(number)
            parameter.uniform_(-0.5, 0.5, generator=generator)
    x = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(50)).double()
    return {
        "model": model,
        "x": x,
        "y": 7,
        "start": draw(51, 1, 3, 32, 32),
        "logits": draw(52, 1, 100),
    }


def dlg() -> dict[str, float]:
    """The squared distance at a random start, and its slopes."""
    given = dlg_inputs()
    model = given["model"]
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    target = torch.tensor([given["y"]])
    g = replay.gradient(model, parameters, {}, given["x"], target, create_graph=False)
    x, logits = given["start"].requires_grad_(), given["logits"].requires_grad_()
    mine = replay.gradient(model, parameters, {}, x, logits.softmax(dim=1))
    distance = matching.squared_l2(mine, g)
    of_x, of_logits = torch.autograd.grad(distance, (x, logits))
    return {
        "distance": float(distance.detach()),
        "slope of the image": along(of_x),
        "slope of the label logits": along(of_logits),
    }


def hf_gradinv_inputs() -> dict[str, Any]:
    """A ConvNet with BN in eval mode, two images, a random start, and synthetic head rows."""
    model = models.build("convnet-bn", width=4, size=16).double().eval()
    x = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(92)).double()
    return {"model": model, "x": x, "y": [3, 5], "start": draw(93, 2, 3, 16, 16),
            "first": 6, "slope": draw(94, 1, 3, 16, 16), "rows": draw(95, 3, 20).abs(),
            "profile": draw(96, 1, 20).abs(), "counts": [2, 1, 4]}  # fmt: skip


def hf_gradinv() -> dict[str, float]:
    """The windowed cosine without random masks, both priors, the shaped slope, a fitness."""
    given = hf_gradinv_inputs()
    model, target = given["model"], torch.tensor(given["y"])
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    buffers = {name: b.detach() for name, b in model.named_buffers()}
    g = replay.gradient(model, parameters, buffers, given["x"], target, create_graph=False)
    x = given["start"].requires_grad_()
    mine = replay.gradient(model, parameters, buffers, x, target)
    window = list(g)[given["first"] - 1 :]
    distance = matching.subset(matching.cosine, window)(mine, g)
    statistics = HFGradInv().bn_prior(model)(x)
    variation = priors.tv_padded(x)
    total = distance + 5e-3 * variation + 1e-4 * statistics
    fit = given["rows"] @ given["profile"][0]
    counts = torch.tensor([given["counts"]])
    scale = float(given["rows"].norm() * given["profile"].norm())
    return {
        "windowed cosine": float(distance.detach()),
        "variation": float(variation.detach()),
        "statistics": float(statistics.detach()),
        "slope of the objective": along(torch.autograd.grad(total, x)[0]),
        "shaped slope": along(quantised(given["slope"])),
        "fitness of counts": float(fitness(counts, fit)) / scale,
    }


def inverting_gradients_inputs() -> dict[str, Any]:
    """A ConvNet in eval mode, an image, and a random start."""
    model = models.build("convnet", width=4, size=16).double().eval()
    x = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(60)).double()
    return {"model": model, "x": x, "y": 3, "start": draw(61, 1, 3, 16, 16)}


def inverting_gradients() -> dict[str, float]:
    """Cosine distance and total variation at a random start, and their slope."""
    given = inverting_gradients_inputs()
    model, target = given["model"], torch.tensor([given["y"]])
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    g = replay.gradient(model, parameters, {}, given["x"], target, create_graph=False)
    x = given["start"].requires_grad_()
    distance = matching.cosine(replay.gradient(model, parameters, {}, x, target), g)
    variation = priors.tv_mean(x)
    (slope,) = torch.autograd.grad(distance + 0.1 * variation, x)
    return {
        "cosine distance": float(distance.detach()),
        "total variation": float(variation.detach()),
        "slope of the objective": along(slope),
    }


def dia_inputs() -> dict[str, Any]:
    """A client of two images whose network drops a quarter, and where the attack starts."""
    settings = {"size": 8, "widths": (48, 32), "act": "gelu", "dropout": 0.25}
    reference = ModelRef("builtin", "fc", settings)
    scenario = Scenario(
        model=reference, letter="C", examples=2, protocol=FedSGD(mode="train"),
        grants=frozenset({Grant.LABELS}),
    )  # fmt: skip
    model, victims = reference.build().double(), patches(8, 2)
    scene = stage(scenario, model=model, victims=victims, box=CIFAR10)
    generator = stream("dia", "run", 0)
    start = init.normal((1, 2, 3, 8, 8), generator=generator, like=draw(0, 1))
    masks = [
        torch.bernoulli(torch.full((1, 2, width), 0.75), generator=generator).double()[0]
        for width in (48, 32)
    ]
    view = scene.view([scene.federation.play_round()])
    return {"view": view, "model": model, "y": victims.labels, "x": start[0], "masks": masks}


def dia() -> dict[str, float]:
    """The update, and objective and images after twenty steps with the released settings."""
    view = dia_inputs()["view"]
    found = DIA(steps=20)(view, seed=0)
    return {
        "update": sum(along(t) for t in view.update.tensors.values()),
        "objective, 20 steps": found.notes["objective"],
        "images, 20 steps": along(found.images),
    }


def sme_inputs() -> dict[str, Any]:
    """A client of four images that takes eight local steps, and where the attack starts."""
    settings = {"width": 4, "size": 16, "seed": 0}
    reference = ModelRef("builtin", "convnet", settings)
    protocol = FedAVG(epochs=4, batch_size=2, lr=0.05, mode="eval")
    grants = frozenset({Grant.LABELS})
    scenario = Scenario(
        model=reference, letter="C", examples=4, protocol=protocol, grants=grants, seed=0
    )
    model, victims = reference.build().double(), patches(16, 4)
    scene = stage(scenario, model=model, victims=victims, box=CIFAR10)
    start = init.normal((1, 4, 3, 16, 16), generator=stream("sme", "run", 0), like=draw(0, 1))
    return {"stage": scene, "model": model, "victims": victims, "start": start[0]}


def sme() -> dict[str, float]:
    """The update, and loss, images and position after five steps and after twenty."""
    scene = sme_inputs()["stage"]
    view = scene.view([scene.federation.play_round()])
    figures = {"update": sum(along(t) for t in view.update.tensors.values())}
    for steps in (5, 20):
        attack = SME(steps=steps, lr=0.1, alpha_lr=1e-2, schedule="constant")
        found = attack(view, seed=0)
        figures |= {
            f"matching loss, {steps} steps": found.notes["matching_loss"],
            f"position, {steps} steps": found.notes["alpha"],
            f"images, {steps} steps": along(found.images),
        }
    return figures


def e2egi_inputs() -> dict[str, Any]:
    """A ConvNet with BN in train mode, two images, a random start, and a head's gradient."""
    model = models.build("convnet-bn", width=4, size=16).double().train()
    x = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(65)).double()
    head = draw(66, 10, 6).abs() - torch.tensor([3.0, 0, 1, 0, 0, 2, 0, 0, 0, 0]).double()[:, None]
    return {"model": model, "x": x, "y": [3, 5], "start": draw(67, 2, 3, 16, 16), "head": head,
            "group": draw(68, 2, 3, 16, 16), "batch": 6}  # fmt: skip


def e2egi() -> dict[str, float]:
    """The objective with exact statistics and its slope; labels; rates of the stages."""
    given = e2egi_inputs()
    model, target = given["model"], torch.tensor(given["y"])
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    buffers = {name: b.detach() for name, b in model.named_buffers()}
    statistics = batchnorm_statistics(model, {**parameters, **buffers}, given["x"])
    g = replay.gradient(model, parameters, buffers, given["x"], target, create_graph=False)
    x = given["start"].requires_grad_()
    distance = matching.cosine(replay.gradient(model, parameters, buffers, x, target), g)
    total = distance + 0.0114 * priors.tv_mean(x)
    total = total + 0.0357 * batchnorm.prior(model, statistics)(x)
    total = total + 0.01 * (x - given["group"]).square().mean()
    (slope,) = torch.autograd.grad(total, x)
    counts = labels.e2egi(given["head"], given["batch"]).double()
    lengths = stage_lengths(100, 10)
    rates = torch.tensor(stage_rates(lengths, 0.1046, 1e-3), dtype=torch.float64)
    return {
        "cosine distance": float(distance.detach()),
        "objective": float(total.detach()),
        "slope of the objective": along(slope),
        "label counts": along(counts),
        "rates of the stages": along(rates),
    }


def fl_gradinv_inputs() -> dict[str, Any]:
    """A ConvNet with BN, target statistics by layer, and images."""
    model = models.build("convnet-bn", width=4, size=16).double().train()
    layers = batchnorm.running_statistics(model)
    target = {
        name: (draw(70 + i, len(mean)), draw(80 + i, len(mean)).abs())
        for i, (name, (mean, _)) in enumerate(layers.items())
    }
    return {"model": model, "target": target, "x": draw(69, 3, 3, 16, 16)}


def fl_gradinv() -> dict[str, float]:
    """Distance of batch statistics, both total variations, and their slopes."""
    given = fl_gradinv_inputs()
    x = given["x"].requires_grad_()
    distance = batchnorm.prior(given["model"], given["target"])(x)
    norms, means = priors.tv_four(x), priors.tv_four(x, "l1")
    return {
        "statistics": float(distance.detach()),
        "slope of statistics": along(torch.autograd.grad(distance, x)[0]),
        "variation, norms": float(norms.detach()),
        "variation, means": float(means.detach()),
        "slope of variation": along(torch.autograd.grad(norms, x)[0]),
    }


def lti_inputs() -> dict[str, Any]:
    """Gradients of single images, two to a client, their images, and the order of training."""
    P, features, pixels = 40, 30, 12
    v = draw(60, 2 * P, features, dtype=torch.float32)
    x = draw(61, 2 * P, pixels, dtype=torch.float32).sigmoid()
    return {"v": v, "x": x, "held_out": 4, "batch": 8, "epochs": 4, "hidden": 16, "lr": 1e-3}


def lti() -> dict[str, float]:
    """The held-out error and the weights after four epochs on clients of two images."""
    given = lti_inputs()
    attack = LTI(
        epochs=given["epochs"], hidden=given["hidden"], lr=given["lr"], batch_size=given["batch"]
    )
    u, x = given["v"].unflatten(0, (-1, 2)).mean(1), given["x"].unflatten(0, (-1, 2))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        learned = attack.fit(u, x, generator=stream("lti", "differential"), watch=Watch())
    weights = [t for n, t in learned.items() if n.startswith("network/body")]
    return {
        "held-out error": float(10 ** (-learned["held_out_psnr"] / 10)),
        "weights, 4 epochs": sum(along(t) for t in weights),
    }


def fishing_inputs() -> nn.Module:
    """A ConvNet whose head is changed."""
    return models.build("convnet", width=4, size=16)


def fishing() -> dict[str, float]:
    """The head after one round of class fishing, and after one cut of a feature."""
    figures: dict[str, float] = {}
    for name, move in (
        ("class", Move(CLASS, 4, gain=0.5, beta=1_000.0)),
        ("feature", Move(CUT, 4, feature=17, theta=0.37, gain=300.0)),
    ):
        model = fishing_inputs()
        set_head(model, labels.find_head(model), move)
        *_, weight, bias = model.parameters()
        figures |= {f"weights, {name} head": along(weight), f"biases, {name} head": along(bias)}
    return figures


CONVOLUTIONS = ((1, 8, 3, 1, 1, 5), (2, 12, 3, 1, 1, 6), (3, 12, 4, 2, 2, 8))
"""Channels in and out, kernel, stride, padding and side of the input."""


def rgap_inputs(number: int) -> dict[str, Any]:
    """A convolution in float32, its input, its output and the gradients of both sides."""
    inside, outside, kernel, stride, padding, side = CONVOLUTIONS[number]
    conv = nn.Conv2d(inside, outside, kernel, stride, padding, bias=False)
    seed, single = 10 * number, torch.float32
    with torch.no_grad():
        conv.weight.copy_(draw(70 + seed, *conv.weight.shape, dtype=single) / 4)
    x = draw(71 + seed, 1, inside, side, side, dtype=single)
    z = conv(x)
    k = draw(72 + seed, *z.shape, dtype=single)
    (g,) = torch.autograd.grad(z, conv.weight, grad_outputs=k)
    return {"conv": conv, "x": x, "z": z.detach(), "k": k, "g": g}


def rgap() -> dict[str, float]:
    """Inputs of convolutions from weight gradient and output."""
    figures: dict[str, float] = {}
    for number, (inside, *_, side) in enumerate(CONVOLUTIONS):
        given = rgap_inputs(number)
        found = solve_convolution(
            given["conv"], (inside, side, side), given["k"].flatten().double(), given["g"],
            given["z"].flatten().double(),
        )  # fmt: skip
        figures[f"input of convolution {number}"] = along(found.x)
    return figures


def quantization() -> dict[str, float]:
    """A tensor on 16 magnitudes, rounded at random and to the nearest, and its signs."""
    v = draw(200, 300)
    draws = torch.rand(300, generator=torch.Generator().manual_seed(201), dtype=torch.float64)
    scale = v.abs().max()
    return {
        "random, 16 levels": along(quantization_row.quantised(v, 5, scale, draws)),
        "nearest, 16 levels": along(quantization_row.quantised(v, 5, scale)),
        "signs": along(quantization_row.quantised(v, 1, torch.ones(()))),
    }


def rog_inputs() -> dict[str, Any]:
    """A network without biases, two images, and a low-resolution start."""
    model = models.build("fc", classes=10, size=16, widths=(20,), act="sigmoid", bias=False)
    model = model.double()
    x = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(97)).double()
    z = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(98)).double()
    return {"model": model, "x": x, "y": [3, 5], "z": z, "lr": 0.05}


def rog() -> dict[str, float]:
    """The squared distance at an enlarged start and its slope, of one step and of two."""
    given = rog_inputs()
    model, target, x = given["model"], torch.tensor(given["y"]), given["x"]
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    z, figures = given["z"].requires_grad_(), {}
    for steps in (1, 2):
        protocol = FedAVG(epochs=steps, batch_size=2, lr=given["lr"])
        sent, mine = (
            replay.unroll(model, parameters, {}, images, target, protocol)
            for images in (x, enlarged(z, (3, 16, 16)))
        )
        g, own = ({n: -t / given["lr"] for n, t in delta.items()} for delta in (sent, mine))
        distance = matching.squared_l2(own, {n: t.detach() for n, t in g.items()})
        figures[f"distance, {steps} steps"] = float(distance.detach())
        figures[f"slope, {steps} steps"] = along(torch.autograd.grad(distance, z)[0])
    return figures


def robbing_the_fed_inputs() -> dict[str, Tensor]:
    """Twelve images, a measurement, and the slope of the loss at the block's output."""
    x = torch.rand(12, 3, 8, 8, generator=torch.Generator().manual_seed(80)).double()
    x = (x - x.mean()) / x.std()
    return {"x": x, "w": draw(81, 192) / 192**0.5, "slope": draw(82, 12, 192)}


def robbing_the_fed() -> dict[str, float]:
    """Thresholds, gradients of the block, and the images read below the top bin."""
    given = robbing_the_fed_inputs()
    edges = readout.bin_edges("normal", 32)
    block = edits.Imprint(given["w"], edges, spread=None).layers().double()
    out = block(given["x"]) * given["slope"].view(12, 3, 8, 8)
    g_w, g_b = torch.autograd.grad(out.sum(), (block.first.weight, block.first.bias))
    read = readout.cumulative_readout(g_w, g_b, edges[:-1])
    return {
        "thresholds": along(edges[:-1]),
        "gradient of the weights": along(g_w),
        "gradient of the biases": along(g_b),
        "images below the top bin": sum(along(x) for x in read.x[read.rows < 31]),
        "their number": float((read.rows < 31).sum()),
    }


def loki_inputs() -> dict[str, Tensor]:
    """Six images brighter than black, 17 rising edges, and the slope of the loss at the bins."""
    x = 0.1 + 0.8 * torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(90)).double()
    edges = x.mean() + 0.02 * draw(91, 17).sort().values
    return {"x": x, "edges": edges, "slope": draw(92, 6, 16)}


def loki() -> dict[str, float]:
    """The second of two clients: kernels, its columns of FC1, and their gradients."""
    given = loki_inputs()
    w = torch.full((192,), 1 / 192, dtype=torch.float64)
    layers = edits.SplitImprint(
        w, given["edges"], (3, 8, 8), clients=2, group=1, kappa=500.0, spread=1.0
    ).layers()
    fired = nn.functional.hardtanh(layers.first(layers.conv(given["x"]).flatten(1)), 0.0, 1.0)
    parameters = (layers.first.weight, layers.first.bias)
    g_w, g_b = torch.autograd.grad((fired * given["slope"]).sum(), parameters)
    return {
        "kernels": along(layers.conv.weight),
        "weights, own columns": along(layers.first.weight[:, 192:]),
        "biases": along(layers.first.bias),
        "gradient of the weights, own columns": along(g_w[:, 192:]),
        "gradient of the biases": along(g_b),
    }


def scale_mia_inputs() -> dict[str, Tensor]:
    """Twelve latents with a bin each, 1,024 thresholds, and the deltas of the examples."""
    z = torch.rand(12, 1_024, generator=torch.Generator().manual_seed(100)).double()
    z = z * torch.linspace(0.8, 1.2, 12, dtype=torch.float64)[:, None]
    return {"z": z, "edges": torch.linspace(0.35, 0.65, 1_024).double(), "delta": draw(101, 12)}


def scale_mia() -> dict[str, float]:
    """The malicious layers, and the latents read from one gradient."""
    given = scale_mia_inputs()
    z, edges = given["z"], given["edges"]
    first, second, third = nn.Linear(1_024, 1_024), nn.Linear(1_024, 512), nn.Linear(512, 10)
    parts = Parts((), first, second, third, ("first", "second", "third"), (64, 4, 4), dropout=False)
    write_bins(parts, edges, torch.Generator())
    fired = (z.mean(dim=1)[:, None] > edges) * given["delta"][:, None]
    read = readout.cumulative_readout(fired.T @ z, fired.sum(dim=0), edges)
    return {
        "weights of the first layer": along(first.weight),
        "biases of the first layer": along(first.bias),
        "weights of the second layer": along(second.weight),
        "biases of the second layer": along(second.bias),
        "latents": sum(along(latent) for latent in read.x),
        "their number": float(len(read.x)),
    }


def mkor_inputs() -> dict[str, Tensor]:
    """Features of five examples, of classes 0 to 4, as a convolution would give them."""
    z = torch.rand(5, 400, generator=torch.Generator().manual_seed(120)).double()
    return {"z": z, "y": torch.arange(5)}


def mkor() -> dict[str, float]:
    """The decoupling head, its gradient under the official loss, and the features in it."""
    given, model = mkor_inputs(), models.build("lenet5", in_channels=1, size=28).double()
    layout, modules = mkor_row.plan(model, (1, 28, 28)), dict(model.named_modules())
    mkor_row.set_head(model, layout, Box.unit(1), sink=False)
    layers = [modules[name] for name in layout.linear]
    h = given["z"]
    for layer in layers[:-1]:
        h = layer(h).sigmoid()
    loss = nn.functional.nll_loss(layers[-1](h), given["y"])  # of raw logits
    weight, bias = layers[0].parameters()
    g_w, g_b = torch.autograd.grad(loss, (weight, bias))
    rows = readout.ratio_readout(g_w[:5], g_b[:5])
    return {
        "weights of the head": sum(along(p) for layer in layers for p in layer.parameters()),
        "gradient of the first layer": along(g_w),
        "features": along(rows.x[rows.rows.argsort()]),
    }


def seer() -> dict[str, float]:
    """The weight of the others over a training of 1,000 epochs, and the image that is picked."""
    x = torch.rand(16, 3, 8, 8, generator=torch.Generator().manual_seed(110)).double()
    epochs = torch.tensor([schedule(epoch / 1_000, 16) for epoch in range(1_000)])
    return {
        "weight of the others": along(epochs),
        "brightest image": along(x[int(SEER(form="max").picked(x[None])[0].argmax())]),
    }


def trap_weights() -> dict[str, float]:
    """The rows on average; no two programs draw the same ones."""
    like, generator = torch.zeros(1), torch.Generator().manual_seed(0)
    rows = surgery.trap_rows(1_000, 3_072, scaling=0.95, sigma=0.5, generator=generator, like=like)
    ordered = rows.double()
    positive, negative = ordered.clamp(min=0).sum(dim=1), -ordered.clamp(max=0).sum(dim=1)
    return {
        "mean sum of a row": float(ordered.sum(dim=1).mean()),
        "positive over negative weights": float((positive / negative).mean()),
    }


OURS: dict[str, Callable[[], dict[str, float]]] = {
    "april": april,
    "cpa": cpa,
    "dia": dia,
    "dlfa": dlfa,
    "dlg": dlg,
    "e2egi": e2egi,
    "fishing": fishing,
    "fl_gradinv": fl_gradinv,
    "hf_gradinv": hf_gradinv,
    "inverting_gradients": inverting_gradients,
    "lti": lti,
    "loki": loki,
    "mkor": mkor,
    "quantization": quantization,
    "rgap": rgap,
    "robbing_the_fed": robbing_the_fed,
    "rog": rog,
    "scale_mia": scale_mia,
    "seer": seer,
    "sme": sme,
    "trap_weights": trap_weights,
}
"""Rows whose comparison is made again."""
