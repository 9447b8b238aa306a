"""The published tables, cell by cell, from typed rows.

``mode="printed"`` gives back the cells of the systematization exactly (its prose columns are in our
own words) and holds no other row; ``mode="corrected"`` applies the corrections, marks every changed
cell, and goes on with the rows that LeakAtlas added, each marked as such.
"""

from __future__ import annotations

import csv
import html
import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

from leakatlas.catalogue import loader
from leakatlas.errors import UnknownName

if TYPE_CHECKING:
    from leakatlas.catalogue.schema import (
        Attack,
        Batch,
        Code,
        Defense,
        LabelRecovery,
        Reference,
        Row,
        Stances,
        ThreatModel,
    )

Mode = Literal["printed", "corrected"]
Format = Literal["markdown", "latex", "html", "csv"]
TABLES = ("threat-models", "attacks", "defenses", "references")

KNOWLEDGE_COLUMNS = {
    "updates": "Model Updates",
    "basic": "Basic Knowledge",
    "training": "Training Details",
    "surrogate": "Surrogate Data",
    "distribution": "Client Data Distribution",
    "manipulation": "Active Manipulation",
    "selection": "Client Selection",
}
CATEGORIES = {
    "optimization": "Optimization-based",
    "generative": "Generative Model-based",
    "analytic": "Analytic-based",
    "formal": "F",
    "heuristic": "H",
}
TECHNIQUES = {
    "basic": "Basic Optimization",
    "augmented": "Augmented Optimization",
    "online": "Online Opt.",
    "direct": "Direct Reconstruction",
    "latent": "Latent-Space Optimization",
    "closed_form": "Closed Form",
    "sparsification": "Gradient Sparsification",
    "isolation": "Gradient Isolation",
    "dp": "DP-based",
    "crypto": "Cryptography-Based",
    "perturbation": "Gradient Perturbation",
    "learning": "Learning Algorithm Modification",
    "model": "Model Modification",
}
ALGORITHMS = {"fedsgd": "FedSGD", "fedavg": "FedAVG", "both": "Both"}
TASKS = {
    "object": "Object",
    "face": "Face",
    "x-ray": "X-Ray Image",
    "medical": "Medical Image",
    "text": "Text",
    "tabular": "Tabular",
}
LABELS = {"new": "🆕", "assumed": "◦", "optimised": "★", "none": "-"}
COLOURS = {"holds": "green", "partial": "orange", "fails": "red"}
FOOTNOTES = {2: "²", 3: "³"}
YES, NO = "✔️", "✗"
ADDED = " ‡"
"""Stands behind the work of a row that the systematization does not print."""
ADDED_LEGEND = "‡ added by LeakAtlas: a newer work, or a defense that a framework ships."

LEGEND = {
    "threat-models": (
        "★★★ widely applicable and hard to notice; ★★☆ depends on the configuration; "
        "★☆☆ seldom applicable and easier to notice.",
    ),
    "attacks": (
        "Label recovery: 🆕 a new method; ◦ labels assumed known; ★ optimised with the images; "
        "- none used; [n] the method of row n.",
        "Batch size: the largest used; E×B for FedAVG, E the iterations or epochs.",
        "² adds linear layers to the shared model, which a client may notice. "
        "³ targets linear layers; others need their earlier layers changed to pass the input.",
    ),
    "defenses": (
        "F formal, H heuristic. Green holds, orange is partial or untested, red fails "
        "(the colours' reading is ours). ~ several implementations.",
    ),
    "references": (),
}


@dataclass(frozen=True)
class Table:
    """A table ready to be written in any format.

    Args:
        name: Which table.
        mode: Printed or corrected.
        columns: Header cells.
        rows: One tuple of cells a row.
        changed: The (row, column) positions that a correction changed.
        reasons: What was corrected and why, one sentence a correction.
        added: The rows that LeakAtlas added.
    """

    name: str
    mode: Mode
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    changed: frozenset[tuple[int, int]]
    reasons: tuple[str, ...]
    added: frozenset[int] = frozenset()

    @property
    def legend(self) -> tuple[str, ...]:
        """What the symbols mean."""
        return (*LEGEND[self.name], *((ADDED_LEGEND,) if self.added else ()))


def table(name: str, mode: Mode = "corrected") -> Table:
    """One of the published tables.

    Raises:
        UnknownName: If there is no table of that name.
    """
    if name not in TABLES:
        raise UnknownName("table", name, TABLES)
    readers: dict[str, Callable[[], Sequence[Row]]] = {
        "threat-models": loader.threat_models,
        "attacks": loader.attacks,
        "defenses": loader.defenses,
        "references": loader.references,
    }
    rows = [row for row in readers[name]() if mode == "corrected" or is_printed(row)]
    printed = [cells_of(row) for row in rows]
    shown = printed if mode == "printed" else [cells_of(row.corrected()) for row in rows]
    columns = tuple(shown[0])
    changed = {
        (r, c)
        for r, (before, after) in enumerate(zip(printed, shown, strict=True))
        for c, column in enumerate(columns)
        if before[column] != after[column]
    }
    reasons = (
        ()
        if mode == "printed"
        else tuple(
            f"{name_of(row)}, {change.column}: {change.reason} (printed: {change.printed})"
            for row in rows
            for change in changes(row)
        )
    )
    return Table(
        name=name,
        mode=mode,
        columns=columns,
        rows=tuple(tuple(row[column] for column in columns) for row in shown),
        changed=frozenset(changed),
        reasons=reasons,
        added=frozenset(r for r, row in enumerate(rows) if not is_printed(row)),
    )


def is_printed(row: Row) -> bool:
    """Whether the systematization prints this row."""
    from leakatlas.catalogue.schema import Reference, Unit

    if isinstance(row, Unit):
        return row.origin == "published"
    return not isinstance(row, Reference) or row.number is not None


def mark(key: str) -> str:
    """How a reference is cited: its printed number, else its key."""
    number = loader.reference(key).number
    return key if number is None else str(number)


def name_of(row: Row) -> str:
    """How a row is named among people: ``DLG [1]``, ``Soteria [45]``, ``A``, ``[45]``.

    A reference that is not printed is cited by its key.
    """
    from leakatlas.catalogue.schema import Attack, Defense, Reference, ThreatModel

    if isinstance(row, Attack):
        return f"{row.name} [{mark(row.reference)}]"
    if isinstance(row, Defense):
        return " ".join(part for part in (row.name, works_cell(row)) if part)
    if isinstance(row, Reference):
        return f"[{mark(row.key)}]"
    assert isinstance(row, ThreatModel)
    return row.letter


def cells_of(row: Row) -> dict[str, str]:
    """The cells of any row."""
    from leakatlas.catalogue.schema import Attack, Defense, Reference, ThreatModel

    if isinstance(row, Attack):
        return attack_cells(row)
    if isinstance(row, Defense):
        return defense_cells(row)
    if isinstance(row, Reference):
        return reference_cells(row)
    assert isinstance(row, ThreatModel)
    return threat_model_cells(row)


@dataclass(frozen=True)
class Change:
    """One correction as a reader of the table sees it.

    Args:
        column: Which cell changes.
        printed: The published cell.
        corrected: The cell that the sources support.
        reason: Why.
    """

    column: str
    printed: str
    corrected: str
    reason: str


def changes(row: Row) -> tuple[Change, ...]:
    """Every correction of a row, as the cell it changes."""
    before = cells_of(row)
    found = []
    for correction in row.corrections:
        alone = type(row).model_validate(
            row.model_dump() | {correction.field: correction.corrected}
        )
        after = cells_of(alone)
        column = next((name for name in before if before[name] != after[name]), None)
        if column is None:  # a field that is no cell, such as a title
            column = correction.field.replace("_", " ").capitalize()
            shown = (str(correction.printed), str(correction.corrected))
        else:
            shown = (before[column], after[column])
        found.append(Change(column, *shown, correction.reason))
    return tuple(found)


def threat_model_cells(row: ThreatModel) -> dict[str, str]:
    """The cells of one threat model."""
    return {
        "ID": row.letter,
        "Threat Model": row.name,
        **{
            column: YES if knowledge in row.knowledge else NO
            for knowledge, column in KNOWLEDGE_COLUMNS.items()
        },
        "Real-World Applicability": "★" * row.applicability + "☆" * (3 - row.applicability),
    }


def attack_cells(row: Attack) -> dict[str, str]:
    """The cells of one attack."""
    return {
        "Category": CATEGORIES[row.category],
        "Technique": TECHNIQUES[row.technique],
        "Work": work_cell(row),
        "Threat Model": row.threat_model,
        "Learning Algorithm": ALGORITHMS[row.algorithm],
        "Image Resolution": resolution_cell(row.resolution),
        "Batch Size": batch_cell(row.batch),
        "Shared Model": (", ".join(row.models) or "N/A")
        + "".join(FOOTNOTES[note] for note in row.footnotes),
        "Learning Task": " and ".join(TASKS[task] for task in row.tasks) + " Classification",
        "Label Recovery": label_cell(row.label_recovery),
        "Open Source": code_cell(row.code),
    }


def defense_cells(row: Defense) -> dict[str, str]:
    """The cells of one defense; the two prose columns hold our own words."""
    printed = row.origin == "published"
    name = row.label if printed else row.name  # the table prints most rows by number alone
    return {
        "Cat.": CATEGORIES[row.category],
        "Technique": TECHNIQUES[row.technique],
        "Work": " ".join(part for part in (name, works_cell(row)) if part)
        + ("" if printed else ADDED),
        "Year": "N/A" if row.year is None else str(row.year),
        "Where": row.where.capitalize(),
        "Threat Models": "-" if row.stance is None else stance_cell(row.stance, row.stance_breaks),
        "Intuition": row.intuition,
        "Main Weakness": row.weakness,
        "Open Source": code_cell(row.code),
    }


def reference_cells(row: Reference) -> dict[str, str]:
    """A reference as printed, or with corrected title and links."""
    return {"Number": mark(row.key), "Reference": reference_text(row)}


def reference_text(row: Reference) -> str:
    """The printed line of a reference, or its title: text, then links."""
    links = " ".join(f"[{link.label}]({link.url})" for link in row.links)
    return f"{row.printed or row.title} {links}"


def work_cell(row: Attack) -> str:
    """``Zhu et al. (2019) [1]``; marked where LeakAtlas added the row."""
    work = loader.reference(row.reference)
    family = work.authors[0].partition(",")[0]
    added = "" if row.origin == "published" else ADDED
    return f"{family} et al. ({work.year}) [{mark(work.key)}]{added}"


def works_cell(row: Defense) -> str:
    """``[42,43]``, or nothing for a deployed defense without a paper."""
    return f"[{','.join(map(mark, row.works))}]" if row.works else ""


def resolution_cell(resolution: tuple[int, int] | Literal["input", "unknown"]) -> str:
    """``64×64``, ``Input Size`` or ``N/A``."""
    if resolution == "input":
        return "Input Size"
    if resolution == "unknown":
        return "N/A"
    return "×".join(map(str, resolution))


def batch_cell(batch: Batch) -> str:
    """``8``; ``E×B`` with epochs; steps and image counts spelled out where they are known."""
    if batch.size is None:
        return "N/A"
    if batch.local_steps is not None:
        unit = "step" if batch.local_steps == 1 else "steps"
        text = f"{batch.local_steps} {unit}×{batch.size}"
    elif batch.epochs is not None:
        text = f"{batch.epochs}×{batch.size}"
    else:
        text = str(batch.size)
    return text if batch.images is None else f"{text} of {batch.images}"


def label_cell(label: LabelRecovery) -> str:
    """The symbol, ``[n]`` or a link."""
    if label.kind == "row":
        assert label.row is not None  # checked with the row
        return f"[{mark(loader.attack(label.row).reference)}]"
    if label.kind == "outside":
        return f"[link]({label.url})"
    return LABELS[label.kind]


def code_cell(code: Code) -> str:
    """A link, ``✗``, ``~``, or what became of it."""
    if code.kind in ("promised", "gone"):
        return code.kind
    if code.url is None:
        return "~" if code.kind == "various" else NO
    return f"[{code.kind if code.official else 'third party'}]({code.url})"


def stance_cell(stance: Stances, breaks: Sequence[str] = ()) -> str:
    """``A (green) - C (green) D (red) - H (red)``: runs of one colour, in the table's manner."""
    runs: list[list[str]] = []
    from leakatlas.catalogue.schema import LETTERS

    for letter in LETTERS:
        colour = COLOURS[stance.of(letter)]
        if runs and COLOURS[stance.of(runs[-1][-1])] == colour:
            runs[-1].append(letter)
        else:
            runs.append([letter])
    parts = []
    for run in runs:
        ends = [run[0]] if len(run) == 1 else [run[0], run[-1]]
        text = " - ".join(f"{letter} ({COLOURS[stance.of(letter)]})" for letter in ends)
        parts.append(text + (" <br>" if run[-1] in breaks else ""))
    return " ".join(parts)


# --- formats ---------------------------------------------------------------------------------


def render(content: Table, form: str) -> str:
    """The table as text.

    Raises:
        UnknownName: If the format is unknown.
    """
    writers: dict[str, Callable[[Table], str]] = {
        "markdown": _markdown,
        "latex": _latex,
        "html": _html,
        "csv": _csv,
    }
    assert set(writers) == set(get_args(Format))
    if form not in writers:
        raise UnknownName("format", form, writers)
    return writers[form](content)


def _marked(content: Table, row: int, column: int) -> str:
    mark = " †" if (row, column) in content.changed else ""
    return content.rows[row][column] + mark


def _markdown(content: Table) -> str:
    lines = [
        "| " + " | ".join(content.columns) + " |",
        "|" + "|".join("---" for _ in content.columns) + "|",
    ]
    for r in range(len(content.rows)):
        cells = (_marked(content, r, c) for c in range(len(content.columns)))
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    text = "\n".join(lines) + "\n"
    for line in content.legend:
        text += f"\n{line}\n"
    if content.reasons:
        text += "\n† corrected:\n\n" + "".join(f"- {reason}\n" for reason in content.reasons)
    return text


def _csv(content: Table) -> str:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(content.columns)
    writer.writerows(content.rows)
    return out.getvalue()


def _html(content: Table) -> str:
    head = "".join(f'<th scope="col">{html.escape(column)}</th>' for column in content.columns)
    lines = ["<table>", f"<caption>{content.name}, {content.mode}</caption>"]
    lines.append(f"<thead><tr>{head}</tr></thead>")
    lines.append("<tbody>")
    for r in range(len(content.rows)):
        cells = (links_to_html(_marked(content, r, c)) for c in range(len(content.columns)))
        lines.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    lines += ["</tbody>", "</table>"]
    return "\n".join(lines) + "\n"


_LINK = re.compile(r"\[([^\]]+)\]\((https?://[^)\s]+(?:\([^)\s]*\)[^)\s]*)*)\)")


def links_to_html(cell: str) -> str:
    """A cell as HTML: its Markdown links as anchors, the rest escaped."""
    out, position = "", 0
    for link in _LINK.finditer(cell):
        out += html.escape(cell[position : link.start()])
        out += f'<a href="{html.escape(link[2])}">{html.escape(link[1])}</a>'
        position = link.end()
    return (out + html.escape(cell[position:])).replace("&lt;br&gt;", "<br>")


_LATEX_TEXT = {
    "\\": r"\textbackslash{}",
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "×": r"$\times$",
    "²": r"$^2$",
    "³": r"$^3$",
    "★": r"$\bigstar$",
    "☆": r"$\medstar$",
    "◦": r"$\circ$",
    "✗": r"$\times$",
    "✔": r"\checkmark",
    "🆕": r"\textsc{new}",
    "†": r"$^\dagger$",
    "‡": r"$^\ddagger$",
    "—": "---",
    "\ufe0f": "",
}


def latex_text(text: str) -> str:
    """Text with everything that LaTeX would misread written as commands."""
    return "".join(_LATEX_TEXT.get(character, character) for character in text)


def _latex_cell(cell: str) -> str:
    out, position = "", 0
    cell = cell.replace(" <br>", "")
    for link in _LINK.finditer(cell):
        out += latex_text(cell[position : link.start()])
        address = link[2].replace("%", r"\%").replace("#", r"\#")
        out += rf"\href{{{address}}}{{{latex_text(link[1])}}}"
        position = link.end()
    return out + latex_text(cell[position:])


def _latex(content: Table) -> str:
    lines = [
        r"% needs: booktabs, longtable, hyperref, amssymb, stix or fdsymbol (\medstar)",
        rf"\begin{{longtable}}{{{'l' * len(content.columns)}}}",
        r"\toprule",
        " & ".join(rf"\textbf{{{latex_text(column)}}}" for column in content.columns) + r" \\",
        r"\midrule",
        r"\endhead",
    ]
    for r in range(len(content.rows)):
        cells = (_latex_cell(_marked(content, r, c)) for c in range(len(content.columns)))
        lines.append(" & ".join(cells) + r" \\")
    lines += [r"\bottomrule", r"\end{longtable}"]
    return "\n".join(lines) + "\n"
