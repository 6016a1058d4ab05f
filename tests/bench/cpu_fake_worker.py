"""A worker that computes nothing, for the tests of the CPU comparison.

The engine's width says what becomes of it: bf16 and the like answer at once, `dies` ends in its first call after the
warm-up, `refuses` answers with an error, `absent` does not start, `f32-eager` makes a token too few, int8 other tokens
than the rest. Each call is noted in FAKE_WORKER_LOG.
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks" / "cpu"))

from worker_protocol import Generate, arguments, serve

args = arguments("")
WARM_UP_TOKENS = 3


def start() -> tuple[Generate, str, dict[str, object]]:
    sys.stdout.write("what an engine prints must not reach the protocol\n")
    if args.width == "absent":
        raise RuntimeError("no such engine here")

    def generate(prompts: list[list[int]], tokens: list[int]) -> list[list[int]]:
        with open(os.environ["FAKE_WORKER_LOG"], "a") as log:
            log.write(f"{args.width} {len(prompts)} {max(tokens)}\n")
        made = [
            [p[0] + (args.width == "int8")] * (n - (args.width == "f32-eager"))
            for p, n in zip(prompts, tokens, strict=True)
        ]
        if max(tokens) <= WARM_UP_TOKENS:
            return made
        if args.width == "refuses":
            raise ValueError("that many tokens are too many")
        if args.width == "dies":
            sys.stderr.write("first line\nSegmentation fault, so to speak\n")
            os._exit(3)
        return made

    return generate, "1.2", {"threads": args.threads}


serve(start)
