"""One engine process from start to end, as its parent sees it.

`EngineProcess` starts `core_proc.py`, carries messages to and from it, and notices its death at once (a thread
waits for it) and its hanging after a while (an engine that is well is never silent for long). The sockets are in a
folder that only this user may enter, which goes when the process does.
"""

import asyncio
import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from collections import deque
from pathlib import Path
from typing import Any

import zmq

from mini_vllm.engine.process.core_proc import FROM_ENGINE, TO_ENGINE
from mini_vllm.engine.process.messages import (
    Dying,
    EngineInfo,
    FromEngine,
    Ready,
    Shutdown,
    Start,
    ToEngine,
    TokenizerFacts,
    decode_from_engine,
    encode,
)
from mini_vllm.exceptions import EngineDeadError
from mini_vllm.logger import init_logger
from mini_vllm.platforms import engine_environment

logger = init_logger(__name__)

_LAST_WORDS_SECONDS = 0.1
"""What a process said before it died may arrive a little later than the news of its death."""
_STOP_SECONDS = 5.0
_CHECKS_PER_TIMEOUT = 10
_MAX_SOCKET_PATH = 100
"""Characters that a Unix socket's path may have, a little less than any system allows."""


class EngineProcess:
    """Messages to and from one process. To be used from the event loop it was made on.

    watchdog_timeout: seconds of silence after which it is taken for hung and killed.
    """

    def __init__(self, engine_args: dict[str, Any], watchdog_timeout: float) -> None:
        self._loop = asyncio.get_running_loop()
        self._frames: deque[bytes] = deque()
        self._wakeup = asyncio.Event()
        self._dead: str | None = None
        self._silent_checks = 0
        self._check_seconds = watchdog_timeout / _CHECKS_PER_TIMEOUT
        self._watchdog: asyncio.TimerHandle | None = None
        self._is_ready = self._hung = False
        self._last_words: Exception | None = None
        self._folder = private_folder()
        self._context = zmq.Context(io_threads=1)
        self._outbox = self._socket(zmq.PUSH)
        self._outbox.connect(f"ipc://{self._folder}/{TO_ENGINE}")
        self._inbox = self._socket(zmq.PULL)
        self._inbox.bind(f"ipc://{self._folder}/{FROM_ENGINE}")
        try:
            self._process = self._spawn(engine_args.get("num_threads"))
        except BaseException:
            self._remove_sockets()
            raise
        self._loop.add_reader(self._inbox.FD, self._read)
        self._waiter = threading.Thread(target=self._wait, name="mini_vllm::engine-waiter", daemon=True)
        self._waiter.start()
        self._engine_args = engine_args

    @property
    def pid(self) -> int:
        return self._process.pid

    def _socket(self, kind: int) -> "zmq.Socket[bytes]":
        socket = self._context.socket(kind)
        socket.set_hwm(0)  # nothing is dropped and no send waits; see core_proc.Connection
        socket.reconnect_ivl = 10  # milliseconds until the engine is looked for again, while it starts
        return socket

    def _spawn(self, num_threads: int | None) -> "subprocess.Popen[bytes]":
        """The same interpreter with the same import path; what it prints goes where our errors go."""
        path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
        environment = {**engine_environment(os.environ, num_threads), "PYTHONPATH": path}
        command = [sys.executable, "-P", "-m", "mini_vllm.engine.process.core_proc", self._folder, str(os.getpid())]
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=2, env=environment)

    async def start_engine(self, tokenizer: TokenizerFacts) -> EngineInfo:
        """Let it build its engine, and wait until that takes requests. Raises what kept it from starting, as the error
        it was. Until this is called, the process only imports what it is going to need."""
        self.send(Start(self._engine_args, self._check_seconds, tokenizer))
        while True:
            try:
                message = await self.receive()
            except EngineDeadError as error:
                raise self._last_words or EngineDeadError(f"the engine failed to start: {error}") from None
            if isinstance(message, Ready):
                self._is_ready = True
                self._watchdog = self._loop.call_later(self._check_seconds, self._check)
                return message.info

    # -- messages ---------------------------------------------------------------------------------------------

    def send(self, message: ToEngine) -> None:
        """Never waits. Raises what msgspec raises for a message that cannot be encoded."""
        if self._dead is None:
            self._outbox.send(encode(message), zmq.NOBLOCK)

    async def receive(self) -> FromEngine:
        """The next message. Raises `EngineDeadError` after the last one."""
        while True:
            while not self._frames:
                if self._dead is not None:
                    raise EngineDeadError(
                        self._dead if self._last_words is None else f"{self._dead}: {self._last_words}"
                    )
                self._wakeup.clear()
                await self._wakeup.wait()
            message: FromEngine = decode_from_engine(self._frames.popleft())
            if not isinstance(message, Dying):
                return message
            self._last_words = message.error.rebuild()

    def _read(self) -> None:
        """Take every frame that is there. Decoding waits until `receive` is asked."""
        with contextlib.suppress(zmq.Again):
            while True:
                self._frames.append(self._inbox.recv(zmq.NOBLOCK))
                self._silent_checks = 0
                self._wakeup.set()

    # -- life and death ---------------------------------------------------------------------------------------

    def _check(self) -> None:
        """The watchdog. Checks are counted, not seconds, since this process may have been asleep itself."""
        self._read()
        self._silent_checks += 1
        if self._silent_checks > _CHECKS_PER_TIMEOUT:
            seconds = self._check_seconds * _CHECKS_PER_TIMEOUT
            logger.error("the engine process has been silent for %.0f s: it hangs and is killed", seconds)
            self._hung = True
            self._process.kill()
            return
        self._watchdog = self._loop.call_later(self._check_seconds, self._check)

    def _wait(self) -> None:
        """In a thread of its own, which ends with the process."""
        self._process.wait()
        with contextlib.suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(self._loop.call_later, _LAST_WORDS_SECONDS, self._bury)

    def _bury(self) -> None:
        if self._dead is None:
            self._read()
            self._dead = self._obituary()
            self._release()
            self._wakeup.set()

    def _obituary(self) -> str:
        code = self._process.returncode
        if self._hung:
            return "the engine process hung and was killed"
        if code is not None and code < 0:
            return f"the engine process was killed by signal {-code}"
        return f"the engine process exited with status {code}"

    def shutdown(self) -> None:
        """Stop it, if need be by force, and give everything back. May be called twice."""
        if self._dead is None:
            self.send(Shutdown())
            self._dead = "the engine was shut down"
            self._waiter.join(_STOP_SECONDS if self._is_ready else 0.0)
            if self._waiter.is_alive():
                self._process.kill()
            self._release()
            self._wakeup.set()

    def _release(self) -> None:
        if self._watchdog is not None:
            self._watchdog.cancel()
        if not self._loop.is_closed():
            self._loop.remove_reader(self._inbox.FD)
        self._waiter.join()
        self._remove_sockets()

    def _remove_sockets(self) -> None:
        self._context.destroy(linger=0)
        shutil.rmtree(self._folder, ignore_errors=True)


def private_folder() -> str:
    """A new folder of mode 0700 whose name is short enough for sockets."""
    folder = tempfile.mkdtemp(prefix="mini-vllm-")
    if len(folder) + len(FROM_ENGINE) + 1 > _MAX_SOCKET_PATH:
        Path(folder).rmdir()
        folder = tempfile.mkdtemp(prefix="mini-vllm-", dir="/tmp")
    return folder
