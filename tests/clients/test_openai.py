"""OpenAI's client for Python, at its strictest: it refuses an answer that does not fit its own types."""

import asyncio
from typing import Any

import httpx
import openai
import pytest
from openai import AsyncOpenAI, OpenAI
from openai.types import CompletionUsage

from tests.clients.conftest import ASKED, VOTABLE, Fault, cut
from tests.clients.lockstep import LockstepEngine
from tests.service.conftest import Rows, Serve, wait_until
from tests.service.fake_engine import FakeEngine

pytestmark = [pytest.mark.engine, pytest.mark.database]
FAULTS = [
    ("unknown model", openai.NotFoundError, 404, "model_not_found"),
    ("bad temperature", openai.BadRequestError, 400, None),
    ("too long", openai.BadRequestError, 400, "context_length_exceeded"),
    ("wrong key", openai.AuthenticationError, 401, "invalid_api_key"),
    ("key needed", openai.AuthenticationError, 401, "invalid_api_key"),
    ("too many calls", openai.RateLimitError, 429, "rate_limit_exceeded"),
    ("engine gone", openai.InternalServerError, 503, "engine_not_ready"),
]
USAGE = {"stream": True, "stream_options": {"include_usage": True}}


def options(service: httpx.Client, **changes: Any) -> dict[str, Any]:
    return {
        "base_url": f"{service.base_url}/v1",
        "api_key": "none",
        "max_retries": 0,
        "timeout": 60,
        "_strict_response_validation": True,
    } | changes


def words(text: str, **fields: Any) -> dict[str, Any]:
    """The arguments of `create`."""
    return {"model": "ratchet", "messages": [{"role": "user", "content": text}]} | fields


def test_it_shows_the_answer_as_it_is(service: httpx.Client, told: dict[str, Any]) -> None:
    with OpenAI(**options(service)) as client:
        answer = client.chat.completions.create(**words(**ASKED))
        letter, before = cut(told["choices"][0]["message"]["content"])
        stopped = client.chat.completions.create(**words(**ASKED, stop=letter))
    assert answer.choices[0].message.content == told["choices"][0]["message"]["content"]
    assert answer.choices[0].finish_reason == "length"
    assert answer.model == "policy-000000"
    assert answer.usage == CompletionUsage(**told["usage"])
    assert answer.usage.completion_tokens == ASKED["max_tokens"]
    assert (stopped.choices[0].message.content, stopped.choices[0].finish_reason) == (before, "stop")


def test_it_streams_the_same_answer(service: httpx.Client, told: dict[str, Any]) -> None:
    with OpenAI(**options(service)) as client:
        check_stream(list(client.chat.completions.create(**words(**ASKED), **USAGE)), told)


async def test_its_async_twin_does_the_same(service: httpx.Client, told: dict[str, Any]) -> None:
    async with AsyncOpenAI(**options(service)) as client:
        answer = await client.chat.completions.create(**words(**ASKED))
        assert answer.choices[0].message.content == told["choices"][0]["message"]["content"]
        assert answer.usage == CompletionUsage(**told["usage"])
        stream = await client.chat.completions.create(**words(**ASKED), **USAGE)
        check_stream([chunk async for chunk in stream], told)


def check_stream(chunks: list[Any], told: dict[str, Any]) -> None:
    """The pieces of a stream make up the answer that plain HTTP gives whole."""
    *body, last = chunks
    assert (
        "".join(chunk.choices[0].delta.content for chunk in body) == told["choices"][0]["message"]["content"]
    )
    assert [chunk.choices[0].finish_reason for chunk in body] == [None] * (len(body) - 1) + ["length"]
    assert body[0].choices[0].delta.role == "assistant"
    assert {(chunk.id, chunk.model) for chunk in chunks} == {(chunks[0].id, "policy-000000")}
    assert [chunk.usage for chunk in body] == [None] * len(body)
    assert (last.choices, last.usage) == ([], CompletionUsage(**told["usage"]))


async def test_many_may_ask_at_once(service: httpx.Client) -> None:
    async with AsyncOpenAI(**options(service)) as client:
        asked = [
            client.chat.completions.create(**words(f"{n}?", max_tokens=n, temperature=0)) for n in range(1, 9)
        ]
        answers = await asyncio.gather(*asked)
    assert [answer.usage.completion_tokens for answer in answers] == list(range(1, 9))


def test_its_stream_helper_puts_the_answer_together(service: httpx.Client, told: dict[str, Any]) -> None:
    """With a `stop`: the helper takes a reply that was cut off for an error."""
    letter, before = cut(told["choices"][0]["message"]["content"])
    asked = words(**ASKED, stop=letter, stream_options={"include_usage": True})
    with OpenAI(**options(service)) as client, client.chat.completions.stream(**asked) as stream:
        deltas = [event.delta for event in stream if event.type == "content.delta"]
        whole = stream.get_final_completion()
    assert "".join(deltas) == whole.choices[0].message.content == before
    assert whole.choices[0].finish_reason == "stop"
    assert whole.usage is not None
    assert whole.usage.prompt_tokens == told["usage"]["prompt_tokens"]


def test_it_gets_two_replies_and_their_vote_counts(service: httpx.Client, rows: Rows) -> None:
    asked = words(**VOTABLE, extra_body={"comparison": "always"})
    with OpenAI(**options(service)) as client:
        answer: Any = client.chat.completions.create(**asked)
        first, second = answer.choices
        assert (first.index, second.index) == (0, 1)
        assert first.message.content != second.message.content
        assert answer.model == "ratchet"  # blind
        vote: Any = client.put(
            f"/comparisons/{answer.comparison['id']}/vote",
            cast_to=object,
            body={"choice": "first", "user": "ada"},
        )
    assert vote["policies"] == ["policy-000000", "policy-000000"]
    assert rows("SELECT choice FROM votes") == [("first",)]


def test_it_streams_two_replies_side_by_side(serve: Serve) -> None:
    asked = words("hi", extra_body={"comparison": "always"})
    with OpenAI(**options(serve(FakeEngine()))) as client, client.chat.completions.stream(**asked) as stream:
        chunks: list[Any] = [event.chunk for event in stream if event.type == "chunk"]
        whole = stream.get_final_completion()
    assert sorted(choice.message.content or "" for choice in whole.choices) == ["one two", "three four"]
    assert chunks[0].comparison["id"] == whole.id
    assert whole.id.startswith("cmp-")


def test_it_lists_and_reads_models(service: httpx.Client) -> None:
    with OpenAI(**options(service)) as client:
        assert [model.id for model in client.models.list()] == ["ratchet", "policy-000000"]
        model = client.models.retrieve("policy-000000")
        assert (model.id, model.object, model.owned_by) == ("policy-000000", "model", "ratchet")
        assert model.created > 0
        with pytest.raises(openai.NotFoundError):
            client.models.retrieve("gpt-9")


def test_its_raw_response_has_our_headers(service: httpx.Client) -> None:
    with OpenAI(**options(service)) as client:
        raw = client.chat.completions.with_raw_response.create(
            **words("hi", max_tokens=2), extra_body={"spice": 1}
        )
        answer = raw.parse()
    assert raw.headers["x-ratchet-policy"] == answer.model == "policy-000000"
    assert raw.headers["x-ratchet-ignored"] == "spice"
    assert raw.request_id == answer._request_id
    assert raw.request_id.startswith("req-")


@pytest.mark.parametrize(("name", "kind", "status", "code"), FAULTS, ids=[fault[0] for fault in FAULTS])
async def test_a_refusal_is_its_own_kind_of_error(
    fault: Fault, name: str, kind: type[openai.APIStatusError], status: int, code: str | None
) -> None:
    service, change = await asyncio.to_thread(fault, name)
    key = {"api_key": change.pop("api_key", "none")}
    asked = words(**{"text": "hi", "max_tokens": 4} | change)
    for streamed in (False, True):
        async with AsyncOpenAI(**options(service, **key)) as client:
            with pytest.raises(kind) as caught:
                await client.chat.completions.create(**asked, stream=streamed)
        assert (caught.value.status_code, caught.value.code) == (status, code)
        assert caught.value.request_id
        with OpenAI(**options(service, **key)) as client, pytest.raises(kind) as caught:
            client.chat.completions.create(**asked, stream=streamed)
        assert isinstance(caught.value.body, dict)
        assert caught.value.body["message"]


def test_an_engine_that_breaks_midway_is_an_error_and_no_short_answer(fault: Fault) -> None:
    service, _ = fault("breaks midway")
    with OpenAI(**options(service)) as client:
        stream = client.chat.completions.create(**words("hi"), stream=True)
        assert [next(stream).choices[0].delta.content for _ in range(3)] == ["", "one ", "two "]
        with pytest.raises(openai.APIError, match="engine went away"):
            next(stream)


def test_its_retries_carry_it_over_an_engine_that_comes_back(serve: Serve) -> None:
    fake = FakeEngine()
    service = serve(fake)
    fake.alive = False
    statuses = []

    def see(response: Any) -> None:
        statuses.append(response.status_code)
        fake.alive = True

    hooked = openai.DefaultHttpxClient(event_hooks={"response": [see]})
    with OpenAI(**options(service, max_retries=5, http_client=hooked)) as client:
        answer = client.chat.completions.create(**words("hi"))
    assert answer.choices[0].message.content == "one two"
    assert (statuses[0], statuses[-1]) == (503, 200)


def test_each_piece_is_shown_before_the_next_is_made(serve: Serve) -> None:
    engine = LockstepEngine()
    with OpenAI(**options(serve(engine))) as client:
        stream = client.chat.completions.create(**words("hi"), stream=True)
        for word in ("one ", "two ", "three"):
            engine.let.release()
            if word == "one ":
                assert next(stream).choices[0].delta.role == "assistant"
            assert next(stream).choices[0].delta.content == word


async def test_also_by_the_async_twin(serve: Serve) -> None:
    engine = LockstepEngine()
    async with AsyncOpenAI(**options(await asyncio.to_thread(serve, engine))) as client:
        stream = await client.chat.completions.create(**words("hi"), stream=True)
        for word in ("one ", "two ", "three"):
            engine.let.release()
            if word == "one ":
                assert (await anext(stream)).choices[0].delta.role == "assistant"
            assert (await anext(stream)).choices[0].delta.content == word


def test_a_stream_that_is_closed_early_ends_the_generation(serve: Serve) -> None:
    engine = LockstepEngine()
    with OpenAI(**options(serve(engine))) as client:
        stream = client.chat.completions.create(**words("hi"), stream=True)
        stream.close()  # before its first token
        wait_until(lambda: engine.aborted == 1)


async def test_so_does_an_async_call_that_is_cancelled(serve: Serve) -> None:
    engine = LockstepEngine()
    async with AsyncOpenAI(**options(await asyncio.to_thread(serve, engine))) as client:
        call = asyncio.create_task(client.chat.completions.create(**words("hi")))
        await asyncio.to_thread(wait_until, lambda: len(engine.asked) == 1)
        call.cancel()
        await asyncio.to_thread(wait_until, lambda: engine.aborted == 1)


@pytest.mark.parametrize("streamed", [False, True])
def test_so_does_one_that_times_out(serve: Serve, streamed: bool) -> None:
    engine = LockstepEngine()
    with (
        OpenAI(**options(serve(engine), timeout=5)) as client,
        pytest.raises(openai.APITimeoutError),
    ):
        list(client.chat.completions.create(**words("hi"), stream=streamed))
    wait_until(lambda: engine.aborted == 1)
