"""Claims about our clients and our server together: `bench serve` on every API, and what `chat` and `complete` say."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mini_vllm.bench.serve.benchmark import run_serve
from mini_vllm.bench.serve.options import ServeOptions
from mini_vllm.entrypoints.client import ApiClient, Piece
from tests.entrypoints.server.rig import running_server
from tests.entrypoints.terminal import ROOT

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    trace = tmp_path_factory.mktemp("trace") / "trace.jsonl"
    with running_server("--num-gpu-blocks-override", "2000", "--record-trace", str(trace)) as server:
        yield server.url


@pytest.mark.parametrize("backend", ["openai", "openai-chat", "openai-responses", "anthropic"])
def test_every_api_can_be_measured(backend: str, url: str) -> None:
    sizes: dict[str, Any] = {"num_prompts": 12, "random_input_len": 40, "random_output_len": 16}
    options = ServeOptions(
        base_url=url, backend=backend, seed=len(backend), max_concurrency=4,
        extra_body={"ignore_eos": True} if backend.startswith("openai") and backend != "openai-responses" else {},
        **sizes,
    )  # fmt: skip
    result, records = run_serve(options)
    assert (result["completed"], result["failed"]) == (12, 0), result["failures"]
    assert 12 <= result["total_output_tokens"] <= 12 * 16
    assert all(record.counted_by == "usage" for record in records)
    assert 12 * 38 <= result["total_input_tokens"] <= 12 * 60  # the prompts, and what a template adds
    assert result["mean_ttft_ms"] <= result["mean_e2el_ms"] and result["tokens_per_event"] >= 1


def test_token_ids_are_as_long_as_they_were_made(url: str) -> None:
    sizes: dict[str, Any] = {"num_prompts": 6, "random_input_len": 33, "random_output_len": 5}
    result, _ = run_serve(ServeOptions(base_url=url, prompt_token_ids=True, ignore_eos=True, seed=77, **sizes))
    assert result["total_input_tokens"] == 6 * 33 and result["total_output_tokens"] == 6 * 5


def test_the_file_of_a_run_is_json(url: str, tmp_path: Path) -> None:
    command = [
        sys.executable, "-m", "mini_vllm", "bench", "serve", "--base-url", url, "--num-prompts", "4",
        "--input-len", "8", "--output-len", "4", "--save-result", "--result-dir", str(tmp_path),
        "--metadata", "note=test",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False, env=os.environ)
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.glob("openai-infqps-stdlib-llama-3.7m-*.json")
    assert json.loads(path.read_text())["note"] == "test"


def test_our_client_reads_our_streams(url: str) -> None:
    with ApiClient(f"{url}/v1") as client:
        (model,) = client.models()
        fields = {"max_tokens": 6, "temperature": 0, "ignore_eos": True}
        for pieces in (
            list(client.complete(model, "import os", fields)),
            list(client.chat(model, [{"role": "user", "content": "import os"}], fields)),
        ):
            last: Piece = pieces[-1]
            assert last.usage is not None and last.usage.completion_tokens == 6
            assert "".join(piece.text for piece in pieces).strip()
