"""The JSON of a run, with the keys of vLLM's own file, and where it is written."""

import math
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mini_vllm.bench.environment import collect_environment
from mini_vllm.bench.noise import NOISE_LIMIT, NoiseReport
from mini_vllm.bench.serve.metrics import RequestRecord, serve_metrics
from mini_vllm.bench.serve.options import ServeOptions

FORMAT_VERSION = 1


def build_result(
    options: ServeOptions,
    model: str,
    tokenizer: str | None,
    records: Sequence[RequestRecord],
    duration: float,
    noise: NoiseReport,
    *,
    left_out: Mapping[str, int] | None = None,
) -> dict[str, Any]:
    """Everything that is known about a run; `with_details` adds what each request said."""
    figures = serve_metrics(
        records, duration, latencies=options.latencies, ranks=options.percentiles, goodput=options.goodput_limits
    )
    return {
        "benchmark": "serve",
        "format_version": FORMAT_VERSION,
        "date": time.strftime("%Y%m%d-%H%M%S"),
        "endpoint_type": options.backend,
        "backend": options.backend,
        "label": options.label,
        "model_id": model,
        "tokenizer_id": tokenizer,
        "num_prompts": len(records),
        **options.metadata_fields,
        "request_rate": _finite(options.request_rate),
        "burstiness": options.burstiness,
        "max_concurrency": options.max_concurrency,
        **figures,
        "latencies": [record.timeline.e2el for record in records if record.succeeded],
        "queue_times": [record.queue_time for record in records],
        "notes": notes(options, records, figures, noise),
        "failures": failures(records),
        "dataset": {"name": options.dataset_name, **options.dataset_settings(), "left_out": dict(left_out or {})},
        "cpu_share_others": noise.others_share,
        "arguments": {name: _finite(value) for name, value in _arguments(options).items()},
        "environment": collect_environment(),
    }


def _arguments(options: ServeOptions) -> dict[str, Any]:
    """All flags. Headers may hold keys, so only their names are kept."""
    return asdict(options) | {"header": sorted(options.headers)}


def _finite(value: Any) -> Any:
    """JSON has no infinity; vLLM writes it as a text."""
    return "inf" if isinstance(value, float) and math.isinf(value) else value


def with_details(result: Mapping[str, Any], records: Sequence[RequestRecord]) -> dict[str, Any]:
    """The result with one list entry a request, in the order they were sent; times in seconds.

    start_times: after the first. itls: one list a request. None where a request failed before that.
    """
    lines = [record.timeline for record in records]
    start = min(line.arrival for line in lines)
    return {
        **result,
        "input_lens": [line.num_prompt_tokens for line in lines],
        "output_lens": [line.num_output_tokens for line in lines],
        "start_times": [line.arrival - start for line in lines],
        "ttfts": [line.ttft if line.output_times else None for line in lines],
        "itls": [line.itl for line in lines],
        "e2els": [line.e2el if line.output_times else None for line in lines],
        "generated_texts": [record.text for record in records],
        "finish_reasons": [line.finish_reason for line in lines],
        "errors": [line.error or "" for line in lines],
    }


def failures(records: Sequence[RequestRecord]) -> list[dict[str, Any]]:
    """The different errors, the most frequent first."""
    counted = Counter(str(record.timeline.error) for record in records if not record.succeeded)
    return [{"error": error, "count": count} for error, count in counted.most_common(20)]


def notes(
    options: ServeOptions, records: Sequence[RequestRecord], figures: Mapping[str, Any], noise: NoiseReport
) -> list[str]:
    """What a reader of the figures must know."""
    found = []
    if (per_event := figures["tokens_per_event"]) is not None and per_event > 1.05:
        found.append(f"events held {per_event:.2f} tokens on average: ITL is the gap between events, TPOT is per token")
    if by_tokenizer := sum(record.counted_by == "tokenizer" for record in records if record.succeeded):
        found.append(f"{by_tokenizer} answers carried no usage: their tokens were counted from the text")
    if len(records) < options.num_prompts:
        found.append(f"the dataset gave {len(records)} requests of the {options.num_prompts} wanted")
    late = max((record.queue_time for record in records), default=0.0)
    if options.max_concurrency is None and not options.sends_at_once and late > 0.1:
        found.append(f"warning: the client was late, by up to {late:.2f} s: it lacked CPU time, and latencies are off")
    if (noise.steal_share or 0.0) > NOISE_LIMIT:
        found.append(f"warning: {noise.steal_share:.0%} of the CPUs was stolen by the hypervisor")
    return found


def result_path(options: ServeOptions, model: str, result_dir: str | None, filename: str | None) -> Path:
    """Where the JSON goes: vLLM's name for it unless one is given."""
    rate = "inf" if math.isinf(options.request_rate) else f"{options.request_rate:g}"
    limit = f"-concurrency{options.max_concurrency}" if options.max_concurrency else ""
    base = model.rstrip("/").rpartition("/")[2]
    when = time.strftime("%Y%m%d-%H%M%S")
    name = filename or f"{options.label or options.backend}-{rate}qps{limit}-{base}-{when}.json"
    return Path(result_dir or ".").expanduser() / name
