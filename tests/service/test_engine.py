"""The whole service on the real vLLM: the official client, disconnects, and a swap under load."""

import asyncio
import json
import threading
from itertools import pairwise
from pathlib import Path

import aiohttp
import httpx
import openai
import pytest
from openai.types.chat import ChatCompletion, ChatCompletionMessageParam

from service.engine import Message, Sampling, VllmEngine
from service.errors import EngineUnavailable
from service.pace import Pace
from service.pieces import Piece
from service.policies import BASE
from tests.engine import MOST_ADAPTERS
from tests.service.conftest import Rows, Serve, chunks, publish, wait_until
from tests.tiny_model import make_policy

pytestmark = [pytest.mark.engine, pytest.mark.database]
MESSAGES: list[ChatCompletionMessageParam] = [{"role": "user", "content": "what colour is a lemon?"}]
POINTER = "SELECT live, previous, challenger FROM deployment"


def official(client: httpx.Client) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{client.base_url}/v1", api_key="none", max_retries=0)


def running(vllm: str) -> float:
    """Generations under way in the engine."""
    return _metric(vllm, "vllm:num_requests_running")


def generated(vllm: str) -> float:
    """Tokens that the engine has generated so far."""
    return _metric(vllm, "vllm:generation_tokens_total")


def _metric(vllm: str, name: str) -> float:
    lines = httpx.get(f"{vllm}/metrics", timeout=60).text.splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith(name))


def test_the_official_client_chats_streamed_and_not(serve: Serve, vllm: str) -> None:
    api = official(serve(url=vllm))
    whole = api.chat.completions.create(model="ratchet", messages=MESSAGES, max_tokens=12, seed=3)
    stream = list(
        api.chat.completions.create(
            model="ratchet",
            messages=MESSAGES,
            max_tokens=12,
            seed=3,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices)
    assert text == whole.choices[0].message.content  # one seed, one reply, whichever way it travels
    assert whole.model == stream[0].model == "policy-000000"
    assert stream[-1].usage is not None
    assert stream[-1].usage == whole.usage


def test_every_token_has_a_log_probability_also_one_that_is_half_a_character(serve: Serve, vllm: str) -> None:
    """The tiny model's tokens are bytes: many a chunk has no text yet."""
    stream = official(serve(url=vllm)).chat.completions.create(
        model="ratchet",
        messages=MESSAGES,
        max_tokens=40,
        logprobs=True,
        stream=True,
        stream_options={"include_usage": True},
    )
    *chunks, last = list(stream)
    reported = [
        token for chunk in chunks if (found := chunk.choices[0].logprobs) for token in found.content or []
    ]
    assert any(chunk.choices[0].logprobs and not chunk.choices[0].delta.content for chunk in chunks)
    assert last.usage is not None
    assert len(reported) == last.usage.completion_tokens


async def test_the_engine_sends_as_many_tokens_together_as_it_is_asked_for(vllm: str) -> None:
    sampling = Sampling(40, 1.0, 1.0, 0.0, (), 3, 0.0, 0.0, logprobs=0)
    deadline = asyncio.get_running_loop().time() + 60
    replies = []
    async with aiohttp.ClientSession() as session:
        engine = VllmEngine(vllm, session)
        for _ in range(2):
            message = [Message("user", "what colour is a lemon?")]
            async with engine.generate(BASE, message, sampling, 1, stream=True, deadline=deadline) as pieces:
                replies.append([piece async for found in pieces for piece in found])
            engine._pace = Pace()  # the first stream's own pace is this machine's
            engine._pace.note(1000, 0.0)  # as fast as can be
    one_by_one, together = replies
    # Fewer chunks may come where vLLM's own server lags behind, but none between.
    assert {piece.completion_tokens for piece in together} <= {0, 1, 17, 33, 40}
    assert len({piece.completion_tokens for piece in one_by_one}) > 10
    assert "".join(piece.text for piece in one_by_one) == "".join(piece.text for piece in together)
    assert _tokens(one_by_one) == _tokens(together)


def _tokens(pieces: list[Piece]) -> list[str]:
    """Those that have a log-probability."""
    return [
        token["token"]
        for piece in pieces
        if piece.logprobs
        for token in json.loads(piece.logprobs)["content"]
    ]


def test_the_official_client_gets_two_replies_and_its_vote_is_stored(
    serve: Serve, vllm: str, rows: Rows
) -> None:
    client = serve(url=vllm)

    def ask_for_two(seed: int | None) -> ChatCompletion:
        return official(client).chat.completions.create(
            model="ratchet",
            messages=MESSAGES,
            max_tokens=400,
            stop="e",  # a random model does not end by itself, and what is cut off is not voted on
            seed=seed,
            user="ada",
            extra_body={"comparison": "always"},
        )

    for seed in (None, 7):
        answer = ask_for_two(seed)
        for _ in range(5):  # two of some 700 pairs say the same
            if seed is None and not answer.model_extra["comparison"]["votable"]:  # type: ignore[index]
                answer = ask_for_two(seed)
        first, second = (choice.message.content for choice in answer.choices)
        assert first != second
        comparison = answer.model_extra["comparison"]["id"]  # type: ignore[index]
        vote = client.put(f"/v1/comparisons/{comparison}/vote", json={"choice": "first", "user": "ada"})
        assert vote.json()["policies"] == ["policy-000000", "policy-000000"]
        assert rows("SELECT choice FROM votes WHERE comparison_id = %s", comparison) == [("first",)]


def test_both_replies_of_a_comparison_stream_at_once(serve: Serve, vllm: str) -> None:
    stream = official(serve(url=vllm)).chat.completions.create(
        model="ratchet", messages=MESSAGES, max_tokens=300, stream=True, extra_body={"comparison": "always"}
    )
    order = [chunk.choices[0].index for chunk in stream if chunk.choices]
    assert 1 in order[: order.index(1) + 2]
    changes = sum(a != b for a, b in pairwise(order))
    assert changes > 5


@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_that_goes_away_ends_the_generation_in_the_engine(
    serve: Serve, vllm: str, rows: Rows, stream: bool
) -> None:
    address = serve(url=vllm).base_url
    before = generated(vllm)
    body = {"messages": MESSAGES, "max_tokens": 480, "stream": stream}
    num_asked = 0

    async def ask_again_and_again(client: httpx.AsyncClient) -> None:
        nonlocal num_asked
        while True:  # one may end before three are seen at once
            num_asked += 1
            (await client.post("/v1/chat/completions", json=body)).raise_for_status()

    async with httpx.AsyncClient(base_url=address, timeout=60) as client:
        askers = [asyncio.create_task(ask_again_and_again(client)) for _ in range(3)]
        while running(vllm) < 3:
            assert not any(asker.done() for asker in askers)
            await asyncio.sleep(0.02)
        for asker in askers:
            asker.cancel()
        await asyncio.gather(*askers, return_exceptions=True)
    wait_until(lambda: running(vllm) == 0)
    assert generated(vllm) - before < num_asked * 480 - 80  # they were aborted, they did not merely end
    aborted = "SELECT count(*) FROM replies WHERE finish_reason = 'abort'"
    wait_until(lambda: rows(aborted) == [(3,)])


@pytest.mark.parametrize("stream", [True, False])
def test_an_answer_past_its_deadline_ends_in_an_error_and_in_the_engine(
    serve: Serve, vllm: str, rows: Rows, stream: bool
) -> None:
    body = {"messages": MESSAGES, "max_tokens": 480, "stream": stream}
    limit = serve(url=vllm).post("/v1/chat/completions", json=body).elapsed.total_seconds() / 2
    for _ in range(10):  # a busy machine may be twice as slow or as quick the next time
        rows("DELETE FROM replies")
        client = serve(url=vllm, request_deadline_seconds=limit)
        answer = client.post("/v1/chat/completions", json=body)
        timed_out = '"type":"timeout"' in answer.text
        told = [choice["delta"] for chunk in chunks(answer) for choice in chunk.get("choices", ())]
        began = any(delta.get("content") for delta in told)
        if timed_out and (
            (answer.status_code, began) == (200, True) if stream else answer.status_code == 504
        ):
            break
        limit *= 1.3 if timed_out else 0.6  # no token in time, or all of them
    if stream:
        assert (answer.status_code, '"type":"timeout"' in answer.text) == (200, True)
        assert "[DONE]" not in answer.text
    else:
        assert (answer.status_code, answer.json()["error"]["type"]) == (504, "timeout")
    wait_until(lambda: running(vllm) == 0)
    [(content, reason)] = rows("SELECT content, finish_reason FROM replies ORDER BY created_at")
    assert (bool(content), reason) == (stream, "error")


def test_too_long_a_prompt_says_what_to_change(serve: Serve, vllm: str, rows: Rows) -> None:
    with pytest.raises(openai.BadRequestError, match="reduce the length") as caught:
        official(serve(url=vllm)).chat.completions.create(
            model="ratchet", messages=[{"role": "user", "content": "word " * 600}]
        )
    assert caught.value.code == "context_length_exceeded"
    assert rows("SELECT count(*) FROM replies") == [(0,)]


def test_a_policy_goes_live_under_load_and_no_request_fails_or_is_mixed(
    serve: Serve, vllm: str, rows: Rows, tiny_model: Path, tmp_path: Path
) -> None:
    folder = make_policy(tmp_path / "policy-000001", tiny_model, seed=1)
    client = serve(url=vllm)
    answered: list[set[str]] = []
    faults: list[Exception] = []
    done = threading.Event()

    def chat() -> None:
        api = official(client)
        while not done.is_set():
            try:
                stream = api.chat.completions.create(
                    model="ratchet", messages=MESSAGES, max_tokens=40, stream=True
                )
                answered.append({chunk.model for chunk in stream})
            except Exception as error:
                faults.append(error)

    threads = [threading.Thread(target=chat) for _ in range(8)]
    for thread in threads:
        thread.start()
    wait_until(lambda: len(answered) >= 8)
    publish(rows, folder.name, folder)
    wait_until(lambda: {folder.name} in answered[-8:])
    done.set()
    for thread in threads:
        thread.join()
    assert faults == []
    assert all(len(policies) == 1 for policies in answered)
    assert rows(POINTER) == [(folder.name, "policy-000000", None)]
    assert dict(
        rows("SELECT policy, count(*) FROM replies WHERE finish_reason IN ('stop', 'length') GROUP BY 1")
    ) == {name: answered.count({name}) for name in ("policy-000000", folder.name)}


def test_weights_that_are_not_what_the_manifest_says_never_go_live(
    serve: Serve, vllm: str, rows: Rows, tiny_model: Path, tmp_path: Path
) -> None:
    """Another adapter's manifest: the folder is whole, and the weights are wrong."""
    right = make_policy(tmp_path / "policy-000002", tiny_model, seed=2)
    wrong = make_policy(tmp_path / "other" / "policy-000002", tiny_model, seed=3)
    expected, actual = (json.loads((folder / "manifest.json").read_text()) for folder in (right, wrong))
    (wrong / "manifest.json").write_text(json.dumps(expected | {"files": actual["files"]}))
    serve(url=vllm)
    publish(rows, "policy-000002", wrong)
    wait_until(lambda: rows(POINTER) == [("policy-000000", None, None)])
    [(reason,)] = rows("SELECT reason FROM policies WHERE name = 'policy-000002'")
    assert "log-probabilities differ" in reason


async def test_an_adapter_on_the_last_layers_alone_leaves_the_others_the_bases(
    vllm: str, tiny_model: Path, tmp_path: Path
) -> None:
    """After one on all of them, in whose place it may be loaded."""
    upper = [f"layers.1.{name}" for name in ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")]
    folders = [
        make_policy(tmp_path / "policy-800001", tiny_model, seed=11),
        make_policy(tmp_path / "policy-800002", tiny_model, seed=12, adapted=upper),
    ]
    async with aiohttp.ClientSession() as session:
        engine = VllmEngine(vllm, session)
        for folder in folders:
            [probe, *_] = json.loads((folder / "manifest.json").read_text())["probe"]
            await engine.load(folder.name, str(folder))
            try:
                for number, expected in enumerate(probe["logprobs"]):
                    if expected is not None:
                        ids = probe["token_ids"]
                        found = await engine.logprob(folder.name, ids[:number], ids[number])
                        assert found == pytest.approx(expected, abs=0.2)
            finally:
                await engine.unload(folder.name)


async def test_a_completion_of_token_ids_has_every_tokens_own_log_probability_and_ends_where_it_should(
    vllm: str, tiny_model: Path, tmp_path: Path
) -> None:
    prompt, name = [1, 2, 3, 4], "rollouts-000001-0"
    async with aiohttp.ClientSession() as session:
        engine = VllmEngine(vllm, session)
        await engine.load(name, str(make_policy(tmp_path / name, tiny_model, seed=5)))
        try:
            whole = await engine.complete(name, prompt, max_tokens=8, end_ids=[], priority=10)
            again = [
                await engine.logprob(name, prompt + whole.token_ids[:number], token)
                for number, token in enumerate(whole.token_ids)
            ]
            ended = await engine.complete(name, prompt, max_tokens=8, end_ids=range(283), priority=10)
        finally:
            await engine.unload(name)
        with pytest.raises(EngineUnavailable, match="answered 404"):
            await engine.complete(name, prompt, max_tokens=8, end_ids=[1], priority=10)
    assert len(whole.token_ids) == 8
    assert whole.logprobs == pytest.approx(again, abs=0.2)  # bfloat16, in batches of other sizes
    assert len(ended.token_ids) == len(ended.logprobs) == 1  # any token ends it, and is part of it


async def test_the_base_answers_as_itself_beside_as_many_adapters_as_there_is_room_for(
    vllm: str, tiny_model: Path, tmp_path: Path
) -> None:
    """vLLM's CPU build takes what has no adapter for the last one (`service/cpu_engine.py`)."""
    prefix, token = [1, 2, 3, 4], 5
    names = [f"policy-90000{number}" for number in range(MOST_ADAPTERS)]
    async with aiohttp.ClientSession() as session:
        engine = VllmEngine(vllm, session)
        alone = await engine.logprob(BASE, prefix, token)
        for number, name in enumerate(names):
            await engine.load(name, str(make_policy(tmp_path / name, tiny_model, seed=900 + number)))
            assert abs(await engine.logprob(name, prefix, token) - alone) > 0.01

        async def talk(name: str) -> None:
            deadline = asyncio.get_running_loop().time() + 120
            settings = Sampling(400, 1.0, 1.0, 0.0, (), None, 0.0, 0.0)
            async with engine.generate(
                name, [Message("user", "hi")], settings, 2, stream=True, deadline=deadline
            ) as pieces:
                async for _ in pieces:
                    pass

        talking = [asyncio.create_task(talk(name)) for name in names for _ in range(2)]
        await asyncio.sleep(0.5)
        beside = [await engine.logprob(BASE, prefix, token) for _ in range(10)]
        assert not all(task.done() for task in talking)
        await asyncio.gather(*talking)
        for name in names:
            await engine.unload(name)
    assert max(abs(value - alone) for value in beside) < 0.001
