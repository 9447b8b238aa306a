"""Docstrings as HTML, every character escaped."""

from __future__ import annotations

import re

from markupsafe import Markup, escape

from leakatlas.catalogue.pages import to_markdown
from leakatlas.site.formula import mathml

_INLINE = re.compile(r"``?([^`]+)``?|\$([^$\n]+)\$|\*([^*\s][^*\n]*)\*")
_ITEM = re.compile(r"\s*(?:[-*]|\d+\.)\s+")
_NUMBERED = re.compile(r"\s*\d+\.\s+")


def to_html(docstring: str) -> Markup:
    """Paragraphs, lists, code and formulas of a docstring."""
    out: list[Markup] = []
    paragraph: list[str] = []
    items: list[str] = []
    numbered = False

    def flush() -> None:
        nonlocal numbered
        if paragraph:
            out.append(Markup("<p>{}</p>").format(inline(" ".join(paragraph))))
            paragraph.clear()
        if items:
            tag = "ol" if numbered else "ul"
            body = Markup("").join(Markup("<li>{}</li>").format(inline(item)) for item in items)
            out.append(Markup(f"<{tag}>") + body + Markup(f"</{tag}>"))
            items.clear()

    fence: list[str] | None = None
    kind = ""
    for line in to_markdown(docstring).splitlines():
        if line.startswith("```"):
            if fence is None:
                flush()
                fence, kind = [], line[3:]
            else:
                out.append(_fenced(kind, "\n".join(fence)))
                fence = None
        elif fence is not None:
            fence.append(line)
        elif not line.strip():
            flush()
        elif _ITEM.match(line):
            if paragraph:
                flush()
            numbered = bool(_NUMBERED.match(line))
            items.append(_ITEM.sub("", line, count=1))
        elif items and line.startswith(" "):
            items[-1] += " " + line.strip()
        else:
            if items:
                flush()
            paragraph.append(line.strip())
    flush()
    return Markup("\n").join(out)


def _fenced(kind: str, text: str) -> Markup:
    formula = mathml(text, "block") if kind == "math" else None
    if formula is not None:
        return Markup('<div class="math" tabindex="0">{}</div>').format(formula)
    return Markup('<pre class="{}" tabindex="0"><code>{}</code></pre>').format(
        "math" if kind == "math" else "code", text
    )


def inline(text: str) -> Markup:
    """Code, formulas and emphasis within a line."""
    out, position = Markup(""), 0
    for found in _INLINE.finditer(text):
        out += escape(text[position : found.start()])
        if found[1] is not None:
            out += Markup("<code>{}</code>").format(found[1])
        elif found[2] is not None:
            out += mathml(found[2]) or Markup('<code class="math">{}</code>').format(found[2])
        else:
            out += Markup("<em>{}</em>").format(found[3])
        position = found.end()
    return out + escape(text[position:])
