"""Questions to the core that it answers between two steps, each by a number of its own."""

import asyncio
import itertools
from collections.abc import Callable
from typing import Any, TypeVar

import msgspec

from mini_vllm.engine.process.messages import UtilityCall, UtilityResult
from mini_vllm.exceptions import EngineDeadError

T = TypeVar("T")


class UtilityCalls:
    """The calls that wait for their answer. send: takes a message to the core."""

    def __init__(self, send: Callable[[UtilityCall], None]) -> None:
        self._send = send
        self._ids = itertools.count()
        self._waiting: dict[int, asyncio.Future[bytes]] = {}

    async def call(self, result_type: type[T], method: str, *args: Any) -> T:
        """What `core_loop.UTILITIES[method]` returns. Raises what it raises, or `EngineDeadError`."""
        call_id = next(self._ids)
        future = self._waiting[call_id] = asyncio.get_running_loop().create_future()
        try:
            self._send(UtilityCall(call_id, method, list(args)))
            return msgspec.msgpack.decode(await future, type=result_type)
        finally:
            del self._waiting[call_id]

    def settle(self, result: UtilityResult) -> None:
        """The core's answer; of no interest when the caller has gone."""
        future = self._waiting.get(result.call_id)
        if future is None or future.done():
            return
        error = result.error
        if error is None:
            future.set_result(result.result)
        else:
            future.set_exception(AssertionError(error.message) if error.kind == "AssertionError" else error.rebuild())

    def fail(self, reason: str) -> None:
        """The core will not answer any more."""
        for future in self._waiting.values():
            if not future.done():
                future.set_exception(EngineDeadError(reason))
