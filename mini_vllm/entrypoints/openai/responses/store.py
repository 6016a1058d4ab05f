"""Responses kept for later: to be fetched, continued by `previous_response_id`, followed or cancelled.

What is kept is bytes, the JSON that a client would get, so that memory is what the limits count. When a limit is
passed, those that nobody used for longest are forgotten; one that still runs never is, so a new one in the background
is refused while those that run fill the store. Everything belongs to the API key that made it: to another key it does
not exist, and its id is free.
"""

import asyncio
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass
from typing import Any

import msgspec

from mini_vllm.entrypoints.server.errors import ApiError
from mini_vllm.exceptions import OverloadedError


class EventLog:
    """The frames of a stream, in order of their sequence numbers from 0, for readers who come late or come back."""

    def __init__(self) -> None:
        self.frames: list[bytes] = []
        self.num_bytes = 0
        self._ended = False
        self._news = asyncio.Event()

    def append(self, frame: bytes) -> None:
        self.frames.append(frame)
        self.num_bytes += len(frame)
        self._wake()

    def end(self) -> None:
        self._ended = True
        self._wake()

    def _wake(self) -> None:
        self._news.set()
        self._news = asyncio.Event()

    async def follow(self, start: int = 0) -> AsyncIterator[bytes]:
        """The frames from number `start` on, until the stream has ended."""
        position = start
        while True:
            while position < len(self.frames):
                yield self.frames[position]
                position += 1
            if self._ended:
                return
            await self._news.wait()


@dataclass(eq=False)
class StoredResponse:
    """body: the response as of its last change. items: its whole input, earlier turns included, as a JSON array.

    item_ids: of input and output, by which a later request may refer to them.
    events: of a stream in the background. task: what generates it there.
    """

    response_id: str
    owner: str
    body: bytes
    items: bytes
    item_ids: tuple[str, ...] = ()
    background: bool = False
    events: EventLog | None = None
    task: asyncio.Task[None] | None = None
    charged: int = 0
    """Bytes that the store counts for it."""

    @property
    def key(self) -> tuple[str, str]:
        return self.owner, self.response_id

    @property
    def is_running(self) -> bool:
        return self.task is not None and not self.task.done()

    @property
    def num_bytes(self) -> int:
        events = 0 if self.events is None else self.events.num_bytes
        return len(self.body) + len(self.items) + events

    def response(self) -> dict[str, Any]:
        response: dict[str, Any] = msgspec.json.decode(self.body)
        return response

    def input_items(self) -> list[dict[str, Any]]:
        items: list[dict[str, Any]] = msgspec.json.decode(self.items)
        return items

    async def stop(self) -> None:
        """Cancel what generates it, and wait until its request is out of the engine."""
        if self.task is not None:
            self.task.cancel()
            await asyncio.wait([self.task])
        if self.events is not None:
            self.events.end()


class ResponseStore:
    """At most `max_responses` and `max_bytes`; 0 responses means that nothing is kept."""

    def __init__(self, max_responses: int, max_bytes: int) -> None:
        self.max_responses = max_responses
        self.max_bytes = max_bytes
        self._records: dict[tuple[str, str], StoredResponse] = {}  # by owner and id, least recently used first
        self._item_owners: dict[tuple[str, str], str] = {}  # (owner, item id) -> response id
        self.num_bytes = 0

    def __len__(self) -> int:
        return len(self._records)

    def __contains__(self, key: tuple[str, str]) -> bool:
        """key: owner and id."""
        return key in self._records

    @property
    def enabled(self) -> bool:
        return self.max_responses > 0

    @property
    def num_running(self) -> int:
        return sum(record.is_running for record in self._records.values())

    def find(self, response_id: str, owner: str) -> StoredResponse | None:
        """The response, which counts as used now; None if there is none of this owner."""
        record = self._records.pop((owner, response_id), None)
        if record is not None:
            self._records[record.key] = record
        return record

    def get(self, response_id: str, owner: str) -> StoredResponse:
        """Like `find`. Raises `ApiError` 404."""
        record = self.find(response_id, owner)
        if record is None:
            raise ApiError(404, f"Response with id '{response_id[:100]}' not found.", param="response_id")
        return record

    def find_item(self, item_id: str, owner: str) -> dict[str, Any] | None:
        """An item of the input or output of a stored response, by its id."""
        record = self.find(self._item_owners.get((owner, item_id), ""), owner)
        if record is None:
            return None
        items = [*record.input_items(), *record.response()["output"]]
        return next((item for item in items if item["id"] == item_id), None)

    def check_room(self) -> None:
        """Raises `OverloadedError` while responses that still run fill the store."""
        running = [record for record in self._records.values() if record.is_running]
        if len(running) >= self.max_responses or sum(record.num_bytes for record in running) >= self.max_bytes:
            raise OverloadedError("the store is full of background responses that still run", "response_store")

    def add(self, record: StoredResponse) -> None:
        """Keep a response, in place of one of the same id, and forget what is over the limits."""
        if record.key in self._records:
            self._forget(self._records[record.key])
        self._records[record.key] = record
        self.note_change(record)

    def note_change(self, record: StoredResponse) -> None:
        """Count a response anew after it changed, and find its new items, unless it is forgotten by now."""
        if record.key in self._records:
            self._item_owners.update(dict.fromkeys(self._keys(record), record.response_id))
            self.charge(record)

    def charge(self, record: StoredResponse) -> None:
        """Count the bytes of a response anew, unless it is forgotten by now."""
        if record.key not in self._records:
            return
        self.num_bytes += record.num_bytes - record.charged
        record.charged = record.num_bytes
        if len(self._records) > self.max_responses or self.num_bytes > self.max_bytes:
            self._shrink()

    def _shrink(self) -> None:
        """Forget the least recently used until both limits hold. The newest stays: its client has just got its id."""
        for record in list(self._records.values())[:-1]:
            if len(self._records) <= self.max_responses and self.num_bytes <= self.max_bytes:
                return
            if not record.is_running:
                self._forget(record)

    async def remove(self, record: StoredResponse) -> None:
        """Forget a response at once; its request leaves the engine before this returns."""
        self._forget(record)
        await record.stop()

    async def close(self) -> None:
        """Cancel whatever runs in the background, and forget everything."""
        for record in list(self._records.values()):
            await self.remove(record)

    def _forget(self, record: StoredResponse) -> None:
        if self._records.pop(record.key, None) is None:
            return
        self.num_bytes -= record.charged
        for key in self._keys(record):
            if self._item_owners.get(key) == record.response_id:
                del self._item_owners[key]

    @staticmethod
    def _keys(record: StoredResponse) -> Iterable[tuple[str, str]]:
        return ((record.owner, item_id) for item_id in record.item_ids)
