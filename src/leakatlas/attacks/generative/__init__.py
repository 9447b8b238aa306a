"""Attacks whose prior is a generator: learned online, applied directly, or searched."""
