"""What a set-up is, in figures, and what follows from them before anything is attacked."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from leakatlas.audit.inputs import about_the_inputs
from leakatlas.fl import Stage, Update
from leakatlas.fl.losses import BCE, NLL, CrossEntropy, Focal, Loss
from leakatlas.fl.state import trained
from leakatlas.models import structure
from leakatlas.models.structure import in_mode

SUMS_TO_ONE = 1e-4
"""How far the outputs of a softmax may be from 1."""


def facts_of(
    stage: Stage, model: nn.Module, x: Tensor, y: Tensor, update: Update
) -> tuple[dict[str, float], list[str]]:
    """Figures about model, batch and upload, and what follows from them.

    Args:
        stage: The set-up.
        model: As the client received it.
        x: The client's inputs, model space.
        y: Its targets.
        update: What it sent.
    """
    private = stage.federation.private_names
    own = trained(model)
    shared = sum(p.numel() for n, p in own.items() if n not in private)
    everything = sum(p.numel() for p in model.parameters())
    examples = update.num_examples
    unknowns = examples * int(torch.tensor(stage.input_shape).prod())
    duplicates = len(y) - len(y.unique(dim=0))
    steps = stage.federation.protocol.steps(examples // update.clients)
    facts: dict[str, float] = {
        "examples": examples,
        "shared parameters": shared,
        "unknown pixels": unknowns,
        "equations per unknown": shared / unknowns,
        "local steps": steps,
    }
    findings = [
        *_about_the_loss(stage.federation.protocol.loss, model, x),
        *_vanishing(model, update),
    ]
    recipe = stage.federation.protocol.augment
    if recipe:
        findings.append(
            f"The client transforms its images ({', '.join(one.name for one in recipe)}): what "
            "comes out are the transformed images, unless the adversary is granted the draws."
        )
    if stage.known:
        facts["duplicate labels"] = duplicates
        figures, warnings = about_the_inputs(model, x, y, stage.box)
        facts |= figures
        findings += warnings
    if y.dim() > 1:
        findings.append(
            "Targets are vectors: reconstructions of images are scored, recovered targets are not."
        )
    if shared < everything:
        constant = everything - sum(p.numel() for p in own.values())
        behind = everything - constant - shared
        findings.append(
            f"{shared:,} of {everything:,} parameters leave the client: {constant:,} are constants "
            f"that take no gradient, {behind:,} are trained and stay. The adversary holds the "
            "latter as they were handed out, not as they moved since. Layers that a malicious "
            "server adds are taken to leave too: whoever knows what is sent can name them so."
        )
    if shared < unknowns:
        findings.append(
            f"Fewer equations than unknown pixels ({shared:,} against {unknowns:,}): without a "
            "prior, exact recovery of the whole batch is impossible for a passive adversary."
        )
    if duplicates and stage.known:
        findings.append(
            f"{duplicates} of {len(y)} labels repeat: label rules that return distinct classes "
            "must fail, and images that share a label tend to fuse."
        )
    if steps > 1:
        findings.append(
            f"The upload sums {steps} local steps: attacks must unroll them (letter C and above "
            "know how), or treat the delta as one gradient and pay for the drift."
        )
    if structure.has_batchnorm(model):
        findings.append(
            "The model has batch normalisation in "
            + _batchnorm(stage.federation.protocol.mode, update, steps)
        )
    bins = 4 * examples
    hits = examples * (1 - 1 / bins) ** (examples - 1)
    facts["expected singleton bins (4 bins per image)"] = hits
    first = structure.first_linear(model)
    if first is None:
        findings.append("No linear layer: read-outs of gradient ratios have nothing to read.")
    return facts, findings


def _batchnorm(mode: str, update: Update, steps: int) -> str:
    """Who knows the statistics of the client's batch."""
    if mode != "train":
        return "eval mode: the shared running statistics serve the adversary as an image prior."
    coupled = "train mode: examples are coupled through the batch's own statistics, "
    if not any(name.endswith("running_mean") for name in update.buffers_after):
        return coupled + "which the adversary does not hold unless they are granted."
    counts = {"local steps": steps, "clients": update.clients}
    mixed = [f"{count} {name}" for name, count in counts.items() if count > 1]
    how = f"as their mean over {' and '.join(mixed)}" if mixed else "as they are"
    return coupled + (
        f"and the running statistics in the upload give them away, {how}, also where a defense "
        "changes the gradient alone. They stay on the client with "
        'shared: ["!@BatchNorm*"], and GroupNorm has none.'
    )


def _about_the_loss(loss: Loss, model: nn.Module, x: Tensor) -> list[str]:
    """Losses and outputs that do not belong together, seen on the batch and on noise."""
    # Far from any image: logits leave [0, 1] there, probabilities do not.
    noise = 30 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    with in_mode(model, train=False), torch.no_grad(), torch.random.fork_rng(devices=[]):
        outputs = model(torch.cat([x, noise.to(x)]))
    found = []
    within = bool((outputs >= 0).all()) and bool((outputs <= 1).all())
    sums = within and bool(((outputs.sum(1) - 1).abs() < SUMS_TO_ONE).all())
    classes = outputs.shape[1]
    if classes == 1 and isinstance(loss, CrossEntropy | NLL | Focal):
        found.append(
            f"The model has one output, whose softmax is always 1: the gradient of {loss.key} is "
            "identically zero and nothing is learned. Use loss='bce', or two outputs."
        )
    elif sums and isinstance(loss, CrossEntropy | Focal):
        found.append(
            f"The model's outputs sum to 1: it ends with a softmax, and {loss.key} applies "
            "another. Remove one; a client that takes the negative log-likelihood of "
            "probabilities is loss='nll', whose gradient differs."
        )
    elif isinstance(loss, NLL) and not _log_probabilities(outputs):
        found.append(
            "loss='nll' takes log-probabilities, and the exponentials of this model's outputs do "
            "not sum to 1"
            + (" (the outputs themselves do: a softmax without its logarithm)." if sums else
               ". If it returns logits, its loss is 'cross_entropy'.")
        )  # fmt: skip
    elif within and isinstance(loss, BCE) and loss.from_logits:
        found.append(
            "The model's outputs lie in [0, 1]: if it ends with a sigmoid, the loss is "
            "{name: bce, from_logits: false}."
        )
    return found


def _log_probabilities(outputs: Tensor) -> bool:
    return bool((outputs.exp().sum(1) - 1).abs().max() < SUMS_TO_ONE)


def _vanishing(model: nn.Module, update: Update) -> list[str]:
    """An upload that says nothing, or less than the rounding of the weights that it moves."""
    size = sum(float(t.double().square().sum()) for t in update.tensors.values()) ** 0.5
    if size == 0:
        return ["The update is identically zero: it holds nothing, and training stands still."]
    named = dict(model.named_parameters())
    norm = sum(float(named[n].detach().double().square().sum()) for n in update.tensors) ** 0.5
    dtype = next(iter(update.tensors.values())).dtype
    if update.kind == "gradient" and size < torch.finfo(dtype).eps * norm:
        return [
            f"The gradient all but vanishes (norm {size:.1e} beside weights of norm {norm:.1e}): "
            "rounding may be all that it shows. Saturated outputs or a wrong loss do that."
        ]
    return []
