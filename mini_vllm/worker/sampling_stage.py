"""From a step's logits to its tokens: the half of the model runner that knows what requests asked of decoding.

It is handed the rows that sample and their logits, and returns tokens, log-probabilities and errors by request. It
keeps the sampler's memory of rows in step with the input batch, and the seeds of requests that brought none.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

from mini_vllm.core.scheduler_output import ModelRunnerOutput, NewRequestData, PromptLogprobs, TokenLogprobs
from mini_vllm.sampling.draws import uniforms_of
from mini_vllm.sampling.history import History, StepRows
from mini_vllm.sampling.logits_processor import LogitsProcessor
from mini_vllm.sampling.logprobs import token_logprobs
from mini_vllm.sampling.metadata import NOTHING_BUT_GREEDY, SamplingMetadata, Uniforms, seed_key
from mini_vllm.sampling.sampler import NO_TOKEN, Sampler
from mini_vllm.sampling.state import SamplingState
from mini_vllm.sampling_params import SamplingParams
from mini_vllm.worker.input_batch import InputBatch, Rows
from mini_vllm.worker.prepare_inputs import StepInputs

Int64 = npt.NDArray[np.int64]

NO_TOKEN_MESSAGE = "the model's logits allow no token: they are all -inf, or NaN or +inf is among them"
_RESTRICTING = ("allowed_token_ids", "bad_words", "min_tokens", "logit_bias", "logits_processors")
_PROJECTED_AT_ONCE = 1 << 24
"""Logits of prompt tokens that are in memory at once: 64 MiB."""


@dataclass(slots=True)
class Draws:
    """What a step draws: a token for each row that samples, then the first tokens of the children that part from them.

    rows: `[R]` the rows that sample. req_ids: a draw each. logits_row: a draw each, the number (of R) of the row whose
    logits it is drawn from; None without children. seeds: the children's.
    """

    rows: Int64
    req_ids: list[str]
    logits_row: Int64 | None = None
    seeds: list[int] = field(default_factory=list)


class SamplingStage:
    """Follows the input batch: `add` after a row was added, `remove` instead of the batch's own."""

    def __init__(
        self, batch: InputBatch, vocab_size: int, processors: Sequence[LogitsProcessor], entropy: np.random.Generator
    ) -> None:
        self.batch = batch
        history = History(batch.token_ids, batch.num_tokens, batch.num_prompt_tokens)
        self.state = SamplingState(history, batch.seed, vocab_size, processors)
        self.params: dict[str, SamplingParams] = {}
        self._vocab_size = vocab_size
        self._entropy = entropy
        self._drawn_seeds: dict[str, int] = {}
        """Seeds of requests that brought none, kept while they live: a preemption must not change their tokens."""
        self._want_logprobs: set[str] = set()
        self._want_prompt: dict[str, int] = {}
        """How many of the likeliest, of requests whose prompt is being computed."""
        self._refused: dict[str, str] = {}
        """What is wrong with the parameters of rows; said when they sample."""

    # -- rows come and go --------------------------------------------------------------------------------------

    def add(self, new: NewRequestData) -> None:
        """Take a request into the batch. Raises ValueError as `InputBatch.add_row` does."""
        params = new.sampling_params
        row = self.batch.add_row(new, self._seed_of(new.req_id, params.seed, new.sample_index))
        self.params[new.req_id] = params
        message = self.state.add(row, params, new.all_stop_token_ids, new.bad_words_token_ids)
        if message is not None:
            self._refused[new.req_id] = message
        if params.wants_logprobs:
            self._want_logprobs.add(new.req_id)
        if params.prompt_logprobs is not None and len(new.token_ids) == new.num_prompt_tokens:
            self._want_prompt[new.req_id] = params.prompt_logprobs

    def remove(self, req_id: str) -> None:
        """Drop a request's row. A plan may repeat what an earlier one said, so it may be gone already."""
        if req_id not in self.batch:
            return
        row = self.batch.row_of[req_id]
        move = self.batch.remove_row(req_id)
        self.state.remove(row, None if move is None else move.source)
        del self.params[req_id]
        self._want_logprobs.discard(req_id)
        self._want_prompt.pop(req_id, None)
        self._refused.pop(req_id, None)

    def forget_seed(self, req_id: str) -> None:
        """A request is over for good."""
        self._drawn_seeds.pop(req_id, None)

    def _seed_of(self, req_id: str, seed: int | None, sample_index: int) -> int:
        if seed is not None:
            return seed_key(seed, sample_index)
        if req_id not in self._drawn_seeds:
            self._drawn_seeds[req_id] = int(self._entropy.integers(2**64, dtype=np.uint64))
        return self._drawn_seeds[req_id]

    # -- a step ------------------------------------------------------------------------------------------------

    def sample(
        self, inputs: StepInputs, logits: torch.Tensor, sampler: Sampler, forks: Mapping[str, Sequence[str]]
    ) -> ModelRunnerOutput:
        """One token for every row that samples and for every child that parts from one. Logits may be changed."""
        if self._is_plain and not forks:
            return self._sample_plainly(inputs, logits, sampler)
        draws = self._draws(inputs, forks)
        step = StepRows(draws.rows, self.batch.num_rows)
        metadata = self._metadata(inputs, draws, step)
        wanting = self._wanting(draws)
        at = wanting if draws.logits_row is None else draws.logits_row[wanting]
        raw = logits
        if len(wanting) and metadata.edit is not None:  # keep them before anything changes them
            raw, at = logits[torch.from_numpy(at).to(logits.device)], np.arange(len(at))
        token_ids = sampler(logits, metadata)
        output = self._output(inputs, draws, token_ids.cpu().numpy())
        if len(wanting):
            self._add_logprobs(output, draws, wanting, raw, at, token_ids)
        return output

    @property
    def _is_plain(self) -> bool:
        """Whether all rows are greedy and none asks for anything beside its token."""
        return self.state.is_idle and not (self.batch.num_random or self._want_logprobs or self._refused)

    def _sample_plainly(self, inputs: StepInputs, logits: torch.Tensor, sampler: Sampler) -> ModelRunnerOutput:
        """What `sample` comes to then, which is what most steps are."""
        token_ids = sampler(logits, NOTHING_BUT_GREEDY).cpu().numpy()
        sampled = token_ids.tolist()
        if min(sampled) == NO_TOKEN:
            self.state.errors = {}
            return self._output(inputs, self._draws(inputs, {}), token_ids)
        self.batch.append_sampled(inputs.sampling_rows, token_ids)
        return ModelRunnerOutput(list(inputs.req_ids), _ragged(inputs, sampled))

    def _draws(self, inputs: StepInputs, forks: Mapping[str, Sequence[str]]) -> Draws:
        rows = inputs.sampling_rows
        if isinstance(rows, slice):
            draws = Draws(self.batch.row_numbers(rows), self.batch.req_ids[rows])
        else:
            draws = Draws(rows, [self.batch.req_ids[row] for row in rows.tolist()])
        if forks:
            self._add_children(draws, forks)
        return draws

    def _add_children(self, draws: Draws, forks: Mapping[str, Sequence[str]]) -> None:
        logits_row = list(range(len(draws.rows)))
        for parent, at in zip(tuple(draws.req_ids), tuple(logits_row), strict=True):
            for index, child in enumerate(forks.get(parent, ()), start=1):
                draws.req_ids.append(child)
                draws.seeds.append(self._seed_of(child, self.params[parent].seed, index))
                logits_row.append(at)
        draws.logits_row = np.array(logits_row, dtype=np.int64)

    def _metadata(self, inputs: StepInputs, draws: Draws, step: StepRows) -> SamplingMetadata:
        rows = inputs.sampling_rows if draws.logits_row is None else draws.rows[draws.logits_row]
        return self.batch.make_sampling_metadata(
            rows,
            self._uniforms(draws),
            logits_row=draws.logits_row,
            edit=self.state.edit(step),
            rescale=self.state.rescale(step),
        )

    def _uniforms(self, draws: Draws) -> Uniforms:
        if draws.logits_row is None:
            return lambda numbers: self.state.draws.take(
                draws.rows[numbers], self.batch.num_output_tokens(draws.rows[numbers])
            )
        seeds = np.concatenate((self.batch.seed[draws.rows], np.array(draws.seeds, dtype=np.uint64)))
        return uniforms_of(seeds, self.batch.num_output_tokens(draws.rows[draws.logits_row]))

    # -- what a step says --------------------------------------------------------------------------------------

    def _output(self, inputs: StepInputs, draws: Draws, token_ids: Int64) -> ModelRunnerOutput:
        errors = self._errors(draws, token_ids)
        own = token_ids[: len(draws.rows)]
        if errors:
            succeeded = np.array([req_id not in errors for req_id in draws.req_ids[: len(own)]])
            self._append(draws.rows[succeeded], own[succeeded])
        else:
            self._append(inputs.sampling_rows, own)
        output = ModelRunnerOutput(list(inputs.req_ids), _ragged(inputs, own.tolist()), errors=errors)
        for child, token_id in zip(draws.req_ids[len(own) :], token_ids[len(own) :].tolist(), strict=True):
            output.req_ids.append(child)
            output.sampled_token_ids.append([token_id])
        for index, req_id in enumerate(output.req_ids if errors else ()):
            if req_id in errors:
                output.sampled_token_ids[index] = []
        return output

    def _append(self, rows: Rows, token_ids: Int64) -> None:
        self.batch.append_sampled(rows, token_ids)
        self.state.append(self.batch.row_numbers(rows), token_ids)

    def _errors(self, draws: Draws, token_ids: Int64) -> dict[str, str]:
        if not self._refused and token_ids.min() != NO_TOKEN:
            return {}
        failed = token_ids == NO_TOKEN
        errors = {req_id: message for req_id, message in self._refused.items() if req_id in draws.req_ids}
        for number, req_id in enumerate(draws.req_ids):
            at = number if draws.logits_row is None else int(draws.logits_row[number])
            parent = draws.req_ids[at]
            if parent in self._refused:
                errors[req_id] = self._refused[parent]
            elif failed[number]:
                errors[req_id] = self.state.errors.get(at) or _no_token(self.params[parent])
        return errors

    # -- log-probabilities -------------------------------------------------------------------------------------

    def _wanting(self, draws: Draws) -> Int64:
        """Numbers of the draws of which log-probabilities are reported."""
        if not self._want_logprobs:
            return np.zeros(0, dtype=np.int64)
        wants = np.array([req_id in self._want_logprobs for req_id in draws.req_ids[: len(draws.rows)]])
        return np.flatnonzero(wants if draws.logits_row is None else wants[draws.logits_row])

    def _add_logprobs(
        self,
        output: ModelRunnerOutput,
        draws: Draws,
        wanting: Int64,
        raw: torch.Tensor,
        at: Int64,
        token_ids: torch.Tensor,
    ) -> None:
        """Of the draws `wanting`, from rows `at` of the raw logits."""
        parents = wanting if draws.logits_row is None else draws.logits_row[wanting]
        params = [self.params[draws.req_ids[number]] for number in parents.tolist()]
        found = token_logprobs(
            raw,
            token_ids[torch.from_numpy(wanting).to(raw.device)].clamp(min=0),  # rows that failed are left out below
            [0 if p.logprobs is None else p.logprobs for p in params],
            [p.logprob_token_ids or () for p in params],
            at,
        )
        for number, entry in zip(wanting.tolist(), found, strict=True):
            if draws.req_ids[number] not in output.errors:
                output.logprobs[draws.req_ids[number]] = [entry]

    def prompt_logprobs(
        self, inputs: StepInputs, hidden: torch.Tensor, project: Callable[[torch.Tensor], torch.Tensor]
    ) -> dict[str, PromptLogprobs]:
        """Of the prompt tokens that this step's chunks predict, for the requests that ask.

        hidden: `[N, hidden]` of the step's tokens. project: from hidden rows to logits, given some rows at a time.
        """
        found = {}
        for index, req_id in enumerate(inputs.req_ids if self._want_prompt else ()):
            if req_id in self._want_prompt:
                start, targets = self._prompt_targets(inputs, index, req_id)
                if len(targets):
                    first = int(inputs.attention[0].query_start_loc_cpu[index])
                    chunk = hidden[first : first + len(targets)]
                    found[req_id] = PromptLogprobs(start + 1, self._prompt_entries(req_id, chunk, targets, project))
        return found

    def _prompt_targets(self, inputs: StepInputs, index: int, req_id: str) -> tuple[int, npt.NDArray[np.int32]]:
        """(position of the chunk's first token, the prompt tokens that follow those of the chunk)."""
        row = self.batch.row_of[req_id]
        start = int(self.batch.num_computed_tokens[row])
        end = min(int(inputs.attention[0].seq_lens_cpu[index]) + 1, int(self.batch.num_prompt_tokens[row]))
        return start, self.batch.token_ids[row, start + 1 : end]

    def _prompt_entries(
        self,
        req_id: str,
        hidden: torch.Tensor,
        targets: npt.NDArray[np.int32],
        project: Callable[[torch.Tensor], torch.Tensor],
    ) -> list[TokenLogprobs]:
        entries: list[TokenLogprobs] = []
        target_ids = torch.from_numpy(targets.astype(np.int64)).to(hidden.device)
        size = max(1, _PROJECTED_AT_ONCE // self._vocab_size)
        for part, ids in zip(hidden.split(size), target_ids.split(size), strict=True):
            entries += token_logprobs(project(part), ids, [self._want_prompt[req_id]] * len(ids))
        return entries


def _no_token(params: SamplingParams) -> str:
    restricting = [name for name in _RESTRICTING if getattr(params, name)]
    if not restricting:
        return NO_TOKEN_MESSAGE
    return f"{NO_TOKEN_MESSAGE}, or {', '.join(restricting)} of the request leave none"


def _ragged(inputs: StepInputs, token_ids: list[int]) -> list[list[int]]:
    """One list a request of the step: its token, or nothing if it did not sample."""
    sampled = [[token_id] for token_id in token_ids]
    if len(sampled) == len(inputs.req_ids):
        return sampled
    answers = iter(sampled)
    return [next(answers) if count else [] for count in inputs.num_logits.tolist()]
