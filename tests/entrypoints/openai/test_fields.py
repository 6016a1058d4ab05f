"""Claims about the tables of fields: none of OpenAI's or vLLM's is forgotten, and the page about them is true."""

import typing
from typing import Any

import pytest
from openai.types import chat as chat_types
from openai.types import completion_create_params
from openai.types.chat import completion_create_params as chat_create_params

from mini_vllm.entrypoints.openai.chat_request import ChatCompletionRequest, ChatMessage, ContentPart, ToolCall
from mini_vllm.entrypoints.openai.completion_request import CompletionRequest
from mini_vllm.entrypoints.openai.sampling_request import StreamOptions
from mini_vllm.entrypoints.openai.tokenize_request import DetokenizeRequest, TokenizeRequest
from mini_vllm.entrypoints.server.fields import ApiModel
from scripts import api_fields

OF_VLLM_BOTH = (
    "use_beam_search top_k min_p repetition_penalty watermarking length_penalty stop_token_ids "
    "include_stop_str_in_output ignore_eos min_tokens skip_special_tokens spaces_between_special_tokens "
    "truncate_prompt_tokens truncation_side prompt_logprobs logprob_token_ids allowed_token_ids bad_words "
    "add_special_tokens response_format structured_outputs priority request_id session_id return_tokens_as_token_ids "
    "return_token_ids routed_experts_prompt_start return_token_offsets mm_payload return_mm_kwargs cache_salt "
    "kv_transfer_params ec_transfer_params vllm_xargs repetition_detection stream_interval thinking_token_budget"
).split()
OF_VLLM_COMPLETIONS = ["prompt_embeds"]
OF_VLLM_CHATS = (
    "echo add_generation_prompt continue_final_message documents chat_template chat_template_kwargs media_io_kwargs "
    "mm_processor_kwargs return_prompt_text include_reasoning reasoning_effort max_completion_tokens"
).split()


def names_of(*typed_dicts: Any) -> set[str]:
    return {name for typed_dict in typed_dicts for name in typing.get_type_hints(typed_dict, include_extras=False)}


def unsorted(model: type[ApiModel], names: set[str]) -> set[str]:
    return names - {*model.model_fields, *model.ACCEPTED, *model.REFUSED}


@pytest.mark.parametrize(
    ("model", "typed_dicts"),
    [
        (
            CompletionRequest,
            [
                completion_create_params.CompletionCreateParamsNonStreaming,
                completion_create_params.CompletionCreateParamsStreaming,
            ],
        ),
        (
            ChatCompletionRequest,
            [
                chat_create_params.CompletionCreateParamsNonStreaming,
                chat_create_params.CompletionCreateParamsStreaming,
            ],
        ),
        (StreamOptions, [chat_types.ChatCompletionStreamOptionsParam]),
        (
            ChatMessage,
            [
                chat_types.ChatCompletionDeveloperMessageParam,
                chat_types.ChatCompletionSystemMessageParam,
                chat_types.ChatCompletionUserMessageParam,
                chat_types.ChatCompletionAssistantMessageParam,
                chat_types.ChatCompletionToolMessageParam,
                chat_types.ChatCompletionFunctionMessageParam,
            ],
        ),
        (
            ContentPart,
            [chat_types.ChatCompletionContentPartTextParam, chat_types.ChatCompletionContentPartRefusalParam],
        ),
        (
            ToolCall,
            [
                chat_types.ChatCompletionMessageFunctionToolCallParam,
                chat_types.ChatCompletionMessageCustomToolCallParam,
            ],
        ),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else "",
)
def test_every_field_of_the_openai_sdk_is_in_a_table(model: type[ApiModel], typed_dicts: list[Any]) -> None:
    assert not unsorted(model, names_of(*typed_dicts))


@pytest.mark.parametrize(
    ("model", "names"),
    [
        (CompletionRequest, [*OF_VLLM_BOTH, *OF_VLLM_COMPLETIONS]),
        (ChatCompletionRequest, [*OF_VLLM_BOTH, *OF_VLLM_CHATS]),
        (StreamOptions, ["continuous_usage_stats"]),
        (TokenizeRequest, ["model", "prompt", "messages", "add_special_tokens", "return_token_strs", "tools",
                           "add_generation_prompt", "continue_final_message", "chat_template", "chat_template_kwargs",
                           "media_io_kwargs", "mm_processor_kwargs"]),
        (DetokenizeRequest, ["model", "tokens"]),
    ],
)  # fmt: skip
def test_every_field_of_vllm_is_in_a_table(model: type[ApiModel], names: list[str]) -> None:
    assert not unsorted(model, set(names))


@pytest.mark.parametrize("model", [*api_fields.bodies()], ids=lambda model: model.__name__)
def test_no_field_is_in_two_tables(model: type[ApiModel]) -> None:
    for part in (model, *api_fields.parts_of(model)):
        tables = [set(part.model_fields), set(part.ACCEPTED), set(part.REFUSED)]
        assert sum(map(len, tables)) == len(set().union(*tables)), part.__name__


@pytest.mark.parametrize("model", [CompletionRequest, ChatCompletionRequest, TokenizeRequest, DetokenizeRequest])
def test_every_field_that_acts_says_what_it_does(model: type[ApiModel]) -> None:
    for part in (model, *api_fields.parts_of(model)):
        assert not [name for name, field in part.model_fields.items() if not field.description], part.__name__


def test_the_page_about_the_fields_is_up_to_date() -> None:
    """`python scripts/api_fields.py --write` writes it."""
    assert api_fields.TARGET.read_text(encoding="utf-8") == api_fields.document()
