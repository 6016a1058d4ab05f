"""How much may be unfinished at once, and when to come back once it is too much.

`Admission` is handed every request before it is queued and told when it ends. It knows numbers only; whether an
engine is alive or draining is for others to say.
"""

import math
import time
from collections import deque
from collections.abc import Callable, Mapping

from mini_vllm.exceptions import InvalidParameterError, OverloadedError

MAX_RETRY_AFTER = 60
_NUM_RECENT = 64


class Admission:
    """Counts what is waiting or running. A request counts once, however many samples (`n`) it asks for.

    max_num_reqs, max_num_tokens: limits on unfinished requests and on the tokens of their prompts; None is no limit.
    """

    def __init__(
        self,
        max_num_reqs: int | None = None,
        max_num_tokens: int | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        for name, value in (("max_num_queued_reqs", max_num_reqs), ("max_num_queued_tokens", max_num_tokens)):
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise InvalidParameterError(name, f"must be an integer of at least 1, got {value!r}")
        self.max_num_reqs = max_num_reqs
        self.max_num_tokens = max_num_tokens
        self.num_tokens = 0
        self._clock = clock
        self._sizes: dict[str, int] = {}
        self._ends: deque[tuple[float, int]] = deque(maxlen=_NUM_RECENT)  # when, and the prompt's tokens

    @property
    def num_reqs(self) -> int:
        return len(self._sizes)

    def admit(self, sizes: Mapping[str, int]) -> None:
        """Count requests (id to tokens of the prompt), or none of them and raise: `OverloadedError`, or
        `InvalidParameterError` for an id that is counted already."""
        for request_id in sizes:
            if request_id in self._sizes:
                raise InvalidParameterError("request_id", f"{request_id!r} is already in use by an unfinished request")
        self._require_room("max_num_queued_reqs", "requests", self.num_reqs, len(sizes), self.max_num_reqs)
        num_tokens = sum(sizes.values())
        self._require_room("max_num_queued_tokens", "prompt tokens", self.num_tokens, num_tokens, self.max_num_tokens)
        self._sizes.update(sizes)
        self.num_tokens += num_tokens

    def release(self, request_id: str) -> None:
        """The request has ended, in whatever way. Unknown ids are ignored."""
        size = self._sizes.pop(request_id, None)
        if size is not None:
            self.num_tokens -= size
            self._ends.append((self._clock(), size))

    def _require_room(self, reason: str, what: str, there: int, asked: int, limit: int | None) -> None:
        if limit is None or there + asked <= limit:
            return
        raise OverloadedError(
            f"the engine has {there} unfinished {what}; {asked} more would exceed {reason}={limit}",
            reason,
            self.retry_after(there + asked - limit, in_tokens=reason == "max_num_queued_tokens"),
        )

    def retry_after(self, excess: int, in_tokens: bool = False) -> int:
        """Seconds until so many requests (or tokens of prompts) have ended, at the pace of the last ones; 1 to 60."""
        if len(self._ends) < 2:
            return 1
        elapsed = self._clock() - self._ends[0][0]
        ended = sum(size for _, size in self._ends) if in_tokens else len(self._ends)
        return min(max(math.ceil(excess * elapsed / ended), 1), MAX_RETRY_AFTER)
