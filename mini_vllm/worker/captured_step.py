"""The step recorded at start-up and replayed ever after (see `ops/cpu/recording.py`), as far as that pays.

It is handed the model and the buffers that every step's inputs lie in. `forward` and `logits` then do what calling the
model would, with the same kernels on the same numbers, or answer None where they cannot, and the model is called.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from mini_vllm.attention.context import ForwardContext, set_forward_context
from mini_vllm.logger import init_logger
from mini_vllm.ops.cpu.linear import PackedBF16Linear
from mini_vllm.ops.cpu.recording import CannotRecord, Recording, TooManyBreaks, record
from mini_vllm.ops.lookup import lookup
from mini_vllm.worker.kv_cache import gib

logger = init_logger(__name__)


class Program:
    """A recording of up to `max_rows` rows, and where its result lies."""

    def __init__(self, recording: Recording, result: torch.Tensor) -> None:
        self.recording, self.result = recording, result
        self.address = result.data_ptr()
        self.pieces: Sequence[Callable[[int], None]] = ()
        self._view = result  # decode steps ask for as many rows again and again

    @property
    def max_rows(self) -> int:
        return self.recording.num_tokens

    def run(self, rows: int) -> torch.Tensor | None:
        """The first `rows` of the result, valid until the next call; None for more rows than it was recorded for."""
        if rows > self.max_rows:
            return None
        for piece in self.pieces:
            piece(rows)
        if len(self._view) != rows:
            self._view = self.result[:rows]
        return self._view

    def finish(self) -> None:
        """The recording is complete."""
        self.pieces = self.recording.finish()

    def describe(self) -> str:
        """For the log."""
        noted = self.recording
        breaks = f" and {noted.num_breaks} operators of torch" if noted.num_breaks else ""
        return f"{noted.num_kernels} kernels{breaks}, up to {self.max_rows} rows, {gib(noted.arena.num_bytes)}"


@dataclass(frozen=True)
class StepBuffers:
    """Where inputs lie in every step: ids and positions of tokens, and which of the tokens' rows need logits."""

    input_ids: torch.Tensor
    positions: torch.Tensor
    logits_indices: torch.Tensor


class CapturedStep:
    """forward: hidden states of the step's tokens. logits: of the rows that `StepBuffers.logits_indices` names."""

    def __init__(self, forward: Program | None, logits: Program | None) -> None:
        self._forward, self._logits = forward, logits

    def forward(self, num_tokens: int) -> torch.Tensor | None:
        """Hidden states `[num_tokens, hidden]`, or None."""
        return None if self._forward is None else self._forward.run(num_tokens)

    def logits(self, hidden: torch.Tensor, num_rows: int) -> torch.Tensor | None:
        """Logits `[num_rows, vocab]` of rows of `hidden`, or None, also when that is not what `forward` gave."""
        if self._logits is None or self._forward is None or hidden.data_ptr() != self._forward.address:
            return None
        return self._logits.run(num_rows)


def capture(
    model: nn.Module,
    record_metadata: Callable[[int], Mapping[str, Any]],
    kv_caches: dict[str, torch.Tensor],
    buffers: StepBuffers,
    max_num_seqs: int,
) -> CapturedStep | None:
    """Record the model's step, or None, with a line in the log, where nothing would be gained.

    record_metadata: attention metadata of every layer to record a number of tokens with.
    """

    def forward(tokens: int) -> Program:
        inputs = [buffers.input_ids[:tokens], buffers.positions[:tokens]]
        context = ForwardContext(dict(record_metadata(tokens)), kv_caches)
        with record(tokens, inputs) as recording, set_forward_context(context):
            return Program(recording, model(*inputs))

    def logits(rows: int) -> Program:
        assert body is not None
        indices = buffers.logits_indices[:rows]
        with record(rows, [indices], few_breaks=0) as recording:  # few rows have a kernel that torch's would shut out
            return Program(recording, model.compute_logits(lookup(indices, body.result)))  # type: ignore[operator]

    body = _first_that_pays("forward", forward, len(buffers.input_ids))
    if body is None:
        return None
    return CapturedStep(body, _first_that_pays("logits", logits, min(max_num_seqs, len(buffers.input_ids))))


def _first_that_pays(what: str, make: Callable[[int], Program], max_rows: int) -> Program | None:
    """A program for as many rows as it can be, or for the few rows that have kernels of their own."""
    for rows in dict.fromkeys((max_rows, min(max_rows, PackedBF16Linear.MAX_ROWS))):
        try:
            program = make(rows)
            program.finish()
        except CannotRecord as reason:
            logger.info("Captured step: no %s, since %s", what, reason)
            return None
        except TooManyBreaks:
            continue
        logger.info("Captured step: %s of %s", what, program.describe())
        return program
    logger.info("Captured step: no %s, since torch's operators would run between its kernels", what)
    return None
