"""From the start of a process to its first token, in phases, beside what cannot be less.

A checkpoint of 1 GB in the shape of Qwen2.5-0.5B is made first (`startup_checkpoint.py`) and read once, so that the
disk is warm. Then, in turn: `llm`, a process that makes an `LLM` and one token; `serve`, a server and a client that
asks again every 20 ms until it gets an answer; and the floors: an interpreter that does nothing, one that imports
torch, one that reads the tokenizer, one that touches every page of the weights.
`--against DIR` runs the same with the package of another checkout, one after the other. Prints medians and writes one
JSON file with every run.
"""

import argparse
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from startup_checkpoint import make_checkpoint
from step_cost import RESULTS, ROOT, environment

POLL_SECONDS = 0.02
TIMEOUT_SECONDS = 300.0

_LLM = """
import json, sys, time
marks = {"interpreter": time.monotonic()}
from mini_vllm import SamplingParams
from mini_vllm.engine.arg_utils import EngineArgs
from mini_vllm.engine import builder, llm_engine
marks["imports"] = time.monotonic()
args = EngineArgs.from_kwargs(**json.loads(sys.argv[2]))
tokenizer = args.load_tokenizer()
marks["tokenizer"] = time.monotonic()
config = args.create_engine_config(tokenizer)
make_input_processor = builder.plan_input_processor(args, tokenizer, config.model.hf_config)
marks["config"] = time.monotonic()
from mini_vllm.executor import uniproc
marks["torch"] = time.monotonic()
executor = uniproc.UniProcExecutor.__new__(uniproc.UniProcExecutor)
executor.runner = runner = uniproc.ModelRunner(config)
marks["native library"] = time.monotonic()
inner = runner.load_model
def load_model():
    inner()
    marks["weights"] = time.monotonic()
runner.load_model = load_model
executor._start(runner, config)
marks["kv cache"] = time.monotonic()
core = builder.build_core(config, executor)
from mini_vllm.engine.core_client import InprocClient
from mini_vllm.engine.output_processor import OutputProcessor
engine = llm_engine.LLMEngine(InprocClient(core),
    make_input_processor(max_model_len=executor.max_model_len, clock=core.clock), OutputProcessor(tokenizer))
engine.add_request("0", "Hello", SamplingParams(max_tokens=1, temperature=0.0))
while engine.has_unfinished_requests():
    engine.step()
marks["first token"] = time.monotonic()
before, phases = float(sys.argv[1]), {}
for name, at in marks.items():
    phases[name], before = at - before, at
phases["total"] = before - float(sys.argv[1])
print(json.dumps(phases))
"""
_FLOORS = {
    "interpreter": "pass",
    "torch": "import torch",
    "tokenizer": "from tokenizers import Tokenizer; Tokenizer.from_file(MODEL + '/tokenizer.json')",
    "pages": "import glob, mmap, numpy\nfor name in glob.glob(MODEL + '/*.safetensors'):\n"
    "    file = mmap.mmap(open(name, 'rb').fileno(), 0, access=mmap.ACCESS_READ)\n"
    "    numpy.frombuffer(file, numpy.uint8)[::4096].sum()",
}


def environment_of(root: Path) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(root), "MINI_VLLM_LOGGING_LEVEL": "WARNING"}


def run_llm(root: Path, engine_args: dict[str, Any]) -> dict[str, float]:
    """Seconds of each phase of one process."""
    command = [sys.executable, "-c", _LLM, str(time.monotonic()), json.dumps(engine_args)]
    done = subprocess.run(command, env=environment_of(root), cwd=root, capture_output=True, text=True, check=True)
    phases: dict[str, float] = json.loads(done.stdout)
    return phases


def run_serve(root: Path, engine_args: dict[str, Any]) -> dict[str, float]:
    """Seconds until a server answers at all, and until it answers with a token."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    flags = [part for name, value in engine_args.items() if name != "model"
             for part in (f"--{name.replace('_', '-')}", str(value))]  # fmt: skip
    command = [sys.executable, "-m", "mini_vllm", "serve", engine_args["model"], "--port", str(port), *flags]
    start = time.monotonic()
    process = subprocess.Popen(command, env=environment_of(root), cwd=root, stdout=subprocess.DEVNULL, stderr=2)
    try:
        return poll(f"http://127.0.0.1:{port}/v1/completions", engine_args["model"], start, process)
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)


def poll(url: str, model: str, start: float, process: "subprocess.Popen[bytes]") -> dict[str, float]:
    body = json.dumps({"model": Path(model).name, "prompt": "Hello", "max_tokens": 1, "temperature": 0}).encode()
    found: dict[str, float] = {}
    while time.monotonic() - start < TIMEOUT_SECONDS and process.poll() is None:
        try:
            request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
            with urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS) as answer:
                answer.read()
            return found | {"total": time.monotonic() - start}
        except urllib.error.HTTPError as error:
            if error.code != 503:
                raise RuntimeError(f"the server answered {error.code}: {error.read()[:500]!r}") from error
            found.setdefault("first answer", time.monotonic() - start)
        except OSError:
            pass
        time.sleep(POLL_SECONDS)
    raise RuntimeError("the server did not answer")


def run_floor(code: str, model: str) -> dict[str, float]:
    start = time.monotonic()
    subprocess.run([sys.executable, "-c", f"MODEL = {model!r}\n{code}"], check=True)
    return {"total": time.monotonic() - start}


def medians(runs: list[dict[str, float]]) -> dict[str, dict[str, float]]:
    names = list(dict.fromkeys(name for run in runs for name in run))
    values = {name: [run[name] for run in runs if name in run] for name in names}
    return {
        name: {"median_s": statistics.median(v), "min_s": min(v), "max_s": max(v), "n": len(v)}
        for name, v in values.items()
    }


def measure(args: argparse.Namespace) -> dict[str, list[dict[str, float]]]:
    engine_args = {"model": str(args.checkpoint), "dtype": args.dtype}
    if args.num_threads is not None:
        engine_args["num_threads"] = args.num_threads
    if args.quantization is not None:
        engine_args["quantization"] = args.quantization
    roots = {"": ROOT} | ({"against: ": args.against.resolve()} if args.against else {})
    jobs: dict[str, Callable[[], dict[str, float]]] = {}
    for label, root in roots.items():
        kinds = {"llm": run_llm, "serve": run_serve}
        jobs |= {f"{label}{kind}": lambda run=kinds[kind], at=root: run(at, engine_args) for kind in args.kinds}  # type: ignore[misc]
    for name, code in _FLOORS.items():
        jobs[f"floor: {name}"] = lambda code=code: run_floor(code, str(args.checkpoint))  # type: ignore[misc]
    run_floor(_FLOORS["pages"], str(args.checkpoint))  # warms the disk
    results: dict[str, list[dict[str, float]]] = {name: [] for name in jobs}
    for _ in range(args.repetitions):
        for name, job in jobs.items():
            results[name].append(job())
    return results


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--checkpoint", type=Path, required=True, help="folder; made there if it has no checkpoint")
    parser.add_argument("--kinds", nargs="+", choices=("llm", "serve"), default=["llm", "serve"])
    parser.add_argument("--against", type=Path, default=None, help="another checkout, run in turn with this one")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--quantization", default=None)
    parser.add_argument("--num-threads", type=int, default=None)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--output", type=Path, default=None, help="default: benchmarks/results/startup-*.json")
    args = parser.parse_args()
    args.threads = args.num_threads
    return args


def main() -> None:
    args = parse_args()
    make_checkpoint(args.checkpoint)
    runs = measure(args)
    summary = {name: medians(found) for name, found in runs.items()}
    for name, phases in summary.items():
        print(f"{name}")
        for phase, row in phases.items():
            print(f"{phase:>20}{row['median_s']:>8.2f} s  ({row['min_s']:.2f} to {row['max_s']:.2f})")
    hidden = ("output", "checkpoint", "against")
    options = {name: value for name, value in vars(args).items() if name not in hidden}
    report = {"benchmark": "startup", **environment(args), "options": options, "runs": runs, "summary": summary}
    path = args.output or RESULTS / f"startup-{datetime.now(UTC):%Y%m%d-%H%M%S}.json"
    path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(f"\nwrote {path}")


if __name__ == "__main__":
    main()
