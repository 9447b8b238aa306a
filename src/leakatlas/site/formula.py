"""TeX as MathML, which browsers set by themselves: no script, no font, no network."""

from __future__ import annotations

import html
import re
from typing import Literal
from xml.etree import ElementTree

from markupsafe import Markup

from leakatlas.errors import needing

with needing("the site", "leakatlas[site]"):
    from latex2mathml import exceptions
    from latex2mathml.converter import convert_to_element

_TAG = re.compile(r"\\tag\{([^{}]*)\}")
# What the converter would leave as a backslash, in commands that it knows.
_SPELLED = (
    (re.compile(r"\\arg(?![a-z])"), r"\\mathrm{arg}\\,"),
    (re.compile(r"\\[bB]ig+[lr]?\s*\\[lr]Vert"), r"\\|"),
    (re.compile(r"\\[lr]Vert(?![a-z])"), r"\\|"),
)
_REFUSED: tuple[type[Exception], ...] = tuple(
    value
    for value in vars(exceptions).values()
    if isinstance(value, type) and issubclass(value, Exception)
)


def mathml(tex: str, display: Literal["block", "inline"] = "inline") -> Markup | None:
    r"""A formula as a ``math`` element, its number behind it; None for TeX that is not understood.

    The converter's own text output is not escaped, so the tree is written here.

    Example:
        >>> print(mathml(r"a < b"))  # doctest: +ELLIPSIS
        <math ...><mrow><mi>a</mi><mo>&lt;</mo><mi>b</mi></mrow></math>
    """
    tag = _TAG.search(tex)
    plain = _TAG.sub("", tex).strip()
    for pattern, known in _SPELLED:
        plain = pattern.sub(known, plain)
    try:
        element = convert_to_element(plain, display=display)
    except _REFUSED:
        return None
    for node in element.iter():
        node.text = html.unescape(node.text) if node.text else node.text
        if node.text and "\\" in node.text:
            return None
    element.set("alttext", tex)
    written = Markup(ElementTree.tostring(element, encoding="unicode"))
    if tag is not None:
        written += Markup('<span class="tag">({})</span>').format(tag[1])
    return written
