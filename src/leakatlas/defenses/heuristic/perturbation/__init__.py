"""Defenses that change the update itself."""
