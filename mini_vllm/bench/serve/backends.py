"""The APIs a load generator speaks: what one request's body is, and what one streamed event says.

Each backend is a body and a reader of events. A reader turns the JSON of an event into a `Piece`; `StreamReading` puts
pieces and arrival times together. How many tokens there were is what the server's usage says, never the number of
events: a server may put several tokens into one.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import msgspec

from mini_vllm.bench.serve.datasets import ServeRequest
from mini_vllm.bench.serve.options import SAMPLING, ServeOptions


class Piece(msgspec.Struct, frozen=True, gc=False):
    """What one event said. text: None when it carries no token. Counts are totals so far, None when not told."""

    text: str | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    cached_tokens: int | None = None
    finish_reason: str | None = None
    error: str | None = None


@dataclass
class StreamReading:
    """The tokens of one answer as they came in. times: of the events that carried tokens."""

    times: list[float] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    totals: list[int | None] = field(default_factory=list)
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    cached_tokens: int | None = None
    finish_reason: str | None = None
    error: str | None = None

    def add(self, now: float, piece: Piece) -> None:
        if piece.text is not None:
            self.times.append(now)
            self.texts.append(piece.text)
            self.totals.append(piece.completion_tokens)
        for name in ("prompt_tokens", "completion_tokens", "cached_tokens", "finish_reason", "error"):
            value = getattr(piece, name)
            if value is not None:
                setattr(self, name, value)

    @property
    def text(self) -> str:
        return "".join(self.texts)

    def timed_counts(self, total: int) -> tuple[list[float], list[int]]:
        """(times, tokens at each) of `total` tokens.

        Where each event told the count so far, the counts are exact. Else the tokens are dealt out evenly in order;
        events beyond the last token (an empty one that only says why it ended) are left out.
        """
        if self.totals and all(count is not None for count in self.totals) and self.totals[-1] == total:
            ends = [count or 0 for count in self.totals]
        else:
            events = min(len(self.times), total)
            ends = [round(total * (index + 1) / events) for index in range(events)]
        counts = [end - start for start, end in zip([0, *ends], ends, strict=False)]
        timed = [(when, count) for when, count in zip(self.times, counts, strict=False) if count > 0]
        return [when for when, _ in timed], [count for _, count in timed]


# --- what events look like ------------------------------------------------------------------------------------


class _Cached(msgspec.Struct):
    cached_tokens: int | None = None


class _Usage(msgspec.Struct):
    """Of all the APIs: OpenAI's older one says prompt and completion, the others input and output."""

    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    input_tokens: int | None = None
    output_tokens: int | None = None
    prompt_tokens_details: _Cached | None = None
    input_tokens_details: _Cached | None = None
    cache_read_input_tokens: int | None = None

    @property
    def cached(self) -> int | None:
        details = self.prompt_tokens_details or self.input_tokens_details
        return details.cached_tokens if details else self.cache_read_input_tokens


class _Delta(msgspec.Struct):
    content: str | None = None
    reasoning: str | None = None
    role: str | None = None


class _Choice(msgspec.Struct):
    text: str | None = None
    delta: _Delta | None = None
    finish_reason: str | None = None


class _OpenAIEvent(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: Any = None


class _Stop(msgspec.Struct):
    text: str | None = None
    stop_reason: str | None = None


class _Message(msgspec.Struct):
    usage: _Usage | None = None


class _AnthropicEvent(msgspec.Struct):
    type: str = ""
    delta: _Stop | None = None
    message: _Message | None = None
    usage: _Usage | None = None
    error: Any = None


class _ResponseObject(msgspec.Struct):
    status: str | None = None
    usage: _Usage | None = None
    error: Any = None


class _ResponsesEvent(msgspec.Struct):
    type: str = ""
    delta: Any = None
    response: _ResponseObject | None = None
    message: str | None = None


_openai_event = msgspec.json.Decoder(_OpenAIEvent)
_anthropic_event = msgspec.json.Decoder(_AnthropicEvent)
_responses_event = msgspec.json.Decoder(_ResponsesEvent)
_DONE = b"[DONE]"


def _read_completion(data: bytes) -> Piece:
    if data == _DONE:
        return Piece()
    return _openai_piece(_openai_event.decode(data), lambda choice: choice.text or "")


def _read_chat(data: bytes) -> Piece:
    if data == _DONE:
        return Piece()
    return _openai_piece(_openai_event.decode(data), _chat_text)


def _chat_text(choice: _Choice) -> str | None:
    """None for the opening event, which names the role before there is a token."""
    delta = choice.delta or _Delta()
    text = (delta.reasoning or "") + (delta.content or "")
    opening = delta.role is not None and not text and choice.finish_reason is None
    return None if opening else text


def _openai_piece(event: _OpenAIEvent, text_of: Callable[[_Choice], str | None]) -> Piece:
    usage = event.usage or _Usage()
    choice = event.choices[0] if event.choices else None
    return Piece(
        text=text_of(choice) if choice else None,
        prompt_tokens=usage.prompt_tokens,
        completion_tokens=usage.completion_tokens,
        cached_tokens=usage.cached,
        finish_reason=choice.finish_reason if choice else None,
        error=_message_of(event.error),
    )


def _read_anthropic(data: bytes) -> Piece:
    event = _anthropic_event.decode(data)
    usage = event.usage or (event.message.usage if event.message else None) or _Usage()
    delta = event.delta or _Stop()
    final = event.type == "message_delta"
    return Piece(
        text=delta.text,
        prompt_tokens=_sum_of(usage.input_tokens, usage.cache_read_input_tokens),
        completion_tokens=usage.output_tokens if final else None,
        cached_tokens=usage.cache_read_input_tokens,
        finish_reason=delta.stop_reason,
        error=_message_of(event.error),
    )


def _sum_of(input_tokens: int | None, cached: int | None) -> int | None:
    """Anthropic's input_tokens leave out those that were read from the cache."""
    return None if input_tokens is None else input_tokens + (cached or 0)


def _read_responses(data: bytes) -> Piece:
    if data == _DONE:
        return Piece()
    event = _responses_event.decode(data)
    if event.type in ("response.output_text.delta", "response.reasoning_text.delta"):
        return Piece(text=event.delta if isinstance(event.delta, str) else "")
    if event.type == "error":
        return Piece(error=event.message or "the server sent an error event")
    response = event.response or _ResponseObject()
    usage, ended = response.usage or _Usage(), event.type in ("response.completed", "response.incomplete")
    return Piece(
        prompt_tokens=usage.input_tokens,
        completion_tokens=usage.output_tokens if ended else None,
        cached_tokens=usage.cached,
        finish_reason=response.status if ended else None,
        error=_message_of(response.error) or ("the response failed" if event.type == "response.failed" else None),
    )


def _message_of(error: Any) -> str | None:
    if error is None:
        return None
    return str(error.get("message") or error) if isinstance(error, dict) else str(error)


READERS: dict[str, Callable[[bytes], Piece]] = {
    "completions": _read_completion,
    "chat": _read_chat,
    "responses": _read_responses,
    "messages": _read_anthropic,
}
"""From the data of an event to its `Piece`, by `ServeOptions.path_kind`. Raise `msgspec.MsgspecError`."""


# --- what is sent ---------------------------------------------------------------------------------------------


def request_body(options: ServeOptions, model: str, request: ServeRequest) -> bytes:
    """The JSON of one request. `--extra-body` has the last word."""
    kind = options.path_kind
    body: dict[str, Any] = {"model": model, "stream": True, **_prompt_fields(kind, request)}
    body |= {name: value for name in SAMPLING if (value := getattr(options, name)) is not None}
    if kind in ("completions", "chat"):
        body["stream_options"] = {"include_usage": True}
        if options.logprobs is not None:
            chat = {"logprobs": True, "top_logprobs": options.logprobs}
            body |= chat if kind == "chat" else {"logprobs": options.logprobs}
    if options.ignore_eos:
        body["ignore_eos"] = True
    return json.dumps(body | options.extra_body, ensure_ascii=False, allow_nan=False).encode()


def _prompt_fields(kind: str, request: ServeRequest) -> dict[str, Any]:
    if kind == "completions":
        return {"prompt": request.prompt, "max_tokens": request.output_len}
    if kind == "responses":
        return {"input": request.prompt, "max_output_tokens": request.output_len, "store": False}
    messages = [{"role": "user", "content": request.prompt}]
    limit = "max_completion_tokens" if kind == "chat" else "max_tokens"
    return {"messages": messages, limit: request.output_len}
