"""pytest plugin for `sdk_conformance.py`: makes what the SDKs' suites expect to find on a server.

They were written against a mock to which every id exists. Before each test that fetches, cancels or deletes a response
this plugin makes one of that id, as any client could: in the background, streamed, and long enough to be cancelled.
"""

import contextlib
import json
import os
import urllib.error
import urllib.request
from typing import Any

BASE = os.environ.get("TEST_API_BASE_URL", "")
RESPONSE_ID = "resp_677efb5139a88190b512bc3fef8e535d"
_ABOUT_STORED = ("retrieve", "cancel", "delete")


def pytest_runtest_setup(item: Any) -> None:
    if "test_responses.py" in item.nodeid and any(f"_{word}" in item.name for word in _ABOUT_STORED):
        with contextlib.suppress(urllib.error.HTTPError):  # there is none yet
            _send("DELETE", f"/responses/{RESPONSE_ID}")
        body = {"request_id": RESPONSE_ID.removeprefix("resp_"), "input": "x", "ignore_eos": True}
        _send("POST", "/responses", body | {"background": True, "stream": True})


def _send(method: str, path: str, body: dict[str, Any] | None = None) -> None:
    """Only the beginning of the answer is waited for."""
    data = None if body is None else json.dumps(body).encode()
    headers = {"Content-Type": "application/json", "Authorization": "Bearer none"}
    request = urllib.request.Request(BASE + path, data, headers, method=method)
    with urllib.request.urlopen(request, timeout=30) as answer:
        answer.read(1)
