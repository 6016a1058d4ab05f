"""Rows for a `SamplingState`, held as the worker holds them, and what a step must do to their logits, slowly."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from mini_vllm.sampling.history import History, StepRows
from mini_vllm.sampling.logits_processor import LogitsProcessor
from mini_vllm.sampling.state import SamplingState
from mini_vllm.sampling_params import SamplingParams

VOCAB, MAX_ROWS, MAX_LEN = 24, 5, 400


@dataclass
class Row:
    """What a row is, in plain lists."""

    params: SamplingParams
    prompt: list[int]
    output: list[int] = field(default_factory=list)
    stop_ids: Sequence[int] = ()
    bad_words: Sequence[Sequence[int]] = ()


class Rig:
    """A batch of rows: new ones at the end, the last one takes the place of a removed one."""

    def __init__(self, processors: Sequence[LogitsProcessor] = (), vocab: int = VOCAB) -> None:
        self.token_ids = np.zeros((MAX_ROWS, MAX_LEN), dtype=np.int32)
        self.num_tokens = np.zeros(MAX_ROWS, dtype=np.int64)
        self.num_prompt = np.zeros(MAX_ROWS, dtype=np.int64)
        self.seed = np.zeros(MAX_ROWS, dtype=np.uint64)
        history = History(self.token_ids, self.num_tokens, self.num_prompt)
        self.state = SamplingState(history, self.seed, vocab, processors)
        self.rows: list[Row] = []

    def add(self, row: Row) -> str | None:
        number, tokens = len(self.rows), row.prompt + row.output
        self.token_ids[number, : len(tokens)] = tokens
        self.num_tokens[number], self.num_prompt[number] = len(tokens), len(row.prompt)
        self.rows.append(row)
        return self.state.add(number, row.params, row.stop_ids, row.bad_words)

    def remove(self, number: int) -> None:
        last = len(self.rows) - 1
        self.rows[number] = self.rows[last]
        self.rows.pop()
        for column in (self.token_ids, self.num_tokens, self.num_prompt, self.seed):
            column[number] = column[last]
        self.state.remove(number, None if number == last else last)

    def append(self, numbers: Sequence[int], token_ids: Sequence[int]) -> None:
        rows, tokens = np.array(numbers, dtype=np.int64), np.array(token_ids, dtype=np.int64)
        self.token_ids[rows, self.num_tokens[rows]] = tokens
        self.num_tokens[rows] += 1
        for number, token_id in zip(numbers, token_ids, strict=True):
            self.rows[number].output.append(token_id)
        self.state.append(rows, tokens)

    def edited(self, logits: np.ndarray, numbers: Sequence[int] | None = None) -> np.ndarray:
        """What a step that samples these rows makes of their logits."""
        rows = np.array(range(len(self.rows)) if numbers is None else numbers, dtype=np.int64)
        edit = self.state.edit(StepRows(rows, len(self.rows)))
        tensor = torch.from_numpy(logits.astype(np.float32))
        return (tensor if edit is None else edit(tensor)).numpy()


def expected_logits(logits: np.ndarray, row: Row) -> np.ndarray:
    """The definition: allowed ids, bad words, min_tokens, bias, penalties."""
    out, params = logits.astype(np.float32).copy(), row.params
    if params.allowed_token_ids is not None:
        out[[i for i in range(len(out)) if i not in params.allowed_token_ids]] = -np.inf
    for *begin, end in row.bad_words:
        if begin == row.output[len(row.output) - len(begin) :] or not begin:
            out[end] = -np.inf
    if len(row.output) < params.min_tokens:
        out[list(row.stop_ids)] = -np.inf
    for token_id, bias in (params.logit_bias or {}).items():
        out[token_id] += np.float32(bias)
    for token_id in range(len(out)):
        count = row.output.count(token_id)
        if count or token_id in row.prompt:
            strength = np.float32(params.repetition_penalty)
            out[token_id] = out[token_id] / strength if out[token_id] > 0 else out[token_id] * strength
        out[token_id] -= np.float32(params.frequency_penalty) * np.float32(count)
        out[token_id] -= np.float32(params.presence_penalty) * np.float32(count > 0)
    return out
