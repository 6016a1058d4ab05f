"""A conversation becomes the text a model was trained on, through the checkpoint's Jinja template.

`render_chat` is handed a template and messages and promises the text transformers' `apply_chat_template` gives
for them. Templates are compiled once and cached; they run in the bounded sandbox of `sandbox.py`. Whatever is wrong
comes out as `InvalidParameterError` on `messages`, `tools` or `chat_template`.
"""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any

from jinja2 import Template, TemplateError, TemplateSyntaxError, nodes
from jinja2.exceptions import SecurityError

from mini_vllm.exceptions import InvalidParameterError
from mini_vllm.text.sandbox import ChatEnvironment, TemplateLimitError, _weigh, limits

_CONTINUE_TAG = "CONTINUE_FINAL_MESSAGE_TAG "
_REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")


def render_chat(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    documents: Sequence[Mapping[str, Any]] | None = None,
    add_generation_prompt: bool = False,
    continue_final_message: bool = False,
    variables: Mapping[str, Any] | None = None,
) -> str:
    """The text of a conversation.

    messages: dicts with 'role' and usually 'content'; keys whose value is None count as absent.
    add_generation_prompt: end with what opens an assistant turn.
    continue_final_message: leave the last message open, so that the model goes on with it.
    variables: further names the template sees (special tokens, `chat_template_kwargs`).
    """
    conversation = _checked_messages(messages)
    if continue_final_message:
        if add_generation_prompt:
            raise InvalidParameterError(
                "continue_final_message", "cannot be combined with add_generation_prompt: the one leaves the last "
                "message open, the other starts a new one",
            )  # fmt: skip
        _append_tag(conversation, template)
    text = _render(
        template,
        {
            **_plain(variables or {}),
            "messages": conversation,
            "tools": _checked_dicts("tools", tools),
            "documents": _checked_dicts("documents", documents),
            "add_generation_prompt": add_generation_prompt,
        },
    )
    return _cut_at_tag(text) if continue_final_message else text


def _render(template: str, variables: dict[str, Any]) -> str:
    compiled = compile_template(template)
    try:
        with limits():
            return compiled.render(**variables)
    except (SecurityError, OverflowError, RecursionError, MemoryError) as error:
        raise InvalidParameterError("chat_template", f"refused: {error or type(error).__name__}") from error
    except TemplateError as error:
        raise InvalidParameterError("messages", f"the chat template refuses the conversation: {error}") from error
    except Exception as error:  # anything a template's expressions can raise: a message of a shape it cannot read
        raise InvalidParameterError(
            "messages", f"the chat template fails on the conversation: {type(error).__name__}: {error}"
        ) from error


@lru_cache(maxsize=64)
def compile_template(template: str) -> Template:
    """Compile and remember a template. Raises `InvalidParameterError` on a syntax error, with its line."""
    try:
        with limits():
            return _environment().from_string(template)
    except TemplateSyntaxError as error:
        raise InvalidParameterError("chat_template", f"syntax error in line {error.lineno}: {error.message}") from error
    except (TemplateError, RecursionError, OverflowError, SyntaxError) as error:
        raise InvalidParameterError("chat_template", f"cannot be compiled: {error}") from error


def parse_template(template: str) -> nodes.Template:
    """The syntax tree of a template. Raises as `compile_template` does."""
    compile_template(template)
    return _environment().parse(template)


@lru_cache(maxsize=1)
def _environment() -> ChatEnvironment:
    environment = ChatEnvironment()
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    environment.bound_filters()
    return environment


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Plain JSON: Jinja's own filter escapes HTML, which no model was trained on."""
    if isinstance(indent, int) and indent > 64:
        raise TemplateLimitError(f"tojson: an indent of at most 64, got {indent}")
    _weigh(value, separators)
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def _strftime_now(format: str) -> str:
    if len(format) > 200 or any(len(run) > 3 for run in _digit_runs(format)):
        raise TemplateLimitError("strftime_now: a format of at most 200 characters without wide fields")
    return datetime.now().strftime(format)


def _digit_runs(text: str) -> list[str]:
    return "".join(c if c.isdigit() else " " for c in text).split()


# -- what a template may see ------------------------------------------------------------------------------------


def _plain(value: Any) -> Any:
    """`value` rebuilt from JSON types only: other objects have methods the sandbox knows nothing about."""
    try:
        return _rebuilt(value)
    except RecursionError:
        raise InvalidParameterError("messages", "what the chat template is given is nested too deeply") from None


def _rebuilt(value: Any) -> Any:
    if value is None or type(value) in (str, int, float, bool):
        return value
    for base in (str, int, float):
        if isinstance(value, base):
            return base(value)
    if isinstance(value, Mapping):
        return {_rebuilt(key): _rebuilt(item) for key, item in value.items()}
    if isinstance(value, tuple):
        return tuple(_rebuilt(item) for item in value)
    if isinstance(value, list):
        return [_rebuilt(item) for item in value]
    if callable(getattr(value, "model_dump", None)):
        return _rebuilt(value.model_dump())
    return f"<{type(value).__name__}>"


def _checked_messages(messages: Any) -> list[dict[str, Any]]:
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Sequence):
        raise InvalidParameterError("messages", f"must be a list of dicts, got {type(messages).__name__}")
    if not messages:
        raise InvalidParameterError("messages", "must hold at least one message")
    checked = []
    for position, message in enumerate(messages):
        plain = _plain(message)
        if not isinstance(plain, dict):
            raise InvalidParameterError("messages", f"[{position}] must be a dict, got {type(message).__name__}")
        if not isinstance(plain.get("role"), str):
            raise InvalidParameterError("messages", f"[{position}] needs a 'role' that is a string")
        checked.append(_with_reasoning({key: item for key, item in plain.items() if item is not None}))
    return checked


def _with_reasoning(message: dict[str, Any]) -> dict[str, Any]:
    """Templates read a message's reasoning under one of three names; fill those that are missing."""
    reasoning = next((message[name] for name in _REASONING_FIELDS if name in message), None)
    if reasoning is None:
        return message
    return {"thinking": reasoning, **message, "reasoning_content": reasoning}


def _checked_dicts(field: str, values: Any) -> list[dict[str, Any]] | None:
    if values is None:
        return None
    if isinstance(values, (str, bytes, Mapping)) or not isinstance(values, Sequence):
        raise InvalidParameterError(field, f"must be a list of dicts, got {type(values).__name__}")
    for position, value in enumerate(values):
        if not isinstance(value, Mapping) and not callable(getattr(value, "model_dump", None)):
            raise InvalidParameterError(
                field, f"[{position}] must be a dict (a JSON schema), got {type(value).__name__}"
            )
    return [_plain(value) for value in values]


# -- continue_final_message -------------------------------------------------------------------------------------


def _append_tag(conversation: list[dict[str, Any]], template: str) -> None:
    """Mark where the last message ends, so that what the template writes after it can be cut off."""
    last = conversation[-1]
    content = last.get("content")
    if content is None or "content" not in template:
        raise InvalidParameterError("continue_final_message", "the last message has no 'content' to continue")
    if isinstance(content, str):
        last["content"] = content + _CONTINUE_TAG
        return
    for part in reversed(content if isinstance(content, list) else []):
        if isinstance(part, dict) and isinstance(part.get("text"), str):
            part["text"] += _CONTINUE_TAG
            return
    raise InvalidParameterError("continue_final_message", "the last message has no text to continue")


def _cut_at_tag(text: str) -> str:
    position = text.rfind(_CONTINUE_TAG.strip())
    if position < 0:
        raise InvalidParameterError("continue_final_message", "the chat template does not show the last message")
    if text.startswith(_CONTINUE_TAG, position):
        return text[:position]
    return text[:position].rstrip()  # the template trims messages, so the continued one is trimmed as well
