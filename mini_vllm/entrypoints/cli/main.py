"""The `mini-vllm` command: one subcommand a module, each with `add_parser(subparsers)` and a function that runs it.

Nothing heavy is imported before a subcommand runs, so that `--help` is instant. Errors of the package's own types
are told in one line with exit status 2; anything else is a bug and keeps its traceback.
"""

import argparse
import logging
import os
import sys
from collections.abc import Sequence

from mini_vllm import __version__
from mini_vllm.entrypoints.cli import (
    bench,
    chat,
    collect_env,
    complete,
    convert,
    demo,
    generate,
    plan,
    run_batch,
    serve,
    simulate,
    train_bpe,
)
from mini_vllm.entrypoints.cli.arguments import CommandParser
from mini_vllm.exceptions import MiniVLLMError
from mini_vllm.logger import init_logger

_EXAMPLES = """\
examples:
  mini-vllm serve                                 serve the bundled model at http://127.0.0.1:8000
  mini-vllm demo                                  complete several prompts at once with the bundled model
  mini-vllm generate --prompt 'def fib(n):'       complete one prompt with it
  mini-vllm generate --model DIR --prompt 'Once'  the same with a checkpoint of yours
  echo 'import os' | mini-vllm generate           the prompt from standard input
  mini-vllm generate --help                       all options of a command
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    args = build_parser().parse_args(argv)
    _set_log_level(args.verbose)
    try:
        status: int = args.run(args)
        sys.stdout.flush()
        return status
    except MiniVLLMError as error:
        print(f"mini-vllm: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output went away, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mini-vllm",
        description="Serve language models: continuous batching, paged KV cache, prefix caching.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"mini-vllm {__version__}")
    subparsers = parser.add_subparsers(
        title="commands", dest="command", metavar="COMMAND", required=True, parser_class=CommandParser
    )
    serve.add_parser(subparsers)
    chat.add_parser(subparsers)
    complete.add_parser(subparsers)
    run_batch.add_parser(subparsers)
    generate.add_parser(subparsers)
    demo.add_parser(subparsers)
    bench.add_parser(subparsers)
    plan.add_parser(subparsers)
    simulate.add_parser(subparsers)
    convert.add_parser(subparsers)
    train_bpe.add_parser(subparsers)
    collect_env.add_parser(subparsers)
    return parser


def _set_log_level(verbose: bool) -> None:
    """Commands are quiet: their output is the text. The environment variable still has the last word."""
    if "MINI_VLLM_LOGGING_LEVEL" not in os.environ:
        init_logger("mini_vllm")
        logging.getLogger("mini_vllm").setLevel(logging.INFO if verbose else logging.WARNING)


if __name__ == "__main__":
    raise SystemExit(main())
