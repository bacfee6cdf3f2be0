"""Imports, over HTTP and with a real database: what was exported comes back, and what is wrong leaves no trace."""

import hashlib
import io
import json
import logging
from collections.abc import Callable
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import Result
from sqlalchemy import text

from service import database as db
from service import exports
from service.formats import UserRecord
from service.intake import Users
from service.settings import Settings
from tests.service.conftest import Rows, Serve, command_line
from tests.service.fake_engine import FakeEngine
from tests.service.test_formats import ASKED, BLUE, GREEN
from tests.service.transfer import KINDS, ODD, download, empty, give_feedback, upload

pytestmark = pytest.mark.database

PAIR = {"prompt": ASKED, "chosen": BLUE, "rejected": GREEN}
BATTLE = {
    "question_id": "5" * 32,
    "model_a": "vicuna",
    "model_b": "koala",
    "winner": "model_b",
    "judge": "arena_user_7",
    "conversation_a": ASKED + BLUE,
    "conversation_b": ASKED + GREEN,
    "turn": 1,
    "anony": True,
    "language": "English",
    "tstamp": 1682351591.0,
}
TABLES = ("users", "prompts", "replies", "comparisons", "votes", "rankings", "demonstrations", "imports")


def jsonl(*rows: dict[str, Any]) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def parquet(content: bytes) -> pa.Table:
    return pq.read_table(io.BytesIO(content))


def counts(rows: Rows) -> dict[str, int]:
    return {table: rows(f"SELECT count(*) FROM {table}")[0][0] for table in TABLES}


# --- there and back


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("format", ["jsonl", "parquet"])
def test_what_was_exported_comes_back_into_an_empty_database(
    serve: Serve, rows: Rows, kind: str, format: str
) -> None:
    engine = FakeEngine()
    client = serve(engine)
    give_feedback(client, engine)
    query = {"rankings": True} if kind == "pairs" else {}
    before = download(client, kind, **query)
    file = download(client, kind, format=format, **query)
    empty(rows)
    answer = upload(client, kind, file)
    assert answer.status_code == 201, answer.text
    num = len(before.split(b"\n")) - 1
    assert (answer.json()["num_rows"], answer.json()["num_new"], answer.json()["left_out"]) == (num, num, {})
    assert download(client, kind) == before
    assert parquet(download(client, kind, format="parquet")).num_rows == num
    if format == "parquet":
        assert parquet(download(client, kind, format="parquet")).equals(parquet(file))


@pytest.mark.parametrize(
    "order", [("votes", "rankings", "demonstrations"), ("demonstrations", "rankings", "votes")]
)
def test_everything_comes_back_whole_in_any_order(serve: Serve, rows: Rows, order: tuple[str, ...]) -> None:
    engine = FakeEngine()
    client = serve(engine)
    give_feedback(client, engine)
    correct_a_compared_reply(client, rows)
    before = {kind: download(client, kind) for kind in order}
    prompts = "SELECT id, conversation_id, messages FROM prompts ORDER BY id"
    known = rows(prompts)
    empty(rows)
    for kind in order:
        assert upload(client, kind, before[kind]).status_code == 201
    assert {kind: download(client, kind) for kind in order} == before
    assert rows(prompts) == known
    assert rows("SELECT id FROM replies WHERE policy IS NOT NULL") == []
    assert rows("SELECT DISTINCT imported_policy FROM replies") == [("policy-000000",)]


def correct_a_compared_reply(client: Any, rows: Rows) -> None:
    [(reply,)] = rows(
        "SELECT reply_id FROM comparison_replies JOIN comparisons ON comparisons.id = comparison_id "
        "JOIN users ON users.id = user_id WHERE name = 'bob' AND position = 1"
    )
    body = {"corrects": reply, "content": "better", "user": "bob"}
    assert client.post("/v1/demonstrations", json=body).status_code == 201


def test_what_is_there_already_stays_as_it_is(serve: Serve, rows: Rows) -> None:
    engine = FakeEngine()
    client = serve(engine)
    give_feedback(client, engine)
    before = counts(rows)
    files = {
        kind: download(client, kind) for kind in KINDS if kind != "pairs"
    }  # a pair has no id to know it by
    for kind, file in files.items():
        answer = upload(client, kind, file).json()
        assert (answer["num_rows"], answer["num_new"]) == (file.count(b"\n"), 0)
    assert counts(rows) == before | {
        "users": before["users"] + len(judges(files["battles"])),
        "imports": len(files),
    }
    assert rows("SELECT id FROM replies WHERE policy IS NULL") == []
    assert {kind: download(client, kind) for kind in files} == files


def judges(file: bytes) -> set[str]:
    return {json.loads(line)["judge"] for line in file.split(b"\n")[:-1]}


def test_a_vote_that_was_lost_comes_back_beside_those_that_were_given_since(serve: Serve, rows: Rows) -> None:
    engine = FakeEngine()
    client = serve(engine)
    give_feedback(client, engine)
    before = download(client, "votes")
    rows("DELETE FROM votes WHERE id = 2")
    answer = upload(client, "votes", before)
    assert answer.json()["num_new"] == 1
    assert download(client, "votes") == before


def test_numbers_that_another_row_has_are_replaced(serve: Serve, rows: Rows) -> None:
    engine = FakeEngine()
    client = serve(engine)
    give_feedback(client, engine)
    theirs = [json.loads(line) for line in download(client, "votes").split(b"\n")[:-1]]
    empty(rows)
    give_feedback(client, engine)
    ours = download(client, "votes")
    assert upload(client, "votes", jsonl(*theirs)).json()["num_new"] == 5
    votes = [json.loads(line) for line in download(client, "votes").split(b"\n")[:-1]]
    assert download(client, "votes").startswith(ours)
    assert [vote["id"] for vote in votes[:5]] == [vote["id"] for vote in theirs]
    for vote, their in zip(votes[5:], theirs, strict=True):
        assert vote["id"] > 5
        assert without_numbers(vote) == without_numbers(their)


def without_numbers(vote: dict[str, Any]) -> dict[str, Any]:
    prompt = vote["comparison"]["prompt"] | {"id": None}
    return vote | {"id": None, "comparison": vote["comparison"] | {"prompt": prompt}}


def test_who_votes_after_an_import_gets_numbers_that_are_free(serve: Serve, rows: Rows) -> None:
    engine = FakeEngine()
    client = serve(engine)
    give_feedback(client, engine)
    file = [json.loads(line) for line in download(client, "votes").split(b"\n")[:-1]]
    for row, number in zip(file, (3, 1, 10_000, 2, 1 << 60), strict=True):
        row["id"] = row["comparison"]["prompt"]["id"] = number
    empty(rows)
    assert upload(client, "votes", jsonl(*file)).json()["num_new"] == 5
    give_feedback(client, engine)
    votes = [number for (number,) in rows("SELECT id FROM votes ORDER BY id")]
    assert votes[:4] == [1, 2, 3, 10_000]
    assert len(votes) == 10
    assert votes[-1] < 20_000  # one that is out of all proportion is not kept


def test_rows_may_name_the_same_prompt_comparison_or_user_again(serve: Serve, rows: Rows) -> None:
    engine = FakeEngine()
    client = serve(engine)
    give_feedback(client, engine)
    [first, *_] = [json.loads(line) for line in download(client, "rankings").split(b"\n")[:-1]]
    second = first | {"id": 2, "user": {"account": "acme", "name": "max"}, "ranks": [1, 1, 2]}
    empty(rows)
    assert upload(client, "rankings", jsonl(first, second, second)).json()["num_new"] == 2
    assert rows("SELECT count(*) FROM comparisons") == rows("SELECT count(*) FROM prompts") == [(1,)]
    assert [json.loads(line) for line in download(client, "rankings").split(b"\n")[:-1]] == [first, second]


# --- pairs and battles from elsewhere


def test_pairs_become_votes_of_the_imports_own_user(serve: Serve, rows: Rows) -> None:
    client = serve(FakeEngine())
    hh = "\n\nHuman: Hi\n\nAssistant: "
    answer = upload(client, "pairs", jsonl(PAIR, {"chosen": hh + "a", "rejected": hh + "b"}, PAIR), "hh-rlhf")
    assert (answer.status_code, answer.json()["num_new"]) == (201, 3)
    assert rows("SELECT DISTINCT account, name FROM votes JOIN users ON users.id = user_id") == [
        ("import", "hh-rlhf")
    ]
    assert rows("SELECT DISTINCT reason, propensity, import_id FROM comparisons") == [("import", 1.0, 1)]
    assert rows("SELECT DISTINCT policy, imported_policy, finish_reason FROM replies") == [
        (None, None, "stop")
    ]
    assert [json.loads(line) for line in download(client, "pairs").split(b"\n")[:-1]] == [
        PAIR,
        {
            "prompt": [{"role": "user", "content": "Hi"}],
            "chosen": [{"role": "assistant", "content": "a"}],
            "rejected": [{"role": "assistant", "content": "b"}],
        },
        PAIR,
    ]


def test_battles_become_votes_of_their_judges(serve: Serve, rows: Rows) -> None:
    client = serve(FakeEngine())
    another = BATTLE | {"question_id": "6" * 32, "winner": "tie (bothbad)", "judge": None}
    assert upload(client, "battles", jsonl(BATTLE, another), "arena").status_code == 201
    assert rows(
        "SELECT account, name, choice FROM votes JOIN users ON users.id = user_id ORDER BY votes.id"
    ) == [
        ("import", "arena_user_7", "second"),
        ("import", "arena", "neither"),
    ]
    assert rows("SELECT DISTINCT policy, imported_policy FROM replies ORDER BY imported_policy") == [
        (None, "koala"),
        (None, "vicuna"),
    ]
    first, second = [json.loads(line) for line in download(client, "battles").split(b"\n")[:-1]]
    assert first == BATTLE | {"language": "unknown"}
    assert second == another | {"language": "unknown", "judge": "arena"}


def test_two_judges_of_one_battle_are_two_votes_and_another_text_under_its_id_is_refused(
    serve: Serve, rows: Rows
) -> None:
    client = serve(FakeEngine())
    other_judge, other_text = BATTLE | {"judge": "8"}, BATTLE | {"conversation_a": ASKED + ASKED + BLUE}
    refused = upload(client, "battles", jsonl(BATTLE, other_text | {"conversation_b": ASKED + ASKED + GREEN}))
    assert "line 2: comparison: cmp-5555" in refused.json()["error"]["message"]
    assert upload(client, "battles", jsonl(BATTLE, other_judge)).json()["num_new"] == 2
    assert rows("SELECT count(*) FROM comparisons") == [(1,)]


def test_rows_without_a_place_are_left_out_and_counted(serve: Serve, rows: Rows) -> None:
    client = serve(FakeEngine())
    same = PAIR | {"rejected": BLUE}
    answer = upload(client, "pairs", jsonl(PAIR, same, same, PAIR | {"chosen": BLUE + ASKED + BLUE})).json()
    assert (answer["num_rows"], answer["num_new"]) == (4, 1)
    assert answer["left_out"] == {
        "the two replies are the same": 2,
        "the two sides differ before the last message": 1,
    }
    assert rows("SELECT num_rows, num_new FROM imports") == [(4, 1)]


def test_foreign_parquet_is_read_by_the_columns_that_matter(serve: Serve, rows: Rows) -> None:
    client = serve(FakeEngine())
    sink = io.BytesIO()
    more = BATTLE | {"toxic_chat_tag": {"roberta": 0.5}, "question_id": "7" * 32}
    pq.write_table(pa.Table.from_pylist([more | {"conversation_a": ASKED + BLUE}] * 1), sink)
    assert upload(client, "battles", sink.getvalue()).json()["num_new"] == 1
    assert rows("SELECT format FROM imports") == [("battles.parquet",)]


# --- once, and all or nothing


def test_the_same_file_again_is_refused_by_name(serve: Serve, rows: Rows) -> None:
    client = serve(FakeEngine())
    file = jsonl(PAIR)
    first = upload(client, "pairs", file, "mine")
    assert first.json()["sha256"] == hashlib.sha256(file).hexdigest()
    before = counts(rows)
    again = upload(client, "pairs", file, "yours").json()["error"]
    assert (again["code"], "import 1, 'mine', 1 rows" in again["message"]) == ("import_known", True)
    assert counts(rows) == before


def test_a_second_import_at_the_same_time_is_told_to_wait(serve: Serve, database: Settings) -> None:
    client = serve(FakeEngine())
    engine = db.sync_engine(database)
    with engine.connect() as connection:
        connection.execute(text("SELECT pg_advisory_lock(7203002)"))
        refused = upload(client, "pairs", jsonl(PAIR))
        assert (refused.status_code, refused.json()["error"]["code"]) == (409, "import_running")
        # Who only leaves keeps it a moment longer.
        connection.execute(text("SELECT pg_advisory_unlock(7203002)"))
    engine.dispose()
    assert upload(client, "pairs", jsonl(PAIR)).status_code == 201


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{", "line 1203: is not JSON"),
        (b"[]", "line 1203: must be a JSON object"),
        (b'{"prompt": "a", "chosen": "b", "rejected": "c\\u0000"}', "line 1203: rejected: must not hold NUL"),
        (b'{"prompt": "a", "chosen": "b", "rejected": "\\ud800"}', "line 1203: is not JSON"),
        (
            b'{"prompt": "a", "chosen": "b", "rejected": 3}',
            "line 1203: prompt, chosen and rejected must all be",
        ),
        (
            b'{"prompt": "a", "chosen": "' + b"b" * (1 << 20) + b'c", "rejected": ""}',
            "line 1203: chosen: must be at",
        ),
        (b'{"prompt": "' + b"a" * (5 << 20) + b'"}', "line 1203: is longer than"),
    ],
)
def test_one_wrong_line_and_nothing_is_stored(serve: Serve, rows: Rows, line: bytes, message: str) -> None:
    client = serve(FakeEngine())
    before = counts(rows)
    file = jsonl(*[PAIR] * 1200) + b"\n \n" + line + b"\n" + jsonl(PAIR)
    refused = upload(client, "pairs", file)
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "import_refused")
    assert refused.json()["error"]["message"].startswith(message)
    assert counts(rows) == before
    assert upload(client, "pairs", file.replace(line + b"\n", b"")).json()["num_new"] == 1201


def test_an_import_that_fails_leaves_no_users_but_those_that_were_there(serve: Serve, rows: Rows) -> None:
    engine = FakeEngine()
    client = serve(engine)
    give_feedback(client, engine)
    file = download(client, "votes")
    empty(rows)
    rows("INSERT INTO users (name) VALUES ('ada')")
    assert upload(client, "votes", file + b"{").status_code == 400
    assert rows("SELECT name FROM users") == [("ada",)]


async def test_a_user_who_chats_while_an_import_fails_stays(database: Settings, rows: Rows) -> None:
    engine = db.async_engine(database)
    with suppress(ZeroDivisionError):
        async with Users(db.async_sessions(engine)) as users:
            await users.find([UserRecord(account="", name="ada")])
            rows("INSERT INTO prompts (user_id, messages) SELECT id, '[]' FROM users")
            raise ZeroDivisionError
    await engine.dispose()
    assert rows("SELECT name FROM users") == [("ada",)]


def test_what_is_no_file_of_rows_is_refused(serve: Serve) -> None:
    client = serve(FakeEngine())
    wrong = {
        b"": "holds no rows",
        b"\n\n": "holds no rows",
        b"PAR1": "not whole Parquet",
        b"\x1f\x8b\x08": "line 1: is not JSON",
    }
    for kind in KINDS:
        for content, message in wrong.items():
            refused = upload(client, kind, content)
            assert (refused.status_code, message in refused.json()["error"]["message"]) == (400, True)


def test_parquet_that_is_cut_short_or_holds_something_else_is_refused(serve: Serve, rows: Rows) -> None:
    engine = FakeEngine()
    client = serve(engine)
    give_feedback(client, engine)
    before = counts(rows)
    file = download(client, "votes", format="parquet")
    assert "not whole Parquet" in upload(client, "votes", file[: len(file) // 2]).json()["error"]["message"]
    refused = upload(client, "demonstrations", file).json()["error"]["message"]
    assert refused.startswith("row 1: ")
    assert counts(rows) == before


def test_a_reply_is_of_one_comparison_only(serve: Serve, rows: Rows) -> None:
    engine = FakeEngine()
    client = serve(engine)
    give_feedback(client, engine)
    [first, second, *_] = [json.loads(line) for line in download(client, "votes").split(b"\n")[:-1]]
    stolen = second | {"comparison": second["comparison"] | {"id": "cmp-new"}}
    message = upload(client, "votes", jsonl(first, stolen)).json()["error"]["message"]
    assert message.startswith("line 2: comparison.replies: chatcmpl-")
    assert "belongs to another comparison" in message


# --- size, and what is said of it


def test_a_file_that_is_too_large_is_refused_also_where_it_does_not_say_so(serve: Serve, rows: Rows) -> None:
    client = serve(FakeEngine(), max_import_bytes=1000)
    file = jsonl(*[PAIR] * 20)
    for content in (file, (file[start : start + 100] for start in range(0, len(file), 100))):
        refused = client.post("/operator/import/pairs?name=x", content=content)
        assert (refused.status_code, refused.json()["error"]["code"]) == (413, "import_too_large")
    assert rows("SELECT count(*) FROM imports") == [(0,)]
    assert client.post("/operator/import/pairs?name=x", content=iter([jsonl(PAIR)])).status_code == 201


def test_a_name_is_needed_and_storable(serve: Serve) -> None:
    client = serve(FakeEngine())
    for query in ("", "?name=", "?name=%00", "?name=" + "x" * 201):
        assert client.post(f"/operator/import/pairs{query}", content=jsonl(PAIR)).status_code == 400
    assert client.post("/operator/import/poems?name=x", content=jsonl(PAIR)).status_code == 400


def test_nothing_that_a_file_says_is_logged(serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    client = serve(FakeEngine())
    secret = "a secret about lemons"
    wrong = {"prompt": secret, "chosen": [secret], "rejected": secret}
    assert upload(
        client, "pairs", jsonl(PAIR | {"prompt": secret + " ", "chosen": secret, "rejected": "b"})
    ).is_success
    assert upload(client, "pairs", jsonl(wrong)).status_code == 400
    assert upload(client, "pairs", secret.encode()).status_code == 400
    download(client, "pairs")
    assert ODD not in caplog.text
    assert secret not in caplog.text


# --- the command line


@pytest.fixture
def ratchet(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """The command, asking a service of its own."""
    return command_line(serve(FakeEngine(), max_import_bytes=50_000_000), monkeypatch)


def test_the_command_line_imports_and_exports(ratchet: Callable[..., Result], tmp_path: Path) -> None:
    file, out, columns = tmp_path / "mine.jsonl", tmp_path / "out.jsonl", tmp_path / "out.parquet"
    file.write_bytes(jsonl(PAIR, PAIR | {"rejected": BLUE}))
    assert ratchet("import", "pairs", file).output.splitlines() == [
        "Import 1: 2 rows, 1 of them new.",
        "Left out: 1, as the two replies are the same.",
    ]
    assert json.loads(ratchet("export", "pairs").output) == PAIR
    assert ratchet("export", "pairs", "--rankings", "--out", out).exit_code == 0
    assert json.loads(out.read_bytes()) == PAIR
    assert ratchet("export", "battles", "--format", "parquet", "--out", columns).exit_code == 0
    assert pq.read_table(columns).num_rows == 1
    assert ratchet("import", "battles", columns, "--name", "mine again").exit_code == 0
    assert sorted(path.name for path in tmp_path.glob("out*")) == ["out.jsonl", "out.parquet"]


def test_the_command_line_says_what_is_wrong_in_one_line(
    ratchet: Callable[..., Result], tmp_path: Path
) -> None:
    file = tmp_path / "mine.jsonl"
    file.write_bytes(jsonl(PAIR) + b"{}\n")
    refused = ratchet("import", "pairs", file)
    assert (refused.exit_code, refused.output) == (
        1,
        "ratchet: line 2: chosen: Field required (nothing was stored)\n",
    )
    assert ratchet("export", "poems").exit_code == 1
    file.write_bytes(b"\n" * 50_000_001)
    large = ratchet("import", "pairs", file)
    assert (large.exit_code, "RATCHET_MAX_IMPORT_BYTES" in large.output) == (1, True)


def test_an_export_that_breaks_off_is_not_taken_for_a_file(
    ratchet: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, out = tmp_path / "mine.jsonl", tmp_path / "out.jsonl"
    file.write_bytes(jsonl(*[PAIR] * 1000))
    assert ratchet("import", "pairs", file).exit_code == 0
    monkeypatch.setattr(exports, "line", breaks_after(500))
    broken = ratchet("export", "pairs", "--out", out)
    assert (broken.exit_code, broken.output.startswith("ratchet: the service broke off")) == (1, True)
    assert not out.exists()


def breaks_after(num: int) -> Callable[[Any], bytes]:
    seen = count()

    def line(row: Any) -> bytes:
        if next(seen) >= num:
            raise RuntimeError("full")
        return json.dumps(row).encode() + b"\n"

    return line
