"""The swap benchmark's own arithmetic: what was received, whose it is, and how long the old policy went on."""

import json

import pytest

from tests.benchmarks.swap_clients import Exchange
from tests.benchmarks.swap_replies import (
    Origin,
    Reply,
    Span,
    Swap,
    gaps_within,
    last_old,
    longest_silence,
    origin,
    read,
    waits_within,
    windows,
)

OLD, NEW = "policy-000001", "policy-000002"


def event(*tokens: tuple[int, float], model: str = OLD, finish_reason: str | None = None) -> bytes:
    content = [{"token": f"token_id:{token}", "logprob": logprob} for token, logprob in tokens]
    choice = {"logprobs": {"content": content} if tokens else None, "finish_reason": finish_reason}
    return b"data: " + json.dumps({"model": model, "choices": [choice]}).encode() + b"\n\n"


def exchange(*received: tuple[float, bytes]) -> Exchange:
    return Exchange("hi", 0.0, list(received), ended=9.0)


def reply(*chunk_times: float) -> Reply:
    return Reply("hi", 0.0, 9.0, chunk_times=list(chunk_times))


def test_a_reply_is_read_from_pieces_that_are_cut_anywhere() -> None:
    stream = event() + event((7, -1.5)) + event((300, -0.25), finish_reason="length") + b"data: [DONE]\n\n"
    read_reply = read(exchange((1.0, stream[:150]), (2.0, stream[150:-3]), (3.0, stream[-3:])))
    assert read_reply.token_ids == [7, 300]
    assert read_reply.logprobs == [-1.5, -0.25]
    assert read_reply.chunk_times == [2.0]  # both tokens were whole then, and what comes at once counts once
    assert (read_reply.labels, read_reply.fault) == ({OLD}, "")


@pytest.mark.parametrize(
    ("stream", "fault"),
    [
        (event((7, -1.5)), "ended early"),
        (event((7, -1.5), finish_reason="abort") + b"data: [DONE]\n\n", "abort"),
        (event((7, -1.5)) + b'data: {"error": {"message": "gone"}}\n\n', "gone"),
    ],
)
def test_whatever_is_not_a_whole_reply_failed(stream: bytes, fault: str) -> None:
    assert fault in read(exchange((1.0, stream))).fault


def test_a_gap_belongs_to_the_time_in_which_it_ends() -> None:
    quiet, swapping = Span(0, 5), Span(5, 10)
    replies = [reply(1.0, 2.0, 6.0), reply(4.5, 5.0)]
    assert gaps_within(replies, [quiet]) == [1.0]
    assert gaps_within(replies, [swapping]) == [4.0, 0.5]
    assert (
        longest_silence(replies, [quiet, swapping]) == 2.5
    )  # from 2 to 4.5; one stream's silence is not everybody's


def test_a_wait_belongs_to_the_time_of_the_first_token() -> None:
    assert waits_within([reply(1.0, 2.0), reply(6.0), reply()], [Span(5, 10)]) == [6.0]


def test_tokens_are_judged_eight_together_and_the_last_ones_with_those_before_them() -> None:
    assert windows([1.0] * 8 + [2.0] * 8 + [5.0] * 4) == [1.0, 2.0, 3.5]
    assert windows([1.0] * 8) == [1.0]
    assert windows([1.0, 3.0]) == [2.0]


def test_a_reply_is_of_the_policy_that_all_its_tokens_fit() -> None:
    found = origin({OLD: [2.0] * 20, NEW: [0.125] * 20})
    assert found == Origin(first=NEW, whole=NEW, deviation=0.125, next_deviation=2.0)


def test_a_reply_that_changes_policy_midway_is_of_none() -> None:
    found = origin({OLD: [0.1] * 12 + [2.0] * 12, NEW: [2.0] * 12 + [0.1] * 12})
    assert (found.first, found.whole) == (OLD, None)


def test_one_last_token_of_another_policy_is_found() -> None:
    assert origin({OLD: [0.05] * 30 + [3.0]}).whole is None


def test_how_long_the_old_policy_went_on_is_told_by_the_last_reply_that_began_on_it() -> None:
    first = Swap("promotion", OLD, NEW, began=8.0, called=10.0, ended=10.1)
    back = Swap("rollback", NEW, OLD, began=20.0, called=20.0, ended=20.1)
    begins = [(9.0, OLD), (10.25, OLD), (10.5, NEW), (19.0, NEW), (20.5, OLD), (21.0, OLD)]
    replies = [(reply(at), Origin(policy, policy, 0.1, None)) for at, policy in begins]
    # Nothing began on the policy that was taken back; that the other one is live again is no delay of the first swap.
    assert list(last_old([first, back], replies, 30.0, lambda reply: reply.first_at)) == [0.25, 0.0]
    assert list(last_old([first, back], replies, 30.0, lambda reply: reply.began)) == [
        0.0,
        0.0,
    ]  # asked for before
