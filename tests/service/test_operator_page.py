"""The operator's page, in a real browser: what it shows, what it does, and what cannot harm it."""

import os
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Page, expect

from service.settings import Settings
from tests.engine import free_port
from tests.service.conftest import Pages, Rows, Serve, address_of, running, wait_until
from tests.service.fake_engine import FakeEngine
from tests.service.history import BASE, NUM_VOTES, ONE, THREE, TWO, Given, held, write_history, write_votes

pytestmark = [pytest.mark.browser, pytest.mark.database]
POINTER = "SELECT live, previous, challenger FROM deployment"
ACTIONS = "SELECT action, subject, reason FROM operator_actions ORDER BY id DESC LIMIT 1"
DESKTOP, PHONE = (1280, 900), (390, 780)
HOSTILE = "<img src=x onerror=alert(1)><script>alert(2)</script>[a](javascript:alert(3)) **b** `c`"
Open = Callable[..., Page]


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine(logprobs=dict.fromkeys((ONE, TWO, THREE), -2.0))


@pytest.fixture
def client(serve: Serve, rows: Rows, engine: FakeEngine, tmp_path: Path) -> httpx.Client:
    """A service with a day's history: policy-000002 is live, policy-000003 on trial, policy-000001 previous."""
    write_history(rows, tmp_path)
    client = serve(engine, duel_votes=100)
    wait_until(lambda: held(client) == [BASE, ONE, TWO, THREE])
    return client


@pytest.fixture
def open_page(pages: Pages) -> Open:
    """Open the operator's page; an alert or a request to another host fails the test, as script errors do."""

    def start(
        url: str, size: tuple[int, int] = DESKTOP, theme: str = "light", refusals: bool = False
    ) -> Page:
        viewport = {"width": size[0], "height": size[1]}
        page = pages.open(viewport=viewport, color_scheme=theme, refusals=refusals)
        note = pages.faults.append
        page.on("dialog", lambda dialog: note(f"a dialog: {dialog.message}"))
        page.on("request", lambda request: None if request.url.startswith(url) else note(request.url))
        page.goto(f"{url}/operator")
        return page

    return start


def shoot(page: Page, name: str) -> None:
    if folder := os.environ.get("SCREENSHOTS"):
        page.screenshot(path=Path(folder) / f"{name}.png", full_page=True)


def url_of(client: httpx.Client) -> str:
    return str(client.base_url).rstrip("/")


def loaded(page: Page) -> Page:
    """Once every chart is drawn."""
    expect(page.locator("canvas")).to_have_count(8)
    return page


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_it_shows_what_is_live_learnt_and_voted_and_axe_finds_nothing(
    client: httpx.Client, open_page: Open, size: tuple[int, int], theme: str
) -> None:
    page = loaded(open_page(url_of(client), size, theme))
    cards = page.locator("#policies .card")
    expect(cards).to_contain_text([f"Live{TWO}", f"Challenger{THREE}", f"Previous{ONE}"])
    expect(cards.nth(1)).to_contain_text("won 0.60 of 25 decided votes against policy-000002")
    expect(page.locator("#health")).to_contain_text("Healthy: 1 of 1 engines answer")
    expect(page.locator("#running")).to_contain_text("Cycle 5")
    expect(page.locator("#line .name")).to_have_text([BASE, ONE, f"{TWO} (live)"])
    expect(page.locator("#happened")).to_contain_text("acme started cycle 5")
    for canvas in page.locator("canvas").all():
        assert len(canvas.get_attribute("aria-label") or "") > 40
        box = canvas.bounding_box()
        assert box is not None
        assert box["width"] > 200
    narrow = page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
    assert narrow, "the page scrolls sideways"
    shoot(page, f"operator-{theme}-{size[0]}")
    found = Axe().run(page)
    assert found.violations_count == 0, found.generate_report()
    for summary in page.locator("summary").all():
        if not summary.evaluate("summary => summary.parentElement.open"):
            summary.click()
    expect(page.locator("#reward-figure tbody tr")).to_have_count(30)
    page.locator("#rollback").click()
    shoot(page, f"operator-dialog-{theme}-{size[0]}")
    found = Axe().run(page)
    assert found.violations_count == 0, found.generate_report()


def test_a_challenger_is_promoted_with_the_mouse_and_the_reason_is_kept(
    client: httpx.Client, rows: Rows, open_page: Open
) -> None:
    page = open_page(url_of(client))
    page.get_by_role("button", name="Promote the challenger").click()
    dialog = page.get_by_role("dialog", name=f"Let {THREE} go live?")
    expect(dialog).to_contain_text(f"{THREE} will answer every user from the next request on.")
    expect(dialog).to_contain_text(f"{TWO} stays loaded as previous")
    expect(dialog).to_contain_text("0.60 of 25 decided votes")
    assert rows(POINTER) == [(TWO, ONE, THREE)]
    dialog.get_by_label("Why?").fill(f"Kinder. {HOSTILE}")
    dialog.get_by_role("button", name=f"Promote {THREE}").click()
    expect(page.locator("#done")).to_have_text(f"{THREE} is live.")
    expect(dialog).to_be_hidden()
    assert rows(POINTER) == [(THREE, TWO, None)]
    assert rows(ACTIONS) == [("promote", THREE, f"Kinder. {HOSTILE}")]
    expect(page.locator("#policies .card").first).to_contain_text(THREE)
    expect(page.get_by_role("button", name="Promote the challenger")).to_be_disabled()
    expect(page.locator("#happened")).to_contain_text(HOSTILE)


def test_a_rollback_is_done_with_the_keyboard_alone(
    client: httpx.Client, rows: Rows, open_page: Open
) -> None:
    page = loaded(open_page(url_of(client)))
    keys = page.keyboard

    def tab_to(element: str) -> None:
        for _ in range(40):
            keys.press("Tab")
            if page.evaluate("document.activeElement.id") == element:
                return
        raise AssertionError(f"{element} cannot be reached by Tab")

    tab_to("rollback")
    keys.press("Enter")
    expect(page.get_by_role("dialog", name=f"Go back to {ONE}?")).to_be_visible()
    keys.press("Escape")
    expect(page.get_by_role("dialog")).to_be_hidden()
    assert page.evaluate("document.activeElement.id") == "rollback"
    assert rows(POINTER) == [(TWO, ONE, THREE)]
    keys.press("Space")
    keys.type("It repeats itself.")
    tab_to("move-do")
    keys.press("Enter")
    expect(page.locator("#done")).to_have_text(f"{ONE} is live.")
    assert rows(POINTER) == [(ONE, TWO, THREE)]
    assert rows(ACTIONS) == [("rollback", ONE, "It repeats itself.")]
    assert page.evaluate("document.activeElement.id") == "rollback"


def test_a_challenger_is_rejected_and_a_cycle_started_on_a_phone(
    client: httpx.Client, rows: Rows, open_page: Open
) -> None:
    page = open_page(url_of(client), PHONE)
    expect(page.get_by_role("button", name="Start a cycle")).to_be_disabled()
    page.get_by_role("button", name="Reject the challenger").click()
    dialog = page.get_by_role("dialog")
    expect(dialog).to_contain_text(f"{THREE} will be shown to nobody any more")
    dialog.get_by_role("button", name=f"Reject {THREE}").click()
    expect(page.locator("#done")).to_contain_text("The challenger is rejected.")
    assert rows(POINTER) == [(TWO, ONE, None)]
    rows("UPDATE cycles SET stage = 'rejected', ended_at = now() WHERE id = 5")
    page.get_by_role("button", name="Start a cycle").click()
    expect(dialog).to_contain_text(f"The trainer takes a snapshot of all {NUM_VOTES} votes")
    dialog.get_by_role("button", name="Start a cycle").click()
    expect(page.locator("#done")).to_have_text("Cycle 6 is asked for. The trainer takes it up in a moment.")
    expect(page.locator("#running")).to_contain_text("Cycle 6")
    assert rows("SELECT trigger, stage FROM cycles WHERE id = 6") == [("operator", "requested")]


def test_what_a_dialog_said_is_not_done_to_another_policy(
    client: httpx.Client, rows: Rows, open_page: Open
) -> None:
    page = open_page(url_of(client), refusals=True)
    page.get_by_role("button", name="Roll back").click()
    rows("UPDATE deployment SET previous = %s", BASE)  # another operator, or the referee
    page.get_by_label("Why?").fill("It is curt.")
    page.get_by_role("button", name=f"Roll back to {ONE}").click()
    expect(page.get_by_role("dialog")).to_contain_text(f"By now this would be done to {BASE}.")
    expect(page.get_by_label("Why?")).to_have_value("It is curt.")
    assert rows(POINTER) == [(TWO, BASE, THREE)]
    page.get_by_role("button", name="Cancel").click()
    expect(page.get_by_role("dialog")).to_be_hidden()


def test_a_cycle_that_runs_shows_how_far_it_is(client: httpx.Client, rows: Rows, open_page: Open) -> None:
    rows(
        "UPDATE cycles SET stage = 'training', policy = NULL, "
        'metrics = metrics || \'{"progress": {"stage": "training", "done": 12, "total": 30}}\' WHERE id = 5'
    )
    page = open_page(url_of(client))
    expect(page.locator("#running .current")).to_have_text("training")
    expect(page.get_by_label("training: 12 of 30")).to_have_attribute("value", "12")
    rows(
        "UPDATE cycles SET stage = 'requested', metrics = '{}', created_at = now() - interval '5 min' WHERE id = 5"
    )
    expect(page.locator("#running")).to_contain_text("No trainer has taken it up yet.")


def test_hostile_text_of_users_and_policies_is_shown_as_text(
    client: httpx.Client, rows: Rows, engine: FakeEngine, open_page: Open
) -> None:
    rows("UPDATE policies SET reason = %s WHERE name = %s", HOSTILE, ONE)
    rows("UPDATE cycles SET reason = %s WHERE id = 4", HOSTILE)
    rows(
        "UPDATE cycles SET metrics = jsonb_set(metrics, '{samples}', jsonb_build_array(jsonb_build_object("
        "'prompt', %s::text, 'before', %s::text, 'after', %s::text)))",
        *[HOSTILE] * 3,
    )
    now = datetime.now(UTC)
    replies = [(TWO, f"{HOSTILE} one"), (THREE, f"{HOSTILE} two")]
    write_votes(rows, [Given("evil", HOSTILE, replies, "tie", now, now, 1, HOSTILE)])
    rows("UPDATE votes SET tags = jsonb_build_array(%s::text) WHERE comparison_id = 'cmp-evil'", HOSTILE)
    engine.replies = (HOSTILE,)
    page = loaded(open_page(url_of(client)))
    vote = page.locator("#said .vote").first
    expect(vote.locator(".said")).to_have_text([HOSTILE, f"{HOSTILE} one", f"{HOSTILE} two", HOSTILE])
    expect(vote.locator(".quiet").first).to_contain_text(HOSTILE)
    expect(page.locator("#samples .said").first).to_have_text(HOSTILE)
    expect(page.locator("#prompt")).to_contain_text(HOSTILE)
    for place in ("#cycles", "#happened"):
        expect(page.locator(place)).to_contain_text(HOSTILE)
    page.get_by_label("Your own prompt").fill(HOSTILE)
    page.get_by_role("button", name="Ask all that are loaded").click()
    expect(page.locator("#answers .said")).to_have_text([HOSTILE] * 4)
    assert page.locator("main img, main script, main a, main strong, main code").count() == 0


def test_one_prompt_is_asked_of_every_loaded_policy_and_one_that_fails_says_so(
    client: httpx.Client, engine: FakeEngine, open_page: Open
) -> None:
    engine.says = {policy: f"I am {policy}." for policy in (BASE, ONE, TWO, THREE)}
    page = loaded(open_page(url_of(client), refusals=True))
    expect(page.locator("#samples .name")).to_have_text([BASE, ONE, "cycle 2, refused", TWO, THREE])
    page.get_by_label("Guard prompt").select_option("What comes after Tuesday?")
    expect(page.locator("#samples .said").first).to_have_text("Thursday.")
    page.get_by_label("Your own prompt").fill("Who are you?")
    ask, said = page.get_by_role("button", name="Ask all that are loaded"), page.locator("#answers .said")
    ask.click()
    expect(said).to_have_text([f"I am {policy}." for policy in (BASE, ONE, TWO, THREE)])
    assert {asked[0] for asked in engine.asked} == {BASE, ONE, TWO, THREE}
    engine.breaks_after = 0
    ask.click()
    expect(said).to_have_text(["The engine went away."] * 4)


def test_a_reply_and_a_vote_are_traced(client: httpx.Client, rows: Rows, open_page: Open) -> None:
    rows(
        "INSERT INTO snapshot_feedback SELECT snapshot_sha256, 'vote', votes.id::text FROM cycles, votes "
        "WHERE cycles.id = 3 AND comparison_id = 'cmp-1-0'"
    )
    page = open_page(url_of(client), refusals=True)
    field = page.get_by_label("Trace a reply")
    for number, rows_shown in (("cmp-1-0", [TWO, THREE]), ("chatcmpl-5-0-0", None)):
        field.fill(number)
        field.press("Enter")
        names = page.locator("#traced tbody th")
        if rows_shown:
            expect(names).to_have_text(rows_shown)
        else:
            expect(names.last).to_have_text(BASE)
    field.fill("chatcmpl-none")
    field.press("Enter")
    expect(page.locator("#traced")).to_have_text("There is no such reply.")


def test_where_keys_are_needed_it_asks_for_one_and_again_when_it_has_expired(
    serve: Serve, rows: Rows, engine: FakeEngine, tmp_path: Path, open_page: Open
) -> None:
    write_history(rows, tmp_path)
    local = serve(engine, duel_votes=100)

    def make(role: str, **fields: Any) -> str:
        return str(
            local.post("/operator/keys", json={"account": "acme", "role": role, **fields}).json()["key"]
        )

    client = serve(engine, duel_votes=100, require_keys=True)
    page = open_page(url_of(client), refusals=True)
    expect(page.get_by_text("A key is needed")).to_be_visible()
    expect(page.locator("main")).to_be_hidden()
    shoot(page, "operator-key")
    field, button = page.get_by_label("Key", exact=True), page.get_by_role("button", name="Open")
    field.fill(make("user"))
    button.click()
    expect(page.locator("#key-form")).to_contain_text("needs a key of role operator; yours is user")
    key = make("operator")
    field.fill(key)
    button.click()
    expect(page.locator("#policies .card").first).to_contain_text(TWO)
    page.get_by_role("button", name="Roll back").click()
    assert rows("UPDATE keys SET expires_at = now() WHERE hint = %s RETURNING role", key[:9]) == [
        ("operator",)
    ]
    expect(page.get_by_text("unknown, revoked or expired")).to_be_visible()
    expect(page.get_by_role("dialog")).to_be_hidden()
    expect(page.locator("main")).to_be_hidden()
    field.fill(make("operator"))
    button.click()
    expect(page.locator("main")).to_be_visible()
    expect(page.locator("#policies .card").first).to_contain_text(TWO)
    assert rows(POINTER) == [(TWO, ONE, THREE)]


def test_a_restart_of_the_service_is_shown_and_then_it_goes_on(
    prepared: Settings, rows: Rows, engine: FakeEngine, tmp_path: Path, open_page: Open
) -> None:
    write_history(rows, tmp_path)
    settings = prepared.model_copy(update={"engine_urls": ("",), "duel_votes": 100})
    port = free_port()
    with running(settings, lambda _: lambda _: engine, port) as server:
        page = loaded(open_page(address_of(server), refusals=True))
        page.get_by_role("button", name="Roll back").click()
        page.get_by_label("Why?").fill("It is curt.")
    page.get_by_role("button", name=f"Roll back to {ONE}").click()
    expect(page.get_by_role("dialog")).to_contain_text("The service cannot be reached.")
    expect(page.locator("#banner")).to_contain_text("The service cannot be reached.")
    expect(page.locator("#policies .card").first).to_contain_text(TWO)  # what was read before stays
    with (
        running(settings, lambda _: lambda _: engine, port) as server,
        httpx.Client(base_url=address_of(server), timeout=60) as client,
    ):
        expect(page.locator("#banner")).to_be_hidden()
        wait_until(lambda: ONE in held(client))  # not alone TWO, which it begins with
        expect(page.locator("#health")).to_contain_text("Healthy")
        expect(page.get_by_label("Why?")).to_have_value("It is curt.")
        page.get_by_role("button", name=f"Roll back to {ONE}").click()
        expect(page.locator("#done")).to_have_text(f"{ONE} is live.")
    assert rows(ACTIONS) == [("rollback", ONE, "It is curt.")]


def test_a_new_service_says_that_there_is_nothing_yet(serve: Serve, open_page: Open) -> None:
    page = open_page(url_of(serve(FakeEngine())))
    expect(page.locator("#policies .name")).to_have_text([BASE, "none", "none"])
    for text in (
        "No duel has a decided vote yet.",
        "No votes in this time.",
        "No cycle has run yet.",
        "No votes yet.",
    ):
        expect(page.get_by_text(text).first).to_be_visible()
    for name in ("Promote the challenger", "Reject the challenger", "Roll back"):
        expect(page.get_by_role("button", name=name)).to_be_disabled()
    found = Axe().run(page)
    assert found.violations_count == 0, found.generate_report()


def test_charts_follow_the_theme_and_are_loaded_on_this_page_only(
    client: httpx.Client, open_page: Open
) -> None:
    page = loaded(open_page(url_of(client)))
    drawn = "document.querySelector('#duels-figure canvas').toDataURL()"  # what lies behind it is not in it
    light = page.evaluate(drawn)
    toggle = page.locator("[data-theme-toggle]")
    while page.evaluate("document.documentElement.dataset.theme") != "dark":
        toggle.click()
    assert page.evaluate(drawn) != light
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.get_by_role("link", name="Chat").click()
    expect(page.locator("#status")).to_contain_text("answers.")
    page.wait_for_load_state("networkidle")
    assert asked
    assert not [url for url in asked if "/charts/" in url]
