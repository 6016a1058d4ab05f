"""Every field that Anthropic's Messages API knows acts, is accepted, or is refused: it is in one of three tables."""

import typing
from typing import Any

import pytest
from anthropic.types import beta, message_count_tokens_params, message_create_params
from anthropic.types.beta import message_create_params as beta_create_params
from anthropic.types.content_block_param import ContentBlockParam

from mini_vllm.entrypoints.anthropic.protocol import CountTokensRequest, MessagesRequest
from mini_vllm.entrypoints.server.fields import ApiModel
from tests.entrypoints.sdk import CHATML
from tests.entrypoints.server.rig import client, serving

OLDER = {"temperature", "top_k", "top_p", "stream"}
"""Of the API, but not (any more) among the fields that the SDK types."""
VLLM = {"cache_salt", "chat_template_kwargs", "kv_transfer_params", "priority"}
HEADERS = {"betas", "user_profile_id", "workspace_id"}
"""What the SDK sends as headers."""


def fields_of(params: Any) -> set[str]:
    return set(typing.get_type_hints(params))


def tables(model: type[ApiModel]) -> list[set[str]]:
    return [set(model.model_fields), set(model.ACCEPTED), set(model.REFUSED)]


@pytest.mark.parametrize(
    ("model", "known"),
    [
        (MessagesRequest, fields_of(message_create_params.MessageCreateParamsBase) | OLDER | VLLM),
        (MessagesRequest, fields_of(beta_create_params.MessageCreateParamsBase) - HEADERS),
        (CountTokensRequest, fields_of(message_count_tokens_params.MessageCountTokensParams)),
        (CountTokensRequest, fields_of(beta.message_count_tokens_params.MessageCountTokensParams) - HEADERS),
    ],
)
def test_every_known_field_is_in_exactly_one_table(model: type[ApiModel], known: set[str]) -> None:
    for name in known:
        assert sum(name in table for table in tables(model)) == 1, name


def test_no_field_is_in_two_tables() -> None:
    for model in (MessagesRequest, CountTokensRequest):
        acts, accepted, refused = tables(model)
        assert not acts & accepted and not acts & refused and not accepted & refused


async def test_each_refused_field_is_refused_by_its_name() -> None:
    body = {"model": "tiny", "max_tokens": 1, "messages": [{"role": "user", "content": "x"}]}
    async with serving(chat_template=CHATML) as app, client(app) as http:
        for name, refused in MessagesRequest.REFUSED.items():
            answer = await http.post("/v1/messages", json={**body, name: {"type": "something", "else": 1}})
            message = answer.json()["error"]["message"]
            assert answer.status_code == 400 and message.startswith(f"{name}: ") and refused.why in message


async def test_every_kind_of_block_is_read_or_refused_by_name() -> None:
    kinds = set()
    for block in typing.get_args(ContentBlockParam):
        kinds.update(typing.get_args(typing.get_type_hints(block)["type"]))
    assert {"text", "image", "document", "redacted_thinking"} <= kinds
    async with serving(chat_template=CHATML) as app, client(app) as http:
        for kind in kinds - {"text", "tool_use", "tool_result", "thinking"}:
            body = {"model": "tiny", "max_tokens": 1, "messages": [{"role": "user", "content": [{"type": kind}]}]}
            answer = await http.post("/v1/messages", json=body)
            message = answer.json()["error"]["message"]
            assert answer.status_code == 400 and message.startswith("messages.0.content.0.type: ") and kind in message
