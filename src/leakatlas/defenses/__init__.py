"""The defenses, one file a row: `defenses/<category>/<technique>/<work>.py`."""
