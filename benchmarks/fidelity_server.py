"""The real runs of `simulator_fidelity.py` against `mini-vllm serve`: requests sent over HTTP when they are due."""

import asyncio
import contextlib
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import uvloop
from fidelity_requests import Timed
from serving_process import Server, model_server

from mini_vllm.bench.metrics import RequestTimeline, request_metrics
from mini_vllm.bench.noise import CpuMeter, NoiseReport
from mini_vllm.bench.serve.connection import ConnectionPool, Origin
from mini_vllm.bench.serve.datasets import ServeRequest
from mini_vllm.bench.serve.options import ServeOptions
from mini_vllm.bench.serve.runner import LoadGenerator, find_model


@dataclass
class ServedOverHttp:
    """One run, as clients saw it."""

    timelines: list[RequestTimeline]
    duration: float
    noise: NoiseReport

    def metrics(self) -> dict[str, Any]:
        return request_metrics(self.timelines, self.duration)


@dataclass
class Client:
    """Sends requests to one server. Every run has a cache salt of its own, so that none finds another's prefixes."""

    server: Server
    temperature: float
    num_runs: int = 0

    def serve(self, requests: Sequence[Timed]) -> ServedOverHttp:
        """In real time. TTFT counts from when a request was due. Raises `RuntimeError` when one fails."""
        self.num_runs += 1
        options = ServeOptions(
            base_url=self.server.url, ignore_eos=True, temperature=self.temperature, prompt_token_ids=True,
            extra_body={"cache_salt": f"run {self.num_runs} {time.time_ns()}"},
            request_id_prefix=f"fidelity-{self.num_runs}-",
        )  # fmt: skip
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(_run(options, requests))

    def idle_latencies(self, requests: Sequence[Timed]) -> list[float]:
        """Seconds to the first token of each, one after the other, on a server that has nothing else to do."""
        return [self.serve([Timed(0.0, timed.prompt, 2)]).timelines[0].ttft for timed in requests]


async def _run(options: ServeOptions, requests: Sequence[Timed]) -> ServedOverHttp:
    async with ConnectionPool(Origin.from_url(options.url, insecure=False), {}) as pool:
        model = str((await find_model(pool))["id"])
        generator = LoadGenerator(options, model, pool, len)
        sent = [ServeRequest(timed.prompt, len(timed.prompt), timed.output_len) for timed in requests]
        cpu = CpuMeter().start()
        records, _ = await generator.run(sent, [timed.arrival for timed in requests])
        noise = cpu.stop()
    for record, timed in zip(records, requests, strict=True):
        timeline = record.timeline
        timeline.arrival = record.due
        if timeline.error or timeline.num_output_tokens != timed.output_len:
            raise RuntimeError(f"{timeline.request_id} failed: {timeline.error or timeline.num_output_tokens}")
    timelines = [record.timeline for record in records]
    end = max(timeline.output_times[-1] for timeline in timelines)
    return ServedOverHttp(timelines, end - min(timeline.arrival for timeline in timelines), noise)


@contextlib.contextmanager
def client_of(flags: dict[str, Any], temperature: float) -> Iterator[Client]:
    """A server with these flags, and a client for it."""
    words = [word for name, value in flags.items() if value is not None for word in (_flag(name), str(value))]
    with model_server(*words) as server:
        yield Client(server, temperature)


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def outside_seconds(latencies: Sequence[float], predicted: Sequence[float]) -> float:
    """What a request spends outside the engine: what its first token usually takes beyond the prediction."""
    beyond = [seen - expected for seen, expected in zip(latencies, predicted, strict=True)]
    return max(0.0, statistics.median(beyond))
