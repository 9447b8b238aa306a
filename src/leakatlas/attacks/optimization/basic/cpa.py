r"""Cocktail Party Attack: the gradient of a linear layer is a mixture of its inputs; unmix it.

Kariyappa, Guo, Maeng, Xiong, Suh, Qureshi and Lee, "Cocktail Party Attack: Breaking
Aggregation-Based Privacy in Federated Learning Using Independent Component Analysis", ICML 2023.
FedSGD, one round; sums over clients as well, since a sum of mixtures is a mixture.

The gradient of a linear layer with h outputs and d inputs over n examples is
:math:`G = \Delta^T X`, ``(h, d)``: h mixtures of n signals of length d. Blind source separation
gives the signals back, up to order, sign and scale, if h >= n:

1. Centre the rows of G and whiten them: :math:`Z = W (G - \mu)` with n rows of unit covariance.
2. Find U with rows of norm 1 that minimises, for :math:`\hat S = U Z` and
   :math:`\hat X = \hat S + U W \mu = U W G`,

.. math:: \lambda_{ne} L_{ne}(\hat S) + \lambda_{dec} \operatorname{mean}_{ij}
          (e^{T |\langle u_i, u_j \rangle|} - 1)
          + \lambda_{tv}\, \mathrm{TV}(\hat X) \quad\text{(images)}
          + \lambda_{nv} \operatorname{mean}_i \min(\lVert \hat x_i^+ \rVert,
            \lVert \hat x_i^- \rVert) + \lambda_1 \operatorname{mean} |\hat X|
          \quad\text{(embeddings)}

3. If the layer reads the image, the rows of :math:`\hat X` are the images. Otherwise they are the
   embeddings :math:`z_i` of the images below that layer, and each image is sought by *feature
   inversion*: minimise :math:`1 - \cos(z_i, f(x)) + \lambda\,\mathrm{TV}(x)`.

Independence is measured by negentropy, with :math:`m_i = \mathbb{E} \log\cosh \hat s_i`:
``fastica`` :math:`-(m_i - 0.3746)^2`, the distance from a Gaussian, ``paper`` :math:`-m_i^2`, or
``off``. The paper's form lacks the Gaussian's value. It grows with *sub*-Gaussian signals, so it
opposes the separation of sparse ones (embeddings); the reference makes both kinds separate.

Measured (studies ``cpa`` and ``cpa_sums``): in minutes on a CPU few images of a sum come apart,
fewer the more there are. Of eight all do, and the term of independence makes the difference from
the released objective; of dozens it makes none. [3], its labels granted, tuned or rehearsed, is
ahead on sums of dozens.

Departures:
    - ``negentropy`` is ``fastica`` by default, for the reason above. In the released code the term
      is set to zero right after it is computed, which is ``off``; with the priors off as well,
      its objective is stationary at the start.
    - The release chooses the sign of every image by comparison with the truth. Here the layer's
      bias gives it: :math:`(UW)_i\, g_b` estimates the same factor as row i of :math:`\hat X`
      carries. The bias gives the size too: ``scale="bias"`` divides by it, which is exact if the
      unmixing is; ``"minmax"`` stretches every row over the pixel range, as published. Without a
      bias the sign stays unknown and is what the separation happened to give.
    - Singular values in float64 in place of a float32 eigendecomposition of a general matrix.
    - The iterate of smallest objective is kept, not the last one.
    - The optional stage that matches the whole gradient passes free numbers for class
      probabilities in the released code; here they go through a softmax (``match_weight``).
    - The weights of all terms were swept in [1e-5, 10] by the authors, by LPIPS against the truth
      of one batch. :meth:`CPA.tuned` is ours, chosen on other images than any figure.

Released code: ``facebookresearch/cocktail_party_attack``, ``src/gradient_inversion.py``,
``src/feature_inversion.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, Self

import torch
from torch import Tensor
from torch.nn import functional as F

from leakatlas.attacks.api import Attack, Outlook, Reconstruction, attack, nothing_found
from leakatlas.blocks import descent, init, labels, matching, priors, readout, separation
from leakatlas.blocks.separation import Mixture, White
from leakatlas.blocks.watch import Watch
from leakatlas.data import Box
from leakatlas.errors import UnsupportedModel
from leakatlas.fl import View
from leakatlas.params import NonNegative, Positive, PositiveInt
from leakatlas.threat import Knowledge


@attack("cpa", needs=Knowledge.UPDATES | Knowledge.BASIC)
@dataclass(frozen=True, kw_only=True)
class CPA(Attack):
    r"""Independent component analysis of a linear layer's gradient, then feature inversion.

    Args:
        steps: Iterations of the separation.
        lr: Step size of Adam on the unmixing matrix.
        negentropy: How independence is measured.
        negentropy_weight: :math:`\lambda_{ne}`.
        decorrelation: :math:`\lambda_{dec}` for images (Tiny-ImageNet).
        temperature: T for images.
        tv_weight: :math:`\lambda_{tv}`, images only.
        embedding_decorrelation: :math:`\lambda_{dec}` for embeddings (ImageNet, VGG-16).
        embedding_temperature: T for embeddings.
        sign_weight: :math:`\lambda_{nv}`, embeddings only.
        l1_weight: :math:`\lambda_1`, embeddings only.
        scale: What gives images their size: the bias, or the pixel range.
        inversion_steps: Iterations of the feature inversion; unused if the layer reads the image.
        inversion_lr: Step size of Adam on the images, along a cosine.
        inversion_tv: :math:`\lambda` of the feature inversion.
        match_weight: Weight of the cosine distance of the whole gradient during the inversion,
            with class probabilities sought along; 0 leaves it out.
    """

    counts: ClassVar[tuple[str, ...]] = ("steps", "inversion_steps")

    steps: PositiveInt = 25_000
    lr: Positive = 1e-3
    negentropy: separation.Negentropy = "fastica"
    negentropy_weight: NonNegative = 1.0
    decorrelation: NonNegative = 1.47
    temperature: Positive = 12.4
    tv_weight: NonNegative = 3.1
    embedding_decorrelation: NonNegative = 5.3
    embedding_temperature: Positive = 7.7
    sign_weight: NonNegative = 0.13
    l1_weight: NonNegative = 5.0
    scale: Literal["minmax", "bias"] = "minmax"
    inversion_steps: PositiveInt = 25_000
    inversion_lr: Positive = 0.1
    inversion_tv: NonNegative = 0.1
    match_weight: NonNegative = 0.0

    @classmethod
    def tuned(cls) -> Self:
        """Our setting for a thousand iterations or two on small images."""
        return cls(
            steps=1_500,
            lr=1e-2,
            negentropy_weight=100.0,
            decorrelation=0.3,
            tv_weight=20.0,
            scale="bias",
            inversion_steps=1_000,
        )

    @classmethod
    def variants(cls) -> Mapping[str, Self]:
        """Ours, the published objective, and the published one as it was released."""
        return {
            "tuned": cls.tuned(),
            "published": cls(),
            "released": cls(negentropy="off"),
        }

    def outlook(self, view: View) -> Outlook:
        """As many mixtures as examples are needed, and a layer that reads one row an example."""
        try:
            mixture = separation.find_mixture(view.model, view.input_shape)
        except UnsupportedModel as problem:
            return Outlook("hopeless", str(problem))
        n, h = view.num_examples, mixture.layer.out_features
        if n > h:
            return Outlook(
                "hopeless",
                f"{mixture.name} gives {h} mixtures of {n} inputs; a separation needs as many",
            )
        if n > mixture.layer.in_features:
            return Outlook(
                "hopeless",
                f"{n} inputs of {mixture.layer.in_features} values are linearly dependent",
            )
        if mixture.reads_image:
            return Outlook("applicable", f"{mixture.name} reads the image: {h} mixtures of {n}")
        return Outlook(
            "unknown", f"{mixture.name} gives embeddings; each image must be found from its own"
        )

    def run(self, view: View, *, generator: torch.Generator, watch: Watch) -> Reconstruction:
        """Whiten, separate, and turn what was separated into images."""
        n, shape = view.num_examples, view.input_shape
        mixture = separation.find_mixture(view.model, shape)
        state = view.rounds[-1].state
        G = readout.sent_change(view.update, state, f"{mixture.name}.weight").double()
        tolerance = readout.relative_tolerance(view.update.tensors[f"{mixture.name}.weight"].dtype)
        rank = separation.numerical_rank(G, tolerance, n)
        if rank < n:
            return nothing_found(
                shape,
                f"the gradient of {mixture.name} has rank {rank}; {n} inputs cannot be separated",
                rank=float(rank),
                components=float(n),
            )
        white = separation.whiten(G, n)
        stages = watch.share(1 if mixture.reads_image else (0.5, 0.5))
        like = next(iter(view.update.tensors.values()))
        light = White(*(t.to(like) for t in (white.Z, white.W, white.shift)))
        found = self.separate(light, mixture, shape, next(stages))
        if found.trouble:
            return nothing_found(shape, found.trouble, rank=float(rank))
        U = separation.unit_rows(found.best["u"].double())
        rows = U @ white.W @ G
        factors = None
        if f"{mixture.name}.bias" in view.update.tensors:
            g_b = readout.sent_change(view.update, state, f"{mixture.name}.bias").double()
            factors = U @ white.W @ g_b
        independence = (separation.log_cosh(U @ white.Z).mean(1) - separation.GAUSSIAN).square()
        notes = {
            "rank": float(rank),
            "components": float(n),
            "objective": float(found.criterion),
            "iterations": float(found.steps),
            "sign_known": float(factors is not None),
        }
        if mixture.reads_image:
            images = as_images(rows, factors, self.scale, view.box, shape, like)
            return Reconstruction(images=images, confidence=independence, notes=notes)
        rest = next(stages, None)
        if rest is None:  # the budget ended: there are embeddings, but no image yet
            return nothing_found(shape, "no time was left to invert the embeddings", **notes)
        inverted = self.invert(rows.abs().to(like), mixture, view, generator, rest)
        classes = inverted.best["y"].argmax(1) if "y" in inverted.best else None
        return Reconstruction(
            images=inverted.best["x"],
            labels=classes,
            confidence=independence,
            notes=notes | {"inversion_objective": float(inverted.criterion)},
        ).or_failed(inverted.trouble)

    def separate(
        self, white: White, mixture: Mixture, shape: tuple[int, ...], watch: Watch
    ) -> descent.Descended:
        """Step 2: the unmixing matrix ``u`` ``(n, n)``, rows not normalised."""
        n = len(white.Z)

        def objective(variables: descent.Variables, t: Tensor) -> Tensor:
            del t
            return torch.stack(
                list(self.terms(variables["u"], white, mixture, shape).values())
            ).sum()

        start = torch.eye(n, dtype=white.Z.dtype, device=white.Z.device)
        return descent.descend(
            objective, {"u": start}, optimizer=descent.adam(self.lr), steps=self.steps, watch=watch
        )

    def terms(
        self, u: Tensor, white: White, mixture: Mixture, shape: tuple[int, ...]
    ) -> dict[str, Tensor]:
        """The weighted terms of step 2 at an unmixing matrix ``(n, n)``."""
        U = separation.unit_rows(u)
        S = U @ white.Z
        X = S + U @ white.shift
        found = {}
        if self.negentropy != "off":
            found["negentropy"] = self.negentropy_weight * separation.negentropy(S, self.negentropy)
        if mixture.reads_image:
            found["decorrelation"] = self.decorrelation * separation.alike(U, self.temperature)
            found["tv"] = self.tv_weight * priors.tv_mean(X.reshape(-1, *shape))
        else:
            closeness = separation.alike(U, self.embedding_temperature)
            found["decorrelation"] = self.embedding_decorrelation * closeness
            found["sign"] = self.sign_weight * separation.two_signs(X)
            found["l1"] = self.l1_weight * X.abs().mean()
        return found

    def invert(
        self,
        z: Tensor,
        mixture: Mixture,
        view: View,
        generator: torch.Generator,
        watch: Watch,
    ) -> descent.Descended:
        """Step 3: images ``x`` whose embeddings point where ``z`` ``(n, d)`` does."""
        f = separation.features(view.model, mixture.name)
        start = {"x": init.normal(view.batch_shape, generator=generator, like=z)}
        if self.match_weight:
            start["y"] = labels.joint_logits(
                view.num_examples, view.classes, generator=generator, like=z
            )
            replay, g = view.replayer(), dict(view.update.tensors)

        def objective(variables: descent.Variables, t: Tensor) -> Tensor:
            del t
            x = variables["x"]
            total = (1 - F.cosine_similarity(z, f(x), dim=1, eps=1e-10)).mean()
            total = total + self.inversion_tv * priors.tv_mean(x)
            if self.match_weight:
                mine = replay(x, labels.soft_labels(variables["y"]))
                total = total + self.match_weight * matching.cosine(mine, g)
            return total

        return descent.descend(
            objective,
            start,
            optimizer=descent.adam(self.inversion_lr),
            steps=self.inversion_steps,
            watch=watch,
            schedule=descent.cosine_decay(),
            after=(descent.inside(view.box, "x"),),
        )


# -- the images -----------------------------------------------------------------------------------


def as_images(
    rows: Tensor,
    factors: Tensor | None,
    scale: Literal["minmax", "bias"],
    box: Box,
    shape: tuple[int, ...],
    like: Tensor,
) -> Tensor:
    """Separated rows as images ``(n, C, H, W)`` in the box.

    Args:
        rows: ``(n, d)``, each an input times an unknown factor.
        factors: ``(n,)`` the factors as the bias shows them, or None.
        scale: Divide by the factor, or stretch over the pixel range; without factors the latter.
        box: The pixel space.
        shape: ``(C, H, W)``.
        like: Gives dtype and device.
    """
    if factors is not None and scale == "bias":
        small = torch.finfo(like.dtype).eps * factors.abs().max()
        divisor = torch.where(factors.abs() > small, factors, small)
        return box.clip((rows / divisor[:, None]).reshape(-1, *shape).to(like))
    if factors is not None:
        rows = rows * torch.where(factors < 0, -1.0, 1.0).to(rows)[:, None]
    low, high = rows.amin(1, keepdim=True), rows.amax(1, keepdim=True)
    flat = (rows - low) / (high - low).clamp(min=torch.finfo(rows.dtype).tiny)
    return box.clip(box.normalize(flat.reshape(-1, *shape).to(like)))
