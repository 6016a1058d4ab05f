"""vLLM 0.32's metrics as facts: names, types, labels and buckets, and how tests read what /metrics says."""

import math

from prometheus_client import CollectorRegistry
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families

from mini_vllm.engine.metrics.prometheus import metrics_text

OWN = ("engine", "model_name")

TTFT = (
    0.001,
    0.005,
    0.01,
    0.02,
    0.04,
    0.06,
    0.08,
    0.1,
    0.25,
    0.5,
    0.75,
    1,
    2.5,
    5,
    7.5,
    10,
    20,
    40,
    80,
    160,
    640,
    2560,
)
TOKEN = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
REQUEST = (0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680)
TOKENS_TO_512 = (1, 2, 5, 10, 20, 50, 100, 200, 500)
STEP = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
HIGH_RESOLUTION = (
    0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1, 1.5, 2, 2.5, 3, 3.5, 4, 4.5, 5, 7.5, 10, 30, 60,
)  # fmt: skip

VLLM_GAUGES = {
    "vllm:num_requests_running": OWN,
    "vllm:num_requests_waiting": OWN,
    "vllm:num_requests_waiting_by_reason": (*OWN, "reason"),
    "vllm:kv_cache_usage_perc": OWN,
    "vllm:engine_sleep_state": (*OWN, "sleep_state"),
    "vllm:lora_requests_info": ("max_lora", "running_lora_adapters", "waiting_lora_adapters"),
}
VLLM_CACHE_INFO_LABELS = frozenset(
    """_block_size_resolved block_size cache_dtype cache_hit_alignment_tokens effective_attention_block_size
    enable_mamba_shared_prefix_checkpoint enable_prefix_caching engine gpu_memory_utilization hash_block_size
    is_attention_free kv_cache_dtype_skip_layers kv_cache_layout kv_cache_max_concurrency kv_cache_memory_bytes
    kv_cache_size_tokens kv_offloading_backend kv_offloading_size kv_sharing_fast_prefill mamba_block_size
    mamba_cache_dtype mamba_cache_mode mamba_page_size_padded mamba_ssm_cache_dtype num_cpu_blocks num_gpu_blocks
    num_gpu_blocks_override prefix_cache_retention_interval prefix_caching_hash_algo prefix_match_unit
    replayssm_buffer_len skip_page_size_padded sliding_window swa_bounded_replay use_kda_recoverssm use_replayssm
    user_specified_block_size""".split()
)
VLLM_COUNTERS = {
    "vllm:prefix_cache_queries": OWN,
    "vllm:prefix_cache_hits": OWN,
    "vllm:external_prefix_cache_queries": OWN,
    "vllm:external_prefix_cache_hits": OWN,
    "vllm:mm_cache_queries": OWN,
    "vllm:mm_cache_hits": OWN,
    "vllm:num_preemptions": OWN,
    "vllm:prompt_tokens": OWN,
    "vllm:prompt_tokens_by_source": (*OWN, "source"),
    "vllm:prompt_tokens_cached": OWN,
    "vllm:prompt_tokens_cached_by_source": (*OWN, "source"),
    "vllm:generation_tokens": OWN,
    "vllm:request_success": ("engine", "finished_reason", "model_name"),
    "vllm:admission_rejections": ("model_name", "reason"),
    "vllm:tool_call_parser_invocations": ("mode", "model_name", "outcome", "request_type"),
    "vllm:estimated_flops_per_gpu": OWN,
    "vllm:estimated_read_bytes_per_gpu": OWN,
    "vllm:estimated_write_bytes_per_gpu": OWN,
    "http_requests": ("handler", "method", "status"),
}
VLLM_LABEL_VALUES = {
    ("vllm:num_requests_waiting_by_reason", "reason"): {"capacity", "deferred"},
    ("vllm:prompt_tokens_by_source", "source"): {"local_compute", "local_cache_hit", "external_kv_transfer"},
    ("vllm:prompt_tokens_cached_by_source", "source"): {"device", "host", "p2p", "disk", "external_unspecified"},
    ("vllm:request_success", "finished_reason"): {"stop", "length", "abort", "error", "repetition"},
    ("vllm:admission_rejections", "reason"): {"max_num_queued_reqs", "max_num_queued_tokens"},
}
"""The values of which there is a series from the start."""

VLLM_HISTOGRAMS = {
    "vllm:request_prompt_tokens": (OWN, TOKENS_TO_512),
    "vllm:request_generation_tokens": (OWN, TOKENS_TO_512),
    "vllm:iteration_tokens_total": (OWN, STEP),
    "vllm:request_max_num_generation_tokens": (OWN, TOKENS_TO_512),
    "vllm:request_params_n": (OWN, (1, 2, 5, 10, 20)),
    "vllm:request_params_max_tokens": (OWN, TOKENS_TO_512),
    "vllm:time_to_first_token_seconds": (OWN, TTFT),
    "vllm:inter_token_latency_seconds": (OWN, TOKEN),
    "vllm:request_time_per_output_token_seconds": (OWN, TOKEN),
    "vllm:e2e_request_latency_seconds": (OWN, REQUEST),
    "vllm:request_queue_time_seconds": (OWN, REQUEST),
    "vllm:request_inference_time_seconds": (OWN, REQUEST),
    "vllm:request_prefill_time_seconds": (OWN, REQUEST),
    "vllm:request_decode_time_seconds": (OWN, REQUEST),
    "vllm:request_num_preemptions": (OWN, (1, 2, 3, 4, 5, 10, 20)),
    "vllm:request_prefill_kv_computed_tokens": (OWN, TOKENS_TO_512),
    "http_request_duration_highr_seconds": ((), HIGH_RESOLUTION),
    "http_request_duration_seconds": (("handler", "method"), (0.1, 0.5, 1)),
}
"""Those of tokens as they are for a max_model_len of 512."""

VLLM_SUMMARIES = {"http_request_size_bytes": ("handler",), "http_response_size_bytes": ("handler",)}

PROCESS = {
    "python_gc_objects_collected": "counter",
    "python_gc_objects_uncollectable": "counter",
    "python_gc_collections": "counter",
    "python_info": "gauge",
    "process_virtual_memory_bytes": "gauge",
    "process_resident_memory_bytes": "gauge",
    "process_start_time_seconds": "gauge",
    "process_cpu_seconds": "counter",
    "process_open_fds": "gauge",
    "process_max_fds": "gauge",
}

VLLM_WITH_FLAGS = (
    *(f"vllm:spec_decode_num_{what}" for what in ("drafts", "draft_tokens", "accepted_tokens")),
    "vllm:spec_decode_num_accepted_tokens_per_pos",
    *(f"vllm:kv_block_{what}_seconds" for what in ("lifetime", "idle_before_evict", "reuse_gap")),
    "vllm:kv_offload_*",
    "vllm:nixl_*",
)
"""Those that appear only with some feature on; a star stands for several."""


class Scrape:
    """What a Prometheus server would read from a registry now."""

    def __init__(self, registry: CollectorRegistry) -> None:
        body, _ = metrics_text(registry)
        self.families: dict[str, Metric] = {f.name: f for f in text_string_to_metric_families(body.decode())}
        self.samples = {
            (sample.name, tuple(sorted(sample.labels.items()))): sample.value
            for family in self.families.values()
            for sample in family.samples
        }

    def value(self, name: str, **labels: str) -> float:
        """The one sample of this full name with these labels, whatever others it has."""
        found = [
            value for (n, pairs), value in self.samples.items() if n == name and labels.items() <= dict(pairs).items()
        ]
        assert len(found) == 1, (name, labels, found)
        return found[0]

    def __getitem__(self, name: str) -> float:
        return self.value(name)

    def histogram(self, name: str, **labels: str) -> tuple[float, float]:
        """Count and sum."""
        return self.value(f"{name}_count", **labels), self.value(f"{name}_sum", **labels)

    def bounds(self, name: str) -> tuple[float, ...]:
        """Of its buckets, in the order of the text, without the infinite one, which is there."""
        bounds = [float(s.labels["le"]) for s in self.families[name].samples if s.name == f"{name}_bucket"]
        first = bounds[: bounds.index(math.inf) + 1]
        assert first == sorted(first)
        return tuple(first[:-1])

    def label_names(self, name: str) -> set[tuple[str, ...]]:
        return {tuple(sorted(set(s.labels) - {"le"})) for s in self.families[name].samples}

    def falls(self, later: "Scrape") -> list[str]:
        """What must never fall and yet did, or went away."""
        monotone = ("_total", "_count", "_sum", "_bucket")
        return [
            f"{name}{dict(labels)}: {value} then {later.samples.get((name, labels))}"
            for (name, labels), value in self.samples.items()
            if name.endswith(monotone) and not later.samples.get((name, labels), -1.0) >= value
        ]
