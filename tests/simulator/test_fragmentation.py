"""Naive, paged and shared caches under one workload, and the example that builds the same from scratch."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mini_vllm.exceptions import ConfigError
from mini_vllm.simulator.external_fragmentation import FirstFitArena, external_fragmentation
from mini_vllm.simulator.fragmentation import (
    EngineCache,
    FragmentationOptions,
    make_workload,
    run_fragmentation,
    simulate,
)

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "paged_attention_from_scratch"
SMALL = FragmentationOptions(
    num_sequences=60, kv_cache_tokens=20_000, prompt_range=(100, 1500), output_range=(20, 200),
    shared_prefix_tokens=512, sweep_block_sizes=(4, 64), sweep_sequences=20,
)  # fmt: skip


@pytest.fixture(scope="module")
def result():
    return run_fragmentation(SMALL)


def test_rows_waste_about_half_and_blocks_almost_nothing(result):
    naive, paged = (result.timelines[mode].summary() for mode in ("naive", "paged"))
    assert naive["mean_logical_share"] < 0.65
    assert paged["mean_logical_share"] > 0.98
    assert paged["mean_running"] > 1.5 * naive["mean_running"]
    assert paged["steps"] < naive["steps"]


def test_shared_prefixes_hold_more_tokens_than_places(result):
    shared = result.timelines["shared"].summary()
    assert shared["mean_logical_share"] > 1.1 and shared["prefix_hit_rate"] > 0.2
    assert shared["mean_running"] > result.timelines["paged"].summary()["mean_running"]


def test_nothing_is_taken_beyond_the_pool_and_all_is_given_back(result):
    for timeline in result.timelines.values():
        assert timeline.used_share.max() <= 1
        assert timeline.running[-1] > 0 and timeline.waiting[-1] == 0


def test_every_paged_place_is_a_token_or_in_a_last_block(result):
    paged = result.timelines["paged"]
    empty = np.array(paged.reserved) - np.array(paged.logical)
    assert (empty >= 0).all() and (empty <= 15 * np.array(paged.running)).all()


def test_larger_blocks_waste_more_and_make_shorter_tables(result):
    small, large = result.sweep
    assert small.waste < large.waste and small.blocks_per_sequence > 10 * large.blocks_per_sequence


def test_the_same_seed_is_the_same_run(result):
    assert run_fragmentation(SMALL).as_dict() == result.as_dict()


def test_progress_is_told():
    seen = []
    run_fragmentation(SMALL, lambda mode, done, total: seen.append((mode, done, total)))
    assert {mode for mode, _, _ in seen} == {"naive", "paged", "shared"} and seen[-1] == ("shared", 60, 60)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), shared=st.booleans(), block_size=st.sampled_from([1, 3, 16]))
def test_the_pool_is_whole_after_any_run(seed, shared, block_size):
    options = FragmentationOptions(
        num_sequences=12, kv_cache_tokens=300, prompt_range=(1, 120), output_range=(1, 60), block_size=block_size,
        shared_prefix_tokens=40, seed=seed, sweep_block_sizes=(),
    )  # fmt: skip
    cache = EngineCache(options, block_size, shared)
    timeline = simulate(cache, make_workload(options), options.kv_cache_tokens)
    cache.manager.check_integrity([])
    assert cache.reserved_tokens == 0 and max(timeline.reserved) <= 300


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"arrivals_per_step": -1.0}, "arrivals_per_step: must be above 0"),
        ({"num_sequences": 0}, "num_sequences: must be at least 1"),
        ({"kv_cache_tokens": 4000}, r"kv_cache_tokens: 4,000 hold no sequence of 4,000 \+ 500 = 4,500 tokens"),
        ({"prompt_range": (10, 5)}, "prompt_range: must be 1 <= low <= high, got 10 and 5"),
        ({"kv_cache_tokens": 4512, "sweep_block_sizes": (64,)}, "in blocks of 64 hold no sequence"),
    ],
)
def test_what_cannot_be_served_is_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        FragmentationOptions(**options)


@given(st.integers(0, 10**6))
def test_holes_refuse_what_blocks_take(seed):
    found = external_fragmentation(seed)
    assert found.largest_hole < found.request <= found.free_places
    assert not found.arena_takes_it and found.pool_takes_it


def test_an_arena_knows_its_holes():
    arena = FirstFitArena(10)
    assert arena.reserve(1, 4) and arena.reserve(2, 4) and not arena.reserve(3, 3)
    arena.release(1)
    assert arena.holes() == [(0, 4), (8, 2)]
    assert arena.reserve(4, 2) and arena.taken[4] == (0, 2)


def test_the_picture_is_written_in_both_formats(result, tmp_path):
    pytest.importorskip("matplotlib")
    from mini_vllm.simulator.fragmentation_plot import plot_fragmentation

    svg, png = plot_fragmentation(result, tmp_path / "out")
    assert svg.read_text().startswith("<?xml") and png.read_bytes().startswith(b"\x89PNG")


# --- the example ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def example():
    sys.path.insert(0, str(EXAMPLE))
    try:
        modules = []
        for name in ("paged_attention", "simulate"):
            spec = importlib.util.spec_from_file_location(name, EXAMPLE / f"{name}.py")
            module = importlib.util.module_from_spec(spec)
            sys.modules[name] = module
            spec.loader.exec_module(module)
            modules.append(module)
        yield tuple(modules)
    finally:
        sys.path.remove(str(EXAMPLE))
        for name in ("paged_attention", "simulate"):
            sys.modules.pop(name, None)


def test_what_is_appended_to_blocks_is_read_back(example):
    example[0].check_reading_back(300)


def test_two_branches_from_token_100_share_blocks_0_to_5(example):
    assert example[0].check_copy_on_write() == (6, 4)


def test_more_than_two_may_share_a_block_and_the_last_to_write_keeps_it(example):
    blocks = example[0].BlockTables(20, 16)
    blocks.start(1), blocks.extend(1, 20)
    blocks.fork(1, 2), blocks.fork(1, 3)
    tail = blocks.tables[1][1]
    assert blocks.allocator.ref_counts[tail] == 3 and blocks.num_used_blocks == 2
    copies = [blocks.extend(seq, 1) for seq in (1, 2, 3)]
    assert [len(c) for c in copies] == [1, 1, 0] and blocks.tables[3][1] == tail
    assert blocks.num_used_blocks == 4


def test_an_extension_that_does_not_fit_changes_nothing(example):
    blocks = example[0].BlockTables(3, 16)
    blocks.start(1), blocks.extend(1, 20)
    blocks.fork(1, 2)
    before = (list(blocks.tables[2]), blocks.allocator.num_free, list(blocks.allocator.ref_counts))
    with pytest.raises(example[0].OutOfBlocks):
        blocks.extend(2, 20)  # one block to grow and one to copy the tail to, but only one is free
    assert before == (blocks.tables[2], blocks.allocator.num_free, blocks.allocator.ref_counts)


@pytest.mark.parametrize("shared", [False, True])
def test_the_example_agrees_with_the_engine_step_by_step(example, shared, monkeypatch):
    monkeypatch.setattr(example[1], "NUM_TOKENS", 30_000)
    cache = example[1].CheckedAgainstEngine(shared=shared)
    timeline = example[1].run(cache, example[1].make_workload(60))
    assert cache.num_compared == len(timeline.running) > 500 and timeline.preemptions > 0


def test_the_comparison_notices_a_block_that_is_not_given_back(example, monkeypatch):
    simulate_module = example[1]
    monkeypatch.setattr(simulate_module, "NUM_TOKENS", 30_000)
    cache = simulate_module.CheckedAgainstEngine()
    release, leaked = cache.blocks.allocator.release, []

    def leaky(block):
        if leaked:
            release(block)
        leaked.append(block)

    monkeypatch.setattr(cache.blocks.allocator, "release", leaky)
    with pytest.raises(AssertionError, match="free: .* the engine's"):
        simulate_module.run(cache, simulate_module.make_workload(20))


def test_the_example_and_the_library_measure_the_same(example):
    library = FragmentationOptions(sweep_block_sizes=(), num_sequences=150)
    cache = EngineCache(library, 16, shared=False)
    ours = simulate(cache, make_workload(library), library.kv_cache_tokens)
    theirs = example[1].run(example[1].Paged(), example[1].make_workload(150))
    assert ours.reserved == theirs.reserved and ours.logical == theirs.logical


def test_the_example_runs_as_its_readme_says(tmp_path):
    pytest.importorskip("matplotlib")
    done = subprocess.run(
        [sys.executable, "simulate.py", "--num-sequences", "40", "--out", str(tmp_path / "plot.png")],
        cwd=EXAMPLE, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "equal to the engine's block manager" in done.stdout and (tmp_path / "plot.png").stat().st_size > 10_000
