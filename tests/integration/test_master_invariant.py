"""The master invariant: no way of serving a request changes its tokens.

In float32, on a model that reads its cache and whose unwritten slots hold NaN, every job's tokens equal those it
gets alone, in one piece, in a roomy engine without prefix cache: for any token budget, chunk threshold, block size,
pool size, state of the prefix cache, order of arrival, neighbours and physical placement. Then each of these is
broken on purpose, and the same comparison must fail.
"""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mini_vllm.attention.native import NativeBackend
from mini_vllm.attention.torch_ref import TorchRefBackend
from mini_vllm.config import PreemptionPolicy, SchedulingPolicy
from mini_vllm.core import block_pool
from mini_vllm.core.kv_cache_manager import KVCacheManager
from mini_vllm.core.scheduler import Scheduler
from mini_vllm.engine.core import EngineCore
from mini_vllm.ops.cpu import library
from mini_vllm.request import Request
from mini_vllm.sampling import philox
from mini_vllm.worker.sampling_stage import NO_TOKEN_MESSAGE
from tests.checkpoints import make_checkpoint
from tests.integration.rig import VOCAB_SIZE, Job, Rig, greedy, mixed_jobs, run, tokens

JOBS = mixed_jobs()
LONGEST = max(len(job.prompt) + (job.params.max_tokens or 0) for job in JOBS)
BLOCK_SIZES = (1, 8, 16, 32)


def tight_pool(block_size: int) -> int:
    """Blocks for the longest job and half of another: whoever is admitted last will have to give way."""
    return 1 + -(-LONGEST * 3 // 2 // block_size)


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory, load_once: None) -> Rig:
    """Engines around a small Llama."""
    folder = tmp_path_factory.mktemp("llama")
    return Rig(make_checkpoint(folder, "llama", seed=3, tokenizer=False, vocab_size=VOCAB_SIZE))


@pytest.fixture(scope="module")
def windowed_rig(tmp_path_factory: pytest.TempPathFactory, load_once: None) -> Rig:
    """Engines around a small Qwen2 whose second layer sees 24 tokens only, fewer than most prompts have."""
    window = {"use_sliding_window": True, "sliding_window": 24, "max_window_layers": 1}
    folder = tmp_path_factory.mktemp("qwen2")
    return Rig(
        make_checkpoint(folder, "qwen2", seed=4, tokenizer=False, vocab_size=VOCAB_SIZE, config_overrides=window)
    )


def alone(rig: Rig) -> list[list[int]]:
    """What each job gets alone, in one piece, without prefix cache."""
    return [run(rig.engine(caching=False), [job]).tokens[0] for job in JOBS]


@pytest.fixture(scope="module")
def reference(rig: Rig) -> list[list[int]]:
    return alone(rig)


@pytest.fixture(scope="module")
def windowed_reference(windowed_rig: Rig) -> list[list[int]]:
    return alone(windowed_rig)


# --- the invariant, one dimension at a time -------------------------------------------------------------------


def test_the_reference_is_worth_comparing_with(rig: Rig, reference: list[list[int]]) -> None:
    """The model reads its cache (the first of 39 tokens decides), and neither repeats itself nor others."""
    first, *rest = JOBS[0].prompt
    other = Job(((first + 1) % VOCAB_SIZE, *rest), JOBS[0].params)
    assert run(rig.engine(), [other]).tokens[0] != reference[0]
    assert [len(ids) for ids in reference] == [job.params.max_tokens for job in JOBS]
    assert len({tuple(ids) for ids in reference}) == len(JOBS)
    assert all(len(set(ids)) > 3 for ids in reference)


@pytest.mark.parametrize("budget", [1, 3, 17, 64, 2048])
def test_any_token_budget_gives_the_same_tokens(rig: Rig, reference: list[list[int]], budget: int) -> None:
    assert run(rig.engine(budget=budget), JOBS).tokens == reference


@pytest.mark.parametrize("threshold", [1, 5, 16])
def test_any_prefill_threshold_gives_the_same_tokens(rig: Rig, reference: list[list[int]], threshold: int) -> None:
    assert run(rig.engine(threshold=threshold, caching=False), JOBS).tokens == reference


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_any_block_size_gives_the_same_tokens(rig: Rig, reference: list[list[int]], block_size: int) -> None:
    assert run(rig.engine(block_size=block_size, num_blocks=400), JOBS).tokens == reference


@pytest.mark.parametrize("caching", [False, True])
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_a_pool_that_forces_preemptions_gives_the_same_tokens(
    rig: Rig, reference: list[list[int]], block_size: int, caching: bool
) -> None:
    engine = rig.engine(block_size=block_size, num_blocks=tight_pool(block_size), caching=caching, budget=40)
    outcome = run(engine, JOBS)
    assert outcome.num_preemptions > 0
    assert outcome.tokens == reference


@pytest.mark.parametrize("preemption_policy", ["latest", "least-work"])
@pytest.mark.parametrize("policy", ["fcfs", "priority", "fair"])
def test_whoever_goes_first_and_whoever_gives_way_the_tokens_are_the_same(
    rig: Rig, reference: list[list[int]], policy: SchedulingPolicy, preemption_policy: PreemptionPolicy
) -> None:
    engine = rig.engine(
        block_size=8, num_blocks=tight_pool(8), budget=40, policy=policy, preemption_policy=preemption_policy
    )
    outcome = run(engine, JOBS, arrive_every=1)
    assert outcome.num_preemptions > 0
    assert outcome.tokens == reference


def test_another_victim_that_keeps_its_old_row_is_noticed(
    rig: Rig, reference: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Broken control: who gave way under fair and least-work goes on as if its blocks were still its own."""
    computed: dict[str, int] = {}
    preempt, find = Scheduler._to_waiting, KVCacheManager.get_computed_blocks

    def forgetful(self: Scheduler, request: Request) -> None:
        computed[request.request_id] = request.num_computed_tokens
        preempt(self, request)

    def never_left(self: KVCacheManager, request: Request) -> tuple[Any, int]:
        hits, num_cached = find(self, request)
        return hits, computed.get(request.request_id, num_cached)

    monkeypatch.setattr(Scheduler, "_to_waiting", forgetful)
    monkeypatch.setattr(KVCacheManager, "get_computed_blocks", never_left)
    engine = rig.engine(
        block_size=8, num_blocks=tight_pool(8), budget=40, policy="fair", preemption_policy="least-work", caching=False
    )
    outcome = run(engine, JOBS, arrive_every=1)
    assert outcome.num_preemptions > 0
    assert outcome.tokens != reference


@pytest.mark.parametrize("same_step_sharing", [False, True])
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_a_cold_and_a_warm_prefix_cache_give_the_same_tokens(
    rig: Rig, reference: list[list[int]], block_size: int, same_step_sharing: bool
) -> None:
    engine = rig.engine(block_size=block_size, num_blocks=400, same_step_sharing=same_step_sharing)
    cold = run(engine, JOBS)
    warm = run(engine, JOBS)
    assert cold.tokens == warm.tokens == reference
    assert (sum(cold.cached_tokens) > 0) == same_step_sharing  # all were admitted in one step
    assert warm.cached_tokens == [(len(job.prompt) - 1) // block_size * block_size for job in JOBS]


def test_a_prefix_cache_that_evicts_all_the_time_gives_the_same_tokens(rig: Rig, reference: list[list[int]]) -> None:
    engine = rig.engine(block_size=8, num_blocks=tight_pool(8), max_num_seqs=2)
    for _ in range(3):
        assert run(engine, JOBS).tokens == reference


@pytest.mark.parametrize("arrive_every", [0, 1, 3])
@pytest.mark.parametrize("seed", [0, 1])
def test_any_order_of_arrival_gives_the_same_tokens(
    rig: Rig, reference: list[list[int]], seed: int, arrive_every: int
) -> None:
    order = random.Random(seed).sample(range(len(JOBS)), len(JOBS))
    assert run(rig.engine(budget=48), JOBS, order=order, arrive_every=arrive_every).tokens == reference


@pytest.mark.parametrize("max_num_seqs", [1, 2, 5])
def test_any_neighbours_give_the_same_tokens(rig: Rig, reference: list[list[int]], max_num_seqs: int) -> None:
    rng = random.Random(max_num_seqs)
    strangers = [Job(tokens(rng, rng.randrange(1, 60)), greedy(rng.randrange(1, 20))) for _ in range(6)]
    order = rng.sample(range(len(JOBS) + len(strangers)), len(JOBS) + len(strangers))
    outcome = run(rig.engine(max_num_seqs=max_num_seqs, budget=64), [*JOBS, *strangers], order=order)
    assert outcome.tokens[: len(JOBS)] == reference


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_any_physical_placement_gives_the_same_tokens(rig: Rig, reference: list[list[int]], block_size: int) -> None:
    for seed in range(2):
        engine = rig.engine(block_size=block_size, num_blocks=400, shuffle=seed)
        assert run(engine, JOBS).tokens == reference


def test_an_abort_of_neighbours_gives_the_same_tokens(rig: Rig, reference: list[list[int]]) -> None:
    rng = random.Random(5)
    doomed = [Job(tokens(rng, 20 + 9 * i), greedy(30)) for i in range(4)]

    def abort_one(engine: EngineCore) -> None:
        alive = [str(len(JOBS) + i) for i in range(len(doomed)) if str(len(JOBS) + i) in engine.scheduler.requests]
        if alive and rng.random() < 0.4:
            engine.abort_requests([rng.choice(alive)])

    outcome = run(rig.engine(budget=24, num_blocks=30), [*JOBS, *doomed], arrive_every=1, each_step=abort_one)
    assert outcome.tokens[: len(JOBS)] == reference


# --- all dimensions at once -----------------------------------------------------------------------------------

SHAPES = st.fixed_dictionaries(
    {
        "block_size": st.sampled_from(BLOCK_SIZES),
        "budget": st.integers(1, 120),
        "threshold": st.integers(0, 40),
        "max_num_seqs": st.integers(1, 8),
        "caching": st.booleans(),
        "same_step_sharing": st.booleans(),
        "shuffle": st.integers(0, 1000),
        "policy": st.sampled_from(["fcfs", "priority", "fair"]),
        "preemption_policy": st.sampled_from(["latest", "least-work"]),
    }
)


def check_combination(
    rig: Rig, reference: list[list[int]], shape: dict[str, Any], spare: int, order: list[int], every: int
) -> None:
    """Cold, then warm, in a pool that holds the longest job and `spare` tokens more."""
    num_blocks = 1 + -(-(LONGEST + spare) // shape["block_size"])
    engine = rig.engine(num_blocks=num_blocks, **shape)
    assert run(engine, JOBS, order=order, arrive_every=every).tokens == reference
    assert run(engine, JOBS).tokens == reference


COMBINATION = given(
    shape=SHAPES, spare=st.integers(0, 60), order=st.permutations(range(len(JOBS))), every=st.integers(0, 4)
)


@settings(max_examples=20)
@COMBINATION
def test_any_combination_gives_the_same_tokens(rig: Rig, reference: list[list[int]], **case: Any) -> None:
    check_combination(rig, reference, **case)


@settings(max_examples=10)
@COMBINATION
def test_any_combination_gives_the_same_tokens_with_a_sliding_window(
    windowed_rig: Rig, windowed_reference: list[list[int]], **case: Any
) -> None:
    check_combination(windowed_rig, windowed_reference, **case)


@pytest.mark.parametrize("windowed", [False, True])
@pytest.mark.parametrize("backend", ["CPU_NATIVE", "TORCH_REF"])
def test_every_attention_backend_gives_the_same_tokens(
    backend: str, windowed: bool, rig: Rig, windowed_rig: Rig,
    reference: list[list[int]], windowed_reference: list[list[int]],
) -> None:  # fmt: skip
    """Whichever backend the platform chose for the references, under chunks, preemption and a scattered table."""
    if backend == "CPU_NATIVE" and not library.available():
        pytest.skip("no native kernels here")
    chosen = Rig((windowed_rig if windowed else rig).folder, attention_backend=backend)
    engine = chosen.engine(block_size=8, num_blocks=tight_pool(8), budget=40, threshold=16, shuffle=1)
    assert {layer.backend.name for layer in engine.executor.runner.layers.values()} == {backend}  # type: ignore[attr-defined]
    expected = windowed_reference if windowed else reference
    assert run(engine, JOBS, arrive_every=2).tokens == expected
    assert run(engine, JOBS).tokens == expected


def test_the_window_of_the_windowed_model_matters(windowed_reference: list[list[int]], tmp_path: Path) -> None:
    """The same weights without a window give other tokens, but only to prompts longer than it."""
    make_checkpoint(tmp_path, "qwen2", seed=4, tokenizer=False, vocab_size=VOCAB_SIZE)
    without = alone(Rig(tmp_path))
    same = [ids == expected for ids, expected in zip(without, windowed_reference, strict=True)]
    assert same[1]  # a prompt of one token never outgrows the window
    assert not any(matches for matches, job in zip(same, JOBS, strict=True) if len(job.prompt) > 30)


# --- broken controls: the comparison fails when the thing is broken -------------------------------------------


def patch_forward(patch: pytest.MonkeyPatch, engine: EngineCore, change: Callable[..., torch.Tensor]) -> None:
    """Let `change(positions, step number)` replace the positions that the model sees."""
    model = engine.executor.runner.model  # type: ignore[attr-defined]
    forward, calls = model.forward, iter(range(10**9))

    def changed(input_ids: torch.Tensor, positions: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return forward(input_ids, change(positions, next(calls)), *args, **kwargs)

    patch.setattr(model, "forward", changed)


def patch_metadata(patch: pytest.MonkeyPatch, change: Callable[[Any], None]) -> None:
    """Let `change` tamper with the common attention metadata of every step."""
    for backend in (NativeBackend, TorchRefBackend):
        patch_builder(patch, backend.builder_cls, change)


def patch_builder(patch: pytest.MonkeyPatch, builder_cls: Any, change: Callable[[Any], None]) -> None:
    build = builder_cls.build

    def changed(self: Any, common: Any) -> Any:
        change(common)
        return build(self, common)

    patch.setattr(builder_cls, "build", changed)


def test_the_check_sees_chunks_computed_at_wrong_positions(
    rig: Rig, reference: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = rig.engine(budget=2048, threshold=16, caching=False, enforce_eager=True)
    patch_forward(monkeypatch, engine, lambda positions, step: positions % 16 if step == 1 else positions)
    outcome = run(engine, JOBS)
    assert outcome.tokens != reference
    assert outcome.tokens[1] == reference[1]  # the one-token prompt had no second chunk


def test_the_check_sees_a_preempted_request_that_is_not_recomputed(
    rig: Rig, reference: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    look_up = KVCacheManager.get_computed_blocks

    def pretend(self: KVCacheManager, request: Request) -> Any:
        if request.num_preemptions:
            return ([],), request.num_tokens - 1
        return look_up(self, request)

    monkeypatch.setattr(KVCacheManager, "get_computed_blocks", pretend)
    outcome = run(rig.engine(block_size=8, num_blocks=tight_pool(8), caching=False, budget=40), JOBS)
    assert outcome.num_preemptions > 0
    assert outcome.tokens != reference


def test_the_check_sees_block_table_rows_that_belong_to_a_neighbour(
    rig: Rig, reference: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def shift(common: Any) -> None:
        common.block_table = common.block_table.roll(1, 0)
        common.block_table_cpu = np.roll(common.block_table_cpu, 1, 0)

    patch_metadata(monkeypatch, shift)
    assert run(rig.engine(), JOBS).tokens != reference


def test_the_check_sees_a_slot_mapping_that_is_off_by_one(
    rig: Rig, reference: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def shift(common: Any) -> None:
        common.slot_mapping = common.slot_mapping + 1

    patch_metadata(monkeypatch, shift)
    assert run(rig.engine(num_blocks=400), JOBS).tokens != reference


def test_the_check_sees_blocks_taken_for_neighbours_in_memory(
    rig: Rig, reference: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A table read as first block plus offset is right by luck in a fresh pool, and wrong in a shuffled one."""

    def contiguous(common: Any) -> None:
        steps = np.arange(common.block_table_cpu.shape[1], dtype=np.int32)
        common.block_table_cpu = np.minimum(common.block_table_cpu[:, :1] + steps, 399)
        common.block_table = torch.from_numpy(common.block_table_cpu)

    patch_metadata(monkeypatch, contiguous)
    longest = max(range(len(JOBS)), key=lambda index: len(JOBS[index].prompt))
    assert run(rig.engine(num_blocks=400), [JOBS[longest]]).tokens == [reference[longest]]
    assert run(rig.engine(num_blocks=400, shuffle=0), [JOBS[longest]]).tokens != [reference[longest]]


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_the_check_sees_one_unwritten_slot_being_read(
    rig: Rig, reference: list[list[int]], monkeypatch: pytest.MonkeyPatch, block_size: int
) -> None:
    """The slot behind the last token: NaN, so the request fails rather than being slightly wrong."""

    def read_further(common: Any) -> None:
        common.block_table_cpu = np.pad(common.block_table_cpu, ((0, 0), (0, 1)))
        common.block_table = torch.from_numpy(common.block_table_cpu)
        common.seq_lens = common.seq_lens + 1
        common.seq_lens_cpu = common.seq_lens_cpu + 1
        common.max_seq_len += 1

    patch_metadata(monkeypatch, read_further)
    outcome = run(rig.engine(block_size=block_size, num_blocks=400, caching=False), JOBS)
    assert outcome.tokens != reference
    assert len(outcome.errors) == len(JOBS)
    assert all(NO_TOKEN_MESSAGE in message for message in outcome.errors.values())


def test_the_check_sees_a_prefix_hash_that_ignores_what_came_before(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two blocks in the other order are found under parentless hashes, with keys rotated for other positions."""
    rng = random.Random(11)
    left, right = tokens(rng, 16), tokens(rng, 16)
    jobs = [Job((*left, *right, 5), greedy()), Job((*right, *left, 5), greedy())]
    expected = [run(rig.engine(), [job]).tokens[0] for job in jobs]
    assert run(rig.engine(max_num_seqs=1), jobs).tokens == expected

    chained = block_pool.hash_block_tokens
    monkeypatch.setattr(block_pool, "hash_block_tokens", lambda parent, ids, extra=b"": chained(None, ids, extra))
    outcome = run(rig.engine(max_num_seqs=1), jobs)
    assert sum(outcome.cached_tokens) > 0
    assert outcome.tokens != expected


@pytest.mark.broken_pool
def test_the_check_sees_a_stale_hash_on_a_reused_block(
    rig: Rig, reference: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A block handed out again while it is still findable under what it held before."""
    engine = rig.engine(block_size=8, num_blocks=tight_pool(8), max_num_seqs=2)
    monkeypatch.setattr(block_pool.BlockPool, "uncache", lambda self, block: None)
    wrong = False
    for _ in range(3):
        wrong = wrong or tokens_or_crash(engine) != reference
    assert wrong


def tokens_or_crash(engine: EngineCore) -> list[list[int]] | None:
    try:
        return run(engine, JOBS).tokens
    except (AssertionError, RuntimeError, KeyError, ValueError):
        return None


def test_the_check_sees_logits_that_belong_to_a_neighbour(
    rig: Rig, reference: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = rig.engine(enforce_eager=True)
    model = engine.executor.runner.model  # type: ignore[attr-defined]
    compute = model.compute_logits
    monkeypatch.setattr(model, "compute_logits", lambda hidden, *args: compute(hidden, *args).flip(0))
    assert run(engine, JOBS).tokens != reference


def test_the_check_sees_random_numbers_that_depend_on_the_row(
    rig: Rig, reference: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    uniform = philox.uniform
    monkeypatch.setattr(
        philox, "uniform", lambda seed, draw: uniform(seed + np.arange(len(seed), dtype=np.uint64), draw)
    )
    outcome = run(rig.engine(), JOBS)
    seeded = [i for i, job in enumerate(JOBS) if job.params.seed is not None]
    assert [outcome.tokens[i] for i in seeded] != [reference[i] for i in seeded]
    for index in set(range(len(JOBS))) - set(seeded):
        assert outcome.tokens[index] == reference[index]


def test_the_check_sees_a_chunk_that_was_skipped(
    rig: Rig, reference: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The counter advances twice as far as the tokens that were computed."""
    commit, skipped = Scheduler._commit, []

    def leap(self: Scheduler, request: Request, num_new: int, plan: Any) -> None:
        commit(self, request, num_new, plan)
        if not skipped and request.num_computed_tokens + 8 < request.num_tokens:
            skipped.append(request.request_id)
            request.num_computed_tokens += 8

    monkeypatch.setattr(Scheduler, "_commit", leap)
    outcome = run(rig.engine(budget=24, caching=False), JOBS)
    assert skipped and outcome.tokens != reference
