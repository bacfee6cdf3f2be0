"""What must be there before the parts can start: the base model's folder, all tables, the first live policy, an operator's key.

`ratchet up` does it all on one machine; `ratchet prepare` does it once where each part runs by itself, in containers.
"""

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from sqlalchemy import select

from service import base_model, preflight, schema
from service.database import check_connection, sync_engine, sync_sessions
from service.errors import SettingsError
from service.keyring import PREFIX, hash_key, key_row
from service.policies import ensure_base
from service.processes import PartEnded
from service.settings import Settings
from service.tables import Key

FIRST_OPERATOR = "operator"
"""Account of the key that `ratchet prepare` makes known."""
LEAST_KEY = 40
"""Characters of such a key: what `openssl rand -base64 32` gives, and the prefix."""
DATABASE_SECONDS = 60.0


def prepare(settings: Settings) -> None:
    """Everything; to do it again changes nothing. Raises SettingsError, PartEnded."""
    if settings.database_url is None:
        raise SettingsError(
            "DATABASE_URL: needed where the parts run by themselves; `ratchet up` embeds one."
        )
    check_key(settings)
    preflight.check_rank(settings)
    settings.state.mkdir(parents=True, exist_ok=True)
    preflight.check_disk(settings)
    wait_for_database(settings)
    prepare_database(settings, prepare_model(settings, subprocess.call))
    add_operator(settings)


def prepare_model(settings: Settings, run: Callable[[list[str]], int]) -> Path:
    """The base model's folder; the starter is made where it is not there yet, and shows its own progress."""
    folder = base_model.folder_of(settings)
    if settings.model == base_model.STARTER and not (folder / "starter.json").exists():
        command = [
            sys.executable,
            "-m",
            "trainer.starter",
            "--out",
            str(folder),
            "--seed",
            str(settings.seed),
        ]
        if status := run(command):
            raise PartEnded(f"Making the starter model ended with exit status {status}.")
    return folder


def prepare_database(settings: Settings, model: Path) -> None:
    """All tables, and the base model as the first live policy."""
    schema.upgrade(settings)
    engine = sync_engine(settings)
    try:
        with sync_sessions(engine).begin() as session:
            ensure_base(session, str(model))
    finally:
        engine.dispose()


def wait_for_database(settings: Settings) -> None:
    """Raises SettingsError where it does not answer for a minute: it may be starting too."""
    deadline = time.monotonic() + DATABASE_SECONDS
    while True:
        try:
            return check_connection(settings)
        except SettingsError:
            if time.monotonic() > deadline:
                raise
        time.sleep(1)


def check_key(settings: Settings) -> None:
    """Raises SettingsError for a key that could be guessed, or that the service would not take for one."""
    if settings.key is None:
        return
    key = settings.key.get_secret_value()
    if not key.startswith(PREFIX) or len(key) < LEAST_KEY:
        raise SettingsError(
            f"RATCHET_KEY: the first operator's key must begin with {PREFIX} and be random: "
            f'`echo "{PREFIX}$(openssl rand -base64 32)"` makes one.'
        )


def add_operator(settings: Settings) -> None:
    """Make RATCHET_KEY an operator's key, where there is one. One that was revoked stays so."""
    if settings.key is None:
        return
    key = settings.key.get_secret_value()
    engine = sync_engine(settings)
    try:
        with sync_sessions(engine).begin() as session:
            if session.scalar(select(Key.id).where(Key.sha256 == hash_key(key))) is None:
                session.add(key_row(key, FIRST_OPERATOR, "operator"))
    finally:
        engine.dispose()
