"""The database: every table of Ratchet, in the words of the README. Changed only by Alembic migrations.

Ids that leave the service are texts with a prefix (`chatcmpl-`, `cmp-`). All times are UTC.
"""

from datetime import datetime
from typing import Any, TypedDict

from sqlalchemy import (
    BigInteger,
    Boolean,
    CheckConstraint,
    DateTime,
    Float,
    ForeignKey,
    Identity,
    Index,
    Integer,
    MetaData,
    SmallInteger,
    Text,
    UniqueConstraint,
    func,
    text,
    true,
)
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

CHOICES = ("first", "second", "tie", "neither")
SNAPSHOT_KINDS = ("vote", "ranking", "demonstration", "prompt")
CYCLE_STAGES = (
    "requested",
    "snapshot",
    "reward_model",
    "training",
    "gate",
    "swap",
    "duel",
    "promoted",
    "rejected",
    "failed",
)
ROLES = ("user", "labeler", "operator")
POLICY_STATES = ("published", "verified", "rejected", "refused", "rolled_back")
REPLICA_STATES = ("serving", "draining", "removed")
DUEL_KINDS = ("trial", "watch")
DUEL_OUTCOMES = ("better", "worse", "undecided", "stopped")


class Message(TypedDict):
    """One turn of a prompt, as in OpenAI's chat API: content is text."""

    role: str
    content: str


def _one_of(column: str, values: tuple[str, ...], name: str) -> CheckConstraint:
    return CheckConstraint(f"{column} IN ({', '.join(repr(value) for value in values)})", name=name)


class Table(DeclarativeBase):
    """Base of all tables; the naming convention gives every constraint a name that a migration can drop."""

    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(table_name)s_%(column_0_N_name)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
            "ck": "ck_%(table_name)s_%(constraint_name)s",
            "fk": "fk_%(table_name)s_%(column_0_N_name)s_%(referred_table_name)s",
            "pk": "pk_%(table_name)s",
        }
    )
    type_annotation_map = {  # noqa: RUF012 (SQLAlchemy's own protocol)
        str: Text,
        datetime: DateTime(timezone=True),
        dict[str, Any]: JSONB,
        list[Any]: JSONB,
        float: Float,
    }


class User(Table):
    """Somebody who chats and votes: an account (whose key it is; empty without keys), and in it the name
    that the client gives in OpenAI's field `user`."""

    __tablename__ = "users"
    id: Mapped[int] = mapped_column(BigInteger, Identity(), primary_key=True)
    account: Mapped[str] = mapped_column(server_default="")
    name: Mapped[str]
    compares: Mapped[bool] = mapped_column(Boolean, server_default=true())
    """False: opted out of comparisons that the service chooses to show, and of training on prompts without a vote."""
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())
    __table_args__ = (UniqueConstraint("account", "name"),)


class Key(Table):
    """An API key, stored as its hash. What it may do is its role; whose it is, its account."""

    __tablename__ = "keys"
    id: Mapped[int] = mapped_column(BigInteger, Identity(), primary_key=True)
    account: Mapped[str]
    role: Mapped[str]
    sha256: Mapped[str] = mapped_column(unique=True)
    hint: Mapped[str]
    """Its first characters, to tell keys apart."""
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())
    expires_at: Mapped[datetime | None]
    revoked_at: Mapped[datetime | None]
    __table_args__ = (_one_of("role", ROLES, "role"),)


class Conversation(Table):
    """Turns that belong together: each a prompt that names it. Begun and deleted by its owner."""

    __tablename__ = "conversations"
    id: Mapped[str] = mapped_column(primary_key=True)
    user_id: Mapped[int] = mapped_column(ForeignKey("users.id"))
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())
    __table_args__ = (Index(None, "user_id", "created_at", "id"),)


class Prompt(Table):
    """The messages up to and including the user's last one: `[{"role", "content"}, ...]`."""

    __tablename__ = "prompts"
    id: Mapped[int] = mapped_column(BigInteger, Identity(), primary_key=True)
    user_id: Mapped[int] = mapped_column(ForeignKey("users.id"), index=True)
    conversation_id: Mapped[str | None] = mapped_column(ForeignKey("conversations.id"))
    messages: Mapped[list[Any]]
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())
    __table_args__ = (Index(None, "conversation_id", "id", postgresql_where="conversation_id IS NOT NULL"),)


class Policy(Table):
    """An immutable set of weights. `policy-000000` is the base itself; names and paths are never reused."""

    __tablename__ = "policies"
    name: Mapped[str] = mapped_column(primary_key=True)
    parent: Mapped[str | None] = mapped_column(ForeignKey("policies.name"))
    path: Mapped[str]
    """The policy's folder (adapter, `manifest.json`, `READY`), or the base model's folder or id."""
    cycle_id: Mapped[int | None] = mapped_column(ForeignKey("cycles.id", use_alter=True), index=True)
    state: Mapped[str]
    """published: the trainer wrote it. verified: every replica reproduced its probe. rejected: by the users' votes or an
    operator. refused: a check before loading or the probe failed. rolled_back: it was live, and lost to the policy before
    it. `reason` says more."""
    reason: Mapped[str | None]
    manifest: Mapped[dict[str, Any]]
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())
    __table_args__ = (_one_of("state", POLICY_STATES, "state"),)


class Deployment(Table):
    """The pointer: one row. Flipping `live` is the swap. Changes are announced on channel `deployment`."""

    __tablename__ = "deployment"
    id: Mapped[int] = mapped_column(SmallInteger, primary_key=True)
    live: Mapped[str] = mapped_column(ForeignKey("policies.name"))
    challenger: Mapped[str | None] = mapped_column(ForeignKey("policies.name"))
    previous: Mapped[str | None] = mapped_column(ForeignKey("policies.name"))
    changed_at: Mapped[datetime] = mapped_column(server_default=func.now())
    leader_term: Mapped[int] = mapped_column(BigInteger, server_default="0")
    """Counts the leaders. One that lost its lock without noticing finds a higher one here, and does nothing more."""
    __table_args__ = (CheckConstraint("id = 1", name="one_row"),)


class ReplicaRow(Table):
    """An engine that an operator added, drained or removed. It goes before the settings, which name the others."""

    __tablename__ = "replicas"
    url: Mapped[str] = mapped_column(primary_key=True)
    state: Mapped[str]
    """serving: gets requests. draining: no new ones; it is kept ready. removed: none, though the settings name it."""
    changed_at: Mapped[datetime] = mapped_column(server_default=func.now())
    __table_args__ = (_one_of("state", REPLICA_STATES, "state"),)


class Duel(Table):
    """Blind comparisons between two policies, until the votes decide. At most one is open."""

    __tablename__ = "duels"
    id: Mapped[int] = mapped_column(BigInteger, Identity(), primary_key=True)
    kind: Mapped[str]
    """trial: the challenger must win to go live. watch: it is live, and must not lose to the policy before it."""
    challenger: Mapped[str] = mapped_column(ForeignKey("policies.name"))
    incumbent: Mapped[str] = mapped_column(ForeignKey("policies.name"))
    votes_per_user: Mapped[int] = mapped_column(Integer)
    """How many of one user's votes count: the first ones."""
    outcome: Mapped[str | None]
    """Of the challenger: `better`, `worse`, or `undecided` at the cap on votes or time; `stopped`: overtaken by something
    else, as `reason` says."""
    reason: Mapped[str | None]
    metrics: Mapped[dict[str, Any]] = mapped_column(server_default="{}")
    """The tally and what it proves, as of the last look."""
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())
    ended_at: Mapped[datetime | None]
    __table_args__ = (
        _one_of("kind", DUEL_KINDS, "kind"),
        _one_of("outcome", DUEL_OUTCOMES, "outcome"),
        Index("uq_duels_open", text("(ended_at IS NULL)"), unique=True, postgresql_where="ended_at IS NULL"),
    )


class OperatorAction(Table):
    """What an operator did, when and why. Written with what it did, in one transaction."""

    __tablename__ = "operator_actions"
    id: Mapped[int] = mapped_column(BigInteger, Identity(), primary_key=True)
    account: Mapped[str]
    """Whose key it was; empty where none was needed."""
    action: Mapped[str]
    subject: Mapped[str | None]
    """The policy or cycle that it was done to."""
    reason: Mapped[str | None]
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())


class Reply(Table):
    """One complete answer from one policy, with its sampling settings. Stored before its id leaves."""

    __tablename__ = "replies"
    id: Mapped[str] = mapped_column(primary_key=True)
    prompt_id: Mapped[int] = mapped_column(ForeignKey("prompts.id"), index=True)
    policy: Mapped[str | None] = mapped_column(ForeignKey("policies.name"), index=True)
    """Null where it was imported: it is of no policy of this service."""
    imported_policy: Mapped[str | None]
    """What an import called the policy or model that wrote it."""
    sampling: Mapped[dict[str, Any]]
    content: Mapped[str | None]
    """Null until the reply has ended; a failed or aborted one keeps what had come."""
    finish_reason: Mapped[str | None]
    """`stop`, `length`, `error` or `abort`; null while it runs."""
    prompt_tokens: Mapped[int | None] = mapped_column(Integer)
    completion_tokens: Mapped[int | None] = mapped_column(Integer)
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())
    ended_at: Mapped[datetime | None]


class Import(Table):
    """A file that an operator brought in: where imported comparisons and demonstrations come from."""

    __tablename__ = "imports"
    id: Mapped[int] = mapped_column(BigInteger, Identity(), primary_key=True)
    name: Mapped[str]
    format: Mapped[str]
    sha256: Mapped[str]
    """Of the file as it came."""
    num_rows: Mapped[int] = mapped_column(Integer)
    num_new: Mapped[int] = mapped_column(Integer)
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())
    __table_args__ = (UniqueConstraint("format", "sha256"),)


class Comparison(Table):
    """One prompt with two or more replies shown to one user, why it was shown and with what probability."""

    __tablename__ = "comparisons"
    id: Mapped[str] = mapped_column(primary_key=True)
    prompt_id: Mapped[int] = mapped_column(ForeignKey("prompts.id"), index=True)
    user_id: Mapped[int] = mapped_column(ForeignKey("users.id"))
    reason: Mapped[str]
    """`always`: the client asked. `auto`: drawn at the base rate. `evaluation`: of the uniform slice, which no
    cap touches. `labeler`: made to be ranked. `import`: from a file."""
    propensity: Mapped[float]
    """Probability with which this comparison was shown, in (0, 1]."""
    import_id: Mapped[int | None] = mapped_column(ForeignKey("imports.id"), index=True)
    duel_id: Mapped[int | None] = mapped_column(ForeignKey("duels.id"))
    """Set where its replies are of two policies."""
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())
    __table_args__ = (
        Index(None, "user_id", "created_at"),
        Index(None, "duel_id", postgresql_where="duel_id IS NOT NULL"),
    )


class ComparisonReply(Table):
    """The order that the replies were shown in: position 0 is `first`."""

    __tablename__ = "comparison_replies"
    comparison_id: Mapped[str] = mapped_column(ForeignKey("comparisons.id"), primary_key=True)
    position: Mapped[int] = mapped_column(SmallInteger, primary_key=True)
    reply_id: Mapped[str] = mapped_column(ForeignKey("replies.id"), unique=True)


class Vote(Table):
    """A user's choice on a comparison. One per user and comparison; a revision replaces it."""

    __tablename__ = "votes"
    id: Mapped[int] = mapped_column(BigInteger, Identity(), primary_key=True)
    comparison_id: Mapped[str] = mapped_column(ForeignKey("comparisons.id"))
    user_id: Mapped[int] = mapped_column(ForeignKey("users.id"), index=True)
    choice: Mapped[str]
    comment: Mapped[str | None]
    tags: Mapped[list[Any]]
    created_at: Mapped[datetime] = mapped_column(server_default=func.now(), index=True)
    updated_at: Mapped[datetime] = mapped_column(server_default=func.now())
    __table_args__ = (UniqueConstraint("comparison_id", "user_id"), _one_of("choice", CHOICES, "choice"))


class Ranking(Table):
    """A labeler's ordering of a comparison's replies, ties allowed. One per user and comparison."""

    __tablename__ = "rankings"
    id: Mapped[int] = mapped_column(BigInteger, Identity(), primary_key=True)
    comparison_id: Mapped[str] = mapped_column(ForeignKey("comparisons.id"))
    user_id: Mapped[int] = mapped_column(ForeignKey("users.id"), index=True)
    ranks: Mapped[list[Any]]
    """Element i is the rank of the reply at position i: 1 is best, equal ranks are ties."""
    comment: Mapped[str | None]
    tags: Mapped[list[Any]]
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())
    updated_at: Mapped[datetime] = mapped_column(server_default=func.now())
    __table_args__ = (UniqueConstraint("comparison_id", "user_id"),)


class FeedbackEvent(Table):
    """The history of votes and rankings: one row for each time that one was given, revised or undone."""

    __tablename__ = "feedback_events"
    id: Mapped[int] = mapped_column(BigInteger, Identity(), primary_key=True)
    comparison_id: Mapped[str] = mapped_column(ForeignKey("comparisons.id"))
    user_id: Mapped[int] = mapped_column(ForeignKey("users.id"), index=True)
    kind: Mapped[str]
    action: Mapped[str]
    content: Mapped[dict[str, Any]]
    """The vote or ranking as it was from then on; when undone, as it was until then."""
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())
    __table_args__ = (
        Index(None, "comparison_id", "user_id"),
        _one_of("kind", ("vote", "ranking"), "kind"),
        _one_of("action", ("given", "revised", "undone"), "action"),
    )


class Demonstration(Table):
    """A reply to a prompt that a person wrote, or corrected from one of ours."""

    __tablename__ = "demonstrations"
    id: Mapped[str] = mapped_column(primary_key=True)
    prompt_id: Mapped[int] = mapped_column(ForeignKey("prompts.id"), index=True)
    user_id: Mapped[int] = mapped_column(ForeignKey("users.id"))
    content: Mapped[str]
    corrected: Mapped[str | None]
    """The text that it corrects: kept, as the reply itself may be deleted by its owner."""
    corrects: Mapped[str | None] = mapped_column(ForeignKey("replies.id", ondelete="SET NULL"), index=True)
    comment: Mapped[str | None]
    tags: Mapped[list[Any]]
    import_id: Mapped[int | None] = mapped_column(ForeignKey("imports.id"), index=True)
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())
    __table_args__ = (Index(None, "user_id", "created_at", "id"),)


class IdempotentCall(Table):
    """A call that carried `Idempotency-Key`, and its answer, so that a repeated call does nothing new."""

    __tablename__ = "idempotent_calls"
    user_id: Mapped[int] = mapped_column(ForeignKey("users.id"), primary_key=True)
    key: Mapped[str] = mapped_column(primary_key=True)
    request_sha256: Mapped[str]
    """Of method, path and body."""
    answer: Mapped[dict[str, Any]]
    created_at: Mapped[datetime] = mapped_column(server_default=func.now(), index=True)


class Snapshot(Table):
    """The exact, hashed set of votes (and rankings, demonstrations, and prompts that nobody judged) that a cycle trained on; its
    content lies in the cycle's folder."""

    __tablename__ = "snapshots"
    sha256: Mapped[str] = mapped_column(primary_key=True)
    num_votes: Mapped[int] = mapped_column(Integer)
    num_feedback: Mapped[int] = mapped_column(Integer)
    """Votes, rankings and demonstrations together."""
    feedback_sha256: Mapped[str]
    """Of these alone: snapshots that differ in unjudged prompts have it alike."""
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())


class SnapshotFeedback(Table):
    """One vote, ranking, demonstration or unjudged prompt of a snapshot. No foreign key: it stays on record without its user."""

    __tablename__ = "snapshot_feedback"
    sha256: Mapped[str] = mapped_column(ForeignKey("snapshots.sha256"), primary_key=True)
    kind: Mapped[str] = mapped_column(primary_key=True)
    feedback_id: Mapped[str] = mapped_column(primary_key=True)
    __table_args__ = (
        Index(None, "kind", "feedback_id"),
        _one_of("kind", SNAPSHOT_KINDS, "kind"),
    )


class RemovedFeedback(Table):
    """What a snapshot holds and its user had removed; the trainer then takes it out of the snapshot's file too."""

    __tablename__ = "removed_feedback"
    kind: Mapped[str] = mapped_column(primary_key=True)
    feedback_id: Mapped[str] = mapped_column(primary_key=True)
    removed_at: Mapped[datetime] = mapped_column(server_default=func.now())
    scrubbed_at: Mapped[datetime | None]
    __table_args__ = (
        Index("ix_removed_feedback_open", "kind", "feedback_id", postgresql_where="scrubbed_at IS NULL"),
        _one_of("kind", SNAPSHOT_KINDS, "kind"),
    )


class Cycle(Table):
    """Snapshot -> reward model -> policy training -> gate -> swap, and how it ended."""

    __tablename__ = "cycles"
    id: Mapped[int] = mapped_column(BigInteger, Identity(), primary_key=True)
    trigger: Mapped[str]
    """`votes`, `clock` or `operator`."""
    stage: Mapped[str]
    reason: Mapped[str | None]
    """Why it ended as it did, or what it is waiting for."""
    snapshot_sha256: Mapped[str | None] = mapped_column(ForeignKey("snapshots.sha256"))
    policy: Mapped[str | None] = mapped_column(ForeignKey("policies.name"))
    metrics: Mapped[dict[str, Any]] = mapped_column(server_default="{}")
    """`{"progress": {...}, "reward_model": {...}, "training": {...}, "gate": {...}}`, filled as it goes on; `method`, where the
    operator asked for one."""
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())
    ended_at: Mapped[datetime | None]
    __table_args__ = (
        _one_of("stage", CYCLE_STAGES, "stage"),
        Index("ix_cycles_open", "id", postgresql_where="ended_at IS NULL"),
    )
