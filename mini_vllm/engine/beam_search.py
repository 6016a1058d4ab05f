"""Beam search, driven from outside the core: the engine only ever sees requests for one token with logprobs.

Each step asks for the continuation of every beam of every prompt at once. A beam's prompt is all of its tokens, so
that its full blocks are found in the prefix cache and beams share what they have in common; what is left to compute is
less than a block a beam. Which beams go on is decided here, with the rules of transformers' `generate(num_beams=...)`:

- A candidate's sum is the log-probability of all its output tokens. Of all continuations of all beams the best
  `2 * beam_width` are looked at (more, when several tokens end a sequence, so that enough of them go on).
- Those that end (end of sequence, or `max_tokens`) become hypotheses if they are among the best `beam_width`; the best
  `beam_width` of the others are the next beams.
- Hypotheses are ranked by sum / (number of output tokens ** length_penalty), the end of sequence counted.
- The search of a prompt ends when it has `beam_width` hypotheses and the best beam, at its present length, would not
  rank before the last of them (transformers' `early_stopping=False`).
"""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from mini_vllm.engine.input_processor import PromptType, TokenizedPrompt
from mini_vllm.engine.llm_engine import LLMEngine
from mini_vllm.exceptions import InvalidParameterError, RequestError
from mini_vllm.outputs import BeamSearchOutput, BeamSearchSequence, LogprobsAtPosition, RequestOutput
from mini_vllm.sampling_params import BeamSearchParams, RequestOutputKind, SamplingParams

_request_numbers = itertools.count()


@dataclass(frozen=True)
class _Beam:
    """Output tokens so far, the logprobs that each was chosen from, and the sum."""

    tokens: tuple[int, ...] = ()
    logprobs: tuple[LogprobsAtPosition, ...] = ()
    cum_logprob: float = 0.0

    def extended(self, token_id: int, logprobs: LogprobsAtPosition) -> "_Beam":
        total = self.cum_logprob + logprobs[token_id].logprob
        return _Beam((*self.tokens, token_id), (*self.logprobs, logprobs), total)

    def score(self, length_penalty: float) -> float:
        return float(self.cum_logprob / len(self.tokens) ** length_penalty)


class PromptSearch:
    """The search over the continuations of one prompt.

    beams: those that go on, best first; empty when the search is over. hypotheses: those that are complete, best first.
    max_tokens: where a beam is cut. eos_token_ids: empty when the end of sequence is ignored.
    """

    def __init__(self, params: BeamSearchParams, max_tokens: int, eos_token_ids: frozenset[int]) -> None:
        self.width = params.beam_width
        self.length_penalty = params.length_penalty
        self.max_tokens = max_tokens
        self.eos_token_ids = eos_token_ids
        self.beams = [_Beam()]
        self.hypotheses: list[_Beam] = []

    def advance(self, continuations: Sequence[LogprobsAtPosition]) -> None:
        """One step. continuations: for each of `beams`, logprobs of its likeliest next tokens."""
        candidates = self._best_candidates(continuations)
        ended = [self._has_ended(candidate) for candidate in candidates]
        self._keep([c for c, end in zip(candidates[: self.width], ended, strict=False) if end])
        self.beams = [c for c, end in zip(candidates, ended, strict=True) if not end][: self.width]
        if self.beams and not self._can_improve():
            self.beams = []

    def _best_candidates(self, continuations: Sequence[LogprobsAtPosition]) -> list[_Beam]:
        count = num_continuations(self.width, len(self.eos_token_ids))
        sums = [
            (-(beam.cum_logprob + entry.logprob), index, token_id)
            for index, (beam, logprobs) in enumerate(zip(self.beams, continuations, strict=True))
            for token_id, entry in logprobs.items()
            if entry.logprob > float("-inf")
        ]
        best = sorted(sums)[:count]
        return [self.beams[index].extended(token_id, continuations[index]) for _, index, token_id in best]

    def _has_ended(self, beam: _Beam) -> bool:
        return beam.tokens[-1] in self.eos_token_ids or len(beam.tokens) >= self.max_tokens

    def _keep(self, complete: list[_Beam]) -> None:
        ranked = sorted(self.hypotheses + complete, key=lambda beam: -beam.score(self.length_penalty))
        self.hypotheses = ranked[: self.width]

    def _can_improve(self) -> bool:
        if len(self.hypotheses) < self.width:
            return True
        return self.beams[0].score(self.length_penalty) > self.hypotheses[-1].score(self.length_penalty)


def num_continuations(beam_width: int, num_eos_ids: int) -> int:
    """Continuations of a beam that may matter: all that could end, and as many again as can go on."""
    return max(2, 1 + num_eos_ids) * beam_width


def beam_search(engine: LLMEngine, prompts: Sequence[PromptType], params: BeamSearchParams) -> list[BeamSearchOutput]:
    """The best continuations of each prompt. Raises `InvalidParameterError`, or `RequestError` if a step fails."""
    if not isinstance(params, BeamSearchParams):
        raise InvalidParameterError("params", f"must be BeamSearchParams, got {type(params).__name__}")
    processor = engine.input_processor
    eos_token_ids = frozenset(() if params.ignore_eos else processor.eos_token_ids)
    step_params = _step_params(engine, params, len(eos_token_ids))
    tokenized = processor.tokenize(prompts)
    searches = [
        PromptSearch(params, _tokens_left(params.max_tokens, prompt, engine.max_model_len), eos_token_ids)
        for prompt in tokenized
    ]
    while any(search.beams for search in searches):
        answers = iter(_next_tokens(engine, list(_beam_prompts(tokenized, searches)), step_params))
        for search in searches:
            if search.beams:
                search.advance([next(answers) for _ in search.beams])
    return [_output(engine, prompt, search, params) for prompt, search in zip(tokenized, searches, strict=True)]


def _step_params(engine: LLMEngine, params: BeamSearchParams, num_eos_ids: int) -> SamplingParams:
    """One greedy token, for its logprobs. The width must be within what the engine allows."""
    vocab_size = engine.input_processor.vocab_size
    num_logprobs = min(num_continuations(params.beam_width, num_eos_ids), vocab_size)
    allowed = engine.input_processor.checker.max_logprobs
    if num_logprobs > allowed:
        raise InvalidParameterError(
            "beam_width",
            f"{params.beam_width} beams look at {num_logprobs} logprobs each, the engine allows at most {allowed} "
            "(max_logprobs; -1 allows all)",
        )
    return SamplingParams(
        temperature=0.0,
        max_tokens=1,
        ignore_eos=True,
        logprobs=num_logprobs,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


def _tokens_left(max_tokens: int, prompt: TokenizedPrompt, max_model_len: int) -> int:
    return min(max_tokens, max_model_len - len(prompt.token_ids))


def _beam_prompts(prompts: Iterable[TokenizedPrompt], searches: Iterable[PromptSearch]) -> Iterator[TokenizedPrompt]:
    for prompt, search in zip(prompts, searches, strict=True):
        for beam in search.beams:
            yield replace(prompt, token_ids=[*prompt.token_ids, *beam.tokens], text=None)


def _next_tokens(
    engine: LLMEngine, prompts: Sequence[TokenizedPrompt], params: SamplingParams
) -> list[LogprobsAtPosition]:
    """Logprobs of the likeliest tokens after each of `prompts`, in their order. No request outlives an error."""
    request_ids = [f"beam-{next(_request_numbers)}" for _ in prompts]
    wanted = set(request_ids)
    outputs: dict[str, RequestOutput] = {}
    try:
        for request_id, prompt in zip(request_ids, prompts, strict=True):
            engine.add_request(request_id, prompt, params)
        while len(outputs) < len(request_ids):
            outputs.update((output.request_id, output) for output in engine.step() if output.request_id in wanted)
    except BaseException:
        engine.abort_request(request_ids)
        raise
    return [_logprobs_of(outputs[request_id]) for request_id in request_ids]


def _logprobs_of(output: RequestOutput) -> LogprobsAtPosition:
    if output.error is not None:
        raise RequestError(f"beam search: {output.error}")
    logprobs = output.outputs[0].logprobs
    assert logprobs, "the worker reported no logprobs"
    return logprobs[0]


def _output(
    engine: LLMEngine, prompt: TokenizedPrompt, search: PromptSearch, params: BeamSearchParams
) -> BeamSearchOutput:
    return BeamSearchOutput([_sequence(engine, prompt, search, params, beam) for beam in search.hypotheses])


def _sequence(
    engine: LLMEngine, prompt: TokenizedPrompt, search: PromptSearch, params: BeamSearchParams, beam: _Beam
) -> BeamSearchSequence:
    stopped = beam.tokens[-1] in search.eos_token_ids
    shown = beam.tokens if params.include_stop_str_in_output or not stopped else beam.tokens[:-1]
    tokens = [*prompt.token_ids, *shown]
    return BeamSearchSequence(
        tokens=tokens,
        logprobs=list(beam.logprobs),
        cum_logprob=beam.cum_logprob,
        text=engine.get_tokenizer().decode(tokens),
        finish_reason="stop" if stopped else "length",
        stop_reason=beam.tokens[-1] if stopped else None,
        score=beam.score(search.length_penalty),
    )
