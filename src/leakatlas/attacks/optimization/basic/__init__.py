"""Gradient matching on the pixels themselves."""
