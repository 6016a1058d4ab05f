"""One run from options to result: look at the server, make the requests, warm up, send, report.

`run_serve` is what the command line calls. It needs no engine and no torch; the tokenizer is the model's own, found
through what the server says of its model or named with --tokenizer.
"""

import asyncio
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mini_vllm.bench.noise import CpuMeter
from mini_vllm.bench.serve.connection import ConnectionPool, Origin
from mini_vllm.bench.serve.datasets import RequestMaker, ServeRequest
from mini_vllm.bench.serve.metrics import RequestRecord
from mini_vllm.bench.serve.options import ServeOptions
from mini_vllm.bench.serve.result import build_result
from mini_vllm.bench.serve.runner import LoadGenerator, OnRecord, find_model, wait_until_ready
from mini_vllm.bench.serve.schedule import arrival_offsets, rates_of
from mini_vllm.engine.arg_utils import DEFAULT_MODEL, EngineArgs
from mini_vllm.exceptions import ConfigError, MiniVLLMError, RequestError
from mini_vllm.text.tokenizer import Tokenizer

Tell = Callable[[str], None]


def run_serve(
    options: ServeOptions, tell: Tell = lambda line: None, on_record: OnRecord = lambda record: None
) -> tuple[dict[str, Any], list[RequestRecord]]:
    """(the result, a record for each request). tell: one line on what is done now. on_record: after each request.

    Raises `ConfigError` when the server cannot be used at all, `RequestError` when it fails the first request.
    """
    try:
        import uvloop
    except ImportError:  # Windows
        return asyncio.run(_run(options, tell, on_record))
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(_run(options, tell, on_record))


async def _run(options: ServeOptions, tell: Tell, on_record: OnRecord) -> tuple[dict[str, Any], list[RequestRecord]]:
    origin = Origin.from_url(options.url, insecure=options.insecure)
    async with ConnectionPool(origin, auth_headers(options) | options.headers) as pool:
        await wait_until_ready(pool, options.ready_check_timeout_sec)
        card = {"id": options.model} if options.model else await find_model(pool)
        tokenizer = load_tokenizer(options, card)
        model = options.served_model_name or str(card["id"])
        maker = RequestMaker(options, tokenizer)
        requests, left_out = maker.requests()
        offsets = _offsets(options, requests)
        generator = LoadGenerator(options, model, pool, lambda text: len(tokenizer.encode(text, False)))
        await _warm_up(generator, maker.warmups(requests), tell)
        tell(f"{len(requests)} requests to {options.url}{options.path}, model {model}, {_pace(options)}")
        cpu = CpuMeter().start()
        records, duration = await generator.run(requests, offsets, on_record)
        noise = cpu.stop()
    named = str(tokenizer.name_or_path)
    return build_result(options, model, named, records, duration, noise, left_out=left_out), records


def auth_headers(options: ServeOptions) -> dict[str, str]:
    """The key of the environment, under the name that the API expects."""
    if options.path_kind == "messages":
        key = os.environ.get("ANTHROPIC_API_KEY") or os.environ.get("OPENAI_API_KEY")
        return {"anthropic-version": "2023-06-01"} | ({"x-api-key": key} if key else {})
    key = os.environ.get("OPENAI_API_KEY")
    return {"Authorization": f"Bearer {key}"} if key else {}


def load_tokenizer(options: ServeOptions, card: dict[str, Any]) -> Tokenizer:
    """The one that was named, else that of the model: by the server's `root` for it, then by its id.

    Raises `ConfigError` when there is none here.
    """
    names = [options.tokenizer] if options.tokenizer else [card.get("root"), card["id"]]
    problem: Exception | None = None
    for name in dict.fromkeys(name for name in names if isinstance(name, str) and name):
        try:
            return EngineArgs(model=None if name == DEFAULT_MODEL.name else name).load_tokenizer()
        except MiniVLLMError as error:
            problem = problem or error
    folder = f" ({Path(str(names[0])).name})" if names[0] else ""
    raise ConfigError(f"tokenizer: none found for this model{folder}; give one with --tokenizer. {problem}")


def _offsets(options: ServeOptions, requests: list[ServeRequest]) -> list[float]:
    if options.dataset_name == "timed_trace":
        return [request.arrival or 0.0 for request in requests]
    rates = rates_of(
        len(requests), options.request_rate,
        options.ramp_up_strategy, options.ramp_up_start_rps, options.ramp_up_end_rps,
    )  # fmt: skip
    return arrival_offsets(rates, options.burstiness, options.seed)


async def _warm_up(generator: LoadGenerator, requests: list[ServeRequest], tell: Tell) -> None:
    """Send them, at most as many at once as the run will. Raises `RequestError` if the first one fails."""
    first = await generator.send("warmup-0", requests[0])
    if not first.succeeded:
        raise RequestError(f"the server failed the first, unmeasured request: {first.timeline.error}")
    if rest := requests[1:]:
        tell(f"warming up with {len(requests)} requests")
        await generator.run(rest, [0.0] * len(rest))


def _pace(options: ServeOptions) -> str:
    limit = f", at most {options.max_concurrency} at once" if options.max_concurrency else ""
    if options.dataset_name == "timed_trace":
        return f"when the trace says{limit}"
    if options.ramp_up_strategy:
        ramp = f"{options.ramp_up_start_rps:g} to {options.ramp_up_end_rps:g}"
        return f"{options.ramp_up_strategy} ramp from {ramp} requests/s{limit}"
    if options.sends_at_once:
        return f"all at once{limit}"
    kind = "Poisson" if options.burstiness == 1 else f"gamma (burstiness {options.burstiness:g})"
    return f"{options.request_rate:g} requests/s, {kind} arrivals{limit}"
