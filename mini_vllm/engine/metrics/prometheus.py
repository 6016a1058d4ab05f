"""The engine's metrics for Prometheus, with vLLM's names, labels and buckets, so that its dashboards work.

`PrometheusStatLogger` is told of every batch of news (`StatLoggerBase`) and keeps the children of its metrics, so that
a step costs additions; `metrics_text` is what `/metrics` answers. Each server has a registry of its own.
`docs/metrics.md` says what each metric means and which of vLLM's are not here.
"""

import math
from collections.abc import Mapping
from dataclasses import fields

import prometheus_client
from prometheus_client.exposition import choose_encoder, generate_latest
from prometheus_client.registry import CollectorRegistry

from mini_vllm.config import CacheConfig
from mini_vllm.core.scheduler_output import SchedulerStats
from mini_vllm.engine.arg_utils import EngineArgs
from mini_vllm.engine.metrics.http import HttpMetrics
from mini_vllm.engine.metrics.series import Histogram, Value, counter, gauge, histogram
from mini_vllm.engine.metrics.stats import FinishedRequestStats, IterationStats
from mini_vllm.engine.process.messages import EngineInfo

LABELS = ("model_name", "engine")
PREFIX = "vllm:"
_OPENMETRICS = "application/openmetrics-text"

FINISH_REASONS = ("stop", "length", "abort", "error", "repetition")
PROMPT_SOURCES = ("local_compute", "local_cache_hit", "external_kv_transfer")
CACHE_TIERS = ("device", "host", "p2p", "disk", "external_unspecified")
REJECTION_REASONS = ("max_num_queued_reqs", "max_num_queued_tokens")

TTFT_BUCKETS = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
    160.0, 640.0, 2560.0,
)  # fmt: skip
TOKEN_LATENCY_BUCKETS = (
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
)  # fmt: skip
REQUEST_LATENCY_BUCKETS = (
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0,
    1920.0, 7680.0,
)  # fmt: skip
ITERATION_BUCKETS = (1.0, *(float(2**power) for power in range(3, 15)))
N_BUCKETS = (1.0, 2.0, 5.0, 10.0, 20.0)
PREEMPTION_BUCKETS = (1.0, 2.0, 3.0, 4.0, 5.0, 10.0, 20.0)

_GAUGES = {
    "num_requests_running": "Requests that the last step computed for, each sample of a prompt counted.",
    "num_requests_waiting": "Requests in the queue of the engine, preempted ones among them.",
    "kv_cache_usage_perc": "Share of the KV cache's blocks that requests hold; 1 is all of them.",
}
_COUNTERS = {
    "prefix_cache_queries": "Tokens of prompts that were looked up in the prefix cache.",
    "prefix_cache_hits": "Tokens of prompts that were found in the prefix cache.",
    "num_preemptions": "Requests whose blocks were taken, to be computed again later.",
    "prompt_tokens": "Tokens of prompts whose first output token came out.",
    "prompt_tokens_cached": "Of these, the ones that came out of the prefix cache.",
    "generation_tokens": "Tokens that were generated, for all samples.",
}
_TOKEN_HISTOGRAMS = {
    "request_prompt_tokens": "Tokens of the prompt of each finished request.",
    "request_generation_tokens": "Tokens that each finished request generated.",
    "request_max_num_generation_tokens": "Tokens of the longest sample of each finished request.",
    "request_params_max_tokens": "max_tokens of each finished request that set it.",
    "request_prefill_kv_computed_tokens": "Tokens of each finished request's prompt that were not in the cache.",
}
_REQUEST_TIMES = {
    "e2e_request_latency_seconds": "From arrival to the end.",
    "request_queue_time_seconds": "From the engine's queue to the first admission.",
    "request_inference_time_seconds": "From the first admission to the last token.",
    "request_prefill_time_seconds": "From the first admission to the first token.",
    "request_decode_time_seconds": "From the first token to the last.",
}


def token_buckets(max_value: int) -> tuple[float, ...]:
    """1, 2, 5, 10, 20, 50, ... up to `max_value`."""
    powers = range(int(math.log10(max(max_value, 1))) + 1)
    values = [mantissa * 10**power for power in powers for mantissa in (1, 2, 5)]
    return tuple(float(value) for value in values if value <= max_value) or (1.0,)


class PrometheusStatLogger:
    """Feeds the metrics of one engine. See `StatLoggerBase`.

    max_model_len: the token histograms reach so far.
    """

    def __init__(
        self, model_name: str, max_model_len: int, registry: CollectorRegistry, *, engine_index: int = 0
    ) -> None:
        self._registry = registry
        self._own = (model_name, str(engine_index))
        self._seen = SchedulerStats()
        self._make_gauges()
        self._make_counters()
        self._make_histograms(max_model_len)
        reasons = counter(
            registry,
            f"{PREFIX}admission_rejections",
            "Requests that were not taken in, by the limit that they met.",
            ("model_name", "reason"),
        )
        self._rejections = {reason: reasons.labels(model_name, reason) for reason in REJECTION_REASONS}
        self._reject = lambda reason: reasons.labels(model_name, reason)

    # -- making them ------------------------------------------------------------------------------------------------

    def _make_gauges(self) -> None:
        gauges = {name: gauge(self._registry, PREFIX + name, text, LABELS) for name, text in _GAUGES.items()}
        self._running, self._waiting, self._usage = (family.labels(*self._own) for family in gauges.values())
        by_reason = gauge(
            self._registry,
            f"{PREFIX}num_requests_waiting_by_reason",
            "Requests in the queue: 'capacity' wait for room, 'deferred' for something else (a rule, a grammar).",
            (*LABELS, "reason"),
        )
        self._waiting_capacity = by_reason.labels(*self._own, "capacity")
        self._waiting_deferred = by_reason.labels(*self._own, "deferred")

    def _make_counters(self) -> None:
        children = {
            name: counter(self._registry, PREFIX + name, text, LABELS).labels(*self._own)
            for name, text in _COUNTERS.items()
        }
        self._cumulative = {
            name: children[name] for name in ("prefix_cache_queries", "prefix_cache_hits", "num_preemptions")
        }
        self._prompt_tokens = children["prompt_tokens"]
        self._prompt_tokens_cached = children["prompt_tokens_cached"]
        self._generation_tokens = children["generation_tokens"]
        self._by_source = self._labelled(
            "prompt_tokens_by_source", "Tokens of prompts by where their KV came from.", "source", PROMPT_SOURCES
        )
        self._by_tier = self._labelled(
            "prompt_tokens_cached_by_source",
            "Tokens that were found in the prefix cache, by the tier that had them, counted at admission.",
            "source",
            CACHE_TIERS,
        )
        self._success = self._labelled(
            "request_success", "Finished requests by how they ended.", "finished_reason", FINISH_REASONS
        )

    def _labelled(self, name: str, text: str, label: str, values: tuple[str, ...]) -> dict[str, Value]:
        family = counter(self._registry, PREFIX + name, text, (*LABELS, label))
        return {value: family.labels(*self._own, value) for value in values}

    def _make_histograms(self, max_model_len: int) -> None:
        tokens = token_buckets(max_model_len)
        self._tokens = {name: self._histogram(name, text, tokens) for name, text in _TOKEN_HISTOGRAMS.items()}
        self._times = {
            name: self._histogram(name, f"Seconds of finished requests. {text}", REQUEST_LATENCY_BUCKETS)
            for name, text in _REQUEST_TIMES.items()
        }
        self._ttft = self._histogram(
            "time_to_first_token_seconds", "Seconds from arrival to the first token.", TTFT_BUCKETS
        )
        self._itl = self._histogram(
            "inter_token_latency_seconds", "Seconds from one step's token to the next.", TOKEN_LATENCY_BUCKETS
        )
        self._tpot = self._histogram(
            "request_time_per_output_token_seconds",
            "Seconds a token of finished requests, without the first.",
            TOKEN_LATENCY_BUCKETS,
        )
        self._iteration = self._histogram("iteration_tokens_total", "Tokens a step computed.", ITERATION_BUCKETS)
        self._n = self._histogram("request_params_n", "n of each finished request.", N_BUCKETS)
        self._preemptions = self._histogram(
            "request_num_preemptions", "How often each finished request was preempted.", PREEMPTION_BUCKETS
        )

    def _histogram(self, name: str, text: str, bounds: tuple[float, ...]) -> Histogram:
        return histogram(self._registry, PREFIX + name, text, LABELS, bounds).labels(*self._own)

    def set_cache_config(self, labels: Mapping[str, str]) -> None:
        """Show what the KV cache turned out to be (`cache_config_labels`). Asked once, when the engine is ready."""
        info = gauge(
            self._registry, f"{PREFIX}cache_config_info", "Settings of the KV cache, as labels.", (*labels, "engine")
        )
        info.labels(*labels.values(), self._own[1]).value = 1.0

    # -- feeding them -----------------------------------------------------------------------------------------------

    def record(self, stats: SchedulerStats | None, iteration: IterationStats) -> None:
        """See `StatLoggerBase`."""
        if stats is not None:
            self._record_step(stats)
        if iteration.num_generation_tokens:
            self._record_tokens(iteration)
        for request in iteration.finished:
            self._record_finished(request)
        for n, longest in zip(iteration.num_samples, iteration.max_generation_tokens, strict=True):
            self._n.observe(n)
            self._tokens["request_max_num_generation_tokens"].observe(longest)

    def _record_step(self, stats: SchedulerStats) -> None:
        self._running.value = stats.num_running_reqs
        self._waiting.value = stats.num_waiting_reqs
        self._waiting_deferred.value = stats.num_waiting_deferred_reqs
        self._waiting_capacity.value = stats.num_waiting_reqs - stats.num_waiting_deferred_reqs
        self._usage.value = stats.kv_cache_usage
        if stats.num_scheduled_tokens:
            self._iteration.observe(stats.num_scheduled_tokens)
        for name, child in self._cumulative.items():
            before, after = getattr(self._seen, name), getattr(stats, name)
            child.value += after - before if after >= before else after  # the engine was restarted
        self._by_tier["device"].value = self._cumulative["prefix_cache_hits"].value
        self._seen = stats

    def _record_tokens(self, iteration: IterationStats) -> None:
        self._generation_tokens.value += iteration.num_generation_tokens
        if iteration.num_prompt_tokens:
            cached = iteration.num_cached_tokens
            self._prompt_tokens.value += iteration.num_prompt_tokens
            self._prompt_tokens_cached.value += cached
            self._by_source["local_cache_hit"].value += cached
            self._by_source["local_compute"].value += iteration.num_prompt_tokens - cached
        if iteration.times_to_first_token:
            self._ttft.observe_all(iteration.times_to_first_token)
        if iteration.inter_token_latencies:
            self._itl.observe_all(iteration.inter_token_latencies)

    def _record_finished(self, request: FinishedRequestStats) -> None:
        self._success[request.finish_reason].value += 1
        self._preemptions.observe(request.num_preemptions)
        tokens, times = self._tokens, self._times
        for child, value in (
            (tokens["request_prompt_tokens"], request.num_prompt_tokens),
            (tokens["request_generation_tokens"], request.num_generation_tokens),
            (tokens["request_params_max_tokens"], request.max_tokens_param),
            (tokens["request_prefill_kv_computed_tokens"], request.num_computed_prefill_tokens),
            (times["e2e_request_latency_seconds"], request.e2e_latency),
            (times["request_queue_time_seconds"], request.queue_time),
            (times["request_inference_time_seconds"], request.inference_time),
            (times["request_prefill_time_seconds"], request.prefill_time),
            (times["request_decode_time_seconds"], request.decode_time),
            (self._tpot, request.mean_time_per_output_token),
        ):
            if value is not None:
                child.observe(value)

    def record_rejection(self, reason: str) -> None:
        """See `StatLoggerBase`."""
        child = self._rejections.get(reason)
        if child is None:
            child = self._rejections[reason] = self._reject(reason)
        child.value += 1


def cache_config_labels(settings: CacheConfig | EngineArgs, info: EngineInfo) -> dict[str, str]:
    """What was asked of the KV cache and what came of it, for `set_cache_config`."""
    labels = {field.name: str(getattr(settings, field.name)) for field in fields(CacheConfig)}
    asked = labels.pop("kv_cache_dtype")
    return labels | {
        "cache_dtype": info.dtype if asked == "auto" else asked,
        "num_gpu_blocks": str(info.num_gpu_blocks),
        "kv_cache_size_tokens": str(info.max_request_tokens),
        "kv_cache_max_concurrency": str(info.max_request_tokens / info.max_model_len),
    }


class ServerMetrics:
    """Everything `/metrics` of one server shows: engine, HTTP, and the process.

    engine: to be given to `AsyncLLM` as a stat logger. http: to be told of each request.
    """

    def __init__(self, model_name: str, settings: CacheConfig | EngineArgs, info: EngineInfo) -> None:
        self.registry = new_registry()
        self.engine = PrometheusStatLogger(model_name, info.max_model_len, self.registry)
        self.engine.set_cache_config(cache_config_labels(settings, info))
        self.http = HttpMetrics(self.registry)

    def text(self, accept: str | None = None) -> tuple[bytes, str]:
        """See `metrics_text`."""
        return metrics_text(self.registry, accept)


def new_registry() -> CollectorRegistry:
    """A registry with the metrics of this process and of its Python."""
    registry = CollectorRegistry()
    prometheus_client.ProcessCollector(registry=registry)
    prometheus_client.PlatformCollector(registry=registry)
    prometheus_client.GCCollector(registry=registry)
    return registry


def metrics_text(registry: CollectorRegistry, accept: str | None = None) -> tuple[bytes, str]:
    """The body of `/metrics` and its content type: OpenMetrics if the header `accept` asks for it, else plain text."""
    for item in (accept or "").split(","):
        kind = item.partition(";")[0].strip().lower()
        if kind == _OPENMETRICS:
            # The library would replace the colon of our names, which is valid everywhere, by an underscore.
            encode, _ = choose_encoder(f"{_OPENMETRICS}; version=1.0.0; escaping=allow-utf-8")
            return encode(registry), f"{_OPENMETRICS}; version=1.0.0; charset=utf-8"
        if kind == "text/plain":
            break
    return generate_latest(registry), "text/plain; version=0.0.4; charset=utf-8"
