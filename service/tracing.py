"""Traces by OpenTelemetry, where `OTEL_EXPORTER_OTLP_ENDPOINT` names a collector (OTLP over HTTP); else each call here ends at once.

One span for each HTTP request, which continues the caller's trace (`traceparent`); within it one for each generation, named and
described by the semantic conventions for generative AI. No message content, no user, no key.
"""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from opentelemetry.trace import Span, SpanKind, Status, StatusCode, Tracer, use_span
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from starlette.types import Scope

from service.logs import RequestNote

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider

ERROR = Status(StatusCode.ERROR)
EXPORT_SECONDS = 3.0
"""For one batch, retries included: a collector that is away holds up the end of the service so long, and nothing else."""
_tracer: Tracer | None = None


def start(endpoint: str | None, name: str) -> "TracerProvider | None":
    """Send spans to a collector from now on, as the service `name`; with no endpoint, none are made. Give the answer to `stop`."""
    global _tracer
    if not endpoint:  # an empty variable is as good as none
        return None
    # Slow to import, and seldom needed.
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    provider = TracerProvider(resource=Resource.create({"service.name": name}))
    exporter = OTLPSpanExporter(f"{endpoint.rstrip('/')}/v1/traces", timeout=EXPORT_SECONDS)
    provider.add_span_processor(BatchSpanProcessor(exporter))
    _tracer = provider.get_tracer("ratchet")
    return provider


def stop(provider: "TracerProvider | None") -> None:
    """Send what has not been sent, and make no more spans. May wait for the collector: off the loop."""
    global _tracer
    if provider is not None:
        _tracer = None
        provider.shutdown()


def is_on() -> bool:
    """Whether it is worth putting together what a span would tell."""
    return _tracer is not None


@contextmanager
def serving(scope: Scope, request: RequestNote) -> Iterator[Span | None]:
    """A request being answered: its span is current, and so the parent of those made meanwhile."""
    if _tracer is None:
        yield None
        return
    headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
    caller = TraceContextTextMapPropagator().extract(headers)
    span = _tracer.start_span(scope["method"], caller, SpanKind.SERVER, {"ratchet.request.id": request.id})
    with use_span(span, end_on_exit=True, record_exception=False, set_status_on_exception=False):
        yield span


def end_serving(span: Span | None, method: str, route: str, status: int) -> None:
    """How a request ended. What an exception says is not told: it may quote a message."""
    if span is None:
        return
    span.update_name(f"{method} {route}")
    span.set_attributes(
        {"http.request.method": method, "http.route": route, "http.response.status_code": status}
    )
    if status >= 500:
        span.set_status(ERROR)


def record_chat(
    name: str, seconds: float, attributes: Mapping[str, Any], error: BaseException | None
) -> None:
    """A span for a generation that has just ended after so many seconds; of its error only the kind."""
    if _tracer is None:
        return
    ended = time.time_ns()
    known = {key: value for key, value in attributes.items() if value is not None}
    began = ended - int(seconds * 1e9)
    span = _tracer.start_span(name, kind=SpanKind.CLIENT, start_time=began, attributes=known)
    if error is not None:
        span.set_attribute("error.type", type(error).__name__)
        span.set_status(ERROR)
    span.end(ended)
