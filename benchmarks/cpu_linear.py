"""Linear layers on the CPU: native kernels beside torch's best, and both beside what the machine can do at most.

For each shape, number format and number of rows the two take turns, several rounds. Weights are copied often enough
that no copy is still in the cache when its turn comes again. The ceilings are measured in the same run: multiply-adds
out of registers, and reading memory with all threads. `peak` is the share of the ceiling that is nearer: bytes of
weights a second, or operations a second (for integers, too, against float32 multiply-adds; int4 can exceed them).

Prints a table and writes one JSON file with versions, shapes, threads and the spread over rounds.
"""

import argparse
import ctypes
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from mini_vllm.bench.environment import collect_environment
from mini_vllm.ops.cpu import library
from mini_vllm.ops.cpu.linear import LinearFormat, PackedFloatLinear, PackedLinear

RESULTS = Path(__file__).resolve().parent / "results"
SHAPES = ("896x4864", "4864x896", "5632x2048", "151936x896")
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 512)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
FORMATS = {
    "int8-weight-only": LinearFormat("int8", "none"),
    "int8": LinearFormat("int8", "token"),
    "int4": LinearFormat("int4", "token"),
}
CACHE_BYTES = 160 << 20
"""Of weights in turn: several times the last-level cache."""

Product = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Ceilings:
    """Per second, all threads."""

    flops: float
    bytes: float


# --- what the machine can do ----------------------------------------------------------------------------------


def measure_ceilings() -> Ceilings:
    """The best of several tries: whatever disturbs can only make them lower."""
    fma = library.function("mv_probe_fma", [ctypes.c_int64], ctypes.c_int64)
    read = library.function("mv_probe_read", [ctypes.c_void_p, ctypes.c_int64])
    memory = torch.ones(1 << 26)
    flops = [2 * fma(1_000_000) / seconds for seconds in timed(lambda: fma(1_000_000), 9)]
    rates = [memory.nbytes / seconds for seconds in timed(lambda: read(memory.data_ptr(), memory.nbytes), 9)]
    return Ceilings(max(flops), max(rates))


def timed(run: Callable[[], Any], rounds: int) -> list[float]:
    """Seconds of each of `rounds` calls, after one that does not count."""
    run()
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return seconds


# --- the two sides ----------------------------------------------------------------------------------------------


def native(weight: torch.Tensor, name: str) -> tuple[Product, int]:
    """(the product, bytes of its weights)."""
    if name in DTYPES:
        plain = PackedFloatLinear.pack(weight.to(DTYPES[name]))
        return plain, plain.data.nbytes
    packed = PackedLinear.pack(weight, FORMATS[name])
    return packed, packed.data.nbytes


def torchs(weight: torch.Tensor, name: str) -> dict[str, Product]:
    """torch's ways to the same: for formats it lacks, its fastest plain one, which is float32 here."""
    if name == "int8":
        whole = torch.quantize_per_tensor(weight, float(weight.abs().max()) / 127, 0, torch.qint8)
        prepacked = torch.ops.quantized.linear_prepack(whole, None)
        return {"quantized.linear_dynamic": lambda x: torch.ops.quantized.linear_dynamic(x.float(), prepacked, True)}
    dtype = DTYPES.get(name, torch.float32)
    plain = weight.to(dtype)
    packed = torch.ops.mkldnn._reorder_linear_weight(plain, 1)
    ways: dict[str, Product] = {
        "oneDNN": lambda x: torch.ops.mkldnn._linear_pointwise(x.to(dtype), packed, None, "none", [], "")
    }
    if dtype is torch.float32:
        ways["F.linear"] = lambda x: F.linear(x.to(dtype), plain)
    return ways


class Turns:
    """Copies of one product, used in turn."""

    def __init__(self, products: Sequence[Product]) -> None:
        self.products, self.next = products, 0

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        self.next = (self.next + 1) % len(self.products)
        return self.products[self.next](x)


def contestants(weight: torch.Tensor, name: str, torch_too: bool) -> tuple[dict[str, Turns], int]:
    """(each contestant by name, bytes of the native weights)."""
    num_bytes = native(weight, name)[1]
    copies = max(1, min(CACHE_BYTES // num_bytes, 64))
    sides = {"native": Turns([native(weight, name)[0] for _ in range(copies)])}
    if torch_too:
        ways = [torchs(weight, name) for _ in range(copies)]
        sides |= {way: Turns([each[way] for each in ways]) for way in ways[0]}
    return sides, num_bytes


# --- measuring --------------------------------------------------------------------------------------------------


def measure(sides: dict[str, Turns], x: torch.Tensor, options: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds of each round for each side, in alternation; fewer rounds where one takes long."""
    first = {name: timed(lambda side=side: side(x), 1)[0] for name, side in sides.items()}  # type: ignore[misc]
    rounds = max(2, min(options.rounds, int(options.seconds / sum(first.values()))))
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, side in sides.items():
            start = time.perf_counter()
            side(x)
            seconds[name].append(time.perf_counter() - start)
    return seconds


def summary(seconds: Sequence[float], operations: int, num_bytes: int) -> dict[str, float]:
    ordered = sorted(seconds)
    middle = statistics.median(ordered)
    return {
        "ms": middle * 1e3,
        "ms_least": ordered[0] * 1e3,
        "ms_p90": ordered[int(0.9 * (len(ordered) - 1))] * 1e3,
        "rounds": len(ordered),
        "gops": operations / middle / 1e9,
        "gbytes": num_bytes / middle / 1e9,
    }


def run_case(weight: torch.Tensor, name: str, ceilings: Ceilings, options: argparse.Namespace) -> list[dict[str, Any]]:
    sides, num_bytes = contestants(weight, name, not options.native_only)
    results = []
    for rows in options.rows:
        x = torch.randn(rows, weight.shape[1]).to(DTYPES.get(name, torch.bfloat16))
        operations = 2 * rows * weight.numel()
        found = {way: summary(s, operations, num_bytes) for way, s in measure(sides, x, options).items()}
        ours = found["native"]
        peak = max(ours["gops"] * 1e9 / ceilings.flops, ours["gbytes"] * 1e9 / ceilings.bytes)
        results.append({"format": name, "shape": list(weight.shape), "rows": rows, "peak": peak, "ways": found})
        print(row_of(results[-1]), flush=True)
    return results


def row_of(result: dict[str, Any]) -> str:
    ways = dict(result["ways"])
    ours = ways.pop("native")
    line = (
        f"{'x'.join(map(str, result['shape'])):>11} {result['format']:>16} {result['rows']:>4}  {ours['ms']:>9.3f} ms "
        f"(least {ours['ms_least']:.3f}, p90 {ours['ms_p90']:.3f}) "
        f"{ours['gbytes']:>6.2f} GB/s {ours['gops']:>6.1f} GOP/s {result['peak']:>4.0%}"
    )
    return line + "".join(
        f"  {way} {found['ms']:.3f} ms x{found['ms'] / ours['ms']:.2f}" for way, found in ways.items()
    )


def main() -> None:
    options = parse_arguments()
    torch.set_num_threads(options.threads)
    library.set_num_threads(options.threads)
    ceilings = measure_ceilings()
    print(f"{library.loaded_isa()}, {options.threads} threads: {ceilings.flops / 1e9:.0f} GFLOP/s, "
          f"{ceilings.bytes / 1e9:.1f} GB/s")  # fmt: skip
    results = []
    for shape in options.shapes:
        outputs, inputs = map(int, shape.split("x"))
        weight = torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(0)) * 0.02
        for name in options.formats:
            results += run_case(weight, name, ceilings, options)
    if not options.no_save:
        save(options, ceilings, results)


def save(options: argparse.Namespace, ceilings: Ceilings, results: list[dict[str, Any]]) -> None:
    path = RESULTS / f"cpu_linear-{datetime.now(UTC):%Y%m%d-%H%M%S}.json"
    content = {
        "environment": collect_environment(), "isa": library.loaded_isa(), "threads": options.threads,
        "ceilings_before": asdict(ceilings), "ceilings_after": asdict(measure_ceilings()), "results": results,
    }  # fmt: skip
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {path.relative_to(RESULTS.parent.parent)}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=SHAPES, metavar="OUTPUTSxINPUTS")
    parser.add_argument("--rows", nargs="+", type=int, default=ROWS)
    parser.add_argument("--formats", nargs="+", default=(*DTYPES, *FORMATS), choices=(*DTYPES, *FORMATS))
    parser.add_argument("--rounds", type=int, default=15, help="turns of each side, at most")
    parser.add_argument(
        "--seconds", type=float, default=0.6, help="for each number of rows; long products get 2 rounds"
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--native-only", action="store_true", help="leave torch out")
    parser.add_argument("--no-save", action="store_true")
    return parser.parse_args()


if __name__ == "__main__":
    main()
