"""Claims about the logprobs of /v1/completions: which tokens, how likely, and where in the text they are."""

from typing import Any

import pytest

from mini_vllm import LLM, SamplingParams
from mini_vllm.outputs import Logprob
from mini_vllm.text.tokenizer import Tokenizer
from tests.async_rig import checkpoint
from tests.entrypoints.openai.rig import COMPLETIONS, PROMPT, assert_same, joined, post, stream, whole
from tests.entrypoints.server.rig import serving

pytestmark = pytest.mark.asyncio(loop_scope="module")

KEYS = {"text_offset", "token_logprobs", "tokens", "top_logprobs"}


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM(str(checkpoint()), dtype="float32", num_threads=1, num_gpu_blocks_override=80)


def bytes_of(token: str) -> bytes:
    """The bytes of a token as it is named."""
    if token.startswith("bytes:"):
        return bytes(int(part, 16) for part in token.removeprefix("bytes:").split("\\x")[1:])
    return token.encode()


async def test_tokens_and_logprobs_are_those_of_the_offline_api(app: Any, llm: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=8, logprobs=3)
    (expected,) = llm.generate([PROMPT], params, use_tqdm=False)
    logprobs = (await post(app, COMPLETIONS, logprobs=3))["choices"][0]["logprobs"]
    assert set(logprobs) == KEYS and len({len(values) for values in logprobs.values()}) == 1
    (output,) = expected.outputs
    assert output.logprobs is not None
    assert logprobs["token_logprobs"] == pytest.approx(
        [entries[i].logprob for i, entries in zip(output.token_ids, output.logprobs, strict=True)], abs=1e-5
    )
    assert [len(top) for top in logprobs["top_logprobs"]] == [len(entries) for entries in output.logprobs]


@pytest.mark.parametrize("count", [0, 1, 5])
async def test_each_position_has_the_likeliest_tokens_and_its_own(app: Any, count: int) -> None:
    logprobs = (await post(app, COMPLETIONS, logprobs=count, temperature=1.0, seed=2))["choices"][0]["logprobs"]
    for token, logprob, top in zip(
        logprobs["tokens"], logprobs["token_logprobs"], logprobs["top_logprobs"], strict=True
    ):
        assert top[token] == logprob and max(count, 1) <= len(top) <= count + 1


async def test_the_names_of_tokens_are_their_bytes(app: Any) -> None:
    """Of tokens that are half a character as well: names put together are the text."""
    choice = (await post(app, COMPLETIONS, logprobs=1, temperature=2.0, seed=5, max_tokens=60))["choices"][0]
    raw = b"".join(map(bytes_of, choice["logprobs"]["tokens"]))
    assert any(token.startswith("bytes:") for token in choice["logprobs"]["tokens"])
    assert raw.decode(errors="replace") == choice["text"]


@pytest.mark.parametrize("seed", range(4))
async def test_offsets_say_where_each_token_begins_in_the_text(app: Any, seed: int) -> None:
    fields: dict[str, Any] = {
        "logprobs": 0,
        "temperature": 1.5,
        "seed": seed,
        "max_tokens": 40,
        "echo": True,
        "ignore_eos": True,
    }
    choice = (await post(app, COMPLETIONS, prompt="naïve 🙂 café", **fields))["choices"][0]
    text, logprobs = choice["text"], choice["logprobs"]
    pairs = list(zip(logprobs["tokens"], logprobs["text_offset"], strict=True))
    assert logprobs["text_offset"] == sorted(logprobs["text_offset"])
    for token, offset in pairs:
        if not token.startswith("bytes:") and token not in ("<s>", "</s>", "<unk>"):
            assert text.startswith(token, offset), (token, offset)
    smile = text.index("🙂")
    assert [offset for token, offset in pairs if bytes_of(token)[:1] in b"\xf0\x9f"][:2] == [smile, smile]


async def test_offsets_stay_right_while_text_is_held_back_for_a_stop_string(app: Any) -> None:
    text = (await post(app, COMPLETIONS, max_tokens=20))["choices"][0]["text"]
    fields: dict[str, Any] = {"max_tokens": 20, "logprobs": 1, "stop": [text[4:9], text[:6] + "\0"]}
    body = await post(app, COMPLETIONS, **fields)
    choice = body["choices"][0]
    assert choice["finish_reason"] == "stop"
    for token, offset in zip(choice["logprobs"]["tokens"], choice["logprobs"]["text_offset"], strict=True):
        assert token.startswith("bytes:") or text.startswith(token, offset)
    assert_same(joined(await stream(app, COMPLETIONS, **fields)), whole(body))


async def test_echo_shows_the_logprobs_of_the_prompt_first(app: Any, llm: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=4, prompt_logprobs=2, logprobs=2)
    (expected,) = llm.generate([PROMPT], params, use_tqdm=False)
    fields: dict[str, Any] = {"echo": True, "logprobs": 2, "max_tokens": 4}
    body = await post(app, COMPLETIONS, **fields)
    logprobs = body["choices"][0]["logprobs"]
    num_prompt = len(expected.prompt_token_ids)
    assert logprobs["token_logprobs"][0] is logprobs["top_logprobs"][0] is None
    assert expected.prompt_logprobs is not None
    known = zip(expected.prompt_token_ids[1:], expected.prompt_logprobs[1:], strict=True)
    assert logprobs["token_logprobs"][1:num_prompt] == pytest.approx([e[i].logprob for i, e in known if e], abs=1e-5)
    assert logprobs["text_offset"][num_prompt] == len(PROMPT)
    assert len(logprobs["tokens"]) == num_prompt + 4
    assert_same(joined(await stream(app, COMPLETIONS, **fields)), whole(body))


async def test_zero_tokens_with_echo_score_the_prompt_and_nothing_else(app: Any) -> None:
    """As evaluation harnesses ask."""
    scored = await post(app, COMPLETIONS, prompt=[[1, 60, 61, 62], [1, 70, 71]], echo=True, logprobs=1, max_tokens=0)
    longer = await post(app, COMPLETIONS, prompt=[[1, 60, 61, 62], [1, 70, 71]], echo=True, logprobs=1, max_tokens=1)
    for choice, other, length in zip(scored["choices"], longer["choices"], (4, 3), strict=True):
        assert choice["logprobs"] == {name: values[:length] for name, values in other["logprobs"].items()}
        assert other["text"].startswith(choice["text"]) and choice["finish_reason"] == "length"
    assert scored["usage"]["completion_tokens"] == 0 and scored["usage"]["total_tokens"] == 7
    streamed = await stream(app, COMPLETIONS, prompt=[1, 60, 61, 62], echo=True, logprobs=1, max_tokens=0)
    assert joined(streamed)[0]["logprobs"] == scored["choices"][0]["logprobs"]


async def test_the_prompts_logprobs_come_by_token_id(app: Any, llm: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=2)
    (expected,) = llm.generate([PROMPT], params, use_tqdm=False)
    shown = (await post(app, COMPLETIONS, prompt_logprobs=2))["choices"][0]["prompt_logprobs"]
    assert shown[0] is None and expected.prompt_logprobs is not None
    for entries, known in zip(shown[1:], expected.prompt_logprobs[1:], strict=True):
        assert known is not None and entries.keys() == {str(i) for i in known}
        for token_id, entry in known.items():
            found = entries[str(token_id)]
            assert found["logprob"] == pytest.approx(entry.logprob, abs=1e-5)
            assert (found["rank"], found["decoded_token"]) == (entry.rank, entry.decoded_token)


async def test_tokens_are_named_by_id_on_request(app: Any) -> None:
    fields: dict[str, Any] = {"logprobs": 1, "return_tokens_as_token_ids": True, "return_token_ids": True}
    choice = (await post(app, COMPLETIONS, **fields))["choices"][0]
    assert choice["logprobs"]["tokens"] == [f"token_id:{i}" for i in choice["token_ids"]]


async def test_logprobs_of_chosen_ids_are_there_however_unlikely(app: Any) -> None:
    fields: dict[str, Any] = {"logprobs": 0, "logprob_token_ids": [3, 4], "return_tokens_as_token_ids": True}
    for top in (await post(app, COMPLETIONS, **fields))["choices"][0]["logprobs"]["top_logprobs"]:
        assert {"token_id:3", "token_id:4"} <= set(top)


async def test_an_impossible_token_has_a_finite_logprob() -> None:
    """JSON has no infinity."""
    from mini_vllm.entrypoints.openai.logprobs import CompletionLogprobsShaper

    tokenizer = Tokenizer.from_folder(checkpoint())
    shaper = CompletionLogprobsShaper(tokenizer, SamplingParams(logprobs=1), False, [1], 0)
    shaped = shaper.output([60], [{60: Logprob(float("-inf"), 1)}])
    assert shaped.token_logprobs == [-9999.0] and list(shaped.top_logprobs[0].values()) == [-9999.0]  # type: ignore[union-attr]


async def test_more_logprobs_than_the_engine_allows_are_refused_with_the_limit() -> None:
    async with serving(max_logprobs=2) as app:
        error = (await post(app, COMPLETIONS, 400, logprobs=3))["error"]
        assert error["param"] == "logprobs" and "at most 2" in error["message"]
