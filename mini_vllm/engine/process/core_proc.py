"""The engine process: builds the core, says that it is ready, and runs its loop until told to stop.

Started by `engine_process.py` as `python -m mini_vllm.engine.process.core_proc SOCKETS PARENT_PID`, with nothing of
the API in it. It ignores interrupts, which are the parent's to handle, and never outlives the parent. On SIGTERM it
finishes the requests it has (a second one stops it at once). Everything it logs goes to stderr.
"""

import ctypes
import gc
import logging
import os
import signal
import sys
import time
from collections.abc import Iterable
from importlib import import_module
from types import FrameType

import zmq

from mini_vllm.engine.arg_utils import EngineArgs
from mini_vllm.engine.builder import describe_core, start_core
from mini_vllm.engine.process.core_loop import CoreLoop
from mini_vllm.engine.process.messages import (
    Dying,
    ErrorReport,
    FromEngine,
    Heartbeat,
    Ready,
    Shutdown,
    Start,
    ToEngine,
    decode_to_engine,
    encode,
)
from mini_vllm.engine.process.warm_up import warm_up
from mini_vllm.exceptions import MiniVLLMError
from mini_vllm.logger import init_logger

logger = init_logger(__name__)

TO_ENGINE, FROM_ENGINE = "to-engine", "from-engine"
"""The two sockets in the folder. Whoever reads from one binds it, so that its writer can write before that."""

PARENT_CHECK_SECONDS = 1.0
TERMINATION_GRACE_SECONDS = 2.0
"""Idle time after a SIGTERM. Often the parent got one, too: then it drains, and says itself when to stop."""
_PR_SET_PDEATHSIG, _PR_SET_NAME = 1, 15


class Connection:
    """Both sockets, as inbox and outbox of a `CoreLoop`. Nothing is ever dropped: the high-water marks are off, and
    what is queued is bounded by the answers to unfinished requests."""

    def __init__(self, folder: str, parent_pid: int) -> None:
        self.parent_pid = parent_pid
        self.heartbeat = PARENT_CHECK_SECONDS
        self.is_terminated = False
        self._context = zmq.Context(io_threads=1)
        self._inbox, self._outbox = self._context.socket(zmq.PULL), self._context.socket(zmq.PUSH)
        for socket in (self._inbox, self._outbox):
            socket.set_hwm(0)
        self._inbox.bind(f"ipc://{folder}/{TO_ENGINE}")
        self._outbox.connect(f"ipc://{folder}/{FROM_ENGINE}")
        self._last_sent = time.monotonic()

    def receive(self, block: bool) -> Iterable[ToEngine]:
        if block:
            self._wait()
        messages: list[ToEngine] = []
        while self._inbox.poll(0):
            messages.append(decode_to_engine(self._inbox.recv()))
        if block and not messages:
            messages.append(Shutdown())
        return messages

    def _wait(self) -> None:
        """Until a message is there, or there is nobody left to send one."""
        start = time.monotonic()
        while not self._inbox.poll(int(min(self.heartbeat, PARENT_CHECK_SECONDS) * 1000)):
            now = time.monotonic()
            if os.getppid() != self.parent_pid:
                logger.error("the parent process is gone")
                return
            if self.is_terminated and now - start >= TERMINATION_GRACE_SECONDS:
                return
            if now - self._last_sent >= self.heartbeat:
                self.send(Heartbeat())

    def send(self, message: FromEngine) -> None:
        self._outbox.send(encode(message))
        self._last_sent = time.monotonic()

    def close(self) -> None:
        """What was sent still leaves, unless nobody takes it."""
        self._inbox.close(linger=0)
        self._outbox.close(linger=2000)
        self._context.term()


def main(folder: str, parent_pid: int) -> int:
    """The whole life of the process; returns its exit status."""
    _become_engine(parent_pid)
    connection = Connection(folder, parent_pid)
    try:
        return _serve(connection)
    except Exception as error:
        if not isinstance(error, MiniVLLMError):
            logger.exception("the engine died")
        connection.send(Dying(ErrorReport.of(error)))
        return 1
    finally:
        connection.close()


def _serve(connection: Connection) -> int:
    import_module("mini_vllm.executor.uniproc")  # torch, while the parent still reads the tokenizer
    start = next(iter(connection.receive(block=True)))
    if not isinstance(start, Start):
        return 0
    connection.heartbeat = start.heartbeat
    config = EngineArgs.from_kwargs(**start.engine_args).create_engine_config(start.tokenizer)
    core = start_core(config)
    try:
        warm_up(core)
        gc.freeze()  # what is there now stays: no collection need look at it
        signal.signal(signal.SIGTERM, _Terminator(connection))
        connection.send(Ready(describe_core(core, config)))
        CoreLoop(core, connection, connection.send).run()
    finally:
        core.shutdown()
    return 0


class _Terminator:
    """SIGTERM: stop once there has been nothing to do for a while, or at once when it comes again."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection

    def __call__(self, signum: int, frame: FrameType | None) -> None:
        if self.connection.is_terminated:
            raise SystemExit(128 + signum)
        self.connection.is_terminated = True


def _become_engine(parent_pid: int) -> None:
    """Signals, name, and the tie to the parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        libc.prctl(_PR_SET_NAME, b"mini_vllm::Core")
    if os.getppid() != parent_pid:  # it died before the tie was made
        raise SystemExit(1)
    formatter = logging.Formatter(f"(EngineCore pid={os.getpid()}) %(levelname)s %(asctime)s [%(name)s] %(message)s")
    formatter.datefmt = "%m-%d %H:%M:%S"
    for handler in logging.getLogger("mini_vllm").handlers:
        handler.setFormatter(formatter)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], int(sys.argv[2])))
