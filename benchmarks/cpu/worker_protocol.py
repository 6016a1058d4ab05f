"""What a worker and the benchmark say to each other: one JSON object a line, on the worker's standard input and output.

A worker holds one engine with one model and does one thing: complete token prompts greedily, exactly as many tokens as
asked. This file needs nothing but the standard library, since workers run in the engines' own environments.

    worker -> {"ready": true, "version": "...", "details": {...}}     or {"error": "..."}
    bench  -> {"prompts": [[1, 2, ...], ...], "tokens": [16, ...]}
    worker -> {"seconds": 1.23, "made": [[7, ...], ...]}             or {"error": "..."}
"""

import argparse
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

VARIANTS = ("eager", "avx2", "portable")
"""What may stand behind a width of mini_vllm: no captured step, or the kernels of a lesser processor."""

Generate = Callable[[list[list[int]], list[int]], list[list[int]]]
"""Completes prompts and returns the tokens that it made, at least as many as asked."""


def arguments(description: str) -> argparse.Namespace:
    """What every worker is started with."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--model", required=True, help="folder of a Hugging Face checkpoint")
    parser.add_argument("--width", required=True, help="what the weights are: bf16, f32, int8, ...")
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--max-len", type=int, required=True, help="tokens of the longest sequence")
    parser.add_argument("--max-seqs", type=int, required=True, help="sequences at once")
    parser.add_argument("--step-tokens", type=int, required=True, help="tokens of all sequences in one step")
    parser.add_argument("--kv-tokens", type=int, required=True, help="tokens of all sequences at once")
    parser.add_argument("--cache", required=True, help="folder for converted models")
    return parser.parse_args()


def split_width(width: str) -> tuple[str, str]:
    """('int8-weights', 'avx2') of 'int8-weights-avx2': what the weights are, and the variant or ''."""
    stem, _, variant = width.rpartition("-")
    return (stem, variant) if variant in VARIANTS else (width, "")


def serve(start: Callable[[], tuple[Generate, str, dict[str, Any]]]) -> None:
    """Start the engine and answer until the input ends. What engines print goes to standard error."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    sys.stdout = sys.stderr

    def say(**message: Any) -> None:
        answers.write(json.dumps(message) + "\n")

    try:
        generate, version, details = start()
    except BaseException as error:
        traceback.print_exc()
        say(error=f"{type(error).__name__}: {error}"[:500])
        return
    say(ready=True, version=version, details=details)
    for line in sys.stdin:
        request = json.loads(line)
        try:
            begin = time.perf_counter()
            made = generate(request["prompts"], request["tokens"])
            seconds = time.perf_counter() - begin
            require_lengths([len(tokens) for tokens in made], request["tokens"])
            say(seconds=seconds, made=made)
        except Exception as error:
            traceback.print_exc()
            say(error=f"{type(error).__name__}: {error}"[:500])


def require_lengths(got: list[int], asked: list[int]) -> None:
    """An engine that stops early would look fast."""
    if len(got) != len(asked) or any(g < a for g, a in zip(got, asked, strict=True)):
        raise RuntimeError(f"made {got[:8]} tokens, asked for {asked[:8]}")
