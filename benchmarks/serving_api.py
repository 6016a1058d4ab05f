"""What the API process costs: CPU time a streamed token and a request, and requests a second, over a stubbed engine.

The server is `mini-vllm serve` in a process of its own, but for an engine that computes nothing (`serving_stub.py`).
The client is that of `bench serve`, in this process. CPU time is the kernel's account of the API process, all its
threads, user and system; that of the client and of the engine process is not in it.

Each figure is a difference of two loads that differ in one thing: requests of one token give the cost of a request,
what requests of many tokens cost beyond that is shared out among the tokens beyond the first.
"""

import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import uvloop
from serving_process import Server, running_server
from serving_report import spread_of
from serving_stub import Pace

from mini_vllm.bench.serve.backends import READERS, StreamReading, request_body
from mini_vllm.bench.serve.connection import ConnectionPool, Origin
from mini_vllm.bench.serve.datasets import ServeRequest
from mini_vllm.bench.serve.options import ENDPOINTS, ServeOptions

STUB = str(Path(__file__).with_name("serving_stub.py"))
PROMPT = "Write a function that returns the n-th Fibonacci number, and say in one sentence how it works."
NUM_TOP = 5
APIS = {"completions": "openai", "chat": "openai-chat", "responses": "openai-responses", "messages": "anthropic"}
INTERVALS = {1: 0.002, 32: 0.010, 256: 0.040}
"""Seconds of a step by concurrency: slow enough that no two tokens of a request meet in one event."""


@dataclass(frozen=True)
class Load:
    """num_requests equal requests, at most `concurrency` at a time. logprobs: with the `NUM_TOP` likeliest."""

    api: str
    concurrency: int
    num_requests: int
    num_tokens: int
    logprobs: bool = False
    stream: bool = True

    @property
    def name(self) -> str:
        return self.api + (", logprobs" if self.logprobs else "")


@dataclass(frozen=True)
class Outcome:
    """cpu: seconds of the API process. events: that carried tokens."""

    seconds: float
    cpu: float
    tokens: int
    events: int


def body_of(load: Load, model: str) -> bytes:
    """The JSON of each request of the load."""
    extra: dict[str, Any] = {}
    options = ServeOptions(backend=APIS[load.api], temperature=0.0)
    if load.logprobs and load.api == "responses":
        extra |= {"include": ["message.output_text.logprobs"], "top_logprobs": NUM_TOP}
    elif load.logprobs:
        options = replace(options, logprobs=NUM_TOP)
    body = json.loads(request_body(options, model, ServeRequest(PROMPT, 0, load.num_tokens)))
    if not load.stream:
        body["stream"] = False
        body.pop("stream_options", None)
    return json.dumps(body | extra).encode()


async def run_load(server: Server, load: Load, model: str) -> Outcome:
    """Send the load; every answer is read and its tokens are counted. Raises `RuntimeError` for one that is wrong."""
    body, left, sums = body_of(load, model), [load.num_requests], [0, 0]
    async with ConnectionPool(Origin.from_url(server.url), {"anthropic-version": "2023-06-01"}) as pool:
        start, cpu = time.perf_counter(), server.cpu_seconds
        async with asyncio.TaskGroup() as group:
            for _ in range(load.concurrency):
                group.create_task(_one_client(pool, load, body, left, sums))
        seconds, cpu = time.perf_counter() - start, server.cpu_seconds - cpu
    return Outcome(seconds, cpu, sums[0], sums[1])


async def _one_client(pool: ConnectionPool, load: Load, body: bytes, left: list[int], sums: list[int]) -> None:
    """One request after the other while some are `left`. sums: of tokens and events."""
    path = ENDPOINTS[APIS[load.api]]
    while left[0]:
        left[0] -= 1
        reading, read = StreamReading(), READERS[load.api]
        response = await pool.post(path, body, lambda now, data: reading.add(now, read(data)))  # noqa: B023
        if load.stream:
            tokens = reading.completion_tokens
        else:
            usage = json.loads(response.body)["usage"] if response.status == 200 else {}
            tokens = usage.get("completion_tokens", usage.get("output_tokens"))
        if response.status != 200 or tokens != load.num_tokens:
            raise RuntimeError(f"{load}: status {response.status}, {tokens} tokens, {reading.error or response.body!r}")
        sums[0] += load.num_tokens
        sums[1] += len(reading.times)


# --- arithmetic -----------------------------------------------------------------------------------------------


def costs(short: Outcome, long: Outcome, num_requests: int) -> dict[str, float]:
    """Microseconds of CPU a request (of one token) and a token beyond the first; tokens an event, of the long load."""
    per_request = short.cpu / num_requests
    num_more = long.tokens - short.tokens
    return {
        "us_per_request": per_request * 1e6,
        "us_per_token": (long.cpu - short.cpu) / num_more * 1e6,
        "tokens_per_event": long.tokens / long.events if long.events else float("nan"),
        "cpu_share": long.cpu / long.seconds,
    }


def summary(repetitions: Sequence[dict[str, float]]) -> dict[str, Any]:
    """For each figure its median and spread."""
    return {name: spread_of([each[name] for each in repetitions]) for name in repetitions[0]}


# --- the two measurements -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sizes:
    """Of part "api". num_requests: by concurrency; once for each point."""

    concurrencies: tuple[int, ...] = (1, 32, 256)
    num_tokens: int = 65
    waves: tuple[int, ...] = (12, 4, 2)
    repetitions: int = 3
    rate_requests: tuple[int, ...] = (300, 1500, 2000)
    rate_tokens: int = 8

    @classmethod
    def quick(cls) -> "Sizes":
        return cls((1, 4), 9, (2, 2), 1, (4, 8), 2)


def streaming_costs(sizes: Sizes, model: str) -> list[dict[str, Any]]:
    """A row for each API, with and without logprobs, at each concurrency."""
    rows = []
    for concurrency, waves in zip(sizes.concurrencies, sizes.waves, strict=True):
        interval = INTERVALS.get(concurrency, 0.01)
        with running_server(STUB, "server", *Pace(interval).flags()) as server, _runner() as runner:
            loads = [
                Load(api, concurrency, concurrency * waves, sizes.num_tokens, logprobs)
                for api in APIS
                for logprobs in ((False, True) if api != "messages" else (False,))
            ]
            measured: dict[Load, list[dict[str, float]]] = {load: [] for load in loads}
            for load in loads:
                runner.run(run_load(server, replace(load, num_tokens=2), model))  # warm
            for _ in range(sizes.repetitions):  # in turn, so that what else the machine does falls on all alike
                for load in loads:
                    short = runner.run(run_load(server, replace(load, num_tokens=1), model))
                    long = runner.run(run_load(server, load, model))
                    measured[load].append(costs(short, long, load.num_requests))
        rows += [
            {"what": load.name, "concurrency": concurrency, "num_requests": load.num_requests,
             "step_seconds": interval, **summary(found)}
            for load, found in measured.items()
        ]  # fmt: skip
    return rows


def request_rates(sizes: Sizes, model: str) -> list[dict[str, Any]]:
    """Requests a second that are not streamed and whose tokens are all there at once."""
    rows = []
    with running_server(STUB, "server", *Pace(0.0, None).flags()) as server, _runner() as runner:
        for concurrency, num_requests in zip(sizes.concurrencies, sizes.rate_requests, strict=True):
            for api in APIS:
                load = Load(api, concurrency, num_requests, sizes.rate_tokens, stream=False)
                runner.run(run_load(server, replace(load, num_requests=concurrency), model))
                found = [runner.run(run_load(server, load, model)) for _ in range(sizes.repetitions)]
                rates = [{
                    "requests_per_second": load.num_requests / each.seconds,
                    "us_per_request": each.cpu / load.num_requests * 1e6,
                    "cpu_share": each.cpu / each.seconds,
                } for each in found]  # fmt: skip
                rows.append({"what": api, "concurrency": concurrency, "num_requests": num_requests, **summary(rates)})
    return rows


def _runner() -> "asyncio.Runner":
    return asyncio.Runner(loop_factory=uvloop.new_event_loop)
