"""The catalogue as a static site: plain pages, one style sheet, one script, no network.

Example:
    ``leakatlas site build public/`` writes the pages; opening ``public/index.html`` shows them.
"""

from leakatlas.site.build import build

__all__ = ["build"]
