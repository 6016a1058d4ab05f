"""The bodies of the Responses API, as they are sent: responses, their output items, usage and lists."""

import time
from typing import Any

import msgspec

from mini_vllm.entrypoints.openai.bodies import ChatLogprob


class OutputText(msgspec.Struct, kw_only=True):
    """One part of a message: text, and the log-probabilities of its tokens when they were asked for."""

    type: str = "output_text"
    annotations: list[Any] = []
    logprobs: list[ChatLogprob] = []
    text: str = ""


class OutputMessage(msgspec.Struct, kw_only=True):
    """What the model wrote, as an item of a response."""

    id: str
    type: str = "message"
    status: str = "in_progress"
    role: str = "assistant"
    content: list[OutputText] = []


class InputTokensDetails(msgspec.Struct):
    """cached_tokens: of the prefix cache. Writing to it costs nothing here, so nothing is counted as written."""

    cached_tokens: int
    cache_write_tokens: int = 0


class OutputTokensDetails(msgspec.Struct):
    """How many of the output tokens were reasoning."""

    reasoning_tokens: int = 0


class ResponseUsage(msgspec.Struct):
    """The tokens of a response; reading and writing together are `total_tokens`."""

    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails
    total_tokens: int


class ResponseObject(msgspec.Struct, kw_only=True):
    """A response. `status` and what follows from it change while it is generated, the rest says what was asked for.

    temperature, top_p, top_logprobs: as used, so with the model's own defaults where the request named none.
    service_tier: there is one, 'default'.
    """

    id: str
    object: str = "response"
    created_at: int
    status: str = "in_progress"
    background: bool = False
    completed_at: int | None = None
    error: dict[str, str] | None = None
    incomplete_details: dict[str, str] | None = None
    instructions: str | None = None
    max_output_tokens: int | None = None
    max_tool_calls: int | None = None
    model: str
    output: list[OutputMessage] = []
    parallel_tool_calls: bool = True
    previous_response_id: str | None = None
    prompt_cache_key: str | None = None
    reasoning: dict[str, None] = msgspec.field(default_factory=lambda: {"effort": None, "summary": None})
    safety_identifier: str | None = None
    service_tier: str = "default"
    store: bool = True
    temperature: float
    text: dict[str, Any] = msgspec.field(default_factory=lambda: {"format": {"type": "text"}, "verbosity": "medium"})
    tool_choice: str = "auto"
    tools: list[Any] = []
    top_logprobs: int = 0
    top_p: float
    truncation: str = "disabled"
    usage: ResponseUsage | None = None
    user: str | None = None
    metadata: dict[str, str] = {}
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0

    def finish(self, status: str, usage: ResponseUsage | None) -> None:
        """Enter a final state. 'incomplete' has one reason here: no room was left for more tokens."""
        self.status = status
        self.usage = usage
        if status == "completed":
            self.completed_at = int(time.time())
        elif status == "incomplete":
            self.incomplete_details = {"reason": "max_output_tokens"}
        for item in self.output:
            item.status = "completed" if status == "completed" else "incomplete"

    def fail(self, message: str, usage: ResponseUsage | None) -> None:
        """Enter the state 'failed' for a reason that is the server's."""
        self.finish("failed", usage)
        self.error = {"code": "server_error", "message": message}


class ItemList(msgspec.Struct, kw_only=True):
    """One page of a list of items."""

    object: str = "list"
    data: list[dict[str, Any]]
    first_id: str | None
    last_id: str | None
    has_more: bool
