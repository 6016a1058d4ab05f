"""From the fields of a request to `SamplingParams`: what it leaves out is the model's own default.

`SamplingParams` checks ranges itself, and the engine what takes the model to check; here is only what they cannot know:
that JSON has string keys, and how many tokens the context leaves for each prompt.
"""

from dataclasses import replace
from typing import Any

from mini_vllm.entrypoints.openai.chat_request import ChatCompletionRequest
from mini_vllm.entrypoints.openai.completion_request import CompletionRequest
from mini_vllm.entrypoints.openai.sampling_request import SamplingRequest, explicit
from mini_vllm.exceptions import InvalidParameterError, PromptTooLongError
from mini_vllm.sampling_params import BeamSearchParams, RequestOutputKind, SamplingParams

DEFAULT_MAX_TOKENS = 16
"""Of /v1/completions, as at OpenAI."""
_SAME_NAME = (
    "n", "temperature", "top_p", "top_k", "min_p", "seed", "frequency_penalty", "presence_penalty",
    "repetition_penalty", "allowed_token_ids", "bad_words", "min_tokens", "stop", "stop_token_ids",
    "include_stop_str_in_output", "ignore_eos", "skip_special_tokens", "spaces_between_special_tokens",
    "logprob_token_ids",
)  # fmt: skip


def completion_params(body: CompletionRequest, defaults: SamplingParams) -> SamplingParams:
    """Still without the limit of the context, see `with_max_tokens`."""
    prompt_logprobs = body.prompt_logprobs
    if body.echo and body.logprobs is not None:
        prompt_logprobs = body.logprobs if prompt_logprobs is None else max(body.logprobs, prompt_logprobs)
    return _params(body, defaults, {"logprobs": body.logprobs, "prompt_logprobs": prompt_logprobs})


def chat_params(body: ChatCompletionRequest, defaults: SamplingParams) -> SamplingParams:
    """The same for a chat."""
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    return _params(body, defaults, {"logprobs": logprobs, "prompt_logprobs": body.prompt_logprobs})


def _params(body: SamplingRequest, defaults: SamplingParams, changes: dict[str, Any]) -> SamplingParams:
    kind = RequestOutputKind.DELTA if body.stream else RequestOutputKind.FINAL_ONLY
    chosen = explicit(body, _SAME_NAME) | changes
    if body.logit_bias is not None:
        chosen["logit_bias"] = {_token_id(key): bias for key, bias in body.logit_bias.items()}
    if body.vllm_xargs is not None:
        chosen["extra_args"] = body.vllm_xargs
    # None until the prompts are known, so that min_tokens is compared with the limit that counts.
    return replace(defaults, max_tokens=None, output_kind=kind, **chosen)


def _token_id(key: str) -> int:
    if not (key.isascii() and key.isdigit()) or len(key) > 18:
        raise InvalidParameterError("logit_bias", f"keys are token ids, got {key[:64]!r}")
    return int(key)


def with_max_tokens(params: SamplingParams, max_tokens: int) -> SamplingParams:
    """For one prompt. 0, to score the prompt alone, is one token, which nobody gets to see."""
    return params.with_max_tokens(max(max_tokens, 1))


def tokens_to_generate(
    field: str, asked: int | None, default: int | None, num_prompt_tokens: int, max_model_len: int
) -> int:
    """asked: by the request, in `field`. default: where it does not ask; None is all that the context leaves."""
    room = max_model_len - num_prompt_tokens
    if asked is None:
        return room if default is None else min(default, room)
    if asked > max_model_len:
        raise InvalidParameterError(
            field,
            f"{field}={asked} cannot be greater than max_model_len={max_model_len}. "
            "Please request fewer output tokens.",
        )
    if asked > room:
        raise PromptTooLongError(
            field,
            f"This model's maximum context length is {max_model_len} tokens. However, the prompt has "
            f"{num_prompt_tokens} tokens and {field} asks for {asked} more, {num_prompt_tokens + asked} in all. "
            "Please shorten the prompt or request fewer output tokens.",
        )
    return asked


def beam_params(body: SamplingRequest, max_tokens: int) -> BeamSearchParams:
    """`n` is the width, as in vLLM."""
    return BeamSearchParams(
        beam_width=1 if body.n is None else body.n,
        max_tokens=max(max_tokens, 1),
        ignore_eos=bool(body.ignore_eos),
        length_penalty=1.0 if body.length_penalty is None else body.length_penalty,
        include_stop_str_in_output=bool(body.include_stop_str_in_output),
    )
