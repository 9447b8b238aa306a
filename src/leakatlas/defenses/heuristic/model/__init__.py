"""Defenses that change the architecture."""
