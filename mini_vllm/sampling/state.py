"""Everything the sampler remembers of the rows of a batch, and what a step does with it.

The worker tells of rows that come, grow and go; the rest follows: penalties, rules, processors, random numbers. A step
costs nothing for what no row uses.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from mini_vllm.sampling.draws import DrawsAhead
from mini_vllm.sampling.history import History, Int64, StepRows
from mini_vllm.sampling.logits_processor import LogitsProcessor
from mini_vllm.sampling.metadata import Edit
from mini_vllm.sampling.penalties import Penalties
from mini_vllm.sampling.processor_rows import ProcessorRows
from mini_vllm.sampling.token_rules import TokenRules
from mini_vllm.sampling_params import SamplingParams

NEUTRAL = SamplingParams(temperature=0.0)


class SamplingState:
    """history, seed: the worker's arrays. vocab_size: of the logits. processors: batch-level ones."""

    def __init__(
        self,
        history: History,
        seed: npt.NDArray[np.uint64],
        vocab_size: int,
        processors: Sequence[LogitsProcessor] = (),
    ) -> None:
        self.draws = DrawsAhead(seed)
        self.penalties = Penalties(history)
        self.rules = TokenRules(history, vocab_size)
        self.processors = ProcessorRows(history, processors)
        self.errors: dict[int, str] = {}
        """Of the last step: why the callables of a row of logits failed."""

    def add(
        self,
        row: int,
        params: SamplingParams,
        stop_ids: Sequence[int] = (),
        bad_words: Sequence[Sequence[int]] = (),
    ) -> str | None:
        """Take in the row behind the last, whose tokens the history has already.

        Returns what is wrong with its parameters; the row is there all the same then, and asks for nothing.
        """
        self.draws.forget(row)
        message = None
        try:
            self.processors.validate(params)
            self.rules.add(row, params, stop_ids, bad_words)
        except Exception as error:  # a processor's own check may raise anything
            message = str(error)
            self.rules.remove(row)
            params = NEUTRAL
        self.processors.add(row, params)
        self.penalties.add(row, params)
        return message

    def remove(self, row: int, moved_from: int | None) -> None:
        """Drop a row; `moved_from` is the one that takes its place, if it was not the last."""
        self.penalties.remove(row)
        self.rules.remove(row)
        self.processors.remove(row)
        if moved_from is not None:
            for part in (self.draws, self.penalties, self.rules, self.processors):
                part.move(moved_from, row)

    @property
    def is_idle(self) -> bool:
        """Whether no row asks for anything but its next token: `edit`, `rescale` and `append` would do nothing."""
        return not (self.rules or self.processors or self.penalties)

    def append(self, rows: Int64, token_ids: Int64) -> None:
        """One more output token for each of `rows`."""
        self.penalties.append(rows, token_ids)
        self.processors.append(rows, token_ids)

    # -- a step ------------------------------------------------------------------------------------------------

    def edit(self, step: StepRows) -> Edit | None:
        """What changes the logits of a step before anything is chosen; None if nothing does."""
        self.errors = {}
        self.processors.begin_step()
        parts: list[Edit] = []
        if self.rules:
            parts.append(lambda logits: self.rules.apply(logits, step))
        if self.processors.changes_argmax:
            parts.append(lambda logits: self.processors.apply(logits, step, self.errors))
        if self.penalties:
            parts.append(lambda logits: self.penalties.apply(logits, step))
        if not parts:
            return None
        return lambda logits: _through(parts, logits)

    def rescale(self, step: StepRows) -> Edit | None:
        """What changes the logits of a step after the temperature; None if nothing does."""
        return (lambda logits: self.processors.rescale(logits, step)) if self.processors.is_rescaling else None


def _through(parts: list[Edit], logits: torch.Tensor) -> torch.Tensor:
    for part in parts:
        logits = part(logits)
    return logits
