"""Compares what clients were told with what is stored, when all is over. Used by `durability.py` and a test.

Reads the tables themselves, not their indexes, so that a row stored twice shows though an index hides it.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import psycopg

from tests.benchmarks.durability_clients import Call, Client, Seen, Voted

PAST_INDEXES = ("enable_indexscan", "enable_indexonlyscan", "enable_bitmapscan")
ABSENT = "(none)"
Event = tuple[str, str]
"""An action, and the choice that it gave (or, undone, took back)."""


@dataclass(slots=True)
class Stored:
    """What the database holds, by comparison or reply."""

    votes: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    """The choices of a comparison: more than one would be a vote stored twice."""
    events: dict[str, list[Event]] = field(default_factory=lambda: defaultdict(list))
    """In order."""
    replies: dict[str, tuple[str | None, str | None]] = field(default_factory=dict)
    """Content and finish reason."""
    shown: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    """Reply ids of a comparison, in the order shown."""


def read_stored(conninfo: str) -> Stored:
    """All votes, history, replies and comparisons."""
    stored = Stored()
    with psycopg.connect(conninfo) as connection:
        for name in PAST_INDEXES:
            connection.execute("SELECT set_config(%s, 'off', false)", [name])
        for comparison, choice in connection.execute("SELECT comparison_id, choice FROM votes"):
            stored.votes[comparison].append(choice)
        events = "SELECT comparison_id, action, content ->> 'choice' FROM feedback_events ORDER BY id"
        for comparison, action, choice in connection.execute(events):
            stored.events[comparison].append((action, choice))
        for reply, *rest in connection.execute("SELECT id, content, finish_reason FROM replies"):
            stored.replies[reply] = (rest[0], rest[1])
        shown = "SELECT comparison_id, reply_id FROM comparison_replies ORDER BY comparison_id, position"
        for comparison, reply in connection.execute(shown):
            stored.shown[comparison].append(reply)
    return stored


def violations(clients: Sequence[Client], stored: Stored) -> list[str]:
    """Everything that a client was told and that is not so, a line each."""
    votes = [voted for client in clients for voted in client.voted]
    chats = [seen for client in clients for seen in client.seen]
    return [
        *(line for voted in votes for line in _against_vote(voted, stored)),
        *(line for seen in chats for line in _against_chat(seen, stored)),
        *_unasked(votes, stored),
    ]


def _against_vote(voted: Voted, stored: Stored) -> list[str]:
    found = stored.votes.get(voted.id, [])
    choices = _outcomes(voted)
    lines = []
    if len(found) > 1:
        lines.append(f"{voted.id} has {len(found)} votes")
    elif (found[0] if found else None) not in choices:
        lines.append(f"{voted.id} holds {found or ABSENT}, acknowledged was {voted.choice or ABSENT}")
    histories = [_history(voted.calls)]
    if voted.in_doubt is not None:
        histories.append(_history(voted.calls[:-1]))
    if stored.events.get(voted.id, []) not in histories:
        lines.append(f"{voted.id} has the history {stored.events.get(voted.id)}, right is {histories}")
    return lines


def _outcomes(voted: Voted) -> list[str | None]:
    """What may be stored: the acknowledged choice, or that of the call whose outcome is open."""
    return [voted.choice, *([voted.in_doubt.choice] if voted.in_doubt else [])]


def _history(calls: Iterable[Call]) -> list[Event]:
    """The one history of calls that all came through, in order: a call that changes nothing leaves no line."""
    events: list[Event] = []
    now: str | None = None
    for call in calls:
        if call.choice is not None and call.choice != now:
            events.append(("given" if now is None else "revised", call.choice))
        elif call.choice is None and now is not None:
            events.append(("undone", now))
        now = call.choice
    return events


def _against_chat(seen: Seen, stored: Stored) -> list[str]:
    """An id that left the service must be stored, and a reply that was seen to end must be whole."""
    if stored.shown.get(seen.comparison_id) != seen.reply_ids:
        return [f"{seen.comparison_id} is not stored as it was shown"]
    lines = []
    for reply, text, finish_reason in zip(seen.reply_ids, seen.texts, seen.finish_reasons, strict=True):
        if finish_reason is not None and stored.replies.get(reply) != (text, finish_reason):
            lines.append(f"{reply} was seen to end but is stored as {stored.replies.get(reply)}")
    return lines


def _unasked(votes: Sequence[Voted], stored: Stored) -> list[str]:
    asked = {voted.id for voted in votes if voted.calls}
    return [f"{comparison} has a vote that nobody gave" for comparison in stored.votes.keys() - asked]


def summary(clients: Sequence[Client], stored: Stored) -> dict[str, Any]:
    """How much was compared, and how the calls whose outcome was open came out."""
    votes = [voted for client in clients for voted in client.voted if voted.calls]
    open_ones = [voted for voted in votes if voted.in_doubt is not None]
    stored_ones = [voted for voted in open_ones if stored.events.get(voted.id, []) == _history(voted.calls)]
    return {
        "comparisons voted on": len(votes),
        "votes stored": sum(map(len, stored.votes.values())),
        "lines of history": sum(map(len, stored.events.values())),
        "given up, stored": len(stored_ones),
        "given up, not stored": len(open_ones) - len(stored_ones),
        "replies without an end": sum(reason is None for _, reason in stored.replies.values()),
    }
