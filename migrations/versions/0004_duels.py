"""Duels between policies, which comparison belongs to which, and what operators did.

Down again, a policy on trial is a challenger as any other, and one that was rolled back a rejected one.
"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None

STAGES = "stage IN ('requested', 'snapshot', 'reward_model', 'training', 'gate', 'swap', {}'promoted', 'rejected', 'failed')"
STATES = "state IN ('published', 'verified', 'rejected', 'refused'{})"


def replace_check(table: str, name: str, condition: str) -> None:
    op.drop_constraint(op.f(f"ck_{table}_{name}"), table)
    op.create_check_constraint(op.f(f"ck_{table}_{name}"), table, condition)


def upgrade() -> None:
    replace_check("cycles", "stage", STAGES.format("'duel', "))
    replace_check("policies", "state", STATES.format(", 'rolled_back'"))
    op.create_table(
        "duels",
        sa.Column("id", sa.BigInteger, sa.Identity(), nullable=False),
        sa.Column("kind", sa.Text, nullable=False),
        sa.Column("challenger", sa.Text, nullable=False),
        sa.Column("incumbent", sa.Text, nullable=False),
        sa.Column("votes_per_user", sa.Integer, nullable=False),
        sa.Column("outcome", sa.Text),
        sa.Column("reason", sa.Text),
        sa.Column("metrics", postgresql.JSONB, server_default="{}", nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.func.now(), nullable=False),
        sa.Column("ended_at", sa.DateTime(timezone=True)),
        sa.PrimaryKeyConstraint("id", name="pk_duels"),
        sa.ForeignKeyConstraint(["challenger"], ["policies.name"], name="fk_duels_challenger_policies"),
        sa.ForeignKeyConstraint(["incumbent"], ["policies.name"], name="fk_duels_incumbent_policies"),
        sa.CheckConstraint("kind IN ('trial', 'watch')", name=op.f("ck_duels_kind")),
        sa.CheckConstraint(
            "outcome IN ('better', 'worse', 'undecided', 'stopped')", name=op.f("ck_duels_outcome")
        ),
    )
    op.create_index(
        "uq_duels_open",
        "duels",
        [sa.text("(ended_at IS NULL)")],
        unique=True,
        postgresql_where=sa.text("ended_at IS NULL"),
    )
    op.add_column("comparisons", sa.Column("duel_id", sa.BigInteger))
    op.create_foreign_key("fk_comparisons_duel_id_duels", "comparisons", "duels", ["duel_id"], ["id"])
    op.create_index(
        "ix_comparisons_duel_id",
        "comparisons",
        ["duel_id"],
        postgresql_where=sa.text("duel_id IS NOT NULL"),
    )
    op.create_table(
        "operator_actions",
        sa.Column("id", sa.BigInteger, sa.Identity(), nullable=False),
        sa.Column("account", sa.Text, nullable=False),
        sa.Column("action", sa.Text, nullable=False),
        sa.Column("subject", sa.Text),
        sa.Column("reason", sa.Text),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.func.now(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_operator_actions"),
    )


def downgrade() -> None:
    op.drop_table("operator_actions")
    op.drop_column("comparisons", "duel_id")
    op.drop_table("duels")
    op.execute("UPDATE policies SET state = 'rejected' WHERE state = 'rolled_back'")
    op.execute("UPDATE cycles SET stage = 'swap' WHERE stage = 'duel'")
    replace_check("policies", "state", STATES.format(""))
    replace_check("cycles", "stage", STAGES.format(""))
