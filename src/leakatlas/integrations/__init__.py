"""Capture adapters for other frameworks."""
