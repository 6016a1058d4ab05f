"""A trace of requests to replay elsewhere: when they came, how long they were, what they shared; nothing of their text.

One JSON object a line, with the fields of the public Mooncake traces: `timestamp` (milliseconds since the recording
began), `input_length`, `output_length` (tokens, of all samples) and `hash_ids`, one number for each block of the prompt
(a partial last one included): two prompts that begin alike have the same numbers as far as whole blocks are alike.
Numbers are given in order of first appearance, so that nothing can be computed back from them. Our own fields:
`block_size`, `tenant` and `user` (numbers, too), `n`, `max_tokens`, `priority`, `finish_reason`.
"""

import hashlib
import json
import math
import queue
import threading
import time
from array import array
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mini_vllm.exceptions import ConfigError
from mini_vllm.logger import init_logger
from mini_vllm.request import Request

logger = init_logger(__name__)

MOONCAKE_BLOCK_SIZE = 512
"""Tokens a block where a line does not say."""

MAX_NUMBERS = 2**20
"""Blocks (and tenants) remembered. Beyond that the one seen longest ago is forgotten, and gets a new number if it comes
again: about 200 MB at most, and the trace then shows less sharing than there was."""

MAX_HELD_LINES = 2**16
"""Finished requests held back for one before them that still runs. Beyond that they are written without waiting."""


class RequestTraceRecorder:
    """Writes the trace to `path`, in order of arrival, on a thread of its own.

    The calls only put something in a queue; hashing and writing are done by the thread. Requests that have not ended
    when the recorder is closed are left out. A disk that fails is reported once, and then nothing more is written.
    clock: that of `Request.arrival_time`.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        block_size: int = 16,
        clock: Callable[[], float] = time.monotonic,
        max_numbers: int = MAX_NUMBERS,
        max_held_lines: int = MAX_HELD_LINES,
    ) -> None:
        try:
            self._file = open(path, "w", encoding="utf-8")  # noqa: SIM115 (closed by the thread)
        except OSError as error:
            raise ConfigError(f"record_trace: cannot write {path}: {error.strerror}") from error
        self._lines = _Lines(clock(), block_size, max_numbers, max_held_lines)
        self._events: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._closed = False
        self._thread = threading.Thread(target=self._write, name="request-trace", daemon=True)
        self._thread.start()

    def record_arrival(self, request: Request) -> None:
        """A request was queued; its end will be told, too. The prompt is read later and must not change."""
        self._events.put(lambda: self._lines.arrive(request))

    def record_finish(self, request_id: str, num_output_tokens: int, finish_reason: str | None) -> None:
        """It ended, with that many tokens over all its samples. An id that never arrived is ignored."""
        self._events.put(lambda: self._lines.finish(request_id, num_output_tokens, finish_reason))

    def close(self) -> None:
        """Write what has ended, and close the file. May be called twice."""
        if not self._closed:
            self._closed = True
            self._events.put(None)
            self._thread.join()

    def _write(self) -> None:
        """The thread: do what is queued, write what is ready, and flush when there is nothing to do."""
        events = iter(self._events.get, None)
        try:
            with self._file:
                for event in events:
                    event()
                    self._file.writelines(self._lines.ready())
                    if self._events.empty():
                        self._file.flush()
                self._file.writelines(self._lines.rest())
        except OSError as error:
            logger.error("record_trace: %s; nothing more is recorded", error)
        for _ in events:  # after a failure: what comes is dropped, until the end
            pass


class _Lines:
    """Lines of the trace, finished ones held until those before them are."""

    def __init__(self, start: float, block_size: int, max_numbers: int, max_held: int) -> None:
        self._start = start
        self._block_size = block_size
        self._max_held = max_held
        self._blocks = _Numbering(max_numbers)
        self._tenants = _Numbering(max_numbers)
        self._users = _Numbering(max_numbers)
        self._pending: OrderedDict[str, dict[str, Any]] = OrderedDict()
        self._num_held = 0

    def arrive(self, request: Request) -> None:
        tenant = request.tenant
        self._pending[request.request_id] = {
            "timestamp": max(round((request.arrival_time - self._start) * 1000), 0),
            "input_length": request.num_prompt_tokens,
            "output_length": None,
            "hash_ids": self._hash_ids(request),
            "block_size": self._block_size,
            "tenant": self._tenants.number_of(tenant.name),
            "user": self._users.number_of((tenant.name, tenant.user)),
            "n": request.sampling_params.n,
            "max_tokens": request.max_tokens,
            "priority": request.priority,
        }

    def finish(self, request_id: str, num_output_tokens: int, finish_reason: str | None) -> None:
        record = self._pending.get(request_id)
        if record is not None and record["output_length"] is None:
            record |= {"output_length": num_output_tokens, "finish_reason": finish_reason}
            self._num_held += 1

    def ready(self) -> Iterator[str]:
        """Lines whose turn it is, or all that are finished when too many are held."""
        if self._num_held > self._max_held:
            yield from self.rest()
        while self._pending:
            request_id, record = next(iter(self._pending.items()))
            if record["output_length"] is None:
                return
            yield self._take(request_id)

    def rest(self) -> Iterator[str]:
        """Every finished line, whoever is before it."""
        for request_id in [rid for rid, record in self._pending.items() if record["output_length"] is not None]:
            yield self._take(request_id)

    def _take(self, request_id: str) -> str:
        self._num_held -= 1
        return json.dumps(self._pending.pop(request_id), separators=(",", ":")) + "\n"

    def _hash_ids(self, request: Request) -> list[int]:
        """A number for each block; a block's digest covers everything before it, and the salt, as in the cache."""
        token_ids = array("q", request.prompt_token_ids)
        digest = hashlib.blake2b(repr(request.cache_salt).encode(), digest_size=16).digest()
        numbers = []
        for first in range(0, len(token_ids), self._block_size):
            block = token_ids[first : first + self._block_size].tobytes()
            digest = hashlib.blake2b(digest + block, digest_size=16).digest()
            numbers.append(self._blocks.number_of(digest))
        return numbers


class _Numbering:
    """Numbers in order of first appearance; the least recently seen are forgotten beyond `capacity`."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._numbers: OrderedDict[Any, int] = OrderedDict()
        self._next = 0

    def number_of(self, key: Any) -> int:
        number = self._numbers.get(key)
        if number is None:
            number, self._next = self._next, self._next + 1
            self._numbers[key] = number
            if len(self._numbers) > self._capacity:
                self._numbers.popitem(last=False)
        else:
            self._numbers.move_to_end(key)
        return number


# -- reading -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TracedRequest:
    """One line of a trace. timestamp: milliseconds. Mooncake's own traces have the first four fields only."""

    timestamp: float
    input_length: int
    output_length: int
    hash_ids: tuple[int, ...]
    block_size: int = MOONCAKE_BLOCK_SIZE
    tenant: int = 0
    user: int = 0
    n: int = 1
    max_tokens: int | None = None
    priority: int = 0
    finish_reason: str | None = None


def read_request_trace(path: str | Path) -> list[TracedRequest]:
    """The requests of a trace in order of time. Raises `ConfigError` that names the line and the field."""
    requests = []
    try:
        with open(path, encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    requests.append(_parse_line(line, f"{path}, line {number}"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as a request trace: {error}") from error
    return sorted(requests, key=lambda request: request.timestamp)


def _parse_line(line: str, where: str) -> TracedRequest:
    try:
        data = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{where}: is not JSON: {error}") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{where}: must be an object, got {type(data).__name__}")
    timestamp = data.get("timestamp")
    if isinstance(timestamp, bool) or not isinstance(timestamp, int | float) or not 0 <= timestamp < math.inf:
        raise ConfigError(f"{where}: timestamp: must be a number of at least 0, got {timestamp!r}")
    request = TracedRequest(
        timestamp=timestamp,
        input_length=_integer(data, "input_length", 1, where),
        output_length=_integer(data, "output_length", 0, where),
        hash_ids=_hash_ids(data, where),
        block_size=_integer(data, "block_size", 1, where, MOONCAKE_BLOCK_SIZE),
        tenant=_integer(data, "tenant", 0, where, 0),
        user=_integer(data, "user", 0, where, 0),
        n=_integer(data, "n", 1, where, 1),
        max_tokens=None if data.get("max_tokens") is None else _integer(data, "max_tokens", 1, where),
        priority=_integer(data, "priority", None, where, 0),
        finish_reason=_finish_reason(data, where),
    )
    num_blocks = -(-request.input_length // request.block_size)
    if len(request.hash_ids) != num_blocks:
        raise ConfigError(
            f"{where}: hash_ids: {request.input_length} tokens are {num_blocks} blocks of {request.block_size}, "
            f"got {len(request.hash_ids)}"
        )
    return request


def _integer(data: Mapping[str, Any], name: str, least: int | None, where: str, default: int | None = None) -> int:
    value = data.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int) or (least is not None and value < least):
        limit = "" if least is None else f" of at least {least}"
        raise ConfigError(f"{where}: {name}: must be an integer{limit}, got {str(value)[:80]}")
    return value


def _hash_ids(data: Mapping[str, Any], where: str) -> tuple[int, ...]:
    ids = data.get("hash_ids")
    if not isinstance(ids, list) or any(type(number) is not int or number < 0 for number in ids):
        raise ConfigError(f"{where}: hash_ids: must be a list of integers of at least 0, got {str(ids)[:80]}")
    return tuple(ids)


def _finish_reason(data: Mapping[str, Any], where: str) -> str | None:
    reason = data.get("finish_reason")
    if reason is not None and not isinstance(reason, str):
        raise ConfigError(f"{where}: finish_reason: must be a string, got {str(reason)[:80]}")
    return reason
