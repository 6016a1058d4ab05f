"""Processes that a serving benchmark starts and watches: a server, its address, and the CPU time it has used."""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

ROOT = Path(__file__).resolve().parent.parent
START_SECONDS = 180.0


class ServerFailedError(Exception):
    """A process ended before it was ready; says what it printed last."""


@dataclass
class Server:
    """A server that takes requests. log: what it prints and logs."""

    process: "subprocess.Popen[bytes]"
    url: str
    log: IO[bytes]

    @property
    def cpu_seconds(self) -> float:
        """User and system time of the process with all its threads, without its children. Linux only."""
        return time.clock_gettime((~self.process.pid << 3) | 2)  # MAKE_PROCESS_CPUCLOCK(pid, CPUCLOCK_SCHED)

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])


@contextlib.contextmanager
def running_server(*command: str) -> Iterator[Server]:
    """`python *command`, which prints its address at the end of a line; stopped in the end."""
    path = os.pathsep.join([str(ROOT), *(entry for entry in sys.path if entry)])
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            [sys.executable, *command],
            stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env=os.environ | {"PYTHONPATH": path},
        )  # fmt: skip
        server = Server(process, "", log)
        try:
            server.url = _wait_ready(server)
            yield server
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(15)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _wait_ready(server: Server) -> str:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and server.process.poll() is None:
        url = _address(_output(server))
        with contextlib.suppress(urllib.error.URLError, OSError):
            if url and urllib.request.urlopen(f"{url}/health", timeout=5).status == 200:
                return url
        time.sleep(0.05)
    raise ServerFailedError(f"the server did not start:\n{_output(server)[-2000:]}")


def _output(server: Server) -> str:
    server.log.seek(0)
    return server.log.read().decode(errors="replace")


def _address(text: str) -> str | None:
    """The last word of the first line that ends in an address (and is none of the log's)."""
    words = [line.split()[-1] for line in text.splitlines() if line.strip()]
    return next((word for word in words if word.startswith("http://127.0.0.1:")), None)


def model_server(*flags: str) -> contextlib.AbstractContextManager[Server]:
    """`mini-vllm serve` on a free port."""
    return running_server("-m", "mini_vllm", "serve", "--port", "0", *flags)
