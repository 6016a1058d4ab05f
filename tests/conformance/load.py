"""Clients for storms and soaks: requests of every kind, some of which leave at a random moment."""

import asyncio
import contextlib
import json
import random
from collections import Counter
from typing import Any

import httpx2

from tests.conformance.rig import GENERATING
from tests.entrypoints.server.rig import Call

WORDS = "def return the of class if import self a in is not for while None x y ( ) : , =".split()


def random_body(rng: random.Random, path: str, max_tokens: int, prompt_words: int) -> dict[str, Any]:
    """A valid request: streamed or not, of several samples or prompts, with logprobs, of many lengths."""
    text = " ".join(rng.choices(WORDS, k=rng.randint(1, prompt_words)))
    body: dict[str, Any] = {"model": "tiny", "stream": rng.random() < 0.6}
    limit = rng.randint(1, max_tokens)
    if path == "/v1/responses":
        return body | {"input": text, "max_output_tokens": limit, "store": rng.random() < 0.5}
    if path == "/v1/messages":
        return body | {"messages": [{"role": "user", "content": text}], "max_tokens": limit}
    body |= {"max_tokens": limit, "n": rng.choice([1, 1, 1, 2, 4]), "ignore_eos": True}
    if path == "/v1/completions":
        prompt = [text] * rng.randint(1, 3) if rng.random() < 0.2 else text
        return body | {"prompt": prompt, "logprobs": rng.choice([None, None, 0, 3])}
    logprobs = rng.random() < 0.3
    return body | {"messages": [{"role": "user", "content": text}], "logprobs": logprobs}


def random_request(rng: random.Random, max_tokens: int, prompt_words: int) -> tuple[str, dict[str, Any]]:
    path = rng.choice(GENERATING)
    return path, random_body(rng, path, max_tokens, prompt_words)


# -- over ASGI -------------------------------------------------------------------------------------------------


async def restless_client(app: Any, rng: random.Random, **sizes: int) -> str:
    """One request of a client that may leave before it begins, while it waits, in the middle, or not at all."""
    path, body = random_request(rng, **sizes)
    await asyncio.sleep(rng.random() * 0.5)
    patience = rng.choice([0, 0.01, 0.1, 0.5, 60])
    async with Call(app, "POST", path, body) as call:
        try:
            async with asyncio.timeout(patience):
                async for _ in call.chunks():
                    if rng.random() < 0.02:
                        return "left while reading"
        except TimeoutError:
            return "left while waiting"
        status = (await call.start())["status"]
    return f"answered {status}"


# -- over sockets ----------------------------------------------------------------------------------------------


async def socket_client(http: httpx2.AsyncClient, rng: random.Random, **sizes: int) -> str:
    """The same over a connection. Returns what became of it."""
    path, body = random_request(rng, **sizes)
    patience = rng.choice([0.02, 0.3, 60, 60])
    try:
        async with asyncio.timeout(patience), http.stream("POST", path, json=body) as answer:
            content = await answer.aread()
        if answer.status_code != 200:
            return f"status {answer.status_code}"
        return "failed midway" if body["stream"] and not stream_is_whole(path, content) else "answered"
    except TimeoutError:
        return "left"


def stream_is_whole(path: str, content: bytes) -> bool:
    """Whether a stream has ended as one that succeeded."""
    if path in ("/v1/completions", "/v1/chat/completions"):
        return content.endswith(b"data: [DONE]\n\n") and b'data: {"error"' not in content
    last = content.rstrip().rpartition(b"\n")[2].removeprefix(b"data: ")
    with contextlib.suppress(ValueError):
        return json.loads(last)["type"] in ("message_stop", "response.completed", "response.incomplete")
    return False


def summary(results: list[Any]) -> Counter[str]:
    return Counter(str(result) for result in results)
