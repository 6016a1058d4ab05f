"""Every field that OpenAI's Responses API knows acts, is accepted, or is refused: in one of the three tables, once."""

import typing
from typing import Any

import pytest
from openai.types.responses import input_token_count_params, response_create_params
from openai.types.responses.response_input_item_param import ResponseInputItemParam

from mini_vllm.entrypoints.openai.responses.request import ResponsesInput, ResponsesRequest
from mini_vllm.entrypoints.server.fields import ApiModel
from tests.entrypoints.sdk import CHATML
from tests.entrypoints.server.rig import client, serving

VLLM = frozenset(
    "allowed_token_ids bad_words cache_salt chat_template_kwargs frequency_penalty ignore_eos "
    "include_stop_str_in_output kv_transfer_params logit_bias min_p min_tokens mm_processor_kwargs media_io_kwargs "
    "presence_penalty previous_input_messages enable_response_messages priority repetition_penalty request_id seed "
    "skip_special_tokens stop stop_token_ids structured_outputs top_k vllm_xargs repetition_detection".split()
)


def tables(model: type[ApiModel]) -> list[set[str]]:
    return [set(model.model_fields), set(model.ACCEPTED), set(model.REFUSED)]


def create_fields() -> set[str]:
    return {*typing.get_type_hints(response_create_params.ResponseCreateParamsBase), "stream"}


def count_fields() -> set[str]:
    return set(typing.get_type_hints(input_token_count_params.InputTokenCountParams))


@pytest.mark.parametrize(
    ("model", "known"), [(ResponsesRequest, create_fields() | VLLM), (ResponsesInput, count_fields())]
)
def test_every_known_field_is_in_exactly_one_table(model: type[ApiModel], known: set[str]) -> None:
    for name in known:
        assert sum(name in table for table in tables(model)) == 1, name


def test_no_field_is_in_two_tables() -> None:
    for model in (ResponsesRequest, ResponsesInput):
        acts, accepted, refused = tables(model)
        assert not acts & accepted and not acts & refused and not accepted & refused


def test_every_reason_is_a_sentence_for_the_client() -> None:
    for model in (ResponsesRequest, ResponsesInput):
        assert all(why[0].isupper() or why[0] in "`p" for why in model.ACCEPTED.values())
        assert all(len(refused.why) > 10 for refused in model.REFUSED.values())


async def test_each_refused_field_is_refused_by_its_name() -> None:
    async with serving(chat_template=CHATML) as app, client(app) as http:
        for name, refused in ResponsesRequest.REFUSED.items():
            answer = await http.post("/v1/responses", json={"input": "x", name: {"anything": "at all"}})
            error = answer.json()["error"]
            assert (answer.status_code, error["param"]) == (400, name), name
            assert refused.why in error["message"]


async def test_every_kind_of_item_is_read_or_refused_by_name() -> None:
    """Kinds as the SDK spells them; those that are read may still lack a field here."""
    kinds: set[Any] = set()
    for item in typing.get_args(ResponseInputItemParam):
        kinds.update(kind for kind in _literals(typing.get_type_hints(item)["type"]) if kind)
    assert {"message", "function_call", "reasoning", "computer_call_output"} <= kinds
    async with serving(chat_template=CHATML) as app, client(app) as http:
        for kind in kinds - {"message", "function_call", "function_call_output", "item_reference"}:
            answer = await http.post("/v1/responses", json={"input": [{"type": kind}]})
            assert (answer.status_code, answer.json()["error"]["param"]) == (400, "input.0.type")
            assert kind in answer.json()["error"]["message"]


def _literals(annotation: Any) -> list[Any]:
    if typing.get_origin(annotation) is typing.Literal:
        return list(typing.get_args(annotation))
    return [value for part in typing.get_args(annotation) for value in _literals(part)]
