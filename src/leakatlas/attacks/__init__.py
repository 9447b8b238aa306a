"""The attacks, one file a row: `attacks/<category>/<technique>/<work>.py`."""
