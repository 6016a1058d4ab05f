"""Claims about `chat` and `complete`: on a terminal, in a pipe, against a server and with a model in process."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from mini_vllm.entrypoints.cli.main import main
from mini_vllm.entrypoints.cli.terminal import safe_text
from mini_vllm.entrypoints.client import ApiClient, ServerError, Usage
from tests.bench.fake_server import CACHED_TOKENS, PROMPT_TOKENS, fake_server
from tests.checkpoints import make_checkpoint
from tests.entrypoints.terminal import ROOT, terminal

CTRL_C, CTRL_D = "\x03", "\x04"


def run(*args: str, stdin: str | None = None) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "mini_vllm", *args], input=stdin, capture_output=True, text=True, cwd=ROOT, timeout=60,
        env=os.environ | {"OMP_NUM_THREADS": "1"}, check=False,
    )  # fmt: skip


# --- one question ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["chat", "complete"])
def test_a_quick_answer_goes_to_standard_output_and_its_numbers_to_standard_error(
    command: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with fake_server() as server:
        assert main([command, "--url", f"{server.url}/v1", "-q", "hello", "--max-tokens", "3", "--stats"]) == 0
    out, err = capfd.readouterr()
    assert out == "tok0 tok1 tok2 \n"
    assert f"{PROMPT_TOKENS} prompt tokens ({CACHED_TOKENS} cached), 3 generated" in err and "TTFT" in err
    assert "\x1b" not in out + err


def test_all_of_a_pipe_is_one_message() -> None:
    with fake_server() as server:
        done = run("chat", "--url", server.url, "--max-tokens", "1", stdin="first line\nsecond line\n")
    assert done.returncode == 0 and done.stdout == "tok0 \n"
    assert server.bodies[0]["messages"] == [{"role": "user", "content": "first line\nsecond line"}]


def test_what_is_asked_for_reaches_the_server(capfd: pytest.CaptureFixture[str]) -> None:
    flags = "--temperature 0.5 --top-k 4 --sampling-seed 7 --stop a --stop b --logit-bias 5=-1 --model-name other"
    with fake_server() as server:
        main(["chat", "--url", server.url, "--api-key", "k", "--system-prompt", "Be brief.", "-q", "x", *flags.split()])
    body = server.bodies[0]
    assert body["messages"][0] == {"role": "system", "content": "Be brief."} and body["model"] == "other"
    assert (body["temperature"], body["top_k"], body["seed"], body["stop"]) == (0.5, 4, 7, ["a", "b"])
    assert body["logit_bias"] == {"5": -1.0} and "max_tokens" not in body
    assert server.headers[0]["authorization"] == "Bearer k"


@pytest.mark.parametrize("fault", [{"api_key": "right"}, {"error_after": 1}, {"break_after": 1}, {"fail_every": 1}])
def test_an_error_of_the_server_is_one_line_and_status_2(
    fault: dict[str, Any], capfd: pytest.CaptureFixture[str]
) -> None:
    with fake_server(**fault) as server:
        assert main(["chat", "--url", server.url, "-q", "x"]) == 2
    err = capfd.readouterr().err
    assert err.startswith("mini-vllm: error: ") and err.count("\n") == 1


@pytest.mark.parametrize(
    ("flags", "field"),
    [
        (["--url", "localhost:8000"], "url"),
        (["--url", "http://127.0.0.1:1", "--max-num-seqs", "3"], "max_num_seqs"),
        (["--url", "http://127.0.0.1:1", "DIR"], "MODEL"),
        (["--model-name", "x"], "model_name"),
        (["DIR", "--model", "OTHER"], "model"),
        (["--temperature", "-1"], "temperature"),
    ],
)
def test_flags_that_would_not_act_are_refused(flags: list[str], field: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["chat", "-q", "x", *flags]) == 2
    assert capfd.readouterr().err.startswith(f"mini-vllm: error: {field}: ")


def test_an_empty_message_is_refused() -> None:
    done = run("complete", "--url", "http://127.0.0.1:1", stdin="")
    assert done.returncode == 2 and "there is no prompt" in done.stderr


# --- in process -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_checkpoint(tmp_path_factory.mktemp("chat") / "tiny-chat", "qwen2", max_position_embeddings=128))


def test_without_a_url_the_model_runs_here(checkpoint: str, capfd: pytest.CaptureFixture[str]) -> None:
    flags = ["--temperature", "0", "--max-tokens", "4", "--ignore-eos", "--stats"]
    assert main(["complete", checkpoint, "-q", "hello world", *flags]) == 0
    first = capfd.readouterr()
    assert "4 generated" in first.err and first.out
    assert main(["complete", "--model", checkpoint, "-q", "hello world", *flags]) == 0
    assert capfd.readouterr().out == first.out


def test_a_conversation_on_a_terminal_reuses_its_prefix_and_survives_a_full_context(checkpoint: str) -> None:
    flags = "--temperature 0 --max-tokens 20 --ignore-eos --stats --no-markdown --block-size 4".split()
    with terminal("chat", checkpoint, *flags) as term:
        term.expect("Ctrl-D ends.")
        term.expect("> ")
        term.type("hello world\n")
        term.expect("(0 cached), 20 generated")
        term.expect("> ")
        term.type("and again\n")
        cached = int(term.expect(" cached)").rpartition("(")[2].split()[0])
        assert cached >= 12  # the first turn, as far as random text is read back as the same tokens
        term.expect("> ")
        term.type(f"{'paging blocks of keys ' * 20}\n")
        term.expect("no longer fits the model's context. /reset forgets it")
        term.expect("> ")
        term.type("/reset\n")
        term.expect("begins anew")
        term.type("hello\n")
        term.expect("20 generated")
        term.expect("> ")
        term.type(CTRL_D)
        assert term.ended() == 0


@pytest.mark.slow
def test_ctrl_c_stops_an_answer_of_a_model_in_process_and_the_next_one_comes() -> None:
    with terminal("complete", "--ignore-eos", "--temperature", "0", "--max-tokens", "900", "--stats") as term:
        term.expect("> ")
        term.type("import os\n")
        term.expect("import os")
        time.sleep(0.3)
        term.type(CTRL_C)
        term.expect("stopped")
        assert 0 < int(term.expect(" generated").split()[-2]) < 900
        term.expect("> ")
        term.type("def\n")
        term.expect("def")
        time.sleep(0.2)
        term.type(CTRL_C)
        term.expect("stopped")  # the engine was still there to answer
        term.expect("> ")
        term.type(CTRL_D)
        assert term.ended() == 0


# --- against a server, on a terminal ----------------------------------------------------------------------------


def test_ctrl_c_stops_the_answer_and_not_the_chat_and_the_server_is_told() -> None:
    with fake_server(gap=0.05) as server, terminal("chat", "--url", server.url, "--no-markdown") as term:
        term.expect("> ")
        term.type("count\n")  # 5 tokens by default
        term.expect("tok4")
        term.expect("> ")
        server.gap = 0.3
        term.type("again\n")
        term.expect("tok1")
        term.type(CTRL_C)
        term.expect("stopped")
        term.expect("> ")
        deadline = time.monotonic() + 5
        while server.open_streams and time.monotonic() < deadline:
            time.sleep(0.02)
        assert server.disconnected == 1
        server.gap = 0.0
        term.type("third\n")
        term.expect("tok4")
        # what was read of the stopped answer is part of the conversation
        contents = [message["content"] for message in server.bodies[-1]["messages"]]
        assert contents[0] == "count" and contents[2] == "again" and contents[3].startswith("tok0 tok1")
        term.expect("> ")
        term.interrupt("Ctrl-D ends")
        term.expect("> ")
        term.type(CTRL_D)
        assert term.ended() == 0


def test_a_conversation_can_be_retried_saved_and_begun_anew(tmp_path: Path) -> None:
    path = tmp_path / "chat.json"
    with fake_server() as server, terminal("chat", "--url", server.url, "--system-prompt", "S") as term:
        term.expect("> ")
        term.type("one\n")
        term.expect("> ")
        term.type("/retry\n")
        term.expect("tok4")
        term.expect("> ")
        assert server.bodies[0]["messages"] == server.bodies[1]["messages"]
        term.type(f"/save {path}\n")
        term.expect("3 messages written")
        term.type("/system T\n")
        term.expect("begins anew")
        term.type("two\n")
        term.expect("tok4")
        term.expect("> ")
        term.type("/nonsense\n")
        term.expect("no command")
        term.type("/help\n")
        term.expect("/exit")
        term.type("/exit\n")
        assert term.ended() == 0
    assert [message["role"] for message in json.loads(path.read_text())] == ["system", "user", "assistant"]
    assert server.bodies[2]["messages"] == [{"role": "system", "content": "T"}, {"role": "user", "content": "two"}]


def test_answers_are_rendered_while_they_come_and_once_more_when_they_are_whole() -> None:
    with fake_server(gap=0.25) as server, terminal("chat", "--url", server.url, "--max-tokens", "4") as term:
        term.expect("> ")
        term.type("hi\n")
        term.expect("tok0 tok1")
        assert server.open_streams == 1
        term.expect("tok0 tok1 tok2 tok3  ")  # rich fills the line
        term.expect("cut off: the limit of tokens")
        assert "\x1b[?25l" in term.raw and "\x1b[?25h" in term.raw  # the cursor was hidden, and is back
        term.expect("> ")
        term.type(CTRL_D)
        assert term.ended() == 0


def test_several_lines_are_one_message_pasted_or_quoted() -> None:
    with fake_server() as server, terminal("chat", "--url", server.url, "--no-markdown") as term:
        term.expect("> ")
        term.type("pasted\nlines\n")
        term.expect("tok4")
        term.expect("> ")
        term.type('"""quoted\n')
        term.expect("... ")
        term.type('lines"""\n')
        term.expect("tok4")
        term.expect("> ")
        term.type(CTRL_D)
        term.ended()
    assert [body["messages"][-1]["content"] for body in server.bodies] == ["pasted\nlines", "quoted\nlines"]


def test_a_failure_does_not_end_the_chat_and_leaves_no_trace_in_it() -> None:
    with fake_server(fail_every=1) as server, terminal("chat", "--url", server.url) as term:
        term.expect("> ")
        term.type("one\n")
        term.expect("error: HTTP 503: too many requests queued")
        server.fail_every = 0
        term.expect("> ")
        term.type("two\n")
        term.expect("tok4")
        assert [message["content"] for message in server.bodies[-1]["messages"]] == ["two"]


# --- the pieces -------------------------------------------------------------------------------------------------


def test_a_model_cannot_write_control_codes_to_a_terminal() -> None:
    assert safe_text("a\x1b[31mb\x07\x9bc\r\n\td\x7f") == "a[31mbc\n\td"


def test_the_client_gives_text_then_usage_and_one_kind_of_error() -> None:
    with fake_server() as server, ApiClient(server.url) as client:
        assert client.models() == ["fake"]
        pieces = list(client.complete("fake", "x", {"max_tokens": 2}))
        assert "".join(piece.text for piece in pieces) == "tok0 tok1 "
        assert pieces[-1].usage == Usage(PROMPT_TOKENS, 2, CACHED_TOKENS)
        assert [piece.finish_reason for piece in pieces] == [None, "length", None]
        server.fail_every = 1
        with pytest.raises(ServerError, match="HTTP 503: too many requests") as caught:
            list(client.chat("fake", [], {}))
        assert caught.value.code == 503
    with ApiClient("http://127.0.0.1:1") as client, pytest.raises(ServerError, match="Connect"):
        client.models()
