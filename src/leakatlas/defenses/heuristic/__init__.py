"""Defenses without a formal guarantee: what they promise is what was measured."""
