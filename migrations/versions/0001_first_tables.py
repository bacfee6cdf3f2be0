"""The first tables: users, prompts, policies, deployment, replies, comparisons, votes, cycles.

Policies name the cycle that made them and cycles the policy that they made: one foreign key comes later.
"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import JSONB

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

POLICY_STATES = "'published', 'verified', 'rejected', 'refused'"
CYCLE_STAGES = (
    "'requested', 'snapshot', 'reward_model', 'ppo', 'gate', 'swap', 'promoted', 'rejected', 'failed'"
)


def number() -> "sa.Column[int]":
    return sa.Column("id", sa.BigInteger, sa.Identity(), nullable=False)


def time(name: str) -> "sa.Column[sa.DateTime]":
    return sa.Column(name, sa.DateTime(timezone=True), server_default=sa.func.now(), nullable=False)


def upgrade() -> None:
    op.create_table(
        "users",
        number(),
        sa.Column("name", sa.Text, nullable=False),
        time("created_at"),
        sa.PrimaryKeyConstraint("id", name="pk_users"),
        sa.UniqueConstraint("name", name="uq_users_name"),
    )
    op.create_table(
        "prompts",
        number(),
        sa.Column("user_id", sa.BigInteger, nullable=False),
        sa.Column("messages", JSONB, nullable=False),
        time("created_at"),
        sa.PrimaryKeyConstraint("id", name="pk_prompts"),
        sa.ForeignKeyConstraint(["user_id"], ["users.id"], name="fk_prompts_user_id_users"),
    )
    op.create_index("ix_prompts_user_id", "prompts", ["user_id"])
    op.create_table(
        "policies",
        sa.Column("name", sa.Text, nullable=False),
        sa.Column("parent", sa.Text),
        sa.Column("path", sa.Text, nullable=False),
        sa.Column("cycle_id", sa.BigInteger),
        sa.Column("state", sa.Text, nullable=False),
        sa.Column("reason", sa.Text),
        sa.Column("manifest", JSONB, nullable=False),
        time("created_at"),
        sa.PrimaryKeyConstraint("name", name="pk_policies"),
        sa.ForeignKeyConstraint(["parent"], ["policies.name"], name="fk_policies_parent_policies"),
        sa.CheckConstraint(f"state IN ({POLICY_STATES})", name=op.f("ck_policies_state")),
    )
    op.create_index("ix_policies_cycle_id", "policies", ["cycle_id"])
    op.create_table(
        "snapshots",
        sa.Column("sha256", sa.Text, nullable=False),
        sa.Column("num_votes", sa.Integer, nullable=False),
        sa.Column("vote_ids", JSONB, nullable=False),
        time("created_at"),
        sa.PrimaryKeyConstraint("sha256", name="pk_snapshots"),
    )
    op.create_table(
        "cycles",
        number(),
        sa.Column("trigger", sa.Text, nullable=False),
        sa.Column("stage", sa.Text, nullable=False),
        sa.Column("reason", sa.Text),
        sa.Column("snapshot_sha256", sa.Text),
        sa.Column("policy", sa.Text),
        sa.Column("metrics", JSONB, server_default="{}", nullable=False),
        time("created_at"),
        sa.Column("ended_at", sa.DateTime(timezone=True)),
        sa.PrimaryKeyConstraint("id", name="pk_cycles"),
        sa.ForeignKeyConstraint(
            ["snapshot_sha256"], ["snapshots.sha256"], name="fk_cycles_snapshot_sha256_snapshots"
        ),
        sa.ForeignKeyConstraint(["policy"], ["policies.name"], name="fk_cycles_policy_policies"),
        sa.CheckConstraint(f"stage IN ({CYCLE_STAGES})", name=op.f("ck_cycles_stage")),
    )
    op.create_index("ix_cycles_open", "cycles", ["id"], postgresql_where=sa.text("ended_at IS NULL"))
    op.create_foreign_key("fk_policies_cycle_id_cycles", "policies", "cycles", ["cycle_id"], ["id"])
    op.create_table(
        "deployment",
        sa.Column("id", sa.SmallInteger, autoincrement=False, nullable=False),
        sa.Column("live", sa.Text, nullable=False),
        sa.Column("challenger", sa.Text),
        sa.Column("previous", sa.Text),
        time("changed_at"),
        sa.PrimaryKeyConstraint("id", name="pk_deployment"),
        sa.ForeignKeyConstraint(["live"], ["policies.name"], name="fk_deployment_live_policies"),
        sa.ForeignKeyConstraint(["challenger"], ["policies.name"], name="fk_deployment_challenger_policies"),
        sa.ForeignKeyConstraint(["previous"], ["policies.name"], name="fk_deployment_previous_policies"),
        sa.CheckConstraint("id = 1", name=op.f("ck_deployment_one_row")),
    )
    op.create_table(
        "replies",
        sa.Column("id", sa.Text, nullable=False),
        sa.Column("prompt_id", sa.BigInteger, nullable=False),
        sa.Column("policy", sa.Text, nullable=False),
        sa.Column("sampling", JSONB, nullable=False),
        sa.Column("content", sa.Text),
        sa.Column("finish_reason", sa.Text),
        sa.Column("prompt_tokens", sa.Integer),
        sa.Column("completion_tokens", sa.Integer),
        time("created_at"),
        sa.Column("ended_at", sa.DateTime(timezone=True)),
        sa.PrimaryKeyConstraint("id", name="pk_replies"),
        sa.ForeignKeyConstraint(["prompt_id"], ["prompts.id"], name="fk_replies_prompt_id_prompts"),
        sa.ForeignKeyConstraint(["policy"], ["policies.name"], name="fk_replies_policy_policies"),
    )
    op.create_index("ix_replies_prompt_id", "replies", ["prompt_id"])
    op.create_index("ix_replies_policy", "replies", ["policy"])
    op.create_table(
        "comparisons",
        sa.Column("id", sa.Text, nullable=False),
        sa.Column("prompt_id", sa.BigInteger, nullable=False),
        sa.Column("user_id", sa.BigInteger, nullable=False),
        sa.Column("reason", sa.Text, nullable=False),
        sa.Column("propensity", sa.Float, nullable=False),
        time("created_at"),
        sa.PrimaryKeyConstraint("id", name="pk_comparisons"),
        sa.ForeignKeyConstraint(["prompt_id"], ["prompts.id"], name="fk_comparisons_prompt_id_prompts"),
        sa.ForeignKeyConstraint(["user_id"], ["users.id"], name="fk_comparisons_user_id_users"),
    )
    op.create_index("ix_comparisons_prompt_id", "comparisons", ["prompt_id"])
    op.create_index("ix_comparisons_user_id", "comparisons", ["user_id"])
    op.create_table(
        "comparison_replies",
        sa.Column("comparison_id", sa.Text, nullable=False),
        sa.Column("position", sa.SmallInteger, nullable=False),
        sa.Column("reply_id", sa.Text, nullable=False),
        sa.PrimaryKeyConstraint("comparison_id", "position", name="pk_comparison_replies"),
        sa.ForeignKeyConstraint(
            ["comparison_id"], ["comparisons.id"], name="fk_comparison_replies_comparison_id_comparisons"
        ),
        sa.ForeignKeyConstraint(["reply_id"], ["replies.id"], name="fk_comparison_replies_reply_id_replies"),
        sa.UniqueConstraint("reply_id", name="uq_comparison_replies_reply_id"),
    )
    op.create_table(
        "votes",
        number(),
        sa.Column("comparison_id", sa.Text, nullable=False),
        sa.Column("user_id", sa.BigInteger, nullable=False),
        sa.Column("choice", sa.Text, nullable=False),
        sa.Column("comment", sa.Text),
        sa.Column("tags", JSONB, nullable=False),
        time("created_at"),
        time("updated_at"),
        sa.PrimaryKeyConstraint("id", name="pk_votes"),
        sa.ForeignKeyConstraint(
            ["comparison_id"], ["comparisons.id"], name="fk_votes_comparison_id_comparisons"
        ),
        sa.ForeignKeyConstraint(["user_id"], ["users.id"], name="fk_votes_user_id_users"),
        sa.UniqueConstraint("comparison_id", "user_id", name="uq_votes_comparison_id_user_id"),
        sa.CheckConstraint("choice IN ('first', 'second', 'tie', 'neither')", name=op.f("ck_votes_choice")),
    )
    op.create_index("ix_votes_created_at", "votes", ["created_at"])
    op.create_index("ix_votes_user_id", "votes", ["user_id"])


def downgrade() -> None:
    op.drop_constraint("fk_policies_cycle_id_cycles", "policies", type_="foreignkey")
    for name in ("votes", "comparison_replies", "comparisons", "replies", "deployment"):
        op.drop_table(name)
    for name in ("cycles", "snapshots", "policies", "prompts", "users"):
        op.drop_table(name)
