"""The labelers' page, in a real browser: answers put in order by mouse and by keys, corrected, and written."""

import pytest
from playwright.sync_api import Page, expect

from tests.service.browsing import check_accessible, shoot
from tests.service.conftest import Pages, Rows, Serve, ask
from tests.service.fake_engine import FakeEngine

pytestmark = [pytest.mark.browser, pytest.mark.database]
REPLIES = ("alpha is first", "bravo then follows", "charlie, the third", "delta ends **it**")


def open_answers(page: Page, url: object, prompt: str = "say something") -> list[str]:
    """Get four answers; their texts, in the order shown."""
    page.goto(f"{url}/label")
    page.get_by_label("Prompt", exact=True).fill(prompt)
    page.get_by_role("button", name="Get answers").click()
    expect(page.locator("#announcer")).to_have_text("4 answers have come, to be ranked.")
    expect(page.locator("#ranking li")).to_have_count(4)
    return shown(page)


def shown(page: Page) -> list[str]:
    return [text.strip() for text in page.locator("#ranking .prose").all_text_contents()]


def stored_ranks(rows: Rows) -> dict[str, int]:
    """The rank of each answer's text."""
    found = rows(
        "SELECT replies.content, ranks -> comparison_replies.position FROM rankings JOIN comparison_replies USING (comparison_id)"
        " JOIN replies ON replies.id = reply_id"
    )
    return {content.replace("**", ""): rank for content, rank in found}


@pytest.mark.parametrize("phone", [False, True], ids=["desk", "phone"])
def test_answers_are_ranked_by_keys_alone(serve: Serve, rows: Rows, pages: Pages, phone: bool) -> None:
    page = pages.open(phone=phone)
    a, b, c, d = open_answers(page, serve(FakeEngine(replies=REPLIES)).base_url)
    page.locator("#ranking li").first.focus()
    page.keyboard.press("Alt+ArrowDown")  # b a c d
    assert shown(page) == [b, a, c, d]
    expect(page.locator("#announcer")).to_have_text("Now at place 2 of 4.")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("1")  # d b a c
    assert shown(page) == [d, b, a, c]
    page.keyboard.press("ArrowDown")
    page.keyboard.press("=")
    expect(page.locator("#ranking li").nth(1)).to_have_attribute(
        "aria-label", "Rank 1, tied with the one above"
    )
    check_accessible(page, f"ranking-{'phone' if phone else 'desk'}")
    page.keyboard.press("s")
    expect(page.locator("#outcome")).to_have_text("Saved. All are answers of policy-000000.")
    assert stored_ranks(rows) == {d: 1, b: 1, a: 2, c: 3}
    page.get_by_role("button", name="Undo").press("Enter")
    expect(page.locator("#outcome")).to_have_text("Undone.")
    assert rows("SELECT count(*) FROM rankings") == [(0,)]


def test_answers_are_ranked_by_dragging_and_by_buttons(serve: Serve, rows: Rows, pages: Pages) -> None:
    page = pages.open()
    a, b, c, d = open_answers(page, serve(FakeEngine(replies=REPLIES)).base_url)
    handles = page.locator("#ranking .handle")
    start, end = handles.nth(0).bounding_box(), handles.nth(2).bounding_box()
    assert start is not None
    assert end is not None
    page.mouse.move(start["x"] + 8, start["y"] + 8)
    page.mouse.down()
    page.mouse.move(start["x"] + 8, (start["y"] + end["y"]) / 2, steps=5)
    page.mouse.move(start["x"] + 8, end["y"] + 60, steps=5)
    page.mouse.up()
    assert shown(page) == [b, c, a, d]
    page.get_by_role("button", name="Up").nth(3).click()
    assert shown(page) == [b, c, d, a]
    page.get_by_role("button", name="Tie with the one above").nth(2).click()
    page.get_by_label("Why").fill("<i>clearer</i>")
    page.get_by_role("button", name="Save ranking").click()
    expect(page.locator("#outcome")).to_contain_text("Saved.")
    assert stored_ranks(rows) == {b: 1, c: 2, d: 3, a: 3}
    assert rows("SELECT comment FROM rankings") == [("<i>clearer</i>",)]


def test_an_answer_is_corrected(serve: Serve, rows: Rows, pages: Pages) -> None:
    page = pages.open()
    first, *_ = open_answers(page, serve(FakeEngine(replies=REPLIES)).base_url)
    page.get_by_role("button", name="Correct").first.click()
    field = page.get_by_label("Correct this answer")
    expect(field).to_be_focused()
    assert field.input_value().replace("**", "") == first
    field.fill("Something better.")
    page.get_by_role("button", name="Keep it").click()
    expect(page.locator("#ranking")).to_contain_text("Kept. It is learnt from in the next cycle.")
    [(content, corrected)] = rows("SELECT content, corrected FROM demonstrations")
    assert (content, corrected.replace("**", "")) == ("Something better.", first)


def test_an_answer_is_written_to_a_prompt_of_the_queue_which_then_is_done(
    serve: Serve, rows: Rows, pages: Pages
) -> None:
    client = serve(FakeEngine())
    hostile = "<img src=x onerror=alert(1)> what colour is a lemon?"
    messages = [
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "<script>alert(2)</script>"},
        {"role": "user", "content": hostile},
    ]
    made = client.post("/v1/chat/completions", json=ask(comparison="always") | {"messages": messages}).json()
    client.put(f"/v1/comparisons/{made['id']}/vote", json={"choice": "neither"})
    page = pages.open()
    page.goto(f"{client.base_url}/label")
    page.get_by_role("button", name=hostile).click()
    expect(page.get_by_label("Prompt", exact=True)).to_have_value(hostile)
    expect(page.locator("#before li")).to_have_text(["user: hello", "assistant: <script>alert(2)</script>"])
    check_accessible(page, "queue-desk")
    page.get_by_role("button", name="Write one").click()
    page.get_by_label("Your answer").fill("A lemon is yellow.")
    page.get_by_role("button", name="Keep it").click()
    expect(page.get_by_text("Kept.").first).to_be_visible()
    expect(page.get_by_text("Nothing waits")).to_be_visible()
    assert rows("SELECT content, messages FROM demonstrations JOIN prompts ON prompts.id = prompt_id") == [
        ("A lemon is yellow.", messages)
    ]
    page.reload()
    expect(page.get_by_text("Nothing waits")).to_be_visible()


def test_answers_that_all_say_the_same_cannot_be_ranked_and_the_page_says_so(
    serve: Serve, pages: Pages
) -> None:
    page = pages.open(phone=True)
    open_answers(page, serve(FakeEngine(replies=("It is so.",))).base_url)
    expect(page.get_by_text("The answers all say the same")).to_be_visible()
    expect(page.get_by_role("button", name="Save ranking")).to_be_hidden()
    shoot(page, "alike-phone")


def test_a_users_key_is_told_that_labelling_needs_another(serve: Serve, pages: Pages) -> None:
    client = serve(FakeEngine())
    keys = {
        role: client.post("/operator/keys", json={"account": "acme", "role": role}).json()["key"]
        for role in ("user", "labeler")
    }
    page = pages.open(refusals=True)
    page.goto(f"{serve(FakeEngine(), require_keys=True).base_url}/label")
    for role, said in (
        ("user", "This call needs a key of role labeler; yours is user."),
        ("labeler", "Nothing waits"),
    ):
        page.get_by_label("API key").fill(keys[role])
        page.get_by_role("button", name="Use it").click()
        expect(page.get_by_text(said).first).to_be_visible()
    expect(page.locator("#key-form")).to_be_hidden()


def test_an_error_is_shown_and_the_prompt_is_kept(serve: Serve, pages: Pages) -> None:
    page = pages.open(refusals=True)
    page.goto(f"{serve(FakeEngine(breaks_after=0)).base_url}/label")
    page.get_by_label("Prompt", exact=True).fill("hello")
    page.get_by_role("button", name="Get answers").click()
    expect(page.get_by_role("alert")).to_contain_text("The engine went away.")
    page.reload()
    expect(page.get_by_label("Prompt", exact=True)).to_have_value("hello")
