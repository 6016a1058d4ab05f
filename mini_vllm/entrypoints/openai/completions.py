"""POST /v1/completions: prompts in, their continuations out, streamed or at once.

The choices of prompt i are those from i * n on.
"""

from collections.abc import AsyncGenerator, Sequence
from dataclasses import replace

from starlette.requests import Request
from starlette.responses import Response

from mini_vllm.engine.input_processor import TokenizedPrompt
from mini_vllm.engine.protocol import RequestStream
from mini_vllm.entrypoints.openai.beams import search_beams
from mini_vllm.entrypoints.openai.bodies import (
    Completion,
    CompletionChoice,
    CompletionChunkChoice,
    CompletionLogprobs,
    Usage,
)
from mini_vllm.entrypoints.openai.call import Call, UsageCounter, outputs_of
from mini_vllm.entrypoints.openai.completion_request import CompletionRequest
from mini_vllm.entrypoints.openai.events import EventWriter, event
from mini_vllm.entrypoints.openai.limits import check_prompts, check_sampling
from mini_vllm.entrypoints.openai.logprobs import CompletionLogprobsShaper, joined, prompt_logprobs
from mini_vllm.entrypoints.openai.prompts import tokenized, truncation_of
from mini_vllm.entrypoints.openai.sampling import (
    DEFAULT_MAX_TOKENS,
    completion_params,
    tokens_to_generate,
    with_max_tokens,
)
from mini_vllm.entrypoints.server.encoding import json_response
from mini_vllm.entrypoints.server.fields import renamed
from mini_vllm.entrypoints.server.streaming import DONE
from mini_vllm.outputs import CompletionOutput, LogprobsAtPosition, RequestOutput
from mini_vllm.sampling_params import SamplingParams

_AFTER_TEXT = (
    b',"logprobs":null,"finish_reason":null,"stop_reason":null,"prompt_token_ids":null,"token_ids":null'
)  # fmt: skip


async def create_completion(body: CompletionRequest, request: Request) -> Response:
    call = Call.begin(request, body, "cmpl-")
    engine = call.engine
    check_sampling(body, call.state.args, engine.input_processor.vocab_size)
    check_prompts(body, call.state.args)
    base = completion_params(body, engine.get_default_sampling_params())
    prompts = await _prompts(call, body)
    params = [_limited(body, base, prompt, engine.max_model_len) for prompt in prompts]
    answer = CompletionAnswer(call, body, prompts, base)  # what can go wrong here may not strand a request
    start = search_beams(call, prompts, params) if body.use_beam_search else call.submit(prompts, params)
    streams = await start
    if body.stream:
        return call.stream(answer.events(streams), streams)
    return json_response(answer.whole(await call.finish(streams)))


async def _prompts(call: Call, body: CompletionRequest) -> list[TokenizedPrompt]:
    engine = call.engine
    num_output = DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens
    truncation = truncation_of(body, max(num_output, 1), engine.max_model_len)
    add_special_tokens = body.add_special_tokens is not False
    with renamed({"prompt_token_ids": "prompt"}):
        return await engine.run_text_work(
            lambda: tokenized(
                engine.input_processor, body.prompts, add_special_tokens=add_special_tokens, truncation=truncation
            )
        )


def _limited(
    body: CompletionRequest, base: SamplingParams, prompt: TokenizedPrompt, max_model_len: int
) -> SamplingParams:
    num_prompt = len(prompt.token_ids)
    return with_max_tokens(
        base, tokens_to_generate("max_tokens", body.max_tokens, DEFAULT_MAX_TOKENS, num_prompt, max_model_len)
    )


class CompletionAnswer:
    """The answer to one request, whole or as events, from what the engine puts out. params: of any of its prompts."""

    def __init__(
        self, call: Call, body: CompletionRequest, prompts: Sequence[TokenizedPrompt], params: SamplingParams
    ) -> None:
        self._call = call
        self._body = body
        self._params = params
        self._prompts = prompts
        self._tokenizer = call.engine.get_tokenizer()
        self._usage = UsageCounter(prompts)
        self._echoes = [self._echo_of(prompt) if body.echo else "" for prompt in prompts]
        self._shapers: dict[int, CompletionLogprobsShaper] = {}
        self._prompt_logprobs: dict[int, Sequence[LogprobsAtPosition | None]] = {}
        self._num_tokens: dict[int, int] = {}
        self._writer = EventWriter(call, "text_completion", b'"text":', _AFTER_TEXT)
        self._is_plain = not (
            params.wants_logprobs or body.return_token_ids or body.echo or body.only_scores or body.wants_usage_always
        )
        self._ends_with_usage = body.wants_usage_event or call.state.args.enable_force_include_usage

    def _echo_of(self, prompt: TokenizedPrompt) -> str:
        if prompt.text is not None:
            return prompt.text
        return self._tokenizer.decode(prompt.token_ids, self._params.skip_special_tokens)

    # -- at once ----------------------------------------------------------------------------------------------

    def whole(self, outputs: Sequence[RequestOutput]) -> Completion:
        choices = [
            self._choice(number, output, choice)
            for number, output in enumerate(outputs)
            for choice in self._taken(number, output)
        ]
        return Completion(
            id=self._call.id,
            created=self._call.created,
            model=self._call.model,
            choices=choices,
            system_fingerprint=self._call.fingerprint,
            usage=self._usage.total(),
        )

    def _choice(self, number: int, output: RequestOutput, choice: CompletionOutput) -> CompletionChoice:
        shows_ids = self._body.return_token_ids
        return CompletionChoice(
            index=self._index(number, choice),
            text=self._echoes[number] + choice.text,
            logprobs=self._logprobs(number, choice, is_first=True),
            finish_reason=choice.finish_reason,
            stop_reason=choice.stop_reason,
            token_ids=choice.token_ids if shows_ids else None,
            prompt_logprobs=prompt_logprobs(output.prompt_logprobs),
            prompt_token_ids=self._prompts[number].token_ids if shows_ids else None,
        )

    # -- as events --------------------------------------------------------------------------------------------

    async def events(self, streams: Sequence[RequestStream]) -> AsyncGenerator[bytes, None]:
        async for number, output in outputs_of(streams, self._body.stream_interval):
            if frames := b"".join([self._event(number, choice) for choice in self._taken(number, output)]):
                yield frames
        if self._ends_with_usage:
            chunk = self._writer.chunk()
            chunk.usage, chunk.system_fingerprint = self._usage.total(), self._call.fingerprint
            yield event(chunk)
        yield DONE

    def _event(self, number: int, choice: CompletionOutput) -> bytes:
        """Of one choice; none while its text is held back and nothing else is to be told."""
        index = self._index(number, choice)
        if self._is_plain and choice.finish_reason is None:
            return self._writer.text(index, choice.text) if choice.text else b""
        is_first = index not in self._num_tokens
        self._num_tokens[index] = self._num_tokens.get(index, 0) + len(choice.token_ids)
        ids = self._prompts[number].token_ids if self._body.return_token_ids else None
        chunk = self._writer.chunk(
            CompletionChunkChoice(
                index=index,
                text=self._echoes[number] + choice.text if is_first else choice.text,
                logprobs=self._logprobs(number, choice, is_first),
                finish_reason=choice.finish_reason,
                stop_reason=choice.stop_reason,
                prompt_token_ids=ids if is_first else None,
                token_ids=choice.token_ids if self._body.return_token_ids else None,
            )
        )
        if self._body.wants_usage_always:
            num_prompt, num_output = self._usage.num_prompt_tokens[number], self._num_tokens[index]
            chunk.usage = Usage(num_prompt, num_prompt + num_output, num_output)
        if choice.finish_reason is not None and not self._ends_with_usage:
            chunk.system_fingerprint = self._call.fingerprint
        return event(chunk)

    # -- both -------------------------------------------------------------------------------------------------

    def _index(self, number: int, choice: CompletionOutput) -> int:
        return number * self._params.n + choice.index

    def _taken(self, number: int, output: RequestOutput) -> list[CompletionOutput]:
        """The choices that have news, counted."""
        self._usage.note_cached(number, output.num_cached_tokens)
        if output.prompt_logprobs is not None:
            self._prompt_logprobs[number] = output.prompt_logprobs
        choices = [_without_output(c) for c in output.outputs] if self._body.only_scores else output.outputs
        for choice in choices:
            self._usage.num_output_tokens += len(choice.token_ids)
        return choices

    def _logprobs(self, number: int, choice: CompletionOutput, is_first: bool) -> CompletionLogprobs | None:
        """Of the tokens in `choice`, and in front of the first ones those of an echoed prompt."""
        if choice.logprobs is None:
            return None
        index = self._index(number, choice)
        shaper = self._shapers.get(index) or self._shapers.setdefault(index, self._new_shaper(number))
        shaped = shaper.output(choice.token_ids, choice.logprobs)
        echoed = self._prompt_logprobs.get(number) if self._body.echo and is_first else None
        return shaped if echoed is None else joined(shaper.prompt(echoed), shaped)

    def _new_shaper(self, number: int) -> CompletionLogprobsShaper:
        as_ids = bool(self._body.return_tokens_as_token_ids)
        ids = self._prompts[number].token_ids
        return CompletionLogprobsShaper(self._tokenizer, self._params, as_ids, ids, len(self._echoes[number]))


def _without_output(choice: CompletionOutput) -> CompletionOutput:
    """The core makes at least one token; where none was asked for, nobody sees it."""
    logprobs: list[LogprobsAtPosition] | None = None if choice.logprobs is None else []
    reason = "abort" if choice.finish_reason == "abort" else "length"
    return replace(choice, text="", token_ids=[], logprobs=logprobs, finish_reason=reason, stop_reason=None)
