"""What tests of the pages share: saying something, looking at accessibility, measuring, pictures."""

import os
from pathlib import Path

from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Page, expect

MEASURE = """
window.shifts = [];
new PerformanceObserver((list) => {
  for (const { hadRecentInput, value, sources } of list.getEntries()) {
    const name = ({ node }) => node?.id || node?.className || node?.nodeName;
    if (!hadRecentInput) window.shifts.push([value, sources.map((source) =>
      `${name(source)} ${source.previousRect.top}/${source.previousRect.left} ${source.currentRect.top}/${source.currentRect.left}`)]);
  }
}).observe({ type: "layout-shift", buffered: true });
"""
"""Keeps how far each layout shift moved what is shown, and what it moved from where to where."""
LISTEN = """
window.announced = [];
new MutationObserver(() => window.announced.push(document.getElementById("announcer").textContent))
  .observe(document.getElementById("announcer"), { childList: true, characterData: true, subtree: true });
"""
"""Keeps what a screen reader is told."""
SAMPLE = """
window.samples = [];
new MutationObserver(() => window.samples.push([...document.querySelectorAll(".body")].map((body) => body.textContent)))
  .observe(document.getElementById("turns"), { childList: true, characterData: true, subtree: true });
"""
"""Keeps each state of the answers that is shown."""
SAMPLE_CODE = """
window.codes = new Set();
new MutationObserver(() => document.querySelectorAll(".body code").forEach((code) => window.codes.add(code.textContent)))
  .observe(document.getElementById("turns"), { childList: true, characterData: true, subtree: true });
"""
"""Keeps all that is ever shown as code."""


def shoot(page: Page, name: str) -> None:
    """Keep a picture where RATCHET's developer asks for one."""
    if folder := os.environ.get("SCREENSHOTS"):
        page.screenshot(path=Path(folder) / f"{name}.png")


def check_accessible(page: Page, name: str) -> None:
    """axe-core finds nothing wrong in either theme. Takes a picture of each."""
    for theme in ("light", "dark"):
        page.evaluate("theme => { document.documentElement.dataset.theme = theme; }", theme)
        shoot(page, f"{name}-{theme}")
        found = Axe().run(page)
        assert found.violations_count == 0, f"{name}, {theme}: {found.generate_report()}"
    page.evaluate("() => { document.documentElement.dataset.theme = 'auto'; }")


def say(page: Page, text: str, *, two: bool | None = None) -> None:
    """Send a message by key; `two`: whether to ask for two answers."""
    if two is not None:
        page.locator("#mode").select_option("always" if two else "never")
    box = page.get_by_label("Message", exact=True)
    box.fill(text)
    box.press("Enter")


def wait_for_end(page: Page) -> None:
    """Until no answer is coming any more."""
    expect(page.locator("body:not(.running)")).to_be_attached()
    expect(page.get_by_role("button", name="Send", exact=True)).to_be_visible()
