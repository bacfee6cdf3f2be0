"""Replicas that operators added, drained or removed, and the term of the leader.

Down again, the fleet is what the setting names.
"""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "replicas",
        sa.Column("url", sa.Text, nullable=False),
        sa.Column("state", sa.Text, nullable=False),
        sa.Column("changed_at", sa.DateTime(timezone=True), server_default=sa.func.now(), nullable=False),
        sa.PrimaryKeyConstraint("url", name="pk_replicas"),
        sa.CheckConstraint("state IN ('serving', 'draining', 'removed')", name=op.f("ck_replicas_state")),
    )
    op.add_column("deployment", sa.Column("leader_term", sa.BigInteger, server_default="0", nullable=False))


def downgrade() -> None:
    op.drop_column("deployment", "leader_term")
    op.drop_table("replicas")
