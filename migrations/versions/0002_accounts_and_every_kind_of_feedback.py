"""Accounts and keys, conversations, rankings, demonstrations, imports, history; a snapshot's votes as rows.

Down again, what the older tables cannot hold goes: imported replies, comparisons of more than two, accounts' users.
"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import JSONB

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def number() -> "sa.Column[int]":
    return sa.Column("id", sa.BigInteger, sa.Identity(), nullable=False)


def time(name: str) -> "sa.Column[sa.DateTime]":
    return sa.Column(name, sa.DateTime(timezone=True), server_default=sa.func.now(), nullable=False)


def reference(table: str, column: str, to: str, **options: str) -> sa.ForeignKeyConstraint:
    target = to.split(".")[0]
    return sa.ForeignKeyConstraint([column], [to], name=f"fk_{table}_{column}_{target}", **options)


def upgrade() -> None:
    _accounts()
    _conversations()
    _imports()
    _feedback()
    _snapshot_votes()


def _accounts() -> None:
    op.add_column("users", sa.Column("account", sa.Text, server_default="", nullable=False))
    op.add_column("users", sa.Column("compares", sa.Boolean, server_default=sa.true(), nullable=False))
    op.drop_constraint("uq_users_name", "users")
    op.create_unique_constraint("uq_users_account_name", "users", ["account", "name"])
    op.create_table(
        "keys",
        number(),
        sa.Column("account", sa.Text, nullable=False),
        sa.Column("role", sa.Text, nullable=False),
        sa.Column("sha256", sa.Text, nullable=False),
        sa.Column("hint", sa.Text, nullable=False),
        time("created_at"),
        sa.Column("expires_at", sa.DateTime(timezone=True)),
        sa.Column("revoked_at", sa.DateTime(timezone=True)),
        sa.PrimaryKeyConstraint("id", name="pk_keys"),
        sa.UniqueConstraint("sha256", name="uq_keys_sha256"),
        sa.CheckConstraint("role IN ('user', 'labeler', 'operator')", name=op.f("ck_keys_role")),
    )


def _conversations() -> None:
    op.create_table(
        "conversations",
        sa.Column("id", sa.Text, nullable=False),
        sa.Column("user_id", sa.BigInteger, nullable=False),
        time("created_at"),
        sa.PrimaryKeyConstraint("id", name="pk_conversations"),
        reference("conversations", "user_id", "users.id"),
    )
    op.create_index(
        "ix_conversations_user_id_created_at_id", "conversations", ["user_id", "created_at", "id"]
    )
    op.add_column("prompts", sa.Column("conversation_id", sa.Text))
    op.create_foreign_key(
        "fk_prompts_conversation_id_conversations", "prompts", "conversations", ["conversation_id"], ["id"]
    )
    op.create_index(
        "ix_prompts_conversation_id_id",
        "prompts",
        ["conversation_id", "id"],
        postgresql_where=sa.text("conversation_id IS NOT NULL"),
    )


def _imports() -> None:
    op.create_table(
        "imports",
        number(),
        sa.Column("name", sa.Text, nullable=False),
        sa.Column("format", sa.Text, nullable=False),
        sa.Column("sha256", sa.Text, nullable=False),
        sa.Column("num_rows", sa.Integer, nullable=False),
        sa.Column("num_new", sa.Integer, nullable=False),
        time("created_at"),
        sa.PrimaryKeyConstraint("id", name="pk_imports"),
        sa.UniqueConstraint("format", "sha256", name="uq_imports_format_sha256"),
    )
    op.alter_column("replies", "policy", nullable=True)
    op.add_column("replies", sa.Column("imported_policy", sa.Text))
    op.add_column("comparisons", sa.Column("import_id", sa.BigInteger))
    op.create_foreign_key("fk_comparisons_import_id_imports", "comparisons", "imports", ["import_id"], ["id"])
    op.create_index("ix_comparisons_import_id", "comparisons", ["import_id"])
    op.create_index("ix_comparisons_user_id_created_at", "comparisons", ["user_id", "created_at"])
    op.drop_index("ix_comparisons_user_id", "comparisons")


def _feedback() -> None:
    op.create_table(
        "rankings",
        number(),
        sa.Column("comparison_id", sa.Text, nullable=False),
        sa.Column("user_id", sa.BigInteger, nullable=False),
        sa.Column("ranks", JSONB, nullable=False),
        sa.Column("comment", sa.Text),
        sa.Column("tags", JSONB, nullable=False),
        time("created_at"),
        time("updated_at"),
        sa.PrimaryKeyConstraint("id", name="pk_rankings"),
        reference("rankings", "comparison_id", "comparisons.id"),
        reference("rankings", "user_id", "users.id"),
        sa.UniqueConstraint("comparison_id", "user_id", name="uq_rankings_comparison_id_user_id"),
    )
    op.create_index("ix_rankings_user_id", "rankings", ["user_id"])
    op.create_table(
        "feedback_events",
        number(),
        sa.Column("comparison_id", sa.Text, nullable=False),
        sa.Column("user_id", sa.BigInteger, nullable=False),
        sa.Column("kind", sa.Text, nullable=False),
        sa.Column("action", sa.Text, nullable=False),
        sa.Column("content", JSONB, nullable=False),
        time("created_at"),
        sa.PrimaryKeyConstraint("id", name="pk_feedback_events"),
        reference("feedback_events", "comparison_id", "comparisons.id"),
        reference("feedback_events", "user_id", "users.id"),
        sa.CheckConstraint("kind IN ('vote', 'ranking')", name=op.f("ck_feedback_events_kind")),
        sa.CheckConstraint(
            "action IN ('given', 'revised', 'undone')", name=op.f("ck_feedback_events_action")
        ),
    )
    op.create_index(
        "ix_feedback_events_comparison_id_user_id", "feedback_events", ["comparison_id", "user_id"]
    )
    op.create_index("ix_feedback_events_user_id", "feedback_events", ["user_id"])
    op.create_table(
        "demonstrations",
        sa.Column("id", sa.Text, nullable=False),
        sa.Column("prompt_id", sa.BigInteger, nullable=False),
        sa.Column("user_id", sa.BigInteger, nullable=False),
        sa.Column("content", sa.Text, nullable=False),
        sa.Column("corrected", sa.Text),
        sa.Column("corrects", sa.Text),
        sa.Column("comment", sa.Text),
        sa.Column("tags", JSONB, nullable=False),
        sa.Column("import_id", sa.BigInteger),
        time("created_at"),
        sa.PrimaryKeyConstraint("id", name="pk_demonstrations"),
        reference("demonstrations", "prompt_id", "prompts.id"),
        reference("demonstrations", "user_id", "users.id"),
        reference("demonstrations", "corrects", "replies.id", ondelete="SET NULL"),
        reference("demonstrations", "import_id", "imports.id"),
    )
    op.create_index("ix_demonstrations_prompt_id", "demonstrations", ["prompt_id"])
    op.create_index(
        "ix_demonstrations_user_id_created_at_id", "demonstrations", ["user_id", "created_at", "id"]
    )
    op.create_index("ix_demonstrations_corrects", "demonstrations", ["corrects"])
    op.create_index("ix_demonstrations_import_id", "demonstrations", ["import_id"])
    op.create_table(
        "idempotent_calls",
        sa.Column("user_id", sa.BigInteger, nullable=False),
        sa.Column("key", sa.Text, nullable=False),
        sa.Column("request_sha256", sa.Text, nullable=False),
        sa.Column("answer", JSONB, nullable=False),
        time("created_at"),
        sa.PrimaryKeyConstraint("user_id", "key", name="pk_idempotent_calls"),
        reference("idempotent_calls", "user_id", "users.id"),
    )
    op.create_index("ix_idempotent_calls_created_at", "idempotent_calls", ["created_at"])


def _snapshot_votes() -> None:
    op.create_table(
        "snapshot_votes",
        sa.Column("sha256", sa.Text, nullable=False),
        sa.Column("vote_id", sa.BigInteger, nullable=False),
        sa.PrimaryKeyConstraint("sha256", "vote_id", name="pk_snapshot_votes"),
        reference("snapshot_votes", "sha256", "snapshots.sha256"),
    )
    op.create_index("ix_snapshot_votes_vote_id", "snapshot_votes", ["vote_id"])
    op.create_table(
        "removed_votes",
        sa.Column("vote_id", sa.BigInteger, autoincrement=False, nullable=False),
        time("removed_at"),
        sa.Column("scrubbed_at", sa.DateTime(timezone=True)),
        sa.PrimaryKeyConstraint("vote_id", name="pk_removed_votes"),
    )
    op.create_index(
        "ix_removed_votes_open", "removed_votes", ["vote_id"], postgresql_where=sa.text("scrubbed_at IS NULL")
    )
    op.execute(
        "INSERT INTO snapshot_votes (sha256, vote_id) "
        "SELECT DISTINCT sha256, vote_id::bigint FROM snapshots, jsonb_array_elements_text(vote_ids) AS vote_id"
    )
    op.drop_column("snapshots", "vote_ids")


def downgrade() -> None:
    op.add_column("snapshots", sa.Column("vote_ids", JSONB, server_default="[]", nullable=False))
    op.execute(
        "UPDATE snapshots SET vote_ids = (SELECT coalesce(jsonb_agg(vote_id ORDER BY vote_id), '[]') "
        "FROM snapshot_votes WHERE snapshot_votes.sha256 = snapshots.sha256)"
    )
    op.alter_column("snapshots", "vote_ids", server_default=None)
    for table in (
        "snapshot_votes",
        "removed_votes",
        "idempotent_calls",
        "demonstrations",
        "feedback_events",
        "rankings",
    ):
        op.drop_table(table)
    _remove_what_has_no_place()
    op.create_index("ix_comparisons_user_id", "comparisons", ["user_id"])
    op.drop_index("ix_comparisons_user_id_created_at", "comparisons")
    op.drop_column("comparisons", "import_id")
    op.drop_column("replies", "imported_policy")
    op.alter_column("replies", "policy", nullable=False)
    op.drop_column("prompts", "conversation_id")
    for table in ("imports", "conversations", "keys"):
        op.drop_table(table)
    op.drop_constraint("uq_users_account_name", "users")
    op.create_unique_constraint("uq_users_name", "users", ["name"])
    op.drop_column("users", "compares")
    op.drop_column("users", "account")


def _remove_what_has_no_place() -> None:
    """Users of accounts keep their rows under `account/name`; imports and comparisons of more than two go."""
    op.execute("UPDATE users SET name = account || '/' || name WHERE account <> ''")
    op.execute(
        "CREATE TEMPORARY TABLE gone ON COMMIT DROP AS SELECT id FROM comparisons WHERE import_id IS NOT NULL "
        "OR (SELECT count(*) FROM comparison_replies WHERE comparison_id = comparisons.id) > 2"
    )
    op.execute(
        "CREATE TEMPORARY TABLE gone_replies ON COMMIT DROP AS SELECT reply_id FROM comparison_replies "
        "WHERE comparison_id IN (SELECT id FROM gone) UNION SELECT id FROM replies WHERE policy IS NULL"
    )
    for table in ("votes", "comparison_replies"):
        op.execute(f"DELETE FROM {table} WHERE comparison_id IN (SELECT id FROM gone)")
    op.execute("DELETE FROM comparisons WHERE id IN (SELECT id FROM gone)")
    op.execute("DELETE FROM replies WHERE id IN (SELECT reply_id FROM gone_replies)")
