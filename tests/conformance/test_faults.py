"""Clients that leave, clients that do not read, and an engine that is killed under all of them."""

import asyncio
import json
import os
import random
import re
import resource
import signal
import threading
import time
from typing import Any

import httpx2
import pytest

from tests.conformance.load import random_body, restless_client, socket_client, stream_is_whole, summary
from tests.conformance.rig import BODIES, GENERATING
from tests.entrypoints.openai.rig import assert_idle
from tests.entrypoints.server.rig import Call, RunningServer, client, running_server, serving, state, wait_healthy

# -- storms ----------------------------------------------------------------------------------------------------


async def _storm(num_clients: int, seed: int) -> None:
    """On a pool so small that requests wait and are preempted."""
    rng = random.Random(seed)
    async with serving(max_num_seqs=8, num_gpu_blocks_override=40, max_num_batched_tokens=64) as app:
        clients = [
            restless_client(app, random.Random(rng.random()), max_tokens=40, prompt_words=60)
            for _ in range(num_clients)
        ]
        ends = summary(await asyncio.gather(*clients))
        assert ends["left while waiting"] and ends["left while reading"] and ends["answered 200"]
        assert set(ends) <= {"left while waiting", "left while reading", "answered 200"}, ends
        await _assert_everything_is_free(app)


async def _assert_everything_is_free(app: Any) -> None:
    engine = state(app).engine
    stats = await engine.stats()
    while stats.num_running_reqs or stats.num_waiting_reqs:  # aborts that are still on their way to the core
        await asyncio.sleep(0.01)
        stats = await engine.stats()
    await assert_idle(app)
    assert stats.kv_cache_usage == 0
    assert state(app).num_in_flight == 0
    assert await engine.waiting_reasons() == {}
    async with client(app) as http:
        for path in GENERATING:
            assert (await http.post(path, json=BODIES[path])).status_code == 200


async def test_a_storm_of_clients_that_leave_at_any_moment_loses_no_block() -> None:
    await _storm(60, seed=1)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("seed", range(3))
async def test_a_storm_of_five_hundred_clients_loses_no_block(seed: int) -> None:
    await _storm(500, seed)


@pytest.mark.slow
@pytest.mark.timeout(600)
async def test_a_storm_of_five_hundred_connections_leaves_the_server_as_it_was() -> None:
    with running_server(
        "--served-model-name", "tiny", "--max-num-seqs", "16", "--num-gpu-blocks-override", "200"
    ) as server:
        rng = random.Random(5)
        limits = httpx2.Limits(max_connections=None)
        async with httpx2.AsyncClient(base_url=server.url, timeout=300, limits=limits) as http:
            clients = [
                socket_client(http, random.Random(rng.random()), max_tokens=60, prompt_words=100) for _ in range(500)
            ]
            ends = summary(await asyncio.gather(*clients))
        assert set(ends) == {"left", "answered"}, ends
        _wait_until_idle(server)
        assert "Traceback" not in server.output() and "ERROR" not in server.output()


def _wait_until_idle(server: RunningServer) -> None:
    deadline = time.monotonic() + 20
    while True:
        text = httpx2.get(f"{server.url}/metrics", timeout=20).text
        gauges = [
            _gauge(text, name) for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
        ]
        if gauges == [0, 0, 0]:
            break
        assert time.monotonic() < deadline, gauges
        time.sleep(0.05)
    assert httpx2.get(f"{server.url}/load", timeout=20).json() == {"server_load": 0}


def _gauge(metrics: str, name: str) -> float:
    found = re.search(rf"^vllm:{name}\{{[^}}]*\}} (\S+)$", metrics, re.MULTILINE)
    assert found is not None
    return float(found[1])


@pytest.mark.parametrize("path", GENERATING)
async def test_a_request_that_is_left_while_it_waits_is_never_run(path: str) -> None:
    async with serving(max_num_seqs=1) as app:
        engine = state(app).engine
        first = BODIES["/v1/completions"] | {"max_tokens": 200, "ignore_eos": True, "stream": True}
        async with Call(app, "POST", "/v1/completions", first) as running:
            await running.chunk()
            async with Call(app, "POST", path, BODIES[path]):
                while engine.num_unfinished_requests < 2:
                    await asyncio.sleep(0.001)
                assert len(await engine.waiting_reasons()) == 1
            assert engine.num_unfinished_requests == 1
            assert await engine.waiting_reasons() == {}
            assert await running.chunk() is not None
        await _assert_everything_is_free(app)


# -- slow readers ----------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(300)
async def test_readers_that_do_not_read_hold_up_nobody_and_cost_no_memory() -> None:
    body = BODIES["/v1/completions"] | {"prompt": "x", "max_tokens": 230, "ignore_eos": True, "n": 4, "logprobs": 5}
    async with serving(max_num_seqs=64, num_gpu_blocks_override=2000, max_logprobs=20) as app, client(app) as http:
        calls = [Call(app, "POST", "/v1/completions", body | {"stream": True}) for _ in range(40)]
        for call in calls:
            call.reading.clear()
            await call.__aenter__()
        await asyncio.sleep(0.5)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        assert (await http.post("/v1/completions", json=BODIES["/v1/completions"])).status_code == 200
        while state(app).engine.num_unfinished_requests:  # the engine finishes them all, read or not
            await asyncio.sleep(0.05)
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 400 << 10  # KiB
        for call in calls:
            call.reading.set()
        for call in calls:
            whole = b"".join([piece async for piece in call.chunks()])
            assert whole.endswith(b"data: [DONE]\n\n")
            choices = [
                c
                for line in whole.split(b"\n\n")
                if line.startswith(b"data: {")
                for c in json.loads(line[6:])["choices"]
            ]
            for index in range(4):
                assert sum(len(c["logprobs"]["tokens"]) for c in choices if c["index"] == index) == 230
            await call.__aexit__(None)
        await assert_idle(app)


# -- the engine is killed --------------------------------------------------------------------------------------


class Crowd:
    """Clients of every API, streaming and not, each in a thread, all in the middle of a long answer."""

    def __init__(self, server: RunningServer, number: int) -> None:
        self.server = server
        self.ends: list[tuple[str, bool, int, bytes]] = []
        self.threads = [threading.Thread(target=self._ask, args=(i,)) for i in range(number)]

    def __enter__(self) -> "Crowd":
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        for thread in self.threads:
            thread.join(30)
            assert not thread.is_alive(), "a client still waits"

    def _ask(self, number: int) -> None:
        path = GENERATING[number % len(GENERATING)]
        body = random_body(random.Random(number), path, 1, 5) | {"stream": number % 8 < 4, "model": "tiny"}
        body.pop("logprobs", None)
        body |= {"max_output_tokens" if path == "/v1/responses" else "max_tokens": 900, "n": 1}
        if path in ("/v1/responses", "/v1/messages"):
            del body["n"]
        if path != "/v1/messages":
            body["ignore_eos"] = True
        answer = httpx2.post(f"{self.server.url}{path}", json=body, timeout=60)
        self.ends.append((path, body["stream"], answer.status_code, answer.content))

    def assert_all_were_told(self) -> None:
        assert len(self.ends) == len(self.threads)
        for path, streamed, status, content in self.ends:
            if path == "/v1/messages" and status == 200 and stream_is_whole(path, content):
                continue  # the one API without `ignore_eos`: some end by themselves
            if streamed and status == 200:
                assert _stream_ends_with_an_error(path, content), content[-300:]
            else:
                assert status == 500 and json.loads(content)["error"]["message"], (path, status, content[:300])


def _stream_ends_with_an_error(path: str, content: bytes) -> bool:
    frames = content.split(b"\n\n")[:-1]
    if path == "/v1/messages":
        return frames[-1].startswith(b'event: error\ndata: {"type":"error"')
    if path == "/v1/responses":
        return frames[-1].startswith(b"event: response.failed\n")
    return frames[-1] == b"data: [DONE]" and frames[-2].startswith(b'data: {"error":{"message"')


def _engine_pid(server: RunningServer) -> int:
    children = f"/proc/{server.process.pid}/task/{server.process.pid}/children"
    with open(children, encoding="ascii") as file:
        return int(file.read().split()[-1])


def _wait_until_running(server: RunningServer, number: int) -> None:
    deadline = time.monotonic() + 30
    while _gauge(httpx2.get(f"{server.url}/metrics", timeout=20).text, "num_requests_running") < number:
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.skipif(not os.path.exists("/proc/self/task"), reason="finds the engine through /proc")
def test_every_client_of_every_api_is_told_when_the_engine_is_killed() -> None:
    with running_server("--served-model-name", "tiny") as server:
        with Crowd(server, 16) as crowd:
            _wait_until_running(server, 8)
            os.kill(_engine_pid(server), signal.SIGKILL)
            killed = time.monotonic()
        assert time.monotonic() - killed < 15
        crowd.assert_all_were_told()
        assert server.process.wait(20) == 1
        assert "Traceback" not in server.output()


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/task"), reason="finds the engine through /proc")
def test_a_server_that_restarts_its_engine_forgets_nothing_but_what_ran() -> None:
    with running_server("--served-model-name", "tiny", "--restart-engine") as server, httpx2.Client(
        base_url=server.url, timeout=60
    ) as http:  # fmt: skip
        kept = http.post("/v1/responses", json=BODIES["/v1/responses"] | {"store": True}).json()
        long = BODIES["/v1/responses"] | {
            "store": True,
            "background": True,
            "max_output_tokens": 900,
            "ignore_eos": True,
        }
        background = http.post("/v1/responses", json=long).json()
        with Crowd(server, 16) as crowd:
            _wait_until_running(server, 8)
            os.kill(_engine_pid(server), signal.SIGKILL)
        crowd.assert_all_were_told()
        wait_healthy(server)
        failed = http.get(f"/v1/responses/{background['id']}").json()
        assert failed["status"] == "failed" and failed["error"]["code"] == "server_error"
        assert http.get(f"/v1/responses/{kept['id']}").json() == kept
        follow_up = BODIES["/v1/responses"] | {"previous_response_id": kept["id"]}
        assert http.post("/v1/responses", json=follow_up).status_code == 200
        _wait_until_idle(server)
