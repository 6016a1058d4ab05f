"""Claims about /v1/models, in OpenAI's shape and in Anthropic's."""

from typing import Any

import pytest

from tests.entrypoints.openai.rig import COMPLETIONS, post
from tests.entrypoints.server.rig import anthropic_client, client, openai_client, serving

NAMES = ("tiny", "org/tiny", "gpt-x")
ANTHROPIC = {"anthropic-version": "2023-06-01"}


async def get(app: Any, path: str, **headers: str) -> tuple[int, dict[str, Any]]:
    async with client(app) as http:
        answer = await http.get(path, headers=headers)
    return answer.status_code, answer.json()


async def test_models_have_the_fields_of_vllm() -> None:
    async with serving(served_model_name=NAMES) as app:
        _, body = await get(app, "/v1/models")
        assert body["object"] == "list" and [model["id"] for model in body["data"]] == [*NAMES]
        model = body["data"][0]
        assert set(model) == {
            "id", "object", "created", "owned_by", "root", "parent", "max_model_len", "permission"
        }  # fmt: skip
        assert (model["max_model_len"], model["parent"], model["object"]) == (256, None, "model")
        assert set(model["permission"][0]) == {
            "id", "object", "created", "allow_create_engine", "allow_sampling", "allow_logprobs",
            "allow_search_indices", "allow_view", "allow_fine_tuning", "organization", "group", "is_blocking",
        }  # fmt: skip


async def test_every_alias_is_served_under_its_own_name() -> None:
    async with serving(served_model_name=NAMES) as app:
        for name in NAMES:
            status, model = await get(app, f"/v1/models/{name}")
            assert (status, model["id"]) == (200, name)
            assert (await post(app, COMPLETIONS, model=name))["model"] == name
        assert (await post(app, COMPLETIONS, model=None))["model"] == NAMES[0]


async def test_an_unknown_model_is_a_404_in_either_shape() -> None:
    async with serving() as app:
        status, body = await get(app, "/v1/models/nope")
        assert status == 404 and body["error"]["code"] == "model_not_found"
        status, body = await get(app, "/v1/models/nope", **ANTHROPIC)
        assert (status, body["type"], body["error"]["type"]) == (404, "error", "not_found_error")


async def test_the_sdks_list_and_fetch_models() -> None:
    async with serving(served_model_name=NAMES) as app:
        async with openai_client(app) as openai:
            assert [model.id async for model in openai.models.list()] == [*NAMES]
            assert (await openai.models.retrieve("org/tiny")).id == "org/tiny"
        async with anthropic_client(app) as anthropic:
            page = await anthropic.models.list()
            assert (page.has_more, page.first_id, page.last_id) == (False, NAMES[0], NAMES[-1])
            assert [model.id async for model in page] == [*NAMES]
            model = await anthropic.models.retrieve("gpt-x")
            assert (model.type, model.display_name, model.created_at.tzinfo is not None) == ("model", "gpt-x", True)


async def test_anthropics_pages_lead_from_one_to_the_next() -> None:
    async with serving(served_model_name=NAMES) as app, anthropic_client(app) as anthropic:
        assert [model.id async for model in anthropic.models.list(limit=1)] == [*NAMES]
        page = await anthropic.models.list(limit=1, before_id="gpt-x")
        assert ([model.id for model in page.data], page.has_more) == (["org/tiny"], True)


@pytest.mark.parametrize("query", ["limit=0", "limit=1001", "limit=x", "after_id=nope"])
async def test_a_page_that_cannot_be_is_a_400(query: str) -> None:
    async with serving() as app:
        status, body = await get(app, f"/v1/models?{query}", **ANTHROPIC)
        assert (status, body["error"]["type"]) == (400, "invalid_request_error")
