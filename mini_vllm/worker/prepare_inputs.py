"""From a plan to the flat token batch: which tokens, at which positions, written to which slots.

Buffers are allocated once at their largest size and written in place with numpy, without a Python loop over tokens or
requests. Rows appear in the order of the input batch, so that in the common case (every row is in the step) arrays
of the batch are used as they are. Rows of a single token each, the shape of decoding, take a shorter way to the same
numbers.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from mini_vllm.attention.backend import CommonAttentionMetadata
from mini_vllm.core.scheduler_output import SchedulerOutput
from mini_vllm.platforms import Platform
from mini_vllm.worker.buffers import HostBuffer
from mini_vllm.worker.input_batch import BlockTable, InputBatch, Rows

Int64 = npt.NDArray[np.int64]


@dataclass(slots=True)
class StepInputs:
    """What the forward and the sampler of one step read. Views of the preparer's buffers: valid for this step.

    req_ids, rows: the R requests in the step and their rows. input_ids `[N]` int32, positions `[N]` int64.
    attention: one `CommonAttentionMetadata` per KV cache group.
    num_samples: how many of the requests sample.
    num_logits: `[R]` how many of a request's last tokens need logits: 0 in the middle of a prompt, 1 when it samples.
    logits_indices: `[sum(num_logits)]` int64, which tokens those are.
    samples_all: whether that is every token of the step.
    sampling_rows: the rows of the requests that sample, in the order of their logits.
    """

    req_ids: list[str]
    rows: Rows
    input_ids: torch.Tensor
    positions: torch.Tensor
    attention: list[CommonAttentionMetadata]
    num_samples: int
    num_logits: Int64
    logits_indices: torch.Tensor
    samples_all: bool
    sampling_rows: Rows

    @property
    def total_num_logits(self) -> int:
        return len(self.logits_indices)


@dataclass(slots=True)
class Decoding:
    """A step in which every row of the batch sampled from its only token, kept since the next is mostly the same.

    changes: the batch's `num_changes` then. table_starts: for each KV cache group, where each row's blocks begin in the
    flat table. Only positions, tokens, lengths and slots differ in the next step, and these lie in the buffers.
    """

    inputs: StepInputs
    changes: int
    token_starts: Int64
    table_starts: list[Int64]


def last_token_indices(query_start_loc: Int64, num_logits: Int64) -> Int64:
    """Flat indices of the last `num_logits[r]` tokens of each request r; its tokens end at `query_start_loc[r + 1]`."""
    ends = np.cumsum(num_logits)
    within = np.arange(int(ends[-1]) if len(ends) else 0) - np.repeat(ends - num_logits, num_logits)
    return np.repeat(query_start_loc[1:] - num_logits, num_logits) + within


class InputPreparer:
    """Owns the step's buffers; `prepare` fills them from the input batch and a plan."""

    def __init__(self, batch: InputBatch, max_num_batched_tokens: int, platform: Platform) -> None:
        self.batch = batch
        tokens, seqs = max_num_batched_tokens, batch.max_num_seqs
        self.input_ids = HostBuffer(tokens, torch.int32, platform)
        self.positions = HostBuffer(tokens, torch.int64, platform)
        self.slot_mappings = [HostBuffer(tokens, torch.int64, platform) for _ in batch.block_tables]
        self.query_start_loc = HostBuffer(seqs + 1, torch.int32, platform)
        self.seq_lens = HostBuffer(seqs, torch.int32, platform)
        self.logits_indices = HostBuffer(tokens, torch.int64, platform)
        self._flat_token_ids = batch.token_ids.reshape(-1)
        self._num_scheduled = np.zeros(seqs, dtype=np.int64)
        self._counting = np.arange(max(tokens, seqs) + 1)
        self._ones = np.ones(seqs, dtype=np.int64)
        self._decoding: Decoding | None = None

    def prepare(self, plan: SchedulerOutput) -> StepInputs:
        """The batch of a plan whose requests all have rows. Raises KeyError for one that has none."""
        if self._decoding is not None and self._goes_on(self._decoding, plan):
            return self._decoding.inputs
        inputs = self._prepare(plan)
        if inputs.samples_all and isinstance(inputs.rows, slice):
            self._decoding = self._keep(inputs)
        return inputs

    def _prepare(self, plan: SchedulerOutput) -> StepInputs:
        self._decoding = None  # its buffers are written
        batch, num_reqs, num_tokens = self.batch, len(plan.num_scheduled_tokens), plan.total_num_scheduled_tokens
        rows, req_ids = self._rows(plan)
        computed = batch.num_computed_tokens[rows]
        if num_tokens == num_reqs:
            query_lens = self._ones[:num_reqs]
            query_start_loc = self._counting[: num_reqs + 1]
            token_rows, positions = self._row_numbers(rows, num_reqs), computed
        else:
            query_lens = self._query_lens(plan, rows)
            query_start_loc, token_rows, positions = self._spread(rows, query_lens, computed, num_tokens)
        seq_lens = computed + query_lens
        num_logits = (seq_lens >= batch.num_tokens[rows]).astype(np.int64)
        num_samples = int(np.count_nonzero(num_logits))
        self.positions.np[:num_tokens] = positions
        self.input_ids.np[:num_tokens] = self._flat_token_ids[token_rows * batch.max_model_len + positions]
        return StepInputs(
            req_ids=req_ids,
            rows=rows,
            input_ids=self.input_ids.upload(num_tokens),
            positions=self.positions.upload(num_tokens),
            attention=self._attention(rows, token_rows, positions, query_start_loc, query_lens, seq_lens),
            num_samples=num_samples,
            num_logits=num_logits,
            logits_indices=self._logits_indices(query_start_loc, num_logits, num_samples == num_tokens),
            samples_all=num_samples == num_tokens,
            sampling_rows=rows if num_samples == num_reqs else self._row_numbers(rows, num_reqs)[num_logits > 0],
        )

    # -- the same once more ----------------------------------------------------------------------------------

    def _keep(self, inputs: StepInputs) -> Decoding:
        numbers = self._counting[: len(inputs.req_ids)]
        return Decoding(
            inputs,
            self.batch.num_changes,
            numbers * self.batch.max_model_len,
            [numbers * table.max_blocks for table in self.batch.block_tables],
        )

    def _goes_on(self, decoding: Decoding, plan: SchedulerOutput) -> bool:
        """Whether the plan is one more step of the same rows, one token each; then its inputs are made of the last.

        False also where the longest request needs a wider block table than there was.
        """
        batch, count = self.batch, len(decoding.inputs.req_ids)
        same_rows = len(plan.num_scheduled_tokens) == count == plan.total_num_scheduled_tokens
        if not same_rows or batch.num_changes != decoding.changes:
            return False
        computed = batch.num_computed_tokens[:count]
        seq_lens = computed + 1
        longest = int(seq_lens.max())
        for common, table in zip(decoding.inputs.attention, batch.block_tables, strict=True):
            if longest > common.block_table_cpu.shape[1] * table.block_size:
                return False
        if (seq_lens < batch.num_tokens[:count]).any():
            return False  # a prompt, of which one token is computed
        self._write_decoding(decoding, computed, seq_lens, longest)
        return True

    def _write_decoding(self, decoding: Decoding, computed: Int64, seq_lens: Int64, longest: int) -> None:
        count = len(computed)
        self.positions.np[:count] = computed
        self.input_ids.np[:count] = self._flat_token_ids[decoding.token_starts + computed]
        self.seq_lens.np[:count] = seq_lens
        for buffer in (self.positions, self.input_ids, self.seq_lens):
            buffer.upload(count)
        groups = zip(
            decoding.inputs.attention, self.batch.block_tables, self.slot_mappings, decoding.table_starts, strict=True
        )
        for common, table, slots, starts in groups:
            common.max_seq_len = longest
            self._write_slots(table, starts, computed, slots)
            slots.upload(count)
            table.buffer.upload(count)

    # -- which rows, which tokens ----------------------------------------------------------------------------

    def _rows(self, plan: SchedulerOutput) -> tuple[Rows, list[str]]:
        """The rows of the plan's requests in ascending order, and the requests in that order."""
        batch = self.batch
        if len(plan.num_scheduled_tokens) == batch.num_rows:
            return slice(0, batch.num_rows), list(batch.req_ids)
        rows = np.sort(batch.rows_of(list(plan.num_scheduled_tokens)))
        return rows, [batch.req_ids[row] for row in rows.tolist()]

    def _row_numbers(self, rows: Rows, num_reqs: int) -> Int64:
        return self._counting[:num_reqs] if isinstance(rows, slice) else rows

    def _query_lens(self, plan: SchedulerOutput, rows: Rows) -> Int64:
        counts = plan.num_scheduled_tokens
        plan_rows = self.batch.rows_of(list(counts))
        self._num_scheduled[plan_rows] = np.fromiter(counts.values(), dtype=np.int64, count=len(counts))
        return self._num_scheduled[rows]

    def _spread(self, rows: Rows, query_lens: Int64, computed: Int64, num_tokens: int) -> tuple[Int64, Int64, Int64]:
        """(query_start_loc `[R + 1]`, the row of every token `[N]`, its position `[N]`)."""
        query_start_loc = np.zeros(len(query_lens) + 1, dtype=np.int64)
        np.cumsum(query_lens, out=query_start_loc[1:])
        token_rows = np.repeat(self._row_numbers(rows, len(query_lens)), query_lens)
        positions = self._counting[:num_tokens] + np.repeat(computed - query_start_loc[:-1], query_lens)
        return query_start_loc, token_rows, positions

    def _logits_indices(self, query_start_loc: Int64, num_logits: Int64, all_tokens: bool) -> torch.Tensor:
        indices = self._counting[: len(num_logits)] if all_tokens else last_token_indices(query_start_loc, num_logits)
        self.logits_indices.np[: len(indices)] = indices
        return self.logits_indices.upload(len(indices))

    # -- attention metadata ----------------------------------------------------------------------------------

    def _attention(
        self,
        rows: Rows,
        token_rows: Int64,
        positions: Int64,
        query_start_loc: Int64,
        query_lens: Int64,
        seq_lens: Int64,
    ) -> list[CommonAttentionMetadata]:
        num_reqs, num_tokens = len(seq_lens), len(positions)
        self.query_start_loc.np[: num_reqs + 1] = query_start_loc
        self.seq_lens.np[:num_reqs] = seq_lens
        query_start_tensor = self.query_start_loc.upload(num_reqs + 1)
        seq_lens_tensor = self.seq_lens.upload(num_reqs)
        max_query_len = 1 if num_tokens == num_reqs else int(query_lens.max())
        max_seq_len = int(seq_lens.max())
        metadata = []
        for table, slots in zip(self.batch.block_tables, self.slot_mappings, strict=True):
            self._write_slots(table, token_rows * table.max_blocks, positions, slots)
            block_table, block_table_cpu = self._step_block_table(table, rows, num_reqs, max_seq_len)
            metadata.append(
                CommonAttentionMetadata(
                    num_actual_tokens=num_tokens,
                    num_reqs=num_reqs,
                    max_query_len=max_query_len,
                    max_seq_len=max_seq_len,
                    query_start_loc=query_start_tensor,
                    seq_lens=seq_lens_tensor,
                    slot_mapping=slots.upload(num_tokens),
                    block_table=block_table,
                    query_start_loc_cpu=self.query_start_loc.np[: num_reqs + 1],
                    seq_lens_cpu=self.seq_lens.np[:num_reqs],
                    block_table_cpu=block_table_cpu,
                )
            )
        return metadata

    @staticmethod
    def _write_slots(table: BlockTable, starts: Int64, positions: Int64, slots: HostBuffer) -> None:
        """slot = physical block * block_size + offset in the block. starts: where the blocks of a token's row begin."""
        block_index, offset = np.divmod(positions, table.block_size)
        block_index += starts
        slots.np[: len(positions)] = table.flat[block_index] * np.int64(table.block_size) + offset

    @staticmethod
    def _step_block_table(
        table: BlockTable, rows: Rows, num_reqs: int, max_seq_len: int
    ) -> tuple[torch.Tensor, npt.NDArray[np.int32]]:
        """The rows' block tables, on the device and on the host, as wide as the longest request needs."""
        width = -(-max_seq_len // table.block_size)
        if isinstance(rows, slice):
            buffer = table.buffer
        else:
            buffer = table.staging
            buffer.np[:num_reqs, :width] = table.np[rows, :width]
        return buffer.upload(num_reqs)[:, :width], buffer.np[:num_reqs, :width]
