"""`mini-vllm complete`: let a model go on with a text, a server's model (--url) or one in this process."""

import argparse
import sys
from typing import Any

from mini_vllm.entrypoints.cli.answering import Answerer, add_answerer_arguments, answerer_from
from mini_vllm.entrypoints.cli.arguments import HelpFormatter
from mini_vllm.entrypoints.cli.terminal import Typist, note, printer_for, show, stats_line
from mini_vllm.exceptions import InvalidParameterError, MiniVLLMError

_EXAMPLES = """\
examples:
  mini-vllm complete                                            the bundled model, in this process
  mini-vllm complete -q 'def fib(n):' --temperature 0 --stats
  mini-vllm complete --url http://localhost:8000/v1 --max-tokens 32
  cat half.py | mini-vllm complete DIR > other_half.py          all of the input is one prompt

Ctrl-C stops a completion, Ctrl-D ends. Paste several lines, or put them between triple quotes.
"""


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "complete",
        help="let a model go on with a text, of a server or in this process",
        description="Let a model go on with what you type.",
        usage="mini-vllm complete [MODEL] [options]",
        epilog=_EXAMPLES,
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    group = parser.add_argument_group("complete")
    group.add_argument("-q", "--quick", metavar="TEXT", help="Go on with this one text, print the completion and end.")
    group.add_argument("--stats", action="store_true", help="After each: TTFT, tokens/s, tokens, cached tokens.")
    group.add_argument(
        "--markdown", action=argparse.BooleanOptionalAction, default=False, help="Render text on a terminal."
    )
    add_answerer_arguments(parser, max_tokens=128)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    prompt = args.quick
    if prompt is None and not sys.stdin.isatty():
        prompt = sys.stdin.read().removesuffix("\n")
    if prompt is not None and not prompt:
        raise InvalidParameterError("quick", "there is no prompt: give one with -q TEXT or on standard input")
    answerer = answerer_from(args)
    try:
        if prompt is not None:
            return 130 if _complete(answerer, prompt, args) else 0
        note(f"{answerer.name}: type the beginning of a text, Ctrl-D ends.")
        return _converse(answerer, args)
    finally:
        answerer.close()


def _converse(answerer: Answerer, args: argparse.Namespace) -> int:
    typist = Typist("> ")
    while True:
        try:
            prompt = typist.read()
        except EOFError:
            print()
            return 0
        except KeyboardInterrupt:
            print()
            note("Ctrl-D ends.")
            continue
        try:
            if prompt.strip():
                _complete(answerer, prompt, args)
        except MiniVLLMError as error:
            note(f"error: {error}")


def _complete(answerer: Answerer, prompt: str, args: argparse.Namespace) -> bool:
    """True when Ctrl-C cut it short."""
    answer = answerer.complete(prompt)
    _, interrupted = show(answer, printer_for(args.markdown)())
    if interrupted:
        note("stopped")
    if args.stats:
        note(stats_line(answer))
    return interrupted
