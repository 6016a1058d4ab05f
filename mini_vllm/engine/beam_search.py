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
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from mini_vllm.engine.input_processor import InputProcessor, PromptType, TokenizedPrompt
from mini_vllm.engine.llm_engine import LLMEngine
from mini_vllm.engine.protocol import NewRequest, RequestStream
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


class BeamSearch:
    """The searches over some prompts, step by step; whoever drives it has the engine.

    While `wanted()` is not empty: let the engine continue each of these prompts by one token as `step_params` says, and
    hand the logprobs to `advance()`. Raises `InvalidParameterError` when made.
    """

    def __init__(self, processor: InputProcessor, prompts: Sequence[TokenizedPrompt], params: BeamSearchParams) -> None:
        if not isinstance(params, BeamSearchParams):
            raise InvalidParameterError("params", f"must be BeamSearchParams, got {type(params).__name__}")
        eos_token_ids = frozenset(() if params.ignore_eos else processor.eos_token_ids)
        self.params = params
        self.prompts = prompts
        self.tokenizer = processor.tokenizer
        self.step_params = _step_params(processor, params, len(eos_token_ids))
        self.searches = [
            PromptSearch(params, _tokens_left(params.max_tokens, prompt, processor.max_model_len), eos_token_ids)
            for prompt in prompts
        ]

    def wanted(self) -> list[TokenizedPrompt]:
        """The beams of all prompts, each as a prompt of its own; empty when the search is over."""
        return [
            replace(prompt, token_ids=[*prompt.token_ids, *beam.tokens], text=None)
            for prompt, search in zip(self.prompts, self.searches, strict=True)
            for beam in search.beams
        ]

    def advance(self, outputs: Iterable[RequestOutput]) -> None:
        """One step. outputs: of the requests for `wanted()`, in its order. Raises `RequestError` if one failed."""
        answers = map(_logprobs_of, outputs)
        for search in self.searches:
            if search.beams:
                search.advance([next(answers) for _ in search.beams])

    def outputs(self) -> list[BeamSearchOutput]:
        """What was found for each prompt, best first."""
        return [
            BeamSearchOutput([self._sequence(prompt, search, beam) for beam in search.hypotheses])
            for prompt, search in zip(self.prompts, self.searches, strict=True)
        ]

    def _sequence(self, prompt: TokenizedPrompt, search: PromptSearch, beam: _Beam) -> BeamSearchSequence:
        stopped = beam.tokens[-1] in search.eos_token_ids
        shown = beam.tokens if self.params.include_stop_str_in_output or not stopped else beam.tokens[:-1]
        tokens = [*prompt.token_ids, *shown]
        return BeamSearchSequence(
            tokens=tokens,
            logprobs=list(beam.logprobs),
            cum_logprob=beam.cum_logprob,
            text=self.tokenizer.decode(tokens),
            finish_reason="stop" if stopped else "length",
            stop_reason=beam.tokens[-1] if stopped else None,
            score=beam.score(self.params.length_penalty),
        )


def _step_params(processor: InputProcessor, params: BeamSearchParams, num_eos_ids: int) -> SamplingParams:
    """One greedy token, for its logprobs. The width must be within what the engine allows."""
    num_logprobs = min(num_continuations(params.beam_width, num_eos_ids), processor.vocab_size)
    allowed = processor.checker.max_logprobs
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


def _logprobs_of(output: RequestOutput) -> LogprobsAtPosition:
    completion = output.outputs[0]
    if output.error is not None or not completion.logprobs:
        raise RequestError(f"beam search: {output.error or completion.finish_reason}")
    return completion.logprobs[0]


# -- who drives it ---------------------------------------------------------------------------------------------


def beam_search(engine: LLMEngine, prompts: Sequence[PromptType], params: BeamSearchParams) -> list[BeamSearchOutput]:
    """The best continuations of each prompt. Raises `InvalidParameterError`, or `RequestError` if a step fails."""
    search = BeamSearch(engine.input_processor, engine.input_processor.tokenize(prompts), params)
    while wanted := search.wanted():
        search.advance(_run(engine, wanted, search.step_params))
    return search.outputs()


def _run(engine: LLMEngine, prompts: Sequence[TokenizedPrompt], params: SamplingParams) -> list[RequestOutput]:
    """The outputs of one request for each of `prompts`, in their order. No request outlives an error."""
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
    return [outputs[request_id] for request_id in request_ids]


async def drive_beam_search(
    search: BeamSearch, request: NewRequest, add: Callable[[Sequence[NewRequest]], Sequence[RequestStream]]
) -> None:
    """Run a search of one prompt to its end. No request outlives an error or a cancellation.

    request: of the caller; those of the beams have its options, and ids that begin with its own. add: queues requests.
    """
    for step in itertools.count():
        beams = [
            replace(request, request_id=f"{request.request_id}-{step}-{i}", prompt=prompt, params=search.step_params)
            for i, prompt in enumerate(search.wanted())
        ]
        if not beams:
            return
        streams = add(beams)
        try:
            search.advance([await anext(stream) for stream in streams])
        finally:
            for stream in streams:
                await stream.aclose()
