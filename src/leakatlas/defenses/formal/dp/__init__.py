"""Differential privacy, added by the server or by the clients."""
