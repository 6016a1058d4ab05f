"""Sends requests when they are due and notes when their tokens come.

`LoadGenerator` is handed a server's address and requests, and promises one `RequestRecord` for each: whatever goes
wrong with one is in its record and never ends the run.
"""

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from mini_vllm.bench.metrics import RequestTimeline
from mini_vllm.bench.serve.backends import READERS, StreamReading, request_body
from mini_vllm.bench.serve.connection import ConnectionFailedError, ConnectionPool, Response
from mini_vllm.bench.serve.datasets import ServeRequest
from mini_vllm.bench.serve.metrics import RequestRecord
from mini_vllm.bench.serve.options import ServeOptions
from mini_vllm.exceptions import ConfigError

CountTokens = Callable[[str], int]
OnRecord = Callable[[RequestRecord], None]


async def find_model(pool: ConnectionPool) -> dict[str, Any]:
    """The first model the server lists. Raises `ConfigError` when it lists none."""
    try:
        response = await pool.get("/v1/models")
    except ConnectionFailedError as error:
        raise ConfigError(f"base_url: {error}") from error
    try:
        models = msgspec.json.decode(response.body)["data"]
        if response.status == 200 and models and isinstance(models[0]["id"], str):
            return dict(models[0])
    except (msgspec.MsgspecError, KeyError, TypeError):
        pass
    raise ConfigError(f"model: /v1/models names none ({error_message(response)}); give one with --model")


async def wait_until_ready(pool: ConnectionPool, timeout: float) -> None:
    """Return once the server answers at all. Raises `ConfigError` when it does not within `timeout` seconds."""
    deadline = time.monotonic() + timeout
    while True:
        try:
            response = await pool.get("/health")
            if response.status < 500:
                return
            problem = error_message(response)
        except ConnectionFailedError as error:
            problem = str(error)
        if time.monotonic() >= deadline:
            raise ConfigError(f"base_url: the server is not ready: {problem}")
        await asyncio.sleep(min(0.5, max(deadline - time.monotonic(), 0.01)))


def error_message(response: Response) -> str:
    """What a response that is no success says, in one line."""
    text = response.body.decode("utf-8", "replace").strip()
    try:
        body = msgspec.json.decode(response.body)
        error = body.get("error", body) if isinstance(body, dict) else body
        text = str(error.get("message", error)) if isinstance(error, dict) else str(error)
    except msgspec.MsgspecError:
        pass
    return f"HTTP {response.status}: {' '.join(text.split())[:300]}"


@dataclass
class LoadGenerator:
    """One run. count_tokens: of a text, for servers whose answers carry no usage."""

    options: ServeOptions
    model: str
    pool: ConnectionPool
    count_tokens: CountTokens

    async def run(
        self, requests: Sequence[ServeRequest], offsets: Sequence[float], on_record: OnRecord = lambda record: None
    ) -> tuple[list[RequestRecord], float]:
        """(a record for each request in order, seconds from the first sending to the end of the last answer)."""
        limit = asyncio.Semaphore(self.options.max_concurrency or len(requests))
        bodies = [request_body(self.options, self.model, request) for request in requests]
        start = time.perf_counter()
        async with asyncio.TaskGroup() as group:
            tasks = []
            for index, (request, body, offset) in enumerate(zip(requests, bodies, offsets, strict=True)):
                due = start + offset
                if (delay := due - time.perf_counter()) > 0:
                    await asyncio.sleep(delay)
                tasks.append(group.create_task(self._one(index, request, body, due, limit, on_record)))
        return [task.result() for task in tasks], time.perf_counter() - start

    async def _one(
        self, index: int, request: ServeRequest, body: bytes, due: float, limit: asyncio.Semaphore, on_record: OnRecord
    ) -> RequestRecord:
        async with limit:
            record = await self.send(f"{self.options.request_id_prefix}{index}", request, body, due)
        on_record(record)
        return record

    async def send(
        self, request_id: str, request: ServeRequest, body: bytes | None = None, due: float | None = None
    ) -> RequestRecord:
        """Send one request now and follow its answer to the end."""
        body = body or request_body(self.options, self.model, request)
        reading, read = StreamReading(), READERS[self.options.path_kind]

        def on_event(now: float, data: bytes) -> None:
            reading.add(now, read(data))

        sent = time.perf_counter()
        timeline = RequestTimeline(request_id, request.prompt_len, sent)
        record = RequestRecord(timeline, sent if due is None else due)
        try:
            response = await self.pool.post(self.options.path, body, on_event, {"X-Request-Id": request_id})
        except ConnectionFailedError as error:
            timeline.error = str(error)
        else:
            record.status = response.status
            timeline.error = reading.error if response.status == 200 else error_message(response)
        self._note(record, reading)
        return record

    def _note(self, record: RequestRecord, reading: StreamReading) -> None:
        """What was read of the stream, into the record. Tokens are the server's count, or ours of its text."""
        timeline = record.timeline
        record.text, record.cached_tokens = reading.text, reading.cached_tokens
        timeline.finish_reason = reading.finish_reason
        timeline.num_prompt_tokens = reading.prompt_tokens or timeline.num_prompt_tokens
        total = reading.completion_tokens
        if total is None:
            total, record.counted_by = self.count_tokens(reading.text), "tokenizer"
        timeline.output_times, timeline.output_counts = reading.timed_counts(total)
        if timeline.error is None and not timeline.output_times:
            timeline.error = "the server's answer holds no token"
