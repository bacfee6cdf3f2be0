"""A snapshot: the exact, hashed set of votes that a cycle trains on, kept as lines of JSON in the cycle's folder."""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

from sqlalchemy import func, select, update
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session, aliased

from service.tables import (
    Comparison,
    ComparisonReply,
    Cycle,
    Message,
    Prompt,
    RemovedVote,
    Reply,
    Snapshot,
    SnapshotVote,
    User,
    Vote,
)

LABELS = {"first": 1.0, "second": 0.0, "tie": 0.5}
"""Probability that the first reply is better. `neither` prefers none of the two and is not trained on."""


@dataclass(frozen=True, slots=True)
class Preference:
    """A vote with all that training needs of it."""

    vote_id: int
    user: str
    """`account/name`."""
    messages: list[Message]
    first: str
    second: str
    choice: str
    policies: list[str | None]
    """Of the first and of the second reply; null where it was imported."""


def take(session: Session) -> list[Preference]:
    """All votes on comparisons whose replies are whole, in the order of their ids."""
    position0, position1 = aliased(ComparisonReply), aliased(ComparisonReply)
    reply0, reply1 = aliased(Reply), aliased(Reply)
    rows = session.execute(
        select(Vote, User.account + "/" + User.name, Prompt.messages, reply0, reply1)
        .join(Comparison, Comparison.id == Vote.comparison_id)
        .join(User, User.id == Vote.user_id)
        .join(Prompt, Prompt.id == Comparison.prompt_id)
        .join(position0, (position0.comparison_id == Comparison.id) & (position0.position == 0))
        .join(position1, (position1.comparison_id == Comparison.id) & (position1.position == 1))
        .join(reply0, reply0.id == position0.reply_id)
        .join(reply1, reply1.id == position1.reply_id)
        .where(reply0.finish_reason == "stop", reply1.finish_reason == "stop")
        .order_by(Vote.id)
    )
    return [
        Preference(
            vote_id=vote.id,
            user=user,
            messages=messages,
            first=first.content or "",
            second=second.content or "",
            choice=vote.choice,
            policies=[first.policy, second.policy],
        )
        for vote, user, messages, first, second in rows
    ]


def save(preferences: list[Preference], path: Path, session: Session) -> str:
    """Writes the file and the row; the caller commits. Returns the sha256 that both are known by."""
    lines = "".join(json.dumps(asdict(row), ensure_ascii=False, sort_keys=True) + "\n" for row in preferences)
    content = lines.encode()
    _replace(path, content)
    sha256 = hashlib.sha256(content).hexdigest()
    session.execute(
        insert(Snapshot).values(sha256=sha256, num_votes=len(preferences)).on_conflict_do_nothing()
    )
    votes = [{"sha256": sha256, "vote_id": row.vote_id} for row in preferences]
    if votes:
        session.execute(insert(SnapshotVote).on_conflict_do_nothing(), votes)
    return sha256


def load(path: Path, sha256: str) -> list[Preference]:
    """Raises ValueError where the file is not the one that was hashed."""
    content = path.read_bytes()
    if hashlib.sha256(content).hexdigest() != sha256:
        raise ValueError(
            f"The snapshot {path.name} is not the one that this cycle began with (sha256 differs)."
        )
    return [Preference(**json.loads(line)) for line in content.decode().splitlines()]


def scrub(session: Session, cycles: Path) -> int:
    """Takes votes that their users had removed out of the snapshots' files; the caller commits. Returns how many.

    Only while no cycle is open: a scrubbed file no longer has the sha256 that a cycle is taken up again by.
    """
    rows = session.execute(
        select(Cycle.id, RemovedVote.vote_id)
        .join(SnapshotVote, SnapshotVote.sha256 == Cycle.snapshot_sha256)
        .join(RemovedVote, RemovedVote.vote_id == SnapshotVote.vote_id)
        .where(RemovedVote.scrubbed_at.is_(None))
    )
    removed: dict[int, set[int]] = {}
    for cycle_id, vote_id in rows:
        removed.setdefault(cycle_id, set()).add(vote_id)
    for cycle_id, vote_ids in removed.items():
        _drop(file_of(cycles, cycle_id), vote_ids)
    gone = set().union(*removed.values())
    session.execute(update(RemovedVote).where(RemovedVote.vote_id.in_(gone)).values(scrubbed_at=func.now()))
    return len(gone)


def _drop(path: Path, vote_ids: set[int]) -> None:
    if path.exists():
        kept = [line for line in path.read_text().splitlines() if json.loads(line)["vote_id"] not in vote_ids]
        _replace(path, "".join(line + "\n" for line in kept).encode())


def file_of(cycles: Path, cycle_id: int) -> Path:
    """A cycle's snapshot, in the folder of all cycles."""
    return cycles / f"{cycle_id:06d}" / "snapshot.jsonl"


def _replace(path: Path, content: bytes) -> None:
    """Writes a file whole or not at all."""
    partial = path.with_suffix(".partial")
    partial.write_bytes(content)
    partial.rename(path)
