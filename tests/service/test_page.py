"""The page, in a real browser."""

import os
from pathlib import Path

import pytest
from conftest import Rows, Serve
from playwright.sync_api import Page, expect

from tests.service.fake_engine import FakeEngine

pytestmark = [pytest.mark.browser, pytest.mark.database]


def shoot(page: Page, name: str) -> None:
    """Keep a picture where RATCHET's developer asks for one."""
    if folder := os.environ.get("SCREENSHOTS"):
        page.screenshot(path=Path(folder) / f"{name}.png")


def say(page: Page, text: str) -> None:
    page.get_by_label("Message").fill(text)
    page.get_by_role("button", name="Send").click()


def test_two_answers_are_shown_voted_on_and_the_chosen_one_goes_on(
    serve: Serve, rows: Rows, page: Page
) -> None:
    engine = FakeEngine(replies=("<b>warm</b> and kind", "cold and curt"), pause_seconds=0.02)
    page.goto(str(serve(engine).base_url))
    expect(page.locator("footer")).to_contain_text("policy-000000 answers. 0 votes")
    page.get_by_label("always show two").check()
    say(page, "what colour is a lemon?")
    second = page.locator(".reply").nth(1)
    page.get_by_role("button", name="Second").click()
    expect(page.get_by_text("First: policy-000000, second: policy-000000.")).to_be_visible()
    expect(second).to_have_class("bubble reply chosen")
    expect(page.locator("footer")).to_contain_text("1 votes")
    shoot(page, "vote")
    page.get_by_label("always show two").uncheck()
    say(page, "and a lime?")
    expect(page.locator(".user")).to_have_count(2)
    expect(page.get_by_role("button", name="Send")).to_be_visible()
    assert rows("SELECT choice FROM votes") == [("second",)]
    assert engine.asked[-1][1][1].content == second.text_content()
    assert {"<b>warm</b> and kind", "cold and curt"} >= {
        second.text_content()
    }  # shown as text, not as markup
    assert rows("SELECT count(*) FROM users WHERE name LIKE 'web-%%'") == [(1,)]


def test_an_error_is_shown_plainly_and_the_message_is_kept(serve: Serve, page: Page) -> None:
    engine = FakeEngine(breaks_after=1)
    page.goto(str(serve(engine).base_url))
    say(page, "hello")
    expect(page.locator(".trouble")).to_have_text("The engine went away.")
    expect(page.get_by_label("Message")).to_have_value("hello")


def test_an_answer_can_be_stopped(serve: Serve, page: Page) -> None:
    engine = FakeEngine(pause_seconds=30)
    page.goto(str(serve(engine).base_url))
    say(page, "hello")
    page.get_by_role("button", name="Stop").click()
    expect(page.get_by_role("button", name="Send")).to_be_visible()
    expect(page.locator(".trouble")).to_have_count(0)


def test_answers_that_say_the_same_are_not_offered_for_a_vote(serve: Serve, page: Page) -> None:
    page.goto(str(serve(FakeEngine(replies=("It is so.", "It is so!"))).base_url))
    page.get_by_label("always show two").check()
    say(page, "is it?")
    expect(page.get_by_text("The two answers say the same")).to_be_visible()
    expect(page.get_by_role("button", name="First")).to_have_count(0)
