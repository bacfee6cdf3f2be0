"""Rates and places: who waits, who is turned away, and that no place is ever lost."""

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service import limits
from service.errors import Overloaded, TooManyRequests
from service.journal import UserName
from service.limits import Limits, Rate
from service.settings import Settings
from tests.service.conftest import Serve, ask
from tests.service.fake_engine import FakeEngine

ADA, BOB = UserName("", "ada"), UserName("", "bob")


def test_a_rate_lets_a_minutes_calls_through_and_says_when_the_next_may_come(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = [100.0]
    monkeypatch.setattr(limits.time, "monotonic", lambda: now[0])
    rate = Rate(30, "key")
    for _ in range(30):
        rate.take("a")
    with pytest.raises(TooManyRequests) as refused:
        rate.take("a")
    assert refused.value.headers() == {"retry-after": "2"}
    rate.take("b")
    now[0] += 2.0
    rate.take("a")
    with pytest.raises(TooManyRequests):
        rate.take("a")


def make_limits(**changes: int) -> Limits:
    return Limits(Settings.model_construct(**{**Settings().model_dump(), **changes}))


async def test_requests_wait_in_turn_and_the_queue_is_bounded() -> None:
    limit = make_limits(max_running=2, max_queued=1, max_running_per_user=9)
    order: list[str] = []
    ended = asyncio.Event()

    async def generate(name: str, replies: int) -> None:
        async with limit.generating(ADA, replies):
            order.append(name)
            await ended.wait()

    first = asyncio.create_task(generate("first", 2))
    await asyncio.sleep(0)
    second = asyncio.create_task(generate("second", 1))
    await asyncio.sleep(0)
    with pytest.raises(Overloaded) as refused:
        await generate("third", 1)
    assert "retry-after" in refused.value.headers()
    assert order == ["first"]
    ended.set()
    await asyncio.gather(first, second)
    assert order == ["first", "second"]


async def test_one_user_has_a_bound_of_their_own() -> None:
    limit = make_limits(max_running=9, max_running_per_user=2)
    async with limit.generating(ADA, 2):
        with pytest.raises(TooManyRequests):
            async with limit.generating(ADA, 1):
                pass
        async with limit.generating(BOB, 2):
            pass
    async with limit.generating(ADA, 1):
        pass


@given(st.lists(st.tuples(st.integers(1, 3), st.sampled_from(["end", "cancel", "fail"])), max_size=20))
def test_no_place_is_lost_however_requests_end(plan: list[tuple[int, str]]) -> None:
    async def run() -> None:
        limit = make_limits(max_running=3, max_queued=100, max_running_per_user=100)

        async def generate(replies: int, how: str) -> None:
            async with limit.generating(ADA, replies):
                await asyncio.sleep(0)
                if how == "fail":
                    raise ValueError(how)

        tasks = [asyncio.create_task(generate(*request)) for request in plan]
        await asyncio.sleep(0)
        for task, (_, how) in zip(tasks, plan, strict=True):
            if how == "cancel":
                task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        async with asyncio.timeout(30), limit.generating(ADA, 3):  # all places are free again
            pass

    asyncio.run(run())


@pytest.mark.database
def test_a_key_and_an_address_are_told_to_wait(serve: Serve) -> None:
    client = serve(FakeEngine(), requests_per_minute=3, address_requests_per_minute=2)
    key = client.post("/operator/keys", json={"account": "acme"}).json()["key"]
    headers = {"authorization": f"Bearer {key}"}
    answers = [client.get("/v1/users/me", headers=headers) for _ in range(4)]
    assert [answer.status_code for answer in answers] == [200, 200, 200, 429]
    assert answers[-1].json()["error"]["type"] == "rate_limit_error"
    assert int(answers[-1].headers["retry-after"]) >= 1
    elsewhere = {"x-forwarded-for": "203.0.113.5"}  # uvicorn believes a proxy on this machine
    assert [client.get("/healthz", headers=elsewhere).status_code for _ in range(3)] == [200, 200, 429]
    assert client.get("/healthz").status_code == 200


@pytest.mark.database
def test_a_chat_request_counts_once_also_one_that_is_wrong(serve: Serve) -> None:
    client = serve(FakeEngine(), requests_per_minute=2)
    key = client.post("/operator/keys", json={"account": "acme"}).json()["key"]
    headers = {"authorization": f"Bearer {key}"}
    bodies = [ask(), ask(temperature="hot"), ask()]
    answers = [client.post("/v1/chat/completions", json=body, headers=headers) for body in bodies]
    assert [answer.status_code for answer in answers] == [200, 400, 429]


@pytest.mark.database
def test_more_at_once_than_there_is_place_for_is_turned_away_with_a_time_to_come_back(serve: Serve) -> None:
    client = serve(FakeEngine(pause_seconds=30), max_running=1, max_queued=0)
    with client.stream("POST", "/v1/chat/completions", json=ask(stream=True)):
        refused = client.post("/v1/chat/completions", json=ask())
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "queue_full")
        assert refused.headers["retry-after"]
