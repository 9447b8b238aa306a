"""What an audit is about, in the words of whoever answers for it: for an impact assessment."""

from __future__ import annotations

from datetime import date
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

Line = Annotated[str, StringConstraints(max_length=600)]
"""A sentence or two; a report is no archive."""


class Context(BaseModel):
    """Purpose, roles and scope of the processing; printed as given, never interpreted."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    purpose: Line = ""
    """Why the data are processed."""
    controllers: tuple[Line, ...] = ()
    """Who decides on purpose and means."""
    processors: tuple[Line, ...] = ()
    """Who processes on their behalf."""
    data: tuple[Line, ...] = ()
    """Categories of personal data behind the images."""
    people: tuple[Line, ...] = ()
    """Categories of people that the data are about."""
    special_categories: bool | None = None
    """Whether special categories (health, biometrics, ...) are among the data."""
    people_per_update: int | None = Field(default=None, gt=0)
    """How many people stand behind one client's update."""
    adversaries: dict[str, Line] = Field(default_factory=dict)
    """Who plays which adversary here: ``{C: our aggregator vendor}``."""
    rounds: int = Field(default=1, gt=0)
    """Rounds in which one client takes part; (epsilon, delta) is stated for them."""
    delta: float = Field(default=1e-5, gt=0, lt=1)
    """The delta at which epsilon is stated."""
    assessor: Line = ""
    """Who answers for this assessment."""
    expires: date | None = None
    """The day after which the audit is to be repeated, as ``2027-01-31``."""

    def lines(self) -> list[tuple[str, str]]:
        """What was said, as (heading, text); what was left out is left out."""
        special = {None: "", True: "yes", False: "no"}[self.special_categories]
        told = [
            ("Purpose", self.purpose),
            ("Controllers", ", ".join(self.controllers)),
            ("Processors", ", ".join(self.processors)),
            ("Categories of data", ", ".join(self.data)),
            ("Categories of people", ", ".join(self.people)),
            ("Special categories", special),
            ("People behind one update", str(self.people_per_update or "")),
            ("Assessor", self.assessor),
            ("Valid until", "" if self.expires is None else self.expires.isoformat()),
        ]
        return [(heading, text) for heading, text in told if text]

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values."""
        return self.model_dump(mode="json")
