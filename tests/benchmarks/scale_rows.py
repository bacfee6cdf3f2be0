"""Fills a migrated database with as much as years of use leave, in the shapes that the service writes. Used by `scale.py`.

A tenth of a percent of the users say four percent of everything; ids grow with time, the last rows are of just now. Half of
the prompts are turns of conversations; two of three replies are in comparisons, of which 15 in 16 have a vote; the last
400 comparisons are a duel's.
"""

import random
from collections.abc import Iterator

import psycopg

SEED = 0
DAYS = 90
NUM_TEXTS = 8192
NUM_POLICIES = 30
WORDS = [
    f"{start}{end}" for start in ("ka", "lo", "me", "su", "ti") for end in ("", "n", "ra", "der", "lish")
]
LENGTHS = {"question": (3, 60), "answer": (10, 250)}
"""Words of a text; an answer has about 550 characters, a question about 160."""

# :replies, :comparisons, :prompts, :users, :conversations are replaced by numbers before a statement runs.
STATEMENTS = {
    "policies": """
        INSERT INTO policies (name, parent, path, state, manifest)
        SELECT 'policy-' || lpad(i::text, 6, '0'), 'policy-000000', 'policies/' || i, 'verified', '{}'
        FROM generate_series(1, :policies) AS i""",
    "users": """
        INSERT INTO users (name, created_at)
        SELECT 'user-' || i, now() - :days * interval '1 day' FROM generate_series(1, :users) AS i""",
    "conversations": """
        INSERT INTO conversations (id, user_id, created_at)
        SELECT 'conv-' || md5(i::text), pg_temp.user_of(i), pg_temp.at(i, :conversations)
        FROM generate_series(1, :conversations) AS i""",
    "prompts": """
        INSERT INTO prompts (user_id, conversation_id, messages, created_at)
        SELECT coalesce(c.user_id, pg_temp.user_of(i)), c.id, CASE
            WHEN i % 4 = 0 THEN jsonb_build_array(pg_temp.said('user', q.content))
            ELSE jsonb_build_array(pg_temp.said('user', q.content), pg_temp.said('assistant', a.content),
                pg_temp.said('user', q.content)) END, pg_temp.at(i, :prompts)
        FROM generate_series(1, :prompts) AS i
        JOIN question AS q ON q.id = hashint8(i) & 8191 JOIN answer AS a ON a.id = hashint8(-i) & 8191
        LEFT JOIN conversations AS c ON i % 2 = 0 AND c.id = 'conv-' || md5((i / 2 % :conversations + 1)::text)
        ORDER BY i""",
    "duels": """
        INSERT INTO duels (kind, challenger, incumbent, votes_per_user, outcome, created_at, ended_at)
        SELECT 'trial', 'policy-' || lpad(:policies::text, 6, '0'), 'policy-000000', 1, 'better', now(), now()""",
    "comparisons": """
        INSERT INTO comparisons (id, prompt_id, user_id, reason, propensity, duel_id, created_at)
        SELECT 'cmp-' || md5(number::text), id, user_id, CASE WHEN number % 10 = 0 THEN 'evaluation' ELSE 'auto' END,
            0.27, CASE WHEN number > :comparisons - 400 THEN (SELECT id FROM duels) END, created_at
        FROM (SELECT *, id * :comparisons / :prompts AS number FROM prompts) AS p
        WHERE number > (id - 1) * :comparisons / :prompts ORDER BY id""",
    "replies": """
        INSERT INTO replies (id, prompt_id, policy, sampling, content, finish_reason, prompt_tokens, completion_tokens,
            created_at, ended_at)
        SELECT 'chatcmpl-' || md5(p.id || '-' || n), p.id,
            'policy-' || lpad((p.id * :policies / :prompts)::text, 6, '0'),
            '{"max_tokens": 512, "temperature": 1.0, "top_p": 1.0, "stop": [], "seed": null, "presence_penalty": 0.0,
              "frequency_penalty": 0.0, "logprobs": null}', a.content, 'stop', 200, length(a.content) / 4,
            p.created_at, p.created_at + interval '4 s'
        FROM prompts AS p LEFT JOIN comparisons AS c ON c.prompt_id = p.id
        CROSS JOIN generate_series(0, CASE WHEN c.id IS NULL THEN 0 ELSE 1 END) AS n
        JOIN answer AS a ON a.id = hashint8(p.id * 2 + n) & 8191 ORDER BY p.id, n""",
    "comparison_replies": """
        INSERT INTO comparison_replies (comparison_id, position, reply_id)
        SELECT id, n, 'chatcmpl-' || md5(prompt_id || '-' || n)
        FROM comparisons CROSS JOIN generate_series(0, 1) AS n ORDER BY prompt_id, n""",
    "votes": """
        INSERT INTO votes (comparison_id, user_id, choice, comment, tags, created_at, updated_at)
        SELECT id, user_id, ('{first,second,tie,neither}'::text[])[1 + prompt_id % 4],
            CASE WHEN prompt_id % 20 = 0 THEN 'I like this one better, it is warmer.' END,
            CASE WHEN prompt_id % 20 = 0 THEN '["tone"]'::jsonb ELSE '[]' END, created_at, created_at
        FROM (:numbered) AS c WHERE number % 16 <> 0 ORDER BY number""",
    "feedback_events": """
        INSERT INTO feedback_events (comparison_id, user_id, kind, action, content, created_at)
        SELECT comparison_id, user_id, 'vote', action,
            jsonb_build_object('choice', choice, 'comment', comment, 'tags', tags), created_at
        FROM votes JOIN (VALUES ('given', 1), ('revised', 10)) AS a (action, nth) ON votes.id % nth = 0
        ORDER BY votes.id""",
    "rankings": """
        INSERT INTO rankings (comparison_id, user_id, ranks, tags, created_at, updated_at)
        SELECT id, user_id, '[1, 2]', '[]', created_at, created_at
        FROM (:numbered) AS c WHERE number % 16 = 0 ORDER BY number""",
    "demonstrations": """
        INSERT INTO demonstrations (id, prompt_id, user_id, content, corrected, corrects, tags, created_at)
        SELECT 'dem-' || md5(p.id::text), p.id, p.user_id, 'Better: ' || r.content, r.content, r.id, '[]', p.created_at
        FROM prompts AS p JOIN replies AS r ON r.id = 'chatcmpl-' || md5(p.id || '-0') WHERE p.id % 100 = 0""",
    "idempotent_calls": """
        INSERT INTO idempotent_calls (user_id, key, request_sha256, answer, created_at)
        SELECT user_id, md5(id::text), md5(id::text) || md5(id::text), '{"choice": "first"}', created_at
        FROM votes WHERE created_at > now() - interval '1 day'""",
    "snapshots": """
        INSERT INTO snapshots (sha256, num_votes, num_feedback, feedback_sha256)
        SELECT md5(n::text) || md5(n::text), :votes / 4 * n, :votes / 4 * n, md5(n::text) || md5(n::text)
        FROM generate_series(1, 2) AS n""",
    "snapshot_feedback": """
        INSERT INTO snapshot_feedback (sha256, kind, feedback_id)
        SELECT sha256, 'vote', votes.id::text FROM snapshots JOIN votes ON votes.id <= num_votes
        UNION ALL
        SELECT sha256, 'prompt', prompts.id::text FROM snapshots JOIN prompts ON prompts.id <= num_votes""",
    "cycles": """
        INSERT INTO cycles (trigger, stage, snapshot_sha256, policy, created_at, ended_at)
        SELECT 'votes', 'promoted', md5((1 + i % 2)::text) || md5((1 + i % 2)::text),
            'policy-' || lpad(i::text, 6, '0'), pg_temp.at(i, :policies), pg_temp.at(i, :policies)
        FROM generate_series(1, :policies) AS i""",
}
NUMBERED = "SELECT *, row_number() OVER (ORDER BY prompt_id) AS number FROM comparisons"
FUNCTIONS = """
    CREATE FUNCTION pg_temp.user_of(i bigint) RETURNS bigint LANGUAGE sql IMMUTABLE AS
        $$ SELECT 1 + floor(:users * power((hashint8(i) & 1048575) / 1048576.0, 3))::bigint $$;
    CREATE FUNCTION pg_temp.at(i bigint, most bigint) RETURNS timestamptz LANGUAGE sql STABLE AS
        $$ SELECT now() - (most - i) * (:days * interval '1 day') / most $$;
    CREATE FUNCTION pg_temp.said(role text, content text) RETURNS jsonb LANGUAGE sql IMMUTABLE AS
        $$ SELECT jsonb_build_object('role', role, 'content', content) $$
"""


def fill(conninfo: str, num_replies: int, num_votes: int) -> dict[str, int]:
    """Insert everything; number of rows by table. The database must be migrated, with the base as its only policy."""
    comparisons = num_votes * 16 // 15
    prompts = num_replies - comparisons
    numbers = {
        "replies": num_replies,
        "votes": num_votes,
        "comparisons": comparisons,
        "prompts": prompts,
        "users": max(num_replies // 50, 10),
        "conversations": max(prompts // 10, 10),
        "policies": NUM_POLICIES,
        "days": DAYS,
    }
    with psycopg.connect(conninfo, autocommit=True) as connection:
        # No checks of foreign keys, row by row: what is inserted here agrees by construction.
        connection.execute("SET session_replication_role = replica")
        _make_texts(connection)
        for statement in FUNCTIONS.split(";"):
            connection.execute(_with(numbers, statement))
        rows = {
            table: connection.execute(_with(numbers, text)).rowcount for table, text in STATEMENTS.items()
        }
        connection.execute("VACUUM ANALYZE")
        # What this read is counted before we hang up: a backend that is busy ending counts late, as if others had read it.
        connection.execute("SELECT pg_stat_force_next_flush()")
    return rows


def _with(numbers: dict[str, int], statement: str) -> bytes:
    statement = statement.replace(":numbered", NUMBERED)
    for name, number in numbers.items():
        statement = statement.replace(f":{name}", f"{number}::bigint")
    return statement.encode()


def _make_texts(connection: "psycopg.Connection[tuple[object, ...]]") -> None:
    chance = random.Random(SEED)
    for table, (least, most) in LENGTHS.items():
        connection.execute(f"CREATE TEMPORARY TABLE {table} (id integer PRIMARY KEY, content text)".encode())
        with connection.cursor().copy(f"COPY {table} FROM STDIN".encode()) as copy:
            for row in enumerate(_texts(chance, least, most)):
                copy.write_row(row)
        connection.execute(f"ANALYZE {table}".encode())


def _texts(chance: random.Random, least: int, most: int) -> Iterator[str]:
    for _ in range(NUM_TEXTS):
        yield " ".join(chance.choices(WORDS, k=chance.randint(least, most)))
