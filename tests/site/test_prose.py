"""Docstrings as HTML."""

import pytest

from leakatlas.catalogue import registry, source
from leakatlas.catalogue.pages import to_markdown
from leakatlas.site import prose
from leakatlas.site.formula import mathml


@pytest.mark.parametrize(
    ("docstring", "html"),
    [
        ("One\ntwo.\n\nThree.", "<p>One two.</p>\n<p>Three.</p>"),
        ("``a<b`` and *so* on", "<p><code>a&lt;b</code> and <em>so</em> on</p>"),
        ("- one\n  more\n- two", "<ul><li>one more</li><li>two</li></ul>"),
        ("1. one\n2. two", "<ol><li>one</li><li>two</li></ol>"),
        ("<script>alert(1)</script>", "<p>&lt;script&gt;alert(1)&lt;/script&gt;</p>"),
        (
            ".. math:: \\unknowncommand < b",
            '<pre class="math" tabindex="0"><code>\\unknowncommand &lt; b</code></pre>',
        ),
        ("Text\n- item", "<p>Text</p>\n<ul><li>item</li></ul>"),
    ],
)
def test_every_form(docstring: str, html: str) -> None:
    assert str(prose.to_html(docstring)) == html


def test_code_within_a_line_has_one_pair_of_backticks_or_two() -> None:
    assert str(prose.inline("``|r|`` and `x`")) == "<code>|r|</code> and <code>x</code>"


def test_formulas_are_set_and_numbered() -> None:
    text = str(prose.to_html(".. math:: a < b \\tag{4, 7}\n\nand :math:`x_1 < 2`."))
    assert "<mo>&lt;</mo>" in text and '<span class="tag">(4, 7)</span>' in text
    assert '<div class="math" tabindex="0"><math' in text and 'display="block"' in text
    assert "<msub><mi>x</mi><mn>1</mn></msub>" in text and 'display="inline"' in text


def test_what_a_formula_contains_is_escaped() -> None:
    text = str(prose.to_html(".. math:: \\text{<script>alert(1)</script>} & b"))
    assert "<script>" not in text and "&lt;script&gt;" in text


@pytest.mark.parametrize("tex", [r"\frac", r"a_b_c", r"\left( x", r"\nosuchcommand", "{"])
def test_tex_that_is_not_understood_is_no_formula(tex: str) -> None:
    assert mathml(tex) is None


@pytest.mark.parametrize("kind", ["attack", "defense"])
def test_every_formula_of_the_modules_is_understood(kind: registry.Kind) -> None:
    for place, path in registry.modules(kind).items():
        found = source.read(path, place.rpartition("/")[2])
        assert found is not None
        for text in (found.method, *(parameter.text for parameter in found.parameters)):
            shown = str(prose.to_html(text))
            assert 'class="math" tabindex="0"><code>' not in shown, (path, shown)
            assert '<code class="math">' not in shown, (path, to_markdown(text))
