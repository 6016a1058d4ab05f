"""Claims about what a reader of `OutputStream` gets, however slow it is."""

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mini_vllm.engine.output_stream import OutputStream
from mini_vllm.exceptions import EngineDeadError, RequestError
from mini_vllm.outputs import CompletionOutput, Logprob, RequestOutput


def delta(index: int, token_id: int, finish_reason: str | None = None, logprobs: bool = False) -> CompletionOutput:
    entry = [{token_id: Logprob(-1.0, 1)}] if logprobs else None
    return CompletionOutput(index, f"<{token_id}>", [token_id], -float(token_id), entry, finish_reason)


def output(*completions: CompletionOutput, finished: bool = False, error: str | None = None) -> RequestOutput:
    return RequestOutput("r", "prompt", [1], list(completions), finished, error=error)


def make(merges: bool = True) -> tuple[OutputStream, list[str]]:
    closed: list[str] = []
    return OutputStream("r", merges, closed.append), closed


async def rest_of(stream: OutputStream) -> list[RequestOutput]:
    return [item async for item in stream]


tokens = st.lists(st.tuples(st.integers(0, 2), st.integers(0, 99)), min_size=1, max_size=30)
"""(index of the sequence, its next token)"""


@given(tokens, st.lists(st.booleans(), min_size=31, max_size=31), st.booleans())
def test_merged_deltas_add_up_however_the_reader_splits_them(
    steps: list[tuple[int, int]], reads: list[bool], logprobs: bool
) -> None:
    async def scenario() -> None:
        stream, _ = make()
        got: list[RequestOutput] = []
        for (index, token_id), read in zip(steps, reads, strict=False):
            stream.put(output(delta(index, token_id, logprobs=logprobs)))
            if read:
                got.append(await anext(stream))
        stream.put(output(delta(0, 7, "stop", logprobs), finished=True))
        got += await rest_of(stream)
        assert [item.finished for item in got] == [False] * (len(got) - 1) + [True]
        for index in range(3):
            expected = [token_id for i, token_id in [*steps, (0, 7)] if i == index]
            parts = [part for item in got for part in item.outputs if part.index == index]
            assert [token_id for part in parts for token_id in part.token_ids] == expected
            assert "".join(part.text for part in parts) == "".join(f"<{token_id}>" for token_id in expected)
            if logprobs:
                assert [next(iter(p)) for part in parts for p in part.logprobs or ()] == expected
            if parts:
                assert parts[-1].cumulative_logprob == -expected[-1]
        assert all([part.index for part in item.outputs] == sorted({p.index for p in item.outputs}) for item in got)

    asyncio.run(scenario())


async def test_a_reader_that_is_behind_costs_one_output_however_many_come() -> None:
    stream, _ = make()
    for token_id in range(1000):
        stream.put(output(delta(0, token_id)))
    got = await anext(stream)
    assert got.outputs[0].token_ids == list(range(1000)) and len(got.outputs) == 1


async def test_cumulative_outputs_replace_each_other() -> None:
    stream, _ = make(merges=False)
    for length in (1, 2, 3):
        stream.put(output(CompletionOutput(0, "x" * length, [5] * length)))
    assert (await anext(stream)).outputs[0].text == "xxx"


async def test_prompt_logprobs_and_the_end_survive_a_merge() -> None:
    stream, _ = make()
    first = output(delta(0, 1))
    first.prompt_logprobs = [None]
    stream.put(first)
    stream.put(output(delta(0, 2, "length"), finished=True))
    (got,) = await rest_of(stream)
    assert got.finished and got.prompt_logprobs == [None] and got.outputs[0].finish_reason == "length"


async def test_a_reader_that_waits_is_woken_by_an_output_and_by_an_error() -> None:
    stream, _ = make()
    reading = asyncio.create_task(rest_of(stream))
    await asyncio.sleep(0)
    stream.put(output(delta(0, 1)))
    await asyncio.sleep(0)
    stream.fail(EngineDeadError("gone"))
    with pytest.raises(EngineDeadError, match="gone"):
        await reading


async def test_what_came_before_an_error_is_read_first() -> None:
    stream, _ = make()
    stream.put(output(delta(0, 1)))
    stream.put(output(finished=True, error="no token allowed"))
    assert (await anext(stream)).outputs[0].token_ids == [1]
    with pytest.raises(RequestError, match="no token allowed"):
        await anext(stream)
    assert await rest_of(stream) == []


async def test_closing_aborts_once_and_not_at_all_after_the_end() -> None:
    stream, closed = make()
    await stream.aclose()
    await stream.aclose()
    assert closed == ["r"] and await rest_of(stream) == []
    stream, closed = make()
    stream.put(output(delta(0, 1, "stop"), finished=True))
    await stream.aclose()
    assert closed == []


async def test_closing_from_elsewhere_ends_a_reader_that_waits() -> None:
    stream, closed = make()
    reading = asyncio.create_task(rest_of(stream))
    await asyncio.sleep(0)
    await stream.aclose()
    assert await reading == [] and closed == ["r"]
