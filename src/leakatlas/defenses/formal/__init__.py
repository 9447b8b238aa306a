"""Defenses with a guarantee that can be stated: differential privacy and cryptography."""
