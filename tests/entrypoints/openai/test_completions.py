"""Claims about POST /v1/completions: what comes back, in which shape, and that it is what the engine generates."""

import contextlib
import re
from typing import Any

import pytest

from mini_vllm import LLM, SamplingParams
from mini_vllm.sampling_params import BeamSearchParams
from tests.async_rig import checkpoint
from tests.entrypoints.openai.rig import COMPLETIONS, PROMPT, assert_idle, assert_same, joined, post, stream, whole
from tests.entrypoints.server.rig import Call, client, serving

pytestmark = pytest.mark.asyncio(loop_scope="module")

USAGE_KEYS = {
    "prompt_tokens", "total_tokens", "completion_tokens", "prompt_tokens_details", "completion_tokens_details"
}  # fmt: skip
BOS = 1
IDS = [BOS, 55, 60, 70, 80]
GREEDY = SamplingParams(temperature=0, max_tokens=8)


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM(str(checkpoint()), dtype="float32", num_threads=1, num_gpu_blocks_override=80)


# -- shape ------------------------------------------------------------------------------------------------------


async def test_an_answer_has_exactly_the_fields_that_vllm_gives(app: Any) -> None:
    body = await post(app, COMPLETIONS)
    assert set(body) == {
        "id", "object", "created", "model", "choices", "service_tier", "system_fingerprint", "usage",
        "kv_transfer_params", "ec_transfer_params", "metrics",
    }  # fmt: skip
    (choice,) = body["choices"]
    assert set(choice) == {
        "index", "text", "logprobs", "finish_reason", "stop_reason", "token_ids", "prompt_logprobs",
        "prompt_token_ids", "routed_experts",
    }  # fmt: skip
    assert re.fullmatch(r"cmpl-[0-9a-f]{32}", body["id"])
    assert (body["object"], body["model"], body["service_tier"]) == ("text_completion", "tiny", None)
    assert re.fullmatch(r"mini-vllm-[\w.]+-[0-9a-f]{8}", body["system_fingerprint"])
    assert isinstance(body["created"], int)
    assert (choice["finish_reason"], choice["stop_reason"], choice["logprobs"]) == ("length", None, None)


async def test_usage_always_has_its_details(app: Any) -> None:
    usage = (await post(app, COMPLETIONS))["usage"]
    assert set(usage) == USAGE_KEYS
    assert set(usage["prompt_tokens_details"]) == {"cached_tokens", "created_cache_tokens", "multimodal_tokens"}
    assert usage["completion_tokens"] == 8
    assert usage["total_tokens"] == usage["prompt_tokens"] + 8


async def test_cached_tokens_are_those_of_the_prefix_cache(app: Any) -> None:
    prompt = [7] * 40
    first = await post(app, COMPLETIONS, prompt=prompt)
    again = await post(app, COMPLETIONS, prompt=prompt)
    assert first["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    assert again["usage"]["prompt_tokens_details"]["cached_tokens"] == 32


async def test_a_cache_salt_keeps_prefixes_apart(app: Any) -> None:
    prompt = [8] * 40
    for salt, cached in (("a", 0), ("b", 0), ("a", 32), (None, 0)):
        body = await post(app, COMPLETIONS, prompt=prompt, cache_salt=salt)
        assert body["usage"]["prompt_tokens_details"]["cached_tokens"] == cached, salt


async def test_events_have_exactly_the_fields_that_vllm_gives(app: Any) -> None:
    chunks = await stream(app, COMPLETIONS, stream_options={"include_usage": True})
    for chunk in chunks[:-1]:
        assert set(chunk) == {"id", "object", "created", "model", "choices"}
        assert set(chunk["choices"][0]) == {
            "index", "text", "logprobs", "finish_reason", "stop_reason", "prompt_token_ids", "token_ids"
        }  # fmt: skip
    assert set(chunks[-1]) == {"id", "object", "created", "model", "choices", "usage", "system_fingerprint"}
    assert chunks[-1]["choices"] == [] and set(chunks[-1]["usage"]) == USAGE_KEYS
    assert len({(chunk["id"], chunk["created"], chunk["object"]) for chunk in chunks}) == 1


async def test_without_a_usage_event_the_last_chunk_has_the_fingerprint(app: Any) -> None:
    chunks = await stream(app, COMPLETIONS)
    assert "system_fingerprint" in chunks[-1] and chunks[-1]["choices"][0]["finish_reason"] == "length"
    assert not any("usage" in chunk for chunk in chunks)


async def test_continuous_usage_counts_up(app: Any) -> None:
    chunks = await stream(app, COMPLETIONS, stream_options={"continuous_usage_stats": True})
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == sorted(counts) and counts[-1] == 8
    assert all(set(c["usage"]) == {"prompt_tokens", "total_tokens", "completion_tokens"} for c in chunks)


async def test_a_server_may_force_usage_on_every_stream() -> None:
    async with serving(enable_force_include_usage=True) as app:
        chunks = await stream(app, COMPLETIONS)
        assert chunks[-1]["usage"]["completion_tokens"] == 8


# -- content ----------------------------------------------------------------------------------------------------


async def test_text_and_ids_are_those_of_the_offline_api(app: Any, llm: LLM) -> None:
    (expected,) = llm.generate([PROMPT], GREEDY, use_tqdm=False)
    body = await post(app, COMPLETIONS, return_token_ids=True)
    choice = body["choices"][0]
    assert choice["prompt_token_ids"] == expected.prompt_token_ids
    assert (choice["text"], choice["token_ids"]) == (expected.outputs[0].text, expected.outputs[0].token_ids)


async def test_every_way_to_sample_reaches_the_engine(app: Any, llm: LLM) -> None:
    fields: dict[str, Any] = {
        "temperature": 0.9, "top_p": 0.8, "top_k": 30, "min_p": 0.02, "seed": 7, "repetition_penalty": 1.2,
        "presence_penalty": 0.5, "frequency_penalty": 0.25, "n": 3, "min_tokens": 6, "max_tokens": 12,
        "bad_words": ["the"], "stop_token_ids": [100], "ignore_eos": True, "allowed_token_ids": list(range(5, 300)),
    }  # fmt: skip
    params = SamplingParams(**fields, logit_bias={60: 3.0})
    (expected,) = llm.generate([PROMPT], params, use_tqdm=False)
    body = await post(app, COMPLETIONS, **fields, logit_bias={"60": 3.0}, return_token_ids=True)
    assert [c["token_ids"] for c in body["choices"]] == [c.token_ids for c in expected.outputs]
    assert [c["text"] for c in body["choices"]] == [c.text for c in expected.outputs]


async def test_what_a_request_leaves_out_is_the_models_own_default() -> None:
    async with serving(model=None, max_model_len=128) as app:  # whose generation config has temperature 0.8, top_p 0.95
        fields: dict[str, Any] = {"prompt": "def f", "seed": 1, "temperature": None, "return_token_ids": True}
        left_out = await post(app, COMPLETIONS, **fields)
        spelt_out = await post(app, COMPLETIONS, **fields | {"temperature": 0.8, "top_p": 0.95})
        other = await post(app, COMPLETIONS, **fields | {"temperature": 5.0, "top_p": 1.0})
    assert whole(left_out) == whole(spelt_out) != whole(other)


async def test_without_max_tokens_there_are_sixteen_or_what_fits(app: Any) -> None:
    body = await post(app, COMPLETIONS, max_tokens=None, ignore_eos=True)
    assert body["usage"]["completion_tokens"] == 16
    body = await post(app, COMPLETIONS, max_tokens=None, ignore_eos=True, prompt=[9] * 250)
    assert body["usage"]["completion_tokens"] == 6


async def test_samples_may_be_asked_for_even_when_greedy(app: Any) -> None:
    choices = (await post(app, COMPLETIONS, n=2))["choices"]
    assert [choice["index"] for choice in choices] == [0, 1]
    assert choices[0]["text"] == choices[1]["text"]


@pytest.mark.parametrize("prompts", [["hello", PROMPT], [IDS, [1, 9, 9]]], ids=["texts", "ids"])
async def test_choices_of_prompt_i_begin_at_i_times_n(app: Any, prompts: list[Any]) -> None:
    fields: dict[str, Any] = {"n": 2, "temperature": 1.0, "seed": 3, "return_token_ids": True}
    together = await post(app, COMPLETIONS, prompt=prompts, **fields)
    alone = [await post(app, COMPLETIONS, prompt=prompt, **fields) for prompt in prompts]
    expected = [(c["text"], c["prompt_token_ids"]) for body in alone for c in body["choices"]]
    assert [(c["text"], c["prompt_token_ids"]) for c in together["choices"]] == expected
    assert [c["index"] for c in together["choices"]] == [0, 1, 2, 3]
    assert together["usage"]["prompt_tokens"] == sum(body["usage"]["prompt_tokens"] for body in alone)
    assert_same(joined(await stream(app, COMPLETIONS, prompt=prompts, **fields)), whole(together))


async def test_a_stop_string_ends_the_text_and_is_named(app: Any) -> None:
    text = (await post(app, COMPLETIONS, max_tokens=20))["choices"][0]["text"]
    stop = text[3:5]
    choice = (await post(app, COMPLETIONS, max_tokens=20, stop=stop))["choices"][0]
    assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == (text[: text.index(stop)], "stop", stop)
    kept = await post(app, COMPLETIONS, max_tokens=20, stop=[stop], include_stop_str_in_output=True)
    assert kept["choices"][0]["text"] == text[: text.index(stop)] + stop


async def test_echo_begins_with_the_prompt(app: Any) -> None:
    plain = (await post(app, COMPLETIONS))["choices"][0]["text"]
    assert (await post(app, COMPLETIONS, echo=True))["choices"][0]["text"] == PROMPT + plain
    ids = (await post(app, COMPLETIONS, return_token_ids=True))["choices"][0]["prompt_token_ids"]
    assert (await post(app, COMPLETIONS, prompt=ids, echo=True))["choices"][0]["text"] == PROMPT + plain


async def test_special_tokens_are_added_to_texts_unless_declined(app: Any) -> None:
    for add, begins_with_bos in ((True, True), (None, True), (False, False)):
        body = await post(app, COMPLETIONS, add_special_tokens=add, return_token_ids=True)
        assert (body["choices"][0]["prompt_token_ids"][0] == BOS) is begins_with_bos


@pytest.mark.parametrize(
    ("fields", "kept"),
    [
        ({"truncate_prompt_tokens": 3}, IDS[-3:]),
        ({"truncate_prompt_tokens": 3, "truncation_side": "right"}, IDS[:3]),
        ({"truncate_prompt_tokens": 99}, IDS),
        ({"truncate_prompt_tokens": -1}, IDS),
    ],
)
async def test_a_prompt_is_cut_where_it_is_told_to(app: Any, fields: dict[str, Any], kept: list[int]) -> None:
    body = await post(app, COMPLETIONS, prompt=IDS, return_token_ids=True, **fields)
    assert body["choices"][0]["prompt_token_ids"] == kept


async def test_minus_one_cuts_a_prompt_to_what_leaves_room_for_the_output(app: Any) -> None:
    body = await post(app, COMPLETIONS, prompt="x " * 500, truncate_prompt_tokens=-1, ignore_eos=True)
    assert (body["usage"]["prompt_tokens"], body["usage"]["completion_tokens"]) == (248, 8)


async def test_beam_search_finds_what_the_offline_api_finds(app: Any, llm: LLM) -> None:
    (expected,) = llm.beam_search([PROMPT], BeamSearchParams(beam_width=3, max_tokens=5, length_penalty=0.5))
    fields: dict[str, Any] = {
        "use_beam_search": True,
        "n": 3,
        "max_tokens": 5,
        "length_penalty": 0.5,
        "temperature": None,
    }
    body = await post(app, COMPLETIONS, **fields, return_token_ids=True, logprobs=1)
    num_prompt = body["usage"]["prompt_tokens"]
    found = [choice["token_ids"] for choice in body["choices"]]
    assert [ids[: len(beam.tokens) - num_prompt] for ids, beam in zip(found, expected.sequences, strict=True)] == [
        beam.tokens[num_prompt:] for beam in expected.sequences
    ]
    assert_same(joined(await stream(app, COMPLETIONS, **fields, return_token_ids=True, logprobs=1)), whole(body))


async def test_the_answer_bears_the_id_that_the_request_brings(app: Any) -> None:
    assert (await post(app, COMPLETIONS, request_id="my-id.1"))["id"] == "cmpl-my-id.1"


async def test_two_keys_may_choose_the_same_id_at_the_same_time() -> None:
    body = {"prompt": ["a", "b"], "n": 2, "max_tokens": 200, "ignore_eos": True, "stream": True, "request_id": "mine"}
    async with serving(api_key=("k1", "k2")) as app, contextlib.AsyncExitStack() as stack:
        for key in ("k1", "k2"):
            headers = {"authorization": f"Bearer {key}"}
            call = await stack.enter_async_context(Call(app, "POST", COMPLETIONS, body, headers))
            assert b'"id":"cmpl-mine"' in await call.chunk()
        async with client(app, "k1") as http:
            answer = await http.post(COMPLETIONS, json=body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "request_id")


async def test_fewer_larger_events_come_with_a_stream_interval(app: Any) -> None:
    one_by_one = await stream(app, COMPLETIONS, max_tokens=20, return_token_ids=True)
    chunks = await stream(app, COMPLETIONS, max_tokens=20, return_token_ids=True, stream_interval=6)
    sizes = [len(chunk["choices"][0]["token_ids"]) for chunk in chunks]
    assert_same(joined(chunks), joined(one_by_one))
    assert sizes[0] <= 2 and all(size >= 6 for size in sizes[1:-1])


# -- ends -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("streamed", [False, True])
async def test_a_client_that_leaves_takes_all_its_prompts_along(app: Any, streamed: bool) -> None:
    body = {"prompt": [[5] * 10] * 4, "n": 2, "max_tokens": 200, "ignore_eos": True, "stream": streamed}
    async with Call(app, "POST", COMPLETIONS, body) as call:
        if streamed:
            assert await call.chunk()
    await assert_idle(app)


async def test_one_bad_prompt_refuses_the_whole_request(app: Any) -> None:
    async with client(app) as http:
        answer = await http.post(COMPLETIONS, json={"prompt": ["fine", "x " * 500], "stream": True})
    assert answer.status_code == 400 and "prompt 1 of 2" in answer.json()["error"]["message"]
    await assert_idle(app)
