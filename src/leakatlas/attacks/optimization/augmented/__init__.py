"""Gradient matching with learned parts before, within or after the search."""
