"""Spans, as a collector receives them: by the conventions for generative AI, within the caller's trace, without messages."""

import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from statistics import median
from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import AnyValue
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status

from service import tracing
from tests.service.conftest import Serve, ask, wait_until
from tests.service.fake_engine import FakeEngine

pytestmark = pytest.mark.database
CHAT = "/v1/chat/completions"
SECRET = "Zebrafink"
TRACE = "0af7651916cd43dd8448eb211c80319c"
CALLER = "b7ad6b7169203331"


@dataclass
class Collector:
    """Takes traces by OTLP over HTTP."""

    url: str = ""
    bodies: list[bytes] = field(default_factory=list)

    def spans(self, name: str) -> list[Span]:
        requests = [ExportTraceServiceRequest.FromString(body) for body in self.bodies]
        return [
            span
            for request in requests
            for resource in request.resource_spans
            for scope in resource.scope_spans
            for span in scope.spans
            if span.name == name
        ]

    def span(self, name: str) -> Span:
        """The only one of this name, once it has come."""
        wait_until(lambda: bool(self.spans(name)))
        [span] = self.spans(name)
        return span


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[Collector]:
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "50")  # ms; else five seconds
    collector = Collector()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            assert self.path == "/v1/traces"
            collector.bodies.append(self.rfile.read(int(self.headers["content-length"])))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            """Says nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever).start()
        collector.url = f"http://127.0.0.1:{server.server_port}"
        yield collector
        server.shutdown()


def attributes(span: Span) -> dict[str, Any]:
    return {attribute.key: plain(attribute.value) for attribute in span.attributes}


def plain(value: AnyValue) -> Any:
    kind = value.WhichOneof("value")
    assert kind is not None
    found = getattr(value, kind)
    return [plain(each) for each in found.values] if kind == "array_value" else found


@pytest.mark.parametrize("stream", [True, False])
def test_a_generation_is_a_span_within_its_requests_within_the_callers(
    serve: Serve, collector: Collector, stream: bool
) -> None:
    client = serve(FakeEngine(replies=(f"one two {SECRET}",)), otlp_endpoint=collector.url)
    headers = {"traceparent": f"00-{TRACE}-{CALLER}-01"}
    body = ask(SECRET, max_tokens=20, seed=7, stream=stream, user=SECRET)
    answer = client.post(CHAT, json=body, headers=headers).raise_for_status()
    request, chat = collector.span(f"POST {CHAT}"), collector.span("chat policy-000000")

    assert (request.trace_id.hex(), request.parent_span_id.hex()) == (TRACE, CALLER)
    assert (chat.trace_id, chat.parent_span_id) == (request.trace_id, request.span_id)
    assert request.start_time_unix_nano <= chat.start_time_unix_nano < chat.end_time_unix_nano
    assert request.kind == Span.SPAN_KIND_SERVER
    assert chat.kind == Span.SPAN_KIND_CLIENT
    assert attributes(request) == {
        "ratchet.request.id": answer.headers["x-request-id"],
        "http.request.method": "POST",
        "http.route": CHAT,
        "http.response.status_code": 200,
    }
    told = attributes(chat)
    assert told.pop("gen_ai.response.id").startswith("chatcmpl-")
    assert told == {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "vllm",
        "gen_ai.request.model": "policy-000000",
        "gen_ai.request.max_tokens": 20,
        "gen_ai.request.temperature": 1.0,
        "gen_ai.request.top_p": 1.0,
        "gen_ai.request.seed": 7,
        "gen_ai.response.model": "policy-000000",
        "gen_ai.response.finish_reasons": ["stop"],
        "gen_ai.usage.input_tokens": 7,
        "gen_ai.usage.output_tokens": 3,
        "ratchet.policies": ["policy-000000"],
    }
    assert SECRET.encode() not in b"".join(collector.bodies)


def test_a_comparison_is_one_span_with_both_replies(serve: Serve, collector: Collector) -> None:
    client = serve(FakeEngine(replies=("one two", "three four five")), otlp_endpoint=collector.url)
    answer = client.post(CHAT, json=ask(comparison="always")).json()
    told = attributes(collector.span("chat policy-000000"))
    assert told["ratchet.comparison.id"] == answer["comparison"]["id"]
    assert told["gen_ai.request.choice.count"] == 2
    assert told["gen_ai.usage.output_tokens"] == 5


def test_what_breaks_is_told_by_kind_and_not_in_words(serve: Serve, collector: Collector) -> None:
    client = serve(FakeEngine(replies=(f"one two {SECRET}",), breaks_after=2), otlp_endpoint=collector.url)
    assert client.post(CHAT, json=ask(SECRET)).status_code == 503
    for name in ("chat policy-000000", f"POST {CHAT}"):
        span = collector.span(name)
        assert span.status.code == Status.STATUS_CODE_ERROR
        assert span.status.message == ""
        assert not span.events
    assert attributes(collector.span("chat policy-000000"))["error.type"] == "EngineUnavailable"
    assert SECRET.encode() not in b"".join(collector.bodies)


def test_without_an_endpoint_there_are_no_spans(serve: Serve, collector: Collector) -> None:
    client = serve(FakeEngine(), otlp_endpoint=None)
    assert client.post(CHAT, json=ask()).status_code == 200
    assert not tracing.is_on()
    assert collector.bodies == []


def test_a_collector_that_is_away_delays_nobody(serve: Serve, collector: Collector) -> None:
    client = serve(FakeEngine(), otlp_endpoint="http://127.0.0.1:9")
    answers = [client.post(CHAT, json=ask()) for _ in range(5)]
    assert {answer.status_code for answer in answers} == {200}
    assert median(answer.elapsed.total_seconds() for answer in answers) < 1
