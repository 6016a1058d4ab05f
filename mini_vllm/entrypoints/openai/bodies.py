"""What /v1/completions and /v1/chat/completions answer, field by field; msgspec writes these as JSON.

Fields without a meaning here (`routed_experts`, `kv_transfer_params`, ...) are null, as they are at vLLM, so that
clients written for it find what they look for. A field that is `UNSET` is left out.
"""

from typing import Any, Literal

from msgspec import UNSET, Struct, UnsetType

# -- usage ------------------------------------------------------------------------------------------------------


class PromptTokensDetails(Struct):
    """cached_tokens: of the prompt, those taken from the prefix cache."""

    cached_tokens: int
    created_cache_tokens: int | None = None
    multimodal_tokens: int | None = None


class Usage(Struct):
    """Each prompt counts once, however many choices it has. In the middle of a stream: of one choice, no details."""

    prompt_tokens: int
    total_tokens: int
    completion_tokens: int
    prompt_tokens_details: PromptTokensDetails | UnsetType = UNSET
    completion_tokens_details: UnsetType | None = UNSET


# -- logprobs ---------------------------------------------------------------------------------------------------


class PromptLogprob(Struct):
    """One token at a position of the prompt."""

    logprob: float
    rank: int | None
    decoded_token: str | None


PromptLogprobs = list[dict[int, PromptLogprob] | None]


class CompletionLogprobs(Struct):
    """Four lists of the same length, by token. text_offset: where in the choice's text the token begins."""

    text_offset: list[int]
    token_logprobs: list[float | None]
    tokens: list[str]
    top_logprobs: list[dict[str, float] | None]


class TopLogprob(Struct):
    """A token that might have been. bytes: exactly, where `token` can only hint at half a character."""

    token: str
    logprob: float
    bytes: list[int]


class ChatLogprob(TopLogprob):
    """A token of the answer."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(Struct):
    content: list[ChatLogprob]


# -- /v1/completions --------------------------------------------------------------------------------------------


class CompletionChoice(Struct):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: str | None
    stop_reason: int | str | None
    token_ids: list[int] | None
    prompt_logprobs: PromptLogprobs | None
    prompt_token_ids: list[int] | None
    routed_experts: None = None


class Completion(Struct, kw_only=True):
    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    service_tier: None = None
    system_fingerprint: str
    usage: Usage
    kv_transfer_params: None = None
    ec_transfer_params: None = None
    metrics: None = None


class CompletionChunkChoice(Struct):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: str | None
    stop_reason: int | str | None
    prompt_token_ids: list[int] | None
    token_ids: list[int] | None


# -- /v1/chat/completions ---------------------------------------------------------------------------------------


class ChatAnswer(Struct):
    role: str
    content: str
    refusal: None = None
    annotations: None = None
    audio: None = None
    function_call: None = None
    reasoning: None = None


class ChatChoice(Struct):
    index: int
    message: ChatAnswer
    logprobs: ChatLogprobs | None
    finish_reason: str | None
    stop_reason: int | str | None
    token_ids: list[int] | None
    routed_experts: None = None


class ChatCompletion(Struct, kw_only=True):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    service_tier: None = None
    system_fingerprint: str
    usage: Usage
    prompt_logprobs: PromptLogprobs | None
    prompt_token_ids: list[int] | None
    prompt_text: str | None
    kv_transfer_params: None = None
    ec_transfer_params: None = None
    metrics: None = None


class ChatDelta(Struct, kw_only=True):
    role: str | UnsetType = UNSET
    content: str


class ChatChunkChoice(Struct):
    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None = None
    finish_reason: str | None = None
    stop_reason: int | str | UnsetType | None = UNSET
    token_ids: list[int] | UnsetType | None = UNSET


# -- events of both ---------------------------------------------------------------------------------------------


class Chunk(Struct, kw_only=True):
    """One event of a stream. prompt_token_ids, prompt_text: in a chat's first events."""

    id: str
    object: str
    created: int
    model: str
    choices: list[Any]
    usage: Usage | UnsetType = UNSET
    system_fingerprint: str | UnsetType = UNSET
    prompt_token_ids: list[int] | UnsetType | None = UNSET
    prompt_text: str | UnsetType | None = UNSET
