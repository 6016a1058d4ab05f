"""Workers seen from the benchmark: which engines there are, whose python runs them, and calls with a time limit."""

import json
import os
import subprocess
import sys
import threading
from dataclasses import dataclass, field
from pathlib import Path
from queue import Empty, Queue
from typing import Any

HERE = Path(__file__).resolve().parent
ENGINES = {"mini_vllm": "mini_vllm", "transformers": "transformers", "llama_cpp": "llama_cpp",
           "openvino": "openvino_genai", "vllm": "vllm"}  # fmt: skip
"""Workers, and the module that an environment must have for them."""


class WorkerError(Exception):
    """A worker that would not start, failed, or did not answer in time; the message is its last word."""


@dataclass(frozen=True)
class Entrant:
    """One engine with weights of one width."""

    engine: str
    width: str
    python: str = sys.executable

    @property
    def name(self) -> str:
        return f"{self.engine} {self.width}"


@dataclass
class Worker:
    """A started worker. `complete` asks it for one call after the other."""

    entrant: Entrant
    process: "subprocess.Popen[str]"
    version: str = ""
    details: dict[str, Any] = field(default_factory=dict)
    _answers: "Queue[str]" = field(default_factory=Queue)

    @classmethod
    def start(cls, entrant: Entrant, model: Path, cache: Path, threads: int, limits: tuple[int, int], log: Path) -> "Worker":
        """limits: tokens of the longest sequence, sequences at once. Raises `WorkerError`."""
        script = HERE / f"worker_{entrant.engine}.py"
        options = {"model": model, "width": entrant.width, "threads": threads, "cache": cache,
                   "max-len": limits[0], "max-seqs": limits[1]}  # fmt: skip
        command = [entrant.python, str(script), *(f"--{name}={value}" for name, value in options.items())]
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": python_path(entrant)}
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log.open("a"), text=True, env=environment
        )
        worker = cls(entrant, process)
        threading.Thread(target=worker._listen, daemon=True).start()
        answer = worker._answer(timeout=900)
        worker.version, worker.details = answer["version"], answer["details"]
        return worker

    def complete(self, prompts: list[list[int]], tokens: list[int], timeout: float = 600) -> float:
        """Seconds that it took. Raises `WorkerError`."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps({"prompts": prompts, "tokens": tokens}) + "\n")
            self.process.stdin.flush()
        except OSError as error:
            raise WorkerError(f"{self.entrant.name} is gone: {error}") from error
        return float(self._answer(timeout)["seconds"])

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()

    def _listen(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._answers.put(line)
        self._answers.put("")

    def _answer(self, timeout: float) -> dict[str, Any]:
        try:
            line = self._answers.get(timeout=timeout)
        except Empty:
            self.stop()
            raise WorkerError(f"{self.entrant.name} did not answer within {timeout:.0f} s") from None
        if not line:
            raise WorkerError(f"{self.entrant.name} ended with {self.process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise WorkerError(f"{self.entrant.name}: {answer['error']}")
        return answer


def python_path(entrant: Entrant) -> str:
    """Our own package for our own worker; nothing but the worker's folder for others."""
    return str(HERE.parents[1]) if entrant.engine == "mini_vllm" else ""


def find_peers(asked: str) -> tuple[dict[str, str], list[str]]:
    """(python of each peer, peers that are absent) for 'auto', 'none' or 'NAME=PYTHON,...'; auto asks this python."""
    peers = [engine for engine in ENGINES if engine != "mini_vllm"]
    if asked == "none":
        return {}, []
    given = dict(part.split("=", 1) for part in asked.split(",") if "=" in part)
    if unknown := sorted(given.keys() - set(peers)):
        raise SystemExit(f"--peers: {', '.join(unknown)} is unknown; there are {', '.join(peers)}")
    pythons = {engine: given.get(engine, sys.executable) for engine in peers}
    found = {engine: python for engine, python in pythons.items() if has_module(python, ENGINES[engine])}
    return found, [engine for engine in peers if engine not in found]


def has_module(python: str, module: str) -> bool:
    code = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({module!r}) is None)"
    try:
        return subprocess.run([python, "-c", code], capture_output=True, check=False).returncode == 0
    except OSError:
        return False
