"""What the tests of exports and imports share: feedback of every kind, and a way to empty the database."""

import httpx

from tests.service.conftest import Rows, ask
from tests.service.fake_engine import FakeEngine

ODD = 'Caf\u00e9 \u2028 "\\" \u0001\n\t\U0001f34b'
"""Text that is easily garbled."""
KINDS = ("votes", "pairs", "battles", "rankings", "demonstrations")


def give_feedback(client: httpx.Client, engine: FakeEngine) -> None:
    """Five votes, a ranking with a tie, and two demonstrations, by three users, some in a conversation."""
    conversation = client.post("/v1/conversations", json={"user": "ada"}).json()["id"]
    _vote(client, engine, "first", user="ada", conversation=conversation)
    _vote(client, engine, "second", user="ada", conversation=conversation)
    _vote(client, engine, "tie", user="bob")
    _vote(client, engine, "neither")
    _vote(client, engine, "first", comment=ODD, tags=["tone", ODD], text=ODD, temperature=0.7, stop=["END"])
    _rank(client, engine)
    _demonstrate(client, engine)


def _vote(
    client: httpx.Client,
    engine: FakeEngine,
    choice: str,
    *,
    text: str = "hi",
    user: str | None = None,
    comment: str | None = None,
    tags: list[str] | None = None,
    **fields: object,
) -> None:
    number = len(engine.asked)
    engine.replies = (f"one {number} {ODD}", f"two {number} entirely different")
    answer = client.post("/v1/chat/completions", json=ask(text, comparison="always", user=user, **fields))
    path = f"/v1/comparisons/{answer.json()['comparison']['id']}/vote"
    body = {"choice": choice, "user": user, "comment": comment, "tags": tags or []}
    assert client.put(path, json=body).status_code == 200


def _rank(client: httpx.Client, engine: FakeEngine) -> None:
    engine.replies = ("red apples", "green pears", "blue plums")
    made = client.post(
        "/v1/comparisons", json={"messages": ask("rank")["messages"], "count": 3, "user": "lea"}
    )
    path = f"/v1/comparisons/{made.json()['id']}/ranking"
    body = {"ranks": [2, 1, 2], "user": "lea", "comment": "so"}
    assert client.put(path, json=body).status_code == 200


def _demonstrate(client: httpx.Client, engine: FakeEngine) -> None:
    answer = client.post("/v1/chat/completions", json=ask("say", user="lea")).json()
    corrects = answer["choices"][0]["reply_id"]
    for body in (
        {"corrects": corrects, "content": f"better {ODD}", "tags": ["fix"]},
        {"messages": ask("write")["messages"], "content": "written", "comment": "mine"},
    ):
        assert client.post("/v1/demonstrations", json=body | {"user": "lea"}).status_code == 201


def empty(rows: Rows) -> None:
    """Nothing that anybody said is left; numbers begin anew."""
    rows("TRUNCATE users, imports RESTART IDENTITY CASCADE")


def download(client: httpx.Client, kind: str, **query: object) -> bytes:
    """An export, whole."""
    answer = client.get(
        f"/operator/export/{kind}", params={name: str(value) for name, value in query.items()}
    )
    assert answer.status_code == 200, answer.text
    return answer.content


def upload(client: httpx.Client, kind: str, content: bytes, name: str = "a file") -> httpx.Response:
    """An import."""
    return client.post(f"/operator/import/{kind}", params={"name": name}, content=content)
