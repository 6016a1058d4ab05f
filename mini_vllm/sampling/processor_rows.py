"""Runs logits processors over a batch whose rows come, go and move."""

from collections.abc import Sequence

import numpy as np
import torch

from mini_vllm.sampling.history import History, Int64, StepRows
from mini_vllm.sampling.logits_processor import AddedRequest, LogitsProcessor, RequestProcessor, net_update
from mini_vllm.sampling_params import SamplingParams


class ProcessorRows:
    """Batch-level processors and the callables of single requests, with the output tokens that both are shown."""

    def __init__(self, history: History, processors: Sequence[LogitsProcessor] = ()) -> None:
        self._history = history
        self._all = list(processors)
        self._changing = [processor for processor in processors if not processor.is_argmax_invariant()]
        self._invariant = [processor for processor in processors if processor.is_argmax_invariant()]
        self._callables: dict[int, tuple[RequestProcessor, ...]] = {}
        self._outputs: dict[int, list[int]] = {}
        self._number_of_row: list[int] = []
        self._told: list[int] = []
        self._news: dict[int, AddedRequest] = {}
        self._next_number = 0

    def __bool__(self) -> bool:
        return bool(self._all or self._callables)

    @property
    def changes_argmax(self) -> bool:
        return bool(self._changing or self._callables)

    @property
    def is_rescaling(self) -> bool:
        return bool(self._invariant)

    # -- rows come, grow and go --------------------------------------------------------------------------------

    def validate(self, params: SamplingParams) -> None:
        """Raises ValueError if a processor does not accept the parameters."""
        for processor in self._all:
            processor.validate_params(params)

    def add(self, row: int, params: SamplingParams) -> None:
        """The row behind the last."""
        if not self._all and not params.logits_processors:
            return
        outputs = self._outputs[row] = self._history.outputs(row)
        if params.logits_processors:
            self._callables[row] = params.logits_processors
        if self._all:
            prompt: list[int] = self._history.token_ids[row, : self._history.num_prompt_tokens[row]].tolist()
            self._news[self._next_number] = (row, params, prompt, outputs)
            self._number_of_row.append(self._next_number)
            self._next_number += 1

    def remove(self, row: int) -> None:
        """A row whose place is taken by the last one, or which is the last."""
        self._callables.pop(row, None)
        self._outputs.pop(row, None)
        if self._all:
            last = self._number_of_row.pop()
            if row < len(self._number_of_row):
                self._number_of_row[row] = last

    def move(self, source: int, destination: int) -> None:
        if source in self._callables:
            self._callables[destination] = self._callables.pop(source)
        if source in self._outputs:
            self._outputs[destination] = self._outputs.pop(source)

    def append(self, rows: Int64, token_ids: Int64) -> None:
        if self._outputs:
            for row, token_id in zip(rows.tolist(), token_ids.tolist(), strict=True):
                if row in self._outputs:
                    self._outputs[row].append(token_id)

    # -- logits ------------------------------------------------------------------------------------------------

    def begin_step(self) -> None:
        """Tell the processors what changed since the last step."""
        if not self._all:
            return
        update = None
        if self._told != self._number_of_row:
            update = net_update(self._told, self._number_of_row, self._news)
            self._told, self._news = list(self._number_of_row), {}
        for processor in self._all:
            processor.update_state(update)

    def apply(self, logits: torch.Tensor, step: StepRows, errors: dict[int, str]) -> torch.Tensor:
        """Batch-level processors that may change the argmax, then callables. `errors` gets a message for each row of
        logits whose callable failed; its logits become NaN."""
        logits = self._run(self._changing, logits, step)
        for row in self._callables:
            at, _ = step.locate(np.array([row]))
            if len(at):
                self._call(row, int(at[0]), logits, errors)
        return logits

    def rescale(self, logits: torch.Tensor, step: StepRows) -> torch.Tensor:
        """Batch-level processors that cannot change the argmax."""
        return self._run(self._invariant, logits, step)

    def _run(self, processors: list[LogitsProcessor], logits: torch.Tensor, step: StepRows) -> torch.Tensor:
        if not processors:
            return logits
        if step.is_whole:
            return _through(processors, logits)
        rows = torch.from_numpy(step.rows).to(logits.device)
        whole = logits.new_zeros(step.num_rows, logits.shape[1])
        whole[rows] = logits
        return _through(processors, whole)[rows]

    def _call(self, row: int, at: int, logits: torch.Tensor, errors: dict[int, str]) -> None:
        changed = logits[at].clone()
        for number, processor in enumerate(self._callables[row]):
            try:
                changed = _checked(processor(list(self._outputs[row]), changed), logits)
            except Exception as error:
                errors[at] = f"logits_processors[{number}] raised {type(error).__name__}: {error}"
                logits[at] = torch.nan
                return
        logits[at] = changed


def _through(processors: list[LogitsProcessor], logits: torch.Tensor) -> torch.Tensor:
    shape = logits.shape
    for processor in processors:
        logits = processor.apply(logits)
        if logits.shape != shape:
            name = type(processor).__name__
            raise ValueError(f"{name}.apply returned logits {tuple(logits.shape)}, expected {tuple(shape)}")
    return logits


def _checked(row: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    if not isinstance(row, torch.Tensor):
        raise TypeError(f"must return logits, got {type(row).__name__}")
    if row.shape != logits.shape[1:]:
        raise ValueError(f"returned logits {tuple(row.shape)}, expected {tuple(logits.shape[1:])}")
    return row.to(logits.dtype)
