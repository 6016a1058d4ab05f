"""`mini-vllm run-batch`: a file of requests through the server's own handlers, without a server."""

import argparse
import asyncio
import contextlib
import dataclasses
import os
import shutil
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mini_vllm.engine.arg_utils import DEFAULT_MODEL, EngineArgs
from mini_vllm.entrypoints.cli.arguments import (
    HelpFormatter,
    add_arguments_of,
    add_engine_arguments,
    beside_an_api,
    engine_args_from,
)
from mini_vllm.entrypoints.server.serve_args import SECTIONS, ServeArgs
from mini_vllm.exceptions import ConfigError, EngineDeadError

if TYPE_CHECKING:
    from mini_vllm.entrypoints.batch.lines import BatchLine
    from mini_vllm.entrypoints.batch.output import Earlier
    from mini_vllm.entrypoints.batch.runner import Answerer

_EXAMPLES = """\
examples:
  mini-vllm run-batch -i requests.jsonl -o answers.jsonl
  mini-vllm run-batch -i requests.jsonl -o answers.jsonl --model DIR --max-num-seqs 64
  mini-vllm run-batch -i requests.jsonl -o answers.jsonl --resume        go on after a kill; failed lines run again
  mini-vllm run-batch -i - -o - < requests.jsonl > answers.jsonl

a line of the input (the model's name is --served-model-name, else --model as given):
  {"custom_id": "a", "method": "POST", "url": "/v1/completions",
   "body": {"model": "stdlib-llama-3.7m", "prompt": "def fib(n):", "max_tokens": 32}}

urls: /v1/completions, /v1/chat/completions, /v1/responses, /v1/messages.
Answers are in the order of the input. A line that fails says why in "error" and ends nothing; the exit status is 1
when all of them failed, else 0.
"""


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "run-batch",
        help="answer a file of API requests (OpenAI's batch format)",
        description="Answer a file of API requests in OpenAI's batch format. --max-num-seqs are under way at once.",
        usage="mini-vllm run-batch -i FILE -o FILE [options]",
        epilog=_EXAMPLES,
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    group = parser.add_argument_group("batch")
    group.add_argument(
        "-i", "--input-file", required=True, metavar="FILE", help="JSON lines; - is standard input, a URL is fetched."
    )
    group.add_argument(
        "-o",
        "--output-file",
        required=True,
        metavar="FILE",
        help="- is standard output, to a URL it is PUT at the end.",
    )
    group.add_argument("--resume", action="store_true", help="Keep what OUTPUT_FILE has and run only what it lacks.")
    group.add_argument("--overwrite", action="store_true", help="Replace OUTPUT_FILE if it is there.")
    group.add_argument("--disable-tqdm", action="store_true", help="No progress bar.")
    sections = {key: SECTIONS[key] for key in ("api", "limits")}
    add_arguments_of(ServeArgs, sections, parser, {})
    add_engine_arguments(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Status 1 when every line failed."""
    _check_output(args)
    engine_args, names = beside_an_api(engine_args_from(args)), {field.name for field in dataclasses.fields(ServeArgs)}
    serve_args = ServeArgs(**{name: value for name, value in vars(args).items() if name in names})
    with tempfile.TemporaryDirectory(prefix="mini-vllm-batch-") as folder:
        source = _local_input(args.input_file, Path(folder))
        is_plain = args.output_file != "-" and not _is_url(args.output_file)
        target = Path(args.output_file).expanduser() if is_plain else Path(folder) / "output.jsonl"
        show_bar = not args.disable_tqdm
        job = Job(source, target, engine_args, serve_args, resume=args.resume, show_bar=show_bar, verbose=args.verbose)
        try:
            asyncio.run(job.run())
        except (EngineDeadError, KeyboardInterrupt):
            if is_plain:
                print(f"stopped; go on with --resume -o {args.output_file}", file=sys.stderr)
            raise
        if not is_plain:
            _deliver(target, args.output_file)
    print(f"{job.num_succeeded} succeeded, {job.num_failed} failed", file=sys.stderr)
    return 1 if job.num_failed and not job.num_succeeded else 0


# --- files ----------------------------------------------------------------------------------------------------


def _is_url(name: str) -> bool:
    return name.startswith(("http://", "https://"))


def _check_output(args: argparse.Namespace) -> None:
    """Before a model is loaded: the output can be written, and nothing is lost by that."""
    if args.output_file == "-" or _is_url(args.output_file):
        if args.resume:
            raise ConfigError("resume: needs an output that is a file")
        return
    target = Path(args.output_file).expanduser()
    if target.is_dir() or not target.parent.is_dir():
        raise ConfigError(f"output_file: {target} is a folder, or in none that exists")
    if args.resume and args.overwrite:
        raise ConfigError("resume: cannot be combined with --overwrite")
    if target.exists() and target.stat().st_size and not (args.resume or args.overwrite):
        raise ConfigError(f"output_file: {target} is there already; --resume goes on with it, --overwrite replaces it")


def _local_input(name: str, folder: Path) -> Path:
    """The input as a file that can be read twice. Raises `ConfigError`."""
    if name != "-" and not _is_url(name):
        path = Path(name).expanduser()
        if not path.is_file():
            raise ConfigError(f"input_file: {path} is not there or no file")
        return path
    path = folder / "input.jsonl"
    with path.open("wb") as file:
        if name == "-":
            shutil.copyfileobj(sys.stdin.buffer, file)
            return path
        import httpx2

        try:
            with httpx2.stream("GET", name, follow_redirects=True, timeout=60) as response:
                response.raise_for_status()
                for chunk in response.iter_bytes():
                    file.write(chunk)
        except httpx2.HTTPError as error:
            raise ConfigError(f"input_file: cannot fetch {name}: {error}") from error
    return path


def _deliver(path: Path, name: str) -> None:
    if name == "-":
        with path.open("rb") as file:
            sys.stdout.flush()
            shutil.copyfileobj(file, sys.stdout.buffer)
            sys.stdout.buffer.flush()
        return
    import httpx2

    try:
        with path.open("rb") as file:
            httpx2.put(name, content=file, timeout=600).raise_for_status()
    except httpx2.HTTPError as error:
        raise ConfigError(f"output_file: cannot put to {name}: {error}") from error


# --- the job --------------------------------------------------------------------------------------------------


@dataclass
class Job:
    """One input, one output. resume: keep what the output has."""

    source: Path
    target: Path
    engine_args: EngineArgs
    serve_args: ServeArgs
    resume: bool = False
    show_bar: bool = True
    verbose: bool = False
    num_succeeded: int = 0
    num_failed: int = 0

    async def run(self) -> None:
        """Answer what has no answer yet; after that, what an earlier run had no luck with."""
        from mini_vllm.entrypoints.batch.lines import count_lines

        total, earlier = count_lines(self.source), self._earlier()
        self.num_succeeded = earlier.num_lines - len(earlier.failed)
        if total == self.num_succeeded:
            return
        async with self._answerer() as answerer:
            with self._bar(total) as bar:
                await self._go_on(answerer, earlier, bar)
                if earlier.failed:
                    await self._try_again(answerer, earlier.failed, bar)

    def _earlier(self) -> "Earlier":
        from mini_vllm.entrypoints.batch.output import Earlier, scan_output

        if not self.resume:
            self.target.unlink(missing_ok=True)
            self._ahead_path.unlink(missing_ok=True)
            return Earlier()
        return scan_output(self.target, (line.custom_id for line in self._lines()))

    @property
    def _ahead_path(self) -> Path:
        return self.target.with_name(self.target.name + ".ahead")

    def _lines(self) -> "Iterator[BatchLine]":
        from mini_vllm.entrypoints.batch.lines import read_batch

        return read_batch(self.source, self.serve_args.max_request_body_bytes)

    async def _go_on(self, answerer: "Answerer", earlier: "Earlier", bar: Any) -> None:
        from mini_vllm.entrypoints.batch.output import OrderedOutput, read_ahead, read_answer
        from mini_vllm.entrypoints.batch.runner import run_lines

        with self.target.open("ab") as file:
            file.truncate(earlier.num_bytes)

            def write(line: bytes) -> None:
                file.write(line + b"\n")
                file.flush()

            output = OrderedOutput(write, earlier.num_lines, self._ahead_path)
            waiting = read_ahead(self._ahead_path) if self.resume else {}
            for line in (line for position, line in waiting.items() if position >= earlier.num_lines):
                self._count(read_answer(line).succeeded, bar)
            output.preload(waiting)
            try:
                lines = ((line.position, line) for line in self._lines())
                await run_lines(
                    lines, answerer.answer, output,
                    concurrency=self.engine_args.max_num_seqs, on_done=lambda succeeded: self._count(succeeded, bar),
                )  # fmt: skip
            finally:
                output.close()

    async def _try_again(self, answerer: "Answerer", failed: list[int], bar: Any) -> None:
        from mini_vllm.entrypoints.batch.output import OrderedOutput, Patch
        from mini_vllm.entrypoints.batch.runner import run_lines

        ranks = {position: rank for rank, position in enumerate(failed)}
        patch = Patch(self.target, failed)
        try:
            lines = ((ranks[line.position], line) for line in self._lines() if line.position in ranks)
            await run_lines(
                lines, answerer.answer, OrderedOutput(patch.write),
                concurrency=self.engine_args.max_num_seqs, on_done=lambda succeeded: self._count(succeeded, bar),
            )  # fmt: skip
            patch.finish()
        finally:
            patch.close()

    def _count(self, succeeded: bool, bar: Any) -> None:
        self.num_succeeded += succeeded
        self.num_failed += not succeeded
        bar.update()

    def _bar(self, total: int) -> Any:
        from tqdm import tqdm

        shown = self.show_bar and sys.stderr.isatty()
        return tqdm(total=total, initial=self.num_succeeded, unit="request", disable=not shown, smoothing=0.1)

    @contextlib.asynccontextmanager
    async def _answerer(self) -> "AsyncIterator[Answerer]":
        """The application over an engine of its own. There is nobody to keep out, so keys guard nothing here."""
        from mini_vllm.engine.async_llm import AsyncLLM
        from mini_vllm.entrypoints.batch.runner import Answerer
        from mini_vllm.entrypoints.server.api_keys import ApiKeys
        from mini_vllm.entrypoints.server.app import build_app
        from mini_vllm.entrypoints.server.state import make_state

        os.environ.setdefault("MINI_VLLM_LOGGING_LEVEL", "INFO" if self.verbose else "WARNING")  # of its process
        name = DEFAULT_MODEL.name if self.engine_args.model is None else self.engine_args.model
        engine = await AsyncLLM.from_engine_args(self.engine_args, text_timeout=self.serve_args.text_timeout)
        try:
            state = make_state(engine, self.serve_args, name, api_keys=ApiKeys(()))
            answerer = Answerer(build_app(state), engine)
            try:
                yield answerer
            finally:
                await answerer.aclose()
                await state.response_store.close()
        finally:
            engine.shutdown()
