"""Traces by OpenTelemetry: off, and free of cost, unless the standard ``OTEL_*`` environment variables ask for them.

    traces = traces_from(os.environ)         # None: off
    span = traces.begin("route", headers)    # a child of the caller's span, where its headers name one
    traces.context_of(span)                  # headers that make the next one's spans children of this one

Needs the extra ``kvatlas[traces]``. Sampling (``OTEL_TRACES_SAMPLER``), resource (``OTEL_SERVICE_NAME``,
``OTEL_RESOURCE_ATTRIBUTES``), limits and batches (``OTEL_BSP_*``) are the SDK's: spans beyond its queue (2048) are dropped.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from importlib.metadata import entry_points
from typing import TYPE_CHECKING

from kvatlas.observe.logs import get_logger

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Span

EXPORTERS = "opentelemetry_traces_exporter"
"""The entry points of exporters; OpenTelemetry's own name."""
ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
FLUSH_S = 5.0
"""How long the last spans may take to be sent when the service stops."""

_OTLP = {"http/protobuf": "otlp_proto_http", "grpc": "otlp_proto_grpc"}
_REMEDY = "pip install 'kvatlas[traces]', or another exporter in OTEL_TRACES_EXPORTER"

_log = get_logger(__name__)


class Traces:
    """Makes spans of requests."""

    def __init__(self, provider: TracerProvider) -> None:
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        from kvatlas import __version__

        self._provider = provider
        self._tracer = provider.get_tracer("kvatlas", __version__)
        self._propagator = TraceContextTextMapPropagator()

    def begin(self, name: str, headers: Mapping[str, str]) -> Span:
        """Return a started span. ``headers`` by lower-case name: ``traceparent`` and ``tracestate`` say whose child it is."""
        from opentelemetry.trace import SpanKind

        return self._tracer.start_span(name, self._propagator.extract(headers), kind=SpanKind.SERVER)

    def context_of(self, span: Span) -> dict[str, str]:
        """Return the headers that name a span as the parent of what comes next."""
        from opentelemetry.trace import set_span_in_context

        headers: dict[str, str] = {}
        self._propagator.inject(headers, set_span_in_context(span))
        return headers

    def close(self) -> None:
        """Send the last spans, for at most FLUSH_S seconds; what is left then is lost. Later calls do nothing."""
        closing = threading.Thread(target=self._provider.shutdown, name="traces-close", daemon=True)
        closing.start()
        closing.join(FLUSH_S)


def exporters_wanted(environ: Mapping[str, str]) -> tuple[str, ...]:
    """Return the exporters that an environment names, as OpenTelemetry's entry points call them; none: traces are off.

    As the OpenTelemetry specification has it, but that nothing named means off: OTLP where ``OTEL_TRACES_EXPORTER`` says so, or
    an OTLP endpoint is given.
    """
    if environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return ()
    named = environ.get("OTEL_TRACES_EXPORTER", "").strip()
    if not named and any(environ.get(name) for name in ENDPOINTS):
        named = "otlp"
    protocol = next((environ[name] for name in PROTOCOLS if environ.get(name)), "http/protobuf")
    wanted = (name.strip() for name in named.split(","))
    return tuple(_OTLP.get(protocol, protocol) if name == "otlp" else name for name in wanted if name not in {"", "none"})


def traces_from(environ: Mapping[str, str]) -> Traces | None:
    """Return what an environment asks for, and say so in the log; None where traces are off.

    Where an exporter is missing or refuses its settings they stay off, with a warning: requests matter more.
    """
    wanted = exporters_wanted(environ)
    if not wanted:
        return None
    try:
        traces = Traces(_provider(wanted, environ))
    except Exception as error:  # third-party code reads third-party settings
        _log.warning("traces are off", exporters=wanted, reason=f"{type(error).__name__}: {error}"[:300], remedy=_REMEDY)
        return None
    _log.info("traces are on", exporters=wanted)
    return traces


def _provider(wanted: tuple[str, ...], environ: Mapping[str, str]) -> TracerProvider:
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    named = "OTEL_SERVICE_NAME" in environ or "service.name" in environ.get("OTEL_RESOURCE_ATTRIBUTES", "")
    provider = TracerProvider(resource=Resource.create({} if named else {"service.name": "kvatlas"}), shutdown_on_exit=False)
    for name in wanted:
        points = entry_points(group=EXPORTERS, name=name)
        if not points:
            raise LookupError(f"no exporter {name} is installed")
        provider.add_span_processor(BatchSpanProcessor(next(iter(points)).load()()))
    return provider
