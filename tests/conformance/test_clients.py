"""The real SDKs, and clients with habits of their own, against `mini-vllm serve` in its own process over a socket."""

import asyncio
from typing import Any

import anthropic
import httpx2
import openai
import pytest

from tests.entrypoints.server.rig import RunningServer

HI: Any = [{"role": "user", "content": "def add(a, b):"}]
GREEDY: Any = {"model": "tiny", "temperature": 0}


@pytest.fixture
def oai(server: RunningServer) -> Any:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture
def claude(server: RunningServer) -> Any:
    with anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0) as client:
        yield client


# -- blocking --------------------------------------------------------------------------------------------------


def test_completions(oai: Any) -> None:
    whole = oai.completions.create(**GREEDY, prompt=["def f(", "class A"], max_tokens=6, n=2, logprobs=2)
    chunks = list(oai.completions.create(**GREEDY, prompt=["def f(", "class A"], max_tokens=6, n=2, stream=True))
    assert [choice.index for choice in whole.choices] == [0, 1, 2, 3]
    assert whole.usage.completion_tokens == 24
    for choice in whole.choices:
        assert choice.text == "".join(c.text for chunk in chunks for c in chunk.choices if c.index == choice.index)
        assert len(choice.logprobs.tokens) == 6


def test_chats(oai: Any) -> None:
    asked = GREEDY | {"messages": HI, "max_completion_tokens": 8, "logprobs": True, "top_logprobs": 2}
    whole = oai.chat.completions.create(**asked)
    with oai.chat.completions.stream(**asked, stream_options={"include_usage": True}) as stream:
        kinds = {event.type for event in stream}
        final = stream.current_completion_snapshot
    assert {"chunk", "content.delta", "content.done", "logprobs.content.delta"} <= kinds
    assert final.choices[0].message.content == whole.choices[0].message.content
    assert final.choices[0].logprobs.content == whole.choices[0].logprobs.content
    assert final.usage.total_tokens == whole.usage.total_tokens


def test_responses(oai: Any) -> None:
    first = oai.responses.create(**GREEDY, input="x = 1\n", max_output_tokens=6)
    events = list(oai.responses.create(**GREEDY, input="x = 1\n", max_output_tokens=6, stream=True))
    assert events[-1].type == "response.incomplete"
    assert events[-1].response.output_text == first.output_text
    second = oai.responses.create(**GREEDY, input="y", previous_response_id=first.id, max_output_tokens=2)
    assert [item.role for item in oai.responses.input_items.list(second.id, order="asc")] == [
        "user",
        "assistant",
        "user",
    ]
    assert oai.responses.retrieve(first.id).output_text == first.output_text
    oai.responses.delete(first.id)
    with pytest.raises(openai.NotFoundError):
        oai.responses.retrieve(first.id)


def test_a_response_in_the_background_is_polled_and_cancelled(oai: Any) -> None:
    running = oai.responses.create(**GREEDY, input="x", background=True, extra_body={"ignore_eos": True})
    assert running.status == "queued"
    assert oai.responses.cancel(running.id).status == "cancelled"
    assert oai.responses.retrieve(running.id).status == "cancelled"


def test_messages(claude: Any) -> None:
    asked = {"model": "tiny", "max_tokens": 6, "messages": HI, "extra_body": {"top_k": 1}}
    whole = claude.messages.create(**asked)
    with claude.messages.stream(**asked) as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert text == final.content[0].text == whole.content[0].text
    assert final.usage.output_tokens == whole.usage.output_tokens == 6
    assert claude.messages.count_tokens(model="tiny", messages=HI).input_tokens > 3


def test_models(oai: Any, claude: Any) -> None:
    assert [model.id for model in oai.models.list()] == [model.id for model in claude.models.list()] == ["tiny"]
    assert oai.models.retrieve("tiny").id == claude.models.retrieve("tiny").id == "tiny"


def test_errors_are_the_sdks_own(oai: Any, claude: Any) -> None:
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        oai.completions.create(model="no", prompt="x")
    with pytest.raises(openai.BadRequestError, match="temperature") as refused:
        oai.completions.create(model="tiny", prompt="x", temperature=-1, stream=True)
    assert refused.value.param == "temperature" and refused.value.request_id
    with pytest.raises(anthropic.NotFoundError, match="does not exist"):
        claude.messages.create(model="no", max_tokens=1, messages=HI)
    with pytest.raises(anthropic.BadRequestError, match="messages") as wrong:
        claude.messages.create(model="tiny", max_tokens=1, messages=[])
    assert wrong.value.request_id


# -- asynchronous ----------------------------------------------------------------------------------------------


async def test_many_at_once_on_one_client_each_get_their_own(server: RunningServer) -> None:
    async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:

        async def one(number: int) -> tuple[str, str]:
            asked = GREEDY | {"prompt": f"def f{number}(", "max_tokens": 12}
            streamed = ""
            async for chunk in await client.completions.create(**asked, stream=True):
                streamed += chunk.choices[0].text
            return streamed, (await client.completions.create(**asked)).choices[0].text

        pairs = await asyncio.gather(*[one(number) for number in range(40)])
    assert all(streamed == whole for streamed, whole in pairs)


async def test_the_asynchronous_anthropic_client_streams(server: RunningServer) -> None:
    async with anthropic.AsyncAnthropic(base_url=server.url, api_key="none", max_retries=0) as client:
        async with client.messages.stream(model="tiny", max_tokens=6, messages=HI) as stream:
            text = [piece async for piece in stream.text_stream]
        assert (await stream.get_final_message()).content[0].text == "".join(text)


async def test_a_stream_that_is_broken_off_ends_its_request(server: RunningServer) -> None:
    async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        long = GREEDY | {"prompt": "x", "max_tokens": 190, "extra_body": {"ignore_eos": True}}
        async with await client.completions.create(**long, stream=True) as stream:
            async for _ in stream:
                break
    async with httpx2.AsyncClient(base_url=server.url) as http:
        for _ in range(200):
            if (await http.get("/load")).json() == {"server_load": 0}:
                return
            await asyncio.sleep(0.02)
    pytest.fail("the request goes on")


# -- habits of other clients -----------------------------------------------------------------------------------

CACHED: Any = {"cache_control": {"type": "ephemeral"}}
HABITS: dict[str, tuple[str, dict[str, Any], dict[str, str]]] = {
    "LangChain's chat": (
        "/v1/chat/completions",
        {"messages": HI, "n": 1, "stream": False, "temperature": 0.7, "logprobs": None, "stop": None, "max_tokens": 2},
        {"x-stainless-lang": "python", "x-stainless-raw-response": "true", "openai-organization": "o"},
    ),
    "LangChain's stream": (
        "/v1/chat/completions",
        {"messages": HI, "stream": True, "stream_options": {"include_usage": True}, "max_tokens": 3},
        {"accept": "text/event-stream", "x-stainless-helper-method": "stream", "accept-encoding": "gzip, br, zstd"},
    ),
    "the Vercel SDK": (
        "/v1/chat/completions",
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}], "max_tokens": 3, "seed": 1},
        {"user-agent": "ai-sdk/openai-compatible", "origin": "http://localhost:3000"},
    ),
    "tools that ask for nothing": (
        "/v1/chat/completions",
        {"messages": HI, "max_tokens": 3, "tools": [], "tool_choice": "none", "response_format": {"type": "text"}},
        {},
    ),
    "curl": ("/v1/completions", {"prompt": "x", "max_tokens": 2}, {"accept": "*/*", "user-agent": "curl/8.5.0"}),
    "Claude Code": (
        "/v1/messages?beta=true",
        {
            "messages": [{"role": "user", "content": [{"type": "text", "text": "hi", **CACHED}]}],
            "system": [{"type": "text", "text": "Be brief.", **CACHED}],
            "max_tokens": 3, "metadata": {"user_id": "u"}, "tools": [], "thinking": {"type": "disabled"},
        },
        {"anthropic-version": "2023-06-01", "anthropic-beta": "a,b"},
    ),
    "LiteLLM": ("/v1/chat/completions", {"messages": HI, "max_tokens": 2, "metadata": {"a": "b"}, "extra": None}, {}),
}  # fmt: skip


@pytest.mark.parametrize("who", [name for name in HABITS if name != "LiteLLM"])
def test_the_habits_of_clients_are_understood(who: str, server: RunningServer) -> None:
    path, body, headers = HABITS[who]
    answer = httpx2.post(f"{server.url}{path}", json={"model": "tiny", **body}, headers=headers, timeout=30)
    assert answer.status_code == 200, answer.text
    assert "content-encoding" not in answer.headers


def test_an_unknown_field_is_named(server: RunningServer) -> None:
    path, body, _ = HABITS["LiteLLM"]
    answer = httpx2.post(f"{server.url}{path}", json={"model": "tiny", **body}, timeout=30)
    assert answer.status_code == 400 and answer.json()["error"]["param"] == "extra"
