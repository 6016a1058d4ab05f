"""`run-batch` without an engine: lines are answered at once, or within some seconds.

python -m tests.entrypoints.echo_batch INPUT OUTPUT SECONDS
"""

import asyncio
import contextlib
import json
import random
import sys
from collections.abc import AsyncIterator
from typing import Any

from mini_vllm.entrypoints.batch.lines import BatchLine
from mini_vllm.entrypoints.batch.runner import Result
from mini_vllm.entrypoints.cli.main import main
from mini_vllm.entrypoints.cli.run_batch import Job


def answered(custom_id: str | None, status: int = 200) -> bytes:
    """A line of an output."""
    error = None if status == 200 else {"message": "no"}
    body = {"id": "x", "custom_id": custom_id, "response": {"status_code": status, "body": {}}, "error": error}
    return json.dumps(body).encode()


class Echo:
    """In place of the application; notes what it was asked.

    failing: custom_ids that fail. seconds: that an answer takes at most.
    """

    def __init__(self, *failing: str, seconds: float = 0.0) -> None:
        self.asked: list[str | None] = []
        self._failing = failing
        self._seconds = seconds

    async def answer(self, line: BatchLine) -> Result:
        self.asked.append(line.custom_id)
        await asyncio.sleep(random.Random(line.position).random() * self._seconds)
        failed = line.problem is not None or line.custom_id in self._failing
        return Result(answered(line.custom_id, 400 if failed else 200), not failed)

    @contextlib.asynccontextmanager
    async def in_place_of_the_engine(self, job: Any) -> AsyncIterator["Echo"]:
        yield self


if __name__ == "__main__":
    source, target, seconds = sys.argv[1:]
    echo = Echo(seconds=float(seconds))
    Job._answerer = lambda job: echo.in_place_of_the_engine(job)  # type: ignore[method-assign]
    raise SystemExit(main(["run-batch", "-i", source, "-o", target, "--max-num-seqs", "8"]))
