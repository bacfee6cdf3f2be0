"""How much feedback a snapshot has, which to count took as long as it is large."""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("snapshots", sa.Column("num_feedback", sa.Integer, server_default="0", nullable=False))
    op.execute(
        "UPDATE snapshots SET num_feedback ="
        " (SELECT count(*) FROM snapshot_feedback AS held WHERE held.sha256 = snapshots.sha256)"
    )
    op.alter_column("snapshots", "num_feedback", server_default=None)


def downgrade() -> None:
    op.drop_column("snapshots", "num_feedback")
