"""`mini-vllm serve` as a command line: help by section, flags that are refused, a file of flags."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mini_vllm.entrypoints.cli import serve
from mini_vllm.entrypoints.cli.main import build_parser, main


def parsed(*argv: str) -> Any:
    return build_parser().parse_args(["serve", *argv])


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    with pytest.raises(SystemExit) as stop:
        parsed(*argv)
    assert stop.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


def shown(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    with pytest.raises(SystemExit) as stop:
        parsed(*argv)
    assert stop.value.code == 0
    return capsys.readouterr().out


def test_flags_become_arguments_of_engine_and_server() -> None:
    args = parsed(
        "DIR", "--max-num-seqs", "4", "--api-key", "a", "--api-key", "b", "--served-model-name", "x", "y",
        "--max-request-body-bytes", "1M", "--no-enable-prefix-caching", "--restart-engine", "--port", "9",
    )  # fmt: skip
    engine_args, serve_args = serve._engine_args(args), serve._serve_args(args)
    assert (engine_args.model, engine_args.max_num_seqs, engine_args.enable_prefix_caching) == ("DIR", 4, False)
    assert (serve_args.api_key, serve_args.served_model_name) == (("a", "b"), ("x", "y"))
    assert (serve_args.max_request_body_bytes, serve_args.restart_engine, serve_args.port) == (1 << 20, True, 9)


def test_without_a_model_the_bundled_one_is_served_on_one_thread() -> None:
    assert serve._engine_args(parsed()).num_threads == 1
    assert serve._engine_args(parsed("--num-threads", "3")).num_threads == 3
    assert serve._engine_args(parsed("DIR")).num_threads is None


def test_two_different_models_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "ONE", "--model", "TWO"]) == 2
    assert "two models" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--max-modl-len", "5"], "--max-modl-len: no such flag; did you mean --max-model-len?"),
        (["--max-n-reqs=5"], "--max-n-reqs: no such flag"),
        (["--enable-lora"], "--enable-lora: vLLM has this flag, but it is not supported here yet"),
        (["--tool-call-parser", "hermes"], "--tool-call-parser: vLLM has this flag, but it is not supported here yet"),
        (["--no-enable-request-id-headers"], "is always on here"),
        (["--h11-max-header-count", "9"], "--max-header-bytes limits them"),
        (["--frobnicate"], "--frobnicate: no such flag; --help lists them"),
        (["--port", "many"], "argument --port: invalid int value: 'many'"),
        (["A", "B"], "unrecognized arguments: B"),
    ],
)
def test_a_flag_that_is_not_here_is_refused_with_a_way_on(
    capsys: pytest.CaptureFixture[str], argv: list[str], says: str
) -> None:
    assert says in refused(capsys, *argv)


def test_flags_said_to_be_missing_are_missing() -> None:
    known = {option[2:].replace("-", "_") for option in _serve_parser()._option_string_actions}
    assert not known & set(serve.NOT_HERE)


def _serve_parser() -> Any:
    (subparsers,) = (action for action in build_parser()._actions if action.dest == "command")
    return subparsers.choices["serve"]  # type: ignore[index,call-overload]


def test_help_lists_sections_and_shows_one_a_flag_or_all(capsys: pytest.CaptureFixture[str]) -> None:
    overview = shown(capsys, "--help")
    assert "--help=security" in overview and "--max-num-seqs" not in overview
    assert len(overview.splitlines()) < 50
    security = shown(capsys, "--help=security")
    assert "--api-key-file" in security and "--port" not in security
    for name in ("scheduler", "SchedulerConfig", "kv-cache"):
        assert shown(capsys, f"--help={name}").count("--") > 2
    assert shown(capsys, "--help=max-num-seqs") == shown(capsys, "--help=max_num_seqs")
    everything = shown(capsys, "--help=all")
    assert "--max-num-seqs" in everything and "--uds" in everything
    assert "there is ssl-keyfile" in refused(capsys, "--help=ssl")


def test_every_section_can_be_asked_for_by_one_word(capsys: pytest.CaptureFixture[str]) -> None:
    words = [line.split("=")[1].split()[0] for line in shown(capsys, "-h").splitlines() if line.startswith("  --help=")]
    assert len(set(words)) == len(words) > 8
    for word in words:
        shown(capsys, f"--help={word}")


def test_a_file_gives_flags_and_the_command_line_wins(tmp_path: Path) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text(
        "model: DIR\nport: 9000\nmax_num_seqs: 7\nenable-prefix-caching: false\nserved-model-name: [a, b]\n"
        "default-chat-template-kwargs: {enable_thinking: false}\napi-key: -dash\nuds:\n"
    )
    args = parsed("--config", str(file), "--port", "1234")
    engine_args, serve_args = serve._engine_args(args), serve._serve_args(args)
    assert (engine_args.model, engine_args.max_num_seqs, engine_args.enable_prefix_caching) == ("DIR", 7, False)
    assert serve_args.port == 1234
    assert serve_args.served_model_name == ("a", "b")
    assert serve_args.api_key == ("-dash",)
    assert serve_args.default_chat_template_kwargs == {"enable_thinking": False}
    assert serve_args.uds is None


@pytest.mark.parametrize(
    ("content", "says"),
    [("- a list", "must be a mapping"), ("a: [", "is not valid YAML"), ("prot: 1", "--prot: no such flag")],
)
def test_a_file_that_is_wrong_is_told_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str, says: str
) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text(content)
    try:
        assert main(["serve", f"--config={file}"]) == 2
    except SystemExit as stop:
        assert stop.code == 2
    assert says in capsys.readouterr().err.splitlines()[-1]


def test_help_imports_neither_the_server_nor_torch() -> None:
    script = (
        "import sys; from mini_vllm.entrypoints.cli.main import main\n"
        "try: main(['serve', '--help=all'])\n"
        "except SystemExit: pass\n"
        "found = {'torch', 'fastapi', 'uvicorn', 'pydantic'} & set(sys.modules)\n"
        "assert not found, found\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, stdout=subprocess.DEVNULL, timeout=60)
