"""`POST /v1/markdown`: Markdown as HTML that is safe to show. For our own pages, which build nothing and fetch nothing.

Markdown is read by markdown-it-py, with HTML in it taken as text; what comes out passes nh3's list of what is allowed. So a
page may insert it whatever people or models wrote. Images become links: nothing is fetched from other hosts.
"""

import asyncio
from collections.abc import Sequence

import nh3
from fastapi import APIRouter
from markdown_it import MarkdownIt
from markdown_it.token import Token

from service.auth import KNOWN_CALLER
from service.feedback_schemas import MarkdownAnswer, MarkdownRequest

router = APIRouter(tags=["service"])
BLOCKS = {"p", "br", "hr", "blockquote", "ul", "ol", "li", "pre", "h3", "h4", "h5", "h6"}
TABLES = {"table", "thead", "tbody", "tr", "th", "td"}
TAGS = BLOCKS | TABLES | {"em", "strong", "s", "code", "a"}
ATTRIBUTES = {"a": {"href", "title"}, "ol": {"start"}}
SCHEMES = {"http", "https", "mailto"}
HIGHEST_HEADING = 3
"""A page has headings of its own above."""

_parser = (
    MarkdownIt("commonmark", {"html": False, "breaks": True})
    .enable(["table", "strikethrough"])
    .disable("image")
)


@router.post("/v1/markdown", dependencies=[KNOWN_CALLER])
async def render_markdown(body: MarkdownRequest) -> MarkdownAnswer:
    """Texts in Markdown as HTML that is safe to show, in the same order. HTML in them is shown as text."""
    return MarkdownAnswer(html=await asyncio.to_thread(_render_all, body.texts))


def _render_all(texts: Sequence[str]) -> list[str]:
    return [render(text) for text in texts]


def render(text: str) -> str:
    """HTML without scripts, styles, images, or links to anything but web and mail."""
    tokens = [_lowered(token) for token in _parser.parse(text)]
    html = _parser.renderer.render(tokens, _parser.options, {})
    return nh3.clean(
        html, tags=TAGS, attributes=ATTRIBUTES, url_schemes=SCHEMES, link_rel="noopener noreferrer"
    )


def _lowered(token: Token) -> Token:
    """Headings go below the page's own."""
    if token.type in ("heading_open", "heading_close"):
        token.tag = f"h{min(int(token.tag[1]) + HIGHEST_HEADING - 1, 6)}"
    return token
