"""Markdown becomes HTML that is safe to show, whatever people or models wrote."""

import time
from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.markdown import ATTRIBUTES, SCHEMES, TAGS, render
from tests.service.conftest import Serve
from tests.service.fake_engine import FakeEngine


class Seen(HTMLParser):
    """The elements of a document, with their attributes."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))


def check_safe(html: str) -> None:
    """Only elements and attributes that are allowed, and links only to the web and to mail."""
    for tag, attributes in Seen(html).elements:
        assert tag in TAGS
        assert attributes.keys() <= ATTRIBUTES.get(tag, set()) | ({"rel"} if tag == "a" else set())
        scheme, colon, _ = (attributes.get("href") or "").partition(":")
        assert not colon or "/" in scheme or "?" in scheme or "#" in scheme or scheme.lower() in SCHEMES


def test_markdown_is_rendered() -> None:
    assert render("A **lemon** is\nyellow.") == "<p>A <strong>lemon</strong> is<br>\nyellow.</p>\n"
    assert render("```python\nprint('<b>')\n```") == "<pre><code>print('&lt;b&gt;')\n</code></pre>\n"
    assert render("# Fruit") == "<h3>Fruit</h3>\n"
    assert render("3. three") == '<ol start="3">\n<li>three</li>\n</ol>\n'
    assert "<td>1</td>" in render("| a |\n| :-: |\n| 1 |")
    assert render("~~no~~") == "<p><s>no</s></p>\n"


def test_html_is_shown_as_text() -> None:
    for html in (
        "<script>alert(1)</script>",
        "<img src=x onerror=alert(1)>",
        "<style>*{}</style>",
        "<b>x</b>",
    ):
        rendered = render(html)
        assert "&lt;" in rendered
        assert {tag for tag, _ in Seen(rendered).elements} <= {"p"}


def test_links_go_to_the_web_and_tell_it_nothing() -> None:
    assert render("[x](https://a.example/?b=1)") == (
        '<p><a href="https://a.example/?b=1" rel="noopener noreferrer">x</a></p>\n'
    )
    for target in (
        "javascript:alert(1)",
        "JaVaScRiPt:alert(1)",
        "data:text/html,x",
        "vbscript:x",
        "file:///etc/passwd",
    ):
        assert "href" not in render(f"[x]({target})")
        assert "href" not in render(f"<{target}>")


def test_an_image_is_a_link_and_nothing_is_fetched() -> None:
    assert render("![a cat](https://a.example/cat.png)") == (
        '<p>!<a href="https://a.example/cat.png" rel="noopener noreferrer">a cat</a></p>\n'
    )


@given(st.text(alphabet=st.sampled_from("<>()[]!\"'`*_#-|:\\\n &;=/jsonerc data:javascript"), max_size=200))
def test_nothing_unsafe_gets_through(text: str) -> None:
    check_safe(render(text))


@pytest.mark.parametrize(
    "unit", ["[", "*a ", "_a*", "`", "> ", "- ", "![", "](", "<a ", "&", "|", "[a](", "**", "\\"]
)
def test_hostile_markdown_takes_no_long_time(unit: str) -> None:
    text = unit * (50_000 // len(unit))
    began = time.process_time()
    check_safe(render(text))
    assert time.process_time() - began < 5


@pytest.mark.database
def test_the_call_renders_each_text_and_wants_a_key_where_one_is_needed(serve: Serve) -> None:
    client = serve(FakeEngine())
    answer = client.post("/v1/markdown", json={"texts": ["*a*", "<i>"]})
    assert answer.json() == {"html": ["<p><em>a</em></p>\n", "<p>&lt;i&gt;</p>\n"]}
    strict = serve(FakeEngine(), require_keys=True)
    assert strict.post("/v1/markdown", json={"texts": ["a"]}).status_code == 401
