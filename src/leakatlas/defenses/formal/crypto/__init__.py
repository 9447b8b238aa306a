"""Cryptographic aggregation: the server learns a sum and no single message."""
