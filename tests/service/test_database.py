"""The URL that every process connects to."""

from pathlib import Path

import pytest
from pydantic import SecretStr
from sqlalchemy import text

from service.database import async_engine, async_sessions, check_connection, database_url, password_file
from service.errors import SettingsError
from service.settings import Settings
from tests.engine import free_port


def named(url: str) -> Settings:
    return Settings(database_url=SecretStr(url))


@pytest.mark.parametrize("scheme", ["postgres", "postgresql", "postgresql+psycopg"])
def test_every_spelling_of_postgresql_is_taken(scheme: str) -> None:
    url = database_url(named(f"{scheme}://me:a%40b@db.example:5433/ratchet?sslmode=require"))
    assert url.drivername == "postgresql+psycopg"
    assert (url.host, url.port, url.database, url.password) == ("db.example", 5433, "ratchet", "a@b")
    assert url.query == {"sslmode": "require"}


@pytest.mark.parametrize(
    "url", ["mysql://me:geheim@x/y", "sqlite:///x", "not a url geheim", "", "postgresql://me:geheim@x:port/y"]
)
def test_anything_else_is_refused_without_showing_it(url: str) -> None:
    with pytest.raises(SettingsError, match=r"^DATABASE_URL") as refusal:
        database_url(named(url))
    assert "geheim" not in refusal.value.message


def test_the_embedded_ones_password_comes_from_the_state_folder(tmp_path: Path) -> None:
    settings = Settings(state=tmp_path, database_port=7777)
    password_file(settings).write_text("p@ss")
    url = database_url(settings)
    assert (url.username, url.password, url.host, url.port) == ("ratchet", "p@ss", "127.0.0.1", 7777)


def test_an_embedded_one_never_started_is_told(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"DATABASE_URL is not set and .*RATCHET_STATE"):
        database_url(Settings(state=tmp_path))


def test_one_that_does_not_answer_is_one_line_without_the_password() -> None:
    with pytest.raises(
        SettingsError, match=r"^DATABASE_URL: PostgreSQL at 127\.0\.0\.1.*cannot be reached"
    ) as refusal:
        check_connection(named(f"postgresql://me:geheim@127.0.0.1:{free_port()}/x"))
    assert "\n" not in refusal.value.message
    assert "geheim" not in refusal.value.message


@pytest.mark.database
def test_a_wrong_password_is_told_without_showing_it(database: Settings) -> None:
    wrong = database_url(database).set(password="geheim").render_as_string(hide_password=False)
    with pytest.raises(SettingsError, match=r"DATABASE_URL: .*password authentication failed") as refusal:
        check_connection(named(wrong))
    assert "geheim" not in refusal.value.message


@pytest.mark.database
async def test_async_sessions_commit(database: Settings) -> None:
    engine = async_engine(database)
    async with async_sessions(engine).begin() as session:
        await session.execute(text("INSERT INTO users (name) VALUES ('ada')"))
    async with async_sessions(engine)() as session:
        assert (await session.execute(text("SELECT name FROM users"))).scalar_one() == "ada"
    await engine.dispose()
