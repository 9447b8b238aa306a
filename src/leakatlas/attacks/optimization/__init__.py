"""Attacks that search for the batch whose update is the observed one."""
