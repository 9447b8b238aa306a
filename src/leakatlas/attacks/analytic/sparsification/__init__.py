"""Active attacks that make single examples own single entries of a gradient."""
