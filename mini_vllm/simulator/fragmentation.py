"""What paging buys, measured on the engine's own block manager: one workload through three ways to keep a KV cache.

`naive` reserves a row of the longest possible sequence for each; `paged` and `shared` drive `KVCacheManager`, the
latter with its prefix cache over prompts that begin alike. All have room for the same number of tokens. In each step
every running sequence writes one token, waiting ones are admitted in order of arrival (their prompts in one step) and
finished ones leave; without room to grow, the latest admitted starts over. Time is steps; nothing here computes.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import numpy as np

from mini_vllm.config import DEFAULT_BLOCK_SIZE
from mini_vllm.core.kv_cache_manager import KVCacheManager
from mini_vllm.exceptions import ConfigError
from mini_vllm.request import Request
from mini_vllm.sampling_params import SamplingParams
from mini_vllm.simulator.external_fragmentation import ExternalFragmentation, external_fragmentation

MODES = ("naive", "paged", "shared")
Progress = Callable[[str, int, int], None]
"""Told (mode, sequences finished, of how many)."""


@dataclass(frozen=True, kw_only=True)
class FragmentationOptions:
    """The workload: Poisson arrivals, uniform lengths. kv_cache_tokens: what each cache has room for.

    shared_prefix_tokens, num_prefix_groups: in `shared`, prompts of a group begin with the same tokens.
    sweep_block_sizes, sweep_sequences: the sweep repeats `paged` with these sizes on the first so many sequences.
    """

    num_sequences: int = 1000
    arrivals_per_step: float = 1.0
    prompt_range: tuple[int, int] = (200, 4000)
    output_range: tuple[int, int] = (50, 500)
    kv_cache_tokens: int = 288_000
    block_size: int = DEFAULT_BLOCK_SIZE
    shared_prefix_tokens: int = 1024
    num_prefix_groups: int = 4
    sweep_block_sizes: tuple[int, ...] = (4, 16, 64, 256)
    sweep_sequences: int = 200
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("num_sequences", "block_size", "num_prefix_groups", "sweep_sequences"):
            _at_least_one(name, getattr(self, name))
        for size in self.sweep_block_sizes:
            _at_least_one("sweep_block_sizes", size)
        if not self.arrivals_per_step > 0:
            raise ConfigError(f"arrivals_per_step: must be above 0, got {self.arrivals_per_step}")
        if self.shared_prefix_tokens < 0:
            raise ConfigError(f"shared_prefix_tokens: must be at least 0, got {self.shared_prefix_tokens}")
        for name in ("prompt_range", "output_range"):
            low, high = getattr(self, name)
            if not 1 <= low <= high:
                raise ConfigError(f"{name}: must be 1 <= low <= high, got {low} and {high}")
        if self.kv_cache_tokens < self.max_seq_len:
            raise ConfigError(
                f"kv_cache_tokens: {self.kv_cache_tokens:,} hold no sequence of {self.prompt_range[1]:,} + "
                f"{self.output_range[1]:,} = {self.max_seq_len:,} tokens"
            )
        for size in (self.block_size, *self.sweep_block_sizes):
            if self.kv_cache_tokens // size * size < -(-self.max_seq_len // size) * size:
                raise ConfigError(f"block_size: {self.kv_cache_tokens:,} tokens in blocks of {size} hold no sequence")

    @property
    def max_seq_len(self) -> int:
        return self.prompt_range[1] + self.output_range[1]


def _at_least_one(name: str, value: int) -> None:
    if value < 1:
        raise ConfigError(f"{name}: must be at least 1, got {value}")


@dataclass(slots=True)
class SimSequence:
    """One sequence. current_pos: tokens in its cache; kept over a preemption, since they are recomputed."""

    index: int
    arrival_step: int
    prompt_len: int
    output_len: int
    group: int
    current_pos: int = 0

    @property
    def final_len(self) -> int:
        return self.prompt_len + self.output_len


def make_workload(options: FragmentationOptions) -> list[SimSequence]:
    """The same for the same seed, in order of arrival."""
    rng, count = np.random.default_rng(options.seed), options.num_sequences
    arrivals = np.cumsum(rng.exponential(1 / options.arrivals_per_step, count)).astype(int)
    prompts = rng.integers(options.prompt_range[0], options.prompt_range[1] + 1, count)
    outputs = rng.integers(options.output_range[0], options.output_range[1] + 1, count)
    groups = rng.integers(0, options.num_prefix_groups, count)
    columns = zip(arrivals.tolist(), prompts.tolist(), outputs.tolist(), groups.tolist(), strict=True)
    return [SimSequence(index, *row) for index, row in enumerate(columns)]


# --- caches --------------------------------------------------------------------------------------------------


class SimCache(Protocol):
    """Both questions answer False without changing anything."""

    def admit(self, seq: SimSequence, num_tokens: int) -> bool: ...

    def grow(self, seq: SimSequence) -> bool: ...

    def finish(self, seq: SimSequence) -> None: ...

    def end_step(self) -> None: ...

    @property
    def reserved_tokens(self) -> int: ...


class NaiveCache:
    """A row of `max_seq_len` for each sequence, for nobody knows how long it becomes."""

    def __init__(self, options: FragmentationOptions) -> None:
        self.row = options.max_seq_len
        self.free_rows = options.kv_cache_tokens // self.row
        self.rows_taken = 0

    def admit(self, seq: SimSequence, num_tokens: int) -> bool:
        if self.free_rows == 0:
            return False
        self.free_rows -= 1
        self.rows_taken += 1
        return True

    def grow(self, seq: SimSequence) -> bool:
        return True

    def finish(self, seq: SimSequence) -> None:
        self.free_rows += 1
        self.rows_taken -= 1

    def end_step(self) -> None:
        pass

    @property
    def reserved_tokens(self) -> int:
        return self.rows_taken * self.row


class EngineCache:
    """The engine's `KVCacheManager`, asked what a scheduler would ask it."""

    def __init__(self, options: FragmentationOptions, block_size: int, shared: bool) -> None:
        num_blocks = options.kv_cache_tokens // block_size + 1  # and the null block
        self.manager = KVCacheManager(num_blocks, block_size, enable_caching=shared)
        self.prefix_tokens = options.shared_prefix_tokens if shared else 0
        self._id_stride = options.max_seq_len
        self._requests: dict[int, Request] = {}

    def admit(self, seq: SimSequence, num_tokens: int) -> bool:
        params = SamplingParams(max_tokens=seq.output_len)
        request = Request(str(seq.index), self._tokens(seq, num_tokens), params)
        hits, num_hit = self.manager.get_computed_blocks(request)
        request.num_computed_tokens = num_hit
        if self.manager.allocate_slots(request, num_tokens - num_hit, hits) is None:
            return False
        self.manager.record_prefix_lookup(num_tokens, num_hit)
        request.num_computed_tokens = num_tokens
        self._requests[seq.index] = request
        return True

    def _tokens(self, seq: SimSequence, num_tokens: int) -> list[int]:
        """Its group's prefix, then ids that no other sequence has."""
        common = min(self.prefix_tokens, seq.prompt_len, num_tokens)
        start = self._own(seq, common)
        return [*self._stretch(seq.group, common), *range(start, start + num_tokens - common)]

    def _stretch(self, group: int, count: int) -> range:
        return range(group * self._id_stride, group * self._id_stride + count)

    def _own(self, seq: SimSequence, position: int) -> int:
        return 2**28 + seq.index * self._id_stride + position

    def grow(self, seq: SimSequence) -> bool:
        request = self._requests[seq.index]
        if request.num_tokens == request.num_computed_tokens:  # else it has the token since there was no room for it
            request.append_output_token(self._own(seq, request.num_tokens))
        if self.manager.allocate_slots(request, 1) is None:
            return False
        request.num_computed_tokens += 1
        return True

    def finish(self, seq: SimSequence) -> None:
        self.manager.free(self._requests.pop(seq.index))

    def end_step(self) -> None:
        self.manager.confirm_step()

    @property
    def reserved_tokens(self) -> int:
        pool = self.manager.block_pool
        return (pool.num_usable_blocks - pool.get_num_free_blocks()) * self.manager.block_size


# --- the loop ------------------------------------------------------------------------------------------------


@dataclass
class Timeline:
    """One value a step. reserved: places taken; logical: tokens that the running sequences hold, as they see it."""

    total_tokens: int
    reserved: list[int] = field(default_factory=list)
    logical: list[int] = field(default_factory=list)
    running: list[int] = field(default_factory=list)
    waiting: list[int] = field(default_factory=list)
    preemptions: int = 0
    prefix_hit_rate: float = 0.0
    """Tokens found in the cache over tokens looked up."""

    @property
    def used_share(self) -> np.ndarray:
        """Places taken over places there are."""
        return np.asarray(self.reserved) / self.total_tokens

    @property
    def logical_share(self) -> np.ndarray:
        """Tokens held over places taken: below 1 is waste, above 1 is sharing."""
        return np.asarray(self.logical) / np.maximum(self.reserved, 1)

    @property
    def under_pressure(self) -> np.ndarray:
        """Steps in which somebody waits, so that memory decides; all of them when nobody ever does."""
        waits = np.asarray(self.waiting) > 0
        return waits if waits.any() else np.full(len(waits), True)

    def summary(self) -> dict[str, float]:
        """Means over the steps under pressure, and totals."""
        busy = self.under_pressure
        return {
            "steps": len(self.running),
            "mean_running": float(np.asarray(self.running)[busy].mean()),
            "max_running": max(self.running),
            "mean_used_share": float(self.used_share[busy].mean()),
            "mean_logical_share": float(self.logical_share[busy].mean()),
            "preemptions": self.preemptions,
            "prefix_hit_rate": self.prefix_hit_rate,
        }

    def note(self, cache: SimCache, running: Sequence[SimSequence], num_waiting: int) -> None:
        self.reserved.append(cache.reserved_tokens)
        self.logical.append(sum(seq.current_pos for seq in running))
        self.running.append(len(running))
        self.waiting.append(num_waiting)


def simulate(
    cache: SimCache, workload: Sequence[SimSequence], total_tokens: int, progress: Callable[[int], None] | None = None
) -> Timeline:
    """Serve all of `workload`, which is left as it was. progress: told how many have finished."""
    arriving = deque(SimSequence(**{name: getattr(s, name) for name in SimSequence.__slots__}) for s in workload)
    waiting: deque[SimSequence] = deque()
    running: list[SimSequence] = []
    timeline, step, num_finished = Timeline(total_tokens), 0, 0
    while arriving or waiting or running:
        while arriving and arriving[0].arrival_step <= step:
            waiting.append(arriving.popleft())
        preempted = _grow_all(cache, running, waiting)
        timeline.preemptions += preempted
        if not preempted:  # as in the engine: nobody comes in while somebody had to leave
            _admit(cache, running, waiting)
        timeline.note(cache, running, len(waiting))
        finished = [seq for seq in running if seq.current_pos >= seq.final_len]
        for seq in finished:
            cache.finish(seq)
        if finished:
            running = [seq for seq in running if seq.current_pos < seq.final_len]
            num_finished += len(finished)
            if progress is not None:
                progress(num_finished)
        cache.end_step()
        step += 1
    return timeline


def _admit(cache: SimCache, running: list[SimSequence], waiting: deque[SimSequence]) -> None:
    while waiting:
        seq = waiting[0]
        num_tokens = max(seq.prompt_len, seq.current_pos)
        if not cache.admit(seq, num_tokens):
            return
        seq.current_pos = num_tokens
        running.append(waiting.popleft())


def _grow_all(cache: SimCache, running: list[SimSequence], waiting: deque[SimSequence]) -> int:
    """One token more for each, first admitted first; the last admitted gives way. Returns how many had to."""
    preempted, index = 0, 0
    while index < len(running):
        if cache.grow(running[index]):
            running[index].current_pos += 1
            index += 1
            continue
        victim = running.pop()
        cache.finish(victim)
        waiting.appendleft(victim)
        preempted += 1
    return preempted


# --- results -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SweepPoint:
    """One block size under pressure. waste: share of the places taken that is empty."""

    block_size: int
    waste: float
    blocks_per_sequence: float


@dataclass(frozen=True)
class FragmentationResult:
    """timelines: by mode. sweep: one point a block size. external: what `external_fragmentation` found."""

    options: FragmentationOptions
    timelines: dict[str, Timeline]
    sweep: tuple[SweepPoint, ...]
    external: ExternalFragmentation

    def as_dict(self) -> dict[str, Any]:
        """Summaries; the values of every step are in `timelines`."""
        return {
            "options": asdict(self.options),
            "modes": {mode: timeline.summary() for mode, timeline in self.timelines.items()},
            "sweep": [asdict(point) for point in self.sweep],
            "external": asdict(self.external),
        }


def run_fragmentation(
    options: FragmentationOptions | None = None, progress: Progress | None = None
) -> FragmentationResult:
    """All three modes, the sweep of block sizes and the demonstration. Raises `ConfigError` for what cannot be served.

    `fragmentation_plot.plot_fragmentation` draws what comes back.
    """
    options = options or FragmentationOptions()
    workload = make_workload(options)
    timelines = {mode: _run_mode(mode, options, workload, progress) for mode in MODES}
    sweep = block_size_sweep(options, workload[: options.sweep_sequences])
    return FragmentationResult(options, timelines, sweep, external_fragmentation(options.seed))


def _run_mode(
    mode: str, options: FragmentationOptions, workload: Sequence[SimSequence], progress: Progress | None
) -> Timeline:
    report = None if progress is None else lambda done: progress(mode, done, len(workload))
    if mode == "naive":
        return simulate(NaiveCache(options), workload, options.kv_cache_tokens, report)
    cache = EngineCache(options, options.block_size, shared=mode == "shared")
    timeline = simulate(cache, workload, options.kv_cache_tokens, report)
    if queries := cache.manager.prefix_cache_queries:
        timeline.prefix_hit_rate = cache.manager.prefix_cache_hits / queries
    return timeline


def block_size_sweep(options: FragmentationOptions, workload: Sequence[SimSequence]) -> tuple[SweepPoint, ...]:
    """`paged` again with each of the sizes."""
    points = []
    for size in options.sweep_block_sizes:
        timeline = simulate(EngineCache(options, size, shared=False), workload, options.kv_cache_tokens)
        busy = timeline.under_pressure & (np.asarray(timeline.running) > 0)
        blocks = np.asarray(timeline.reserved)[busy] / size / np.asarray(timeline.running)[busy]
        points.append(SweepPoint(size, float(1 - timeline.logical_share[busy].mean()), float(blocks.mean())))
    return tuple(points)
