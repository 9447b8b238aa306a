"""Studies over scenario x attack x defense."""
