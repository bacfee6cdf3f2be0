"""Rankings of several replies: made, given, revised, undone."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.rankings import dense
from tests.service.conftest import Rows, Serve
from tests.service.fake_engine import FakeEngine

PROMPT = [{"role": "user", "content": "hi"}]
REPLIES = ("one", "two", "three", "four")


@given(st.lists(st.integers(1, 9), min_size=2, max_size=9))
def test_dense_ranks_keep_order_and_ties_and_leave_no_gap(ranks: list[int]) -> None:
    new = dense(ranks)
    assert sorted(set(new)) == list(range(1, len(set(ranks)) + 1))
    for i, one in enumerate(ranks):
        for j, other in enumerate(ranks):
            assert (one < other) == (new[i] < new[j])
    assert dense(new) == new


@pytest.mark.database
def test_a_labeler_ranks_four_replies_blind(serve: Serve, rows: Rows) -> None:
    client = serve(FakeEngine(replies=REPLIES))
    made = client.post("/v1/comparisons", json={"messages": PROMPT, "count": 4, "user": "lab"})
    assert made.status_code == 201
    assert "policy-" not in made.text
    comparison = made.json()
    assert sorted(reply["content"] for reply in comparison["replies"]) == sorted(REPLIES)
    assert comparison["votable"]
    path = f"/v1/comparisons/{comparison['id']}/ranking"
    given_ = client.put(path, json={"ranks": [3, 1, 3, 7], "user": "lab", "comment": "b"})
    assert given_.json()["ranks"] == [2, 1, 2, 3]
    assert given_.json()["policies"] == ["policy-000000"] * 4
    assert client.get(path, params={"user": "lab"}).json() == given_.json()
    client.put(path, json={"ranks": [1, 1, 1, 1], "user": "lab"})
    assert rows("SELECT ranks FROM rankings") == [([1, 1, 1, 1],)]
    assert client.delete(path, params={"user": "lab"}).status_code == 204
    assert client.get(path, params={"user": "lab"}).status_code == 404
    history = client.get(f"{path}/history", params={"user": "lab"}).json()["data"]
    assert [event["action"] for event in history] == ["given", "revised", "undone"]
    assert [event["content"]["ranks"] for event in history] == [[2, 1, 2, 3], [1, 1, 1, 1], [1, 1, 1, 1]]


@pytest.mark.database
def test_what_does_not_fit_is_refused(serve: Serve) -> None:
    client = serve(FakeEngine(replies=REPLIES))
    for count in (1, 10):
        assert client.post("/v1/comparisons", json={"messages": PROMPT, "count": count}).status_code == 400
    comparison = client.post("/v1/comparisons", json={"messages": PROMPT, "count": 3}).json()["id"]
    path = f"/v1/comparisons/{comparison}"
    for ranks in ([1, 2], [1, 2, 3, 4], [0, 1, 2], [1, 2, 10], []):
        assert client.put(f"{path}/ranking", json={"ranks": ranks}).status_code == 400, ranks
    vote = client.put(f"{path}/vote", json={"choice": "first"})
    assert (vote.status_code, vote.json()["error"]["code"]) == (409, "comparison_needs_ranking")
    other = client.put(f"{path}/ranking", json={"ranks": [1, 2, 3], "user": "bob"})
    assert other.status_code == 404


@pytest.mark.database
def test_replies_that_are_all_alike_cannot_be_ranked(serve: Serve) -> None:
    client = serve(FakeEngine(replies=("same", "Same.", "same!")))
    comparison = client.post("/v1/comparisons", json={"messages": PROMPT, "count": 3}).json()
    assert (comparison["votable"], comparison["why_not"]) == (False, "replies_alike")
    path = f"/v1/comparisons/{comparison['id']}/ranking"
    assert client.put(path, json={"ranks": [1, 2, 3]}).status_code == 409
