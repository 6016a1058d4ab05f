"""Claims about the spans of requests: what they say, whose children they are, and that they cannot hurt."""

import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from mini_vllm.core.scheduler_output import EngineCoreOutput
from mini_vllm.engine.metrics.tracing import RequestTracer, make_tracer
from mini_vllm.engine.output_processor import OutputProcessor
from mini_vllm.exceptions import ConfigError
from mini_vllm.request import Request
from mini_vllm.sampling_params import SamplingParams

TRACE_ID = "0af7651916cd43dd8448eb211c80319c"
PARENT = f"00-{TRACE_ID}-b7ad6b7169203331-01"


class Traced:
    """An output processor whose clock is set by hand, and the spans it caused."""

    def __init__(self) -> None:
        self.now = 0.0
        self.exporter = InMemorySpanExporter()
        provider = TracerProvider(shutdown_on_exit=False)
        provider.add_span_processor(SimpleSpanProcessor(self.exporter))
        self.tracer = RequestTracer(provider, "tiny", lambda: self.now)
        self.processor = OutputProcessor(None, self.tracer)

    def add(self, request_id: str = "r", headers: dict[str, str] | None = None, **params: Any) -> None:
        sampling = SamplingParams(max_tokens=9, temperature=0.5, top_p=0.9, **params)
        children = [f"{i}_{request_id}" for i in range(1, sampling.n)]
        request = Request(request_id, [1, 2, 3], sampling, arrival_time=1.0, child_ids=children)
        self.processor.add_request(request, None, headers)

    def tell(self, now: float, *news: EngineCoreOutput) -> None:
        self.now = now
        self.processor.process(news, now)

    def spans(self) -> list[ReadableSpan]:
        return list(self.exporter.get_finished_spans())


@pytest.fixture
def traced() -> Iterator[Traced]:
    traced = Traced()
    yield traced
    traced.tracer.shutdown()


def test_a_finished_request_is_one_span_with_vllms_attributes(traced: Traced) -> None:
    traced.add()
    traced.tell(3.0, EngineCoreOutput("r", [7], num_cached_tokens=2, times=(1.5, 2.0)))
    assert traced.spans() == []
    traced.tell(5.0, EngineCoreOutput("r", [8], finish_reason="length"))
    (span,) = traced.spans()
    assert (span.name, span.kind, span.parent) == ("llm_request", SpanKind.SERVER, None)
    assert span.start_time is not None and span.end_time is not None
    assert span.end_time - span.start_time == pytest.approx(4e9)
    assert [(e.name, e.timestamp - span.start_time) for e in span.events] == [("first_token", pytest.approx(2e9))]
    assert dict(span.attributes or {}) == {
        "gen_ai.request.id": "r",
        "gen_ai.response.model": "tiny",
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.top_p": 0.9,
        "gen_ai.request.max_tokens": 9,
        "gen_ai.request.n": 1,
        "gen_ai.usage.num_sequences": 1,
        "gen_ai.usage.prompt_tokens": 3,
        "gen_ai.usage.completion_tokens": 2,
        "gen_ai.usage.cached_tokens": 2,
        "gen_ai.response.finish_reasons": ("length",),
        "gen_ai.latency.time_in_queue": 0.5,
        "gen_ai.latency.time_to_first_token": 2.0,
        "gen_ai.latency.e2e": 4.0,
        "gen_ai.latency.time_in_model_prefill": 1.0,
        "gen_ai.latency.time_in_model_decode": 2.0,
        "gen_ai.latency.time_in_model_inference": 3.0,
    }


def test_the_span_is_a_child_of_the_callers(traced: Traced) -> None:
    traced.add(headers={"Traceparent": PARENT})
    traced.tell(2.0, EngineCoreOutput("r", [7], finish_reason="stop"))
    (span,) = traced.spans()
    assert span.parent is not None and f"{span.parent.span_id:016x}" == "b7ad6b7169203331"
    assert span.context is not None and f"{span.context.trace_id:032x}" == TRACE_ID


@pytest.mark.parametrize("header", ["", "garbage", "00-0-0-00", "00-" + "f" * 4000, "é"])
def test_a_traceparent_that_is_none_is_passed_over(traced: Traced, header: str) -> None:
    traced.add(headers={"traceparent": header})
    traced.tell(2.0, EngineCoreOutput("r", [7], finish_reason="stop"))
    assert [span.parent for span in traced.spans()] == [None]


def test_a_caller_that_does_not_sample_gets_no_span(traced: Traced) -> None:
    traced.add(headers={"traceparent": PARENT[:-1] + "0"})
    traced.tell(2.0, EngineCoreOutput("r", [7], finish_reason="stop"))
    assert traced.spans() == []


def test_samples_share_a_span_and_a_failure_shows(traced: Traced) -> None:
    traced.add(n=2)
    traced.tell(2.0, EngineCoreOutput("r", [7], finish_reason="stop"), EngineCoreOutput("1_r", [7]))
    traced.tell(3.0, EngineCoreOutput("1_r", finish_reason="error", error="no luck"))
    (span,) = traced.spans()
    assert span.attributes is not None
    assert span.attributes["gen_ai.response.finish_reasons"] == ("stop", "error")
    assert (span.status.status_code, span.status.description) == (StatusCode.ERROR, "no luck")


def test_an_abort_before_the_first_token_has_the_times_it_reached(traced: Traced) -> None:
    traced.add()
    traced.now = 2.5
    traced.processor.abort(["r"], 2.5)
    (span,) = traced.spans()
    attributes = dict(span.attributes or {})
    assert attributes["gen_ai.response.finish_reasons"] == ("abort",) and attributes["gen_ai.latency.e2e"] == 1.5
    assert not [name for name in attributes if "time_to_first" in name or "time_in" in name]


def test_an_exporter_that_raises_does_not_touch_the_request(
    traced: Traced, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("no span today")

    monkeypatch.setattr(traced.tracer._tracer, "start_span", fail)
    traced.add()
    (output,) = traced.processor.process([EngineCoreOutput("r", [7], finish_reason="stop")], 2.0)
    assert output.finished and "r" not in traced.processor


# -- over the wire ----------------------------------------------------------------------------------------------------


@pytest.fixture
def collector() -> Iterator[tuple[str, list[tuple[str, bytes]]]]:
    """An OTLP/HTTP receiver: its URL, and (path, body) of what came."""
    received: list[tuple[str, bytes]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            received.append((self.path, self.rfile.read(int(self.headers["content-length"]))))
            self.send_response(200)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *args: Any) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", received
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize("path", ["", "/v1/traces"])
def test_spans_reach_a_collector_over_http(
    collector: tuple[str, list[tuple[str, bytes]]], monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    url, received = collector
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "http/protobuf")
    tracer = make_tracer(url + path, "tiny")
    processor = OutputProcessor(None, tracer)
    processor.add_request(Request("r", [1], SamplingParams()), None)
    processor.process([EngineCoreOutput("r", [7], finish_reason="stop")], 1.0)
    tracer.shutdown()
    tracer.shutdown()
    ((where, body),) = received
    (resource,) = ExportTraceServiceRequest.FromString(body).resource_spans
    assert where == "/v1/traces"
    assert {a.key: a.value.string_value for a in resource.resource.attributes}["service.name"] == "mini-vllm"
    assert [span.name for scope in resource.scope_spans for span in scope.spans] == ["llm_request"]


def test_a_collector_that_is_gone_holds_up_neither_requests_nor_the_end() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        tracer = make_tracer(f"http://127.0.0.1:{unused.getsockname()[1]}/v1/traces", "tiny")
    processor = OutputProcessor(None, tracer)
    start = time.monotonic()
    for i in range(20):
        processor.add_request(Request(str(i), [1], SamplingParams()), None)
        assert processor.process([EngineCoreOutput(str(i), [7], finish_reason="stop")], 1.0)[0].finished
    tracer.shutdown(timeout=0.2)
    assert time.monotonic() - start < 2.0


@pytest.mark.parametrize(
    ("endpoint", "module"), [("http://h:4317", "grpc"), ("http://h:4318", "http"), ("https://h/v1/traces", "http")]
)
def test_the_protocol_follows_the_url(endpoint: str, module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from mini_vllm.engine.metrics.tracing import _make_exporter

    monkeypatch.delenv("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", raising=False)
    exporter = _make_exporter(endpoint)
    assert f".proto.{module}." in type(exporter).__module__
    exporter.shutdown()


@pytest.mark.parametrize("endpoint", ["", "localhost:4317", "ftp://h", "http://", "http://h:port", "http://[::"])
def test_an_endpoint_that_is_no_url_is_refused(endpoint: str) -> None:
    with pytest.raises(ConfigError, match="otlp_traces_endpoint: must be an URL"):
        make_tracer(endpoint, "tiny")


def test_a_protocol_that_is_none_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "pigeon")
    with pytest.raises(ConfigError, match="must be one of grpc, http/protobuf"):
        make_tracer("http://localhost:4317", "tiny")


def test_without_the_extra_the_flag_is_refused_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    with pytest.raises(ConfigError, match=r"pip install 'mini-vllm\[otel\]'"):
        make_tracer("http://localhost:4317", "tiny")


def test_nothing_of_opentelemetry_is_imported_when_it_is_off() -> None:
    modules = "mini_vllm.engine.llm_engine, mini_vllm.engine.metrics.tracing"
    program = f"import sys, {modules}; print('opentelemetry' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "False"


def test_a_real_request_is_traced(make_engine: Callable[..., Any], traced: Traced) -> None:
    engine = make_engine()
    engine.output_processor.tracer = traced.tracer
    traced.now = engine.engine_core.now()
    engine.add_request("r", [5, 6, 7], SamplingParams(max_tokens=3, ignore_eos=True))
    while engine.has_unfinished_requests():
        engine.step()
    (span,) = traced.spans()
    attributes = dict(span.attributes or {})
    latency = {name: attributes[f"gen_ai.latency.{name}"] for name in ("e2e", "time_to_first_token", "time_in_queue")}
    assert attributes["gen_ai.usage.completion_tokens"] == 3
    assert 0 <= latency["time_in_queue"] <= latency["time_to_first_token"] <= latency["e2e"] < 60
