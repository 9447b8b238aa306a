"""The guide and the examples as pages: Markdown of the checkout, its raw HTML escaped."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from markdown_it import MarkdownIt
from markdown_it.token import Token
from markupsafe import Markup, escape

GUIDE = (
    "README", "first-audit", "my-model", "yaml-keys", "captured-update", "reading-a-report",
    "choosing-a-defense", "in-ci", "gpu-and-cluster", "priors", "adding",
)  # fmt: skip
"""Pages of ``docs/guide`` in reading order; the first is the index."""
BESIDE = {
    "CONTRIBUTING.md": "guide/contributing.html",
    "docs/contributing-a-row.md": "guide/a-row.html",
    "docs/frameworks.md": "guide/frameworks.html",
    "docs/studies.md": "guide/studies.html",
}
"""Pages from elsewhere in the checkout that the guide leads to."""
TABLES = {"docs/tables.md": "attacks.html", "docs/benchmarks.md": "measured.html"}
"""What is on the site in another form."""


@dataclass(frozen=True)
class Page:
    """A page of the guide.

    Args:
        name: Path on the site.
        title: Its first heading.
        html: Its content, the heading included.
        chapter: Whether it stands in the guide's own list.
    """

    name: str
    title: str
    html: Markup
    chapter: bool


def pages(root: Path | None) -> list[Page]:
    """Every page, in reading order; none where there is no checkout.

    Args:
        root: The checkout.
    """
    if root is None or not (root / "docs/guide/README.md").is_file():
        return []
    sources = {
        f"docs/guide/{name}.md": f"guide/{'index' if name == 'README' else name}.html"
        for name in GUIDE
    }
    examples = {
        path.relative_to(root).as_posix(): f"guide/example-{path.stem.replace('_', '-')}.html"
        for path in sorted((root / "examples").glob("*.py"))
    }
    known = {**sources, **BESIDE, **examples, **TABLES}
    for folder in ("attacks", "defenses", "threat-models"):
        for path in (root / "docs" / folder).glob("*.md"):
            known[path.relative_to(root).as_posix()] = f"{folder}/{path.stem}.html"
    made = []
    for source, name in {**sources, **BESIDE}.items():
        if (root / source).is_file():
            text = (root / source).read_text(encoding="utf-8")
            made.append(_page(source, name, text, known, chapter=source in sources))
    for source, name in examples.items():
        text = (root / source).read_text(encoding="utf-8")
        made.append(_example(source, name, text))
    return made


def _page(source: str, name: str, text: str, known: dict[str, str], *, chapter: bool) -> Page:
    markdown = MarkdownIt("commonmark", {"html": False}).enable("table")
    # Generated pages say so in a comment, which is no text for a reader.
    tokens = markdown.parse(re.sub(r"^<!--.*?-->$\n?", "", text, flags=re.MULTILINE))
    used: set[str] = set()
    for before, token in zip([None, *tokens], tokens, strict=False):
        if token.type == "inline":
            _lead(token.children or [], source, name, known)
            if before is not None and before.type == "heading_open" and before.tag != "h1":
                before.attrSet("id", _identifier(token.content, used))
        if token.type == "fence":
            token.attrSet("tabindex", "0")
    title = next((t.content for t in tokens if t.type == "inline"), name)
    html = markdown.renderer.render(tokens, markdown.options, {})
    html = html.replace("<table>", '<div class="scroll" tabindex="0"><table>')
    html = html.replace("</table>", "</table></div>").replace("<pre>", '<pre tabindex="0">')
    return Page(name, _bare(title), Markup(html), chapter)


def _lead(tokens: list[Token], source: str, name: str, known: dict[str, str]) -> None:
    """Point links at pages of the site; what has none there stays a name without a link."""
    for opened, closed in _links(tokens):
        href = str(opened.attrGet("href") or "")
        parts = urlsplit(href)
        if parts.scheme or not parts.path:
            continue
        target = posixpath.normpath(posixpath.join(posixpath.dirname(source), parts.path))
        if target in known:
            near = posixpath.relpath(known[target], posixpath.dirname(name))
            place = f"#{parts.fragment}" if parts.fragment and target not in TABLES else ""
            opened.attrSet("href", near + place)
        else:
            for token in (opened, closed):
                token.type, token.tag, token.attrs = "link", "em", {}


def _links(tokens: list[Token]) -> Iterator[tuple[Token, Token]]:
    opened: Token | None = None
    for token in tokens:
        if token.type == "link_open":
            opened = token
        elif token.type == "link_close" and opened is not None:
            yield opened, token


def _identifier(text: str, used: set[str]) -> str:
    plain = re.sub(r"[^a-z0-9]+", "-", _bare(text).lower()).strip("-") or "part"
    while plain in used or plain in ("main", "theme", "announce"):
        plain += "-2"
    used.add(plain)
    return plain


def _bare(text: str) -> str:
    return re.sub(r"[`*]", "", text)


def _example(source: str, name: str, text: str) -> Page:
    """A program: its docstring's first line as the title, then the whole text."""
    first = text.removeprefix('"""').split("\n")[0].rstrip('."')
    title = first.split(":")[0].split(",")[0]
    html = Markup(
        '<h1>{}</h1>\n<p><code>{}</code></p>\n<pre tabindex="0"><code>{}</code></pre>'
    ).format(title, source, escape(text))
    return Page(name, title, html, False)


def contexts(found: list[Page]) -> list[tuple[str, str, dict[str, Any]]]:
    """Name, template and context of each page, for the builder."""
    chapters = [page for page in found if page.chapter]
    examples = [page for page in found if "/example-" in page.name]
    return [
        (page.name, "guide.html", {"entry": page, "chapters": chapters, "examples": examples})
        for page in found
    ]
