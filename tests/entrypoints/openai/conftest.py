"""One application for all tests of a module that change nothing about it: its engine starts once."""

from collections.abc import AsyncIterator

import pytest_asyncio
from fastapi import FastAPI

from tests.entrypoints.server.rig import serving


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def app() -> AsyncIterator[FastAPI]:
    """For tests marked `asyncio(loop_scope="module")`. The small Llama, with the chat template it comes with."""
    async with serving(max_num_seqs=8) as application:
        yield application
