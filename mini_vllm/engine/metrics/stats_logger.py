"""One line in the log every few seconds while requests run: throughput, queues, KV cache, prefix cache.

`StatLogger` is told of each step and costs it a few additions. Whoever has an event loop also lets it `tick`, so that
the last line, the one that says that nothing runs any more, does not wait for the next request.
"""

import asyncio
from collections.abc import Callable

from mini_vllm.core.scheduler_output import SchedulerStats
from mini_vllm.engine.metrics.stats import IterationStats
from mini_vllm.logger import init_logger

logger = init_logger(__name__)

INTERVAL_SECONDS = 10.0


class StatLogger:
    """Logs vLLM's line; silent while nothing happens. Rates are over the time since the last line, or since the first
    activity after a pause.

    now: seconds on the engine's clock at the start.
    """

    def __init__(self, now: float, interval: float = INTERVAL_SECONDS, engine_index: int = 0) -> None:
        self.interval = interval
        self._engine_index = engine_index
        self._since = self._last_seen = now
        self._num_prompt_tokens = 0
        self._num_generation_tokens = 0
        self._num_rejections = 0
        self._stats = SchedulerStats()
        self._logged_stats = SchedulerStats()
        self._hit_rate = 0.0
        self._was_active = False

    def record(self, stats: SchedulerStats | None, iteration: IterationStats) -> None:
        """See `StatLoggerBase`. Logs if the interval is over."""
        now = iteration.timestamp
        if now - self._last_seen > self.interval and not self._has_requests():
            self.tick(
                self._last_seen + self.interval
            )  # nobody ticks: what there was before the pause gets its own line
            self._since = now
        elif not self._is_active() and not self._was_active:
            self._since = now
        self._num_prompt_tokens += iteration.num_prompt_tokens
        self._num_generation_tokens += iteration.num_generation_tokens
        if stats is not None:
            self._stats = stats
        self.tick(now)

    def record_rejection(self, reason: str) -> None:
        self._num_rejections += 1

    def tick(self, now: float) -> None:
        """Log if the interval is over, and if there is something to say or was the last time."""
        self._last_seen = now
        elapsed = now - self._since
        if elapsed < self.interval or elapsed <= 0:
            return
        active = self._is_active()
        if active or self._was_active:
            logger.info("%s", self._line(elapsed))
        self._since, self._was_active = now, active
        self._logged_stats = self._stats
        self._num_prompt_tokens = self._num_generation_tokens = self._num_rejections = 0

    def _has_requests(self) -> bool:
        return bool(self._stats.num_running_reqs or self._stats.num_waiting_reqs)

    def _is_active(self) -> bool:
        counted = self._num_prompt_tokens or self._num_generation_tokens or self._num_rejections
        return bool(counted) or self._has_requests()

    def _line(self, elapsed: float) -> str:
        stats, before = self._stats, self._logged_stats
        parts = [
            f"Engine {self._engine_index:03d}: Avg prompt throughput: {self._num_prompt_tokens / elapsed:.1f} tokens/s",
            f"Avg generation throughput: {self._num_generation_tokens / elapsed:.1f} tokens/s",
            f"Running: {stats.num_running_reqs} reqs",
            f"Waiting: {stats.num_waiting_reqs} reqs",
        ]
        if preemptions := since(before.num_preemptions, stats.num_preemptions):
            parts.append(f"Preemptions: {preemptions}")
        if self._num_rejections:
            parts.append(f"Rejected: {self._num_rejections} reqs")
        if queries := since(before.prefix_cache_queries, stats.prefix_cache_queries):
            self._hit_rate = since(before.prefix_cache_hits, stats.prefix_cache_hits) / queries
        parts.append(f"GPU KV cache usage: {100 * stats.kv_cache_usage:.1f}%")
        parts.append(f"Prefix cache hit rate: {100 * self._hit_rate:.1f}%")
        return ", ".join(parts)


def since(before: int, after: int) -> int:
    """How far a counter got, if it may have begun again because the engine was restarted."""
    return after - before if after >= before else after


async def keep_ticking(stat_logger: StatLogger, clock: Callable[[], float]) -> None:
    """Tick until cancelled, ten times an interval, since intervals begin with the activity. clock: the engine's."""
    while True:
        await asyncio.sleep(stat_logger.interval / 10)
        stat_logger.tick(clock())
