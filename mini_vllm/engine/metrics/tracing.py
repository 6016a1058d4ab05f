"""Spans of requests for an OpenTelemetry collector: one `llm_request` each, written when the request has ended.

`make_tracer` is asked when `--otlp-traces-endpoint` is given, and is the only place that imports OpenTelemetry, the
extra `otel`. A `RequestTracer` is told of each request after its last output; spans are sent from a thread of the
SDK's in batches, and a collector that is slow or gone costs lines in the log, never a request. Attribute names are
vLLM's, which are OpenTelemetry's `gen_ai` names where these exist.
"""

import os
import threading
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from mini_vllm.engine.metrics.stats import between
from mini_vllm.engine.parallel_sampling import ParentRequest
from mini_vllm.exceptions import ConfigError
from mini_vllm.logger import init_logger

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SpanExporter

logger = init_logger(__name__)

TRACE_HEADERS = ("traceparent", "tracestate")
"""The headers of a request that say whose span ours is a child of (W3C trace context)."""

SHUTDOWN_TIMEOUT = 3.0
"""Seconds."""

_PROTOCOL_VARIABLES = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
_PROTOCOLS = ("grpc", "http/protobuf")
_HTTP_PORT = 4318


def make_tracer(
    endpoint: str, model_name: str, clock: Callable[[], float] = time.monotonic, service_name: str = "mini-vllm"
) -> "RequestTracer":
    """A tracer that sends to `endpoint`. Raises `ConfigError` without the extra or for an URL that is none.

    service_name: unless OTEL_SERVICE_NAME says another.
    """
    _require_url(endpoint)
    try:
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor

        exporter = _make_exporter(endpoint)
    except ImportError as error:
        raise ConfigError(
            f"otlp_traces_endpoint: OpenTelemetry is not installed ({error}); pip install 'mini-vllm[otel]'"
        ) from error
    service_name = os.environ.get("OTEL_SERVICE_NAME") or service_name
    provider = TracerProvider(resource=Resource.create({"service.name": service_name}), shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(exporter))
    return RequestTracer(provider, model_name, clock)


def _require_url(endpoint: str) -> None:
    try:
        url = urlsplit(endpoint)
        valid = url.scheme in ("http", "https") and bool(url.hostname) and (url.port is None or url.port > 0)
    except ValueError:
        valid = False
    if not valid:
        raise ConfigError(f"otlp_traces_endpoint: must be an URL such as http://localhost:4317, got {endpoint!r}")


def _make_exporter(endpoint: str) -> "SpanExporter":
    if _protocol(endpoint) == "grpc":
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter as GrpcExporter

        return GrpcExporter(endpoint=endpoint, insecure=urlsplit(endpoint).scheme == "http")
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter as HttpExporter

    has_path = urlsplit(endpoint).path not in ("", "/")
    return HttpExporter(endpoint=endpoint if has_path else endpoint.rstrip("/") + "/v1/traces")


def _protocol(endpoint: str) -> str:
    """As OpenTelemetry's variables say; else HTTP if the URL looks like it (a path, or port 4318), else gRPC."""
    for variable in _PROTOCOL_VARIABLES:
        if asked := os.environ.get(variable):
            if asked not in _PROTOCOLS:
                raise ConfigError(f"{variable}: must be one of {', '.join(_PROTOCOLS)}, got {asked!r}")
            return asked
    url = urlsplit(endpoint)
    return "http/protobuf" if url.port == _HTTP_PORT or url.path not in ("", "/") else "grpc"


class RequestTracer:
    """Writes the span of each request that ended. clock: the core's."""

    def __init__(
        self, provider: "TracerProvider", model_name: str, clock: Callable[[], float] = time.monotonic
    ) -> None:
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._provider = provider
        self._tracer = provider.get_tracer("mini_vllm")
        self._propagator = TraceContextTextMapPropagator()
        self._model_name = model_name
        self._clock = clock

    def request_finished(self, parent: ParentRequest) -> None:
        """The span of a request, from its arrival to its end. Never raises."""
        try:
            self._write(parent)
        except Exception:
            logger.exception("no span of request %r", parent.request_id)

    def _write(self, parent: ParentRequest) -> None:
        from opentelemetry.trace import SpanKind, Status, StatusCode

        now, metrics = self._clock(), parent.metrics
        wall = time.time_ns()

        def nanoseconds(moment: float) -> int:
            return wall - int((now - moment) * 1e9)

        headers = {name.lower(): value for name, value in (parent.trace_headers or {}).items()}
        span = self._tracer.start_span(
            "llm_request",
            context=self._propagator.extract(headers),
            kind=SpanKind.SERVER,
            start_time=nanoseconds(metrics.arrival_time),
        )
        if span.is_recording():
            span.set_attributes(request_attributes(parent, self._model_name))
            if metrics.first_token_time is not None:
                span.add_event("first_token", timestamp=nanoseconds(metrics.first_token_time))
            if parent.error is not None:
                span.set_status(Status(StatusCode.ERROR, parent.error))
        span.end(nanoseconds(now if metrics.finished_time is None else metrics.finished_time))

    def shutdown(self, timeout: float = SHUTDOWN_TIMEOUT) -> None:
        """Send what is left, for `timeout` seconds at most, and stop. May be called twice."""
        sending = threading.Thread(target=self._provider.shutdown, name="tracer-shutdown", daemon=True)
        sending.start()  # the SDK tries for half a minute to reach a collector that is gone
        sending.join(timeout)
        if sending.is_alive():
            logger.warning("spans that the collector did not take in %.1f s are lost", timeout)


def request_attributes(parent: ParentRequest, model_name: str) -> Mapping[str, Any]:
    """What the span says of a finished request; times that it never reached are not there."""
    params, metrics = parent.params, parent.metrics
    sequences = list(parent.sequences.values())
    reasons = [sequence.finish_reason for sequence in sequences if sequence.finish_reason is not None]
    values = {
        "gen_ai.request.id": parent.request_id,
        "gen_ai.response.model": model_name,
        "gen_ai.request.temperature": params.temperature,
        "gen_ai.request.top_p": params.top_p,
        "gen_ai.request.max_tokens": params.max_tokens,
        "gen_ai.request.n": params.n,
        "gen_ai.usage.num_sequences": len(sequences),
        "gen_ai.usage.prompt_tokens": len(parent.prompt_token_ids),
        "gen_ai.usage.completion_tokens": sum(len(sequence.token_ids) for sequence in sequences),
        "gen_ai.usage.cached_tokens": parent.num_cached_tokens,
        "gen_ai.response.finish_reasons": reasons,
        "gen_ai.latency.time_in_queue": between(metrics.queued_time, metrics.scheduled_time),
        "gen_ai.latency.time_to_first_token": between(metrics.arrival_time, metrics.first_token_time),
        "gen_ai.latency.e2e": between(metrics.arrival_time, metrics.finished_time),
        "gen_ai.latency.time_in_model_prefill": between(metrics.scheduled_time, metrics.first_token_time),
        "gen_ai.latency.time_in_model_decode": between(metrics.first_token_time, metrics.last_token_time),
        "gen_ai.latency.time_in_model_inference": between(metrics.scheduled_time, metrics.last_token_time),
    }
    return {name: value for name, value in values.items() if value is not None}
