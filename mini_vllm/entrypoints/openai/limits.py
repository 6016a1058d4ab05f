"""How much one request may ask for. What can be set is in `ServeArgs`; the rest bounds memory, not use."""

from collections.abc import Sized

from mini_vllm.entrypoints.openai.chat_request import ChatTemplateFields
from mini_vllm.entrypoints.openai.completion_request import CompletionRequest
from mini_vllm.entrypoints.openai.sampling_request import SamplingRequest, stop_list
from mini_vllm.entrypoints.server.serve_args import ServeArgs
from mini_vllm.exceptions import InvalidParameterError

MAX_TEXT_CHARS = 1000
"""Characters of a stop string or a bad word: each becomes states of an automaton, or tokens to look out for."""
MAX_BAD_WORDS = 1000
_MAX_BIAS = 100.0


def check_sampling(body: SamplingRequest, args: ServeArgs, vocab_size: int) -> None:
    """Raises `InvalidParameterError` naming field and limit."""
    if body.n is not None and body.n > args.max_n:
        raise InvalidParameterError("n", f"must be at most {args.max_n}, got {body.n}")
    stop = stop_list(body.stop)
    _check_length("stop", stop, args.max_stop_strings, "strings")
    _check_texts("stop", stop)
    _check_length("bad_words", body.bad_words, MAX_BAD_WORDS, "texts")
    _check_texts("bad_words", body.bad_words or [])
    for name in ("allowed_token_ids", "stop_token_ids", "logprob_token_ids"):
        _check_length(name, getattr(body, name), vocab_size, "ids, one for each of the vocabulary")
    _check_length("logit_bias", body.logit_bias, args.max_logit_bias, "entries")
    for key, bias in (body.logit_bias or {}).items():
        if not -_MAX_BIAS <= bias <= _MAX_BIAS:
            raise InvalidParameterError("logit_bias", f"must be in [-100, 100], got {bias} for {key[:64]!r}")


def check_prompts(body: CompletionRequest, args: ServeArgs) -> None:
    _check_length("prompt", body.prompts, args.max_batched_prompts, "prompts")


def check_conversation(body: ChatTemplateFields, args: ServeArgs) -> None:
    _check_length("messages", body.messages, args.max_messages, "messages")
    _check_length("tools", getattr(body, "tools", None), args.max_tools, "tools")
    template = body.chat_template
    if template is not None and len(template) > args.max_chat_template_chars:
        raise InvalidParameterError(
            "chat_template", f"has {len(template)} characters, at most {args.max_chat_template_chars} are allowed"
        )


def _check_length(field: str, items: Sized | None, most: int, what: str) -> None:
    if items is not None and len(items) > most:
        raise InvalidParameterError(field, f"may have at most {most} {what}, got {len(items)}")


def _check_texts(field: str, texts: list[str]) -> None:
    for text in texts:
        if len(text) > MAX_TEXT_CHARS:
            raise InvalidParameterError(field, f"each may have at most {MAX_TEXT_CHARS} characters, got {len(text)}")
