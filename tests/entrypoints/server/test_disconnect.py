"""A client that leaves takes its request along, in whatever state that is."""

import asyncio
import random
from typing import Any

import pytest

from tests.entrypoints.server.rig import Call, serving, state

ROUTES: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": [5, 6, 7], "max_tokens": 200, "ignore_eos": True},
    "/v1/chat/completions": {
        "messages": [{"role": "user", "content": "hello"}], "max_completion_tokens": 200, "ignore_eos": True,
    },
    "/v1/messages": {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 200, "temperature": 0},
}  # fmt: skip


async def idle(app: Any) -> None:
    """Until the engine has nothing left; it must not take as long as the requests would have."""
    async with asyncio.timeout(10):
        while state(app).engine.num_unfinished_requests or (await state(app).engine.stats()).num_running_reqs:
            await asyncio.sleep(0.005)
    await state(app).engine.check_integrity()


async def running(app: Any, count: int) -> None:
    async with asyncio.timeout(10):
        while state(app).engine.num_unfinished_requests != count:
            await asyncio.sleep(0.002)


@pytest.mark.parametrize("path", ROUTES)
async def test_a_client_that_leaves_its_stream_aborts_the_request(path: str) -> None:
    async with serving() as app:
        async with Call(app, "POST", path, ROUTES[path] | {"model": "tiny", "stream": True}) as call:
            assert (await call.start())["status"] == 200
            await call.chunk()
            await call.chunk()
        await idle(app)


@pytest.mark.parametrize("path", ROUTES)
async def test_a_client_that_does_not_wait_for_its_answer_aborts_the_request(path: str) -> None:
    async with serving() as app:
        async with Call(app, "POST", path, ROUTES[path] | {"model": "tiny"}) as call:
            await running(app, 1)
            call.disconnect()
            assert (await call.start())["status"] == 499
        await idle(app)


async def test_clients_that_leave_the_queue_leave_the_one_that_runs() -> None:
    async with serving(max_num_seqs=1) as app:
        body = ROUTES["/v1/completions"] | {"model": "tiny", "stream": True, "max_tokens": 30}
        async with Call(app, "POST", "/v1/completions", body) as first:
            await first.chunk()
            for _ in range(3):
                async with Call(app, "POST", "/v1/completions", body):
                    await running(app, 2)
                await running(app, 1)
            assert (b"".join([piece async for piece in first.chunks()])).endswith(b"data: [DONE]\n\n")
        await idle(app)


async def test_sixty_clients_that_leave_at_random_moments_leave_nothing() -> None:
    moments = random.Random(7)

    async def visit(app: Any) -> None:
        path = moments.choice(list(ROUTES))
        body = ROUTES[path] | {"model": "tiny", "stream": moments.random() < 0.5, "n": 2}
        if path == "/v1/messages":
            del body["n"]
        async with Call(app, "POST", path, body):
            await asyncio.sleep(moments.random() * 0.5)

    async with serving(max_num_seqs=4, num_gpu_blocks_override=40) as app:
        tasks = len(asyncio.all_tasks())
        await asyncio.gather(*(visit(app) for _ in range(60)))
        await idle(app)
        assert len(asyncio.all_tasks()) == tasks
        assert state(app).num_in_flight == 0
