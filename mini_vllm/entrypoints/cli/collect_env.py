"""`mini-vllm collect-env`: what this machine and installation are, for bug reports and beside measurements."""

import argparse
import json
from typing import Any

from mini_vllm.entrypoints.cli.arguments import HelpFormatter


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "collect-env",
        help="print versions, processor, memory and settings",
        description="Print what a bug report should say about this machine. Tokens and keys are never shown.",
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--json", action="store_true", help="Print JSON.")
    parser.set_defaults(run=run, verbose=False)


def run(args: argparse.Namespace) -> int:
    from mini_vllm.bench.environment import collect_environment, format_environment

    environment = collect_environment()
    print(json.dumps(environment, indent=1) if args.json else format_environment(environment))
    return 0
