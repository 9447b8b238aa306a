"""Docstrings as HTML."""

import pytest

from leakatlas.site import prose


@pytest.mark.parametrize(
    ("docstring", "html"),
    [
        ("One\ntwo.\n\nThree.", "<p>One two.</p>\n<p>Three.</p>"),
        ("``a<b`` and *so* on", "<p><code>a&lt;b</code> and <em>so</em> on</p>"),
        ("- one\n  more\n- two", "<ul><li>one more</li><li>two</li></ul>"),
        ("1. one\n2. two", "<ol><li>one</li><li>two</li></ol>"),
        (
            ".. math:: a < b",
            '<pre class="math" tabindex="0"><code>a &lt; b</code></pre>',
        ),
        ("<script>alert(1)</script>", "<p>&lt;script&gt;alert(1)&lt;/script&gt;</p>"),
        ("in :math:`x_1 < 2`", '<p>in <code class="math">x_1 &lt; 2</code></p>'),
        ("Text\n- item", "<p>Text</p>\n<ul><li>item</li></ul>"),
    ],
)
def test_every_form(docstring: str, html: str) -> None:
    assert str(prose.to_html(docstring)) == html
