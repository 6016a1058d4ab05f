"""Streams and clients that leave: frames come as they are made, and work ends when nobody listens."""

import asyncio
import contextlib
import time

from tests.entrypoints.server.rig import Call, serving, sse_events
from tests.entrypoints.server.stand_ins import IdleEngine, Worker


def app_of(worker: Worker):
    return serving(IdleEngine(), routers=[worker.router])


async def test_frames_come_as_they_are_made() -> None:
    worker = Worker()
    async with app_of(worker) as app, Call(app, "POST", "/v1/stream") as call:
        start = await call.start()
        headers = dict(start["headers"])
        assert start["status"] == 200
        assert headers[b"content-type"] == b"text/event-stream; charset=utf-8"
        assert headers[b"cache-control"] == b"no-cache" and headers[b"x-request-id"]
        assert await call.chunk() == b"data: 1\n\n"
        worker.go.set()
        assert [piece async for piece in call.chunks()] == [b"data: 2\n\n"]
        assert worker.ended == ["done", "closed"]


async def test_a_client_that_leaves_ends_a_stream_at_once() -> None:
    worker = Worker()
    async with app_of(worker) as app:
        async with Call(app, "POST", "/v1/stream") as call:
            await call.chunk()
            await worker.started.wait()
        assert worker.ended == ["closed"]


async def test_a_client_that_left_before_the_first_frame_leaves_nothing_behind() -> None:
    worker = Worker()
    async with app_of(worker) as app:
        async with Call(app, "POST", "/v1/stream") as call:
            call.disconnect()
        assert worker.ended in ([], ["closed"])


async def test_streams_of_the_engine_are_closed_even_if_their_events_never_began() -> None:
    from starlette.requests import Request

    from mini_vllm.entrypoints.server.streaming import sse_response

    class Stream:
        closed = 0

        async def aclose(self) -> None:
            self.closed += 1

    async def events():
        yield b""

    async def broken_send(message) -> None:
        raise OSError("gone")

    stream, request = Stream(), Request({"type": "http", "headers": []})
    response = sse_response(events(), closing=[stream])
    with contextlib.suppress(OSError):
        await response(request.scope, request.receive, broken_send)
    assert stream.closed == 1


async def test_a_reader_that_stalls_holds_up_its_own_stream_only() -> None:
    worker = Worker()
    worker.go.set()
    async with app_of(worker) as app, Call(app, "POST", "/v1/stream") as slow:
        await slow.start()
        slow.reading.clear()
        async with Call(app, "POST", "/v1/stream") as quick:
            assert len([piece async for piece in quick.chunks()]) == 2
        slow.reading.set()
        assert len([piece async for piece in slow.chunks()]) >= 1


async def test_silence_is_filled_with_comments_and_speech_is_not() -> None:
    worker = Worker()
    async with app_of(worker) as app, Call(app, "POST", "/v1/stream") as call:
        call._scope["query_string"] = b"keep_alive=0.05"
        assert await call.chunk() == b"data: 1\n\n"
        start = time.monotonic()
        assert await call.chunk() == b": keep-alive\n\n"
        assert await call.chunk() == b": keep-alive\n\n"
        assert time.monotonic() - start > 0.08
        worker.go.set()
        rest = b"".join([piece async for piece in call.chunks()])
        assert sse_events(rest) == [{"event": None, "data": 2}]


async def test_an_error_in_the_middle_is_the_streams_last_event() -> None:
    worker = Worker()
    async with app_of(worker) as app, Call(app, "POST", "/v1/stream") as call:
        call._scope["query_string"] = b"fail=dead"
        worker.go.set()
        events = sse_events(b"".join([piece async for piece in call.chunks()]))
        assert [event["data"] for event in events[:1]] == [1]
        assert events[1]["data"]["error"]["code"] == "engine_dead"
        assert events[2]["data"] == "[DONE]"
        assert worker.ended == ["closed"]


async def test_a_bug_in_the_middle_tells_no_details() -> None:
    worker = Worker()
    async with app_of(worker) as app, Call(app, "POST", "/v1/stream") as call:
        call._scope["query_string"] = b"fail=bug"
        worker.go.set()
        body = b"".join([piece async for piece in call.chunks()])
        assert b"internal_error" in body and b"secret" not in body


async def test_work_for_a_client_that_left_is_cancelled_and_has_cleaned_up() -> None:
    worker = Worker()
    async with app_of(worker) as app:
        async with Call(app, "POST", "/v1/work") as call:
            await worker.started.wait()
            call.disconnect()
            assert (await call.start())["status"] == 499
        assert worker.ended == ["cancelled"]


async def test_work_that_is_done_is_answered() -> None:
    worker = Worker()
    worker.go.set()
    async with app_of(worker) as app, Call(app, "POST", "/v1/work") as call:
        assert (await call.start())["status"] == 200
        assert worker.ended == ["done"]


async def test_a_hundred_clients_that_leave_at_any_moment_leave_no_task() -> None:
    worker = Worker()
    async with app_of(worker) as app:
        before = len(asyncio.all_tasks())

        async def visit(i: int) -> None:
            async with Call(app, "POST", "/v1/stream" if i % 2 else "/v1/work"):
                for _ in range(i % 7):
                    await asyncio.sleep(0)

        await asyncio.gather(*(visit(i) for i in range(100)))
        assert len(asyncio.all_tasks()) == before
