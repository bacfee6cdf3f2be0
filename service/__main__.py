"""`python -m service`: checks what it needs, then serves. A wrong setting ends it with one line, status 1."""

import gc
import math
import socket
import sys

import uvicorn
from sqlalchemy import select, text
from sqlalchemy.exc import SQLAlchemyError

from service import logs
from service.app import create_app
from service.auth import is_loopback
from service.database import check_connection, sync_engine
from service.errors import SettingsError
from service.settings import Settings, get_settings
from service.tables import Key


def main() -> int:
    """Serve until told to stop. Returns the exit status."""
    try:
        settings = get_settings()
        logs.start(settings.log_format)
        check_connection(settings)
        check_prepared(settings)
        check_exposure(settings)
        listener = listen(settings)
    except SettingsError as error:
        print(f"ratchet service: {error.message}", file=sys.stderr)
        return 1
    app = create_app(settings)
    gc.collect()
    gc.freeze()  # what is there now stays: later collections need not look through it, which took 70 ms each
    config = uvicorn.Config(
        app,
        log_config=None,  # its loggers do as ours
        log_level="info",
        access_log=False,
        timeout_graceful_shutdown=math.ceil(settings.shutdown_seconds),
    )
    server = uvicorn.Server(config)
    server.run(sockets=[listener])
    return 0 if server.started else 1


def check_prepared(settings: Settings) -> None:
    """Raises SettingsError where the database has no tables or no live policy."""
    engine = sync_engine(settings)
    try:
        with engine.connect() as connection:
            prepared = connection.scalar(text("SELECT count(*) FROM deployment"))
    except SQLAlchemyError:
        prepared = 0
    finally:
        engine.dispose()
    if not prepared:
        raise SettingsError(
            "DATABASE_URL: the database is not prepared; `ratchet up` does that, or `ratchet prepare`."
        )


def check_exposure(settings: Settings) -> None:
    """Raises SettingsError where others could reach the service and no operator has a key yet."""
    if is_loopback(settings.host):
        return
    engine = sync_engine(settings)
    try:
        with engine.connect() as connection:
            query = select(Key.id).where(Key.role == "operator", Key.revoked_at.is_(None)).limit(1)
            known = connection.scalar(query)
    finally:
        engine.dispose()
    if known is None:
        raise SettingsError(
            f"RATCHET_HOST: {settings.host} can be reached by others, and there is no operator's key. "
            "Make one first: `ratchet key create --account NAME --role operator`, or `ratchet prepare` with RATCHET_KEY."
        )


def listen(settings: Settings) -> socket.socket:
    """The socket to serve on. Raises SettingsError where the address cannot be had."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((settings.host, settings.port))
        listener.listen(2048)
    except OSError as error:
        listener.close()
        raise SettingsError(
            f"RATCHET_PORT: cannot listen on {settings.host}:{settings.port} (RATCHET_HOST, RATCHET_PORT): "
            f"{error.strerror}."
        ) from None
    return listener


if __name__ == "__main__":
    sys.exit(main())
