"""What tests of the service share: the service on a port of its own, real engines, and rows to look at."""

import contextlib
import json
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import psycopg
import pytest
import uvicorn
from click.testing import Result
from playwright.sync_api import Browser, ConsoleMessage, Page, expect, sync_playwright
from sqlalchemy.orm import Session
from typer.testing import CliRunner

from service import cli
from service import database as db
from service.app import ConnectBy, create_app
from service.policies import BASE, ensure_base
from service.settings import Settings, get_settings
from tests.service.fake_engine import FakeEngine

expect.set_options(timeout=120_000)  # two cores may be shared by an engine, a browser and two other workers

Serve = Callable[..., httpx.Client]
Rows = Callable[..., list[tuple[Any, ...]]]


@pytest.fixture
def prepared(database: Settings) -> Settings:
    """Settings of a database in which the base is live."""
    engine = db.sync_engine(database)
    with Session(engine) as session:
        ensure_base(session, "base")
        session.commit()
    engine.dispose()
    return database


@pytest.fixture
def rows(database: Settings) -> Rows:
    """Ask the database, past the service."""
    url = db.database_url(database).set(drivername="postgresql").render_as_string(hide_password=False)

    def ask(query: str, *values: object) -> list[tuple[Any, ...]]:
        with psycopg.connect(url, autocommit=True) as connection:
            cursor = connection.execute(query.encode(), values)
            return cursor.fetchall() if cursor.description else []

    return ask


@pytest.fixture
def serve(prepared: Settings) -> Iterator[Serve]:
    """Start the service; gives a client. `serve(engine)` uses a fake, `serve(url=...)` a vLLM."""
    with contextlib.ExitStack() as stack:

        def start(
            *fakes: FakeEngine, url: str = "", ready: bool = True, everywhere: bool = False, **changes: object
        ) -> httpx.Client:
            # Without duels a challenger goes live at once: what most tests are about begins there.
            urls = tuple(fake.url for fake in fakes) or (url,)
            settings = prepared.model_copy(update={"engine_urls": urls, "duel_votes": 0, **changes})
            known = {fake.url: fake for fake in fakes}
            connect_by: ConnectBy | None = (lambda _: partial(_reach, known, everywhere)) if fakes else None
            server = stack.enter_context(running(settings, connect_by))
            client = stack.enter_context(httpx.Client(base_url=address_of(server), timeout=60))
            if ready:
                wait_until(lambda: client.get("/readyz").status_code == 200)
            return client

        yield start


def _reach(known: dict[str, FakeEngine], everywhere: bool, url: str) -> FakeEngine:
    """The engine at an address; where there is none, one that does not answer, unless there is one `everywhere`."""
    return known.setdefault(url, FakeEngine(url=url, alive=everywhere))


@contextlib.contextmanager
def running(
    settings: Settings, connect_by: ConnectBy | None = None, port: int = 0
) -> Iterator[uvicorn.Server]:
    """A service in a thread of its own, at any port that is free if none is named."""
    config = uvicorn.Config(
        create_app(settings, connect_by), port=port, log_level="warning", timeout_graceful_shutdown=5
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        wait_until(lambda: server.started)
        yield server
    finally:
        server.should_exit = True
        thread.join()


def address_of(server: uvicorn.Server) -> str:
    """Where a service that runs answers."""
    return f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"


def wait_until(true: Callable[[], bool], seconds: float = 180, every: float = 0.02) -> None:
    """Look again and again. Raises AssertionError when the time is over."""
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "it did not become true in time"
        time.sleep(every)


def command_line(client: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """The command `ratchet`, asking this service."""
    monkeypatch.setenv("RATCHET_PORT", str(client.base_url.port))

    def run(*words: str | Path) -> Result:
        get_settings.cache_clear()
        return CliRunner().invoke(cli.app, [str(word) for word in words])

    return run


def chunks(response: httpx.Response) -> list[dict[str, Any]]:
    """The events of a stream that was read to its end, without [DONE]."""
    data = [line[6:] for line in response.text.splitlines() if line.startswith("data: ")]
    return [json.loads(item) for item in data if item != "[DONE]"]


def ask(text: str = "hi", **fields: object) -> dict[str, Any]:
    """A chat request."""
    return {"model": "ratchet", "messages": [{"role": "user", "content": text}], **fields}


def publish(rows: Rows, name: str, path: str | Path, parent: str = BASE) -> None:
    """What the trainer does with a new policy: its row, and the pointer's challenger."""
    rows(
        "INSERT INTO policies (name, parent, path, state, manifest) VALUES (%s, %s, %s, 'published', '{}')",
        name,
        parent,
        str(path),
    )
    rows("UPDATE deployment SET challenger = %s", name)
    rows("NOTIFY deployment")


class Pages:
    """Pages of one real browser. Any script error or refused resource on one of them is a fault."""

    def __init__(self, browser: Browser) -> None:
        self._browser = browser
        self.faults: list[str] = []

    def open(
        self, *, phone: bool = False, beside: Page | None = None, refusals: bool = False, **options: Any
    ) -> Page:
        """A page with a storage of its own, or `beside` another as a second tab. `refusals`: that calls fail is meant."""
        options.setdefault(
            "viewport", {"width": 390, "height": 780} if phone else {"width": 1280, "height": 800}
        )
        context = beside.context if beside else self._browser.new_context(has_touch=phone, **options)
        page = context.new_page()
        page.set_default_timeout(120_000)
        page.on("pageerror", lambda error: self.faults.append(str(error)))
        page.on("console", lambda message: self._hear(message, refusals))
        return page

    def close(self) -> None:
        """All pages, and what they stored."""
        for context in self._browser.contexts:
            context.close()

    def _hear(self, message: ConsoleMessage, refusals: bool) -> None:
        if message.type == "error" and not (refusals and message.text.startswith("Failed to load resource")):
            self.faults.append(message.text)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """A real Chromium, started once in a file of tests."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture
def pages(browser: Browser) -> Iterator[Pages]:
    """Pages of this test alone; faults on them fail it."""
    opened = Pages(browser)
    yield opened
    opened.close()
    assert opened.faults == []


@pytest.fixture
def page(pages: Pages) -> Page:
    """One page, of a phone's size."""
    return pages.open(phone=True)
