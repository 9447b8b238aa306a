"""``python -m leakatlas``: the command line without its script."""

from leakatlas.cli import main

main()
