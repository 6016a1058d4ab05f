"""POST /v1/chat/completions: a conversation in, the next message out, streamed or at once."""

from collections.abc import AsyncGenerator, Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from mini_vllm.engine.input_processor import TokenizedPrompt
from mini_vllm.engine.protocol import RequestStream
from mini_vllm.entrypoints.openai.beams import search_beams
from mini_vllm.entrypoints.openai.bodies import (
    ChatAnswer,
    ChatChoice,
    ChatChunkChoice,
    ChatCompletion,
    ChatDelta,
    ChatLogprobs,
    Usage,
)
from mini_vllm.entrypoints.openai.call import Call, UsageCounter, outputs_of
from mini_vllm.entrypoints.openai.chat_prompt import ChatPrompter, Conversation, text_of
from mini_vllm.entrypoints.openai.chat_request import ChatCompletionRequest
from mini_vllm.entrypoints.openai.events import EventWriter, event
from mini_vllm.entrypoints.openai.limits import check_conversation, check_sampling
from mini_vllm.entrypoints.openai.logprobs import ChatLogprobsShaper, prompt_logprobs
from mini_vllm.entrypoints.openai.prompts import truncation_of
from mini_vllm.entrypoints.openai.sampling import chat_params, tokens_to_generate, with_max_tokens
from mini_vllm.entrypoints.server.encoding import json_response
from mini_vllm.entrypoints.server.fields import renamed
from mini_vllm.entrypoints.server.streaming import DONE
from mini_vllm.exceptions import InvalidParameterError
from mini_vllm.outputs import CompletionOutput, RequestOutput
from mini_vllm.sampling_params import SamplingParams

_AFTER_TEXT = b'},"logprobs":null,"finish_reason":null,"token_ids":null'


async def create_chat_completion(body: ChatCompletionRequest, request: Request) -> Response:
    call = Call.begin(request, body, "chatcmpl-")
    engine = call.engine
    check_sampling(body, call.state.args, engine.input_processor.vocab_size)
    check_conversation(body, call.state.args)
    base = chat_params(body, engine.get_default_sampling_params())
    with renamed({"prompt": "messages"}):
        prompt = await ChatPrompter(call.state).prompt(_conversation(body, engine.max_model_len))
    params = with_max_tokens(base, _max_tokens(call, body, prompt))
    answer = ChatCompletionAnswer(call, body, prompt, params)  # what can go wrong here may not strand a request
    start = search_beams(call, [prompt], [params]) if body.use_beam_search else call.submit([prompt], [params])
    streams = await start
    if body.stream:
        return call.stream(answer.events(streams), streams)
    return json_response(answer.whole(*await call.finish(streams)))


def _conversation(body: ChatCompletionRequest, max_model_len: int) -> Conversation:
    variables: dict[str, Any] = dict(body.chat_template_kwargs or {})
    if body.reasoning_effort is not None:
        variables.setdefault("reasoning_effort", body.reasoning_effort)
    _, asked = _asked_tokens(body)
    return Conversation(
        messages=body.messages,
        add_generation_prompt=body.opens_answer,
        continue_final_message=bool(body.continue_final_message),
        documents=body.documents,
        chat_template=body.chat_template,
        variables=variables,
        add_special_tokens=bool(body.add_special_tokens),
        truncation=truncation_of(body, asked or 1, max_model_len),
    )


def _asked_tokens(body: ChatCompletionRequest) -> tuple[str, int | None]:
    """Which of the two fields counts, and what it says."""
    field = "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens"
    asked: int | None = getattr(body, field)
    if asked is not None and asked < 1:
        raise InvalidParameterError(field, f"must be at least 1, got {asked}")
    return field, asked


def _max_tokens(call: Call, body: ChatCompletionRequest, prompt: TokenizedPrompt) -> int:
    field, asked = _asked_tokens(body)
    engine = call.engine
    default = engine.input_processor.default_max_tokens
    return tokens_to_generate(field, asked, default, len(prompt.token_ids), engine.max_model_len)


class ChatCompletionAnswer:
    """The answer to one request, whole or as events, from what the engine puts out."""

    def __init__(
        self, call: Call, body: ChatCompletionRequest, prompt: TokenizedPrompt, params: SamplingParams
    ) -> None:
        self._call = call
        self._body = body
        self._prompt = prompt
        self._num_choices = params.n
        self._role = call.state.args.response_role if body.opens_answer else body.messages[-1].role
        self._usage = UsageCounter([prompt])
        self._shaper = None
        if body.logprobs:
            as_ids = bool(body.return_tokens_as_token_ids)
            self._shaper = ChatLogprobsShaper(call.engine.get_tokenizer(), params, as_ids)
        self._num_tokens: dict[int, int] = {}
        self._writer = EventWriter(call, "chat.completion.chunk", b'"delta":{"content":', _AFTER_TEXT)
        self._is_plain = not (body.logprobs or body.return_token_ids or body.wants_usage_always)
        self._ends_with_usage = body.wants_usage_event or call.state.args.enable_force_include_usage

    @property
    def _echo(self) -> str:
        last = self._body.messages[-1]
        return text_of(last.content) if self._body.echo and last.role == self._role else ""

    # -- at once ----------------------------------------------------------------------------------------------

    def whole(self, output: RequestOutput) -> ChatCompletion:
        self._count(output)
        return ChatCompletion(
            id=self._call.id,
            created=self._call.created,
            model=self._call.model,
            choices=[self._choice(choice) for choice in output.outputs],
            system_fingerprint=self._call.fingerprint,
            usage=self._usage.total(),
            prompt_logprobs=prompt_logprobs(output.prompt_logprobs),
            prompt_token_ids=self._prompt.token_ids if self._body.return_token_ids else None,
            prompt_text=self._prompt.text if self._body.return_prompt_text else None,
        )

    def _choice(self, choice: CompletionOutput) -> ChatChoice:
        return ChatChoice(
            index=choice.index,
            message=ChatAnswer(self._role, self._echo + choice.text),
            logprobs=self._logprobs(choice),
            finish_reason=choice.finish_reason,
            stop_reason=choice.stop_reason,
            token_ids=choice.token_ids if self._body.return_token_ids else None,
        )

    # -- as events --------------------------------------------------------------------------------------------

    async def events(self, streams: Sequence[RequestStream]) -> AsyncGenerator[bytes, None]:
        opening = self._opening()  # together with the first token: its time is what clients measure
        async for _, output in outputs_of(streams, self._body.stream_interval):
            self._count(output)
            frames = opening + b"".join([self._event(choice) for choice in output.outputs])
            opening = b""
            if frames:
                yield frames
        if self._ends_with_usage:
            chunk = self._writer.chunk()
            chunk.usage, chunk.system_fingerprint = self._usage.total(), self._call.fingerprint
            yield event(chunk)
        yield DONE

    def _opening(self) -> bytes:
        """The events that name the role of each choice, and what is echoed."""
        frames = []
        for index in range(self._num_choices):
            chunk = self._writer.chunk(ChatChunkChoice(index, ChatDelta(role=self._role, content="")))
            chunk.prompt_token_ids = self._prompt.token_ids if self._body.return_token_ids else None
            chunk.prompt_text = self._prompt.text if self._body.return_prompt_text else None
            frames.append(event(chunk))
        if echo := self._echo:
            frames += [self._writer.text(index, echo) for index in range(self._num_choices)]
        return b"".join(frames)

    def _event(self, choice: CompletionOutput) -> bytes:
        """Of one choice; none while its text is held back and nothing else is to be told."""
        index, finish_reason = choice.index, choice.finish_reason
        if self._is_plain and finish_reason is None:
            return self._writer.text(index, choice.text) if choice.text else b""
        delta, logprobs = ChatDelta(content=choice.text), self._logprobs(choice)
        shown = ChatChunkChoice(index, delta, logprobs, finish_reason, token_ids=None)
        if self._body.return_token_ids:
            shown.token_ids = choice.token_ids
        if finish_reason is not None:
            shown.stop_reason = choice.stop_reason
        chunk = self._writer.chunk(shown)
        if self._body.wants_usage_always:
            chunk.usage = self._usage_of(choice)
        if finish_reason is not None and not self._ends_with_usage:
            chunk.system_fingerprint = self._call.fingerprint
        return event(chunk)

    def _usage_of(self, choice: CompletionOutput) -> Usage:
        num_output = self._num_tokens[choice.index] = self._num_tokens.get(choice.index, 0) + len(choice.token_ids)
        num_prompt = len(self._prompt.token_ids)
        return Usage(num_prompt, num_prompt + num_output, num_output)

    # -- both -------------------------------------------------------------------------------------------------

    def _count(self, output: RequestOutput) -> None:
        self._usage.note_cached(0, output.num_cached_tokens)
        for choice in output.outputs:
            self._usage.num_output_tokens += len(choice.token_ids)

    def _logprobs(self, choice: CompletionOutput) -> ChatLogprobs | None:
        if self._shaper is None or choice.logprobs is None:
            return None
        return self._shaper.shape(choice.token_ids, choice.logprobs)
