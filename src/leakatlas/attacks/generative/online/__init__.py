"""A generator is trained while the rounds go on."""
