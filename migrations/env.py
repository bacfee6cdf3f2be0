"""What Alembic runs for every command. The database is the one that the settings name.

One transaction for all migrations: a failed one leaves nothing half-done. An advisory lock makes a second
process that migrates at the same moment wait, and then find nothing to do.
"""

from alembic import context
from sqlalchemy import text

from service.database import sync_engine
from service.settings import get_settings
from service.tables import Table

MIGRATION_LOCK = 7_248_201
"""Key of the advisory lock; any number that nothing else uses."""


def run() -> None:
    if context.is_offline_mode():
        raise SystemExit("Ratchet's migrations run against a database; --sql is not supported.")
    engine = sync_engine(context.config.attributes.get("settings") or get_settings())
    try:
        with engine.begin() as connection:
            connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": MIGRATION_LOCK})
            context.configure(
                connection=connection, target_metadata=Table.metadata, compare_server_default=True
            )
            context.run_migrations()
    finally:
        engine.dispose()


run()
