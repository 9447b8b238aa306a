"""Both attacks as they rehearse."""

from leakatlas.audit.rehearsed import rehearsed as choose

__all__ = ["choose"]
