"""Exports, over HTTP and with a real database."""

import io
import json
from typing import Any

import pyarrow.parquet as pq
import pytest

from tests.service.conftest import Rows, Serve, wait_until
from tests.service.fake_engine import FakeEngine
from tests.service.transfer import KINDS, ODD, download, empty, give_feedback, upload

pytestmark = pytest.mark.database


def test_a_vote_is_exported_with_all_that_it_hangs_on(serve: Serve, rows: Rows) -> None:
    engine = FakeEngine()
    client = serve(engine)
    give_feedback(client, engine)
    *_, last = download(client, "votes").split(b"\n")[:-1]
    vote = json.loads(last)
    assert (vote["choice"], vote["comment"], vote["tags"]) == ("first", ODD, ["tone", ODD])
    assert vote["user"] == {"account": "", "name": "anonymous"}
    comparison = vote["comparison"]
    assert (comparison["reason"], comparison["propensity"]) == ("always", 1.0)
    assert comparison["prompt"]["messages"] == [{"role": "user", "content": ODD}]
    assert comparison["prompt"]["conversation"] is None
    assert {reply["policy"] for reply in comparison["replies"]} == {"policy-000000"}
    assert comparison["replies"][0]["sampling"]["temperature"] == 0.7
    shown = rows(
        "SELECT reply_id FROM comparison_replies WHERE comparison_id = %s ORDER BY position", comparison["id"]
    )
    assert [(reply["id"],) for reply in comparison["replies"]] == shown


def test_pairs_come_from_votes_and_where_asked_from_rankings(serve: Serve) -> None:
    engine = FakeEngine()
    client = serve(engine)
    give_feedback(client, engine)
    assert len(download(client, "pairs").splitlines()) == 3
    with_rankings = download(client, "pairs", rankings=True)
    assert with_rankings.startswith(download(client, "pairs"))
    *_, pair = [json.loads(line) for line in with_rankings.split(b"\n")[3:-1]]
    assert pair["prompt"] == [{"role": "user", "content": "rank"}]
    refused = client.get("/operator/export/votes?rankings=true")
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "rankings")


def test_both_files_hold_the_same_and_say_what_they_are(serve: Serve) -> None:
    engine = FakeEngine()
    client = serve(engine)
    give_feedback(client, engine)
    for kind in KINDS:
        answer = client.get(f"/operator/export/{kind}?format=parquet")
        assert answer.headers["content-type"] == "application/vnd.apache.parquet"
        assert answer.headers["content-disposition"] == f'attachment; filename="ratchet-{kind}.parquet"'
        table = pq.read_table(io.BytesIO(answer.content))
        answer = client.get(f"/operator/export/{kind}")
        assert answer.headers["content-type"] == "application/jsonl"
        assert answer.headers["content-disposition"] == f'attachment; filename="ratchet-{kind}.jsonl"'
        expected = [json.loads(line) for line in answer.content.split(b"\n")[:-1]]
        assert table.num_rows == len(expected) > 0
        assert table.column_names == list(expected[0])
        for name in {"choice", "ranks", "winner", "chosen", "content", "tags"} & set(table.column_names):
            assert table.column(name).to_pylist() == [row[name] for row in expected]


def test_an_empty_database_makes_an_empty_file(serve: Serve) -> None:
    client = serve(FakeEngine())
    for kind in KINDS:
        assert download(client, kind) == b""
        assert pq.read_table(io.BytesIO(download(client, kind, format="parquet"))).num_rows == 0


def test_a_long_export_has_every_row_once_in_order_and_is_of_one_instant(serve: Serve, rows: Rows) -> None:
    client = serve(FakeEngine())
    many(rows, 5000)
    with client.stream("GET", "/operator/export/votes") as answer:
        content = answer.iter_raw()
        read = [next(content)]
        rows("DELETE FROM votes WHERE id > 1000")
        read.extend(content)
    votes = [json.loads(line) for line in b"".join(read).split(b"\n")[:-1]]
    assert [vote["id"] for vote in votes] == list(range(1, 5001))
    assert [vote["comparison"]["replies"][1]["content"] for vote in votes] == [
        f"b{n}" for n in range(1, 5001)
    ]
    parquet = pq.ParquetFile(io.BytesIO(download(client, "votes", format="parquet")))
    assert parquet.read().column("id").to_pylist() == list(range(1, 1001))


def test_an_export_is_the_same_whatever_the_database_thinks_of_time_and_language(
    serve: Serve, rows: Rows
) -> None:
    engine = FakeEngine()
    client = serve(engine)
    give_feedback(client, engine)
    before = download(client, "votes")
    [(name,)] = rows("SELECT current_database()")
    rows(f"ALTER DATABASE {name} SET timezone = 'Asia/Kolkata'")
    assert download(serve(FakeEngine()), "votes") == before


def test_an_export_that_nobody_reads_on_lets_go_of_its_connection(serve: Serve, rows: Rows) -> None:
    client = serve(FakeEngine())
    many(rows, 20_000)
    open_transactions = (
        "SELECT count(*) FROM pg_stat_activity "
        "WHERE datname = current_database() AND state = 'idle in transaction'"
    )
    with client.stream("GET", "/operator/export/votes") as answer:
        content = answer.iter_raw()
        next(content)
        wait_until(lambda: rows(open_transactions) == [(1,)])
    wait_until(lambda: rows(open_transactions) == [(0,)])


def test_a_database_that_is_gone_is_answered_before_the_file_begins(serve: Serve, rows: Rows) -> None:
    client = serve(FakeEngine())
    rows("ALTER TABLE votes RENAME TO elsewhere")
    assert client.get("/operator/export/votes").status_code == 500


def test_only_operators_export_and_import(serve: Serve) -> None:
    keys = {
        role: serve(FakeEngine()).post("/operator/keys", json={"account": "acme", "role": role}).json()["key"]
        for role in ("labeler", "operator")
    }
    client = serve(FakeEngine(), require_keys=True)
    for key, status in ((None, 401), (keys["labeler"], 403), (keys["operator"], 200)):
        headers = {"authorization": f"Bearer {key}"} if key else {}
        assert client.get("/operator/export/votes", headers=headers).status_code == status
    assert upload(client, "votes", b"{}").status_code == 401


def test_the_api_describes_its_files(serve: Serve) -> None:
    paths = serve(FakeEngine()).get("/openapi.json").json()["paths"]
    export, take = paths["/operator/export/{kind}"]["get"], paths["/operator/import/{kind}"]["post"]
    for described in (export["responses"]["200"], take["requestBody"]):
        assert set(described["content"]) == {"application/jsonl", "application/vnd.apache.parquet"}
    for parameter in (*export["parameters"], *take["parameters"]):
        assert parameter["description"]
    assert client_kinds(export) == client_kinds(take) == set(KINDS)


def client_kinds(call: dict[str, Any]) -> set[str]:
    [kind] = [parameter for parameter in call["parameters"] if parameter["name"] == "kind"]
    return set(kind["schema"]["enum"])


def many(rows: Rows, num: int) -> None:
    """Votes by the thousand, past the service."""
    empty(rows)
    rows("INSERT INTO users (name) VALUES ('u')")
    rows(
        """INSERT INTO prompts (user_id, messages) SELECT 1, '[{"role": "user", "content": "hi"}]'
         FROM generate_series(1, %s)""",
        num,
    )
    for letter in "ab":
        rows(
            f"""INSERT INTO replies (id, prompt_id, policy, sampling, content, finish_reason)
             SELECT '{letter}' || n, n, 'policy-000000', '{{}}', '{letter}' || n, 'stop'
             FROM generate_series(1, %s) AS n""",
            num,
        )
    rows(
        """INSERT INTO comparisons (id, prompt_id, user_id, reason, propensity)
         SELECT 'cmp-' || n, n, 1, 'always', 1 FROM generate_series(1, %s) AS n""",
        num,
    )
    rows(
        """INSERT INTO comparison_replies SELECT 'cmp-' || n, p, chr(97 + p) || n
         FROM generate_series(1, %s) AS n, generate_series(0, 1) AS p""",
        num,
    )
    rows(
        """INSERT INTO votes (comparison_id, user_id, choice, tags) SELECT 'cmp-' || n, 1, 'first', '[]'
         FROM generate_series(1, %s) AS n""",
        num,
    )
