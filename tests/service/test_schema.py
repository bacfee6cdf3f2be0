"""The migrations make exactly the tables that the code has, and go down and up again."""

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import Connection, inspect, text

from service import schema
from service.database import sync_engine, sync_sessions
from service.settings import Settings
from service.tables import (
    Comparison,
    ComparisonReply,
    Conversation,
    Cycle,
    Demonstration,
    Deployment,
    Duel,
    FeedbackEvent,
    IdempotentCall,
    Import,
    Key,
    OperatorAction,
    Policy,
    Prompt,
    Ranking,
    RemovedFeedback,
    ReplicaRow,
    Reply,
    Snapshot,
    SnapshotFeedback,
    Table,
    User,
    Vote,
)

pytestmark = pytest.mark.database


def differences(connection: Connection) -> list[object]:
    context = MigrationContext.configure(connection, opts={"compare_server_default": True})
    return list(compare_metadata(context, Table.metadata))


def add_a_row_of_everything(settings: Settings) -> None:
    engine = sync_engine(settings)
    with sync_sessions(engine).begin() as session:
        session.add(User(id=1, name="ada"))
        session.add(Policy(name="policy-000000", path="base", state="verified", manifest={}))
        session.add(Snapshot(sha256="ab", num_votes=1, num_feedback=1, feedback_sha256="cd"))
        session.flush()
        session.add(SnapshotFeedback(sha256="ab", kind="vote", feedback_id="1"))
        session.add(SnapshotFeedback(sha256="ab", kind="prompt", feedback_id="2"))
        session.add(RemovedFeedback(kind="vote", feedback_id="1"))
        session.add(RemovedFeedback(kind="prompt", feedback_id="2"))
        session.add(Cycle(id=1, trigger="votes", stage="promoted", snapshot_sha256="ab"))
        session.flush()
        adapter = Policy(
            name="policy-000001", parent="policy-000000", path="p", state="published", manifest={}
        )
        session.add(adapter)
        session.flush()
        adapter.cycle_id = 1
        session.add(Deployment(id=1, live="policy-000000", challenger="policy-000001"))
        session.add(
            Policy(name="policy-000002", parent="policy-000001", path="q", state="rolled_back", manifest={})
        )
        session.add(Cycle(id=2, trigger="clock", stage="duel"))
        session.flush()
        duel = Duel(
            id=1, kind="trial", challenger="policy-000001", incumbent="policy-000000", votes_per_user=1
        )
        session.add(duel)
        session.add(ReplicaRow(url="http://127.0.0.1:8001", state="draining"))
        session.add(OperatorAction(account="acme", action="rollback", subject="policy-000000"))
        session.add(Key(account="acme", role="user", sha256="ef", hint="rk-ab"))
        session.add(Conversation(id="conv-1", user_id=1))
        session.add(Import(id=1, name="old", format="pairs", sha256="cd", num_rows=1, num_new=1))
        session.flush()
        hello = [{"role": "user", "content": "hello"}]
        session.add(Prompt(id=1, user_id=1, conversation_id="conv-1", messages=hello))
        session.flush()
        session.add(Reply(id="chatcmpl-1", prompt_id=1, policy="policy-000000", sampling={"temperature": 1}))
        session.add(Reply(id="chatcmpl-2", prompt_id=1, imported_policy="gpt", sampling={}))
        session.add(Comparison(id="cmp-1", prompt_id=1, user_id=1, reason="always", propensity=1, duel_id=1))
        session.flush()
        session.add(ComparisonReply(comparison_id="cmp-1", position=0, reply_id="chatcmpl-1"))
        session.add(
            Comparison(id="cmp-2", prompt_id=1, user_id=1, reason="import", propensity=1, import_id=1)
        )
        session.flush()
        session.add(ComparisonReply(comparison_id="cmp-2", position=0, reply_id="chatcmpl-2"))
        session.add(Vote(comparison_id="cmp-1", user_id=1, choice="tie", tags=[]))
        session.add(Ranking(comparison_id="cmp-2", user_id=1, ranks=[1], tags=[]))
        session.add(FeedbackEvent(comparison_id="cmp-2", user_id=1, kind="vote", action="given", content={}))
        session.add(Demonstration(id="dem-1", prompt_id=1, user_id=1, content="hi", tags=[]))
        session.add(IdempotentCall(user_id=1, key="k", request_sha256="12", answer={}))
    engine.dispose()


def test_migrations_and_tables_agree(database: Settings) -> None:
    with sync_engine(database).connect() as connection:
        assert differences(connection) == []


def constraints(connection: Connection, place: str) -> set[tuple[str, str]]:
    """Name and definition of every constraint of the schema `place`."""
    query = (
        "SELECT conname, pg_get_constraintdef(oid) FROM pg_constraint "
        "WHERE connamespace = to_regnamespace(:place)"
    )
    found = {
        (name, definition.replace(f"{place}.", ""))
        for name, definition in connection.execute(text(query), {"place": place})
    }
    return {(name, definition) for name, definition in found if not name.startswith("alembic")}


def test_all_constraints_agree_also_the_checks_that_alembic_does_not_compare(database: Settings) -> None:
    with sync_engine(database).connect() as connection:
        connection.execute(text("CREATE SCHEMA from_tables"))
        Table.metadata.create_all(connection.execution_options(schema_translate_map={None: "from_tables"}))
        assert constraints(connection, "from_tables") == constraints(connection, "public")


def test_migrations_go_down_and_up_again_with_rows_in_every_table(database: Settings) -> None:
    add_a_row_of_everything(database)
    engine = sync_engine(database)
    with engine.connect() as connection:
        for table in Table.metadata.sorted_tables:
            assert connection.execute(table.select()).first() is not None, table.name
    schema.downgrade(database)
    with engine.connect() as connection:
        assert inspect(connection).get_table_names() == ["alembic_version"]
    schema.upgrade(database)
    with engine.connect() as connection:
        assert differences(connection) == []


def test_going_down_one_migration_keeps_what_the_older_tables_can_hold(database: Settings) -> None:
    add_a_row_of_everything(database)
    schema.downgrade(database, "0001")
    engine = sync_engine(database)
    with engine.connect() as connection:
        assert connection.execute(text("SELECT vote_ids FROM snapshots")).scalar_one() == [1]
        assert connection.execute(text("SELECT id FROM comparisons")).scalars().all() == ["cmp-1"]
        assert connection.execute(text("SELECT id FROM replies")).scalars().all() == ["chatcmpl-1"]
        assert connection.execute(text("SELECT count(*) FROM votes")).scalar_one() == 1
    engine.dispose()
    schema.upgrade(database)
    with engine.connect() as connection:
        assert connection.execute(text("SELECT feedback_id FROM snapshot_feedback")).scalars().all() == ["1"]
        found = connection.execute(text("SELECT num_feedback, feedback_sha256 = sha256 FROM snapshots")).all()
        assert found == [(1, True)]


def test_without_duels_what_was_on_trial_is_a_challenger_and_what_was_taken_back_is_rejected(
    database: Settings,
) -> None:
    add_a_row_of_everything(database)
    schema.downgrade(database, "0003")
    with sync_engine(database).connect() as connection:
        assert connection.execute(text("SELECT stage FROM cycles WHERE id = 2")).scalar_one() == "swap"
        states = dict(connection.execute(text("SELECT name, state FROM policies")).all())
        assert states["policy-000002"] == "rejected"
        assert connection.execute(text("SELECT challenger FROM deployment")).scalar_one() == "policy-000001"


def test_an_upgrade_with_nothing_to_do_keeps_the_rows(database: Settings) -> None:
    add_a_row_of_everything(database)
    schema.upgrade(database)
    with sync_engine(database).connect() as connection:
        assert connection.execute(text("SELECT count(*) FROM votes")).scalar_one() == 1
