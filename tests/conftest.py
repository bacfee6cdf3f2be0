"""Fixtures that more than one folder of tests uses: a real PostgreSQL, a real vLLM, an environment without settings."""

import itertools
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import psycopg
import pytest
from pydantic import SecretStr
from sqlalchemy import URL
from xdist.scheduler import LoadScopeScheduling

from service import embedded, schema
from service.database import database_url
from service.settings import ALIASES, Settings, get_settings
from tests.engine import free_port, running_engine

# The same examples each time, however slow the machine is.
hypothesis.settings.register_profile("ratchet", deadline=None, derandomize=True)
hypothesis.settings.load_profile("ratchet")

TEMPLATE = "ratchet_template"
CONNECT_SECONDS = 120
NUMBERS = itertools.count(1)


OF_ONE_ENGINE = (
    *("tests/clients/", "tests/deploy/", "tests/service/test_engine.py"),
    "tests/trainer/test_fleet_rollouts.py",
)


LONG = (
    *OF_ONE_ENGINE,
    "tests/service/test_up.py",
    "tests/service/test_running_loop.py",
    "tests/service/test_fuzz.py",
    "tests/service/test_merged.py",
    "tests/trainer/test_resume.py",
    "tests/trainer/test_families.py",
    "tests/trainer/test_team.py",
)
"""What takes long, and would keep the other workers waiting were it last. (`--no-loadscope-reorder`: pytest-xdist would begin
with the files that have most tests.)"""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The long ones first."""
    items.sort(key=lambda item: not item.nodeid.startswith(LONG))


class SideBySide(LoadScopeScheduling):  # type: ignore[misc]
    """`-n 3`: a file of tests is one worker's, and all that use the real vLLM are the same one's, so that it is started once."""

    def _split_scope(self, nodeid: str) -> str:
        return "engine" if nodeid.startswith(OF_ONE_ENGINE) else nodeid.split("::")[0]


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> SideBySide:
    """How `-n` shares the tests out."""
    return SideBySide(config, log)


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A developer's own environment changes no test."""
    for name in [name for name in os.environ if name.startswith("RATCHET_")] + list(ALIASES):
        monkeypatch.delenv(name, raising=False)
    get_settings.cache_clear()
    yield
    get_settings.cache_clear()


@pytest.fixture(scope="session")
def database_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[URL]:
    """A running PostgreSQL with a migrated template database; gives the URL of its database `postgres`."""
    settings = Settings(state=tmp_path_factory.mktemp("postgres"), database_port=free_port())
    embedded.prepare(settings)
    log = (settings.state / "postgres.log").open("ab")
    # Only here: a test's database need not outlive a power cut, and making one is five times as fast; and what plans are made of
    # is what the test itself has PostgreSQL look at.
    words = [*embedded.command(settings), "-c", "fsync=off", "-c", "autovacuum=off"]
    with log, subprocess.Popen(words, stderr=log, cwd="/") as server:
        try:
            embedded.wait_until_ready(settings, lambda: server.poll() is None)
            url = database_url(settings).set(database="postgres")
            _execute(url, f"CREATE DATABASE {TEMPLATE}")
            schema.upgrade(_settings(url.set(database=TEMPLATE), settings.state))
            yield url
        finally:
            embedded.end_leftovers(embedded.data_folder(settings))


@pytest.fixture
def database(database_server: URL, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Settings]:
    """A fresh database with all tables; gives settings that name it and a state folder (environment too)."""
    name = f"test_{next(NUMBERS)}"
    _execute(database_server, f"CREATE DATABASE {name} TEMPLATE {TEMPLATE}")
    settings = _settings(database_server.set(database=name), tmp_path)
    assert settings.database_url is not None
    monkeypatch.setenv("DATABASE_URL", settings.database_url.get_secret_value())
    monkeypatch.setenv("RATCHET_STATE", str(tmp_path))
    # A machine that stands still for five seconds is what no test is about.
    for module in ("database", "journal"):
        monkeypatch.setattr(f"service.{module}.CONNECT_SECONDS", CONNECT_SECONDS)
    get_settings.cache_clear()
    yield settings
    _execute(database_server, f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # It imports torch, which the process that only shares tests out need not.
    from tests.tiny_model import make_model

    return make_model(tmp_path_factory.mktemp("models") / "base")


@pytest.fixture(scope="session")
def vllm(tiny_model: Path) -> Iterator[str]:
    """The address of one real vLLM, started once in a run."""
    with running_engine(tiny_model, tiny_model.parent / "engine.log") as url:
        yield url


def _settings(url: URL, state: Path) -> Settings:
    return Settings(database_url=SecretStr(url.render_as_string(hide_password=False)), state=state)


def _execute(url: URL, statement: str) -> None:
    target = url.set(drivername="postgresql").render_as_string(hide_password=False)
    with psycopg.connect(target, autocommit=True) as connection:
        connection.execute(statement.encode())
