"""The gateway benchmark's own arithmetic, and its load generator against its mock."""

import asyncio
import json
import random
from collections.abc import AsyncIterator

import pytest

from tests.benchmarks import gateway_engine
from tests.benchmarks.gateway_engine import TOKENS, WORD, Connection
from tests.benchmarks.gateway_load import Address, Ask, Exchange, at_rate, flow_between, saturate
from tests.benchmarks.gateway_samples import Load, Sample, Samples, Spread


def test_an_answer_partly_in_the_window_counts_by_the_share_of_its_time_that_is() -> None:
    whole = Exchange(began=11, ended=12, tokens=10)
    half_before = Exchange(began=9, ended=11, tokens=10)
    quarter_inside = Exchange(began=19, ended=23, tokens=8)
    outside = Exchange(began=8, ended=9, tokens=10)
    wrong = Exchange(began=12, ended=13, fault=b"HTTP/1.1 500")

    flow = flow_between([whole, half_before, quarter_inside, outside, wrong], opened=10, closed=20)

    assert (flow.requests, flow.tokens, flow.seconds) == (1.75, 17, 10)
    assert flow.answers == 4
    assert flow.faults == [b"HTTP/1.1 500"]


def test_ratios_are_taken_within_a_round() -> None:
    load, samples = Load("stream", 8), Samples()
    for number, (ours, theirs) in enumerate([(10, 1), (100, 50), (9, 3)]):
        samples.all += [
            Sample(load, "ours", number, {"x": ours}),
            Sample(load, "theirs", number, {"x": theirs}),
        ]

    assert samples.ratio(load, "x", "ours", "theirs") == Spread(median=3, least=2, most=10)
    assert samples.added(load, "x", "ours", "theirs") == Spread(median=9, least=6, most=50)


def test_the_mean_of_ratios_is_geometric_and_says_how_sure_it_is() -> None:
    load, samples = Load("stream", 8), Samples()
    for number, ours in enumerate([1.0, 4.0, 1.0, 4.0]):  # a half and twice of 2
        samples.all += [
            Sample(load, "ours", number, {"x": ours}),
            Sample(load, "theirs", number, {"x": 1.0}),
        ]

    mean = samples.mean_ratio(load, "x", "ours", "theirs")

    assert mean.value == pytest.approx(2.0)
    assert mean.error == pytest.approx(2 * 0.8004 / 2, rel=1e-3)  # ln 2 * sqrt(4 / 3) over sqrt(4)


@pytest.fixture
async def mock() -> AsyncIterator[Address]:
    server = await asyncio.get_running_loop().create_server(Connection, "127.0.0.1", 0)
    async with server:
        yield Address("127.0.0.1", server.sockets[0].getsockname()[1])


def _ask(address: Address, path: str, *, stream: bool) -> Ask:
    request = address.request(path, json.dumps({"model": "policy-000000", "stream": stream}).encode())
    return Ask(address, (request,), lambda response: response.count(WORD.encode()), WORD.encode())


@pytest.mark.parametrize(
    ("interval", "counts"), [(1, list(range(1, TOKENS + 1))), (16, [1, 17, 33, 49, 64]), (100, [1, 64])]
)
def test_the_mock_sends_tokens_together_as_vllm_does(interval: int, counts: list[int]) -> None:
    *writes, _ = gateway_engine.stream("policy-000000", usage=False, running_usage=True, interval=interval)
    chunks = [json.loads(write.partition(b"data: ")[2]) for write in writes]

    assert [chunk["usage"]["completion_tokens"] for chunk in chunks] == [0, *counts]
    assert "".join(chunk["choices"][0]["delta"]["content"] for chunk in chunks) == f"{WORD} " * TOKENS
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None] * len(counts) + ["stop"]


@pytest.mark.parametrize("stream", [False, True])
async def test_every_answer_of_the_mock_is_whole(mock: Address, stream: bool) -> None:
    flow = await saturate(_ask(mock, "/v1/chat/completions", stream=stream), 4, 0, 0.2, lambda: None)

    assert not flow.faults
    assert flow.answers >= 4
    assert flow.tokens == pytest.approx(TOKENS * flow.requests)


async def test_a_wrong_answer_is_a_fault(mock: Address) -> None:
    flow = await saturate(_ask(mock, "/v1/nothing", stream=False), 2, 0, 0.1, lambda: None)

    assert [fault.split(b"\r\n")[0] for fault in flow.faults] == [b"HTTP/1.1 404 Not Found"] * 2
    assert flow.answers == 0


async def test_the_first_event_comes_before_the_first_token_and_that_before_the_end(mock: Address) -> None:
    ask = _ask(mock, "/v1/chat/completions", stream=True)
    exchanges = await at_rate(ask, 50, 0.2, random.Random(0))

    assert len(exchanges) == 10
    assert all(each.began < each.event <= each.first < each.ended for each in exchanges)
