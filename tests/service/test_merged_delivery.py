"""Merged delivery: replicas that hold one policy at a time, shared out and given other weights under load; by scripted engines."""

import asyncio
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psycopg
import pytest

from service.database import async_engine, async_sessions, database_url
from service.fleet import Fleet
from service.merged_delivery import MergedDelivery, share_out
from service.policies import LeadLost, Wanted, begin_term
from service.reconciler import LEADER_LOCK, POLL_SECONDS
from service.settings import Settings
from service.tables import Deployment
from tests.adapters import BASE_WEIGHTS, write_policy
from tests.service.conftest import Rows, Serve, ask, publish, wait_until
from tests.service.fake_engine import FakeEngine
from tests.service.test_faults import LEADERS
from tests.service.test_referee import BASE, DUELS, NEW, compare, is_duel, vote_for

pytestmark = pytest.mark.database
CHAT = "/v1/chat/completions"
POINTER = "SELECT live, previous, challenger FROM deployment"
SAYS = {BASE: "the old answer", NEW: "something rather different"}
PROBE = {"token_ids": [1, 2, 3], "logprobs": [None, -2.0, -2.0], "base_logprobs": [None, -1.0, -1.0]}


@pytest.fixture(autouse=True)
def _patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading takes as long as the machine does."""
    monkeypatch.setattr("service.fleet.HOLD_SECONDS", 120.0)


def make_engine(url: str, **options: Any) -> FakeEngine:
    return FakeEngine(
        url=url,
        exchanges=True,
        says=SAYS,
        logprobs={NEW: -2.0},
        load_seconds=0.2,
        pause_seconds=0.01,
        **options,
    )


def start(serve: Serve, *engines: FakeEngine, **settings: Any) -> httpx.Client:
    client = serve(*engines, delivery="merged", **settings)
    wait_until(lambda: len(held(client)) == len(engines))
    return client


def held(client: httpx.Client) -> list[str]:
    """What each healthy replica is ready to answer with."""
    return [
        name for row in client.get("/operator/replicas").json() if row["healthy"] for name in row["policies"]
    ]


def publish_new(rows: Rows, tmp_path: Path, **options: Any) -> None:
    folder = write_policy(tmp_path / NEW, probe=[PROBE], **{"merged": BASE_WEIGHTS} | options)
    publish(rows, NEW, folder)


@contextmanager
def chatting(client: httpx.Client) -> Iterator[list[httpx.Response]]:
    """Four users who ask one thing after the other; what they were answered, complete when the body is left."""
    answers: list[httpx.Response] = []
    over = threading.Event()

    def chat() -> None:
        while not over.is_set():
            answers.append(client.post(CHAT, json=ask(max_tokens=32)))

    threads = [threading.Thread(target=chat) for _ in range(4)]
    for thread in threads:
        thread.start()
    try:
        yield answers
    finally:
        over.set()
        for thread in threads:
            thread.join()


def policies_of(answers: list[httpx.Response]) -> list[str]:
    """Whose the answers are, by what they say, in the order that they came; fails where one is not its policy's."""
    found = []
    for answer in answers:
        assert answer.status_code == 200, answer.text
        policy = answer.headers["x-ratchet-policy"]
        assert answer.json()["choices"][0]["message"]["content"] == SAYS[policy]
        found.append(policy)
    return found


@pytest.mark.parametrize(
    ("holding", "other", "shares"),
    [
        ({"a": BASE, "b": BASE}, None, {"a": BASE, "b": BASE}),
        ({"a": BASE, "b": BASE}, NEW, {"a": BASE, "b": NEW}),
        ({"a": NEW, "b": None}, NEW, {"a": NEW, "b": BASE}),
        ({"a": NEW, "b": NEW, "c": BASE}, NEW, {"a": NEW, "b": BASE, "c": BASE}),
        ({"a": NEW}, NEW, {"a": BASE}),
        ({}, NEW, {}),
    ],
)
def test_one_replica_is_the_challengers_and_the_others_are_lives(
    holding: dict[str, str | None], other: str | None, shares: dict[str, str]
) -> None:
    assert share_out(holding, BASE, other) == shares


@pytest.mark.parametrize("count", [1, 2])
def test_a_swap_under_load_fails_nothing_and_mixes_nothing(
    serve: Serve, rows: Rows, tmp_path: Path, count: int
) -> None:
    engines = [make_engine(url) for url in "ab"[:count]]
    client = start(serve, *engines)
    with chatting(client) as answers:
        publish_new(rows, tmp_path)
        wait_until(lambda: rows(POINTER) == [(NEW, BASE, None)])
        wait_until(lambda: held(client) == [NEW] * count)
        client.post("/operator/rollback").raise_for_status()
        wait_until(lambda: held(client) == [BASE] * count)
    found = policies_of(answers)
    assert found[0] == BASE
    assert NEW in found
    assert policies_of([client.post(CHAT, json=ask())]) == [BASE]
    assert rows("SELECT count(*) FROM replies WHERE finish_reason <> 'stop'") == [(0,)]


@pytest.mark.parametrize("logprob", [-1.0, -2.01])
def test_a_policy_that_is_not_what_was_trained_goes_and_the_last_one_is_back(
    serve: Serve, rows: Rows, tmp_path: Path, logprob: float
) -> None:
    engine = make_engine("a")
    engine.logprobs = {NEW: logprob}
    client = start(serve, engine)
    with chatting(client) as answers:
        publish_new(rows, tmp_path)
        wait_until(lambda: rows("SELECT state FROM policies WHERE name = %s", NEW) == [("refused",)])
        wait_until(lambda: held(client) == [BASE])
    assert set(policies_of(answers)) == {BASE}


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"merged": None}, "another RATCHET_DELIVERY"),
        ({"merged": {"model.norm.weight": [[float("nan")]]}}, "not numbers"),
    ],
)
def test_a_whole_model_that_cannot_be_right_is_refused_before_it_is_loaded(
    serve: Serve, rows: Rows, tmp_path: Path, options: dict[str, Any], reason: str
) -> None:
    engine = make_engine("a")
    client = start(serve, engine)
    publish_new(rows, tmp_path, **options)
    wait_until(lambda: rows("SELECT state FROM policies WHERE name = %s", NEW) == [("refused",)])
    [(said,)] = rows("SELECT reason FROM policies WHERE name = %s", NEW)
    assert reason in said
    assert held(client) == [BASE]  # it answered all the time
    assert engine.held == {BASE}


def test_a_trial_has_a_replica_of_its_own_and_its_winner_gets_all_but_the_previous_ones(
    serve: Serve, rows: Rows, tmp_path: Path
) -> None:
    client = start(serve, make_engine("a"), make_engine("b"), duel_votes=100, duel_share=1.0, watch_share=1.0)
    publish_new(rows, tmp_path)
    wait_until(lambda: rows(DUELS) == [("trial", NEW, BASE, None)])
    assert sorted(held(client)) == [BASE, NEW]
    wait_until(lambda: is_duel(compare(client)))
    while rows(POINTER) != [(NEW, BASE, None)]:
        vote_for(client, NEW)
    wait_until(lambda: is_duel(compare(client)))  # the watch: both are held still
    assert sorted(held(client)) == [BASE, NEW]


@pytest.mark.parametrize("draining", [None, 0, 1])
def test_one_replica_alone_has_no_trials(
    serve: Serve, rows: Rows, tmp_path: Path, draining: int | None
) -> None:
    urls = ["http://10.0.0.1", "http://10.0.0.2"][: 1 if draining is None else 2]
    client = start(serve, *map(make_engine, urls), duel_votes=100)
    if draining is not None:
        body = {"url": urls[draining], "state": "draining"}
        client.put("/operator/replicas", json=body).raise_for_status()
    publish_new(rows, tmp_path)
    wait_until(lambda: rows("SELECT state FROM policies WHERE name = %s", NEW) == [("refused",)])
    [(said,)] = rows("SELECT reason FROM policies WHERE name = %s", NEW)
    assert "a trial needs two replicas" in said
    assert client.post(CHAT, json=ask()).headers["x-ratchet-policy"] == BASE


def test_where_lives_replica_dies_the_challengers_takes_its_place(
    serve: Serve, rows: Rows, tmp_path: Path
) -> None:
    engines = {url: make_engine(url) for url in "ab"}
    client = start(serve, *engines.values(), duel_votes=100)
    publish_new(rows, tmp_path)
    wait_until(lambda: sorted(held(client)) == [BASE, NEW])
    [lives] = [url for url, engine in engines.items() if engine.held == {BASE}]
    engines[lives].alive = False
    wait_until(lambda: held(client) == [BASE])
    assert policies_of([client.post(CHAT, json=ask())]) == [BASE]


def test_an_engine_that_restarted_is_given_live_again_before_it_answers(
    serve: Serve, rows: Rows, tmp_path: Path
) -> None:
    engine = make_engine("a")
    client = start(serve, engine)
    publish_new(rows, tmp_path)
    wait_until(lambda: held(client) == [NEW])
    with chatting(client) as answers:
        engine.held = {BASE}
        wait_until(lambda: engine.held == {NEW})
        wait_until(lambda: held(client) == [NEW])
    assert policies_of(answers)[-1] == NEW


def test_a_leader_whose_connection_was_lost_answers_until_another_one_leads(
    serve: Serve, rows: Rows, prepared: Settings
) -> None:
    engine = make_engine("a")
    client = start(serve, engine)
    url = database_url(prepared).set(drivername="postgresql").render_as_string(hide_password=False)
    with psycopg.connect(url, autocommit=True) as connection:
        with chatting(client) as answers:
            waiting = threading.Thread(
                target=connection.execute, args=("SELECT pg_advisory_lock(%s)", (LEADER_LOCK,))
            )
            waiting.start()
            wait_until(lambda: len(rows(LEADERS.replace("AND granted", "AND NOT granted"))) == 1)
            rows("SELECT pg_terminate_backend(pid) FROM (" + LEADERS + ") AS found")
            waiting.join()  # the lock is somebody's who has not begun a term yet
            time.sleep(3 * POLL_SECONDS)
        assert set(policies_of(answers)) == {BASE}
        rows("UPDATE deployment SET leader_term = leader_term + 1")
        wait_until(lambda: held(client) == [])
        before = engine.forgotten
    wait_until(lambda: held(client) == [BASE])
    assert engine.forgotten > before  # the other one may have given it other weights


@pytest.mark.parametrize("change", ["another policy is wanted", "another process leads"])
async def test_what_is_wanted_no_more_once_the_replica_is_drained_is_not_loaded(
    prepared: Settings, tmp_path: Path, change: str
) -> None:
    engine = make_engine("a")
    replicas = Fleet(lambda _: engine, ["a"], exchanges_weights=True)
    replicas.replicas[0].healthy = True
    base = Wanted(BASE, "", "")
    new = Wanted(NEW, str(write_policy(tmp_path / NEW, probe=[PROBE], merged=BASE_WEIGHTS)), "")
    database = async_engine(prepared)
    sessions = async_sessions(database)
    async with sessions.begin() as session:
        term = await begin_term(session)
    delivery = MergedDelivery(replicas, sessions, 0)
    [replica] = replicas.replicas
    replica.running[BASE] = 1
    see_to = delivery.plan(Deployment(live=NEW), [base, new], term)
    assert see_to is not None
    task = asyncio.create_task(see_to(replica))
    while not replica.switching:
        await asyncio.sleep(0.01)
    if change == "another policy is wanted":
        delivery.plan(Deployment(live=BASE), [base], term)
        replica.running.clear()
        await task
    else:
        async with sessions.begin() as session:
            await begin_term(session)
        replica.running.clear()
        with pytest.raises(LeadLost):
            await task
    assert engine.held == {BASE}
    assert not replica.switching
    await database.dispose()


def test_one_process_answers_at_a_time(serve: Serve, rows: Rows, tmp_path: Path) -> None:
    engine = make_engine("a")
    leader = start(serve, engine)
    other = serve(engine, delivery="merged", ready=False)
    wait_until(lambda: len(other.get("/operator/replicas").json()) == 1)
    assert other.get("/readyz").status_code == 503
    publish_new(rows, tmp_path)
    wait_until(lambda: held(leader) == [NEW])
    refused = other.post(CHAT, json=ask())
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "engine_not_ready")
