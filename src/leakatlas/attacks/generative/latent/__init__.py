"""Search in the latent space of a pretrained generator."""
