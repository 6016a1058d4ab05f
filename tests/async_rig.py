"""An `AsyncLLM` for tests: a small Llama in float32 on one thread, in this process unless asked otherwise.

    async with in_process_engine(max_num_seqs=2) as engine:
        outputs = [output async for output in engine.generate("hello", SamplingParams(), "id")]

Checkpoints are written once a session; the engine's books are checked when it is idle at the end.
"""

import contextlib
import functools
import tempfile
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

from mini_vllm.engine.arg_utils import EngineArgs
from mini_vllm.engine.async_llm import AsyncLLM
from mini_vllm.engine.protocol import NewRequest
from mini_vllm.outputs import RequestOutput
from mini_vllm.sampling_params import SamplingParams
from tests.checkpoints import make_checkpoint

SHELL_OPTIONS = frozenset(
    "in_process stat_loggers stream_interval max_num_queued_reqs max_num_queued_tokens text_timeout watchdog_timeout "
    "restart trace_recorder tracer".split()
)
"""What `AsyncLLM.from_engine_args` takes beside the arguments of the engine."""


@functools.cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="mini-vllm-tests-")


@functools.cache
def checkpoint(family: str = "llama") -> Path:
    """A checkpoint of `tests/checkpoints.py`, made once a session."""
    return make_checkpoint(Path(_folder().name) / family, family, seed=1)


def engine_args(**options: Any) -> EngineArgs:
    """Keywords are `EngineArgs`; model=None is the bundled model, without it the small Llama is taken."""
    defaults: dict[str, Any] = {
        "dtype": "float32", "num_threads": 1, "num_gpu_blocks_override": 80, "disable_log_stats": True
    }  # fmt: skip
    if "model" not in options:
        defaults["model"] = str(checkpoint())
    return EngineArgs.from_kwargs(**defaults | options)


@contextlib.asynccontextmanager
async def async_engine(**options: Any) -> AsyncIterator[AsyncLLM]:
    """The engine in its own process, or (`in_process=True`) in this one. Keywords are those of `EngineArgs` and of
    `AsyncLLM.from_engine_args`."""
    shell = {name: options.pop(name) for name in tuple(options) if name in SHELL_OPTIONS}
    engine = await AsyncLLM.from_engine_args(engine_args(**options), **shell)
    try:
        yield engine
        if engine.is_running and not engine.num_unfinished_requests:
            await engine.check_integrity()
    finally:
        engine.shutdown()


def in_process_engine(**options: Any) -> contextlib.AbstractAsyncContextManager[AsyncLLM]:
    """The core in a thread of this process."""
    return async_engine(in_process=True, **options)


async def finish(engine: AsyncLLM, prompt: Any, params: SamplingParams, request_id: str = "r") -> RequestOutput:
    """The last output of one prompt."""
    last = None
    async for output in engine.generate(prompt, params, request_id):
        last = output
    assert last is not None and last.finished
    return last


async def new_requests(engine: AsyncLLM, prompts: Sequence[Any], params: SamplingParams) -> list[NewRequest]:
    """One request a prompt, with ids "0", "1" and so on."""
    tokenized = await engine.tokenize(prompts)
    return [NewRequest(request_id=str(i), prompt=prompt, params=params) for i, prompt in enumerate(tokenized)]
