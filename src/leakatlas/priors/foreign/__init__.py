"""Priors of others, offline: a folder with weights, and a ``prior.yaml`` that says what they are.

::

    schema: leakatlas/prior/1
    kind: biggan
    weights: pytorch_model.bin
    data: ImageNet training images (Russakovsky et al., 2015)
    license: Apache-2.0

``kind`` is one of

================== ==============================================================================
``biggan``         BigGAN-deep of the package pytorch-pretrained-biggan; ``config.json`` beside it
``stylegan2``      StyleGAN2 under the names of the PyTorch port, converted to safetensors
``unet2d``         a diffusion model of diffusers: its ``config.json`` or a pipeline's folder
``autoencoder_kl`` the decoder of an AutoencoderKL of diffusers
``layers``         any stack of torch's own layers, written out in the recipe
================== ==============================================================================

All of it is data: the architecture is code of an installed package or of ours, never of the folder,
and weights are read as plain tensors. No weights of others are part of LeakAtlas.
"""

from leakatlas.priors.foreign.recipe import RECIPE as RECIPE
from leakatlas.priors.foreign.recipe import describes as describes
from leakatlas.priors.foreign.recipe import load as load
