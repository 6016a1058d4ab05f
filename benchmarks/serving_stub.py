"""A real server whose engine computes nothing: what is left is the API.

`StubCore` stands where `EngineCore` does and answers each request with a given text, some tokens a step. It runs in an
engine process of its own behind the usual sockets and messages, so that the API process does all it does for a model,
and nothing more. Everything else is `mini-vllm serve` as it is.

    python benchmarks/serving_stub.py server --interval 0.01        prints its address
"""

import argparse
import cProfile
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from mini_vllm.core.scheduler_output import EngineCoreOutput, EngineCoreOutputs, SchedulerStats, TokenLogprobs
from mini_vllm.engine.arg_utils import EngineArgs
from mini_vllm.engine.process import mp_client
from mini_vllm.engine.process.core_loop import CoreLoop
from mini_vllm.engine.process.core_proc import Connection
from mini_vllm.engine.process.engine_process import EngineProcess
from mini_vllm.engine.process.messages import EngineInfo, Ready, Start
from mini_vllm.request import Request

MAX_MODEL_LEN = 4096
TEXT = """The road along the river was empty that morning, and the first boats were still tied to the bank. "Nobody is
up yet," she said; "we have an hour, perhaps a little more." They walked on in silence. For every field there was a
gate, and at every gate someone had written a number: 7, 12, 30 and then, quite out of order, 4.
"""
"""Answers are made of its tokens, over and over: nearly all of them have text of their own, as those of a model do."""


@dataclass(frozen=True)
class Pace:
    """interval: seconds between two steps. tokens: of each request in a step; None for all at once."""

    interval: float = 0.0
    tokens: int | None = 1

    def flags(self) -> list[str]:
        return ["--interval", str(self.interval), "--tokens", str(self.tokens or 0)]


@dataclass
class _Unfinished:
    request: Request
    num_sent: int = 0


class StubCore:
    """What `CoreLoop` asks of a core. Each request gets exactly `max_tokens` tokens; it takes no samples (n > 1)."""

    def __init__(self, token_ids: list[int], pace: Pace) -> None:
        self.scheduler = self
        self.clock = time.monotonic
        self._token_ids = token_ids
        self._pace = pace
        self._unfinished: dict[str, _Unfinished] = {}
        self._last_step = 0.0
        self._num_steps = 0

    def add_request(self, request: Request) -> None:
        if request.unborn_ids:
            raise ValueError("this engine computes nothing, and takes no samples beyond the first")
        self._unfinished[request.request_id] = _Unfinished(request)

    def abort_requests(self, request_ids: Iterable[str]) -> None:
        for request_id in request_ids:
            self._unfinished.pop(request_id, None)

    stop_requests = abort_requests

    def has_work(self) -> bool:
        return bool(self._unfinished)

    def stats(self) -> SchedulerStats:
        return SchedulerStats(step_id=self._num_steps, num_running_reqs=len(self._unfinished))

    def step(self) -> EngineCoreOutputs:
        """Wait for its turn, and give every request its next tokens."""
        wait = self._last_step + self._pace.interval - self.clock()
        if wait > 0:
            time.sleep(wait)
        self._last_step = self.clock()
        self._num_steps += 1
        outputs = [self._advance(item) for item in self._unfinished.values()]
        for output in outputs:
            if output.finished:
                del self._unfinished[output.request_id]
        stats = self.stats()
        stats.num_scheduled_tokens = sum(len(output.new_token_ids) for output in outputs)
        return EngineCoreOutputs(outputs, stats, timestamp=self.clock())

    def _advance(self, item: _Unfinished) -> EngineCoreOutput:
        params, first = item.request.sampling_params, item.num_sent
        assert params.max_tokens is not None
        left = params.max_tokens - first
        item.num_sent += min(left, self._pace.tokens or left)
        ids = [self._token_ids[i % len(self._token_ids)] for i in range(first, item.num_sent)]
        arrival = item.request.arrival_time
        return EngineCoreOutput(
            item.request.request_id,
            ids,
            finish_reason="length" if item.num_sent == params.max_tokens else None,
            logprobs=None if params.logprobs is None else [self._logprobs(i, params.logprobs) for i in ids],
            times=(arrival, arrival) if first == 0 else None,
        )

    def _logprobs(self, token_id: int, num_top: int) -> TokenLogprobs:
        ids = [token_id, *self._token_ids[:num_top]]
        return TokenLogprobs(ids, [-0.25 - 0.5 * i for i in range(len(ids))], 1)


def stub_core(args: EngineArgs, pace: Pace) -> tuple[StubCore, EngineInfo]:
    """A core whose answers suit this model's tokenizer, and what is said of it."""
    core = StubCore(args.load_tokenizer().encode(TEXT, add_special_tokens=False), pace)
    return core, EngineInfo(
        max_model_len=MAX_MODEL_LEN, num_gpu_blocks=1 << 20, block_size=16, max_request_tokens=MAX_MODEL_LEN,
        dtype="none", device="none", pid=os.getpid(),
    )  # fmt: skip


# --- the two processes ----------------------------------------------------------------------------------------


def run_engine(folder: str, parent_pid: int, pace: Pace) -> None:
    """In the place of `engine/process/core_proc.py`."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the parent says when to stop
    connection = Connection(folder, parent_pid)
    start = next(iter(connection.receive(block=True)))
    if isinstance(start, Start):
        core: Any
        core, info = stub_core(EngineArgs.from_kwargs(**start.engine_args), pace)
        connection.heartbeat = start.heartbeat
        connection.send(Ready(info))
        CoreLoop(core, connection, connection.send).run()
    connection.close()


def run_server(pace: Pace, args: dict[str, Any]) -> int:
    """`mini-vllm serve` of the bundled model, but for the engine. Prints its address once it takes requests."""
    from mini_vllm.engine.arg_utils import DEFAULT_MODEL
    from mini_vllm.entrypoints.server.launcher import run_server as serve
    from mini_vllm.entrypoints.server.serve_args import ServeArgs
    from mini_vllm.entrypoints.server.sockets import url_of

    class StubProcess(EngineProcess):
        def _spawn(self, num_threads: int | None) -> "subprocess.Popen[bytes]":
            command = [sys.executable, __file__, "engine", self._folder, str(os.getpid()), *pace.flags()]
            return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=2)

    mp_client.EngineProcess = StubProcess  # type: ignore[attr-defined]
    serve_args = ServeArgs(port=0, **args)
    return serve(
        EngineArgs(), serve_args, DEFAULT_MODEL.name, lambda state, sock: print(url_of(serve_args, sock), flush=True)
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("what", choices=("server", "engine"))
    parser.add_argument("connection", nargs="*", help="of the engine: folder of the sockets, and the server's pid")
    parser.add_argument("--interval", type=float, default=0.0)
    parser.add_argument("--tokens", type=int, default=1, help="of each request in a step; 0 for all")
    parser.add_argument("--profile", metavar="FILE", help="of the server: write what cProfile finds")
    args = parser.parse_args()
    pace = Pace(args.interval, args.tokens or None)
    if args.what == "engine":
        run_engine(args.connection[0], int(args.connection[1]), pace)
        return 0
    if args.profile is None:
        return run_server(pace, {})
    profile = cProfile.Profile()
    try:
        return profile.runcall(run_server, pace, {})
    finally:
        profile.dump_stats(args.profile)


if __name__ == "__main__":
    sys.exit(main())
