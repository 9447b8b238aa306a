"""The living catalogue: what is published about gradient inversion, as typed rows.

Four TOML files hold the published facts (law: *published, ours and measured are three homes*),
:mod:`~leakatlas.catalogue.schema` types them, and everything else, the tables, pages, citations and
the site, is computed from them. Importing this package reads no file and loads neither torch nor
pydantic; the rows are read on first use.

Example:
    >>> from leakatlas import catalogue
    >>> catalogue.attack("dlg").threat_model
    'A'
    >>> len(catalogue.attacks()), len(catalogue.defenses()), len(catalogue.threat_models())
    (36, 21, 8)
"""

from leakatlas.catalogue.loader import (
    attack,
    attacks,
    defense,
    defenses,
    reference,
    references,
    threat_model,
    threat_models,
)

__all__ = [
    "attack",
    "attacks",
    "defense",
    "defenses",
    "reference",
    "references",
    "threat_model",
    "threat_models",
]
