"""Defenses that change what is learned, or from what."""
