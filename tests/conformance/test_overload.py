"""More requests than the pool can hold: each ends with exactly its own tokens, or is refused at the door."""

import asyncio
import random
from typing import Any

import pytest

from mini_vllm import LLM, SamplingParams
from tests.async_rig import checkpoint
from tests.conformance.rig import assert_error
from tests.entrypoints.openai.rig import assert_idle
from tests.entrypoints.server.rig import client, serving, state

Request = dict[str, Any]
POOL = {"num_gpu_blocks_override": 20, "max_num_seqs": 16, "max_num_batched_tokens": 64, "block_size": 16}
"""Of 19 blocks: two long requests fill it."""


def requests_of(number: int, seed: int) -> list[Request]:
    """Prompts of token ids, some with a beginning in common; greedy or seeded."""
    rng = random.Random(seed)
    common = [rng.randrange(3, 300) for _ in range(40)]
    made = []
    for i in range(number):
        own = [rng.randrange(3, 300) for _ in range(rng.randint(1, 60))]
        sampling = {"temperature": 0.0} if i % 2 else {"temperature": 0.9, "seed": i, "top_p": 0.9}
        made.append({"prompt": common[: rng.choice([0, 17, 40])] + own, "max_tokens": rng.randint(1, 40), **sampling})
    return made


def offline(requests: list[Request]) -> list[list[int]]:
    """The tokens of each, from an engine with room for all."""
    llm = LLM(str(checkpoint()), dtype="float32", num_threads=1, num_gpu_blocks_override=2000)
    params = [
        SamplingParams(ignore_eos=True, **{name: value for name, value in one.items() if name != "prompt"})
        for one in requests
    ]
    outputs = llm.generate([one["prompt"] for one in requests], params, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


async def ask(http: Any, request: Request, **more: Any) -> Any:
    body = request | {"model": "tiny", "ignore_eos": True, "return_token_ids": True} | more
    return await http.post("/v1/completions", json=body, timeout=600)


async def _assert_all_right(number: int, **limits: int) -> int:
    """Send all at once; how many were served."""
    requests = requests_of(number, seed=number)
    expected = offline(requests)
    async with serving(**POOL, **limits) as app, client(app) as http:
        answers = await asyncio.gather(*[ask(http, request) for request in requests])
        stats = await state(app).engine.stats()
        await assert_idle(app)
        assert stats.kv_cache_usage == 0
        assert limits or any(record.preempted_req_ids for record in await state(app).engine.step_records())
    num_served = 0
    for answer, tokens in zip(answers, expected, strict=True):
        if answer.status_code == 200:
            assert answer.json()["choices"][0]["token_ids"] == tokens
            num_served += 1
        else:
            assert_error(answer, "/v1/completions", (503,))
            assert int(answer.headers["retry-after"]) >= 1
            assert answer.json()["error"]["code"] in ("max_num_queued_reqs", "max_num_queued_tokens")
    return num_served


async def test_requests_that_are_preempted_all_end_with_their_own_tokens() -> None:
    assert await _assert_all_right(60) == 60


async def test_beyond_the_limit_requests_are_refused_and_the_others_are_right() -> None:
    assert await _assert_all_right(60, max_num_queued_reqs=25) == 25
    assert 0 < await _assert_all_right(40, max_num_queued_tokens=800) < 40


@pytest.mark.slow
@pytest.mark.timeout(900)
async def test_two_thousand_requests_on_a_pool_for_two_all_end_with_their_own_tokens() -> None:
    assert await _assert_all_right(2000) == 2000


@pytest.mark.slow
@pytest.mark.timeout(900)
async def test_of_two_thousand_requests_those_that_are_taken_are_right() -> None:
    assert 500 <= await _assert_all_right(2000, max_num_queued_reqs=500) < 2000


@pytest.mark.parametrize("policy", ["fair", pytest.param("fcfs", id="fcfs, the control")])
async def test_one_keys_flood_does_not_starve_anothers_single_request(policy: str) -> None:
    """Counted in requests of the flood that ended before it, not in seconds."""
    flood = requests_of(100, seed=7)
    keys = {"api_key": ("one", "two")}
    async with serving(**keys, scheduling_policy=policy, max_num_seqs=2) as app, client(app) as http:
        ended: list[str] = []

        async def run(request: Request, key: str) -> None:
            answer = await ask(http, request | {"max_tokens": 10}, user="u")
            assert answer.status_code == 200
            ended.append(key)

        http.headers["x-api-key"] = "one"
        tasks = [asyncio.create_task(run(request, "one")) for request in flood]
        while state(app).engine.num_unfinished_requests < 90:
            await asyncio.sleep(0.001)
        before = len(ended)
        http.headers["x-api-key"] = "two"
        await run(flood[0], "two")
        waited_for = len(ended) - before - 1
        await asyncio.gather(*tasks)
        await assert_idle(app)
    assert waited_for <= 6 if policy == "fair" else waited_for > 50
