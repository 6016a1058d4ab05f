"""Claims about the `mini-vllm` command, mostly in-process; a few as a user would run it."""

import json
import logging
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mini_vllm import LLM, SamplingParams, __version__
from mini_vllm.entrypoints.cli.arguments import engine_args_from
from mini_vllm.entrypoints.cli.main import build_parser, main

ENGINE = ["--dtype", "float32", "--num-threads", "1", "--num-gpu-blocks-override", "64", "--max-num-seqs", "8"]
GREEDY = ["--temperature", "0", "--max-tokens", "8", "--ignore-eos"]


@pytest.fixture(autouse=True)
def _log_level_is_put_back() -> Iterator[None]:
    level = logging.getLogger("mini_vllm").level
    yield
    logging.getLogger("mini_vllm").setLevel(level)


@pytest.fixture
def generate(llama: Path, capsys: pytest.CaptureFixture[str]):
    """Run `mini-vllm generate` on the small Llama; returns (status, standard output, standard error)."""

    def run(*argv: str) -> tuple[int, str, str]:
        status = main(["generate", "--model", str(llama), *ENGINE, *GREEDY, *argv])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


def texts_of(folder: Path, prompts: list[str]) -> list[str]:
    llm = LLM(str(folder), dtype="float32", num_threads=1, num_gpu_blocks_override=64)
    params = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
    return [output.outputs[0].text for output in llm.generate(prompts, params, use_tqdm=False)]


# -- as a user would ----------------------------------------------------------------------------------------------


def command(*argv: str, **kwargs: Any) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "mini_vllm", *argv], capture_output=True, text=True, timeout=60, check=False, **kwargs
    )


def test_help_teaches_and_version_tells() -> None:
    done = command("--help")
    assert done.returncode == 0 and "examples:" in done.stdout and "generate" in done.stdout and "demo" in done.stdout
    assert command("--version").stdout.strip() == f"mini-vllm {__version__}"
    assert command().returncode == 2, "no command is an error of usage"


def test_help_loads_neither_torch_nor_the_tokenizer() -> None:
    code = (
        "import sys; from mini_vllm.entrypoints.cli.main import build_parser; build_parser().format_help();"
        "print({'torch', 'tokenizers', 'jinja2', 'numpy', 'rich'} & set(sys.modules))"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "set()"


def test_an_error_is_one_line_and_status_2() -> None:
    done = command("generate", "--model", "no/where", "--prompt", "x")
    assert done.returncode == 2 and done.stdout == ""
    assert re.fullmatch(r"mini-vllm: error: model: 'no/where' is neither a local folder .*\n", done.stderr)


# -- flags ----------------------------------------------------------------------------------------------------------


def test_flags_become_engine_args() -> None:
    argv = (
        "generate --model M --tokenizer T --dtype half --max-model-len 16K --seed none --block-size 8 "
        "--no-enable-prefix-caching --gpu-memory-utilization 0.5 --kv-cache-memory-bytes 2G "
        "--num-gpu-blocks-override 9 --max-num-batched-tokens 64 --max-num-seqs 4 "
        "--long-prefill-token-threshold 16 --scheduling-policy priority "
        "--device cpu --num-threads 2 --attention-backend X --load-format dummy --generation-config vllm "
        "--disable-log-stats --tensor-parallel-size 1 --revision R --tokenizer-revision S --download-dir D "
        "--no-use-tqdm-on-load --quantization int4 --quantization-group-size 64 --no-quantization-symmetric "
        "--quantization-activation-scales group --quantization-lm-head same --quantization-skip-layers o_proj,x.y "
        "--enforce-eager --batch-invariant --async-scheduling --kv-cache-dtype int8_per_token_head"
    ).split()
    args = engine_args_from(build_parser().parse_args(argv))
    expected = {
        "model": "M", "tokenizer": "T", "dtype": "half", "max_model_len": 16384, "seed": None, "block_size": 8,
        "enable_prefix_caching": False, "gpu_memory_utilization": 0.5, "kv_cache_memory_bytes": 2**31,
        "num_gpu_blocks_override": 9, "max_num_batched_tokens": 64, "max_num_seqs": 4,
        "long_prefill_token_threshold": 16, "scheduling_policy": "priority", "device": "cpu", "num_threads": 2,
        "attention_backend": "X", "load_format": "dummy", "generation_config": "vllm", "disable_log_stats": True,
        "tensor_parallel_size": 1, "trust_remote_code": False, "revision": "R", "tokenizer_revision": "S",
        "download_dir": "D", "use_tqdm_on_load": False, "max_logprobs": 20, "logits_processors": (),
        "preemption_policy": "latest", "tenant_weights": {}, "step_trace_capacity": 256, "step_trace_detailed": False,
        "quantization": "int4", "quantization_group_size": 64, "quantization_symmetric": False,
        "quantization_activation_scales": "group", "quantization_lm_head": "same",
        "quantization_skip_layers": ("o_proj", "x.y"), "enforce_eager": True, "batch_invariant": True,
        "async_scheduling": True, "kv_cache_dtype": "int8_per_token_head",
    }  # fmt: skip
    assert vars(args) == expected


def test_flags_not_given_leave_the_defaults_alone() -> None:
    from mini_vllm.engine.arg_utils import EngineArgs

    assert engine_args_from(build_parser().parse_args(["generate"])) == EngineArgs()


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--prompt", "x", "--temperature", "-1"], "temperature: must be in [0"),
        (["--prompt", "x", "--max-tokens", "0"], "max_tokens: must be at least 1"),
        (["--prompt", ("word " * 300)], "prompt: This model's maximum context length is 256 tokens"),
        (["--prompt", "x", "--max-model-len", "9x"], "max_model_len: must be an integer"),
        (["--prompt", "x", "--trust-remote-code"], "trust_remote_code: must be False"),
        (["--prompt", "x", "--json", "--stream"], "stream: cannot be combined with --json"),
        (["--prompt", "x", "--system", "s"], "need --chat"),
        (["--prompt-file", "/no/such/file"], "prompt_file: cannot read '/no/such/file'"),
    ],
)
def test_bad_values_are_one_line_naming_the_field(generate: Any, argv: list[str], says: str) -> None:
    status, out, err = generate(*argv)
    assert status == 2 and out == "" and len(err.splitlines()) == 1
    assert err.startswith("mini-vllm: error: ") and says in err


# -- generate ------------------------------------------------------------------------------------------------------


def test_one_prompt_prints_its_text_alone(generate: Any, llama: Path) -> None:
    status, out, _ = generate("--prompt", "hello world")
    assert (status, out) == (0, texts_of(llama, ["hello world"])[0] + "\n")


def test_several_prompts_are_printed_in_order_under_headings(generate: Any, llama: Path) -> None:
    prompts = ["hello world", "def add(a, b):"]
    a, b = texts_of(llama, prompts)
    _, out, _ = generate("--prompt", prompts[0], "--prompt", prompts[1])
    assert out == f"--- 1 of 2: {prompts[0]!r}\n{a}\n\n--- 2 of 2: {prompts[1]!r}\n{b}\n"


def test_streaming_prints_the_same_text(generate: Any) -> None:
    prompts = ["--prompt", "hello world", "--prompt", "def add(a, b):", "--prompt", "東京"]
    assert generate(*prompts, "--stream") == generate(*prompts, "--no-stream")


def test_json_lines_hold_text_ids_and_usage(generate: Any, llama: Path) -> None:
    _, out, _ = generate("--prompt", "hello world", "--prompt", "東京", "--json")
    first, second = map(json.loads, out.splitlines())
    assert [first["text"], second["text"]] == texts_of(llama, ["hello world", "東京"])
    assert (first["prompt"], first["finish_reason"], first["error"]) == ("hello world", "length", None)
    assert len(first["token_ids"]) == 8
    assert first["usage"] == {"prompt_tokens": 3, "completion_tokens": 8, "cached_tokens": 0}


def test_prompts_come_from_files_and_standard_input(
    generate: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import io

    (tmp_path / "p.txt").write_text("hello world")
    expected = generate("--prompt", "hello world")
    assert generate("--prompt-file", str(tmp_path / "p.txt")) == expected
    for argv in ([], ["--prompt-file", "-"]):
        monkeypatch.setattr("sys.stdin", io.StringIO("hello world\n"))
        assert generate(*argv) == expected


def test_chat_goes_through_the_template(generate: Any, tmp_path: Path) -> None:
    (tmp_path / "t.jinja").write_text("{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}")
    chat = ["--chat", "--system", "brief", "--prompt", "hello", "--chat-template", str(tmp_path / "t.jinja")]
    plain = json.loads(generate("--prompt", "[system]brief[user]hello", "--json")[1])
    templated = json.loads(generate(*chat, "--json")[1])
    assert templated["prompt"] == "hello"
    assert templated["usage"]["prompt_tokens"] == plain["usage"]["prompt_tokens"] - 1, "a chat gets no BOS of its own"
    assert generate("--chat", "--prompt", "hello")[0] == 0


def test_a_request_that_fails_is_told_and_changes_the_status(generate: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: Any, plan: Any) -> Any:
        raise ValueError("out of luck")

    monkeypatch.setattr("mini_vllm.executor.uniproc.UniProcExecutor.execute_model", broken)
    status, _, err = generate("--prompt", "hello")
    assert status == 1 and "mini-vllm: error: prompt 1: the step failed: ValueError: out of luck" in err


# -- demo ----------------------------------------------------------------------------------------------------------


def test_the_demo_completes_several_prompts_and_finds_their_shared_prefix(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--num-threads", "1", "--max-tokens", "6"]) == 0
    out = capsys.readouterr().out
    for index in range(8):
        assert f"[{index}] (" in out, "each prompt was finished"
    hits = re.search(r"prefix cache: (\d+) of (\d+) prompt tokens found \((\d+\.\d)% hit rate\)", out)
    assert hits and int(hits[1]) > 0
    assert re.search(r"throughput: +\d+\.\d tokens/s", out) and re.search(r"KV cache: +\d+\.\d% at its peak", out)
    assert re.search(r"steps: +\d+, of \d+\.\d tokens", out)
    assert float(re.search(r"KV cache: +(\d+\.\d)%", out)[1]) > 0  # type: ignore[index]


def test_the_demo_repeats_itself(capsys: pytest.CaptureFixture[str]) -> None:
    def texts() -> list[str]:
        main(["demo", "--num-threads", "1", "--max-tokens", "6"])
        return [line for line in capsys.readouterr().out.splitlines() if line.startswith("[")]

    assert texts() == texts()


def test_the_demo_takes_prompts_and_another_model(llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status = main(["demo", "--model", str(llama), *ENGINE, *GREEDY, "--prompt", "hello world", "--prompt", "東京"])
    out = capsys.readouterr().out
    assert status == 0 and "requests:     2 completed, up to 2 in one step" in out


def test_the_live_display_draws_every_prompt(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import io

    screen = io.StringIO()
    screen.isatty = lambda: True  # type: ignore[method-assign]
    monkeypatch.setattr("sys.stdout", screen)
    argv = ["demo", "--model", str(llama), *ENGINE, *GREEDY, "--prompt", "hello world", "--prompt", "goodbye"]
    assert main(argv) == 0
    shown = screen.getvalue()
    assert "hello world" in shown and "goodbye" in shown and shown.count("length") >= 2 and "throughput" in shown
