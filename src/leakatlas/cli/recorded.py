"""The one-line audit of what a framework's capture wrote: no YAML file needed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from leakatlas.errors import InvalidParameter, shown

if TYPE_CHECKING:
    from leakatlas.audit import AuditConfig

HOW = "leakatlas audit --captured FOLDER --model file.py:factory [--truth DATA | --shape C,H,W]"

Captured = Annotated[
    Path | None,
    typer.Option(help="Instead of a YAML file: the folder (or file) of a capture; needs --model."),
]
Model = Annotated[str | None, typer.Option(help="With --captured: builtin, or file.py:factory.")]
Truth = Annotated[
    str | None,
    typer.Option(help="With --captured: the images behind it, such as folder:PATH@SIZE."),
]
Shape = Annotated[str | None, typer.Option(help="With --captured, without --truth: C,H,W.")]
Client = Annotated[str | None, typer.Option(help="With --captured: whose exchanges.")]
Seen = Annotated[
    str | None,
    typer.Option("--place", help="With --captured: raw, wire, server or aggregate."),
]
Protocol = Annotated[
    list[str] | None,
    typer.Option(help="With --captured: what was not recorded, such as lr=0.1; repeatable."),
]


class Recorded(NamedTuple):
    """The options of an audit of a capture."""

    captured: Path | None
    model: str | None
    truth: str | None
    shape: str | None
    client: str | None
    protocol: Sequence[str]
    place: str | None = None

    def words(self) -> list[str]:
        """As on the command line."""
        single = [
            (f"--{name}", str(value))
            for name, value in self._asdict().items()
            if value is not None and name != "protocol"
        ]
        repeated = [("--protocol", text) for text in self.protocol]
        return [word for pair in (*single, *repeated) for word in pair]

    def config(self, file: Path | None) -> AuditConfig | None:
        """The configuration that they say; None if there is no ``--captured``.

        Raises:
            InvalidParameter: If they do not belong together, or something is missing.
        """
        if self.captured is None:
            if self.words():
                raise InvalidParameter(f"{self.words()[0]} belongs to --captured: {HOW}.")
            return None
        if file is not None:
            raise InvalidParameter("Give a YAML file or --captured, not both.")
        return recorded_config(
            self.captured, model=self.model, truth=self.truth, shape=self.shape,
            client=self.client, protocol=self.protocol, place=self.place,
        )  # fmt: skip


def recorded_config(
    captured: Path,
    *,
    model: str | None,
    truth: str | None,
    shape: str | None,
    client: str | None,
    protocol: Sequence[str],
    place: str | None = None,
) -> AuditConfig:
    """The configuration that the options say.

    Args:
        captured: A folder of captures, or a file of ``leakatlas capture``.
        model: builtin name, or ``file.py:factory``.
        truth: The private images behind it, as ``data.victims`` in YAML.
        shape: Their shape, where they are not at hand.
        client: Whose exchanges of the folder.
        protocol: ``name=value`` each.
        place: Where it was recorded.

    Raises:
        InvalidParameter: If the model, or the images and their shape, are missing.
    """
    from leakatlas.audit import AuditConfig

    if model is None:
        raise InvalidParameter(f"--captured needs --model, which gives the names: {HOW}.")
    if (truth is None) == (shape is None):
        raise InvalidParameter(
            f"--captured needs --truth, the images behind it, or --shape, theirs: {HOW}."
        )
    data: dict[str, Any] = {"victims": "none", "shape": _shape(shape)} if shape else {}
    if truth is not None:
        data = {"victims": truth, "limit": 10**6}  # all of them stood behind the update
    where: str | dict[str, Any] = str(captured.absolute())
    chosen = {n: v for n, v in (("client", client), ("place", place)) if v is not None}
    if chosen:
        where = {"folder": where, **chosen}
    given = dict(_pair(text) for text in protocol)
    return AuditConfig.model_validate(
        {
            "model": {"python" if ":" in model else "builtin": model},
            "data": data,
            "captured": where,
            **({"protocol": given} if given else {}),
        }
    )


def _shape(text: str) -> list[int]:
    parts = text.replace("x", ",").split(",")
    if len(parts) != 3 or not all(part.strip().isdigit() for part in parts):
        raise InvalidParameter(f"--shape is {shown(text)}; expected C,H,W such as 3,32,32.")
    return [int(part) for part in parts]


def _pair(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals:
        raise InvalidParameter(f"--protocol is {shown(text)}; expected name=value, such as lr=0.1.")
    for kind in (int, float):
        try:
            return name, kind(value)
        except ValueError:
            continue
    return name, {"true": True, "false": False}.get(value.lower(), value)
