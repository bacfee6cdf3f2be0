"""Stores prompts, replies and comparisons by group commit. Used by `generation.py`; knows nothing of HTTP.

Every reply is written before its id leaves the service and again before its end does, so this is the hot path. Requests hand
their rows over and wait; one task writes all that has come meanwhile with one statement, which is one transaction, and lets
them go on once it is committed. A lone request waits for one commit; a hundred at once wait for one or two.
"""

import asyncio
import logging
import secrets
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

import msgspec
import psycopg
from sqlalchemy import URL

from service.engine import Message, Sampling
from service.errors import DatabaseUnavailable
from service.pairing import Pairing

log = logging.getLogger("ratchet.journal")

CONNECT_SECONDS = 5
USERS_KNOWN = 100_000
"""Ids of users that are remembered."""


class UserName(NamedTuple):
    """Whose a request is: the account (empty without keys), and the user within it."""

    account: str
    name: str


@dataclass(frozen=True, slots=True)
class Stored:
    """The ids of what is under way. `reply_ids` are in the order shown."""

    reply_ids: tuple[str, ...]
    comparison_id: str | None

    @property
    def id(self) -> str:
        """The id of the whole answer."""
        return self.comparison_id or self.reply_ids[0]

    @classmethod
    def new(cls, count: int, compared: bool) -> "Stored":
        """Fresh random ids."""
        reply_ids = tuple(f"chatcmpl-{secrets.token_hex(16)}" for _ in range(count))
        return cls(reply_ids, f"cmp-{secrets.token_hex(16)}" if compared else None)


@dataclass(frozen=True, slots=True)
class Ended:
    """How a reply ended: `stop`, `length`, `error` or `abort`."""

    content: str
    finish_reason: str
    prompt_tokens: int | None
    completion_tokens: int


@dataclass(frozen=True, slots=True)
class Begun:
    """A prompt with its replies; where `pairing` says so, also their comparison. `ended`: how, where they have."""

    user: UserName
    messages: Sequence[Message]
    policies: Sequence[str]
    """Of each reply, in the order shown."""
    sampling: Sampling
    pairing: Pairing | None
    conversation: str | None
    stored: Stored
    ended: tuple[Ended, ...] | None = None
    duel_id: int | None = None
    """The duel that the comparison is of."""


@dataclass(slots=True)
class _Record:
    """Something to write, and who waits for it."""

    what: "Begun | tuple[str, Ended]"
    written: "asyncio.Future[None]"

    @property
    def id(self) -> str | None:
        """Of the first reply that it inserts; None where it updates."""
        return self.what.stored.reply_ids[0] if isinstance(self.what, Begun) else None


STORE = """
WITH batch AS MATERIALIZED (SELECT %s::jsonb AS rows),
prompt AS MATERIALIZED (
    SELECT nextval('prompts_id_seq') AS id, p.* FROM batch, jsonb_to_recordset(rows->'prompts')
    AS p (number int, user_id bigint, conversation_id text, messages jsonb)
), new_prompts AS (
    INSERT INTO prompts (id, user_id, conversation_id, messages)
    SELECT id, user_id, conversation_id, messages FROM prompt
), new_replies AS (
    INSERT INTO replies
        (id, prompt_id, policy, sampling, content, finish_reason, prompt_tokens, completion_tokens, ended_at)
    SELECT r.id, prompt.id, policy, sampling, content, finish_reason, prompt_tokens, completion_tokens,
        CASE WHEN finish_reason IS NOT NULL THEN now() END
    FROM batch, jsonb_to_recordset(rows->'replies') AS r (number int, id text, policy text, sampling jsonb,
        content text, finish_reason text, prompt_tokens int, completion_tokens int)
    JOIN prompt USING (number)
), new_comparisons AS (
    INSERT INTO comparisons (id, prompt_id, user_id, reason, propensity, duel_id)
    SELECT c.id, prompt.id, prompt.user_id, c.reason, c.propensity, c.duel_id
    FROM batch, jsonb_to_recordset(rows->'comparisons')
    AS c (number int, id text, reason text, propensity float8, duel_id bigint)
    JOIN prompt USING (number)
), shown AS (
    INSERT INTO comparison_replies (comparison_id, position, reply_id)
    SELECT s.comparison_id, s.position, s.reply_id FROM batch, jsonb_to_recordset(rows->'shown')
    AS s (comparison_id text, position smallint, reply_id text)
), ended AS MATERIALIZED (
    SELECT e.* FROM batch, jsonb_to_recordset(rows->'ended')
    AS e (id text, content text, finish_reason text, prompt_tokens int, completion_tokens int)
)
UPDATE replies SET content = e.content, finish_reason = e.finish_reason, prompt_tokens = e.prompt_tokens,
    completion_tokens = e.completion_tokens, ended_at = now()
FROM ended AS e WHERE replies.id = e.id AND replies.id = ANY (ARRAY(SELECT id FROM ended))
"""
MAKE_USERS = """
WITH asked AS (SELECT * FROM unnest(%(accounts)s::text[], %(names)s::text[]) AS t (account, name)),
made AS (
    INSERT INTO users (account, name) SELECT DISTINCT account, name FROM asked
    ON CONFLICT (account, name) DO NOTHING RETURNING account, name, id
)
SELECT account, name, id FROM made
UNION SELECT account, name, id FROM users JOIN asked USING (account, name)
"""
UNREACHABLE = (psycopg.OperationalError, psycopg.InterfaceError)


class Journal:
    """One per service process, with a connection of its own. What methods return raises DatabaseUnavailable."""

    def __init__(self, url: URL) -> None:
        self._conninfo = url.set(drivername="postgresql").render_as_string(hide_password=False)
        self._connection: psycopg.AsyncConnection | None = None
        self._cursor: psycopg.AsyncCursor
        """Of that connection, kept: a new one each time costs a tenth of what is done with it."""
        self._waiting: list[_Record] = []
        self._came = asyncio.Event()
        self._idle = asyncio.Event()
        self._users: dict[UserName, int] = {}

    def begin(self, begun: Begun) -> "asyncio.Future[None]":
        """Store a prompt and its replies; done once they are committed."""
        return self._store(begun)

    def end(self, reply_id: str, ended: Ended) -> "asyncio.Future[None]":
        """Store how a reply ended; done once that is committed."""
        return self._store((reply_id, ended))

    def _store(self, what: "Begun | tuple[str, Ended]") -> "asyncio.Future[None]":
        record = _Record(what, asyncio.get_running_loop().create_future())
        self._waiting.append(record)
        self._idle.clear()
        self._came.set()
        return record.written

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Write while the body runs, and to its end what has come."""
        self._idle.set()
        task = asyncio.create_task(self._run(), name="journal")
        try:
            yield
            await self._idle.wait()
        finally:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task
            await self._disconnect()

    async def _run(self) -> None:
        while True:
            await self._came.wait()
            self._came.clear()
            records, self._waiting = self._waiting, []
            await self._write(records)
            if not self._waiting:
                self._idle.set()

    async def _write(self, records: Sequence[_Record]) -> None:
        """Write them all; never raises: whoever waits for a record gets its error."""
        try:
            await self._write_or_again(records)
        except psycopg.Error:  # one of them cannot be stored, or its user has just been removed
            self._users.clear()
            for record in records:
                await self._write_alone(record)
        except Exception as error:
            _settle(records, error)
        else:
            _settle(records, None)

    async def _write_alone(self, record: _Record) -> None:
        try:
            await self._write_or_again([record])
        except Exception as error:
            _settle([record], error)
        else:
            _settle([record], None)

    async def _write_or_again(self, records: Sequence[_Record]) -> None:
        """Write them; where the connection breaks, once more on a new one, without what was committed unnoticed."""
        try:
            await self._execute(records)
        except UNREACHABLE:
            await self._disconnect()
            try:
                stored = await self._stored(records)
                await self._execute([record for record in records if record.id not in stored])
            except UNREACHABLE as error:
                await self._disconnect()
                log.warning("the database does not answer: %s", type(error).__name__)
                raise DatabaseUnavailable(
                    "The database does not answer. Try again.", code="database"
                ) from error

    async def _execute(self, records: Sequence[_Record]) -> None:
        connection = await self._connected()
        begun = [record.what for record in records if isinstance(record.what, Begun)]
        ended = [record.what for record in records if not isinstance(record.what, Begun)]
        await self._learn_users(connection, {one.user for one in begun} - self._users.keys())
        await self._cursor.execute(
            STORE, [msgspec.json.encode(self._rows(begun, ended)).decode()], prepare=True
        )

    async def _connected(self) -> psycopg.AsyncConnection:
        if self._connection is None:
            self._connection = await psycopg.AsyncConnection.connect(
                self._conninfo, autocommit=True, connect_timeout=CONNECT_SECONDS
            )
            self._cursor = self._connection.cursor()
            # STORE is planned once. On a new database that would be for tables which are empty, and by reading them whole,
            # until PostgreSQL next looks at their size: a minute in which they may grow by tens of thousands of replies.
            await self._cursor.execute("SET enable_seqscan = off")
        return self._connection

    async def _disconnect(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            with suppress(psycopg.Error):
                await connection.close()

    async def _stored(self, records: Sequence[_Record]) -> set[str]:
        """Ids of the records whose rows are there already."""
        ids = [record.id for record in records if isinstance(record.what, Begun)]
        cursor = await (await self._connected()).execute("SELECT id FROM replies WHERE id = ANY(%s)", [ids])
        return {row[0] for row in await cursor.fetchall()}

    async def _learn_users(self, connection: psycopg.AsyncConnection, unknown: set[UserName]) -> None:
        """Ids of users, made on first sight, also by two processes at once."""
        if not unknown:
            return
        if len(self._users) > USERS_KNOWN:
            self._users.clear()
        asked = {"accounts": [user.account for user in unknown], "names": [user.name for user in unknown]}
        for _ in range(2):  # again, where another process made one between our two looks
            cursor = await connection.execute(MAKE_USERS, asked)
            self._users |= {UserName(account, name): id_ async for account, name, id_ in cursor}

    def _rows(self, begun: Sequence[Begun], ended: Sequence[tuple[str, Ended]]) -> dict[str, list[Any]]:
        """What STORE writes, table by table. Prompts are numbered, for their replies and comparisons to name them."""
        rows: dict[str, list[Any]] = {"prompts": [], "replies": [], "comparisons": [], "shown": []}
        for number, one in enumerate(begun):
            rows["prompts"].append(
                {
                    "number": number,
                    "user_id": self._users[one.user],
                    "conversation_id": one.conversation,
                    "messages": one.messages,
                }
            )
            rows["replies"] += _reply_rows(number, one)
            if one.pairing is not None:
                rows["comparisons"].append(_comparison_row(number, one, one.pairing))
                rows["shown"] += _shown_rows(one.stored)
        rows["ended"] = [{"id": reply_id, **_ended_row(end)} for reply_id, end in ended]
        return rows


def _reply_rows(number: int, one: Begun) -> list[dict[str, Any]]:
    ended = one.ended or (None,) * len(one.stored.reply_ids)
    return [
        {"number": number, "id": reply_id, "policy": policy, "sampling": one.sampling, **_ended_row(end)}
        for reply_id, policy, end in zip(one.stored.reply_ids, one.policies, ended, strict=True)
    ]


def _ended_row(ended: Ended | None) -> dict[str, Any]:
    """How a reply ended; nothing while it runs."""
    if ended is None:
        return {}
    return {
        "content": ended.content,
        "finish_reason": ended.finish_reason,
        "prompt_tokens": ended.prompt_tokens,
        "completion_tokens": ended.completion_tokens,
    }


def _comparison_row(number: int, one: Begun, pairing: Pairing) -> dict[str, Any]:
    return {
        "number": number,
        "id": one.stored.comparison_id,
        "reason": pairing.reason,
        "propensity": pairing.propensity,
        "duel_id": one.duel_id,
    }


def _shown_rows(stored: Stored) -> list[dict[str, Any]]:
    return [
        {"comparison_id": stored.comparison_id, "position": position, "reply_id": reply_id}
        for position, reply_id in enumerate(stored.reply_ids)
    ]


def _settle(records: Sequence[_Record], error: Exception | None) -> None:
    for record in records:
        if record.written.done():  # its request was cancelled
            continue
        if error is None:
            record.written.set_result(None)
        else:
            record.written.set_exception(error)
