"""`mini-vllm demo`: several prompts completed at once by the bundled model, live, and what it took.

On a terminal all texts grow together (rich); elsewhere each finished line is printed with the number of its prompt.
Four of the prompts begin with the same header, so that the prefix cache has something to find.
"""

import argparse
import dataclasses
import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mini_vllm.entrypoints.cli.arguments import (
    HelpFormatter,
    add_engine_arguments,
    engine_args_from,
)
from mini_vllm.entrypoints.cli.sampling_arguments import add_sampling_arguments, sampling_params_from
from mini_vllm.sampling_params import RequestOutputKind, SamplingParams

if TYPE_CHECKING:
    from mini_vllm.engine.llm_engine import LLMEngine
    from mini_vllm.outputs import RequestOutput

_HEADER = '''"""Helpers for reading, writing and comparing files.

The functions here raise OSError when a file cannot be read.
"""

import os
import re
import sys


'''
_PROMPTS = (
    _HEADER + "def read_file(path):\n",
    _HEADER + "class FileReader:\n",
    _HEADER + "def compare_files(a, b):\n",
    _HEADER + "def main():\n",
    'def sort_by_key(items):\n    """Return',
    "class Queue:\n    def __init__(self",
    "with open(filename) as file:\n",
    "for i in range(",
)
_REFRESH_SECONDS = 0.1
_EXAMPLES = """\
examples:
  mini-vllm demo
  mini-vllm demo --max-tokens 200 --temperature 0
  mini-vllm demo --prompt 'def add(a, b):' --prompt 'def sub(a, b):'
  mini-vllm demo --max-num-batched-tokens 16 --verbose      watch prompts being computed in chunks
"""


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "demo",
        help="complete several prompts at once with the bundled model, live",
        description="Complete several prompts at once, watch them grow, and see what it took.",
        epilog=_EXAMPLES,
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--prompt", action="append", metavar="TEXT", help="A prompt of yours in place of the demo's; may be repeated."
    )
    parser.add_argument("--plain", action="store_true", help="Print lines even on a terminal.")
    add_sampling_arguments(parser, just_text=True, max_tokens=64, temperature=0.6, top_p=0.95, sampling_seed=0)
    add_engine_arguments(parser, max_num_seqs=16)
    parser.set_defaults(run=run)


@dataclass
class _Line:
    """One prompt and what has become of it."""

    prompt: str
    text: str = ""
    finish_reason: str | None = None


@dataclass
class _Tally:
    """What is counted while the demo runs. Seconds are those inside `engine.step()`: drawing is not the engine's."""

    seconds: float = 0.0
    prompt_tokens: int = 0
    output_tokens: int = 0
    peak_kv_cache_usage: float = 0.0
    most_running: int = 0
    first_token_seconds: float | None = None

    def note(self, engine: "LLMEngine", outputs: "list[RequestOutput]", seconds: float) -> None:
        self.seconds += seconds
        if outputs and self.first_token_seconds is None:
            self.first_token_seconds = self.seconds
        self.output_tokens += sum(len(output.outputs[0].token_ids) for output in outputs)
        record = engine.step_records(1)[0]
        self.peak_kv_cache_usage = max(self.peak_kv_cache_usage, record.kv_cache_usage)
        self.most_running = max(self.most_running, len(record.num_scheduled_tokens))


def run(args: argparse.Namespace) -> int:
    engine_args = engine_args_from(args)
    if engine_args.model is None and engine_args.num_threads is None:
        # Steps of the bundled model take a millisecond: threads would mostly wait for each other, and for long on a
        # machine that has other work.
        engine_args = dataclasses.replace(engine_args, num_threads=1)
    prompts = args.prompt or list(_PROMPTS)

    from mini_vllm.engine.llm_engine import LLMEngine

    engine = LLMEngine.from_engine_args(engine_args)
    try:
        params = sampling_params_from(args, engine.get_default_sampling_params(), output_kind=RequestOutputKind.DELTA)
        lines = [_Line(prompt) for prompt in prompts]
        tally = _Tally()
        _add_requests(engine, prompts, params, tally)
        if sys.stdout.isatty() and not args.plain:
            _run_live(engine, lines, tally)
        else:
            _run_plain(engine, lines, tally)
        print(_summary(engine, lines, tally))
        return 0
    finally:
        engine.shutdown()


def _add_requests(engine: "LLMEngine", prompts: list[str], params: SamplingParams, tally: _Tally) -> None:
    for index, prompt in enumerate(engine.input_processor.tokenize(prompts)):
        tally.prompt_tokens += len(prompt.token_ids)
        engine.add_request(str(index), prompt, params)


def _step(engine: "LLMEngine", lines: list[_Line], tally: _Tally) -> "list[RequestOutput]":
    start = time.perf_counter()
    outputs = engine.step()
    tally.note(engine, outputs, time.perf_counter() - start)
    for output in outputs:
        line = lines[int(output.request_id)]
        line.text += output.outputs[0].text
        line.finish_reason = output.outputs[0].finish_reason
    return outputs


# -- without a terminal -----------------------------------------------------------------------------------------


def _run_plain(engine: "LLMEngine", lines: list[_Line], tally: _Tally) -> None:
    """Each line of each text as soon as it is whole, with the number of its prompt."""
    for index, line in enumerate(lines):
        print(f"[{index}] prompt: {_tail(line.prompt)!r}")
    printed = [0] * len(lines)
    while engine.has_unfinished_requests():
        for output in _step(engine, lines, tally):
            index = int(output.request_id)
            _print_whole_lines(index, lines[index], printed)


def _print_whole_lines(index: int, line: _Line, printed: list[int]) -> None:
    end = len(line.text) if line.finish_reason else line.text.rfind("\n") + 1
    for part in line.text[printed[index] : end].splitlines():
        print(f"[{index}] {part}")
    printed[index] = max(printed[index], end)
    if line.finish_reason:
        print(f"[{index}] ({line.finish_reason})", flush=True)


def _tail(prompt: str, length: int = 60) -> str:
    """The last paragraph of a prompt, which tells it from the others."""
    end = prompt.rsplit("\n\n\n", 1)[-1][-length:]
    return end if end == prompt else "..." + end


# -- on a terminal ----------------------------------------------------------------------------------------------


def _run_live(engine: "LLMEngine", lines: list[_Line], tally: _Tally) -> None:
    from rich.console import Console
    from rich.live import Live

    console = Console()
    with Live(console=console, auto_refresh=False, vertical_overflow="crop") as live:
        shown = 0.0
        while engine.has_unfinished_requests():
            _step(engine, lines, tally)
            if time.perf_counter() - shown > _REFRESH_SECONDS:
                shown = time.perf_counter()
                live.update(_boxes(lines, console, whole=False), refresh=True)
        live.update(_boxes(lines, console, whole=True), refresh=True)


def _boxes(lines: list[_Line], console: Any, *, whole: bool) -> Any:
    """A box for each prompt, two beside each other where there is room. Unless `whole`, boxes share the height of
    the terminal and each shows the newest rows of its text."""
    from rich.table import Table

    columns = 2 if console.width >= 70 else 1
    width = console.width // columns
    rows = None if whole else max((console.height - 1) // -(-len(lines) // columns) - 2, 1)
    grid = Table.grid(expand=True)
    boxes = [_box(index, line, console, width, rows) for index, line in enumerate(lines)]
    for first in range(0, len(boxes), columns):
        grid.add_row(*boxes[first : first + columns])
    return grid


def _box(index: int, line: _Line, console: Any, width: int, rows: int | None) -> Any:
    """The prompt's end dim, what was generated after it bright."""
    from rich.panel import Panel
    from rich.text import Text

    text = Text(_tail(line.prompt), style="dim", overflow="fold")
    text.append(line.text.rstrip(), style="not dim")
    if rows is not None:
        text = Text("\n").join(text.wrap(console, width - 4, overflow="fold")[-rows:])
    return Panel(
        text,
        title=str(index),
        subtitle=line.finish_reason or "...",
        border_style="green" if line.finish_reason else "blue",
        width=width,
        height=None if rows is None else rows + 2,
    )


# -- what it took -----------------------------------------------------------------------------------------------


def _summary(engine: "LLMEngine", lines: list[_Line], tally: _Tally) -> str:
    seconds = max(tally.seconds, 1e-9)
    stats = engine.stats
    queries, hits = stats.prefix_cache_queries, stats.prefix_cache_hits
    rate = hits / queries if queries else 0.0
    rows = (
        ("requests", f"{len(lines)} completed, up to {tally.most_running} in one step"),
        ("tokens", f"{tally.prompt_tokens} prompt + {tally.output_tokens} generated in {seconds:.2f} s of engine time"),
        ("throughput", f"{tally.output_tokens / seconds:.1f} tokens/s generated"),
        ("first token", f"{tally.first_token_seconds or 0.0:.3f} s after the start"),
        ("steps", f"{stats.step_id}, of {tally.output_tokens / max(stats.step_id, 1):.1f} tokens on average"),
        ("KV cache", f"{tally.peak_kv_cache_usage:.1%} at its peak"),
        ("prefix cache", f"{hits} of {queries} prompt tokens found ({rate:.1%} hit rate)"),
        ("preemptions", f"{stats.num_preemptions}"),
    )
    return "\n".join(f"{name + ':':<14}{value}" for name, value in rows)
