"""The flat token batch, against the plainest way to compute it."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mini_vllm.core.scheduler_output import NewRequestData, SchedulerOutput
from mini_vllm.platforms import CpuPlatform
from mini_vllm.sampling_params import SamplingParams
from mini_vllm.worker.input_batch import InputBatch
from mini_vllm.worker.prepare_inputs import InputPreparer, StepInputs, last_token_indices

MAX_SEQS, MAX_LEN = 6, 40
BLOCK_SIZES = (4, 7)


@st.composite
def steps(draw: st.DrawFn) -> tuple[InputBatch, SchedulerOutput]:
    """Some requests with random progress, and a plan for some of them in any order."""
    batch = InputBatch(MAX_SEQS, MAX_LEN, BLOCK_SIZES, CpuPlatform())
    plan = SchedulerOutput()
    next_block = 1
    pure_decode = draw(st.booleans())
    for number in range(draw(st.integers(1, MAX_SEQS))):
        known = draw(st.integers(1, MAX_LEN))
        computed = known - 1 if pure_decode else draw(st.integers(0, known - 1))
        blocks: tuple[list[int], ...] = ()
        for size in BLOCK_SIZES:
            count = -(-known // size)
            blocks += (list(range(next_block, next_block + count)),)
            next_block += count
        tokens = [100 * number + i for i in range(known)]
        batch.add_row(NewRequestData(f"r{number}", tokens, known, SamplingParams(), blocks, computed), seed=0)
    chosen = draw(st.permutations(batch.req_ids))
    for req_id in chosen[: draw(st.integers(1, len(chosen)))]:
        row = batch.row_of[req_id]
        left = int(batch.num_tokens[row] - batch.num_computed_tokens[row])
        plan.num_scheduled_tokens[req_id] = draw(st.integers(1, left))
    plan.total_num_scheduled_tokens = sum(plan.num_scheduled_tokens.values())
    return batch, plan


def check(batch: InputBatch, plan: SchedulerOutput, inputs: StepInputs) -> None:
    """Every number of the step, one token at a time."""
    assert sorted(inputs.req_ids) == sorted(plan.num_scheduled_tokens)
    start = 0
    wanted_logits, sampling_rows = [], []
    for index, req_id in enumerate(inputs.req_ids):
        row, count = batch.row_of[req_id], plan.num_scheduled_tokens[req_id]
        first = int(batch.num_computed_tokens[row])
        last = first + count
        assert inputs.input_ids[start : start + count].tolist() == batch.token_ids[row, first:last].tolist()
        assert inputs.positions[start : start + count].tolist() == list(range(first, last))
        samples = last == batch.num_tokens[row]
        assert inputs.num_logits[index] == samples
        if samples:
            wanted_logits.append(start + count - 1)
            sampling_rows.append(row)
        for table, common in zip(batch.block_tables, inputs.attention, strict=True):
            size = table.block_size
            slots = [int(table.np[row, p // size]) * size + p % size for p in range(first, last)]
            assert common.slot_mapping[start : start + count].tolist() == slots
            assert common.query_start_loc[index : index + 2].tolist() == [start, start + count]
            assert common.seq_lens[index] == last
            own = -(-last // size)
            assert common.block_table[index, :own].tolist() == table.np[row, :own].tolist()
        start += count
    indices = list(range(start)) if inputs.logits_indices is None else inputs.logits_indices.tolist()
    assert indices == wanted_logits
    assert np.arange(MAX_SEQS)[inputs.sampling_rows].tolist() == sampling_rows
    assert len(inputs.input_ids) == len(inputs.positions) == start
    check_metadata(plan, inputs)


def check_metadata(plan: SchedulerOutput, inputs: StepInputs) -> None:
    for common in inputs.attention:
        assert common.num_actual_tokens == len(common.slot_mapping) == plan.total_num_scheduled_tokens
        assert common.num_reqs == len(common.seq_lens) == len(common.block_table) == len(inputs.req_ids)
        assert common.max_query_len == max(plan.num_scheduled_tokens.values())
        assert common.max_seq_len == common.seq_lens.max()
        for name in ("query_start_loc", "seq_lens", "block_table"):
            assert getattr(common, name).tolist() == getattr(common, f"{name}_cpu").tolist()


@given(steps())
def test_every_token_has_its_id_position_and_slot(step: tuple[InputBatch, SchedulerOutput]) -> None:
    batch, plan = step
    check(batch, plan, InputPreparer(batch, MAX_SEQS * MAX_LEN, CpuPlatform()).prepare(plan))


@given(steps(), steps())
def test_buffers_of_an_earlier_step_leave_no_trace(
    one: tuple[InputBatch, SchedulerOutput], two: tuple[InputBatch, SchedulerOutput]
) -> None:
    batch, plan = one
    preparer = InputPreparer(batch, MAX_SEQS * MAX_LEN, CpuPlatform())
    for buffer in (preparer.input_ids, preparer.positions, preparer.seq_lens, *preparer.slot_mappings):
        buffer.np[:] = 999
    preparer.prepare(plan)
    check(batch, plan, preparer.prepare(plan))


def small_step(counts: dict[str, int]) -> tuple[InputBatch, SchedulerOutput]:
    batch = InputBatch(MAX_SEQS, MAX_LEN, (4,), CpuPlatform())
    for number, req_id in enumerate(counts):
        data = NewRequestData(req_id, [1, 2, 3, 4], 4, SamplingParams(), ([number + 1],), 4 - counts[req_id])
        batch.add_row(data, seed=0)
    return batch, SchedulerOutput(num_scheduled_tokens=counts, total_num_scheduled_tokens=sum(counts.values()))


def test_the_check_notices_a_shifted_slot() -> None:
    """Broken control."""
    batch, plan = small_step({"a": 1, "b": 3})
    inputs = InputPreparer(batch, 64, CpuPlatform()).prepare(plan)
    check(batch, plan, inputs)
    inputs.attention[0].slot_mapping[1] += 1
    with pytest.raises(AssertionError):
        check(batch, plan, inputs)


def test_a_step_reuses_the_buffers_of_the_one_before() -> None:
    batch, plan = small_step({"a": 1, "b": 1})
    preparer = InputPreparer(batch, 64, CpuPlatform())
    first, second = preparer.prepare(plan), preparer.prepare(plan)
    for name in ("input_ids", "positions"):
        assert getattr(first, name).data_ptr() == getattr(second, name).data_ptr()
    assert first.attention[0].slot_mapping.data_ptr() == second.attention[0].slot_mapping.data_ptr()
    assert first.attention[0].block_table.data_ptr() == batch.block_tables[0].buffer.host.data_ptr()


def grow(batch: InputBatch, next_block: int) -> int:
    """One sampled token more for every row, computed up to it, in new blocks where it needs them."""
    for row in range(batch.num_rows):
        batch.append_tokens(row, [int(1000 * row + batch.num_tokens[row])])
        batch.num_computed_tokens[row] = batch.num_tokens[row] - 1
        for table in batch.block_tables:
            if -(-int(batch.num_tokens[row]) // table.block_size) > table.num_blocks[row]:
                table.append(row, [next_block])
                next_block += 1
    return next_block


def decode_plan(batch: InputBatch) -> SchedulerOutput:
    return SchedulerOutput(
        num_scheduled_tokens=dict.fromkeys(batch.req_ids, 1), total_num_scheduled_tokens=batch.num_rows
    )


def test_decoding_on_is_prepared_from_the_step_before() -> None:
    """Through blocks that fill up, wider tables, a row that leaves and another that moves into its place."""
    batch, plan = small_step({"a": 2, "b": 4, "c": 1})
    preparer, next_block, kept = InputPreparer(batch, 64, CpuPlatform()), 10, 0
    check(batch, plan, preparer.prepare(plan))
    before = None
    for step in range(20):
        next_block = grow(batch, next_block)
        if step == 9:
            batch.remove_row("a")
        plan = decode_plan(batch)
        inputs = preparer.prepare(plan)
        check(batch, plan, inputs)
        kept += inputs is before
        before = inputs
    assert kept == 20 - 1 - len({8, 12, 16, 20}) - 1  # the first, wider tables, the row that left


def test_decoding_on_notices_a_token_of_a_prompt_that_does_not_sample() -> None:
    batch, _ = small_step({"a": 1, "b": 1})
    preparer, plan = InputPreparer(batch, 64, CpuPlatform()), decode_plan(batch)
    preparer.prepare(plan)
    batch.append_tokens(1, [7, 8])
    batch.block_tables[0].append(1, [9])
    batch.num_computed_tokens[:2] = 3, 4
    inputs = preparer.prepare(plan)
    check(batch, plan, inputs)
    assert inputs.num_samples == 1


def test_control_a_row_that_changed_unnoticed_shows() -> None:
    batch, plan = small_step({"a": 1, "b": 1, "c": 1})
    preparer = InputPreparer(batch, 64, CpuPlatform())
    preparer.prepare(plan)
    batch.remove_row("a")
    batch.add_row(NewRequestData("d", [5, 6, 7, 8], 4, SamplingParams(), ([9],), 3), seed=0)
    batch.num_changes -= 2
    with pytest.raises(AssertionError):
        check(batch, decode_plan(batch), preparer.prepare(decode_plan(batch)))


def test_a_request_without_a_row_is_an_error() -> None:
    batch, plan = small_step({"a": 1})
    plan.num_scheduled_tokens["ghost"] = 1
    plan.total_num_scheduled_tokens += 1
    with pytest.raises(KeyError, match="ghost"):
        InputPreparer(batch, 64, CpuPlatform()).prepare(plan)


def test_logits_of_several_last_tokens_can_be_asked_for() -> None:
    """Speculation wants the last k + 1 tokens of a request, a prompt in the middle none."""
    query_start_loc = np.array([0, 4, 5, 8, 11])
    assert last_token_indices(query_start_loc, np.array([1, 1, 1, 1])).tolist() == [3, 4, 7, 10]
    assert last_token_indices(query_start_loc, np.array([3, 0, 2, 1])).tolist() == [1, 2, 3, 6, 7, 10]
    assert last_token_indices(query_start_loc, np.zeros(4, dtype=np.int64)).tolist() == []
