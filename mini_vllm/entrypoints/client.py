"""A small client of the OpenAI API for our own commands: models, streamed completions and chats, over httpx2.

`ApiClient` is handed a server's URL and promises `Piece`s of text as they come, then the usage. Everything that goes
wrong is a `ServerError` of one line. Closing an unfinished stream closes its connection, which makes the server abort.
"""

import json
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx2

from mini_vllm.exceptions import ConfigError, MiniVLLMError

_CONNECT_SECONDS = 10.0


class ServerError(MiniVLLMError, RuntimeError):
    """The server cannot be reached, refused a request, or failed on it. code: the API's word for it, if any."""

    def __init__(self, message: str, code: str | int | None = None) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True)
class Usage:
    """Tokens of one request, as the server (or the engine) counts them."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0


@dataclass(frozen=True)
class Piece:
    """What is new in an answer. The last piece has the usage."""

    text: str = ""
    finish_reason: str | None = None
    usage: Usage | None = None


class ApiClient:
    """url: of the server, with or without /v1. Use as a context manager."""

    def __init__(self, url: str, api_key: str | None = None) -> None:
        if not url.startswith(("http://", "https://")):
            raise ConfigError(f"url: must begin with http:// or https://, got {url!r}")
        base = url.rstrip("/").removesuffix("/v1")
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        timeout = httpx2.Timeout(None, connect=_CONNECT_SECONDS)  # an answer may take as long as it takes
        self._http = httpx2.Client(base_url=base, headers=headers, timeout=timeout)

    def __enter__(self) -> "ApiClient":
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()

    def models(self) -> list[str]:
        """The names the server takes as `model`."""
        with _one_line_errors():
            response = self._http.get("/v1/models")
            _check(response)
            return [model["id"] for model in response.json()["data"]]

    def complete(self, model: str, prompt: str, fields: Mapping[str, Any]) -> Generator[Piece, None, None]:
        body = {"model": model, "prompt": prompt, **fields}
        for choice, piece in self._stream("/v1/completions", body):
            yield Piece(choice.get("text") or "", choice.get("finish_reason"), piece)

    def chat(
        self, model: str, messages: Sequence[Mapping[str, Any]], fields: Mapping[str, Any]
    ) -> Generator[Piece, None, None]:
        body = {"model": model, "messages": list(messages), **fields}
        for choice, usage in self._stream("/v1/chat/completions", body):
            delta = choice.get("delta") or {}
            text = (delta.get("reasoning") or "") + (delta.get("content") or "")
            yield Piece(text, choice.get("finish_reason"), usage)

    def _stream(self, path: str, body: Mapping[str, Any]) -> Generator[tuple[dict[str, Any], Usage | None], None, None]:
        """(the choice of a chunk or {}, the usage if the chunk has it), until [DONE]."""
        body = {**body, "stream": True, "stream_options": {"include_usage": True}}
        with _one_line_errors(), self._http.stream("POST", path, json=body) as response:
            _check(response)
            for line in response.iter_lines():
                if not line.startswith("data:"):
                    continue
                data = line[5:].strip()
                if data == "[DONE]":
                    return
                chunk = json.loads(data)
                if error := chunk.get("error"):
                    raise _error_of(error, "the server failed")
                choices, usage = chunk.get("choices") or [{}], chunk.get("usage")
                yield choices[0], None if usage is None else _usage_of(usage)
            raise ServerError("the server ended its answer before it was complete")


def _usage_of(usage: Mapping[str, Any]) -> Usage:
    details = usage.get("prompt_tokens_details") or {}
    return Usage(usage["prompt_tokens"], usage.get("completion_tokens") or 0, details.get("cached_tokens") or 0)


def _check(response: httpx2.Response) -> None:
    if response.status_code >= 400:
        response.read()
        try:
            error = response.json()["error"]
        except (ValueError, KeyError, TypeError):
            error = " ".join(response.text.split())[:300] or response.reason_phrase
        raise _error_of(error, f"HTTP {response.status_code}")


def _error_of(error: Any, prefix: str) -> ServerError:
    if not isinstance(error, dict):
        return ServerError(f"{prefix}: {error}")
    return ServerError(f"{prefix}: {error.get('message', error)}", error.get("code"))


@contextmanager
def _one_line_errors() -> Generator[None, None, None]:
    """Whatever goes wrong on the way to the server or in reading its answer is a `ServerError`."""
    try:
        yield
    except httpx2.HTTPError as error:
        raise ServerError(f"{type(error).__name__}: {error}") from error
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise ServerError(f"the server's answer is not what the API says: {type(error).__name__}: {error}") from error
