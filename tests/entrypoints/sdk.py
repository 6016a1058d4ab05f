"""The `openai` and `anthropic` SDKs against an application in this process, and what their types say about answers.

Asynchronous clients are in `server/rig.py`; those here are the blocking ones, which run in a thread of their own while
the application stays on the test's event loop.
"""

import asyncio
from pathlib import Path
from typing import Any, TypeVar

import httpx2
from pydantic import BaseModel, TypeAdapter

from tests.entrypoints.server.rig import BASE, transport

CHATML = str(Path(__file__).parent / "templates" / "chatml.jinja")

T = TypeVar("T")


class BlockingTransport(httpx2.BaseTransport):
    """Sends what a blocking client asks to an application on the event loop that made this."""

    def __init__(self, app: Any) -> None:
        self._app = app
        self._loop = asyncio.get_running_loop()

    def handle_request(self, request: httpx2.Request) -> httpx2.Response:
        request.read()
        return asyncio.run_coroutine_threadsafe(self._send(request), self._loop).result(60)

    async def _send(self, request: httpx2.Request) -> httpx2.Response:
        async with httpx2.AsyncClient(transport=transport(self._app), timeout=60) as http:
            answer = await http.request(request.method, request.url, content=request.content, headers=request.headers)
        return httpx2.Response(answer.status_code, headers=answer.headers, content=answer.content)


def blocking_openai(app: Any, api_key: str = "none") -> Any:
    import openai

    http = httpx2.Client(transport=BlockingTransport(app))
    return openai.OpenAI(base_url=f"{BASE}/v1", api_key=api_key, http_client=http, max_retries=0)


def blocking_anthropic(app: Any, api_key: str = "none") -> Any:
    import anthropic

    http = httpx2.Client(transport=BlockingTransport(app))
    return anthropic.Anthropic(base_url=BASE, api_key=api_key, http_client=http, max_retries=0)


def assert_fits(kind: Any, value: Any) -> Any:
    """`value`, JSON as it was sent, has all that the SDK's type requires, and comes back from it the same."""
    parsed = TypeAdapter(kind).validate_python(value)
    assert isinstance(parsed, BaseModel)
    assert parsed.model_dump(mode="json", exclude_unset=True, by_alias=True) == value
    return parsed
