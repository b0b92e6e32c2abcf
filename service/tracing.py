"""OpenTelemetry traces of the requests, by the library's own instrumentation; off unless --traces.

Where they go is told by the library's own variables, OTEL_EXPORTER_OTLP_ENDPOINT and the like. A span holds the route,
the status and the times, and no text of a user: bodies and headers are not recorded, and queries are taken out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastapi import FastAPI

from service.errors import StartError

# Probes and scrapes come every few seconds and say nothing.
EXCLUDED = "livez,readyz,health,metrics"
# What the library calls a service that no variable names.
UNNAMED = "unknown_service"
# Attributes that hold an address with its query, and those without one in their place.
WITH_QUERY = ("http.url", "http.target", "url.full", "url.query")


def instrument(app: FastAPI, exporter: Any = None) -> Callable[[], None]:
    """Trace every request. Returns what to call at the end, so that the last spans are sent. Raises StartError.

    exporter : where spans go, in the place of the one that the variables describe
    """
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.instrumentation.fastapi import FastAPIInstrumentor
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        raise StartError(f"--traces needs the extra otel, `pip install dsformer[otel]`: {error}.") from error
    resource = Resource.create()
    if str(resource.attributes.get("service.name", UNNAMED)).startswith(UNNAMED):
        resource = resource.merge(Resource({"service.name": "dsformer"}))
    provider = TracerProvider(resource=resource)
    provider.add_span_processor(BatchSpanProcessor(exporter or OTLPSpanExporter()))
    FastAPIInstrumentor.instrument_app(
        app,
        tracer_provider=provider,
        excluded_urls=EXCLUDED,
        exclude_spans=["receive", "send"],
        server_request_hook=forget_query,
    )
    close: Callable[[], None] = provider.shutdown
    return close


def forget_query(span: Any, scope: dict[str, Any]) -> None:
    if not span.is_recording():
        return
    for name in WITH_QUERY:
        value = (span.attributes or {}).get(name)
        if value is not None:
            span.set_attribute(name, "" if name == "url.query" else str(value).partition("?")[0])
    if request_id := scope.get("state", {}).get("request_id"):
        span.set_attribute("request_id", request_id)
