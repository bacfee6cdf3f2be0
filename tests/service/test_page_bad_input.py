"""The chat page against hostile texts, huge ones, a service that is busy, away or restarted, and refused keys."""

import httpx
import pytest
from playwright.sync_api import Page, Route, expect

from service.settings import Settings
from tests.engine import free_port
from tests.service.browsing import check_accessible, say, shoot, wait_for_end
from tests.service.conftest import Pages, Rows, Serve, address_of, running, wait_until
from tests.service.fake_engine import FakeEngine

pytestmark = [pytest.mark.browser, pytest.mark.database]
HOSTILE = """<script>window.hacked = 1</script> <img src=x onerror="window.hacked = 2">
<svg onload="window.hacked = 3"></svg> <a href="javascript:window.hacked = 4">x</a> <style>* { display: none }</style>

[click](javascript:window.hacked=5) ![pixel](https://other.example/pixel.png) [good](https://other.example/)
<iframe src="https://other.example/"></iframe> <form action="https://other.example/"><input></form>

# A heading <b onclick="window.hacked = 6">that is loud</b>

| a | b |
| :-: | --: |
| `<script>` | **<i>x</i>** |
"""


def watch_hosts(page: Page) -> set[str]:
    hosts: set[str] = set()
    page.on("request", lambda request: hosts.add(request.url.split("/")[2]))
    return hosts


def check_harmless(page: Page, hosts: set[str]) -> None:
    assert page.evaluate("window.hacked") is None
    assert len(hosts) == 1
    inside = "#turns :is(script, img, svg, style, iframe, form:not(.explain), object, [onclick], [onerror], [style])"
    assert page.locator(inside).count() == 0


def test_hostile_markdown_and_html_do_nothing_live_and_when_read_again(serve: Serve, pages: Pages) -> None:
    page = pages.open()
    hosts = watch_hosts(page)
    page.goto(str(serve(FakeEngine(replies=(HOSTILE, f"Otherwise {HOSTILE} {HOSTILE}"))).base_url))
    say(page, HOSTILE, two=True)
    expect(page.get_by_text("Which answer is better?")).to_be_visible()
    check_harmless(page, hosts)
    links = page.locator(".answer a")
    assert {link.get_attribute("href") for link in links.all() if link.get_attribute("href")} == {
        "https://other.example/pixel.png",
        "https://other.example/",
    }
    for link in links.all():
        assert link.get_attribute("rel") == "noopener noreferrer"
    expect(page.locator(".bubble")).to_have_text(HOSTILE.strip())
    page.get_by_role("button", name="First").click()
    page.get_by_role("button", name="Say why").click()
    page.get_by_label("Why").fill(HOSTILE)
    page.get_by_role("button", name="Keep").click()
    expect(page.get_by_text("Thank you, that is kept")).to_be_visible()
    check_accessible(page, "hostile")
    page.reload()
    expect(page.locator(".bubble")).to_have_text(HOSTILE.strip())
    expect(page.locator(".answer .body h3").first).to_be_visible()
    expect(page.locator("#conversations a")).to_contain_text("<script>")
    check_harmless(page, hosts)


def test_a_message_of_200_kilobytes_is_sent_shown_and_kept(
    serve: Serve, pages: Pages, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = pages.open(phone=True, refusals=True)
    engine = FakeEngine(replies=("That was long.",))
    page.goto(str(serve(engine).base_url))
    long = ("word <b> *mark* " * 12 + "\U0001f34b ") * 1000
    say(page, long, two=False)
    expect(page.locator(".answer .body")).to_have_text("That was long.", timeout=30_000)
    assert engine.asked[-1][1][0].content == long.strip()
    box = page.locator(".bubble").bounding_box()
    assert box is not None
    assert box["height"] < 400
    page.reload()
    expect(page.locator(".answer .body")).to_have_text("That was long.", timeout=30_000)
    monkeypatch.setattr("service.edge.MOST_BODY_BYTES", 100_000)  # a box with the whole MiB is slow
    too_long = "word " * 20_000 + "more"
    say(page, too_long)
    expect(page.get_by_role("alert")).to_contain_text("Shorten the conversation")
    expect(page.get_by_label("Message", exact=True)).to_have_value(too_long)


def test_an_answer_of_200_kilobytes_is_shown(serve: Serve, page: Page) -> None:
    page.goto(str(serve(FakeEngine(replies=("*mark*\n" * 30_000,))).base_url))
    say(page, "hello", two=False)
    expect(page.locator(".answer .actions")).to_be_visible(timeout=30_000)
    assert len(page.locator(".answer .body").inner_text()) > 200_000


def test_right_to_left_and_emoji_texts_are_shown_whole_and_in_their_direction(
    serve: Serve, page: Page
) -> None:
    hebrew, emoji = (
        "לימון הוא צהוב, שלום",
        "\U0001f469\u200d\U0001f469\u200d\U0001f467 \U0001f34b\U0001f1eb\U0001f1f7",
    )
    reply = f"{hebrew}\n\nA lemon {emoji}"
    page.goto(str(serve(FakeEngine(replies=(reply, f"{emoji * 9} {hebrew}"), pause_seconds=0.05)).base_url))
    page.evaluate(
        """() => { window.halves = 0; new MutationObserver(() => {
          for (const body of document.querySelectorAll(".body")) if (!body.textContent.isWellFormed()) window.halves += 1;
        }).observe(document.getElementById("turns"), { childList: true, characterData: true, subtree: true }); }"""
    )
    say(page, hebrew, two=True)
    expect(page.get_by_text("Which answer is better?")).to_be_visible()
    assert page.evaluate("window.halves") == 0
    direction = "element => getComputedStyle(element).direction"
    assert page.locator(".bubble").evaluate(direction) == "rtl"
    body = page.locator(".body", has_text="A lemon")
    assert body.evaluate(direction) == "rtl"
    expect(body).to_contain_text(emoji)
    shoot(page, "right-to-left")


def test_an_answer_without_end_leaves_the_page_usable_and_can_be_stopped(serve: Serve, page: Page) -> None:
    endless = FakeEngine(replies=("**word** " * 200_000,))  # as fast as it can be sent
    endless.may_end.clear()
    page.goto(str(serve(endless).base_url))
    say(page, "hello", two=False)
    expect(page.locator(".answer .body")).to_contain_text("word")
    page.get_by_label("Message", exact=True).fill("meanwhile")
    page.get_by_role("button", name="Stop").click()
    wait_for_end(page)
    expect(page.get_by_text("Stopped.", exact=True).first).to_be_visible()
    expect(page.get_by_label("Message", exact=True)).to_have_value("meanwhile")
    wait_until(lambda: endless.aborted == 1)


def test_an_answer_that_breaks_off_is_kept_as_far_as_it_came_and_can_be_retried(
    serve: Serve, page: Page
) -> None:
    engine = FakeEngine(breaks_after=1)
    page.goto(str(serve(engine).base_url))
    say(page, "hello", two=False)
    expect(
        page.get_by_text("The engine went away. What came of the answer is not gone on with.").first
    ).to_be_visible()
    engine.breaks_after = None
    page.get_by_role("button", name="Retry").click()
    expect(page.locator(".answer .body")).to_have_text(["one two"])
    expect(page.locator(".turn")).to_have_count(1)


def test_what_was_typed_is_kept_when_nothing_comes_and_over_a_reload(serve: Serve, page: Page) -> None:
    engine = FakeEngine(breaks_after=0)
    page.goto(str(serve(engine).base_url))
    say(page, "hello", two=False)
    expect(page.get_by_role("alert")).to_have_text("The engine went away.")
    expect(page.get_by_label("Message", exact=True)).to_have_value("hello")
    page.reload()
    expect(page.get_by_label("Message", exact=True)).to_have_value("hello")


def test_a_busy_service_says_so_plainly(serve: Serve, pages: Pages) -> None:
    page = pages.open(phone=True, refusals=True)
    page.goto(str(serve(FakeEngine(), max_running=1, max_queued=0).base_url))
    say(page, "hello", two=True)
    alert = page.get_by_role("alert")
    expect(alert).to_contain_text("The service is busy")
    expect(alert).to_contain_text("(In about 2 s.)")
    expect(page.get_by_label("Message", exact=True)).to_have_value("hello")
    check_accessible(page, "busy-phone")


def test_the_service_restarted_under_an_open_page(prepared: Settings, rows: Rows, pages: Pages) -> None:
    settings = prepared.model_copy(update={"duel_votes": 0})
    page, port = pages.open(phone=True, refusals=True), free_port()
    with running(settings, lambda _: lambda _: FakeEngine(), port) as server:
        url = address_of(server)
        wait_until(lambda: httpx.get(f"{url}/readyz", timeout=60).status_code == 200)
        page.goto(url)
        say(page, "hello", two=True)
        expect(page.get_by_text("Which answer is better?")).to_be_visible()
    page.get_by_role("button", name="First").click()
    expect(page.get_by_role("alert")).to_contain_text("The service cannot be reached.")
    say(page, "and then?", two=False)
    expect(page.get_by_role("alert")).to_contain_text("The service cannot be reached.")
    expect(page.get_by_label("Message", exact=True)).to_have_value("and then?")
    shoot(page, "away-phone")
    with running(settings, lambda _: lambda _: FakeEngine(), port):
        wait_until(lambda: httpx.get(f"{url}/readyz", timeout=60).status_code == 200)
        page.get_by_role("button", name="Vote after all").click()
        page.get_by_role("button", name="First").click()
        expect(page.locator(".verdict")).to_contain_text("You chose the first")
        page.get_by_role("button", name="Send", exact=True).click()
        expect(page.locator(".answer .body:visible")).to_have_count(2)
        wait_for_end(page)
    assert rows("SELECT choice FROM votes") == [("first",)]


def test_the_page_asks_for_a_key_where_one_is_needed_and_again_when_it_has_expired(
    serve: Serve, rows: Rows, pages: Pages
) -> None:
    open_service = serve(FakeEngine())
    keys = [
        open_service.post("/operator/keys", json={"account": "acme", "role": "user"}).json()["key"]
        for _ in range(2)
    ]
    client = serve(FakeEngine(), require_keys=True)
    page = pages.open(phone=True, refusals=True)
    page.goto(str(client.base_url))
    expect(page.locator("[data-message]")).to_contain_text("A key is needed")
    expect(page.get_by_label("Message", exact=True)).to_be_focused()  # the form took no focus
    check_accessible(page, "key-phone")
    late: list[Route] = []
    page.route("**/v1/conversations?**", lambda route: hold_where_key_is_wrong(route, late))
    page.get_by_label("API key").fill("rk-wrong")
    page.get_by_role("button", name="Use it").click()
    expect(page.locator("[data-message]")).to_contain_text("This key is unknown, revoked or expired.")
    page.get_by_label("API key").fill(keys[0])
    page.get_by_role("button", name="Use it").click()
    expect(page.locator("#status")).to_contain_text("policy-000000 answers.")
    expect(page.locator("#key-form")).to_be_hidden()
    with page.expect_response(late[0].request.url):
        late[0].continue_()
    say(page, "hello", two=False)
    expect(page.locator(".answer .body")).to_have_text("one two")
    expect(page.locator("#key-form")).to_be_hidden()  # that the old key is refused is heard no more
    wait_for_end(page)
    assert page.evaluate("[sessionStorage.getItem('ratchet-key'), localStorage.getItem('ratchet-key')]") == [
        keys[0],
        None,
    ]
    rows("UPDATE keys SET expires_at = now() WHERE id = 1")
    bearer = {"authorization": f"Bearer {keys[0]}"}
    wait_until(lambda: client.get("/v1/users/me", headers=bearer).status_code == 401)
    say(page, "more")
    expect(page.locator("#key-form")).to_be_visible()
    expect(page.locator("[data-message]")).to_contain_text("This key is unknown, revoked or expired.")
    expect(page.get_by_label("Message", exact=True)).to_have_value("more")
    page.get_by_label("API key").fill(keys[1])
    page.get_by_label("keep it in this browser").check()
    page.get_by_role("button", name="Use it").click()
    page.get_by_role("button", name="Send", exact=True).click()
    expect(page.locator(".answer .body")).to_have_count(2)
    wait_for_end(page)
    assert page.evaluate("[sessionStorage.getItem('ratchet-key'), localStorage.getItem('ratchet-key')]") == [
        None,
        keys[1],
    ]
    page.get_by_role("button", name="Chats").click()
    page.get_by_role("button", name="Forget the key").click()
    expect(page.locator("[data-message]")).to_contain_text("A key is needed")


def hold_where_key_is_wrong(route: Route, held: list[Route]) -> None:
    if route.request.headers.get("authorization") == "Bearer rk-wrong":
        held.append(route)
    else:
        route.continue_()


def test_two_tabs_vote_on_one_comparison(serve: Serve, rows: Rows, pages: Pages) -> None:
    one = pages.open()
    one.goto(str(serve(FakeEngine()).base_url))
    say(one, "hello", two=True)
    expect(one.get_by_text("Which answer is better?")).to_be_visible()
    other = pages.open(beside=one)
    other.goto(one.url)
    expect(other.get_by_text("Which answer is better?")).to_be_visible()
    one.get_by_role("button", name="First").click()
    expect(other.locator(".verdict")).to_contain_text("You chose the first.")
    expect(other.locator("#vote")).to_be_hidden()
    other.get_by_role("button", name="Undo").click()
    expect(one.get_by_text("Which answer is better?")).to_be_visible()
    assert rows("SELECT count(*) FROM votes") == [(0,)]
    other.get_by_role("button", name="Second").click()
    expect(one.locator(".verdict")).to_contain_text("You chose the second.")
    assert rows("SELECT choice FROM votes") == [("second",)]


def test_two_tabs_that_do_not_hear_each_other_leave_one_vote_the_later_one(
    serve: Serve, rows: Rows, pages: Pages
) -> None:
    tabs = [pages.open()]
    tabs[0].add_init_script("window.BroadcastChannel = class extends EventTarget { postMessage() {} };")
    tabs[0].goto(str(serve(FakeEngine()).base_url))
    say(tabs[0], "hello", two=True)
    expect(tabs[0].get_by_text("Which answer is better?")).to_be_visible()
    tabs.append(pages.open(beside=tabs[0]))
    tabs[1].add_init_script("window.BroadcastChannel = class extends EventTarget { postMessage() {} };")
    tabs[1].goto(tabs[0].url)
    # Else it may read the conversation when the other's vote is in already.
    expect(tabs[1].get_by_text("Which answer is better?")).to_be_visible()
    for tab, name in zip(tabs, ("First", "Second"), strict=True):
        tab.get_by_role("button", name=name).click()
        expect(tab.locator(".verdict")).to_contain_text("You chose")
    assert rows("SELECT choice FROM votes") == [("second",)]
    actions = [action for (action,) in rows("SELECT action FROM feedback_events ORDER BY id")]
    assert actions == ["given", "revised"]
