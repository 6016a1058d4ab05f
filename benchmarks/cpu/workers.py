"""Workers seen from the benchmark: which engines there are, whose python runs them, and calls with a time limit."""

import contextlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from queue import Empty, Queue
from typing import Any

from mini_vllm.bench.noise import process_ticks

HERE = Path(__file__).resolve().parent
OURS = "mini_vllm"
ENGINES = {OURS: "mini_vllm", "transformers": "transformers", "llama_cpp": "llama_cpp",
           "openvino_genai": "openvino_genai", "vllm": "vllm"}  # fmt: skip
"""Engines, and the module that an environment must have for their workers."""
START_TIMEOUT, CALL_TIMEOUT = 900.0, 600.0


class WorkerError(Exception):
    """A worker that would not start, failed, or did not answer in time; the message is its last word."""


@dataclass(frozen=True)
class Entrant:
    """One engine with weights of one width. script: another worker, for tests."""

    engine: str
    width: str
    python: str = sys.executable
    script: Path | None = None

    @property
    def name(self) -> str:
        return f"{self.engine} {self.width}"

    @property
    def worker_file(self) -> Path:
        return self.script or HERE / f"worker_{self.engine}.py"


@dataclass(frozen=True)
class Setting:
    """What all entrants of a run have in common. max_len: tokens of the longest sequence; max_seqs: at once;
    step_tokens: tokens of all sequences in one step; kv_tokens: that are cached at once."""

    model: Path
    cache: Path
    threads: int
    max_len: int
    max_seqs: int
    step_tokens: int = 512
    kv_tokens: int = 8192


@dataclass(frozen=True)
class Completed:
    """Seconds that a call took, and the tokens that were made."""

    seconds: float
    made: list[list[int]]


@dataclass
class Worker:
    """A started worker. `complete` asks it for one call after the other."""

    entrant: Entrant
    process: "subprocess.Popen[str]"
    log: Path
    version: str = ""
    details: dict[str, Any] = field(default_factory=dict)
    _answers: "Queue[str]" = field(default_factory=Queue)

    @classmethod
    def start(cls, entrant: Entrant, setting: Setting, timeout: float = START_TIMEOUT) -> "Worker":
        """Wait until the engine has the model. Raises `WorkerError`."""
        log = setting.cache / "logs" / f"{setting.model.name}-{entrant.engine}-{entrant.width}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("w") as errors:
            process = subprocess.Popen(
                command_of(entrant, setting), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True,
                env=environment_of(entrant, setting),
            )  # fmt: skip
        worker = cls(entrant, process, log)
        threading.Thread(target=worker._listen, daemon=True).start()
        try:
            answer = worker._answer(timeout)
        except WorkerError:
            worker.stop()
            raise
        worker.version, worker.details = answer["version"], answer["details"]
        return worker

    def complete(self, prompts: list[list[int]], tokens: list[int], timeout: float = CALL_TIMEOUT) -> "Completed":
        """Raises `WorkerError`."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps({"prompts": prompts, "tokens": tokens}) + "\n")
            self.process.stdin.flush()
        except OSError:
            raise WorkerError(f"ended: {self.last_line()}") from None
        answer = self._answer(timeout)
        return Completed(float(answer["seconds"]), answer["made"])

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    def cpu_seconds(self) -> float:
        """Processor time that the worker has used so far, all threads together; 0 where the system does not tell."""
        try:
            text = Path(f"/proc/{self.process.pid}/stat").read_text()
        except OSError:
            return 0.0
        return process_ticks(text)[1] / os.sysconf("SC_CLK_TCK")

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()
        if self.process.stdin is not None:
            with contextlib.suppress(OSError):
                self.process.stdin.close()

    def last_line(self) -> str:
        """The last thing it said on standard error."""
        lines = [line for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        return lines[-1].strip()[-300:] if lines else "it said nothing"

    def _listen(self) -> None:
        assert self.process.stdout is not None
        with self.process.stdout as answers:
            for line in answers:
                self._answers.put(line)
        self._answers.put("")

    def _answer(self, timeout: float) -> dict[str, Any]:
        try:
            line = self._answers.get(timeout=timeout)
        except Empty:
            self.stop()
            raise WorkerError(f"did not answer within {timeout:.0f} s") from None
        if not line:
            raise WorkerError(f"ended with {self.process.wait()}: {self.last_line()}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise WorkerError(answer["error"])
        return answer


def command_of(entrant: Entrant, setting: Setting) -> list[str]:
    options = {"model": setting.model, "width": entrant.width, "threads": setting.threads, "cache": setting.cache,
               "max-len": setting.max_len, "max-seqs": setting.max_seqs,
               "step-tokens": setting.step_tokens, "kv-tokens": setting.kv_tokens}  # fmt: skip
    flags = [f"--{name}={value}" for name, value in options.items()]
    return [entrant.python, str(entrant.worker_file), *flags]


def environment_of(entrant: Entrant, setting: Setting) -> dict[str, str]:
    """Our package is found by our own worker only: another environment must not see it, nor what it needs."""
    found = {**os.environ, "OMP_NUM_THREADS": str(setting.threads), "PYTHONUNBUFFERED": "1"}
    found.pop("PYTHONPATH", None)
    return found | ({"PYTHONPATH": str(HERE.parents[1])} if entrant.engine == OURS else {})


# --- who takes part -------------------------------------------------------------------------------------------


def find_peers(asked: Sequence[str]) -> tuple[dict[str, str], dict[str, str]]:
    """(python of each peer that takes part, why the others are absent).

    asked: 'auto' (those that this python has), 'none', NAME=PYTHON; the last may be given with 'auto'.
    Raises ValueError for anything else.
    """
    peers = [engine for engine in ENGINES if engine != OURS]
    given = dict(part.split("=", 1) for part in asked if "=" in part)
    words = {part for part in asked if "=" not in part}
    if unknown := sorted((given.keys() - set(peers)) | (words - {"auto", "none"})):
        raise ValueError(f"--peers: {', '.join(unknown)} is unknown; there are auto, none, {', '.join(peers)}")
    found, absent = {}, {}
    for engine in peers:
        python = given.get(engine, sys.executable if "auto" in words else None)
        if python is None:
            absent[engine] = "not asked for"
        elif has_module(python, ENGINES[engine]):
            found[engine] = python
        else:
            absent[engine] = f"{'the named' if engine in given else 'this'} python has no module {ENGINES[engine]}"
    return found, absent


def has_module(python: str, module: str) -> bool:
    code = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({module!r}) is None)"
    try:
        return subprocess.run([python, "-I", "-c", code], capture_output=True, check=False).returncode == 0
    except OSError:
        return False
