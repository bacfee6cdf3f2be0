"""The demo: what its users do and count, how a seed's run goes, and the arithmetic of its tables."""

import io
import math
import random
import re
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path

import pytest
from rich.console import Console

from service.tables import Message
from tests.trainer.fake_service import FakeService
from trainer import demo_client, demo_run, simulated_users
from trainer.demo_client import Answer, Client, DemoError, Reply, Tally
from trainer.demo_run import Plan, SeedRun
from trainer.demo_scores import (
    POLICY_COLUMNS,
    Gain,
    Rejected,
    Row,
    Score,
    SeedResult,
    Share,
    as_markdown,
    gain,
    policy_rows,
    score,
    seed_rows,
    win_rate,
)
from trainer.demo_screen import Screen, describe_cycle, describe_end
from trainer.simulate import write_markdown
from trainer.simulated_users import SimulatedUser, give_votes, make_users
from trainer.world import Question

HELLO: list[Message] = [{"role": "user", "content": "Hello!"}]
LEMON = Question(({"role": "user", "content": "What colour is a lemon?"},), "fact", "colour", "a lemon")
HELLO_QUESTION = Question((HELLO[0],), "small_talk")


def likes_a(messages: Sequence[Message], reply: str) -> float:
    """Prefers "a" so much that its voter never errs."""
    return 100.0 * (reply == "a")


@asynccontextmanager
async def client_of(service: FakeService) -> AsyncIterator[Client]:
    async with service.session() as session:
        yield Client(session, Tally())


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(simulated_users, "FAILED_PAUSE_SECONDS", 0.0)
    monkeypatch.setattr(demo_run, "FOLLOW_SECONDS", 0.01)
    monkeypatch.setattr(demo_run, "GENTLE_PAUSE_SECONDS", 0.01)


# --- what a client reads and counts


async def test_a_plain_reply_is_read_from_its_stream() -> None:
    async with client_of(FakeService()) as client:
        answer = await client.chat(HELLO, user="ada")
        assert answer == Answer((Reply("a", "stop"),), "policy-000000", frozenset({"policy-000000"}), None)
        assert (client.tally.requests, client.tally.is_clean) == (1, True)


async def test_a_failing_request_is_counted_and_the_next_one_is_made() -> None:
    async with client_of(FakeService(fail={0}, break_off={1})) as client:
        answers = [await client.chat(HELLO, user="ada") for _ in range(3)]
        assert [answer is None for answer in answers] == [True, True, False]
        assert client.tally.requests == 3
        assert "status 503" in client.tally.failures[0]
        assert "the engine went away" in client.tally.failures[1]


async def test_a_reply_of_two_policies_is_counted() -> None:
    async with client_of(FakeService(mix={0})) as client:
        await client.chat(HELLO, user="ada")
        await client.chat(HELLO, user="ada")
        assert client.tally.mixed == [
            "asked ratchet, header policy-000000, chunks policy-000000, policy-000009"
        ]
        assert not client.tally.is_clean


async def test_a_vote_on_a_policy_that_was_never_live_is_counted() -> None:
    async with client_of(FakeService(strange_votes=True)) as client:
        assert await client.vote("cmp-1", "first", user="ada")
        assert client.tally.mixed == ["a comparison of policy-000077: not all were ever live"]


async def test_too_many_failures_end_the_demo(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_client, "MOST_FAILURES", 3)
    async with client_of(FakeService(fail={0, 1, 2})) as client:
        await client.chat(HELLO, user="ada")
        await client.chat(HELLO, user="ada")
        with pytest.raises(DemoError, match="3 requests failed"):
            await client.chat(HELLO, user="ada")


def test_a_swap_counts_the_requests_that_began_before_it_and_ended_after() -> None:
    tally = Tally(spans=[(10.0, 12.0), (11.0, 15.0), (13.0, 14.0), (12.5, 12.9)])
    tally.note_swap(datetime.fromtimestamp(12.0, UTC))
    tally.note_swap(datetime.fromtimestamp(20.0, UTC))
    assert tally.in_flight_at_swaps == [2, 0]


# --- users


async def test_a_user_asks_for_two_replies_and_votes_by_taste() -> None:
    service = FakeService()
    async with client_of(service) as client:
        user = SimulatedUser("ada", likes_a, client, random.Random(0))
        assert await user.vote_once()
    assert service.chats[0]["comparison"] == "always"
    assert service.chats[0]["stream"] is True
    assert service.votes == [("cmp-0", "ada", "first")]


async def test_users_together_give_exactly_the_votes_asked_for_whatever_fails() -> None:
    service, steps = FakeService(fail={1, 5}), []
    async with client_of(service) as client:
        users = make_users(4, likes_a, client, seed=0)
        await give_votes(users, 21, lambda: steps.append(1))
        assert len(client.tally.failures) == 2
    assert (len(service.votes), len(steps)) == (21, 21)
    assert set(service.users()) == {"simulated-0", "simulated-1", "simulated-2", "simulated-3"}


async def test_a_vote_on_identical_replies_does_not_count_and_is_no_failure() -> None:
    service = FakeService(replies={"policy-000000": ("a", "a")})
    async with client_of(service) as client:
        user = SimulatedUser("ada", likes_a, client, random.Random(0))
        assert not await user.vote_once()
        assert client.tally.is_clean


# --- one seed


def three_policies() -> dict[str, tuple[str, str]]:
    return {"policy-000000": ("b", "a"), "policy-000001": ("a", "b"), "policy-000002": ("a", "b")}


def run_of(client: Client, out: io.StringIO, *, asks_for_cycles: bool = False) -> SeedRun:
    plan = Plan("likes_a", likes_a, 20, 2, 12, asks_for_cycles)
    return SeedRun(plan, 0, client, lambda: None, Screen(Console(file=out, width=200)))


async def test_a_run_votes_trains_and_scores_each_policy_that_went_live() -> None:
    service, out = FakeService(three_policies(), cycle_votes=10), io.StringIO()
    async with client_of(service) as client:
        rows = await run_of(client, out).play()
        assert client.tally.is_clean
        assert len(client.tally.in_flight_at_swaps) == 2
    assert [row.policy for row in rows if isinstance(row, Score)] == list(three_policies())
    assert [row.win_rate and row.win_rate.value for row in rows if isinstance(row, Score)] == [None, 1.0, 1.0]
    assert [cycle["trigger"] for cycle in service.cycles] == ["votes", "votes"]
    evaluated = [chat for chat in service.chats if chat["user"] == "evaluator"]
    assert {chat["model"] for chat in evaluated} == set(three_policies())
    assert len({chat["seed"] for chat in evaluated}) == 36
    assert "cycle 1 promoted policy-000001" in out.getvalue()


async def test_users_chat_while_a_cycle_trains() -> None:
    service = FakeService(three_policies(), cycle_votes=10)
    async with client_of(service) as client:
        await run_of(client, io.StringIO()).play()
    plain = [chat for chat in service.chats if chat["comparison"] == "never" and chat["user"] != "evaluator"]
    assert {chat["user"] for chat in plain} == {f"simulated-{number}" for number in range(8)}


async def test_a_rejected_cycle_is_shown_as_such() -> None:
    service = FakeService(cycle_votes=10, verdict="rejected")
    async with client_of(service) as client:
        rows = await run_of(client, io.StringIO()).play()
    assert rows[1:] == (Rejected(1, "rejected", "as told"), Rejected(2, "rejected", "as told"))


async def test_a_running_loop_is_asked_for_its_cycles() -> None:
    service = FakeService(three_policies())
    async with client_of(service) as client:
        await run_of(client, io.StringIO(), asks_for_cycles=True).play()
    assert [cycle["trigger"] for cycle in service.cycles] == ["operator", "operator"]


async def test_a_cycle_that_never_begins_ends_the_demo(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_run, "BEGIN_SECONDS", 0.05)
    async with client_of(FakeService()) as client:
        with pytest.raises(ExceptionGroup) as raised:
            await run_of(client, io.StringIO()).play()
    assert raised.group_contains(DemoError, match="No cycle began")


# --- scores and tables


def test_a_win_rate_counts_equals_as_half_and_has_wilsons_interval() -> None:
    share = win_rate([1.0] * 7 + [0.0] * 2 + [-1.0])  # 8 of 10: Wilson's interval is .490 to .943
    assert share.value == pytest.approx(0.8)
    assert (share.low, share.high) == (pytest.approx(0.4902, abs=1e-4), pytest.approx(0.9433, abs=1e-4))


def test_a_win_rate_of_one_still_has_a_lower_end() -> None:
    share = win_rate([0.5] * 10)  # 1 / (1 + 1.96^2 / 10)
    assert (share.value, share.high) == (1.0, pytest.approx(1.0))
    assert share.low == pytest.approx(0.7225, abs=1e-4)


def test_a_policy_is_scored_by_hand_worked_numbers() -> None:
    questions = [LEMON, LEMON, LEMON, HELLO_QUESTION, HELLO_QUESTION]
    replies = [
        Reply("Yellow.", "stop"),
        Reply("Blue.", "stop"),
        Reply("Yellow. Yellow.", "stop"),
        Reply("Hello and", "length"),
        None,  # failed: skipped
    ]
    starter = [Reply("Blue.", "stop")] * 4 + [Reply("Hi.", "stop")]

    def taste(messages: Sequence[Message], reply: str) -> float:
        return float(reply.startswith("Yellow"))

    before = [Reply("Yellow.", "stop")] * 3 + [None, None]
    assert score("policy-000001", questions, replies, taste, starter, before) == Score(
        policy="policy-000001",
        num_replies=4,
        taste=0.5,
        correct=pytest.approx(2 / 3),
        spoilt=0.5,
        win_rate=win_rate([1, 0, 1, 0]),
        gain=gain([0, -1, 0]),
    )


def test_a_gain_has_the_normal_interval_of_a_mean_difference() -> None:
    found = gain([-1.0, -1.0, 0.0, -2.0])  # mean -1, variance 2/3
    assert (found.value, found.half) == (-1.0, pytest.approx(1.96 * math.sqrt(2 / 3 / 4), abs=1e-4))
    assert found.is_fall
    assert not gain([-1.0, 1.0, -2.0, 1.5]).is_fall
    assert not gain([-1.0]).is_fall  # one alone says nothing


def rows_of_a_run() -> tuple[Row, ...]:
    return (
        Score("policy-000000", 400, 0.25, 0.8, 0.01, None, None),
        Score("policy-000001", 400, 1.5, 0.85, 0.0, Share(0.9, 0.87, 0.93, 400), Gain(1.25, 0.1)),
        Rejected(2, "rejected", "not better | than live"),
    )


def test_the_tables_compare_the_starter_with_what_is_live_in_the_end() -> None:
    result = SeedResult(3, 450, rows_of_a_run(), 4.25)
    assert seed_rows([result]) == [
        [
            "3",
            "450",
            "policy-000001",
            "0.900 [0.870, 0.930]",
            "0.800 -> 0.850",
            "0.0100 -> 0.0000",
            "4.2",
        ]
    ]
    assert policy_rows(result)[2][0] == "cycle 2 rejected"


def test_the_last_row_of_several_seeds_is_all_of_them_together() -> None:
    worse = (
        Score("policy-000000", 400, 0.25, 0.7, 0.0, None, None),
        Score("policy-000001", 400, 1.5, 0.75, 0.005, Share(0.8, 0.7, 0.9, 400), Gain(1.25, 0.1)),
    )
    results = [SeedResult(3, 450, rows_of_a_run(), 4.25), SeedResult(4, 450, worse, 5.0)]
    *_, row = seed_rows(results)
    assert row[:3] == ["all", "900", ""]
    assert row[3] == "0.850 [0.824, 0.873]"  # of 800 questions, not of 400
    assert row[4:] == ["0.750 -> 0.800", "0.0050 -> 0.0025", "9.2"]
    assert len(seed_rows(results)) == 3


def test_the_markdown_is_a_table_whatever_its_cells_hold() -> None:
    text = as_markdown(POLICY_COLUMNS, policy_rows(SeedResult(3, 450, rows_of_a_run(), 4.25)))
    assert {line.count("|") for line in text.splitlines()} == {len(POLICY_COLUMNS) + 1}


def test_the_markdown_file_holds_all_seeds(tmp_path: Path) -> None:
    plan = Plan("warm", likes_a, 450, 2, 400, False)
    results = [SeedResult(seed, 450, rows_of_a_run(), 4.25) for seed in (0, 1)]
    write_markdown(tmp_path / "warm.md", plan, results)
    text = (tmp_path / "warm.md").read_text()
    assert "Taste `warm`, 400 questions" in text
    assert text.count("policy-000001") == 4


# --- what is shown


def cycle_in_ppo() -> dict[str, object]:
    iteration = {"kl": 1.234, "kl_coefficient": 0.05, "judge": 0.5, "judge_error": 0.1}
    return {
        "id": 4,
        "stage": "training",
        "policy": None,
        "reason": None,
        "metrics": {
            "progress": {"stage": "training", "done": 7, "total": 25},
            "reward_model": {"accuracy": {"share": 0.75, "low": 0.65, "high": 0.83, "num_pairs": 90}},
            "training": {"method": "ppo", "iterations": [iteration], "kept": 0, "why": "it was best"},
            "gate": {"checks": [{"name": "judge", "value": 0.4, "threshold": 0.0, "passed": True}]},
        },
    }


def test_a_cycle_is_one_line_of_stage_accuracy_kl_and_judge() -> None:
    assert describe_cycle(cycle_in_ppo()) == (
        "cycle 4: training 7/25, reward model right on 0.75 [0.65, 0.83] of 90 held-out votes, "
        "KL 1.23 (coefficient 0.050), judge +0.50 ± 0.10"
    )


def test_a_cycle_without_metrics_is_its_stage() -> None:
    assert describe_cycle({"id": 1, "stage": "reward_model", "metrics": {}}) == "cycle 1: reward model"


def test_the_end_of_a_cycle_says_why_and_every_check() -> None:
    ended = cycle_in_ppo() | {"stage": "rejected", "reason": "no better"}
    assert list(describe_end(ended, 61.2)) == [
        "cycle 4 rejected after 61 s: no better",
        "  PPO kept iteration 0 of 1: it was best",
        "  gate: judge 0.4 (0) passed",
    ]


def test_without_a_terminal_a_bar_is_some_plain_lines() -> None:
    out = io.StringIO()
    with Screen(Console(file=out, width=100)).bar("votes", 8) as step:
        for _ in range(8):
            step()
    assert [line.strip() for line in out.getvalue().splitlines()][:3] == [
        "votes: 2/8",
        "votes: 4/8",
        "votes: 6/8",
    ]
    assert re.search(r"votes: 8/8 in \d+ s", out.getvalue())
