"""Where the API process spends a token's time: its layers one above the other, in this process, without sockets.

The same requests go through ever more of the server, over a core that computes nothing: the engine's client alone
(`AsyncLLM`, its readers do nothing), then the whole application (its `send` does nothing). What the real server costs
beyond that (part "api") is uvicorn, the sockets and the kernel. Below the lowest layer its parts are timed one by one
on the same messages; what they leave of it is wake-ups of readers and glue.

The core runs on the same thread; what it costs is measured and left out.
"""

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Any

import uvloop
from serving_api import APIS as BACKENDS
from serving_api import Load, Sizes, body_of
from serving_report import spread_of
from serving_stub import MAX_MODEL_LEN, Pace, StubCore, stub_core

from mini_vllm.bench.serve.options import ENDPOINTS
from mini_vllm.engine.arg_utils import DEFAULT_MODEL, EngineArgs
from mini_vllm.engine.async_llm import AsyncLLM
from mini_vllm.engine.builder import read_text_half
from mini_vllm.engine.metrics.prometheus import ServerMetrics
from mini_vllm.engine.metrics.stats import IterationStats, StatLoggerBase
from mini_vllm.engine.metrics.stats_logger import StatLogger
from mini_vllm.engine.output_processor import OutputProcessor
from mini_vllm.engine.process.messages import (
    AbortRequests,
    AddRequests,
    Ended,
    EngineInfo,
    FromEngine,
    News,
    StopRequests,
    ToEngine,
    decode_from_engine,
    encode,
)
from mini_vllm.engine.protocol import NewRequest
from mini_vllm.entrypoints.server.app import build_app
from mini_vllm.entrypoints.server.serve_args import ServeArgs
from mini_vllm.entrypoints.server.state import make_state
from mini_vllm.exceptions import EngineDeadError
from mini_vllm.sampling_params import RequestOutputKind, SamplingParams
from mini_vllm.text.detokenizer import IncrementalDetokenizer

CONCURRENCY = 32
_TURNS = 4
"""Rounds of the event loop between two steps: enough for every reader to take its output and send it."""


class SteppedClient:
    """An `AsyncCoreClient` whose core steps when it is asked for news. Messages are encoded and decoded as between
    processes. core_seconds: CPU time of the core and of its encoding. frames: the news that were sent."""

    def __init__(self, core: StubCore, info: EngineInfo) -> None:
        self.info = info
        self.core_seconds = 0.0
        self.frames: list[bytes] = []
        self._core = core
        self._ready: deque[bytes] = deque()
        self._wakeup = asyncio.Event()

    def send(self, message: ToEngine) -> None:
        if isinstance(message, AddRequests):
            for item in message.requests:
                self._core.add_request(item.to_request())
        elif isinstance(message, AbortRequests | StopRequests):
            self._core.abort_requests(message.request_ids)
            self._ready.append(encode(Ended(message.request_ids)))
        self._wakeup.set()

    async def receive(self) -> FromEngine:
        while not self._ready and not self._core.has_work():
            self._wakeup.clear()
            await self._wakeup.wait()
        for _ in range(_TURNS):
            await asyncio.sleep(0)
        if not self._ready:
            start = time.thread_time()
            self._ready.append(encode(News(self._core.step())))
            self.frames.append(self._ready[-1])
            self.core_seconds += time.thread_time() - start
        message: FromEngine = decode_from_engine(self._ready.popleft())
        return message

    def may_restart(self) -> bool:
        return False

    async def restart(self) -> None:
        raise EngineDeadError("this engine is not restarted")

    def shutdown(self) -> None:
        self._core.abort_requests(list(self._core._unfinished))


class Rig:
    """An engine's client as `mini-vllm serve` makes it, and the application around it."""

    def __init__(self) -> None:
        args = EngineArgs()
        core, info = stub_core(args, Pace())
        self.client = SteppedClient(core, info)
        self.tokenizer, make_input_processor = read_text_half(args)
        metrics = ServerMetrics(DEFAULT_MODEL.name, args, info)
        self.loggers: list[StatLoggerBase] = [metrics.engine, StatLogger(time.monotonic())]
        self.engine = AsyncLLM(
            self.client,
            make_input_processor(max_model_len=MAX_MODEL_LEN, clock=time.monotonic),
            OutputProcessor(self.tokenizer),
            stat_loggers=self.loggers,
        )
        self.app = build_app(make_state(self.engine, ServeArgs(), DEFAULT_MODEL.name, metrics=metrics))

    async def ask_engine(self, load: Load, index: int) -> int:
        """One request to `AsyncLLM`; how many tokens came."""
        stream = await self._add(load, f"r{index}")
        num_tokens = 0
        async for output in stream:
            num_tokens += len(output.outputs[0].token_ids)
        return num_tokens

    async def _add(self, load: Load, request_id: str) -> Any:
        (prompt,) = await self.engine.tokenize(["The road along the river"])
        params = SamplingParams(max_tokens=load.num_tokens, temperature=0.0, output_kind=RequestOutputKind.DELTA)
        (stream,) = await self.engine.add_requests([NewRequest(request_id=request_id, prompt=prompt, params=params)])
        return stream

    async def ask_application(self, load: Load, index: int) -> int:
        """One request to the application; how many messages of its body came."""
        body, num_messages = body_of(load, DEFAULT_MODEL.name), 0
        incoming = deque([{"type": "http.request", "body": body, "more_body": False}])
        stays = asyncio.Event()

        async def receive() -> Any:
            if incoming:
                return incoming.popleft()
            await stays.wait()

        async def send(message: Any) -> None:
            nonlocal num_messages
            num_messages += message["type"] == "http.response.body"

        await self.app(_scope(ENDPOINTS[BACKENDS[load.api]], len(body)), receive, send)
        return num_messages


def _scope(path: str, length: int) -> dict[str, Any]:
    headers = {"host": "test", "content-type": "application/json", "content-length": str(length)}
    return {
        "type": "http", "asgi": {"version": "3.0", "spec_version": "2.3"}, "http_version": "1.1", "method": "POST",
        "scheme": "http", "path": path, "raw_path": path.encode(), "query_string": b"", "root_path": "",
        "server": ("127.0.0.1", 80), "client": ("127.0.0.1", 1), "state": {},
        "headers": [(name.encode(), value.encode()) for name, value in headers.items()],
    }  # fmt: skip


# --- layers ---------------------------------------------------------------------------------------------------


async def _cpu_of(rig: Rig, ask: Callable[[Load, int], Awaitable[int]], load: Load) -> float:
    """Seconds of CPU without those of the core."""
    rig.client.core_seconds = 0.0
    start = time.process_time()
    done = await asyncio.gather(*(ask(load, index) for index in range(load.concurrency)))
    seconds = time.process_time() - start - rig.client.core_seconds
    if min(done) < load.num_tokens:
        raise RuntimeError(f"{load}: {min(done)} outputs, so that some held more than one token")
    return seconds


async def _microseconds(rig: Rig, ask: Callable[[Load, int], Awaitable[int]], load: Load) -> float:
    """CPU a token beyond the first."""
    short = await _cpu_of(rig, ask, Load(load.api, load.concurrency, load.num_requests, 1))
    long = await _cpu_of(rig, ask, load)
    return (long - short) / ((load.num_tokens - 1) * load.concurrency) * 1e6


async def _layers(sizes: Sizes, repetitions: int) -> list[dict[str, Any]]:
    rig = Rig()
    try:
        num_tokens = 8 * (sizes.num_tokens - 1) + 1  # no step waits here
        engine_load = Load("completions", CONCURRENCY, CONCURRENCY, num_tokens)
        found: dict[str, list[float]] = {}
        for repetition in range(repetitions + 1):
            row = {"AsyncLLM": await _microseconds(rig, rig.ask_engine, engine_load)}
            for api in BACKENDS:
                load = Load(api, CONCURRENCY, CONCURRENCY, num_tokens)
                row[f"application, {api}"] = await _microseconds(rig, rig.ask_application, load)
            if repetition:  # the first is a warm-up
                for name, value in (row | _parts(rig, num_tokens)).items():
                    found.setdefault(name, []).append(value)
        return [{"what": name, "us_per_token": spread_of(values)} for name, values in found.items()]
    finally:
        rig.engine.shutdown()


# --- parts of the lowest layer --------------------------------------------------------------------------------


def _parts(rig: Rig, num_tokens: int) -> dict[str, float]:
    """Microseconds a token of what `AsyncLLM` does with one step's message."""
    requests = [_plain_request(rig, index, num_tokens) for index in range(CONCURRENCY)]
    core, _ = stub_core(EngineArgs(), Pace())
    for request in requests:
        core.add_request(request)
    frames = [encode(News(core.step())) for _ in range(num_tokens)]
    total, parts = num_tokens * CONCURRENCY, {}
    start = time.process_time()
    news = [decode_from_engine(frame).outputs for frame in frames]
    parts["decode messages"] = time.process_time() - start
    processor, steps = OutputProcessor(rig.tokenizer), [IterationStats(0.0) for _ in news]
    for request in requests:
        processor.add_request(request, None, None)
    start = time.process_time()
    for item, stats in zip(news, steps, strict=True):
        processor.process(item.outputs, item.timestamp, stats)
    parts["OutputProcessor"] = time.process_time() - start
    ids, detokenizer = [output.new_token_ids for item in news for output in item.outputs], _detokenizer(rig)
    start = time.process_time()
    for one in ids:
        detokenizer.update(one)
    parts["of that, detokenizer"] = time.process_time() - start
    start = time.process_time()
    for item, stats in zip(news, steps, strict=True):
        for logger in rig.loggers:
            logger.record(item.stats, stats)
    parts["metrics and log"] = time.process_time() - start
    return {f"  {name}": seconds / total * 1e6 for name, seconds in parts.items()}


def _plain_request(rig: Rig, index: int, num_tokens: int) -> Any:
    processor = rig.engine.input_processor
    (prompt,) = processor.tokenize(["The road along the river"])
    params = SamplingParams(max_tokens=num_tokens, temperature=0.0, output_kind=RequestOutputKind.DELTA)
    return processor.make_request(f"p{index}", prompt, processor.resolve_params(params))


def _detokenizer(rig: Rig) -> IncrementalDetokenizer:
    return IncrementalDetokenizer(rig.tokenizer, rig.tokenizer.encode("The road"))


def layers(sizes: Sizes) -> list[dict[str, Any]]:
    """Microseconds of CPU a streamed token, from the engine's client up."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(_layers(sizes, sizes.repetitions * 3))
