"""Stores the records of an import: what is not there yet, with the ids that it has, in the caller's transaction.

Ids that are texts are random and so the same thing everywhere. Numbers are each database's own: one that is taken here by
another row is replaced by the next. Used by `imports.py`.
"""

from collections.abc import Iterable, Sequence
from contextlib import suppress
from functools import cache
from typing import Any, NamedTuple

import msgspec
from msgspec import Raw
from sqlalchemy import ColumnElement, TextClause, any_, delete, func, literal, select, text
from sqlalchemy.dialects import postgresql
from sqlalchemy.dialects.postgresql import ARRAY, aggregate_order_by
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

from service.formats import (
    JSON,
    AnyRecord,
    ComparisonRecord,
    DemonstrationRecord,
    Feedback,
    FormatError,
    PromptRecord,
    ReplyRecord,
    UserRecord,
    VoteRecord,
)
from service.tables import (
    Comparison,
    ComparisonReply,
    Conversation,
    Demonstration,
    Prompt,
    Ranking,
    Reply,
    Table,
    User,
    Vote,
)

DIALECT = postgresql.dialect()  # type: ignore[no-untyped-call]
MOST_AHEAD = 10_000_000
"""How far beyond a table's last number one may be kept: each number between has to be passed over."""
MAKE_USERS = text(
    "INSERT INTO users (account, name) "
    "SELECT * FROM unnest(CAST(:accounts AS text[]), CAST(:names AS text[])) "
    "ON CONFLICT (account, name) DO NOTHING RETURNING id"
)
FIND_USERS = text(
    "SELECT account, name, id FROM users "
    "JOIN unnest(CAST(:accounts AS text[]), CAST(:names AS text[])) AS t (account, name) USING (account, name)"
)
Numbered = tuple[int, AnyRecord]
"""A record and the number of its row in the file."""


class RowRefused(Exception):
    """A row cannot be taken, and so the file cannot."""

    def __init__(self, number: int, error: FormatError) -> None:
        super().__init__(number)
        self.number = number
        self.error = error


class Users:
    """Ids of users, made in short transactions of their own: chats must not wait for an import to end.

    Used as a context: where the body fails, those that it made are removed again.
    """

    def __init__(self, sessions: async_sessionmaker[AsyncSession]) -> None:
        self._sessions = sessions
        self._ids: dict[tuple[str, str], int] = {}
        self._made: list[int] = []

    async def __aenter__(self) -> "Users":
        return self

    async def __aexit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None and self._made:
            with suppress(IntegrityError):  # one has begun to chat meanwhile: it stays, and so do the others
                async with self._sessions.begin() as session:
                    await session.execute(delete(User).where(_among(User.id, self._made)))

    async def find(self, users: Iterable[UserRecord]) -> None:
        """Learn the ids of these users; whoever is not there yet is made."""
        names = sorted({(user.account, user.name) for user in users} - self._ids.keys())
        if not names:
            return
        asked = {"accounts": [account for account, _ in names], "names": [name for _, name in names]}
        async with self._sessions.begin() as session:
            self._made.extend((await session.execute(MAKE_USERS, asked)).scalars())
        async with self._sessions() as session:
            for account, name, user_id in await session.execute(FIND_USERS, asked):
                self._ids[account, name] = user_id

    def id(self, user: UserRecord) -> int:
        """Of a user that was found."""
        return self._ids[user.account, user.name]


class _There(NamedTuple):
    """What is stored of a comparison."""

    import_id: int | None
    messages: list[Any]
    contents: list[str | None]


class Intake:
    """One per import. `foreign`: of a format that calls users by names of its own."""

    def __init__(self, session: AsyncSession, users: Users, import_id: int, *, foreign: bool) -> None:
        self._session = session
        self._users = users
        self._import_id = import_id
        self._foreign = foreign

    async def add(self, batch: Sequence[Numbered]) -> int:
        """Store records, all of one kind; how many of them are new. Raises RowRefused."""
        feedback: list[tuple[int, Feedback]] = []
        demonstrations: list[DemonstrationRecord] = []
        for number, record in batch:
            if isinstance(record, DemonstrationRecord):
                demonstrations.append(record)
            else:
                feedback.append((number, record))
        return await self._add_feedback(feedback) + await self._add_demonstrations(demonstrations)

    # --- votes and rankings

    async def _add_feedback(self, batch: Sequence[tuple[int, Feedback]]) -> int:
        await self._users.find(record.user for _, record in batch)
        there = await self._read_comparisons([record.comparison.id for _, record in batch])
        new: dict[str, tuple[int, ComparisonRecord]] = {}
        given: list[Feedback] = []
        for number, record in batch:
            comparison = record.comparison
            seen = _There(self._import_id, *_content(comparison))
            known = there.setdefault(comparison.id, seen)
            if known is seen:
                new[comparison.id] = (number, comparison)
            elif known[1:] != seen[1:]:
                message = f"{comparison.id} is there already, with other messages or replies"
                raise RowRefused(number, FormatError("comparison", message))
            # Whoever voted here has another name in such a format, and must not get a second vote.
            if known.import_id == self._import_id or not self._foreign:
                given.append(record)
        await self._add_comparisons(list(new.values()))
        return await self._add_given(given)

    async def _read_comparisons(self, ids: list[str]) -> dict[str, _There]:
        contents = (
            select(func.array_agg(aggregate_order_by(Reply.content, ComparisonReply.position)))
            .join(ComparisonReply, ComparisonReply.reply_id == Reply.id)
            .where(ComparisonReply.comparison_id == Comparison.id)
            .scalar_subquery()
        )
        query = (
            select(Comparison.id, Comparison.import_id, Prompt.messages, contents)
            .join(Prompt, Prompt.id == Comparison.prompt_id)
            .where(_among(Comparison.id, ids))
        )
        return {comparison_id: _There(*rest) for comparison_id, *rest in await self._session.execute(query)}

    async def _add_comparisons(self, numbered: Sequence[tuple[int, ComparisonRecord]]) -> None:
        comparisons = [comparison for _, comparison in numbered]
        await self._users.find(user for one in comparisons for user in (one.user, one.prompt.user))
        await self._check_not_shown(numbered)
        prompts = await self._add_prompts_and_replies([(one.prompt, one.replies) for one in comparisons])
        rows = [
            {
                "id": one.id,
                "prompt_id": prompt,
                "user_id": self._users.id(one.user),
                "reason": one.reason,
                "propensity": one.propensity,
                "import_id": self._import_id,
                "created_at": one.created_at,
            }
            for one, prompt in zip(comparisons, prompts, strict=True)
        ]
        await self._insert(Comparison, rows)
        shown = [
            {"comparison_id": one.id, "position": position, "reply_id": reply.id}
            for one in comparisons
            for position, reply in enumerate(one.replies)
        ]
        await self._insert(ComparisonReply, shown)

    async def _check_not_shown(self, numbered: Sequence[tuple[int, ComparisonRecord]]) -> None:
        """Raises RowRefused where a reply was shown in another comparison."""
        ids = [reply.id for _, comparison in numbered for reply in comparison.replies]
        query = select(ComparisonReply.reply_id).where(_among(ComparisonReply.reply_id, ids))
        shown = set(await self._session.scalars(query))
        for number, comparison in numbered:
            for reply in comparison.replies:
                if reply.id in shown:
                    message = f"{reply.id} belongs to another comparison"
                    raise RowRefused(number, FormatError("comparison.replies", message))
                shown.add(reply.id)

    async def _add_given(self, records: Sequence[Feedback]) -> int:
        """Votes or rankings on comparisons that are there by now; how many are new."""
        if not records:
            return 0
        table = Vote if isinstance(records[0], VoteRecord) else Ranking
        comparisons = [record.comparison.id for record in records]
        query = select(table.comparison_id, table.user_id).where(_among(table.comparison_id, comparisons))
        there = {(comparison_id, user_id) for comparison_id, user_id in await self._session.execute(query)}
        new: dict[tuple[str, int], Feedback] = {}
        for record in records:
            key = (record.comparison.id, self._users.id(record.user))
            if key not in there:
                new.setdefault(key, record)
        numbers = await self._numbers(table, [record.id for record in new.values()])
        rows = [
            {
                "id": number,
                "comparison_id": comparison_id,
                "user_id": user_id,
                **({"choice": record.choice} if isinstance(record, VoteRecord) else {"ranks": record.ranks}),
                "comment": record.comment,
                "tags": record.tags,
                "created_at": record.created_at,
                "updated_at": record.updated_at,
            }
            for number, ((comparison_id, user_id), record) in zip(numbers, new.items(), strict=True)
        ]
        await self._insert(table, rows)
        return len(new)

    # --- demonstrations

    async def _add_demonstrations(self, records: Sequence[DemonstrationRecord]) -> int:
        ids = [record.id for record in records]
        there = set(
            await self._session.scalars(select(Demonstration.id).where(_among(Demonstration.id, ids)))
        )
        new = list({record.id: record for record in records if record.id not in there}.values())
        await self._users.find(user for record in new for user in (record.user, record.prompt.user))
        prompts = await self._add_prompts_and_replies(
            [(record.prompt, [record.corrects] if record.corrects else []) for record in new]
        )
        rows = [
            {
                "id": record.id,
                "prompt_id": prompt,
                "user_id": self._users.id(record.user),
                "content": record.content,
                "corrected": record.corrected,
                "corrects": record.corrects.id if record.corrects else None,
                "comment": record.comment,
                "tags": record.tags,
                "import_id": self._import_id,
                "created_at": record.created_at,
            }
            for record, prompt in zip(new, prompts, strict=True)
        ]
        await self._insert(Demonstration, rows)
        return len(new)

    # --- what they hang on

    async def _add_prompts_and_replies(
        self, asked: Sequence[tuple[PromptRecord, Sequence[ReplyRecord]]]
    ) -> list[int]:
        """Prompts with replies to them; gives each prompt's number here."""
        ids = [reply.id for _, replies in asked for reply in replies]
        query = select(Reply.id, Reply.prompt_id).where(_among(Reply.id, ids))
        there = {row.id: row.prompt_id for row in await self._session.execute(query)}
        known = [next((there[r.id] for r in replies if r.id in there), None) for _, replies in asked]
        prompts = await self._add_prompts([prompt for prompt, _ in asked], known)
        rows = [
            self._reply_row(reply, prompt)
            for prompt, (_, replies) in zip(prompts, asked, strict=True)
            for reply in replies
        ]
        await self._insert(Reply, rows, or_nothing=True)
        return prompts

    def _reply_row(self, reply: ReplyRecord, prompt: int) -> dict[str, Any]:
        """A policy of the same name may be another one here, so that it is only noted what it was called."""
        return {
            "id": reply.id,
            "prompt_id": prompt,
            "imported_policy": reply.policy,
            "sampling": Raw(JSON.encode(reply.sampling).encode()),
            "content": reply.content,
            "finish_reason": reply.finish_reason,
            "prompt_tokens": reply.prompt_tokens,
            "completion_tokens": reply.completion_tokens,
            "created_at": reply.created_at,
            "ended_at": reply.ended_at,
        }

    async def _add_prompts(self, records: Sequence[PromptRecord], known: Sequence[int | None]) -> list[int]:
        """Each prompt's number. `known`: that of a prompt that is there, as a reply to it is."""
        keys = [self._prompt_key(record, place) for place, record in enumerate(records)]
        query = select(Prompt.id, Prompt.user_id, Prompt.created_at).where(
            _among(Prompt.id, [record.id for record in records if record.id is not None])
        )
        numbers: dict[tuple[Any, ...], int] = {
            tuple(row): row.id for row in await self._session.execute(query)
        }
        new = {
            key: record
            for key, record, number in zip(keys, records, known, strict=True)
            if number is None and key not in numbers
        }
        fresh = await self._numbers(Prompt, [record.id for record in new.values()])
        numbers |= zip(new, fresh, strict=True)
        await self._add_conversations(new.values())
        rows = [
            {
                "id": numbers[key],
                "user_id": self._users.id(record.user),
                "conversation_id": record.conversation.id if record.conversation else None,
                "messages": _messages(record),
                "created_at": record.created_at,
            }
            for key, record in new.items()
        ]
        await self._insert(Prompt, rows)
        return [number or numbers[key] for key, number in zip(keys, known, strict=True)]

    def _prompt_key(self, record: PromptRecord, place: int) -> tuple[Any, ...]:
        """What makes two prompts of one number the same. A prompt without a number is like no other."""
        if record.id is None:
            return (None, place)
        return (record.id, self._users.id(record.user), record.created_at)

    async def _add_conversations(self, prompts: Iterable[PromptRecord]) -> None:
        rows = [
            {
                "id": prompt.conversation.id,
                "user_id": self._users.id(prompt.user),
                "created_at": prompt.conversation.created_at,
            }
            for prompt in prompts
            if prompt.conversation
        ]
        await self._insert(Conversation, rows, or_nothing=True)

    async def _numbers(self, table: type[Table], wanted: Sequence[int | None]) -> list[int]:
        """A number for each new row: the one that it has, where it is free, else the next.

        A sequence is never set, only advanced, so that whoever else takes numbers meanwhile gets none twice.
        """
        name = table.__tablename__
        asked = [number for number in wanted if number is not None]
        query = text(f"SELECT id FROM {name} WHERE id = ANY(CAST(:asked AS bigint[]))")
        taken = set(await self._session.scalars(query, {"asked": asked}))
        last = await self._session.scalar(text(f"SELECT last_value FROM {name}_id_seq")) or 0
        kept: list[int | None] = []
        for number in wanted:
            free = number is not None and number not in taken and number <= last + MOST_AHEAD
            kept.append(number if free else None)
            taken.add(number)
        await self._next(name, max((number for number in kept if number), default=0) - last + 1)
        others = iter(await self._next(name, kept.count(None)))
        return [number or next(others) for number in kept]

    async def _next(self, name: str, num: int) -> list[int]:
        """So many numbers of a table's sequence."""
        query = text(f"SELECT nextval('{name}_id_seq') FROM generate_series(1, :num)")
        return list(await self._session.scalars(query, {"num": num})) if num > 0 else []

    async def _insert(
        self, table: type[Table], rows: Sequence[dict[str, Any]], *, or_nothing: bool = False
    ) -> None:
        """All rows with one statement. `or_nothing`: those that are there already are passed over."""
        if not rows:
            return
        statement = _insert_statement(table, tuple(rows[0]), or_nothing)
        await self._session.execute(statement, {"rows": msgspec.json.encode(rows).decode()})


@cache
def _insert_statement(table: type[Table], names: tuple[str, ...], or_nothing: bool) -> TextClause:
    """Takes rows as one JSON text: many times cheaper to make than so many parameters, or arrays of them."""
    kinds = (table.__table__.c[name].type.compile(DIALECT) for name in names)
    columns = ", ".join(f"{name} {kind}" for name, kind in zip(names, kinds, strict=True))
    listed = ", ".join(names)
    return text(
        f"INSERT INTO {table.__tablename__} ({listed}) "
        f"SELECT {listed} FROM json_to_recordset(CAST(:rows AS json)) AS t ({columns})"
        + (" ON CONFLICT DO NOTHING" if or_nothing else "")
    )


def _among(column: Any, values: Sequence[Any]) -> ColumnElement[bool]:
    """One statement for any number of values, unlike IN."""
    is_one: ColumnElement[bool] = column == any_(literal(list(values), ARRAY(column.type)))
    return is_one


def _messages(prompt: PromptRecord) -> list[dict[str, str]]:
    return [{"role": turn.role, "content": turn.content} for turn in prompt.messages]


def _content(comparison: ComparisonRecord) -> tuple[list[dict[str, str]], list[str | None]]:
    return _messages(comparison.prompt), [reply.content for reply in comparison.replies]
