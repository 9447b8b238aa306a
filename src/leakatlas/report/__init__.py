"""Reports: one self-contained HTML page for people, ``report.json`` for machines."""

from leakatlas.report.write import render_page, write_report

__all__ = ["render_page", "write_report"]
