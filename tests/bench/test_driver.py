"""What is noted of a run: plans seen exactly, passed on untouched, and shares that follow from them."""

from concurrent.futures import Future

import pytest

from mini_vllm.bench.ceilings import Ceilings, GemmRate, ReadRate
from mini_vllm.bench.cost import ModelShape, step_cost
from mini_vllm.bench.driver import PlanMeter, StepNote, metered
from mini_vllm.bench.roofline import binding_ceiling, flat_uses, phase_of, phase_uses
from mini_vllm.core.scheduler_output import CachedRequestData, ModelRunnerOutput, NewRequestData, SchedulerOutput
from mini_vllm.sampling_params import SamplingParams
from tests.bench.test_cost import QWEN
from tests.core.harness import expected_outputs, make_engine, make_request, run_engine

CEILINGS = Ceilings("cpu", 1, 0, ReadRate(50.0, 1, "sum"), None, GemmRate(500.0, "bfloat16", 512), None)
SHAPE = ModelShape.from_config(QWEN, "bfloat16")


def make_plan(cached: dict[str, tuple[int, int]], new: dict[str, tuple[int, int]] | None = None) -> SchedulerOutput:
    """cached, new: (computed before, scheduled now) by request."""
    new = new or {}
    return SchedulerOutput(
        new_reqs=[NewRequestData(rid, [], 0, SamplingParams(), ([],), start) for rid, (start, _) in new.items()],
        cached_reqs=CachedRequestData(list(cached), [start for start, _ in cached.values()]),
        num_scheduled_tokens={rid: count for rid, (_, count) in (cached | new).items()},
    )


def test_every_token_of_a_run_is_noted_where_it_was_computed() -> None:
    """With a pool so small that requests are preempted, a budget that cuts prompts, and a shared prefix."""
    core, _ = make_engine(num_blocks=14, block_size=4, max_num_batched_tokens=9)
    prefix = list(range(8))
    requests = [make_request(f"r{i}", [*prefix, *range(20 * i, 20 * i + 7)], max_tokens=9) for i in range(4)]
    for request in requests:
        core.add_request(request)
    reached: dict[str, int] = {}
    with metered(core) as meter:
        run_engine(core)
    for note in meter.notes:
        for request_id, (start, count) in zip(note.plan.num_scheduled_tokens, note.chunks, strict=True):
            first = {new.req_id for new in note.plan.new_reqs}
            assert request_id in first or start == reached[request_id]
            reached[request_id] = start + count
    assert core.scheduler.num_preemptions > 0
    assert core.scheduler.kv.prefix_cache_hits > 0
    assert sum(note.sampled_rows for note in meter.notes) == 4 * 9
    assert reached == {request.request_id: request.num_tokens - 1 for request in requests}
    assert 0 < max(note.kv_cache_usage for note in meter.notes) <= 1


def test_the_meter_changes_no_token_and_leaves_no_trace() -> None:
    core, executor = make_engine()
    request = make_request("a", 10, max_tokens=6)
    core.add_request(request)
    with metered(core):
        run_engine(core)
    assert core.executor is executor
    assert request.output_token_ids == expected_outputs(request, 6)


def test_the_executor_is_put_back_when_the_run_fails() -> None:
    core, executor = make_engine()
    with pytest.raises(KeyboardInterrupt), metered(core):
        raise KeyboardInterrupt
    assert core.executor is executor


def test_rows_are_counted_when_the_result_comes_later() -> None:
    class Later:
        max_model_len = 8

        def execute_model(self, plan: SchedulerOutput) -> Future[ModelRunnerOutput]:
            return future

    future: Future[ModelRunnerOutput] = Future()
    meter = PlanMeter(Later(), lambda: 0.5)  # type: ignore[arg-type]
    meter.execute_model(make_plan({"a": (0, 3), "b": (4, 1)}))
    assert meter.notes[0].sampled_rows == 0
    future.set_result(ModelRunnerOutput(["a", "b"], [[], [7]]))
    assert meter.notes[0].sampled_rows == 1


def test_a_plan_that_computes_nothing_is_no_step() -> None:
    core, _ = make_engine()
    meter = PlanMeter(core.executor, lambda: 0.0)
    meter.execute_model(SchedulerOutput(finished_req_ids=["gone"]))
    assert meter.notes == []


# --- shares of the ceilings ---------------------------------------------------------------------------------


def note(cached: dict[str, tuple[int, int]], new: dict[str, tuple[int, int]], rows: int, seconds: float) -> StepNote:
    return StepNote(make_plan(cached, new), 0.0, rows, seconds)


def test_a_step_is_decode_only_if_every_request_advances_by_one() -> None:
    assert phase_of([(5, 1), (9, 1)]) == "decode"
    assert phase_of([(5, 1), (0, 2)]) == "prefill"


def test_shares_are_ideal_time_over_measured_time() -> None:
    decode = note({"a": (100, 1)}, {}, 1, 0.040)
    prefill = note({"a": (101, 1)}, {"b": (0, 511)}, 2, 1.0)
    uses = phase_uses([decode, prefill], SHAPE, CEILINGS)
    cost = step_cost(SHAPE, [(100, 1)], 1)
    assert uses["decode"].as_dict()["gb_s"] == pytest.approx(cost.num_bytes / 1e9 / 0.040)
    assert uses["decode"].as_dict()["read_share"] == pytest.approx(cost.num_bytes / 50e9 / 0.040)
    assert uses["prefill"].as_dict()["compute_share"] == pytest.approx(
        step_cost(SHAPE, [(101, 1), (0, 511)], 2).flops / 500e9
    )
    assert (uses["all"].steps, uses["all"].tokens, uses["all"].seconds) == (2, 513, pytest.approx(1.04))
    ideal = uses["decode"].read_seconds + uses["prefill"].compute_seconds
    assert uses["all"].as_dict()["roofline_share"] == pytest.approx(ideal / 1.04)


def test_reading_binds_decode_and_arithmetic_binds_prefill() -> None:
    uses = phase_uses([note({"a": (100, 1)}, {}, 1, 0.04), note({}, {"b": (0, 512)}, 1, 1.0)], SHAPE, CEILINGS)
    flat = flat_uses(uses)
    assert binding_ceiling(flat["decode_read_share"], flat["decode_compute_share"], "memory") == "memory read"
    assert binding_ceiling(flat["prefill_read_share"], flat["prefill_compute_share"], "memory") == "compute"


def test_a_phase_that_did_not_occur_has_no_rates() -> None:
    flat = flat_uses(phase_uses([note({"a": (100, 1)}, {}, 1, 0.04)], SHAPE, CEILINGS))
    assert flat["prefill_steps"] == 0 and flat["prefill_gb_s"] is None
    assert binding_ceiling(flat["prefill_read_share"], flat["prefill_compute_share"], "memory") is None
