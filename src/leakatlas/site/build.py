"""From rows to pages: what each template is given."""

from __future__ import annotations

import json
import shutil
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

import leakatlas
from leakatlas.catalogue import (
    citations,
    facets,
    headline,
    loader,
    pages,
    registry,
    results,
    source,
    tables,
)
from leakatlas.catalogue.schema import LETTERS, Attack, Defense, Reference
from leakatlas.errors import InvalidInput
from leakatlas.site import frontier_page, guide, measured_page, pictures, prose

ASSETS = ("style.css", "site.js", "frontier.js", "chart.umd.min.js", "chart.LICENSE.md")

CATEGORY_NAMES = {
    "optimization": "Optimization-based",
    "generative": "Generative model-based",
    "analytic": "Analytic",
    "formal": "Formal",
    "heuristic": "Heuristic",
}
TECHNIQUE_NAMES = {**tables.TECHNIQUES, "online": "Online Optimization"}
LABEL_NAMES = {
    "new": "new method",
    "assumed": "assumed known",
    "optimised": "optimised",
    "none": "none",
    "row": "another row's",
    "outside": "another work's",
}
ORIGIN_NAMES = {
    "published": "in the published tables",
    "newer": "newer work",
    "deployed": "shipped by a framework",
}
LABEL_SHORT = {**LABEL_NAMES, "new": "new", "assumed": "assumed", "outside": "other work"}
VERIFIED_NAMES = {
    "measured": "measured and tested",
    "stale": "measured, stale",
    "tested": "tested",
    "no": "not yet",
}
KNOWLEDGE_TEXT = {
    "updates": "the shared model and the update a client sends",
    "basic": "how inputs are normalised and bounded",
    "training": "optimizer, rate, epochs, batch size, defenses in force",
    "surrogate": "public data of the same kind",
    "distribution": "statistics of the client's own data",
    "manipulation": "may change the model before the client trains",
    "selection": "chooses who takes part, may add its own devices",
}


def build(out: Path, *, results_folder: Path | None = None) -> list[Path]:
    """Write the site.

    Args:
        out: Folder; made if missing. Only files of the site are written in it.
        results_folder: Where measured values lie; the checkout's ``results/`` if None.

    Returns:
        The pages, the index first.

    Raises:
        InvalidInput: If the folder cannot be written.
    """
    folder = results_folder or results.default_folder()
    measured = results.load(folder)
    environment = _environment()
    chapters = guide.pages(results.repository_root())
    environment.globals["guided"] = bool(chapters)
    try:
        (out / "assets").mkdir(parents=True, exist_ok=True)
        for name in ASSETS:
            asset = resources.files("leakatlas.site") / "assets" / name
            with resources.as_file(asset) as path:
                shutil.copyfile(path, out / "assets" / name)
        written = []
        for name, template, context in _pages(measured, folder) + guide.contexts(chapters):
            if context.get("picture") is not None:
                pictures.copy(context["picture"], folder, out)
            path = out / name
            path.parent.mkdir(parents=True, exist_ok=True)
            base = "../" * name.count("/")
            page = environment.get_template(template).render(base=base, page=name, **context)
            path.write_text(page, encoding="utf-8")
            written.append(path)
    except OSError as error:
        raise InvalidInput(f"The site cannot be written to {out}: {error.strerror}.") from None
    return written


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("leakatlas.site"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals.update(
        version=leakatlas.__version__,
        letters=LETTERS,
        knowledge_columns=tables.KNOWLEDGE_COLUMNS,
        knowledge_text=KNOWLEDGE_TEXT,
        category_names=CATEGORY_NAMES,
        technique_names=TECHNIQUE_NAMES,
        label_names=LABEL_NAMES,
        origin_names=ORIGIN_NAMES,
        mark=tables.mark,
        label_short=LABEL_SHORT,
        verified_names=VERIFIED_NAMES,
        interval=pages.interval,
    )
    environment.filters["inline"] = prose.inline
    environment.filters["linked"] = linked
    environment.filters["mark"] = tables.mark
    environment.filters["twice"] = lambda values: [(value, value) for value in values]
    environment.filters["named"] = lambda values, names: [(v, names[v]) for v in values]
    return environment


def _pages(
    measured: tuple[results.Result, ...], folder: Path
) -> list[tuple[str, str, dict[str, Any]]]:
    attacks = [
        {**_attack(row, measured), "picture": pictures.of_row(folder, row.key)}
        for row in loader.attacks()
    ]
    defenses = [_defense(row, measured) for row in loader.defenses()]
    threats: list[dict[str, Any]] = [
        {"row": row, "stars": tables.cells_of(row)["Real-World Applicability"]}
        for row in loader.threat_models()
    ]
    shared = {"attacks": attacks, "defenses": defenses, "threats": threats}
    found: list[tuple[str, str, dict[str, Any]]] = [
        ("index.html", "index.html", {**shared, "data": _switch_data(attacks, defenses)}),
        ("attacks.html", "attacks.html", {**shared, "legend": tables.table("attacks").legend}),
        ("defenses.html", "defenses.html", shared),
        ("matrix.html", "matrix.html", {**shared, "reach": _reach()}),
        ("threat-models.html", "threat_models.html", shared),
        ("measured.html", "measured.html", measured_page.context(measured, loader.defenses())),
        ("frontier.html", "frontier.html", frontier_page.context(measured)),
        ("references.html", "references.html", {"works": [_work(r) for r in loader.references()]}),
    ]
    for place, entry in enumerate(attacks):
        around = _around(attacks, place)
        found.append((f"attacks/{entry['row'].key}.html", "attack.html", {**entry, **around}))
    for place, entry in enumerate(defenses):
        around = _around(defenses, place)
        found.append((f"defenses/{entry['row'].key}.html", "defense.html", {**entry, **around}))
    for threat in threats:
        letter = threat["row"].letter
        held = set(threat["row"].knowledge)
        found.append(
            (
                f"threat-models/{letter}.html",
                "threat_model.html",
                {
                    **threat,
                    "own": [a for a in attacks if a["shown"].threat_model == letter],
                    "less": [
                        a
                        for a in attacks
                        if a["shown"].threat_model != letter
                        and set(a["facets"]["knowledge"]) <= held
                    ],
                    "by_stance": {
                        stance: [d for d in defenses if d["stances"].get(letter) == stance]
                        for stance in ("holds", "partial", "fails")
                    },
                },
            )
        )
    return found


def _around(entries: list[dict[str, Any]], place: int) -> dict[str, Any]:
    return {
        "previous": entries[place - 1] if place else None,
        "following": entries[place + 1] if place + 1 < len(entries) else None,
    }


def _attack(row: Attack, measured: tuple[results.Result, ...]) -> dict[str, Any]:
    shown = row.corrected()
    return {
        **_common("attack", row, measured),
        "shown": shown,
        "number": loader.printed_number(row),
        "headline": headline.of_attack(measured, row.key),
        "timed": measured_page.timed(results.of_row(measured, "attack", row.key)),
        "facets": facets.attack(row),
        "facets_printed": facets.attack(row, printed=True),
        "works": [_work(loader.reference(row.reference))],
        "title": tables.name_of(row),
        "area": (shown.resolution[0] * shown.resolution[1])
        if isinstance(shown.resolution, tuple)
        else 0,
    }


def _defense(row: Defense, measured: tuple[results.Result, ...]) -> dict[str, Any]:
    shown = row.corrected()
    return {
        **_common("defense", row, measured),
        "shown": shown,
        "facets": facets.defense(row),
        "works": [_work(loader.reference(key)) for key in shown.works],
        "stances": row.stance.model_dump() if row.stance is not None else {},
        "headline": headline.of_defense(measured, row.key),
        "curve": measured_page.defense_chart(measured, row),
        "title": tables.name_of(row),
        "measured_stance": results.measured_stances(measured, row.key),
        "decided": _decided(measured, row.key),
    }


def _decided(measured: tuple[results.Result, ...], key: str) -> dict[str, list[str]]:
    """Which attack decided the measured colours of which letters, in which setting."""
    found: dict[str, list[str]] = {}
    for letter, colour in results.measured_colours(measured, key).items():
        found.setdefault(colour.words, []).append(letter)
    return found


def _common(
    kind: registry.Kind, row: Attack | Defense, measured: tuple[results.Result, ...]
) -> dict[str, Any]:
    mine = results.of_row(measured, kind, row.key)
    found = source.of(kind, row.key)
    test = results.test_file(kind, row.key)
    if any(not result.stale for result in mine):
        verified = "measured"
    elif mine:
        verified = "stale"
    else:
        verified = "tested" if test is not None else "no"
    later = None
    if row.superseded_by is not None:
        later = (loader.attack if kind == "attack" else loader.defense)(row.superseded_by)
    return {
        "kind": kind,
        "row": row,
        "later": later,
        "in_print": tables.is_printed(row),
        "printed": tables.cells_of(row),
        "corrected": tables.cells_of(row.corrected()),
        "changes": tables.changes(row),
        "implemented": registry.module_file(kind, row.key) is not None,
        "verified": verified,
        "source": found,
        "module": registry.module_path(kind, row.key),
        "method": prose.to_html(found.method) if found is not None else Markup(""),
        "tests": pages.tests_in(test) if test is not None else [],
        "measured": mine,
    }


def _work(row: Reference) -> dict[str, Any]:
    work = row.corrected()
    return {
        "row": row,
        "key": work.key,
        "number": work.number,
        "mark": tables.mark(work.key),
        "title": work.title,
        "authors": pages.people(work.authors),
        "venue": work.venue,
        "year": work.year,
        "links": work.links,
        "bibtex": citations.bibtex(row).strip(),
        "changes": tables.changes(row),
    }


def _reach() -> dict[str, dict[str, bool]]:
    """Which letters hold all that another letter holds."""
    held = {row.letter: set(row.knowledge) for row in loader.threat_models()}
    return {needed: {letter: held[needed] <= held[letter] for letter in held} for needed in held}


def _switch_data(attacks: list[dict[str, Any]], defenses: list[dict[str, Any]]) -> Markup:
    """What the switches need, as JSON that is safe inside a script element."""
    data = {
        "threats": {row.letter: list(row.knowledge) for row in loader.threat_models()},
        "names": {row.letter: row.name for row in loader.threat_models()},
        "attacks": {
            entry["row"].key: {
                "corrected": entry["shown"].threat_model,
                "printed": entry["row"].threat_model,
            }
            for entry in attacks
        },
        "defenses": {
            entry["row"].key: {
                "printed": entry["stances"],
                "measured": entry["measured_stance"],
            }
            for entry in defenses
        },
    }
    text = json.dumps(data, ensure_ascii=True, separators=(",", ":"))
    return Markup(text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))


def linked(cell: str) -> Markup:
    """A table cell whose Markdown links are anchors and whose rest is escaped."""
    return Markup(tables.links_to_html(cell))
