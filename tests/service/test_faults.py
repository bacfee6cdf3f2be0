"""Services that are killed, two at once, engines that hang, a database that is away: traffic goes on, and all agree in the end."""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx
import psycopg
import pytest

from service import database as db
from service import engine as engine_door
from service import fleet, policies
from service.policies import LeadLost
from service.referee import Referee
from service.settings import Settings
from tests.benchmarks.durability_parts import (
    environment,
    fresh_settings,
    libpq_url,
    running,
    start_database,
    wait_until_answering,
)
from tests.engine import free_port
from tests.service.conftest import Rows, Serve, ask, chunks, publish, wait_until
from tests.service.fake_engine import FakeEngine
from tests.service.http_engine import HttpEngine, running_http_engine
from tests.service.test_reconciler import make_folder

pytestmark = pytest.mark.database
CHAT = "/v1/chat/completions"
BASE, NEW, NEWER = "policy-000000", "policy-000001", "policy-000002"
POINTER = "SELECT live, previous, challenger FROM deployment"
HERE = "(SELECT oid FROM pg_database WHERE datname = current_database())"
LEADERS = f"SELECT pid FROM pg_locks WHERE locktype = 'advisory' AND granted AND database = {HERE}"
AWAY_SECONDS = 30.0


@pytest.fixture
def http_engine() -> Iterator[HttpEngine]:
    with running_http_engine() as engine:
        yield engine


# --- an engine that hangs while its HTTP answers


@pytest.mark.parametrize("stream", [True, False])
def test_what_waits_at_a_hanging_engine_is_answered_by_another(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    monkeypatch.setattr(engine_door, "TOKEN_SECONDS", 4.0)
    monkeypatch.setattr(fleet, "HEALTH_SECONDS", 0.5)
    with ExitStack() as stack:
        hanging, sound = (stack.enter_context(running_http_engine()) for _ in range(2))
        client = serve(engine_urls=(hanging.url, sound.url))
        wait_until(lambda: all(row["healthy"] for row in client.get("/operator/replicas").json()))
        hanging.hold("token", "chat")
        answer = client.post(CHAT, json=ask(stream=stream))
        assert answer.status_code == 200
        assert "two" in answer.text
        assert "error" not in answer.text
        assert (len(hanging.chats), len(sound.chats)) == (1, 1)
        wait_until(
            lambda: [row["healthy"] for row in client.get("/operator/replicas").json()] == [False, True]
        )
        assert client.post(CHAT, json=ask()).status_code == 200
        assert len(hanging.chats) == 1
        hanging.release()
        wait_until(lambda: all(row["healthy"] for row in client.get("/operator/replicas").json()))


def test_a_stream_at_an_engine_that_hangs_midway_ends_in_an_error_event_long_before_its_deadline(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, http_engine: HttpEngine
) -> None:
    monkeypatch.setattr(engine_door, "TOKEN_SECONDS", 4.0)
    monkeypatch.setattr(fleet, "HEALTH_SECONDS", 0.5)
    client = serve(url=http_engine.url)
    http_engine.hold("token", "word")
    began = time.monotonic()
    answer = client.post(CHAT, json=ask(stream=True))
    assert time.monotonic() - began < 20
    said = [chunk["choices"][0]["delta"]["content"] for chunk in chunks(answer) if "choices" in chunk]
    assert "".join(said) == "one "
    assert chunks(answer)[-1]["error"]["message"] == "The engine stopped answering. Try again."
    assert "[DONE]" not in answer.text


# --- two services at once


def test_of_two_services_one_leads_and_when_it_loses_its_lock_the_other_goes_on(
    serve: Serve, rows: Rows, tmp_path: Path
) -> None:
    engine = FakeEngine(logprobs={NEW: -2.0, NEWER: -2.0})
    first, second = serve(engine), serve(engine)
    wait_until(lambda: len(rows(LEADERS)) == 1)
    publish(rows, NEW, make_folder(tmp_path / NEW))
    wait_until(lambda: rows(POINTER) == [(NEW, BASE, None)])
    for client in (first, second):
        wait_until(lambda client=client: client.post(CHAT, json=ask()).headers.get("x-ratchet-policy") == NEW)  # type: ignore[misc]
    [(term,)] = rows("SELECT leader_term FROM deployment")
    for _ in range(3):
        rows("SELECT pg_terminate_backend(pid) FROM (" + LEADERS + ") AS found")
        wait_until(lambda: len(rows(LEADERS)) == 1)
    publish(rows, NEWER, make_folder(tmp_path / NEWER))
    wait_until(lambda: rows(POINTER) == [(NEWER, NEW, None)])
    assert rows("SELECT leader_term FROM deployment")[0][0] > term
    for client in (first, second):
        wait_until(
            lambda client=client: client.post(CHAT, json=ask()).headers.get("x-ratchet-policy") == NEWER
        )  # type: ignore[misc]


def test_a_service_that_is_slower_to_verify_a_policy_answers_with_the_old_one_until_then(
    serve: Serve, rows: Rows, tmp_path: Path
) -> None:
    quick = FakeEngine(logprobs={NEW: -2.0})
    slow = FakeEngine(logprobs={NEW: -2.0}, may_load=threading.Event())
    serve(quick)
    wait_until(lambda: len(rows(LEADERS)) == 1)
    other = serve(slow)
    publish(rows, NEW, make_folder(tmp_path / NEW))
    wait_until(lambda: rows(POINTER) == [(NEW, BASE, None)])
    time.sleep(0.3)  # it has been told
    answer = other.post(CHAT, json=ask())
    assert (answer.status_code, answer.headers["x-ratchet-policy"]) == (200, BASE)
    slow.may_load.set()
    wait_until(lambda: other.post(CHAT, json=ask()).headers.get("x-ratchet-policy") == NEW)


async def test_a_leader_of_an_older_term_decides_nothing(
    prepared: Settings, rows: Rows, tmp_path: Path
) -> None:
    publish(rows, NEW, make_folder(tmp_path / NEW))
    engine = db.async_engine(prepared)
    sessions = db.async_sessions(engine)
    referee = Referee(sessions, prepared.model_copy(update={"duel_votes": 0}))
    terms = []
    for _ in range(2):
        async with sessions.begin() as session:
            terms.append(await policies.begin_term(session))
    with pytest.raises(LeadLost):
        await referee.look(NEW, terms[0])
    assert rows(POINTER) == [(BASE, None, NEW)]
    moved = await referee.look(NEW, terms[1])
    assert moved is not None
    assert moved.live == NEW
    await engine.dispose()


# --- a leader that is killed


@contextmanager
def service_process(
    settings: Settings, engine: HttpEngine, log: Path
) -> Iterator[tuple[httpx.Client, "subprocess.Popen[bytes]"]]:
    """A service in a process of its own, that answers."""
    assert settings.database_url is not None
    port = free_port()
    variables = {
        **os.environ,
        "DATABASE_URL": settings.database_url.get_secret_value(),
        **environment(settings.model_copy(update={"port": port, "engine_urls": (engine.url,)})),
        "RATCHET_DUEL_VOTES": "0",
    }
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "service"], env=variables, stdout=output, stderr=output
        )
    try:
        url = f"http://127.0.0.1:{port}"
        assert wait_until_answering(f"{url}/readyz", 300) < 300, log.read_text()
        with httpx.Client(base_url=url, timeout=30) as client:
            yield client, process
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("step", ["load", "probe", "row", "unload"])
def test_a_leader_killed_at_any_step_of_a_swap_is_followed_by_another_which_ends_it(
    prepared: Settings, rows: Rows, http_engine: HttpEngine, tmp_path: Path, step: str
) -> None:
    with ExitStack() as stack:
        _, leader = stack.enter_context(service_process(prepared, http_engine, tmp_path / "leader.log"))
        wait_until(lambda: len(rows(LEADERS)) == 1)
        client, _ = stack.enter_context(service_process(prepared, http_engine, tmp_path / "other.log"))
        answers: list[int] = []
        over = threading.Event()

        def chat() -> None:
            while not over.is_set():
                answers.append(client.post(CHAT, json=ask()).status_code)

        users = threading.Thread(target=chat)
        users.start()
        try:
            _kill_at(step, leader, prepared, rows, http_engine, tmp_path)
            wait_until(lambda: rows(POINTER) == [(NEW, BASE, None)])
            wait_until(lambda: http_engine.held == {BASE, NEW})
        finally:
            over.set()
            users.join()
        wait_until(lambda: client.post(CHAT, json=ask()).headers.get("x-ratchet-policy") == NEW)
        assert set(answers) == {200}
        assert rows("SELECT leader_term FROM deployment") == [(2,)]


def _kill_at(
    step: str,
    leader: "subprocess.Popen[bytes]",
    settings: Settings,
    rows: Rows,
    engine: HttpEngine,
    folder: Path,
) -> None:
    """Let a swap begin, and kill the leader when it has come to a step: `row` is the decision, which waits for the pointer's row."""
    engine.hold("probe" if step == "row" else step)
    if step == "unload":
        engine.held.add("policy-000009")  # nobody wants it
    publish(rows, NEW, make_folder(folder / NEW))
    engine.wait_until_reached("probe" if step == "row" else step)
    with psycopg.connect(libpq_url(settings)) as connection:
        if step == "row":
            connection.execute("SELECT 1 FROM deployment FOR UPDATE")
            engine.release()
            waiting = "SELECT count(*) > 0 FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()"
            wait_until(lambda: rows(waiting) == [(True,)])
        leader.kill()
        leader.wait()
    engine.release()


# --- PostgreSQL away


def test_when_postgresql_comes_back_everything_goes_on(tmp_path: Path, http_engine: HttpEngine) -> None:
    settings = fresh_settings(tmp_path / "state", tmp_path / "no-model")
    settings = settings.model_copy(update={"engine_urls": (http_engine.url,)})
    tmp_path.chmod(0o755)  # PostgreSQL may run as somebody else
    url = f"http://127.0.0.1:{settings.port}"
    with running(settings, ["service"]) as parts, httpx.Client(base_url=url, timeout=30) as client:
        assert wait_until_answering(f"{url}/readyz", 300) < 300
        http_engine.hold("word")
        with client.stream("POST", CHAT, json=ask(stream=True)) as answer:
            lines = answer.iter_lines()
            while "one " not in next(lines):
                pass
            parts["postgres"].stop()
            went = time.monotonic()
            http_engine.release()
            rest = "".join(lines)
        assert '"code":"database"' in rest  # its end could not be stored: it is not passed off as whole
        assert "[DONE]" not in rest
        while time.monotonic() - went < AWAY_SECONDS:
            refused = client.post(CHAT, json=ask())
            assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
            assert refused.json()["error"]["code"] == "database"
            assert client.get("/healthz").status_code == 200
            time.sleep(0.5)
        parts["postgres"] = start_database(settings)
        wait_until(lambda: client.post(CHAT, json=ask()).status_code == 200)

        def rows(query: str, *values: object) -> list[tuple[object, ...]]:
            with psycopg.connect(libpq_url(settings), autocommit=True) as connection:
                cursor = connection.execute(query.encode(), values)
                return cursor.fetchall() if cursor.description else []

        publish(rows, NEW, make_folder(tmp_path / NEW))
        wait_until(lambda: rows("SELECT state FROM policies WHERE name = %s", NEW) == [("verified",)])
        assert rows("SELECT kind, outcome FROM duels") == [("trial", None)]
        assert client.post("/operator/promote").json()["live"] == NEW
