"""How fast the native attention kernel is, beside what the machine could do at best and beside torch's own attention.

A decode has to read the keys and values of every request, so its floor is their bytes over the rate at which a plain
loop reads a buffer as large as all layers' caches; a prefill has to multiply, so its floor is its operations over the
rate of multiply-adds from registers. `floor` in the table is the larger of the two as a share of the measured time:
100 % cannot be beaten. Layers take turns, each with a cache of its own, as they do in a model. torch is
`scaled_dot_product_attention` over keys and values that lie ready, dense, without pages; sides alternate.

    python benchmarks/cpu_attention.py [--shapes qwen2.5-0.5b ...] [--dtypes bfloat16 ...] [--json FILE]
"""

import argparse
import ctypes
import functools
import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from mini_vllm.attention.backend import CommonAttentionMetadata
from mini_vllm.attention.native import NativeBackend
from mini_vllm.bench.environment import collect_environment
from mini_vllm.core.interfaces import KVCacheSpec
from mini_vllm.ops.cpu import library

BLOCK_SIZE = 16
MAX_CACHE_BYTES = 192 << 20
"""Of all layers together, unless one is larger; and four times that is too large for one."""


@dataclass(frozen=True)
class Shape:
    """Of a model: query heads, KV heads, head size, layers."""

    name: str
    num_heads: int
    num_kv_heads: int
    head_size: int
    num_layers: int


SHAPES = (
    Shape("qwen2.5-0.5b", 14, 2, 64, 24),
    Shape("llama-1.1b", 32, 4, 64, 22),
    Shape("head-128", 32, 8, 128, 32),
    Shape("15m", 6, 6, 48, 6),
)
DECODES = [(1, batch, context) for batch in (1, 8, 32) for context in (128, 512, 2048, 8192)]
PREFILLS = [(512, 1, 0), (2048, 1, 0), (512, 1, 7680)]
Work = tuple[int, int, int]
"""New tokens of each request, requests, tokens before."""


class Bench:
    """One shape, type and piece of work: tensors of as many layers as matter, and both sides' calls."""

    def __init__(self, shape: Shape, dtype: str, work: Work) -> None:
        self.shape, self.dtype, self.work = shape, dtype, work
        tokens, batch, context = work
        self.length = context + (tokens if tokens > 1 else 0)  # a decode's context counts the token itself
        self.compute_dtype = torch.bfloat16 if dtype == "int8" else getattr(torch, dtype)
        blocks = -(-self.length // BLOCK_SIZE)
        self.cache_shape = self._cache_shape(batch * blocks + 1)
        itemsize = 1 if dtype == "int8" else self.compute_dtype.itemsize
        self.layer_bytes = int(np.prod(self.cache_shape)) * itemsize
        self.num_layers = max(1, min(shape.num_layers, MAX_CACHE_BYTES // self.layer_bytes))
        self.turn = 0

    def _cache_shape(self, num_blocks: int) -> tuple[int, ...]:
        arguments = num_blocks, BLOCK_SIZE, self.shape.num_kv_heads, self.shape.head_size
        if self.dtype != "int8":
            return NativeBackend.kv_cache_shape(*arguments)
        return NativeBackend.kv_cache_shape(*arguments, "int8_per_token_head")

    @property
    def working_set(self) -> int:
        return self.layer_bytes * self.num_layers

    @property
    def flops(self) -> float:
        tokens, batch, _ = self.work
        pairs = batch * sum(range(self.length - tokens + 1, self.length + 1))
        return 4.0 * self.shape.num_heads * self.shape.head_size * pairs

    def ours(self) -> Callable[[], None]:
        tokens, batch, _ = self.work
        s, rng = self.shape, torch.Generator().manual_seed(0)
        caches = [self._cache() for _ in range(self.num_layers)]
        query = torch.randn(tokens * batch, s.num_heads, s.head_size, generator=rng).to(self.compute_dtype)
        key, value = (query[:, : s.num_kv_heads].clone() for _ in range(2))
        impls = [NativeBackend.impl_cls(s.num_heads, s.head_size, s.head_size**-0.5, s.num_kv_heads) for _ in caches]
        output, metadata = torch.empty_like(query), self._metadata()

        def call() -> None:
            self.turn = (self.turn + 1) % self.num_layers
            impls[self.turn].forward(query, key, value, caches[self.turn], metadata, output)

        for _ in range(self.num_layers):
            call()
        return call

    def _cache(self) -> torch.Tensor:
        if self.dtype == "int8":
            cache = torch.full(self.cache_shape, 60, dtype=torch.int8)  # its scales are 0x3c3c3c3c, about 0.0115
            return cache
        return torch.full(self.cache_shape, 0.125, dtype=self.compute_dtype)

    def _metadata(self) -> Any:
        tokens, batch, _ = self.work
        blocks = -(-self.length // BLOCK_SIZE)
        table = (1 + np.random.default_rng(0).permutation(batch * blocks)).reshape(batch, blocks).astype(np.int32)
        positions = np.arange(self.length - tokens, self.length)
        slots = table[:, positions // BLOCK_SIZE] * np.int64(BLOCK_SIZE) + positions % BLOCK_SIZE
        starts, lens = np.arange(batch + 1, dtype=np.int32) * tokens, np.full(batch, self.length, np.int32)
        common = CommonAttentionMetadata(
            tokens * batch, batch, tokens, self.length, *map(torch.from_numpy, (starts, lens, slots.ravel(), table)),
            starts, lens, table,
        )  # fmt: skip
        return NativeBackend.builder_cls(KVCacheSpec(BLOCK_SIZE, 0, "x"), torch.device("cpu")).build(common)

    def torchs(self) -> Callable[[], None]:
        tokens, batch, context = self.work
        s = self.shape
        query = torch.randn(batch, s.num_heads, tokens, s.head_size).to(self.compute_dtype)
        size = batch, s.num_kv_heads, self.length, s.head_size
        layers = [tuple(torch.full(size, 0.125, dtype=query.dtype) for _ in range(2)) for _ in range(self.num_layers)]
        causal = tokens > 1 and context == 0
        mask = None
        if tokens > 1 and context:
            mask = torch.ones(tokens, self.length, dtype=torch.bool).tril(context)
        turns = iter(range(1 << 60))

        def call() -> None:
            key, value = layers[next(turns) % self.num_layers]
            F.scaled_dot_product_attention(query, key, value, mask, is_causal=causal, enable_gqa=True)

        return call


def seconds_of(call: Callable[[], None], at_least: float) -> float:
    """Of one call, over as many as take `at_least` seconds."""
    count, start = 0, time.perf_counter()
    while (now := time.perf_counter()) - start < at_least or count == 0:
        call()
        count += 1
    return (now - start) / count


@functools.cache
def read_rate(num_bytes: int) -> float:
    """Bytes a second of reading a buffer of this size again and again; the best of several passes."""
    buffer, result = torch.ones(num_bytes // 1024 * 256), ctypes.c_float()
    read = library.function("mv_read_probe", [ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p])
    call = functools.partial(read, buffer.data_ptr(), buffer.numel(), ctypes.addressof(result))
    call()
    return buffer.numel() * 4 / min(seconds_of(call, 0.02) for _ in range(8))


@functools.cache
def multiply_add_rate() -> float:
    """Floating-point operations a second, from registers."""
    result, done = ctypes.c_float(), 0
    probe = library.function("mv_multiply_add_probe", [ctypes.c_int64, ctypes.c_void_p], ctypes.c_int64)
    best = 0.0
    for _ in range(8):
        start = time.perf_counter()
        done = probe(200_000, ctypes.addressof(result))
        best = max(best, done / (time.perf_counter() - start))
    return best


def measure(bench: Bench, args: argparse.Namespace) -> dict[str, Any]:
    sides = {"ours": bench.ours()}
    if bench.dtype != "int8" and not args.no_torch:
        sides["torch"] = bench.torchs()
    rate = read_rate(max(1 << 20, 1 << (bench.working_set.bit_length() - 1)))
    found: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(args.rounds):
        for name, call in sides.items():
            found[name].append(seconds_of(call, args.seconds))
    floor = {"memory": bench.layer_bytes / rate, "arithmetic": bench.flops / multiply_add_rate()}
    ours = statistics.median(found["ours"])
    return {
        "shape": asdict(bench.shape), "dtype": bench.dtype, "work": bench.work, "num_layers": bench.num_layers,
        "seconds": found, "median": ours, "spread": (max(found["ours"]) - min(found["ours"])) / ours,
        "gb_s": bench.layer_bytes / ours / 1e9, "gflop_s": bench.flops / ours / 1e9, "read_gb_s": rate / 1e9,
        "floor": floor, "floor_share": max(floor.values()) / ours,
        "torch_ratio": statistics.median(found["torch"]) / ours if "torch" in found else None,
    }  # fmt: skip


def benches(args: argparse.Namespace) -> Iterator[Bench]:
    works: list[Work] = (DECODES if "decode" in args.parts else []) + (PREFILLS if "prefill" in args.parts else [])
    for shape in SHAPES:
        for work in works if shape.name in args.shapes else []:
            for dtype in args.dtypes:
                bench = Bench(shape, dtype, work)
                if bench.layer_bytes <= 4 * MAX_CACHE_BYTES:
                    yield bench


def show(row: dict[str, Any]) -> None:
    tokens, batch, context = row["work"]
    name = f"decode {batch:2} x {context}" if tokens == 1 else f"prefill {tokens} after {context}"
    ratio = "" if row["torch_ratio"] is None else f"{row['torch_ratio']:6.2f}x"
    print(
        f"{row['shape']['name']:13} {row['dtype']:9} {name:22} {row['median'] * 1e6:10.1f} us {row['gb_s']:6.2f} GB/s "
        f"{row['gflop_s']:7.1f} GFLOP/s  floor {row['floor_share']:4.0%}  spread {row['spread']:4.0%} {ratio}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Speed of the native attention kernel.")
    parser.add_argument("--shapes", nargs="+", default=[s.name for s in SHAPES], choices=[s.name for s in SHAPES])
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32", "int8"])
    parser.add_argument("--parts", nargs="+", default=["decode", "prefill"], choices=["decode", "prefill"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=0.03, help="of each side in a round, at least")
    parser.add_argument("--no-torch", action="store_true")
    parser.add_argument("--json", type=Path, default=None)
    args = parser.parse_args()
    if not library.available():
        raise SystemExit("there is no library of native kernels here (the log says why)")
    library.set_num_threads(torch.get_num_threads())
    print(f"{library.loaded_isa()}, {torch.get_num_threads()} threads, {multiply_add_rate() / 1e9:.0f} GFLOP/s from "
          f"registers, {read_rate(256 << 20) / 1e9:.1f} GB/s from memory")  # fmt: skip
    rows = []
    for bench in benches(args):
        rows.append(measure(bench, args))
        show(rows[-1])
    if args.json:
        ceilings = {"gflop_s": multiply_add_rate() / 1e9, "memory_gb_s": read_rate(256 << 20) / 1e9}
        result = {"environment": collect_environment(), "isa": library.loaded_isa(), "ceilings": ceilings, "rows": rows}
        args.json.write_text(json.dumps(result, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
