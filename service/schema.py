"""Brings the database to the newest schema, by the Alembic migrations in `migrations/`."""

from pathlib import Path

from alembic import command
from alembic.config import Config

from service.settings import Settings

MIGRATIONS = Path(__file__).resolve().parent.parent / "migrations"


def alembic_config(settings: Settings) -> Config:
    """Alembic's configuration, made here so that no file names a database. Read by `migrations/env.py`."""
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
    config.attributes["settings"] = settings
    return config


def upgrade(settings: Settings, revision: str = "head") -> None:
    """Apply all migrations up to `revision`; nothing to do is fine. Two callers at once take turns."""
    command.upgrade(alembic_config(settings), revision)


def downgrade(settings: Settings, revision: str = "base") -> None:
    """Take migrations back down to `revision`. Removes data: for tests and operators, never for a start."""
    command.downgrade(alembic_config(settings), revision)
