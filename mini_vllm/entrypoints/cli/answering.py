"""Who answers in `chat` and `complete`: a server, or a model in this process.

`answerer_from` is handed the command line and gives one of the two; both promise an `Answer`: text as it comes, then
its numbers. A Ctrl-C while it is iterated raises KeyboardInterrupt, after which `close()` ends the request; the model
stays usable.
"""

import argparse
import dataclasses
import os
import signal
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

from mini_vllm.engine.arg_utils import EngineArgs
from mini_vllm.entrypoints.cli.arguments import (
    add_engine_arguments,
    beside_an_api,
    engine_args_from,
    read_text_file,
)
from mini_vllm.entrypoints.cli.sampling_arguments import (
    add_sampling_arguments,
    sampling_fields_from,
    sampling_params_from,
)
from mini_vllm.entrypoints.client import ApiClient, Piece, ServerError, Usage
from mini_vllm.exceptions import ConfigError, PromptTooLongError, RequestError
from mini_vllm.sampling_params import RequestOutputKind, SamplingParams

if TYPE_CHECKING:
    from mini_vllm.engine.input_processor import TokenizedPrompt
    from mini_vllm.engine.llm_engine import LLMEngine

Message = dict[str, str]
_REMOTE_FLAGS = ("model_name", "api_key")


class ContextFullError(RequestError):
    """The prompt does not fit the model's context."""


class Answer:
    """Iterate for the text; afterwards `finish_reason`, `usage` and the times are there. Seconds since it was asked."""

    def __init__(self, pieces: Generator[Piece, None, None]) -> None:
        self._pieces = pieces
        self._asked = time.perf_counter()
        self.time_to_first_token: float | None = None
        self.seconds = 0.0
        self.finish_reason: str | None = None
        self.usage: Usage | None = None

    def __iter__(self) -> Iterator[str]:
        for piece in self._pieces:
            now = time.perf_counter() - self._asked
            if piece.text:
                self.time_to_first_token = now if self.time_to_first_token is None else self.time_to_first_token
                self.seconds = now
            self.finish_reason = piece.finish_reason or self.finish_reason
            self.usage = piece.usage or self.usage
            if piece.text:
                yield piece.text

    def close(self) -> None:
        """End the request if it is not finished."""
        self._pieces.close()


class Answerer(Protocol):
    """name: of the model."""

    name: str

    def chat(self, messages: Sequence[Message]) -> Answer: ...

    def complete(self, prompt: str) -> Answer: ...

    def close(self) -> None: ...


class Server:
    """Answers come from a server. fields: of every request's body, beside prompt and model."""

    def __init__(self, client: ApiClient, model: str | None, fields: Mapping[str, Any]) -> None:
        self._client, self._fields = client, fields
        self.name = model or self._first_model()

    def _first_model(self) -> str:
        models = self._client.models()
        if not models:
            raise ServerError("the server lists no model")
        return models[0]

    def chat(self, messages: Sequence[Message]) -> Answer:
        return Answer(self._translated(self._client.chat(self.name, messages, self._fields)))

    def complete(self, prompt: str) -> Answer:
        return Answer(self._translated(self._client.complete(self.name, prompt, self._fields)))

    def _translated(self, pieces: Generator[Piece, None, None]) -> Generator[Piece, None, None]:
        """The two spellings of a full context, ours and vLLM's, become one type."""
        try:
            yield from pieces
        except ServerError as error:
            if error.code == "context_length_exceeded" or "maximum context length" in str(error):
                raise ContextFullError(str(error)) from error
            raise

    def close(self) -> None:
        self._client.__exit__()


class LocalModel:
    """Answers come from an engine in this process, whose prefix cache keeps earlier turns of a chat."""

    def __init__(self, engine: "LLMEngine", args: argparse.Namespace, template: str | None) -> None:
        self._engine, self._template = engine, template
        self._count = 0
        chosen = {} if getattr(args, "max_tokens", None) else {"max_tokens": max(engine.max_model_len // 4, 1)}
        base = engine.get_default_sampling_params()
        self._params = sampling_params_from(args, base, output_kind=RequestOutputKind.DELTA, **chosen)
        config = engine.config
        self.name = os.path.basename(os.path.normpath(config.model.model)) if config else "model"

    def chat(self, messages: Sequence[Message]) -> Answer:
        text = self._engine.get_tokenizer().apply_chat_template(
            list(messages), chat_template=self._template, add_generation_prompt=True, tokenize=False
        )
        return Answer(self._generate(lambda: self._engine.input_processor.tokenize([text], add_special_tokens=False)))

    def complete(self, prompt: str) -> Answer:
        return Answer(self._generate(lambda: self._engine.input_processor.tokenize([prompt])))

    def _generate(self, tokenize: "Callable[[], list[TokenizedPrompt]]") -> Generator[Piece, None, None]:
        self._count += 1
        request_id = f"turn-{self._count}"
        try:
            with deferred_interrupt() as interrupted:
                self._engine.add_request(request_id, tokenize()[0], self._params)
                yield from self._steps(interrupted)
        except PromptTooLongError as error:
            raise ContextFullError(str(error)) from error
        finally:
            self._engine.abort_request(request_id)

    def _steps(self, interrupted: Callable[[], bool]) -> Generator[Piece, None, None]:
        num_tokens = 0
        while self._engine.has_unfinished_requests():
            outputs = self._engine.step()
            if interrupted():
                raise KeyboardInterrupt
            for output in outputs:
                completion = output.outputs[0] if output.outputs else None
                num_tokens += len(completion.token_ids) if completion else 0
                if output.error is not None:
                    raise RequestError(output.error)
                usage = Usage(len(output.prompt_token_ids), num_tokens, output.num_cached_tokens)
                if completion:
                    yield Piece(completion.text, completion.finish_reason, usage)

    def close(self) -> None:
        self._engine.shutdown()


@contextmanager
def deferred_interrupt() -> Iterator[Callable[[], bool]]:
    """While the block lasts, a first Ctrl-C is only noted: it must not cut a step of the engine in two.

    A second one raises KeyboardInterrupt at once.
    """
    pressed = False

    def note(number: int, frame: Any) -> None:
        nonlocal pressed
        if pressed:
            raise KeyboardInterrupt
        pressed = True

    before = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: pressed
    finally:
        signal.signal(signal.SIGINT, before)


# --- from the command line -------------------------------------------------------------------------------------


def add_answerer_arguments(parser: argparse.ArgumentParser, **sampling_defaults: Any) -> None:
    """--url and what belongs to it, sampling, and the engine's flags."""
    parser.add_argument("model_tag", nargs="?", metavar="MODEL", help="The same as --model, for a model in process.")
    group = parser.add_argument_group("server (without --url, the model runs in this process)")
    group.add_argument("--url", help="Of a server that speaks the OpenAI API, such as http://localhost:8000/v1.")
    group.add_argument("--model-name", metavar="NAME", help="One of the server's models. Default: its first.")
    group.add_argument("--api-key", metavar="KEY", help="Default: $OPENAI_API_KEY.")
    add_sampling_arguments(parser, just_text=True, **sampling_defaults)
    add_engine_arguments(parser)


def answerer_from(args: argparse.Namespace) -> Answerer:
    """The one that was asked for. Raises `ConfigError` for flags that would not act."""
    given = [field.name for field in dataclasses.fields(EngineArgs) if hasattr(args, field.name)]
    template = getattr(args, "chat_template", None)
    if args.url:
        local = [*given, *(["MODEL"] if args.model_tag else []), *(["chat_template"] if template else [])]
        if local:
            raise ConfigError(f"{local[0]}: has no meaning with --url: the server chose it")
        client = ApiClient(args.url, args.api_key or os.environ.get("OPENAI_API_KEY"))
        return Server(client, args.model_name, sampling_fields_from(args))
    for name in _REMOTE_FLAGS:
        if getattr(args, name) is not None:
            raise ConfigError(f"{name}: has no meaning without --url")
    if args.model_tag:
        if "model" in given:
            raise ConfigError("model: give it once, as MODEL or with --model")
        args.model = args.model_tag
    SamplingParams(**sampling_fields_from(args))  # raises for what is out of range before a model is loaded
    engine_args = beside_an_api(engine_args_from(args))
    text = read_text_file(template, "chat_template") if template else None

    from mini_vllm.engine.llm_engine import LLMEngine

    return LocalModel(LLMEngine.from_engine_args(engine_args), args, text)
