"""Whatever is asked for, a stream comes to the same as the answer at once: text, ids, logprobs, ends and usage."""

import asyncio
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.entrypoints.openai.rig import CHAT, COMPLETIONS, assert_same, joined, post, stream, whole
from tests.entrypoints.server.rig import serving

TEXTS = st.text(alphabet="ab cé🙂\n", min_size=1, max_size=12)
SAMPLING = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0, 0.7, 2.0]),
        "seed": st.integers(0, 99),
        "max_tokens": st.integers(1, 24),
        "n": st.integers(1, 3),
    },
    optional={
        "stop": st.lists(st.sampled_from(["a", "e", "in", "\n", "the", " ", "�"]), min_size=1, max_size=3),
        "include_stop_str_in_output": st.booleans(),
        "stop_token_ids": st.lists(st.integers(0, 383), max_size=40),
        "min_tokens": st.just(1),
        "ignore_eos": st.booleans(),
        "skip_special_tokens": st.booleans(),
        "top_k": st.integers(1, 50),
        "return_token_ids": st.booleans(),
        "return_tokens_as_token_ids": st.booleans(),
        "stream_interval": st.integers(1, 7),
    },
)
OPTIONS = st.sampled_from([None, {"include_usage": True}, {"include_usage": True, "continuous_usage_stats": True}])
PROMPTS = st.one_of(TEXTS, st.lists(TEXTS, min_size=1, max_size=3), st.lists(st.integers(3, 383), min_size=1))
OF_COMPLETIONS = st.fixed_dictionaries(
    {"prompt": PROMPTS}, optional={"echo": st.booleans(), "logprobs": st.integers(0, 3)}
)
OF_CHATS = st.fixed_dictionaries(
    {"messages": TEXTS.map(lambda text: [{"role": "user", "content": text}])},
    optional={"logprobs": st.booleans()},
)


async def assert_the_same(app: Any, path: str, fields: dict[str, Any], options: dict[str, bool] | None) -> None:
    interval = fields.pop("stream_interval", None)
    at_once = await post(app, path, **fields)
    chunks = await stream(app, path, **fields, stream_options=options, stream_interval=interval)
    assert_same(joined(chunks), whole(at_once))
    if options is None:
        assert all("usage" not in chunk for chunk in chunks)
        return
    usage = {name: value for name, value in at_once["usage"].items() if name != "prompt_tokens_details"}
    found = chunks[-1]["usage"]
    assert {name: found[name] for name in usage} == usage
    assert found.keys() == at_once["usage"].keys()
    assert found["prompt_tokens_details"].keys() == at_once["usage"]["prompt_tokens_details"].keys()


@pytest.mark.parametrize(("path", "own"), [(COMPLETIONS, OF_COMPLETIONS), (CHAT, OF_CHATS)], ids=["text", "chat"])
async def test_a_stream_comes_to_the_same_as_the_answer_at_once(path: str, own: Any) -> None:
    async with serving(max_num_seqs=8, enable_prefix_caching=False) as app:
        await _examine(app, path, own)


async def _examine(app: Any, path: str, own: Any) -> None:
    """Hypothesis runs blocking functions: each example is driven on this loop from a thread."""
    loop = asyncio.get_running_loop()

    @settings(max_examples=25)
    @given(SAMPLING, own, OPTIONS)
    def examine(sampling: dict[str, Any], fields: dict[str, Any], options: dict[str, bool] | None) -> None:
        work = assert_the_same(app, path, {**sampling, **fields}, options)
        asyncio.run_coroutine_threadsafe(work, loop).result(60)

    await asyncio.to_thread(examine)
