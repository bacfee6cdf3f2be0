"""What the API says of itself: complete, right, and shown without another host."""

from collections.abc import Iterator
from typing import Any

import pytest
from playwright.sync_api import Page, expect

from service.app import create_app
from service.settings import Settings
from tests.service.conftest import Rows, Serve, ask
from tests.service.fake_engine import FakeEngine

METHODS = {"get", "put", "post", "delete", "patch"}
MOVES = ("/operator/promote", "/operator/reject", "/operator/rollback")


def operations(document: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    for path, item in document["paths"].items():
        for method in item.keys() & METHODS:
            yield method, path, item[method]


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    return create_app(Settings()).openapi()


def test_every_operation_parameter_and_field_is_described(document: dict[str, Any]) -> None:
    bare = [
        f"{method} {path}"
        for method, path, operation in operations(document)
        if len(operation.get("description", "")) < 10
    ]
    bare += [
        f"{method} {path} {parameter['name']}"
        for method, path, operation in operations(document)
        for parameter in operation.get("parameters", [])
        if not parameter.get("description")
    ]
    schemas = document["components"]["schemas"]
    bare += [name for name, schema in schemas.items() if not schema.get("description")]
    bare += [
        f"{name}.{field}"
        for name, schema in schemas.items()
        for field, value in schema.get("properties", {}).items()
        if not value.get("description")
    ]
    assert bare == []


def test_every_answer_names_its_body_and_every_error_has_one_shape(document: dict[str, Any]) -> None:
    error = {"application/json": {"schema": {"$ref": "#/components/schemas/ErrorAnswer"}}}
    for method, path, operation in operations(document):
        answers = operation["responses"]
        assert answers["4XX"]["content"] == answers["5XX"]["content"] == error, (method, path)
        [good] = answers.keys() - {"4XX", "5XX"}
        assert good == "204" or all(content.get("schema") for content in answers[good]["content"].values()), (
            method,
            path,
        )


def test_the_bounds_of_numbers_are_in_the_document(document: dict[str, Any]) -> None:
    schemas = document["components"]["schemas"]
    temperature, _ = schemas["ChatRequest"]["properties"]["temperature"]["anyOf"]
    assert (temperature["minimum"], temperature["maximum"]) == (0, 2)
    ranks = schemas["RankingRequest"]["properties"]["ranks"]
    assert (ranks["items"]["minimum"], ranks["items"]["maximum"], ranks["maxItems"]) == (1, 9, 9)


def test_what_clients_are_generated_from_has_plain_names_and_no_loose_ends(document: dict[str, Any]) -> None:
    ids = [operation["operationId"] for _, _, operation in operations(document)]
    assert len(ids) == len(set(ids))
    assert {"chat", "give_vote", "remove_me"} <= set(ids)
    assert not [name for name in ids if "__" in name]

    def references(node: Any) -> Iterator[str]:
        if isinstance(node, dict):
            yield from ([node["$ref"]] if "$ref" in node else [])
            for value in node.values():
                yield from references(value)
        elif isinstance(node, list):
            for value in node:
                yield from references(value)

    prefix = "#/components/schemas/"
    assert {name.removeprefix(prefix) for name in references(document)} == set(
        document["components"]["schemas"]
    )


def test_a_key_is_said_to_be_needed_where_it_is(document: dict[str, Any]) -> None:
    strict = create_app(Settings(require_keys=True)).openapi()
    vote = "/v1/comparisons/{comparison_id}/vote"
    assert document["paths"][vote]["put"]["security"] == [{"HTTPBearer": []}, {}]
    assert strict["paths"][vote]["put"]["security"] == [{"HTTPBearer": []}]
    assert "security" not in strict["paths"]["/healthz"]["get"]


@pytest.mark.database
def test_every_example_of_a_request_is_taken(serve: Serve, rows: Rows, document: dict[str, Any]) -> None:
    """Each example is sent to each call that takes it, on a comparison of as many replies as it names."""
    engine = FakeEngine(replies=("one two", "three four", "five six", "seven eight"))
    client = serve(engine, duel_votes=100)  # without duels what is on trial would go live by itself
    compared = client.post("/v1/chat/completions", json=ask(comparison="always")).json()
    ranked = client.post("/v1/comparisons", json={**ask(), "count": 4}).json()
    places = {"vote": compared["id"], "ranking": ranked["id"]}
    schemas = document["components"]["schemas"]
    sent = set()
    for method, path, operation in operations(document):
        body = operation.get("requestBody", {"content": {}})["content"]
        if "application/json" not in body:  # none, or an import's file
            continue
        schema = body["application/json"]["schema"]
        name = schema.get("$ref", schema.get("anyOf", [{}])[0].get("$ref")).split("/")[-1]
        examples = schemas[name].get("examples")
        assert examples, f"{name} has no example"
        for example in examples:
            if path in MOVES:  # any verified policy can be on trial
                rows("UPDATE deployment SET previous = live, challenger = live")
            place = path.replace("{comparison_id}", places.get(path.split("/")[-1], ""))
            answer = client.request(method, place, json=example)
            assert answer.is_success, (method, path, example, answer.text)
            sent.add(name)
    assert {"ChatRequest", "VoteRequest", "RankingRequest", "KeyRequest", "UserSettings"} <= sent


@pytest.mark.browser
@pytest.mark.database
def test_the_docs_are_shown_and_tried_in_a_browser_without_another_host(serve: Serve, page: Page) -> None:
    client = serve(FakeEngine())
    hosts: set[str] = set()
    page.on("request", lambda request: hosts.add(request.url.split("/")[2]))
    answer = page.goto(f"{client.base_url}/docs")
    assert answer is not None
    assert "unsafe" not in answer.headers["content-security-policy"]
    expect(page.get_by_role("heading", name="Ratchet", level=1)).to_be_visible()
    for method, path in (("POST", "/v1/chat/completions"), ("DELETE", "/v1/users/me"), ("GET", "/healthz")):
        shown = page.locator(".opblock-summary").filter(has_text=method).filter(has_text=path).first
        expect(shown).to_be_visible()
    named = sum(len(operation["tags"]) for _, _, operation in operations(client.get("/openapi.json").json()))
    expect(page.locator(".opblock-summary-method")).to_have_count(named)
    page.locator("#operations-service-healthz").get_by_role("button").first.click()
    page.get_by_role("button", name="Try it out").click()
    page.get_by_role("button", name="Execute").click()
    expect(page.locator(".live-responses-table tbody .response-col_status")).to_contain_text("200")
    assert hosts == {f"{client.base_url.host}:{client.base_url.port}"}
