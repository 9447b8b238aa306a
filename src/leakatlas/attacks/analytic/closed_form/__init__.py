"""Passive closed forms: linear systems and ratios on an honest update."""
