"""The rows of the input batch: they come, go, move and grow, and always say what a plain dictionary would."""

from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from mini_vllm.core.scheduler_output import CachedRequestData, NewRequestData
from mini_vllm.platforms import CpuPlatform
from mini_vllm.sampling.metadata import seed_key
from mini_vllm.sampling.philox import uniform
from mini_vllm.sampling_params import SamplingParams
from mini_vllm.worker.input_batch import InputBatch, RowMove

MAX_SEQS, MAX_LEN, BLOCK_SIZES = 5, 24, (4, 8)


def make_batch() -> InputBatch:
    return InputBatch(MAX_SEQS, MAX_LEN, BLOCK_SIZES, CpuPlatform())


def new_request(req_id: str, token_ids: list[int], **overrides: object) -> NewRequestData:
    fields = {
        "num_prompt_tokens": len(token_ids),
        "sampling_params": SamplingParams(temperature=0.0),
        "block_ids": ([1], [1]),
        "num_computed_tokens": 0,
    }
    return NewRequestData(req_id=req_id, token_ids=token_ids, **(fields | overrides))  # type: ignore[arg-type]


def draw(seed: int, index: int) -> float:
    """Draw number `index` of a seed."""
    return float(uniform(np.array([seed_key(seed)], dtype=np.uint64), np.array([index]))[0])


@dataclass
class ModelRow:
    """What a row must hold."""

    tokens: list[int]
    prompt: int
    params: SamplingParams
    seed: int
    blocks: tuple[list[int], ...]
    computed: int


class InputBatchMachine(RuleBasedStateMachine):
    """Any order of arrivals, departures and growth, against a dictionary."""

    def __init__(self) -> None:
        super().__init__()
        self.batch = make_batch()
        self.model: dict[str, ModelRow] = {}
        self.counter = 0

    @precondition(lambda self: len(self.model) < MAX_SEQS)
    @rule(
        tokens=st.lists(st.integers(0, 999), min_size=1, max_size=16),
        temperature=st.sampled_from([0.0, 0.7]),
        seed=st.integers(-(2**63), 2**63 - 1),
        computed=st.integers(0, 10),
    )
    def add(self, tokens: list[int], temperature: float, seed: int, computed: int) -> None:
        self.counter += 1
        params = SamplingParams(
            temperature=temperature, top_k=self.counter, top_p=1 / self.counter, min_p=0.5 / self.counter
        )
        blocks = ([self.counter], [self.counter, self.counter + 1])
        row = ModelRow(tokens, len(tokens), params, seed, blocks, computed)
        req_id = f"r{self.counter}"
        data = new_request(
            req_id,
            list(tokens),
            sampling_params=params,
            block_ids=([*blocks[0]], [*blocks[1]]),
            num_computed_tokens=computed,
        )
        assert self.batch.add_row(data, seed) == len(self.model)
        self.model[req_id] = row

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        req_id = data.draw(st.sampled_from(sorted(self.model)))
        row, last = self.batch.row_of[req_id], len(self.model) - 1
        last_id = self.batch.req_ids[last]
        move = self.batch.remove_row(req_id)
        del self.model[req_id]
        assert move == (None if row == last else RowMove(last, row))
        if move is not None:
            assert self.batch.req_ids[move.destination] == last_id

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def sample(self, data: st.DataObject) -> None:
        ids = [r for r in self.batch.req_ids if len(self.model[r].tokens) < MAX_LEN]
        chosen = sorted(data.draw(st.sets(st.sampled_from(ids)))) if ids else []
        rows = np.sort(np.array([self.batch.row_of[r] for r in chosen], dtype=np.int64))
        tokens = np.array([700 + int(row) for row in rows], dtype=np.int64)
        whole = len(rows) == self.batch.num_rows
        self.batch.append_sampled(slice(0, len(rows)) if whole else rows, tokens)
        for req_id in chosen:
            self.model[req_id].tokens = [*self.model[req_id].tokens, 700 + self.batch.row_of[req_id]]

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def follow_a_plan(self, data: st.DataObject) -> None:
        ids = data.draw(st.permutations(sorted(self.model)))
        ids = ids[: data.draw(st.integers(0, len(ids)))]
        cached = CachedRequestData(req_ids=ids, num_computed_tokens=[data.draw(st.integers(0, 20)) for _ in ids])
        for req_id, computed in zip(ids, cached.num_computed_tokens, strict=True):
            row = self.model[req_id]
            row.computed = computed
            if len(row.blocks[1]) < 3:
                cached.new_block_ids[req_id] = ([5, 6], [7])
                row.blocks = ([*row.blocks[0], 5, 6], [*row.blocks[1], 7])
            if len(row.tokens) + 2 <= MAX_LEN:
                cached.new_token_ids[req_id] = [11, 12]
                row.tokens = [*row.tokens, 11, 12]
        self.batch.update(cached)

    @invariant()
    def rows_say_what_the_model_says(self) -> None:
        batch = self.batch
        assert batch.num_rows == len(self.model)
        assert sorted(batch.req_ids) == sorted(self.model)
        assert batch.num_random == sum(not row.params.is_greedy for row in self.model.values())
        for number, req_id in enumerate(batch.req_ids):
            row = self.model[req_id]
            assert batch.row_of[req_id] == number
            assert batch.token_ids[number, : batch.num_tokens[number]].tolist() == row.tokens
            assert batch.num_computed_tokens[number] == row.computed
            for table, blocks in zip(batch.block_tables, row.blocks, strict=True):
                assert table.np[number].tolist() == blocks + [0] * (table.max_blocks - len(blocks))
        self.metadata_says_what_the_model_says()

    def metadata_says_what_the_model_says(self) -> None:
        rows = [self.model[req_id] for req_id in self.batch.req_ids]
        metadata = self.batch.make_sampling_metadata(slice(0, len(rows)))
        assert self.batch.seed[: len(rows)].tolist() == [seed_key(row.seed) for row in rows]
        outputs = [len(row.tokens) - row.prompt for row in rows]
        assert self.batch.num_output_tokens(slice(0, len(rows))).tolist() == outputs
        random = np.arange(len(rows))
        assert metadata.uniforms(random).tolist() == [draw(row.seed, n) for row, n in zip(rows, outputs, strict=True)]
        assert metadata.temperature.tolist() == [np.float32(row.params.temperature) for row in rows]
        assert metadata.top_k.tolist() == [row.params.top_k for row in rows]
        assert metadata.top_p.tolist() == [row.params.top_p for row in rows]
        assert metadata.min_p.tolist() == [row.params.min_p for row in rows]
        assert metadata.all_greedy == all(row.params.is_greedy for row in rows)


TestInputBatchMachine = InputBatchMachine.TestCase


def test_the_last_row_fills_the_hole_and_the_move_is_reported() -> None:
    batch = make_batch()
    for number, req_id in enumerate("abc"):
        batch.add_row(new_request(req_id, [number] * 3), seed=number)
    assert batch.remove_row("a") == RowMove(source=2, destination=0)
    assert batch.req_ids == ["c", "b"]
    assert batch.remove_row("b") is None


def test_a_resumed_request_brings_all_its_tokens_and_keeps_counting_draws() -> None:
    batch = make_batch()
    params = SamplingParams(temperature=1.0)
    batch.add_row(new_request("a", [1, 2, 3, 8, 9], num_prompt_tokens=3, sampling_params=params), seed=4)
    assert batch.make_sampling_metadata(slice(0, 1)).uniforms(np.array([0])).tolist() == [draw(4, 2)]


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (new_request("a", [1]), "has a row already"),
        (new_request("z", list(range(MAX_LEN + 1))), f"has {MAX_LEN + 1} tokens, max_model_len is {MAX_LEN}"),
    ],
)
def test_a_row_that_cannot_be_is_refused_and_changes_nothing(request_: NewRequestData, message: str) -> None:
    batch = make_batch()
    batch.add_row(new_request("a", [1, 2]), seed=0)
    with pytest.raises(ValueError, match=message):
        batch.add_row(request_, seed=0)
    assert batch.req_ids == ["a"]
    assert batch.num_tokens[0] == 2


def test_more_rows_than_max_num_seqs_are_refused() -> None:
    batch = make_batch()
    for number in range(MAX_SEQS):
        batch.add_row(new_request(str(number), [1]), seed=0)
    with pytest.raises(ValueError, match=rf"all {MAX_SEQS} rows \(max_num_seqs\) are taken"):
        batch.add_row(new_request("more", [1]), seed=0)


@given(st.sampled_from([9.9e-6, 9.9999999e-6, 1e-5, 1.00000001e-5, 2e-5]))
def test_a_temperature_at_the_border_means_the_same_in_params_and_row(temperature: float) -> None:
    """The column is float32, the border is not: rounding must not change who is greedy."""
    batch = make_batch()
    params = SamplingParams(temperature=temperature)
    batch.add_row(new_request("a", [1], sampling_params=params), seed=0)
    batch.add_row(new_request("b", [1], sampling_params=SamplingParams(temperature=1.0)), seed=0)
    assert bool(batch.temperature[0]) == (not params.is_greedy)
    batch.remove_row("b")
    assert batch.make_sampling_metadata(slice(0, 1)).all_greedy == params.is_greedy


def test_rows_are_looked_up_again_after_rows_changed() -> None:
    batch = make_batch()
    for req_id in "abc":
        batch.add_row(new_request(req_id, [1]), seed=0)
    assert batch.rows_of(["a", "c"]).tolist() == [0, 2]
    batch.remove_row("a")
    batch.add_row(new_request("a", [1]), seed=0)
    assert batch.rows_of(["a", "c"]).tolist() == [2, 0]
