"""One application in this process and one server in its own, for all tests that change nothing about them."""

from collections.abc import AsyncIterator, Iterator

import pytest
import pytest_asyncio
from fastapi import FastAPI

from tests.entrypoints.server.rig import RunningServer, running_server, serving


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def app() -> AsyncIterator[FastAPI]:
    """For tests marked `asyncio(loop_scope="module")`. The small Llama, whose context is 256 tokens."""
    async with serving(max_num_seqs=8) as application:
        yield application


@pytest.fixture(scope="package")
def server() -> Iterator[RunningServer]:
    """`mini-vllm serve` with the bundled model; short contexts keep open-ended requests short."""
    with running_server("--served-model-name", "tiny", "--max-model-len", "200", "--enable-debug-steps") as running:
        yield running
