"""Ceilings: sizes of buffers and caches, and a quick measurement that is sane."""

from pathlib import Path

import pytest
import torch

from mini_vllm.bench import ceilings
from mini_vllm.bench.ceilings import (
    MIB,
    Ceilings,
    GemmRate,
    ReadRate,
    dram_buffer_bytes,
    last_level_cache_bytes,
    parse_cache_size,
)


def fake_cache(root: Path, cpu: int, index: int, level: int, size: str, shared: str) -> None:
    folder = root / f"cpu{cpu}" / "cache" / f"index{index}"
    folder.mkdir(parents=True)
    for name, text in (("level", str(level)), ("size", size), ("shared_cpu_list", shared)):
        (folder / name).write_text(text + "\n")


def test_the_last_level_cache_is_counted_once_for_the_cpus_that_share_it(tmp_path: Path) -> None:
    for cpu in range(4):
        fake_cache(tmp_path, cpu, 2, 2, "1024K", str(cpu))
        fake_cache(tmp_path, cpu, 3, 3, "32M", "0-1" if cpu < 2 else "2-3")
    assert last_level_cache_bytes(tmp_path, [0, 1]) == 32 * MIB
    assert last_level_cache_bytes(tmp_path, [0, 1, 2, 3]) == 64 * MIB
    assert last_level_cache_bytes(tmp_path, [9]) == ceilings._FALLBACK_CACHE_BYTES


def test_cache_sizes_are_read_with_their_units() -> None:
    assert [parse_cache_size(text) for text in ("32768K\n", "2M", "1G", "512")] == [2**25, 2**21, 2**30, 512]


def test_the_buffer_is_far_larger_than_the_cache_but_leaves_memory_free() -> None:
    assert dram_buffer_bytes(8 * MIB, 2**36) == 256 * MIB
    assert dram_buffer_bytes(64 * MIB, 2**36) == 512 * MIB
    assert dram_buffer_bytes(2**30, 2**36) == 2048 * MIB
    assert dram_buffer_bytes(32 * MIB, 400 * MIB) == 100 * MIB
    assert dram_buffer_bytes(0, 2**36) == 2048 * MIB


def make(memory: float, resident: float | None) -> Ceilings:
    working_set = None if resident is None else ReadRate(resident, 8 * MIB, "sum")
    return Ceilings("cpu", 1, 32 * MIB, ReadRate(memory, 256 * MIB, "sum"), working_set, GemmRate(1.0, "f", 1), None)


def test_the_binding_read_rate_is_the_caches_only_for_what_fits_it() -> None:
    assert (make(40.0, None).read_gb_s, make(40.0, None).read_source) == (40.0, "memory")
    assert (make(40.0, 190.0).read_gb_s, make(40.0, 190.0).read_source) == (190.0, "cache")
    assert (make(40.0, 39.0).read_gb_s, make(40.0, 39.0).read_source) == (40.0, "memory")


def test_every_reader_reads_the_whole_buffer_once() -> None:
    """Each result depends on the first and the last element, and has the value that one pass gives."""
    buffer = torch.ones(3 * 4096)
    buffer[0], buffer[-1] = 5.0, 7.0
    results = {name: run() for name, run in ceilings._readers(buffer)}
    assert results["sum"] == 3 * 4096 - 2 + 12
    assert results["dot"] == 3 * 4096 - 2 + 25 + 49
    assert results["max"] == 7.0
    assert results["matrix-vector"] == 4096 - 1 + 5  # its first row


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Milliseconds instead of a second: for the shape of the answer, not for its value."""
    monkeypatch.setattr(ceilings, "_SECONDS_PER_KERNEL", 0.002)
    monkeypatch.setattr(ceilings, "_MIN_DRAM_BUFFER", 16 * MIB)
    monkeypatch.setattr(ceilings, "_MAX_DRAM_BUFFER", 16 * MIB)
    monkeypatch.setattr(ceilings, "_GEMM_SIZES", (64, 128))
    ceilings.read_rate.cache_clear()
    ceilings.gemm_rate.cache_clear()


def test_a_measurement_answers_and_is_not_made_twice(quick: None) -> None:
    state = torch.get_rng_state()
    first = ceilings.measure_ceilings("float32", 10**12)
    assert 0.01 < first.memory.gb_s < 10_000 and first.memory.buffer_bytes == 16 * MIB
    assert 0.01 < first.gemm.gflop_s < 10**6 and first.gemm.size in (64, 128)
    assert first.working_set is None and first.read_source == "memory"
    again = ceilings.measure_ceilings("float32", 10**12)
    assert (again.memory, again.gemm) == (first.memory, first.gemm)
    assert torch.equal(torch.get_rng_state(), state), "the caller's random numbers were shifted"


def test_a_small_working_set_is_measured_over_a_buffer_of_its_size(
    quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ceilings, "last_level_cache_bytes", lambda: 8 * MIB)
    found = ceilings.measure_ceilings("float32", 3 * MIB + 1)
    assert found.working_set is not None and found.working_set.buffer_bytes == 4 * MIB
    assert set(found.as_dict()) >= {"read_gb_s", "read_source", "memory", "working_set", "gemm", "threads"}


def test_numbers_that_kernels_widen_have_the_ceiling_of_what_they_are_widened_to(
    quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates = {"bfloat16": 5.0, "float32": 90.0}
    monkeypatch.setattr(ceilings, "_square_products", lambda dtype: GemmRate(rates[dtype], dtype, 64))
    assert ceilings.gemm_rate("bfloat16", 1) == GemmRate(90.0, "float32", 64)
    ceilings.gemm_rate.cache_clear()
    rates["bfloat16"] = 300.0  # a CPU with instructions for it
    assert ceilings.gemm_rate("bfloat16", 1) == GemmRate(300.0, "bfloat16", 64)
    ceilings.gemm_rate.cache_clear()
