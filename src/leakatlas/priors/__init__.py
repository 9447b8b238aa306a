"""Generative priors: what they are, how they are learned, and where they are kept.

``prior`` says what an attack may ask of one, ``learning`` holds the three recipes (decoder of a
variational autoencoder, GAN, diffusion), ``kept`` the files and their provenance cards.
"""

from leakatlas.priors.kept import load as load
from leakatlas.priors.kept import save as save
from leakatlas.priors.prior import CEILING as CEILING
from leakatlas.priors.prior import Diffusion as Diffusion
from leakatlas.priors.prior import Prior as Prior
from leakatlas.priors.prior import inversion_psnr as inversion_psnr
