"""Stop working for a client that has gone away before it got its answer."""

import asyncio
import contextlib
from collections.abc import Coroutine
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.types import Receive

T = TypeVar("T")


class ClientGoneError(Exception):
    """Nobody is there to read the answer."""


async def disconnected(receive: Receive) -> None:
    """Return when the client has closed its side. The body must have been read."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def run_until_disconnect(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled (and waited for) when the client leaves first: `ClientGoneError`."""
    working = asyncio.ensure_future(work)
    watching = asyncio.ensure_future(disconnected(request.receive))
    try:
        await asyncio.wait((working, watching), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientGoneError
        return working.result()
    finally:
        await cancel_all(working, watching)


async def cancel_all(*tasks: "asyncio.Future[Any]") -> None:
    """Cancel tasks and wait until each has cleaned up after itself, however often we are cancelled meanwhile."""
    for task in tasks:
        task.cancel()
    cancelled: asyncio.CancelledError | None = None
    for task in tasks:
        while not task.done():
            try:
                await asyncio.wait((task,))
            except asyncio.CancelledError as error:
                cancelled = error
        with contextlib.suppress(asyncio.CancelledError):
            task.exception()  # seen, so that asyncio does not report it as lost
    if cancelled is not None:
        raise cancelled
