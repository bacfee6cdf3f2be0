"""The embedded PostgreSQL: a real server in a folder closed to others, killed and started again."""

import os
import signal
import stat
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import psycopg
import pytest

from service import embedded
from service.database import database_url, password_file
from service.errors import SettingsError
from service.settings import Settings
from tests.engine import free_port

pytestmark = pytest.mark.database


@pytest.fixture
def settings(tmp_path: Path) -> Iterator[Settings]:
    closed = tmp_path / "closed"  # to every other user, as a clone in /root is
    closed.mkdir(mode=0o700)
    (closed / "state").mkdir(mode=0o700)
    settings = Settings(state=closed / "state", database_port=free_port())
    yield settings
    embedded.end_leftovers(embedded.data_folder(settings))


@contextmanager
def running(settings: Settings) -> Iterator["subprocess.Popen[bytes]"]:
    embedded.prepare(settings)
    with (settings.state / "log").open("ab") as log:
        server = subprocess.Popen(embedded.command(settings), stderr=log, cwd="/")
    try:
        embedded.wait_until_ready(settings, lambda: server.poll() is None)
        yield server
    finally:
        server.send_signal(signal.SIGINT)
        server.wait(120)


def ask(settings: Settings, query: str) -> str:
    url = database_url(settings).set(drivername="postgresql").render_as_string(hide_password=False)
    with psycopg.connect(url) as connection:
        row = connection.execute(query.encode()).fetchone() if query.startswith(("SELECT", "SHOW")) else None
        if row is None:
            connection.execute(query.encode())
    return str(row[0]) if row else ""


def write_a_row(settings: Settings) -> None:
    ask(settings, "CREATE TABLE kept AS VALUES ('a row')")


def test_it_runs_in_a_folder_closed_to_others_and_stops_cleanly(settings: Settings) -> None:
    with running(settings) as server:
        assert ask(settings, "SHOW server_encoding") == "UTF8"
        assert ask(settings, "SHOW fsync") == "on"
        assert ask(settings, "SHOW listen_addresses") == "127.0.0.1"
        assert ask(settings, "SELECT 'a' < 'B' COLLATE \"default\"") == "False"  # C order, on every machine
    assert server.returncode == 0
    assert stat.S_IMODE(password_file(settings).stat().st_mode) == 0o600


@pytest.mark.skipif(os.geteuid() != 0, reason="only root changes users")
def test_as_root_it_runs_as_somebody_else_with_one_capability_at_most(settings: Settings) -> None:
    with running(settings) as server:
        assert psutil.Process(server.pid).uids().effective != 0
        status = Path(f"/proc/{server.pid}/status").read_text()
    capabilities = int(status.split("CapEff:")[1].split()[0], 16)
    assert capabilities.bit_count() <= 1


def test_nobody_gets_in_without_the_password(settings: Settings) -> None:
    with running(settings):
        url = database_url(settings).set(drivername="postgresql", password="wrong")
        with pytest.raises(psycopg.OperationalError, match="password"):
            psycopg.connect(url.render_as_string(hide_password=False))


def test_rows_outlive_a_killed_server(settings: Settings) -> None:
    with running(settings) as server:
        write_a_row(settings)
        server.kill()
        server.wait(60)
    with running(settings):
        assert ask(settings, "SELECT column1 FROM kept") == "a row"


def test_a_server_that_still_runs_is_ended_by_the_next_start(settings: Settings) -> None:
    with running(settings) as old:
        write_a_row(settings)
        with running(settings):
            assert old.wait(60) == 0
            assert ask(settings, "SELECT column1 FROM kept") == "a row"


def test_a_lock_file_with_the_pid_of_another_program_is_no_hindrance(settings: Settings) -> None:
    with running(settings):
        lock = embedded.data_folder(settings) / "postmaster.pid"
        lines = lock.read_text().splitlines()
    lock.write_text("\n".join([str(os.getpid()), *lines[1:]]))
    with running(settings):
        assert ask(settings, "SELECT 1") == "1"


def test_a_set_up_that_was_cut_off_is_done_again(settings: Settings) -> None:
    half = settings.state / "postgres.new"
    half.mkdir()
    (half / "PG_VERSION").write_text("18\n")
    with running(settings):
        assert ask(settings, "SELECT 1") == "1"
    assert not half.exists()


def test_a_lost_password_is_told(settings: Settings) -> None:
    with running(settings):
        pass
    password_file(settings).unlink()
    with pytest.raises(SettingsError, match=r"^RATCHET_STATE: .*postgres\.password is missing"):
        embedded.prepare(settings)


def test_data_of_another_version_is_told(settings: Settings) -> None:
    with running(settings):
        pass
    (embedded.data_folder(settings) / "PG_VERSION").write_text("12\n")
    with pytest.raises(
        SettingsError, match=r"^RATCHET_STATE: .* made by PostgreSQL 12, which is not installed"
    ):
        embedded.command(settings)


def test_what_users_write_does_not_reach_the_log(settings: Settings) -> None:
    with running(settings):
        ask(settings, "CREATE TABLE names (name text PRIMARY KEY)")
        ask(settings, "INSERT INTO names VALUES ('geheim')")
        with pytest.raises(psycopg.errors.UniqueViolation):
            ask(settings, "INSERT INTO names VALUES ('geheim')")
    log = (settings.state / "log").read_text()
    assert "duplicate key" in log
    assert "geheim" not in log
