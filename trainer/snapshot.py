"""A snapshot: the exact, hashed set of votes, rankings, demonstrations and unjudged prompts that a cycle trains on, kept as lines of
JSON in the cycle's folder."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from sqlalchemy import exists, func, select
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from service.removal import SNAPSHOT_LOCK
from service.tables import (
    Comparison,
    ComparisonReply,
    Cycle,
    Demonstration,
    Message,
    Prompt,
    Ranking,
    RemovedFeedback,
    Reply,
    Snapshot,
    SnapshotFeedback,
    User,
    Vote,
)

RANKS = {"first": [1, 2], "second": [2, 1], "tie": [1, 1], "neither": None}
USER = User.account + "/" + User.name


@dataclass(frozen=True, slots=True)
class Feedback:
    """A vote, a ranking, a demonstration, or a prompt that nobody judged, with all that training needs of it."""

    kind: str
    id: str
    user: str
    """`account/name`."""
    messages: list[Message]
    replies: list[str]
    """A demonstration is the first, and what it corrects, if anything, the second. Of an unjudged prompt: none."""
    ranks: list[int] | None
    """Of the replies: 1 is best, equal ones are ties. None: all of them are bad, or there are none."""
    policies: list[str | None]
    """Who wrote each; null where that was a person, or it was imported."""
    imported: bool


def take(session: Session, prompts_per_vote: int = 0, most_prompts: int = 0) -> list[Feedback]:
    """All votes and rankings of replies that are whole, and all demonstrations; each in the order of their ids. Nothing is removed
    until the caller commits.

    After them, of each user who votes and did not opt out of comparisons, the newest prompts that nobody judged: at most so many for
    each vote of theirs, and in turn, lest a policy be trained on what one asks; as long as there are no more than `most_prompts`
    together with those of votes and rankings.
    """
    session.execute(select(func.pg_advisory_xact_lock(SNAPSHOT_LOCK)))
    judged = [*_votes(session), *_rankings(session)]
    most = max(0, most_prompts - len(judged))
    return [*judged, *_demonstrations(session), *_unjudged(session, prompts_per_vote, most)]


def _votes(session: Session) -> Iterator[Feedback]:
    for vote, user, messages, imported, replies in _judged(session, Vote):
        if len(replies) == 2:
            yield _feedback("vote", vote.id, user, messages, replies, RANKS[vote.choice], imported)


def _rankings(session: Session) -> Iterator[Feedback]:
    for ranking, user, messages, imported, replies in _judged(session, Ranking):
        yield _feedback("ranking", ranking.id, user, messages, replies, ranking.ranks, imported)


def _feedback(
    kind: str,
    number: int,
    user: str,
    messages: list[Message],
    replies: Sequence[Reply],
    ranks: list[int] | None,
    imported: bool,
) -> Feedback:
    texts, policies = [reply.content or "" for reply in replies], [reply.policy for reply in replies]
    return Feedback(kind, str(number), user, messages, texts, ranks, policies, imported)


def _judged(
    session: Session, table: type[Vote] | type[Ranking]
) -> Iterator[tuple[Any, str, list[Message], bool, list[Reply]]]:
    """Each vote or ranking, its user, prompt, whether it was imported, and its replies as shown, where all are whole."""
    query = (
        select(table, USER, Prompt.messages, Comparison.import_id, Reply)
        .join(Comparison, Comparison.id == table.comparison_id)
        .join(User, User.id == table.user_id)
        .join(Prompt, Prompt.id == Comparison.prompt_id)
        .join(ComparisonReply, ComparisonReply.comparison_id == Comparison.id)
        .join(Reply, Reply.id == ComparisonReply.reply_id)
        .order_by(table.id, ComparisonReply.position)
    )
    rows: Iterable[Any] = session.execute(query)
    for _, group in groupby(rows, key=lambda row: row[0].id):
        found = list(group)
        judgement, user, messages, import_id, _reply = found[0]
        replies = [row[-1] for row in found]
        if all(reply.finish_reason == "stop" for reply in replies):
            yield judgement, user, messages, import_id is not None, replies


def _demonstrations(session: Session) -> Iterator[Feedback]:
    rows = session.execute(
        select(Demonstration, USER, Prompt.messages, Reply.policy)
        .join(User, User.id == Demonstration.user_id)
        .join(Prompt, Prompt.id == Demonstration.prompt_id)
        .outerjoin(Reply, Reply.id == Demonstration.corrects)
        .order_by(Demonstration.id)
    )
    for row, user, messages, policy in rows:
        corrected = [] if row.corrected is None else [row.corrected]
        yield Feedback(
            kind="demonstration",
            id=row.id,
            user=user,
            messages=messages,
            replies=[row.content, *corrected],
            ranks=[1, 2][: 1 + len(corrected)],
            policies=[None, *(policy for _ in corrected)],
            imported=row.import_id is not None,
        )


def _unjudged(session: Session, for_each_vote: int, most: int) -> Iterator[Feedback]:
    """Prompts that a policy answered, and of whose answers none was voted on, ranked or corrected; in the order of their ids."""
    judgements = (
        exists().where(table.comparison_id == Comparison.id, Comparison.prompt_id == Prompt.id)
        for table in (Vote, Ranking)
    )
    votes = select(Vote.user_id, func.count().label("given")).group_by(Vote.user_id).subquery()
    turn = func.row_number().over(partition_by=Prompt.user_id, order_by=Prompt.id.desc())
    candidates = (
        select(Prompt.id, turn.label("turn"), votes.c.given)
        .select_from(Prompt)
        .join(User)
        .join(votes, votes.c.user_id == User.id)
        .where(
            User.compares,
            exists().where(
                Reply.prompt_id == Prompt.id, Reply.finish_reason == "stop", Reply.policy.is_not(None)
            ),
            ~exists().where(Demonstration.prompt_id == Prompt.id),
            *(~judgement for judgement in judgements),
        )
        .subquery()
    )
    drawn = (
        select(candidates.c.id)
        .where(candidates.c.turn <= for_each_vote * candidates.c.given)
        .order_by(candidates.c.turn, candidates.c.id.desc())
        .limit(most)
    )
    rows = session.execute(
        select(Prompt.id, USER, Prompt.messages).join(User).where(Prompt.id.in_(drawn)).order_by(Prompt.id)
    )
    for number, user, messages in rows:
        yield Feedback("prompt", str(number), user, messages, [], None, [], False)


def save(feedback: Sequence[Feedback], path: Path, session: Session) -> str:
    """Writes the file and the rows; the caller commits. Returns the sha256 that both are known by."""
    judged = [row for row in feedback if row.kind != "prompt"]
    content = _as_lines(feedback)
    _replace(path, content)
    sha256 = hashlib.sha256(content).hexdigest()
    snapshot = {
        "sha256": sha256,
        "num_votes": sum(row.kind == "vote" for row in judged),
        "num_feedback": len(judged),
        "feedback_sha256": hashlib.sha256(_as_lines(judged)).hexdigest(),
    }
    session.execute(insert(Snapshot).values(snapshot).on_conflict_do_nothing())
    held = [{"sha256": sha256, "kind": row.kind, "feedback_id": row.id} for row in feedback]
    if held:
        session.execute(insert(SnapshotFeedback).on_conflict_do_nothing(), held)
    return sha256


def _as_lines(feedback: Sequence[Feedback]) -> bytes:
    rows = (json.dumps(asdict(row), ensure_ascii=False, sort_keys=True) for row in feedback)
    return "".join(row + "\n" for row in rows).encode()


def load(path: Path, sha256: str) -> list[Feedback]:
    """Raises ValueError where the file is not the one that was hashed."""
    content = path.read_bytes()
    if hashlib.sha256(content).hexdigest() != sha256:
        raise ValueError(
            f"The snapshot {path.name} is not the one that this cycle began with (sha256 differs)."
        )
    return [Feedback(**json.loads(line)) for line in _lines(content)]


def _lines(content: bytes) -> list[str]:
    """Each ends with a line feed, and with none of the other characters that Unicode ends lines with: people write these."""
    return content.decode().split("\n")[:-1]


def scrub(session: Session, cycles: Path) -> int:
    """Takes what its users had removed out of the snapshots' files; the caller commits. Returns how much.

    Only while no cycle is open: a scrubbed file no longer has the sha256 that a cycle is taken up again by.
    """
    rows = session.execute(
        select(Cycle.id, RemovedFeedback)
        .join(SnapshotFeedback, SnapshotFeedback.sha256 == Cycle.snapshot_sha256)
        .join(
            RemovedFeedback,
            (RemovedFeedback.kind == SnapshotFeedback.kind)
            & (RemovedFeedback.feedback_id == SnapshotFeedback.feedback_id),
        )
        .where(RemovedFeedback.scrubbed_at.is_(None))
    )
    removed: dict[int, list[RemovedFeedback]] = {}
    for cycle_id, row in rows:
        removed.setdefault(cycle_id, []).append(row)
    for cycle_id, gone in removed.items():
        _drop(file_of(cycles, cycle_id), {(row.kind, row.feedback_id) for row in gone})
    scrubbed = {row for gone in removed.values() for row in gone}
    for row in scrubbed:
        row.scrubbed_at = func.now()
    return len(scrubbed)


def _drop(path: Path, gone: set[tuple[str, str]]) -> None:
    if path.exists():
        kept = [
            line
            for line in _lines(path.read_bytes())
            if (row := json.loads(line)) and (row["kind"], row["id"]) not in gone
        ]
        _replace(path, "".join(line + "\n" for line in kept).encode())


def file_of(cycles: Path, cycle_id: int) -> Path:
    """A cycle's snapshot, in the folder of all cycles."""
    return cycles / f"{cycle_id:06d}" / "snapshot.jsonl"


def _replace(path: Path, content: bytes) -> None:
    """Writes a file whole or not at all."""
    partial = path.with_suffix(".partial")
    partial.write_bytes(content)
    partial.rename(path)
