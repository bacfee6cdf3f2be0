"""A snapshot holds prompts that nobody judged too, and knows the hash of its feedback without them.

Down again, such prompts stay in the files of snapshots, and are not taken out where a user has them removed.
"""

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None

KINDS = ("vote", "ranking", "demonstration")
TABLES = ("snapshot_feedback", "removed_feedback")


def allow(*kinds: str) -> None:
    listed = ", ".join(map(repr, kinds))
    for table in TABLES:
        op.drop_constraint(op.f(f"ck_{table}_kind"), table)
        op.create_check_constraint(op.f(f"ck_{table}_kind"), table, f"kind IN ({listed})")


def upgrade() -> None:
    allow(*KINDS, "prompt")
    op.add_column("snapshots", sa.Column("feedback_sha256", sa.Text))
    op.execute("UPDATE snapshots SET feedback_sha256 = sha256")
    op.alter_column("snapshots", "feedback_sha256", nullable=False)


def downgrade() -> None:
    op.drop_column("snapshots", "feedback_sha256")
    for table in TABLES:
        op.execute(f"DELETE FROM {table} WHERE kind = 'prompt'")
    allow(*KINDS)
