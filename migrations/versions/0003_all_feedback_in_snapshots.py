"""A snapshot holds rankings and demonstrations too; training is one stage, whatever its method.

Down again, only votes stay on record.
"""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

KINDS = "kind IN ('vote', 'ranking', 'demonstration')"


STAGES = "stage IN ('requested', 'snapshot', 'reward_model', '{}', 'gate', 'swap', 'promoted', 'rejected', 'failed')"


def rename_stage(old: str, new: str) -> None:
    op.drop_constraint(op.f("ck_cycles_stage"), "cycles")
    op.execute(f"UPDATE cycles SET stage = '{new}' WHERE stage = '{old}'")
    op.create_check_constraint(op.f("ck_cycles_stage"), "cycles", STAGES.format(new))


def upgrade() -> None:
    rename_stage("ppo", "training")
    op.create_table(
        "snapshot_feedback",
        sa.Column("sha256", sa.Text, nullable=False),
        sa.Column("kind", sa.Text, nullable=False),
        sa.Column("feedback_id", sa.Text, nullable=False),
        sa.PrimaryKeyConstraint("sha256", "kind", "feedback_id", name="pk_snapshot_feedback"),
        sa.ForeignKeyConstraint(
            ["sha256"], ["snapshots.sha256"], name="fk_snapshot_feedback_sha256_snapshots"
        ),
        sa.CheckConstraint(KINDS, name=op.f("ck_snapshot_feedback_kind")),
    )
    op.create_index("ix_snapshot_feedback_kind_feedback_id", "snapshot_feedback", ["kind", "feedback_id"])
    op.create_table(
        "removed_feedback",
        sa.Column("kind", sa.Text, nullable=False),
        sa.Column("feedback_id", sa.Text, nullable=False),
        sa.Column("removed_at", sa.DateTime(timezone=True), server_default=sa.func.now(), nullable=False),
        sa.Column("scrubbed_at", sa.DateTime(timezone=True)),
        sa.PrimaryKeyConstraint("kind", "feedback_id", name="pk_removed_feedback"),
        sa.CheckConstraint(KINDS, name=op.f("ck_removed_feedback_kind")),
    )
    op.create_index(
        "ix_removed_feedback_open",
        "removed_feedback",
        ["kind", "feedback_id"],
        postgresql_where=sa.text("scrubbed_at IS NULL"),
    )
    op.execute("INSERT INTO snapshot_feedback SELECT sha256, 'vote', vote_id::text FROM snapshot_votes")
    op.execute(
        "INSERT INTO removed_feedback SELECT 'vote', vote_id::text, removed_at, scrubbed_at FROM removed_votes"
    )
    op.drop_table("snapshot_votes")
    op.drop_table("removed_votes")


def downgrade() -> None:
    rename_stage("training", "ppo")
    op.create_table(
        "snapshot_votes",
        sa.Column("sha256", sa.Text, nullable=False),
        sa.Column("vote_id", sa.BigInteger, nullable=False),
        sa.PrimaryKeyConstraint("sha256", "vote_id", name="pk_snapshot_votes"),
        sa.ForeignKeyConstraint(["sha256"], ["snapshots.sha256"], name="fk_snapshot_votes_sha256_snapshots"),
    )
    op.create_index("ix_snapshot_votes_vote_id", "snapshot_votes", ["vote_id"])
    op.create_table(
        "removed_votes",
        sa.Column("vote_id", sa.BigInteger, nullable=False),
        sa.Column("removed_at", sa.DateTime(timezone=True), server_default=sa.func.now(), nullable=False),
        sa.Column("scrubbed_at", sa.DateTime(timezone=True)),
        sa.PrimaryKeyConstraint("vote_id", name="pk_removed_votes"),
    )
    op.create_index(
        "ix_removed_votes_open", "removed_votes", ["vote_id"], postgresql_where=sa.text("scrubbed_at IS NULL")
    )
    op.execute(
        "INSERT INTO snapshot_votes SELECT sha256, feedback_id::bigint FROM snapshot_feedback WHERE kind = 'vote'"
    )
    op.execute(
        "INSERT INTO removed_votes SELECT feedback_id::bigint, removed_at, scrubbed_at FROM removed_feedback "
        "WHERE kind = 'vote'"
    )
    op.drop_table("snapshot_feedback")
    op.drop_table("removed_feedback")
