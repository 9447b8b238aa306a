"""Attacks that compute inputs in closed form, from the update as it is or as it was made to be."""
