"""Flower's quickstart network on bundled photos, captured for an audit."""
