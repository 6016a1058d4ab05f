"""Claims about /tokenize and /detokenize."""

from typing import Any

import pytest

from mini_vllm.text.tokenizer import Tokenizer
from tests.async_rig import checkpoint
from tests.entrypoints.openai.rig import MESSAGES
from tests.entrypoints.server.rig import client, serving

pytestmark = pytest.mark.asyncio(loop_scope="module")

TEXT = "The capital of Frankreich is 🙂"


async def ask(app: Any, path: str, expected: int = 200, **fields: Any) -> dict[str, Any]:
    async with client(app) as http:
        answer = await http.post(path, json=fields)
    assert answer.status_code == expected, answer.text
    body: dict[str, Any] = answer.json()
    return body


async def test_a_text_becomes_the_tokens_of_the_tokenizer(app: Any) -> None:
    tokenizer = Tokenizer.from_folder(checkpoint())
    for add in (True, False):
        ids = tokenizer.encode(TEXT, add)
        assert await ask(app, "/tokenize", prompt=TEXT, add_special_tokens=add) == {
            "count": len(ids), "max_model_len": 256, "tokens": ids, "token_strs": None
        }  # fmt: skip
    body = await ask(app, "/tokenize", model="tiny", prompt=TEXT, return_token_strs=True)
    assert body["token_strs"] == tokenizer.convert_ids_to_tokens(body["tokens"])


async def test_a_conversation_becomes_the_tokens_of_the_template(app: Any) -> None:
    tokenizer = Tokenizer.from_folder(checkpoint())
    expected = tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True)
    assert (await ask(app, "/tokenize", messages=MESSAGES))["tokens"] == expected
    without = tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=False)
    assert (await ask(app, "/tokenize", messages=MESSAGES, add_generation_prompt=False))["tokens"] == without


async def test_tools_are_for_the_template() -> None:
    async with serving(chat_template="{{ tools[0].function.name }}") as app:
        tools = [{"type": "function", "function": {"name": "search"}}]
        tokens = (await ask(app, "/tokenize", messages=MESSAGES, tools=tools))["tokens"]
        assert await ask(app, "/detokenize", tokens=tokens) == {"prompt": "search"}


async def test_text_and_tokens_lead_back_to_each_other(app: Any) -> None:
    tokens = (await ask(app, "/tokenize", prompt=TEXT))["tokens"]
    assert await ask(app, "/detokenize", tokens=tokens) == {"prompt": "<s>" + TEXT}
    assert await ask(app, "/detokenize", tokens=[]) == {"prompt": ""}


async def test_texts_longer_than_the_context_are_counted(app: Any) -> None:
    assert (await ask(app, "/tokenize", prompt="x " * 1000))["count"] > 256


@pytest.mark.parametrize(
    ("path", "fields", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "x", "messages": MESSAGES}, "prompt"),
        ("/tokenize", {"prompt": "x", "tools": []}, "tools"),
        ("/tokenize", {"prompt": ["x"]}, "prompt"),
        ("/tokenize", {"messages": []}, "messages"),
        ("/tokenize", {"messages": MESSAGES, "chat_template": "x"}, "chat_template"),
        ("/tokenize", {"messages": MESSAGES, "tools": [{}] * 129}, "tools"),
        ("/detokenize", {}, "tokens"),
        ("/detokenize", {"tokens": [384]}, "tokens"),
        ("/detokenize", {"tokens": [-1]}, "tokens"),
        ("/detokenize", {"tokens": "1"}, "tokens"),
    ],
)
async def test_a_bad_field_is_a_400_that_names_it(app: Any, path: str, fields: dict[str, Any], param: str) -> None:
    assert (await ask(app, path, 400, **fields))["error"]["param"] == param
