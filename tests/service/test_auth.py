"""Who asks, and what they may do: without a key, and with one."""

import pytest
from fastapi import Request

from service.auth import is_from_this_machine
from tests.service.conftest import Rows, Serve, ask
from tests.service.fake_engine import FakeEngine

CHAT = "/v1/chat/completions"


def request(client: str, host: str, origin: str | None = None) -> Request:
    headers = {"host": host} | ({"origin": origin} if origin else {})
    raw = [(name.encode(), value.encode()) for name, value in headers.items()]
    return Request({"type": "http", "headers": raw, "client": (client, 5)})


@pytest.mark.parametrize("host", ["127.0.0.1:8000", "localhost:8000", "[::1]:8000"])
def test_this_machine_is_known(host: str) -> None:
    assert is_from_this_machine(request("127.0.0.1", host))
    assert is_from_this_machine(request("::1", host, f"http://{host}"))


@pytest.mark.parametrize(
    ("client", "host", "origin"),
    [
        ("192.168.1.7", "127.0.0.1", None),
        ("127.0.0.1", "evil.example:8000", None),  # a name that was pointed at loopback
        ("127.0.0.1", "localhost:8000", "http://evil.example"),
        ("127.0.0.1", "localhost:8000", "null"),
        ("127.0.0.1", "[", None),
        ("127.0.0.1", "localhost:8000", "http://["),
    ],
)
def test_others_and_foreign_pages_are_not(client: str, host: str, origin: str | None) -> None:
    assert not is_from_this_machine(request(client, host, origin))


pytest_database = pytest.mark.database


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


@pytest_database
def test_a_key_is_shown_once_stored_as_a_hash_and_stops_when_revoked(serve: Serve, rows: Rows) -> None:
    client = serve(FakeEngine())
    made = client.post("/operator/keys", json={"account": "acme", "role": "user"})
    key = made.json()["key"]
    assert made.status_code == 201
    [stored] = rows("SELECT keys::text FROM keys")
    assert key not in stored[0]
    assert key not in client.get("/operator/keys").text
    assert client.get("/v1/users/me", headers=bearer(key)).json()["account"] == "acme"
    assert client.delete(f"/operator/keys/{made.json()['id']}").json()["revoked_at"]
    refused = client.get("/v1/users/me", headers=bearer(key))
    assert (refused.status_code, refused.json()["error"]["code"]) == (401, "invalid_api_key")
    assert refused.headers["www-authenticate"] == "Bearer"


@pytest_database
def test_what_is_no_key_of_ours_counts_as_none(serve: Serve) -> None:
    client = serve(FakeEngine())
    assert client.post(CHAT, json=ask(), headers=bearer("none")).status_code == 200
    assert client.post(CHAT, json=ask(), headers=bearer("rk-unknown")).status_code == 401


@pytest_database
def test_where_keys_are_needed_nothing_but_health_answers_without(serve: Serve) -> None:
    client = serve(FakeEngine())
    keys = {
        role: client.post("/operator/keys", json={"account": "acme", "role": role}).json()["key"]
        for role in ("user", "labeler", "operator")
    }
    client = serve(FakeEngine(), require_keys=True)
    assert client.get("/healthz").status_code == 200
    for path in (
        "/v1/models",
        "/v1/status",
        "/operator/keys",
        "/v1/conversations",
        "/v1/users/me",
        "/metrics",
        "/metrics/engines/0",
    ):
        assert client.get(path).status_code == 401, path
    assert client.post(CHAT, json=ask()).status_code == 401
    assert client.post(CHAT, json=ask(), headers=bearer(keys["user"])).status_code == 200
    allowed = {
        "user": {"/v1/conversations"},
        "labeler": {"/v1/conversations", "/v1/demonstrations"},
        "operator": {"/v1/conversations", "/v1/demonstrations", "/operator/cycles"},
    }
    for role, paths in allowed.items():
        for path in allowed["operator"]:
            answer = client.get(path, headers=bearer(keys[role]))
            assert answer.status_code == (200 if path in paths else 403), (role, path)


@pytest_database
def test_accounts_do_not_see_each_other_and_one_account_may_serve_many_users(serve: Serve) -> None:
    client = serve(FakeEngine())
    one, other = (
        client.post("/operator/keys", json={"account": account}).json()["key"] for account in ("one", "other")
    )
    body = ask(comparison="always", user="ada")
    comparison = client.post(CHAT, json=body, headers=bearer(one)).json()["comparison"]["id"]
    vote = f"/v1/comparisons/{comparison}/vote"
    ada = {"choice": "first", "user": "ada"}
    assert client.put(vote, json=ada, headers=bearer(other)).status_code == 404
    assert client.put(vote, json=ada).status_code == 404
    assert client.put(vote, json={"choice": "first"}, headers=bearer(one)).status_code == 404
    assert client.put(vote, json=ada, headers=bearer(one)).status_code == 200


@pytest_database
def test_a_key_that_would_be_expired_and_a_wrong_account_are_refused(serve: Serve) -> None:
    client = serve(FakeEngine())
    late = client.post("/operator/keys", json={"account": "a", "expires_at": "2001-01-01T00:00:00Z"})
    assert (late.status_code, late.json()["error"]["param"]) == (400, "expires_at")
    for account in ("a/b", "", "import"):  # the last one holds what was imported
        assert client.post("/operator/keys", json={"account": account}).status_code == 400, account


@pytest_database
def test_a_page_of_another_site_is_no_operator(serve: Serve) -> None:
    client = serve(FakeEngine())
    answer = client.get("/operator/keys", headers={"origin": "http://evil.example"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (403, "needs_operator")
