"""The pages against the running loop: `ratchet up` with the real engine, trainer and PostgreSQL, on a desk and on a phone.

What a page does in every case is asked by its own tests, of a service alone; here it is that nothing between them is missing.
"""

import json
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from playwright.sync_api import Page, expect

from tests.service.browsing import say, wait_for_end
from tests.service.conftest import Pages, publish, wait_until
from tests.service.running_up import Run
from tests.tiny_model import make_model, make_policy

pytestmark = [pytest.mark.browser, pytest.mark.database, pytest.mark.engine]
SIZES = pytest.mark.parametrize("phone", [False, True], ids=["desk", "phone"])
BASE = "policy-000000"
POINTER = "SELECT live, previous, challenger FROM deployment"
TRIALS = "SELECT count(*) FROM duels WHERE challenger = %s"
CHOICE = "SELECT choice FROM votes ORDER BY created_at DESC LIMIT 1"
SECOND = """
SELECT content FROM replies JOIN comparison_replies ON reply_id = replies.id JOIN comparisons ON comparisons.id = comparison_id
WHERE position = 1 ORDER BY comparisons.created_at DESC LIMIT 1
"""
"""What the second answer of the newest comparison says."""
START_SECONDS = CYCLE_SECONDS = 240


@pytest.fixture(scope="module")
def loop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """Used by one test after the other."""
    folder = tmp_path_factory.mktemp("loop")
    make_model(folder / "model", ends=True)
    run = Run(folder)
    try:
        yield run.wait_until_ready(START_SECONDS)
    finally:
        run.end()


def ask_for_two(page: Page) -> None:
    """Until two answers come that are worth a vote and both say something: a random model may say nothing at all."""
    for attempt in range(10):
        say(page, f"what colour is a lemon? ({attempt})", two=True)
        wait_for_end(page)
        if page.get_by_text("Which answer is better?").is_visible():
            answers = page.locator(".pair:not(.settled) .body").all_text_contents()
            if len(answers) == 2 and all(text.strip() for text in answers):
                return
    raise AssertionError("no two answers that differ in ten tries")


def num_votes(run: Run) -> int:
    return int(run.ask("SELECT count(*) FROM votes")[0][0])


def test_a_cycle_that_the_operator_starts_is_run_by_the_trainer_and_its_end_is_shown(
    loop: Run, pages: Pages
) -> None:
    page = pages.open()
    page.goto(f"{loop.url}/operator")
    page.get_by_role("button", name="Start a cycle").click()
    page.get_by_role("dialog").get_by_role("button", name="Start a cycle").click()
    expect(page.locator("#done")).to_contain_text("is asked for.")
    expect(page.locator("#cycles")).to_contain_text("16 are needed", timeout=1000 * CYCLE_SECONDS)
    assert loop.ask(POINTER) == [(BASE, None, None)]


@SIZES
def test_a_vote_by_mouse_is_stored_and_the_chosen_answer_goes_on(
    loop: Run, pages: Pages, phone: bool
) -> None:
    page, before = pages.open(phone=phone), num_votes(loop)
    page.goto(loop.url)
    say(page, "hello", two=False)
    wait_for_end(page)
    ask_for_two(page)
    page.get_by_role("button", name="Second").click()
    expect(page.locator(".verdict").last).to_have_text(
        f"You chose the second. First: {BASE}, second: {BASE}."
    )
    assert (num_votes(loop), loop.ask(CHOICE)) == (before + 1, [("second",)])
    [(chosen,)] = loop.ask(SECOND)
    say(page, "and a lime?", two=False)
    wait_for_end(page)
    [(messages,)] = loop.ask("SELECT messages FROM prompts ORDER BY created_at DESC LIMIT 1")
    assert messages[-2] == {"role": "assistant", "content": chosen}


@SIZES
def test_a_vote_by_keys_alone_is_stored_and_taken_back(loop: Run, pages: Pages, phone: bool) -> None:
    page, before = pages.open(phone=phone), num_votes(loop)
    page.goto(loop.url)
    ask_for_two(page)
    page.keyboard.press("Escape")
    page.keyboard.press("1")
    expect(page.locator(".verdict").last).to_contain_text("You chose the first.")
    assert (num_votes(loop), loop.ask(CHOICE)) == (before + 1, [("first",)])
    page.keyboard.press("u")
    expect(page.get_by_text("Which answer is better?")).to_be_visible()
    assert num_votes(loop) == before


@SIZES
def test_answers_are_ranked_by_keys(loop: Run, pages: Pages, phone: bool) -> None:
    page = pages.open(phone=phone)
    page.goto(f"{loop.url}/label")
    page.get_by_label("Prompt", exact=True).fill("say something")
    page.get_by_role("button", name="Get answers").click()
    expect(page.locator("#ranking li")).to_have_count(4)
    page.locator("#ranking li").first.focus()
    page.keyboard.press("Alt+ArrowDown")
    page.keyboard.press("s")
    expect(page.locator("#outcome")).to_have_text(f"Saved. All are answers of {BASE}.")
    [(ranks,)] = loop.ask("SELECT ranks FROM rankings ORDER BY created_at DESC LIMIT 1")
    assert sorted(ranks) == [1, 2, 3, 4]


@SIZES
def test_the_operator_promotes_and_rolls_back_and_users_are_answered_accordingly(
    loop: Run, pages: Pages, phone: bool, tmp_path: Path
) -> None:
    name = f"policy-{1 + phone:06d}"
    folder = make_policy(tmp_path / name, loop.output.parent / "model", seed=1 + phone)
    page, chat = pages.open(phone=phone), pages.open(phone=phone)
    page.goto(f"{loop.url}/operator")
    chat.goto(loop.url)
    publish(loop.ask, name, folder)
    wait_until(lambda: loop.ask(TRIALS, name) == [(1,)], every=0.25)  # its probe has been reproduced
    page.get_by_role("button", name="Promote the challenger").click()
    page.get_by_role("button", name=f"Promote {name}").click()
    expect(page.locator("#done")).to_have_text(f"{name} is live.")
    assert loop.ask(POINTER) == [(name, BASE, None)]
    assert answered_by(chat, loop) == name
    expect(page.locator("#policies .card").first).to_contain_text(name)  # or it offers to go back further
    page.get_by_role("button", name="Roll back").click()
    page.get_by_label("Why?").fill("It talks nonsense.")
    page.get_by_role("button", name=f"Roll back to {BASE}").click()
    expect(page.locator("#done")).to_have_text(f"{BASE} is live.")
    assert answered_by(chat, loop) == BASE


def answered_by(page: Page, run: Run) -> str:
    """The policy of the reply to one more message."""
    say(page, "who are you?", two=False)
    wait_for_end(page)
    return str(run.ask("SELECT policy FROM replies ORDER BY created_at DESC LIMIT 1")[0][0])


def test_when_the_engines_core_dies_all_end_and_no_process_is_left(loop: Run) -> None:
    assert chat(loop)["choices"][0]["finish_reason"] in ("stop", "length")  # it may well have nothing to say
    children = psutil.Process(loop.pid("engine")).children(recursive=True)
    core = next(child for child in children if "EngineCore" in " ".join(child.cmdline()))
    core.kill()
    assert loop.process.wait(60) == 1
    assert loop.left() == []
    assert "engine ended with exit status" in loop.output.read_text()


def chat(run: Run) -> Any:
    body = {"model": "ratchet", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 8}
    request = urllib.request.Request(
        f"{run.url}/v1/chat/completions", json.dumps(body).encode(), {"content-type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)
