"""Who is told what the engine does: the log, Prometheus, an OpenTelemetry collector, a trace for the simulator."""

import asyncio
import time

from mini_vllm.engine.arg_utils import EngineArgs
from mini_vllm.engine.async_llm import AsyncLLM
from mini_vllm.engine.metrics.prometheus import ServerMetrics
from mini_vllm.engine.metrics.stats import StatLoggerBase
from mini_vllm.engine.metrics.stats_logger import StatLogger, keep_ticking
from mini_vllm.engine.metrics.tracing import RequestTracer, make_tracer
from mini_vllm.engine.request_trace import RequestTraceRecorder
from mini_vllm.entrypoints.server.serve_args import ServeArgs


class Observers:
    """Made before the engine, which is handed `stat_loggers` (the list itself), `tracer` and
    `recorder`; closed after it.

    Raises `ConfigError` for an endpoint or a file that cannot be written to.
    """

    def __init__(self, engine_args: EngineArgs, args: ServeArgs, model_name: str) -> None:
        self._engine_args = engine_args
        self._model_name = model_name
        self._ticking: asyncio.Task[None] | None = None
        self.stat_loggers: list[StatLoggerBase] = []
        self.tracer: RequestTracer | None = None
        if args.otlp_traces_endpoint is not None:
            self.tracer = make_tracer(args.otlp_traces_endpoint, model_name)
        self.recorder: RequestTraceRecorder | None = None
        if args.record_trace is not None:
            self.recorder = RequestTraceRecorder(args.record_trace, block_size=engine_args.block_size)

    def watch(self, engine: AsyncLLM) -> ServerMetrics:
        """Begin, now that the engine is there and its sizes are known."""
        metrics = ServerMetrics(self._model_name, self._engine_args, engine.client.info)
        self.stat_loggers.append(metrics.engine)
        if not self._engine_args.disable_log_stats:
            stat_logger = StatLogger(time.monotonic())
            self.stat_loggers.append(stat_logger)
            self._ticking = asyncio.create_task(keep_ticking(stat_logger, time.monotonic))
        return metrics

    def close(self) -> None:
        """Send and write what is left."""
        if self._ticking is not None:
            self._ticking.cancel()
        if self.tracer is not None:
            self.tracer.shutdown()
        if self.recorder is not None:
            self.recorder.close()
