"""The way to PostgreSQL: its URL, engines and session factories. Used by every process; knows no table.

One SQL dialect and one driver (psycopg 3: async in the service, sync in the trainer and in migrations).
"""

from pathlib import Path

from sqlalchemy import URL, Engine, create_engine, make_url
from sqlalchemy.exc import ArgumentError, OperationalError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import Session, sessionmaker

from service.errors import SettingsError
from service.settings import Settings

DRIVER = "postgresql+psycopg"
EMBEDDED_NAME = "ratchet"
"""Both the user and the database of the embedded PostgreSQL."""
CONNECT_SECONDS = 5
"""How long one attempt to connect may take."""


def password_file(settings: Settings) -> Path:
    """Where the embedded PostgreSQL's password lies (mode 0600), written on its first start."""
    return settings.state / "postgres.password"


def database_url(settings: Settings) -> URL:
    """The URL to connect to. Raises SettingsError for another kind, or an embedded one never started."""
    if settings.database_url is None:
        return _embedded_url(settings)
    try:
        url = make_url(settings.database_url.get_secret_value())
    except (ArgumentError, ValueError):
        raise SettingsError("DATABASE_URL is not a URL like postgresql://user:password@host/name.") from None
    if url.drivername not in ("postgres", "postgresql", DRIVER):
        raise SettingsError(f"DATABASE_URL must begin with postgresql://, not {url.drivername}://.")
    return url.set(drivername=DRIVER)


def _embedded_url(settings: Settings) -> URL:
    try:
        password = password_file(settings).read_text().strip()
    except FileNotFoundError:
        raise SettingsError(
            f"DATABASE_URL is not set and {settings.state} (RATCHET_STATE) holds no embedded PostgreSQL; "
            "`make up` makes one."
        ) from None
    return URL.create(DRIVER, EMBEDDED_NAME, password, "127.0.0.1", settings.database_port, EMBEDDED_NAME)


def sync_engine(settings: Settings) -> Engine:
    """Connections for the trainer and migrations. Lazy: does not connect yet."""
    return create_engine(
        database_url(settings),
        pool_pre_ping=True,
        hide_parameters=True,
        connect_args={"connect_timeout": CONNECT_SECONDS},
    )


def async_engine(settings: Settings) -> AsyncEngine:
    """Connections for the service. Lazy: does not connect yet."""
    return create_async_engine(
        database_url(settings),
        pool_pre_ping=True,
        hide_parameters=True,
        connect_args={"connect_timeout": CONNECT_SECONDS},
    )


def sync_sessions(engine: Engine) -> sessionmaker[Session]:
    """Sessions whose objects stay readable after commit."""
    return sessionmaker(engine, expire_on_commit=False)


def async_sessions(engine: AsyncEngine) -> async_sessionmaker[AsyncSession]:
    """Sessions whose objects stay readable after commit."""
    return async_sessionmaker(engine, expire_on_commit=False)


def check_connection(settings: Settings) -> None:
    """Connect once. Raises SettingsError, one line without the password, where PostgreSQL does not answer."""
    engine = sync_engine(settings)
    try:
        engine.connect().close()
    except OperationalError as error:
        raise SettingsError(f"DATABASE_URL: {describe_failure(engine.url, error)}") from None
    finally:
        engine.dispose()


def describe_failure(url: URL, error: OperationalError) -> str:
    """Why a connection failed, in one line that holds no password."""
    reason = " ".join(str(error.orig).split()) or "no answer"
    if url.password:
        reason = reason.replace(str(url.password), "***")
    return f"PostgreSQL at {url.host}:{url.port or 5432}/{url.database} cannot be reached ({reason})."
