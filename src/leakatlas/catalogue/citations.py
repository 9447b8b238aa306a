"""BibTeX of rows, and of what a run really used."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from leakatlas import limits, reading
from leakatlas.catalogue import loader
from leakatlas.errors import InvalidInput, UnknownName

if TYPE_CHECKING:
    from leakatlas.catalogue.schema import Reference

# The systematization behind the tables; a work without a row.
SYSTEMATIZATION = """@inproceedings{carletti2025sok,
  title = {{SoK}: Gradient Inversion Attacks in Federated Learning},
  author = {Carletti, Vincenzo and Foggia, Pasquale and Mazzocca, Carlo and Parrella, Giuseppe and Vento, Mario},
  booktitle = {USENIX Security Symposium},
  year = {2025},
  url = {https://www.usenix.org/conference/usenixsecurity25/presentation/carletti},
}
"""  # noqa: E501 - one BibTeX field a line

_HOME = {
    "article": "journal",
    "inproceedings": "booktitle",
    "incollection": "booktitle",
    "misc": "howpublished",
}
# Characters that BibTeX and LaTeX take for commands.
_SPECIAL = str.maketrans({"&": r"\&", "%": r"\%", "#": r"\#", "_": r"\_"})


def bibtex(row: Reference) -> str:
    """The BibTeX entry of a work, with its corrections applied."""
    work = row.corrected()
    link = next((link.url for link in work.links if link.label == "paper"), work.links[0].url)
    fields = {
        "title": "{" + work.title.translate(_SPECIAL) + "}",
        "author": " and ".join(work.authors),
        _HOME[work.entry]: work.venue.translate(_SPECIAL),
        "volume": work.volume,
        "number": work.issue,
        "year": str(work.year),
        "eprint": work.eprint,
        "archiveprefix": "arXiv" if work.eprint else "",
        "doi": work.doi,
        "url": link,
    }
    lines = [f"  {name} = {{{value}}}," for name, value in fields.items() if value]
    return "\n".join([f"@{work.entry}{{{work.key},", *lines, "}", ""])


def references_of(name: str) -> tuple[Reference, ...]:
    """The works behind an attack or defense (key, alias), or one reference (key, number).

    Raises:
        UnknownName: If nothing has that name.
    """
    readers: tuple[Callable[[], tuple[str, ...]], ...] = (
        lambda: (loader.reference(name).key,),
        lambda: (loader.attack(name).reference,),
        # what the row really rests on, not what is printed beside it
        lambda: loader.defense(name).corrected().works,
    )
    for keys in readers:
        try:
            return tuple(map(loader.reference, keys()))
        except UnknownName:
            continue
    known = [row.key for row in (*loader.attacks(), *loader.defenses())]
    raise UnknownName("attack, defense or reference", name, known)


def used_in(run: Path) -> dict[str, tuple[str, ...]]:
    """What the runs in a report used: work name to the reasons it is cited.

    Args:
        run: A ``report.json``, or the folder that holds it.

    Raises:
        InvalidInput: If there is no report, or it is not one.
    """
    path = run / "report.json" if reading.is_folder(run) else run
    try:
        report = reading.read_json(path, what="report", limit=limits.REPORT)
    except InvalidInput as error:
        raise InvalidInput(
            f"{path} is no report: {error}. Expected the report.json of an audit, or its folder."
        ) from None
    runs = report.get("runs") if isinstance(report, dict) else None
    if not isinstance(runs, list):
        raise InvalidInput(
            f"{path} has no list 'runs'; expected the report.json that `leakatlas audit` writes."
        )
    reasons: dict[str, list[str]] = {}
    for entry in runs:
        for name, reason in _names(entry):
            if reason not in reasons.setdefault(name, []):
                reasons[name].append(reason)
    return {name: tuple(found) for name, found in reasons.items()}


def _names(entry: Any) -> list[tuple[str, str]]:
    recipe = entry.get("recipe") if isinstance(entry, dict) else None
    if not isinstance(recipe, dict):
        return []
    found = []
    attack = recipe.get("attack")
    if isinstance(attack, dict) and isinstance(attack.get("key"), str):
        found.append((attack["key"], "attack"))
    scenario = recipe.get("scenario")
    defenses = scenario.get("defenses") if isinstance(scenario, dict) else None
    for defense in defenses if isinstance(defenses, list) else []:
        if isinstance(defense, dict) and isinstance(defense.get("key"), str):
            found.append((defense["key"], "defense"))
    return found


def bibliography(names: dict[str, tuple[str, ...]]) -> str:
    """BibTeX of several works, each once, with a comment saying what it stands for.

    Args:
        names: Work name to the reasons for citing it (``("attack",)``).

    Raises:
        UnknownName: If a name has no row.
    """
    entries: dict[str, tuple[Reference, list[str]]] = {}
    texts = []
    for name, reasons in names.items():
        why = f"{name} ({', '.join(reasons)})" if reasons else name
        works = references_of(name)
        if not works:  # only a deployed defense may have none
            texts.append(f"% {why}: no paper; ships in {loader.defense(name).ships_in}\n")
        for work in works:
            entries.setdefault(work.key, (work, []))[1].append(why)
    texts += [f"% {', '.join(why)}\n{bibtex(work)}" for work, why in entries.values()]
    return "\n".join([f"% threat models and tables\n{SYSTEMATIZATION}", *texts])
