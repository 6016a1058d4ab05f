"""The worker's memory of the requests it holds: one row each, in arrays that never move.

Rows are dense: a removed row's place is taken by the last one, and the move is reported so that whoever keeps
something per row can follow. What is here mirrors the plans; the worker decides nothing.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from mini_vllm.core.scheduler_output import BlockIds, CachedRequestData, NewRequestData
from mini_vllm.platforms import Platform
from mini_vllm.sampling.draws import uniforms_of
from mini_vllm.sampling.metadata import Edit, SamplingMetadata, Uniforms, seed_key
from mini_vllm.worker.buffers import HostBuffer

Rows = slice | npt.NDArray[np.int64]
"""Row numbers, ascending. A slice when they are the first ones, so that indexing copies nothing."""


class RowMove(NamedTuple):
    """The row that was `source` is now `destination`."""

    source: int
    destination: int


class BlockTable:
    """The physical block ids of every row, for one KV cache group.

    buffer: `[max_num_seqs, max_blocks]` int32. num_blocks: how many of a row are its own; the rest is 0, the null
    block, and is never read.
    """

    def __init__(self, max_num_seqs: int, max_model_len: int, block_size: int, platform: Platform) -> None:
        self.block_size = block_size
        self.max_blocks = -(-max_model_len // block_size)
        self.buffer = HostBuffer((max_num_seqs, self.max_blocks), torch.int32, platform)
        self.staging = HostBuffer((max_num_seqs, self.max_blocks), torch.int32, platform)
        """Where rows are gathered when not all of them are in a step."""
        self.np = self.buffer.np
        self.flat = self.np.reshape(-1)
        self.num_blocks = [0] * max_num_seqs

    def append(self, row: int, block_ids: Sequence[int] | npt.NDArray[np.int32]) -> None:
        start = self.num_blocks[row]
        self.num_blocks[row] = start + len(block_ids)
        if len(block_ids) == 1:
            self.np[row, start] = block_ids[0]
        else:
            self.np[row, start : start + len(block_ids)] = block_ids

    def clear(self, row: int) -> None:
        self.np[row, : self.num_blocks[row]] = 0
        self.num_blocks[row] = 0

    def move(self, source: int, destination: int) -> None:
        self.clear(destination)
        self.append(destination, self.np[source, : self.num_blocks[source]])
        self.clear(source)


class InputBatch:
    """Rows of at most `max_num_seqs` requests.

    token_ids: `[max_num_seqs, max_model_len]` int32, of which `num_tokens[row]` are known. num_computed_tokens: those
    whose KV is written before the current step, as the plan says. block_tables: one per KV cache group.
    """

    def __init__(self, max_num_seqs: int, max_model_len: int, block_sizes: Sequence[int], platform: Platform) -> None:
        self.max_num_seqs = max_num_seqs
        self.max_model_len = max_model_len
        self.token_ids = np.zeros((max_num_seqs, max_model_len), dtype=np.int32)
        self.num_tokens = np.zeros(max_num_seqs, dtype=np.int64)
        self.num_prompt_tokens = np.zeros(max_num_seqs, dtype=np.int64)
        self.num_computed_tokens = np.zeros(max_num_seqs, dtype=np.int64)
        self.temperature = np.zeros(max_num_seqs, dtype=np.float32)
        self.top_k = np.zeros(max_num_seqs, dtype=np.int64)
        self.top_p = np.ones(max_num_seqs, dtype=np.float64)
        self.min_p = np.zeros(max_num_seqs, dtype=np.float64)
        self.seed = np.zeros(max_num_seqs, dtype=np.uint64)
        self._columns: tuple[npt.NDArray[Any], ...] = (
            self.num_tokens, self.num_prompt_tokens, self.num_computed_tokens,
            self.temperature, self.top_k, self.top_p, self.min_p, self.seed,
        )  # fmt: skip
        self.block_tables = [BlockTable(max_num_seqs, max_model_len, size, platform) for size in block_sizes]
        self.req_ids: list[str] = []
        self.row_of: dict[str, int] = {}
        self._row_numbers = np.arange(max_num_seqs)
        self.num_random = 0
        """Rows that are not greedy."""
        self.num_changes = 0
        """How often a row came or went: as long as it is the same, every row belongs to the same request."""
        self._looked_up: tuple[list[str], npt.NDArray[np.int64]] | None = None

    @property
    def num_rows(self) -> int:
        return len(self.req_ids)

    def __contains__(self, req_id: str) -> bool:
        return req_id in self.row_of

    # -- rows come and go ----------------------------------------------------------------------------------

    def add_row(self, new: NewRequestData, seed: int) -> int:
        """Take a request in and return its row. `seed` is the key of its random numbers.

        Raises ValueError if it is here already, or does not fit; nothing is changed then.
        """
        row, length = self.num_rows, len(new.token_ids)
        if new.req_id in self.row_of:
            raise ValueError(f"request {new.req_id!r} has a row already")
        if row >= self.max_num_seqs:
            raise ValueError(f"request {new.req_id!r}: all {self.max_num_seqs} rows (max_num_seqs) are taken")
        if length > self.max_model_len:
            raise ValueError(f"request {new.req_id!r} has {length} tokens, max_model_len is {self.max_model_len}")
        self.token_ids[row, :length] = new.token_ids
        params = new.sampling_params
        values = (
            length, new.num_prompt_tokens, new.num_computed_tokens,
            0.0 if params.is_greedy else params.temperature, params.top_k, params.top_p, params.min_p, seed_key(seed),
        )  # fmt: skip
        for column, value in zip(self._columns, values, strict=True):
            column[row] = value
        self.req_ids.append(new.req_id)
        self.row_of[new.req_id] = row
        self.num_random += not params.is_greedy
        self.num_changes += 1
        self._looked_up = None
        self.append_blocks(row, new.block_ids)
        return row

    def remove_row(self, req_id: str) -> RowMove | None:
        """Drop a request. The last row takes its place; that move, if there was one to make."""
        row, last = self.row_of.pop(req_id), self.num_rows - 1
        self.num_random -= bool(self.temperature[row])
        self.num_changes += 1
        self._looked_up = None
        moved_id = self.req_ids.pop()
        if row == last:
            for table in self.block_tables:
                table.clear(row)
            return None
        self.req_ids[row] = moved_id
        self.row_of[moved_id] = row
        length = self.num_tokens[last]
        self.token_ids[row, :length] = self.token_ids[last, :length]
        for column in self._columns:
            column[row] = column[last]
        for table in self.block_tables:
            table.move(last, row)
        return RowMove(last, row)

    # -- rows grow -----------------------------------------------------------------------------------------

    def append_blocks(self, row: int, block_ids: BlockIds) -> None:
        """Append to the row's block table, one list per KV cache group."""
        for table, ids in zip(self.block_tables, block_ids, strict=True):
            table.append(row, ids)

    def append_tokens(self, row: int, token_ids: Sequence[int]) -> None:
        """Tokens that were not sampled here."""
        start = int(self.num_tokens[row])
        self.token_ids[row, start : start + len(token_ids)] = token_ids
        self.num_tokens[row] += len(token_ids)

    def append_sampled(self, rows: Rows, token_ids: npt.NDArray[np.int64]) -> None:
        """One sampled token for each of `rows`."""
        self.token_ids[self.row_numbers(rows), self.num_tokens[rows]] = token_ids
        self.num_tokens[rows] += 1

    def update(self, cached: CachedRequestData) -> None:
        """Follow the deltas of a plan. What it says of computed tokens holds, whatever was here before."""
        for req_id, block_ids in cached.new_block_ids.items():
            self.append_blocks(self.row_of[req_id], block_ids)
        for req_id, token_ids in cached.new_token_ids.items():
            self.append_tokens(self.row_of[req_id], token_ids)
        if cached.req_ids:
            self.num_computed_tokens[self.rows_of(cached.req_ids)] = cached.num_computed_tokens

    def row_numbers(self, rows: Rows) -> npt.NDArray[np.int64]:
        """The same rows as numbers; those of a slice are not to be written to."""
        return self._row_numbers[rows] if isinstance(rows, slice) else rows

    # -- looking in ----------------------------------------------------------------------------------------

    def rows_of(self, req_ids: list[str]) -> npt.NDArray[np.int64]:
        """Row numbers in the order of `req_ids`. Decode steps ask for the same ids again and again."""
        if self._looked_up is None or self._looked_up[0] != req_ids:
            rows = np.fromiter(map(self.row_of.__getitem__, req_ids), dtype=np.int64, count=len(req_ids))
            self._looked_up = list(req_ids), rows
        return self._looked_up[1]

    def num_output_tokens(self, rows: Rows) -> npt.NDArray[np.int64]:
        """Output tokens so far, which is also the number of a row's next draw."""
        count: npt.NDArray[np.int64] = self.num_tokens[rows] - self.num_prompt_tokens[rows]
        return count

    def make_sampling_metadata(
        self,
        rows: Rows,
        uniforms: Uniforms | None = None,
        *,
        logits_row: npt.NDArray[np.int64] | None = None,
        edit: Edit | None = None,
        rescale: Edit | None = None,
    ) -> SamplingMetadata:
        """What the sampler needs of `rows`, of which one is there for each draw. See `SamplingMetadata`."""
        temperature = self.temperature[rows]
        return SamplingMetadata(
            temperature=temperature,
            top_k=self.top_k[rows],
            top_p=self.top_p[rows],
            min_p=self.min_p[rows],
            uniforms=uniforms or uniforms_of(self.seed[rows], self.num_output_tokens(rows)),
            all_greedy=self.num_random == 0 or not temperature.any(),
            logits_row=logits_row,
            edit=edit,
            rescale=rescale,
        )
