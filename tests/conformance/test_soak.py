"""Mixed load for a long time: memory, threads and files of both processes stay as they are, and nothing is logged.

MINI_VLLM_SOAK_SECONDS says for how long, 60 by default; a run that means something is 1800.
"""

import asyncio
import os
import random
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import httpx2
import pytest

from tests.conformance.load import socket_client
from tests.entrypoints.server.rig import RunningServer, running_server

SECONDS = float(os.environ.get("MINI_VLLM_SOAK_SECONDS", "60"))
NUM_CLIENTS = 24
MIB = 1 << 20
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(SECONDS + 300),
    pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="reads /proc"),
]


@dataclass
class Sample:
    """Of one process. rss: bytes."""

    time: float
    rss: int
    num_threads: int
    num_files: int


def sample(pid: int) -> Sample:
    folder = Path(f"/proc/{pid}")
    pages = int((folder / "statm").read_text().split()[1])
    threads, files = len(list((folder / "task").iterdir())), len(list((folder / "fd").iterdir()))
    return Sample(time.monotonic(), pages * os.sysconf("SC_PAGE_SIZE"), threads, files)


def growth_per_hour(samples: list[Sample]) -> float:
    """Of the RSS: slope of the line through the second half, in bytes."""
    half = samples[len(samples) // 2 :]
    mean_time = sum(s.time for s in half) / len(half)
    mean_rss = sum(s.rss for s in half) / len(half)
    spread = sum((s.time - mean_time) ** 2 for s in half)
    return 3600 * sum((s.time - mean_time) * (s.rss - mean_rss) for s in half) / spread


BAD = [b"{", b"[]", b'{"model":"nope","prompt":"x"}', b'{"prompt":"x","n":-1}', b'{"prompt":"' + b"x " * 5000 + b'"}']


async def bad_request(http: httpx2.AsyncClient, rng: random.Random) -> str:
    """One that is refused."""
    path = rng.choice(["/v1/completions", "/v1/messages", "/v1/responses", "/v1/chat/completions"])
    answer = await http.post(path, content=rng.choice(BAD), headers={"content-type": "application/json"})
    return f"status {answer.status_code}"


async def _client(http: httpx2.AsyncClient, seed: int, until: float, ends: Counter[str]) -> None:
    rng = random.Random(seed)
    while time.monotonic() < until:
        if rng.random() < 0.1:
            ends[await bad_request(http, rng)] += 1
        elif rng.random() < 0.05:
            ends[f"metrics {(await http.get('/metrics')).status_code}"] += 1
        else:
            ends[await socket_client(http, rng, max_tokens=60, prompt_words=120)] += 1


async def _watch(pids: list[int], until: float) -> list[list[Sample]]:
    samples: list[list[Sample]] = [[] for _ in pids]
    while time.monotonic() < until:
        for one, pid in zip(samples, pids, strict=True):
            one.append(sample(pid))
        await asyncio.sleep(max(SECONDS / 400, 0.25))
    return samples


def _pids(server: RunningServer) -> list[int]:
    """Of the API process and the engine."""
    pid = server.process.pid
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [pid, int(children[-1])]


async def test_memory_threads_and_files_stay_flat_under_mixed_load() -> None:
    options = ("--served-model-name", "tiny", "--max-num-seqs", "16", "--num-gpu-blocks-override", "300")
    with running_server(*options, "--max-stored-responses", "50", "--disable-uvicorn-access-log") as server:
        ends: Counter[str] = Counter()
        start = time.monotonic()
        until = start + SECONDS
        limits = httpx2.Limits(max_connections=None)
        async with httpx2.AsyncClient(base_url=server.url, timeout=120, limits=limits) as http:
            watching = asyncio.create_task(_watch(_pids(server), until))
            await asyncio.gather(*[_client(http, seed, until, ends) for seed in range(NUM_CLIENTS)])
            samples = await watching
            await asyncio.sleep(1)
            assert (await http.get("/load")).json() == {"server_load": 0}
        print(f"{SECONDS:g} s: {dict(ends)}")  # noqa: T201
        for name, of_process in zip(("API", "engine"), samples, strict=True):
            _report(name, of_process)
            _assert_flat(name, of_process)
        assert ends["answered"] > SECONDS and ends["left"] and ends["status 400"] and ends["status 404"]
        assert set(ends) == {"answered", "left", "status 400", "status 404", "metrics 200"}, ends
        log = server.output()
        assert "Traceback" not in log and "ERROR" not in log, log[-5000:]
        assert server.stop() == 0


def _report(name: str, samples: list[Sample]) -> None:
    first, last = samples[len(samples) // 2], samples[-1]
    rss = ", ".join(f"{one.rss / MIB:.1f}" for one in (samples[0], first, last))
    print(  # noqa: T201
        f"{name}: RSS {rss} MiB at start, half and end; "
        f"{growth_per_hour(samples) / MIB:.1f} MiB/h over the second half; threads {first.num_threads} to "
        f"{last.num_threads}, files {first.num_files} to {last.num_files}"
    )


def _assert_flat(name: str, samples: list[Sample]) -> None:
    """In half an hour to 8 MiB an hour; in a minute, memory is still settling."""
    half = samples[len(samples) // 2 :]
    grown = half[-1].rss - half[0].rss
    assert grown < 6 * MIB, f"{name} grew by {grown / MIB:.1f} MiB in the second half"
    if SECONDS >= 1200:
        assert growth_per_hour(samples) < 8 * MIB, f"{name} grows by {growth_per_hour(samples) / MIB:.1f} MiB/h"
    assert max(s.num_threads for s in half) <= max(s.num_threads for s in samples[: len(samples) // 2]) + 1
    assert max(s.num_files for s in half) <= max(s.num_files for s in samples[: len(samples) // 2]) + NUM_CLIENTS
