"""Group commit: what is stored when, what happens when the database goes, and that nothing is stored twice."""

import asyncio
from collections.abc import AsyncIterator

import pytest

from service import database as db
from service.engine import Message, Sampling
from service.errors import DatabaseUnavailable
from service.journal import Begun, Ended, Journal, Stored, UserName
from service.pairing import Pairing
from service.policies import BASE
from service.settings import Settings
from tests.service.conftest import Rows, wait_until

pytestmark = pytest.mark.database
SAMPLING = Sampling(8, 1.0, 1.0, 0.0, ("x",), None, 0.0, 0.0)
WHOLE = Ended("said", "stop", 3, 2)


def begun(user: str = "ada", *, replies: int = 1, policy: str = BASE, ended: bool = False) -> Begun:
    pairing = Pairing("always", 1.0) if replies > 1 else None
    return Begun(
        user=UserName("", user),
        messages=[Message("user", 'hé \\ "quoted"')],
        policies=(policy,) * replies,
        sampling=SAMPLING,
        pairing=pairing,
        conversation=None,
        stored=Stored.new(replies, pairing is not None),
        ended=(WHOLE,) * replies if ended else None,
    )


@pytest.fixture
async def journal(prepared: Settings) -> AsyncIterator[Journal]:
    journal = Journal(db.database_url(prepared))
    async with journal.running():
        yield journal


async def test_a_prompt_its_replies_and_their_comparison_are_there_on_return(
    journal: Journal, rows: Rows
) -> None:
    one = begun(replies=2)
    await journal.begin(one)
    [(name, messages, reason, propensity)] = rows(
        "SELECT u.name, p.messages, c.reason, c.propensity FROM comparisons c"
        " JOIN prompts p ON p.id = c.prompt_id JOIN users u ON u.id = c.user_id WHERE u.id = p.user_id"
    )
    assert (name, reason, propensity) == ("ada", "always", 1.0)
    assert messages == [{"role": "user", "content": 'hé \\ "quoted"'}]
    shown = rows("SELECT reply_id FROM comparison_replies ORDER BY position")
    assert shown == [(reply_id,) for reply_id in one.stored.reply_ids]
    [(sampling, content, ended_at)] = rows("SELECT DISTINCT sampling::text, content, ended_at FROM replies")
    assert '"stop": ["x"]' in sampling
    assert (content, ended_at) == (None, None)
    await journal.end(one.stored.reply_ids[0], WHOLE)
    assert rows(
        "SELECT content, finish_reason, prompt_tokens, completion_tokens FROM replies WHERE ended_at IS NOT NULL"
    ) == [("said", "stop", 3, 2)]


async def test_many_at_once_share_statements_and_each_keeps_its_own(journal: Journal, rows: Rows) -> None:
    many = [begun(f"user{i % 7}", replies=1 + i % 2, ended=i % 3 == 0) for i in range(60)]
    await asyncio.gather(*(journal.begin(one) for one in many))
    assert rows("SELECT count(*) FROM prompts") == [(60,)]
    assert rows("SELECT count(*) FROM users") == [(7,)]
    for one in many:
        [(name, num_replies, num_ended)] = rows(
            "SELECT u.name, count(*), count(r.ended_at) FROM replies r JOIN prompts p ON p.id = r.prompt_id"
            " JOIN users u ON u.id = p.user_id WHERE p.id = (SELECT prompt_id FROM replies WHERE id = %s) GROUP BY 1",
            one.stored.reply_ids[0],
        )
        expected = len(one.stored.reply_ids)
        assert (name, num_replies, num_ended) == (one.user.name, expected, expected if one.ended else 0)
    assert rows("SELECT count(DISTINCT xmin::text) < 30 FROM prompts") == [(True,)]  # transactions


async def test_one_that_cannot_be_stored_does_not_fail_the_others(journal: Journal, rows: Rows) -> None:
    results = await asyncio.gather(
        journal.begin(begun()),
        journal.begin(begun(policy="policy-999999")),
        journal.begin(begun()),
        return_exceptions=True,
    )
    assert [isinstance(result, Exception) for result in results] == [False, True, False]
    assert rows("SELECT count(*) FROM replies") == [(2,)]


async def test_a_user_who_was_removed_meanwhile_is_made_anew(journal: Journal, rows: Rows) -> None:
    await journal.begin(begun())
    for table in ("replies", "prompts", "users"):
        rows(f"DELETE FROM {table}")
    await journal.begin(begun())
    assert rows("SELECT name FROM users") == [("ada",)]


async def test_a_broken_connection_is_made_anew_and_nothing_is_stored_twice(
    journal: Journal, rows: Rows
) -> None:
    await journal.begin(begun())
    rows(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> pg_backend_pid()"
        " AND datname = current_database()"
    )
    again = begun(replies=2)
    await journal.begin(again)
    assert rows("SELECT count(*) FROM replies") == [(3,)]


async def test_a_commit_whose_answer_was_lost_is_not_repeated(
    journal: Journal, rows: Rows, monkeypatch: pytest.MonkeyPatch
) -> None:
    import psycopg

    execute, lost = journal._execute, []

    async def execute_and_lose_the_answer(records: object) -> None:
        await execute(records)  # type: ignore[arg-type]
        if not lost:
            lost.append(1)
            raise psycopg.OperationalError("the connection broke after the commit")

    monkeypatch.setattr(journal, "_execute", execute_and_lose_the_answer)
    await journal.begin(begun(replies=2))
    assert lost
    assert rows("SELECT count(*) FROM replies") == [(2,)]
    assert rows("SELECT count(*) FROM prompts") == [(1,)]


async def test_without_a_database_whoever_waits_is_told(prepared: Settings) -> None:
    journal = Journal(db.database_url(prepared).set(port=1))
    async with journal.running():
        with pytest.raises(DatabaseUnavailable):
            await journal.begin(begun())


async def test_what_has_come_is_written_before_the_journal_closes(prepared: Settings, rows: Rows) -> None:
    journal = Journal(db.database_url(prepared))
    async with journal.running():
        written = [journal.begin(begun()) for _ in range(5)]
        await asyncio.sleep(0)
    await asyncio.gather(*written)
    assert rows("SELECT count(*) FROM replies") == [(5,)]


async def test_on_a_new_database_the_end_of_a_reply_does_not_read_the_others(
    prepared: Settings, rows: Rows
) -> None:
    """PostgreSQL plans a prepared statement for tables as small as they are then, and keeps the plan as they grow."""
    journal = Journal(db.database_url(prepared))
    async with journal.running():
        for _ in range(40):
            one = begun()
            await journal.begin(one)
            await journal.end(one.stored.reply_ids[0], WHOLE)

    def num_read() -> int:
        [(number,)] = rows(
            "SELECT seq_tup_read + idx_tup_fetch FROM pg_stat_user_tables WHERE relname = 'replies'"
        )
        return int(number)

    wait_until(lambda: num_read() >= 40)  # PostgreSQL counts when the journal's connection has ended
    assert num_read() == 40
