"""What paging buys: the same 1,000 sequences through a contiguous cache, a paged one, and one that shares prefixes.

`python simulate.py` prints the comparison and writes fragmentation.png beside this file. In each step every running
sequence writes one token, waiting ones are admitted in order of arrival while there is room (and write their whole
prompt), finished ones leave. All three have the same memory and serve the same sequences.

While the paged cache works, `mini_vllm`'s own block manager is given the same orders, and after each step both must
agree: the same physical blocks without sharing; with it the same number in use, and each held by as many.
"""

import argparse
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from paged_attention import BlockTables, OutOfBlocks, Sequence

from mini_vllm.core.kv_cache_manager import KVCacheManager
from mini_vllm.request import Request
from mini_vllm.sampling_params import SamplingParams

MAX_SEQ_LEN = 4500
NUM_TOKENS = 64 * MAX_SEQ_LEN
PREFIX_LEN, NUM_GROUPS = 1024, 4
HERE = Path(__file__).resolve().parent


def make_workload(num_sequences: int, rate: float = 1.0, seed: int = 0) -> list[tuple[int, Sequence]]:
    """(step of arrival, sequence): Poisson arrivals, prompts U[200, 4000], outputs U[50, 500]."""
    rng = np.random.default_rng(seed)
    arrivals = np.cumsum(rng.exponential(1 / rate, num_sequences)).astype(int)
    prompts, outputs = rng.integers(200, 4001, num_sequences), rng.integers(50, 501, num_sequences)
    groups = rng.integers(0, NUM_GROUPS, num_sequences)
    return [
        (
            int(arrivals[i]),
            Sequence(i, int(p), int(outputs[i]), group=int(groups[i]), prefix_len=min(PREFIX_LEN, int(p))),
        )
        for i, p in enumerate(prompts)
    ]


# --- three caches with the same face -------------------------------------------------------------------------


class Cache(Protocol):
    """What the loop needs. `grow` writes tokens of a sequence that is in; both say no without changing anything."""

    def admit(self, seq: Sequence, num_tokens: int) -> bool: ...
    def grow(self, seq: Sequence) -> bool: ...
    def finish(self, seq: Sequence) -> None: ...
    def end_step(self) -> None: ...
    @property
    def reserved_tokens(self) -> int: ...


@dataclass
class Naive:
    """A row of the maximal length for each sequence. Only the counts: the rows are in `ContiguousCache`."""

    num_rows: int = NUM_TOKENS // MAX_SEQ_LEN
    used: int = 0

    def admit(self, seq: Sequence, num_tokens: int) -> bool:
        if self.used == self.num_rows:
            return False
        self.used += 1
        return True

    def grow(self, seq: Sequence) -> bool:
        return True

    def finish(self, seq: Sequence) -> None:
        self.used -= 1

    def end_step(self) -> None:
        pass

    @property
    def reserved_tokens(self) -> int:
        return self.used * MAX_SEQ_LEN


class Paged:
    """Blocks when they are needed. shared: a sequence begins with the blocks of a running one of its group."""

    def __init__(self, block_size: int = 16, shared: bool = False) -> None:
        self.blocks, self.shared = BlockTables(NUM_TOKENS // block_size, block_size), shared
        self.running: dict[int, Sequence] = {}

    def admit(self, seq: Sequence, num_tokens: int) -> bool:
        donor, num_shared = self._donor(seq, num_tokens)
        if donor is None:
            self.blocks.start(seq.id)
        else:
            self.blocks.fork(donor, seq.id, num_shared)
        try:
            self.blocks.extend(seq.id, num_tokens - num_shared)
        except OutOfBlocks:
            self.blocks.finish(seq.id)
            return False
        self.running[seq.id] = seq
        return True

    def _donor(self, seq: Sequence, num_tokens: int) -> tuple[int | None, int]:
        """(who to begin like, for how many tokens): full blocks of the common prefix, and not the whole sequence."""
        group = [other for other in self.running.values() if self.shared and other.group == seq.group]
        donor = max(group, key=lambda other: other.prefix_len, default=None)
        if donor is None:
            return None, 0
        size = self.blocks.block_size
        common = min(seq.prefix_len // size, donor.prefix_len // size, (num_tokens - 1) // size)
        return donor.id, common * size

    def grow(self, seq: Sequence) -> bool:
        try:
            self.blocks.extend(seq.id, 1)
        except OutOfBlocks:
            return False
        return True

    def finish(self, seq: Sequence) -> None:
        self.blocks.finish(seq.id)
        del self.running[seq.id]

    def end_step(self) -> None:
        pass

    @property
    def reserved_tokens(self) -> int:
        return self.blocks.num_used_blocks * self.blocks.block_size


class CheckedAgainstEngine(Paged):
    """`Paged`, with the engine's `KVCacheManager` doing the same beside it, compared after every step."""

    def __init__(self, block_size: int = 16, shared: bool = False) -> None:
        super().__init__(block_size, shared)
        num_blocks = self.blocks.allocator.num_blocks + 1  # the engine keeps block 0 to itself
        self.manager = KVCacheManager(num_blocks, block_size, enable_caching=shared)
        self.requests: dict[int, Request] = {}
        self.num_compared = 0

    def admit(self, seq: Sequence, num_tokens: int) -> bool:
        request = Request(str(seq.id), prompt_of(seq, num_tokens), SamplingParams(max_tokens=seq.output_len))
        hits, num_hit = self.manager.get_computed_blocks(request)
        request.num_computed_tokens = num_hit
        theirs = self.manager.allocate_slots(request, num_tokens - num_hit, hits) is not None
        ours = super().admit(seq, num_tokens)
        assert ours == theirs, f"sequence {seq.id}: admitted here {ours}, by the engine {theirs}"
        if ours:
            request.num_computed_tokens = num_tokens
            self.requests[seq.id] = request
        return ours

    def grow(self, seq: Sequence) -> bool:
        request = self.requests[seq.id]
        if request.num_tokens == request.num_computed_tokens:  # else it has the token since there was no room for it
            request.append_output_token(own_token(seq, request.num_tokens))
        theirs = self.manager.allocate_slots(request, 1) is not None
        ours = super().grow(seq)
        assert ours == theirs, f"sequence {seq.id}: grown here {ours}, by the engine {theirs}"
        request.num_computed_tokens += ours
        return ours

    def finish(self, seq: Sequence) -> None:
        self._compare(seq.id, self.blocks.tables[seq.id], ends_only=False)
        super().finish(seq)
        self.manager.free(self.requests.pop(seq.id))

    def end_step(self) -> None:
        self.manager.confirm_step()
        free = self.manager.block_pool.get_num_free_blocks()
        assert free == self.blocks.allocator.num_free, f"free: {self.blocks.allocator.num_free}, the engine's {free}"
        for seq_id, table in self.blocks.tables.items():
            self._compare(seq_id, table, ends_only=True)  # tables only grow, so their middle cannot have changed
        self.num_compared += 1

    def _compare(self, seq_id: int, ours: list[int], ends_only: bool) -> None:
        theirs = self.manager.block_ids(str(seq_id))[0]
        assert len(theirs) == len(ours), f"sequence {seq_id}: {len(ours)} blocks, the engine's {len(theirs)}"
        for index in (0, -1) if ends_only else range(len(ours)):
            if self.shared:  # the engine may find the same contents in a block that was free: ids differ, holders not
                holders = self.manager.block_pool.blocks[theirs[index]].ref_cnt
                same = holders == self.blocks.allocator.ref_counts[ours[index]]
            else:
                same = theirs[index] - 1 == ours[index]
            assert same, f"sequence {seq_id}: block {index} is not the engine's"


def own_token(seq: Sequence, position: int) -> int:
    """Token ids that no other sequence has."""
    return 1_000_000 + seq.id * 8192 + position


def prompt_of(seq: Sequence, num_tokens: int) -> list[int]:
    """The first of its group's tokens, then its own."""
    common = min(seq.prefix_len, num_tokens)
    shared = range(seq.group * 8192, seq.group * 8192 + common)
    return [*shared, *(own_token(seq, t) for t in range(common, num_tokens))]


# --- the loop ------------------------------------------------------------------------------------------------


@dataclass
class Timeline:
    """One value a step. logical: tokens the sequences hold; reserved: places taken for them; both as sequences see."""

    reserved: list[int] = field(default_factory=list)
    logical: list[int] = field(default_factory=list)
    running: list[int] = field(default_factory=list)
    waiting: list[int] = field(default_factory=list)
    preemptions: int = 0

    @property
    def used(self) -> np.ndarray:
        """Share of the pool that is taken."""
        return np.array(self.reserved) / NUM_TOKENS

    @property
    def filled(self) -> np.ndarray:
        """Tokens per place taken: below 1 is waste, above 1 is sharing."""
        return np.array(self.logical) / np.maximum(self.reserved, 1)

    def busy(self) -> np.ndarray:
        """Steps in which somebody had to wait: when memory decides."""
        return np.array(self.waiting) > 0


def run(cache: Cache, workload: list[tuple[int, Sequence]]) -> Timeline:
    """Serve everything. Without room to grow, the latest admitted starts over when there is some (recomputation)."""
    arriving = deque((step, Sequence(**vars(seq))) for step, seq in workload)
    waiting: deque[Sequence] = deque()
    running: list[Sequence] = []
    timeline, step = Timeline(), 0
    while arriving or waiting or running:
        while arriving and arriving[0][0] <= step:
            waiting.append(arriving.popleft()[1])
        preempted = _grow_all(cache, running, waiting)
        timeline.preemptions += preempted
        while waiting and not preempted:
            seq = waiting[0]
            num_tokens = max(seq.prompt_len, seq.current_pos)
            if not cache.admit(seq, num_tokens):
                break
            seq.current_pos = num_tokens
            running.append(waiting.popleft())
        timeline.reserved.append(cache.reserved_tokens)
        timeline.logical.append(sum(seq.current_pos for seq in running))
        timeline.running.append(len(running))
        timeline.waiting.append(len(waiting))
        for seq in [seq for seq in running if seq.is_finished]:
            cache.finish(seq)
            running.remove(seq)
        cache.end_step()
        step += 1
    return timeline


def _grow_all(cache: Cache, running: list[Sequence], waiting: deque[Sequence]) -> int:
    """One more token for each, in order of admission. Returns how many had to give way."""
    preempted, index = 0, 0
    while index < len(running):
        seq = running[index]
        if cache.grow(seq):
            seq.current_pos += 1
            index += 1
            continue
        victim = running.pop()
        cache.finish(victim)
        waiting.appendleft(victim)
        preempted += 1
    return preempted


# --- two small experiments -----------------------------------------------------------------------------------


def block_size_sweep(workload: list[tuple[int, Sequence]], sizes: tuple[int, ...]) -> dict[int, tuple[float, float]]:
    """Block size -> (share of the places taken that is empty, blocks in a table on average), while memory decides."""
    found = {}
    for size in sizes:
        timeline = run(Paged(size), workload)
        busy = timeline.busy()
        blocks = np.array(timeline.reserved)[busy] / size
        found[size] = (1 - timeline.filled[busy].mean(), (blocks / np.array(timeline.running)[busy]).mean())
    return found


@dataclass
class Arena:
    """Contiguous reservations of any length, placed first fit: what is left over are holes."""

    size: int
    taken: dict[int, tuple[int, int]] = field(default_factory=dict)

    def holes(self) -> list[tuple[int, int]]:
        """(start, length) of what is free, in order."""
        edges = [
            0,
            *(edge for start, length in sorted(self.taken.values()) for edge in (start, start + length)),
            self.size,
        ]
        return [(a, b - a) for a, b in zip(edges[::2], edges[1::2], strict=True) if b > a]

    def reserve(self, owner: int, length: int) -> bool:
        start = next((start for start, free in self.holes() if free >= length), None)
        if start is None:
            return False
        self.taken[owner] = (start, length)
        return True


def external_fragmentation(seed: int = 3) -> tuple[Arena, int, int, BlockTables]:
    """(an arena, what it has free, a request it cannot place although that is less, a pool that takes the request).

    Both get the same 96 tokens' worth of memory, the same sequences, and lose the same half of them.
    """
    rng, arena, blocks = np.random.default_rng(seed), Arena(96), BlockTables(24, 4)
    lengths = [4 * int(n) for n in rng.integers(1, 4, 40)]
    owners = [owner for owner, length in enumerate(lengths) if arena.reserve(owner, length)]
    for owner in owners:
        blocks.start(owner), blocks.extend(owner, lengths[owner])
    for owner in owners[::2]:
        del arena.taken[owner]
        blocks.finish(owner)
    free = sum(length for _, length in arena.holes())
    wanted = max(length for _, length in arena.holes()) + 8
    assert wanted <= free and not arena.reserve(99, wanted)
    blocks.start(99), blocks.extend(99, wanted)
    return arena, free, wanted, blocks


# --- the picture ---------------------------------------------------------------------------------------------

COLOURS = {"contiguous": "#c8553d", "paged": "#2d6a8e", "paged, shared prefixes": "#5a9367"}


def plot(timelines: dict[str, Timeline], sweep: dict[int, tuple[float, float]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    layout = [["used"] * 2 + ["filled"] * 2 + ["running"] * 2, ["sweep"] * 3 + ["arena"] * 3]
    figure, axes = pyplot.subplot_mosaic(layout, figsize=(13, 7), layout="constrained")
    plot_lines(axes["used"], timelines, "used", "share of the pool taken (used / total)")
    plot_lines(axes["filled"], timelines, "filled", "tokens held per place taken (logical / reserved)")
    plot_lines(axes["running"], timelines, "running", "sequences running at once")
    axes["filled"].axhline(1, color="0.6", lw=0.8, ls=":")
    axes["filled"].text(2000, 1.06, "above 1, prefixes are shared", fontsize=8, color="0.35")
    axes["running"].legend(fontsize=8, frameon=False, loc="upper right")
    plot_sweep(axes["sweep"], sweep)
    plot_arena(axes["arena"])
    figure.suptitle(
        f"{len(timelines)} caches with places for {NUM_TOKENS:,} tokens, given the same sequences", fontsize=12
    )
    figure.savefig(path, dpi=80)
    pyplot.close(figure)


def plot_lines(axis: Any, timelines: dict[str, Timeline], what: str, title: str) -> None:
    for name, timeline in timelines.items():
        values = np.array(getattr(timeline, what), dtype=float)
        if what == "filled":
            values[np.array(timeline.running) == 0] = np.nan
        axis.plot(values, color=COLOURS[name], lw=1.4, label=name)
    axis.set_title(title, fontsize=10)
    axis.set_xlabel("step")
    axis.set_ylim(0, None)
    axis.spines[["top", "right"]].set_visible(False)


def plot_sweep(axis: Any, sweep: dict[int, tuple[float, float]]) -> None:
    sizes = [str(size) for size in sweep]
    bars = axis.bar(sizes, [100 * waste for waste, _ in sweep.values()], color=COLOURS["paged"], width=0.6)
    labels = [f"{100 * waste:.1f} %\n{entries:,.0f} blocks" for waste, entries in sweep.values()]
    axis.bar_label(bars, labels, fontsize=8, padding=2)
    axis.margins(y=0.25)
    axis.set_title("empty places, and blocks in a table, by block size", fontsize=10)
    axis.set_xlabel("tokens in a block")
    axis.set_ylabel("% of places taken")
    axis.spines[["top", "right"]].set_visible(False)


def plot_arena(axis: Any) -> None:
    """Memory as a strip: the holes of the arena, and where the pool put the request that the arena refused."""
    arena, free, wanted, blocks = external_fragmentation()
    for start, length in arena.taken.values():
        axis.barh(1, length, left=start, color=COLOURS["contiguous"], edgecolor="white")
    for owner, table in blocks.tables.items():
        for block in table:
            colour = COLOURS["paged, shared prefixes"] if owner == 99 else COLOURS["paged"]
            axis.barh(0, blocks.block_size, left=block * blocks.block_size, color=colour, edgecolor="white")
    for row in (0, 1):
        axis.barh(row, arena.size, color="none", edgecolor="0.6", lw=0.8)
    largest = max(length for _, length in arena.holes())
    axis.set_yticks([0, 1], ["paged", "contiguous"])
    axis.set_ylim(-0.7, 1.9)
    axis.text(0, 1.5, f"{free} free, largest hole {largest}: {wanted} tokens do not fit", fontsize=8)
    axis.text(0, -0.6, f"the same {wanted} tokens (green) in any free blocks", fontsize=8)
    axis.set_title("external fragmentation", fontsize=10)
    axis.set_xlabel("place in memory, in tokens")
    axis.spines[["top", "right", "left"]].set_visible(False)


# --- main ----------------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-sequences", type=int, default=1000)
    parser.add_argument("--rate", type=float, default=1.0, help="arrivals per step")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=HERE / "fragmentation.png")
    parser.add_argument("--no-check", action="store_true", help="do not compare with the engine's block manager")
    args = parser.parse_args()
    workload = make_workload(args.num_sequences, args.rate, args.seed)
    paged = Paged if args.no_check else CheckedAgainstEngine
    caches = {"contiguous": Naive(), "paged": paged(), "paged, shared prefixes": paged(shared=True)}
    timelines = {}
    print(f"{'':<24}{'steps':>7}{'running':>9}{'pool taken':>12}{'tokens per place':>18}{'preempted':>11}")
    for name, cache in caches.items():
        timelines[name] = timeline = run(cache, workload)
        busy = timeline.busy() if timeline.busy().any() else np.full(len(timeline.running), True)
        print(
            f"{name:<24}{len(timeline.running):>7,}{np.array(timeline.running)[busy].mean():>9.1f}"
            f"{timeline.used[busy].mean():>11.1%} {timeline.filled[busy].mean():>17.3f} {timeline.preemptions:>10}"
        )
    print("(means over the steps in which somebody waits for memory)")
    for name, cache in caches.items():
        if isinstance(cache, CheckedAgainstEngine):
            print(f"{name}: equal to the engine's block manager in all {cache.num_compared:,} steps")
    plot(timelines, block_size_sweep(workload[:300], (1, 4, 16, 64, 256)), args.out)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
