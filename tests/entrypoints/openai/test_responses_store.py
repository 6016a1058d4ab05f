"""Claims about the store of responses: its bounds, its owners, and that nothing outlives it."""

import asyncio
from typing import Any

import pytest

from mini_vllm.entrypoints.openai.responses.store import EventLog, ResponseStore, StoredResponse
from mini_vllm.entrypoints.server.errors import ApiError
from mini_vllm.exceptions import OverloadedError


def record(name: str, owner: str = "", num_bytes: int = 100, **more: Any) -> StoredResponse:
    body = b'{"output":[]}'
    return StoredResponse(name, owner, body, b"[]".ljust(num_bytes - len(body)), **more)


async def forever() -> None:
    await asyncio.Event().wait()


def running(name: str, **more: Any) -> StoredResponse:
    return record(name, task=asyncio.create_task(forever()), **more)


def test_the_least_recently_used_response_is_forgotten_first() -> None:
    store = ResponseStore(max_responses=2, max_bytes=10_000)
    store.add(record("a"))
    store.add(record("b"))
    store.get("a", "")
    store.add(record("c"))
    assert (("", "a") in store, ("", "b") in store, ("", "c") in store) == (True, False, True)


def test_bytes_are_bounded_and_counted_exactly() -> None:
    store = ResponseStore(max_responses=100, max_bytes=350)
    for name in "abcdef":
        store.add(record(name))
        assert store.num_bytes == 100 * len(store) <= 350
    assert [name for name in "abcdef" if ("", name) in store] == ["d", "e", "f"]


def test_a_response_larger_than_the_store_is_kept_until_the_next_one() -> None:
    store = ResponseStore(max_responses=100, max_bytes=350)
    store.add(record("a"))
    store.add(record("huge", num_bytes=1000))
    assert ("", "a") not in store and ("", "huge") in store
    store.add(record("b"))
    assert ("", "huge") not in store and store.num_bytes == 100


def test_another_owner_does_not_see_a_response_nor_its_items() -> None:
    store = ResponseStore(10, 10_000)
    store.add(StoredResponse("r", "alice", b'{"output":[{"id":"msg_1"}]}', b"[]", ("msg_1",)))
    assert store.find_item("msg_1", "alice") == {"id": "msg_1"}
    assert store.find_item("msg_1", "bob") is None
    assert store.find("r", "bob") is None
    with pytest.raises(ApiError) as error:
        store.get("r", "bob")
    with pytest.raises(ApiError) as unknown:
        store.get("nothing", "bob")
    assert error.value.status == unknown.value.status == 404
    assert error.value.message.replace("'r'", "'nothing'") == unknown.value.message


async def test_two_owners_may_have_the_same_id() -> None:
    store = ResponseStore(10, 10_000)
    for owner in ("alice", "bob"):
        store.add(record("r", owner))
    assert len(store) == 2 and ("carol", "r") not in store
    await store.remove(store.get("r", "alice"))
    assert store.find("r", "alice") is None and store.get("r", "bob").owner == "bob"


async def test_what_is_removed_leaves_nothing_behind() -> None:
    store = ResponseStore(10, 10_000)
    kept = StoredResponse("r", "alice", b'{"output":[{"id":"msg_1"}]}', b"[]", ("msg_1",))
    store.add(kept)
    await store.remove(kept)
    assert (len(store), store.num_bytes, store.find_item("msg_1", "alice")) == (0, 0, None)
    store.note_change(kept)  # as a background task does that ends after its response was deleted
    assert (len(store), store.num_bytes) == (0, 0)


async def test_what_still_runs_is_never_forgotten_but_keeps_new_ones_out() -> None:
    store = ResponseStore(max_responses=2, max_bytes=10_000)
    for name in "ab":
        store.check_room()
        store.add(running(name))
    with pytest.raises(OverloadedError):
        store.check_room()
    store.add(record("c"))
    store.add(record("d"))
    assert (("", "a") in store, ("", "b") in store, ("", "c") in store) == (True, True, False)
    await store.close()


async def test_closing_cancels_and_waits_for_what_runs() -> None:
    store = ResponseStore(10, 10_000)
    records = [running(name, events=EventLog()) for name in "abc"]
    for item in records:
        store.add(item)
    await asyncio.sleep(0)
    await store.close()
    assert all(item.task is not None and item.task.cancelled() for item in records)
    assert (len(store), store.num_bytes) == (0, 0)


async def test_events_are_charged_as_they_come() -> None:
    store = ResponseStore(10, max_bytes=450)
    store.add(record("old"))
    streamed = record("new", events=EventLog())
    store.add(streamed)
    assert streamed.events is not None
    for _ in range(5):
        streamed.events.append(b"x" * 60)
        store.note_change(streamed)
    assert store.num_bytes == streamed.num_bytes == 400
    assert ("", "old") not in store


@pytest.mark.parametrize("start", [0, 2, 4])
async def test_every_reader_of_a_log_gets_the_same_frames_whenever_it_comes(start: int) -> None:
    log = EventLog()

    async def read() -> list[bytes]:
        return [frame async for frame in log.follow(start)]

    early = asyncio.create_task(read())
    for number in range(4):
        log.append(b"%d" % number)
        await asyncio.sleep(0)
    log.end()
    assert await early == await read() == [b"%d" % number for number in range(start, 4)]
