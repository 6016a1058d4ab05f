"""Threads for work on text (tokenising, chat templates), so that no prompt holds up the event loop.

A job has a time limit. Python cannot stop a thread, so a job that exceeds it goes on in its thread, which is given
up: another takes its place, and it ends when its job does. There are never more than `MAX_LOST` of these;
beyond that the pool refuses work until one is back.
"""

import asyncio
import contextlib
import queue
import threading
from collections.abc import Callable
from typing import Any, TypeVar

from mini_vllm.exceptions import EngineDeadError, InvalidParameterError, OverloadedError

T = TypeVar("T")

NUM_THREADS = 2
MAX_LOST = 8
MAX_JOBS = 4096
"""Jobs that somebody waits for at once, those that run included."""
DEFAULT_TIMEOUT = 30.0


class TextPool:
    """timeout: seconds a job may take, the wait for a thread included."""

    def __init__(self, timeout: float = DEFAULT_TIMEOUT, num_threads: int = NUM_THREADS) -> None:
        self.timeout = timeout
        self._num_threads = num_threads
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._threads: set[threading.Thread] = set()
        self._num_jobs = self._num_lost = 0
        self._closed = False

    async def run(self, work: Callable[[], T]) -> T:
        """What `work` returns or raises. Raises `InvalidParameterError` when it takes too long, `OverloadedError` when
        too much is queued."""
        self._require_room()
        job = _Job(work)
        job.timer = job.loop.call_later(self.timeout, self._expire, job)
        self._jobs.put(job)
        self._num_jobs += 1
        try:
            result: T = await job.future
            return result
        finally:
            job.is_wanted = False
            self._num_jobs -= 1

    def _require_room(self) -> None:
        if self._closed:
            raise EngineDeadError("the engine was shut down")
        if self._num_lost >= MAX_LOST or self._num_jobs >= MAX_JOBS:
            raise OverloadedError("too many prompts are being tokenised", "text_work", 1)
        while len(self._threads) < self._num_threads:
            self._start_thread()

    def _start_thread(self) -> None:
        thread = threading.Thread(target=self._serve, name="mini_vllm::text", daemon=True)
        self._threads.add(thread)
        thread.start()

    def _expire(self, job: "_Job") -> None:
        """On the event loop: the time of `job` is over, whether it runs, waits for a thread, or nobody cares."""
        with self._lock:
            has_begun = job.thread is not None
            job.is_wanted = False
            if job.thread in self._threads:
                self._threads.discard(job.thread)
                self._num_lost += 1
        if not job.future.done() and not has_begun:
            job.future.set_exception(OverloadedError("too many prompts are being tokenised", "text_work", 1))
        elif not job.future.done():
            message = f"could not be processed within {self.timeout:g} s; shorten the text or simplify the template"
            job.future.set_exception(InvalidParameterError("prompt", message))

    def _serve(self) -> None:
        """A thread: job after job, until it is given up or the pool closes."""
        me = threading.current_thread()
        while (job := self._jobs.get()) is not None:
            with self._lock:
                if not job.is_wanted:
                    continue
                job.thread = me
            job.run()
            with self._lock:
                job.thread = None
                if me not in self._threads:
                    self._num_lost -= 1
                    return  # another has taken its place

    def shutdown(self) -> None:
        """Let the threads end. A job that runs is not waited for."""
        self._closed = True
        for _ in self._threads:
            self._jobs.put(None)
        for thread in tuple(self._threads):
            thread.join(timeout=1.0)
        self._threads.clear()


class _Job:
    """thread: who runs it just now. is_wanted: False once nobody waits for it."""

    timer: asyncio.TimerHandle

    def __init__(self, work: Callable[[], Any]) -> None:
        self.work = work
        self.loop = asyncio.get_running_loop()
        self.future: asyncio.Future[Any] = self.loop.create_future()
        self.thread: threading.Thread | None = None
        self.is_wanted = True

    def run(self) -> None:
        result, error = None, None
        try:
            result = self.work()
        except Exception as raised:
            error = raised
        except BaseException as raised:  # a panic of a library written in Rust; it must not end the event loop
            error = RuntimeError(f"{type(raised).__name__}: {raised}")
        with contextlib.suppress(RuntimeError):  # the loop is closed
            self.loop.call_soon_threadsafe(self._settle, result, error)

    def _settle(self, result: Any, error: Exception | None) -> None:
        self.timer.cancel()
        if self.future.done():
            return
        if error is None:
            self.future.set_result(result)
        elif isinstance(error, StopIteration):  # which a future cannot hold
            self.future.set_exception(RuntimeError("StopIteration"))
        else:
            self.future.set_exception(error)
