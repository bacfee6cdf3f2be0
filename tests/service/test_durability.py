"""Votes that were acknowledged outlive kill -9 of the service and of PostgreSQL. `make bench-durability` does it at length."""

import asyncio
import random
from pathlib import Path

import aiohttp
import pytest

from service import database as db
from service.engine import Message, Sampling
from service.journal import Begun, Ended, Journal, Stored, UserName
from service.pairing import Pairing
from service.policies import BASE
from service.settings import Settings
from tests.benchmarks import durability_audit as audit
from tests.benchmarks.durability_clients import Call, Client, Seen, Tally
from tests.benchmarks.durability_parts import (
    Supervised,
    fresh_settings,
    libpq_url,
    running,
    wait_until_answering,
)

SAMPLING = Sampling(8, 1.0, 1.0, 0.0, (), None, 0.0, 0.0)
ENDED = (Ended("one two", "stop", 3, 2), Ended("three four", "stop", 3, 2))
VOTING_SECONDS = 2.0
"""Between two kills."""


async def prepare_comparisons(settings: Settings, user: str, count: int) -> list[str]:
    """Ids of comparisons that can be voted on: no engine is needed."""
    journal = Journal(db.database_url(settings))
    asked = [
        Begun(
            user=UserName("", user),
            messages=[Message("user", "hi")],
            policies=(BASE, BASE),
            sampling=SAMPLING,
            pairing=Pairing("always", 1.0),
            conversation=None,
            stored=Stored.new(2, True),
            ended=ENDED,
        )
        for _ in range(count)
    ]
    async with journal.running():
        await asyncio.gather(*(journal.begin(one) for one in asked))
    return [one.stored.id for one in asked]


async def vote_while_parts_are_killed(settings: Settings, parts: dict[str, Supervised]) -> list[Client]:
    tally = Tally()
    clients = [
        Client(f"user-{i}", await prepare_comparisons(settings, f"user-{i}", 15), tally, 0) for i in range(4)
    ]
    stop = asyncio.Event()
    async with aiohttp.ClientSession(f"http://127.0.0.1:{settings.port}") as http:
        voting = [asyncio.create_task(client.vote_until(stop, http)) for client in clients]
        async with asyncio.timeout(300):
            while min(tally.counts[name] for name in ("given", "revised", "taken back")) == 0:
                await asyncio.sleep(0.05)
        for name in ("postgres", "service"):
            await asyncio.sleep(VOTING_SECONDS)
            await asyncio.to_thread(parts[name].kill, random.Random(name))
        await asyncio.sleep(VOTING_SECONDS)
        stop.set()
        async with asyncio.timeout(300):
            await asyncio.gather(*voting)
    assert tally.unexpected == []
    assert min(tally.counts["given"], tally.counts["revised"], tally.counts["taken back"]) > 0
    assert any(tally.counts[name] for name in ("not reached", "refused", "answers lost")), "no kill was felt"
    return clients


@pytest.mark.database
def test_what_was_acknowledged_is_stored_once_though_every_part_was_killed(tmp_path: Path) -> None:
    settings = fresh_settings(tmp_path, tmp_path / "no-model")
    with running(settings, ["service"]) as parts:
        assert wait_until_answering(f"http://127.0.0.1:{settings.port}/healthz", 300) < 300
        clients = asyncio.run(vote_while_parts_are_killed(settings, parts))
        stored = audit.read_stored(libpq_url(settings))
        assert [part.num_kills for part in parts.values()] == [1, 1]
    assert audit.violations(clients, stored) == []
    assert audit.summary(clients, stored)["votes stored"] > 0


def client_with(*calls: Call) -> Client:
    """A client of one comparison, `cmp-1`."""
    client = Client("ada", ["cmp-1"], Tally(), 0)
    client.voted[0].calls = list(calls)
    return client


GIVEN = Call("first", acknowledged=True)
REVISED = Call("tie", acknowledged=True)
GIVEN_UP = Call("second")


@pytest.mark.parametrize(
    ("calls", "votes", "events", "faults"),
    [
        pytest.param([GIVEN], ["first"], [("given", "first")], 0, id="stored"),
        pytest.param([GIVEN], [], [("given", "first")], 1, id="vote lost"),
        pytest.param([GIVEN], [], [], 2, id="vote and history lost"),
        pytest.param([GIVEN], ["first"], [("given", "first")] * 2, 1, id="history doubled"),
        pytest.param([GIVEN], ["first"] * 2, [("given", "first")], 1, id="vote doubled"),
        pytest.param([GIVEN, REVISED], ["first"], [("given", "first")], 2, id="revision lost"),
        pytest.param([GIVEN, GIVEN_UP], ["first"], [("given", "first")], 0, id="given up, not stored"),
        pytest.param(
            [GIVEN, GIVEN_UP],
            ["second"],
            [("given", "first"), ("revised", "second")],
            0,
            id="given up, stored",
        ),
        pytest.param([GIVEN, GIVEN_UP], ["tie"], [("given", "first")], 1, id="stored as never asked"),
        pytest.param(
            [GIVEN, Call(None, acknowledged=True)],
            [],
            [("given", "first"), ("undone", "first")],
            0,
            id="undone",
        ),
        pytest.param([], ["first"], [("given", "first")], 3, id="vote that nobody gave"),
    ],
)
def test_the_audit_finds_what_is_amiss_with_votes(
    calls: list[Call], votes: list[str], events: list[audit.Event], faults: int
) -> None:
    stored = audit.Stored(votes={"cmp-1": votes} if votes else {}, events={"cmp-1": events} if events else {})
    assert len(audit.violations([client_with(*calls)], stored)) == faults


@pytest.mark.parametrize(
    ("second", "faults"),
    [(("c d", "stop"), 0), ((None, None), 1), (("c", "stop"), 1), (("c d", "abort"), 1)],
)
def test_the_audit_finds_a_reply_that_was_seen_to_end_and_is_not_stored_whole(
    second: tuple[str | None, str | None], faults: int
) -> None:
    client = client_with()
    client.seen = [Seen("cmp-1", ["one", "two"], ["a", "c d"], [None, "stop"])]
    stored = audit.Stored(shown={"cmp-1": ["one", "two"]}, replies={"one": (None, None), "two": second})
    assert len(audit.violations([client], stored)) == faults
