"""What this machine can do at best, measured in one or two seconds with the threads the model uses.

Two ceilings: how fast memory can be read, and how fast matrices can be multiplied in the model's dtype. Each is the
best of several plain PyTorch kernels over several passes, since a ceiling is what was ever reached. Bytes are counted
once per element read; the kernels write nothing of size. A working set that fits the last-level cache has a ceiling of
its own, measured over a buffer of that size. Results are kept for the life of the process.
"""

import functools
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mini_vllm.bench.noise import CpuMeter, usable_cpus
from mini_vllm.platforms import current_platform

if TYPE_CHECKING:
    import torch

MIB = 2**20
_CACHES = Path("/sys/devices/system/cpu")
_FALLBACK_CACHE_BYTES = 32 * MIB
_MIN_DRAM_BUFFER, _MAX_DRAM_BUFFER = 256 * MIB, 2048 * MIB
_MIN_WORKING_SET = 1 * MIB
_SECONDS_PER_KERNEL = 0.12
_MIN_PASSES = 3
_GEMM_SIZES = (512, 1024, 2048, 4096, 8192)
_GEMM_BUDGET = 0.15
"""Seconds a matrix product may be expected to take; larger ones are not tried."""


@dataclass(frozen=True)
class ReadRate:
    """Best rate at which `buffer_bytes` were read again and again, and by which kernel."""

    gb_s: float
    buffer_bytes: int
    kernel: str


@dataclass(frozen=True)
class GemmRate:
    """Best rate of a square matrix product in `dtype`, and its size."""

    gflop_s: float
    dtype: str
    size: int


@dataclass(frozen=True)
class Ceilings:
    """Measured limits. last_level_cache_bytes: 0 where the device does not tell."""

    device: str
    threads: int
    last_level_cache_bytes: int
    memory: ReadRate
    working_set: ReadRate | None
    """Only when the working set (weights and peak KV cache) is not far larger than the last-level cache."""
    gemm: GemmRate
    others_share: float | None
    """Share of the CPUs that others used while this was measured."""

    @property
    def read_gb_s(self) -> float:
        """The rate that bounds reading the working set: of the cache if it fits there, else of memory."""
        if self.working_set is None:
            return self.memory.gb_s
        return max(self.working_set.gb_s, self.memory.gb_s)

    @property
    def read_source(self) -> str:
        """'cache' or 'memory': where `read_gb_s` comes from."""
        return "memory" if self.working_set is None or self.working_set.gb_s <= self.memory.gb_s else "cache"

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"read_gb_s": self.read_gb_s, "read_source": self.read_source}


def measure_ceilings(dtype: str, working_set_bytes: int) -> Ceilings:
    """Measure, or return what was measured before in this process. Uses torch's current thread count.

    working_set_bytes: weights plus the KV cache in use; decides whether the cache-resident rate matters.
    """
    import torch

    threads = torch.get_num_threads()
    cache_bytes = last_level_cache_bytes() if current_platform.tensors_in_host_memory else 0
    meter = CpuMeter().start()
    memory = read_rate(dram_buffer_bytes(cache_bytes, current_platform.available_memory_bytes()), threads)
    resident = None
    if working_set_bytes < 2 * cache_bytes:
        rounded = -(-max(working_set_bytes, _MIN_WORKING_SET) // MIB) * MIB
        resident = read_rate(rounded, threads)
    gemm = gemm_rate(dtype, threads)
    others = meter.stop().others_share
    return Ceilings(current_platform.describe(), threads, cache_bytes, memory, resident, gemm, others)


def dram_buffer_bytes(cache_bytes: int, available_bytes: int) -> int:
    """A buffer the cache cannot help with: eight times its size, within bounds and a quarter of the free memory.

    cache_bytes: 0 when the device does not tell; then the largest buffer.
    """
    wanted = min(max(8 * cache_bytes, _MIN_DRAM_BUFFER), _MAX_DRAM_BUFFER) if cache_bytes else _MAX_DRAM_BUFFER
    return max(min(wanted, available_bytes // 4), 16 * MIB) // MIB * MIB


# --- reading ------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=16)
def read_rate(num_bytes: int, threads: int) -> ReadRate:
    """Best rate of reading a buffer of `num_bytes`. threads: torch's thread count; part of what is remembered."""
    import torch

    buffer = torch.ones(num_bytes // 4, dtype=torch.float32, device=current_platform.device())
    seconds, kernel = _fastest(_readers(buffer), _SECONDS_PER_KERNEL)
    return ReadRate(gb_s=num_bytes / seconds / 1e9, buffer_bytes=num_bytes, kernel=kernel)


def _readers(buffer: "torch.Tensor") -> list[tuple[str, Callable[[], object]]]:
    """Kernels that read every byte of `buffer` once. `.item()` waits for devices that work asynchronously."""
    import torch

    rows = buffer.view(-1, 4096) if buffer.numel() % 4096 == 0 else buffer.view(1, -1)
    ones = torch.ones(rows.shape[1], dtype=buffer.dtype, device=buffer.device)
    return [
        ("sum", lambda: buffer.sum().item()),
        ("max", lambda: buffer.amax().item()),
        ("dot", lambda: torch.dot(buffer, buffer).item()),  # both arguments are the same bytes
        ("matrix-vector", lambda: torch.mv(rows, ones)[0].item()),
    ]


# --- multiplying --------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=16)
def gemm_rate(dtype: str, threads: int) -> GemmRate:
    """Best rate of an n x n by n x n product in `dtype`; threads: as for `read_rate`.

    On a CPU kernels may widen 16-bit numbers to float32 on the way, which is several times faster where there are no
    instructions for them. So that counts as well: the ceiling is the better of the two, and says which.
    """
    widened = ["float32"] if current_platform.tensors_in_host_memory and dtype in ("bfloat16", "float16") else []
    return max((_square_products(name) for name in [dtype, *widened]), key=lambda found: found.gflop_s)


def _square_products(dtype: str) -> GemmRate:
    """Over growing n while one product stays short."""
    import torch

    best = GemmRate(0.0, dtype, 0)
    generator = torch.Generator().manual_seed(0)  # the global one belongs to whoever called
    for size in _GEMM_SIZES:
        x, weight = (
            torch.randn(size, size, generator=generator).to(current_platform.device(), getattr(torch, dtype))
            for _ in range(2)
        )
        seconds, _ = _fastest([("linear", functools.partial(_product, x, weight))], _SECONDS_PER_KERNEL)
        rate = 2 * size**3 / seconds / 1e9
        if rate > best.gflop_s:
            best = GemmRate(rate, dtype, size)
        if 8 * seconds > _GEMM_BUDGET:
            break
    return best


def _product(x: "torch.Tensor", weight: "torch.Tensor") -> object:
    import torch

    return torch.nn.functional.linear(x, weight)[0, 0].item()


# --- timing -------------------------------------------------------------------------------------------------


def _fastest(kernels: Sequence[tuple[str, Callable[[], object]]], seconds: float) -> tuple[float, str]:
    """(time of the fastest pass of any kernel, its name). Each kernel warms up once and then gets `seconds`."""
    return min((_best_pass(run, seconds), name) for name, run in kernels)


def _best_pass(run: Callable[[], object], seconds: float) -> float:
    run()
    best, passes = float("inf"), 0
    deadline = time.perf_counter() + seconds
    while passes < _MIN_PASSES or time.perf_counter() < deadline:
        begin = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - begin)
        passes += 1
    return best


# --- caches -------------------------------------------------------------------------------------------------


def last_level_cache_bytes(root: Path = _CACHES, cpus: Iterable[int] | None = None) -> int:
    """Bytes of last-level cache that the CPUs this process may use have between them.

    Read from sysfs; 32 MiB where there is none. In a virtual machine others may share what is listed here.
    """
    found: dict[tuple[int, str], int] = {}
    for cpu in sorted(usable_cpus() if cpus is None else cpus):
        for index in (root / f"cpu{cpu}" / "cache").glob("index*"):
            try:
                level = int((index / "level").read_text())
                shared = (index / "shared_cpu_list").read_text().strip()
                found[level, shared] = parse_cache_size((index / "size").read_text())
            except (OSError, ValueError):
                continue
    if not found:
        return _FALLBACK_CACHE_BYTES
    last = max(level for level, _ in found)
    return sum(size for (level, _), size in found.items() if level == last)


def parse_cache_size(text: str) -> int:
    """'32768K' -> bytes."""
    text = text.strip()
    units = {"K": 2**10, "M": 2**20, "G": 2**30}
    return int(text[:-1]) * units[text[-1]] if text[-1:] in units else int(text)
