"""One line in the log every few seconds while requests run: throughput, queues, KV cache, prefix cache.

`StatLogger` is handed cumulative counters; what it costs a step is one comparison of times.
"""

from mini_vllm.core.scheduler_output import SchedulerStats
from mini_vllm.logger import init_logger

logger = init_logger(__name__)

INTERVAL_SECONDS = 10.0


class StatLogger:
    """Logs vLLM's line. now: seconds on the engine's clock at the start."""

    def __init__(self, now: float, interval: float = INTERVAL_SECONDS) -> None:
        self.interval = interval
        self._last_time = now
        self._last_counts = (0, 0)

    def record(self, stats: SchedulerStats, num_prompt_tokens: int, num_generation_tokens: int, now: float) -> None:
        """Take the counters since the start; log if the interval is over."""
        elapsed = now - self._last_time
        if elapsed < self.interval:
            return
        prompt, generation = (
            (new - old) / elapsed
            for new, old in zip((num_prompt_tokens, num_generation_tokens), self._last_counts, strict=True)
        )
        self._last_time, self._last_counts = now, (num_prompt_tokens, num_generation_tokens)
        queries = stats.prefix_cache_queries
        logger.info(
            "Avg prompt throughput: %.1f tokens/s, Avg generation throughput: %.1f tokens/s, Running: %d reqs, "
            "Waiting: %d reqs, GPU KV cache usage: %.1f%%, Prefix cache hit rate: %.1f%%",
            prompt,
            generation,
            stats.num_running_reqs,
            stats.num_waiting_reqs,
            100 * stats.kv_cache_usage,
            100 * stats.prefix_cache_hits / queries if queries else 0.0,
        )
