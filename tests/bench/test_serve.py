"""Claims about `bench serve`: against a server with known delays it measures those delays, and never falls over."""

import asyncio
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mini_vllm.bench.serve.benchmark import run_serve
from mini_vllm.bench.serve.connection import ConnectionFailedError, ConnectionPool, EventSplitter, Origin
from mini_vllm.bench.serve.datasets import RequestMaker
from mini_vllm.bench.serve.options import ServeOptions
from mini_vllm.engine.arg_utils import DEFAULT_MODEL
from mini_vllm.entrypoints.cli.main import main
from mini_vllm.exceptions import ConfigError, InvalidParameterError, RequestError
from mini_vllm.text.load import load_tokenizer
from tests.bench.fake_server import CACHED_TOKENS, PROMPT_TOKENS, FakeServer, fake_server

TOKENIZER = load_tokenizer(DEFAULT_MODEL)
SMALL: dict[str, Any] = {"num_prompts": 4, "random_input_len": 6, "random_output_len": 8, "ignore_eos": True}


def run(server: FakeServer, **options: Any) -> tuple[dict[str, Any], list[Any]]:
    return run_serve(ServeOptions(base_url=server.url, **{**SMALL, **options}))


# --- what is measured -----------------------------------------------------------------------------------------


def test_known_delays_are_measured() -> None:
    """First token after 120 ms, then one each 30 ms: TTFT 120, ITL and TPOT 30, E2EL 120 + 7 * 30."""
    with fake_server(first_delay=0.12, gap=0.03) as server:
        result, _ = run(server)
    assert result["completed"] == 4 and result["total_output_tokens"] == 4 * 8
    for name, expected in (("ttft", 120), ("itl", 30), ("tpot", 30), ("e2el", 330)):
        # a busy machine makes it later, nothing makes it earlier
        assert expected - 2 < result[f"median_{name}_ms"] < expected * 1.1 + 60, name
    assert result["median_tpot_ms"] == pytest.approx(30, abs=6)
    assert result["total_input_tokens"] == 4 * PROMPT_TOKENS and result["total_cached_tokens"] == 4 * CACHED_TOKENS
    assert result["max_concurrent_requests"] == 4


@pytest.mark.parametrize("backend", ["openai", "openai-chat", "openai-responses", "anthropic"])
def test_every_backend_counts_the_tokens_of_the_usage(backend: str) -> None:
    with fake_server(tokens_per_event=3, gap=0.01) as server:
        result, records = run(server, backend=backend, ignore_eos=False)
    assert (result["completed"], result["failed"]) == (4, 0), result["failures"]
    assert result["total_output_tokens"] == 32 and result["total_input_tokens"] == 4 * PROMPT_TOKENS
    assert records[0].text == "".join(f"tok{number} " for number in range(8))
    assert result["tokens_per_event"] == pytest.approx(8 / 3)
    assert any("ITL is the gap between events" in note for note in result["notes"])
    # three events 10 ms apart, eight tokens: gaps of 10 ms, but 20 ms / 7 a token
    assert result["median_itl_ms"] == pytest.approx(10, abs=5)
    assert result["median_tpot_ms"] == pytest.approx(20 / 7, abs=1.5)


def test_without_usage_tokens_are_counted_from_the_text_and_a_note_says_so() -> None:
    with fake_server(usage=False) as server:
        result, records = run(server)
    assert result["total_output_tokens"] == sum(len(TOKENIZER.encode(record.text, False)) for record in records)
    assert any("counted from the text" in note for note in result["notes"])


def test_at_most_max_concurrency_requests_are_under_way() -> None:
    with fake_server(gap=0.01) as server:
        result, records = run(server, num_prompts=9, max_concurrency=3)
    assert server.peak_streams == result["max_concurrent_requests"] == 3
    assert sum(record.queue_time > 0.05 for record in records) == 6  # the others waited inside the client


def test_requests_are_sent_when_the_schedule_says() -> None:
    with fake_server() as server:
        result, records = run(server, num_prompts=6, request_rate=50.0)
    assert max(record.queue_time for record in records) < 0.05
    assert records[-1].timeline.arrival - records[0].timeline.arrival == pytest.approx(5 / 50, abs=0.03)
    assert result["request_rate"] == 50.0


def test_what_is_asked_of_each_request_reaches_the_server() -> None:
    with fake_server() as server:
        run(server, temperature=0.5, top_k=3, logprobs=2, extra_body={"user": "u"}, header=("x-test=1",))
    body = server.bodies[-1]
    assert body["temperature"] == 0.5 and body["top_k"] == 3 and body["logprobs"] == 2 and body["user"] == "u"
    assert body["max_tokens"] == 8 and body["ignore_eos"] is True and body["model"] == "fake"
    assert server.headers[-1]["x-test"] == "1" and server.headers[-1]["x-request-id"].startswith("bench-")


# --- what goes wrong ------------------------------------------------------------------------------------------


def test_failed_requests_are_reported_and_the_others_measured() -> None:
    with fake_server(fail_every=3) as server:
        result, _ = run(server, num_prompts=8)
    assert (result["completed"], result["failed"]) == (5, 3)
    assert result["failures"] == [{"error": "HTTP 503: too many requests queued", "count": 3}]


def test_a_server_that_refuses_the_first_request_ends_the_run_with_its_words() -> None:
    with fake_server(api_key="right") as server, pytest.raises(RequestError, match="401: Incorrect API key"):
        run(server)


@pytest.mark.parametrize(
    ("fault", "error"), [("break_after", "closed the connection"), ("error_after", "the engine stopped")]
)
def test_a_stream_that_breaks_is_a_failure(fault: str, error: str) -> None:
    with fake_server(**{fault: 2}, faults_from=3) as server:
        result, records = run(server)
    assert (result["completed"], result["failed"]) == (2, 2)
    assert all(error in failure["error"] for failure in result["failures"])
    assert sorted(record.text for record in records)[:2] == ["tok0 tok1 "] * 2  # what came is kept


def test_no_server_is_one_clear_line() -> None:
    with pytest.raises(ConfigError, match=r"not ready: cannot connect to 127\.0\.0\.1:9"):
        run_serve(ServeOptions(base_url="http://127.0.0.1:9", **SMALL))


def test_an_unknown_tokenizer_is_named() -> None:
    with (
        fake_server(root="/nonexistent/model") as server,
        pytest.raises(ConfigError, match="give one with --tokenizer"),
    ):
        run(server)


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"backend": "tgi"}, "backend"),
        ({"burstiness": 0.5}, "burstiness"),
        ({"request_rate": 0.0}, "request_rate"),
        ({"ramp_up_strategy": "linear"}, "ramp_up_strategy"),
        ({"dataset_name": "custom"}, "dataset_path"),
        ({"dataset_path": "x"}, "dataset_path"),
        ({"sharegpt_output_len": 3}, "sharegpt_output_len"),
        ({"input_len": 3, "random_input_len": 4}, "input_len"),
        ({"goodput": ("ttft:fast",)}, "goodput"),
        ({"goodput": ("itl:3",)}, "goodput"),
        ({"percentile_metrics": "ttft,latency"}, "percentile_metrics"),
        ({"metric_percentiles": "101"}, "metric_percentiles"),
        ({"header": ("novalue",)}, "header"),
        ({"backend": "anthropic", "ignore_eos": True}, "ignore_eos"),
        ({"backend": "openai-chat", "prompt_token_ids": True}, "prompt_token_ids"),
        ({"temperature": -1.0}, "temperature"),
        ({"base_url": "ftp://x"}, "base_url"),
    ],
)
def test_flags_that_make_no_sense_are_refused_by_name(options: dict[str, Any], field: str) -> None:
    with pytest.raises((ConfigError, InvalidParameterError), match=f"^{field}: "):
        Origin.from_url(ServeOptions(**options).url)


# --- prompts --------------------------------------------------------------------------------------------------


def requests_of(**options: Any) -> list[Any]:
    return RequestMaker(ServeOptions(**options), TOKENIZER).requests()[0]


def test_random_texts_are_read_back_as_the_asked_number_of_tokens() -> None:
    made = requests_of(num_prompts=40, random_input_len=50, random_output_len=7)
    lengths = [len(TOKENIZER.encode(request.prompt, False)) for request in made]
    assert [request.prompt_len for request in made] == lengths
    assert all(abs(length - 50) <= 1 for length in lengths) and sum(length == 50 for length in lengths) >= 36
    assert made == requests_of(num_prompts=40, random_input_len=50, random_output_len=7)
    assert made != requests_of(num_prompts=40, random_input_len=50, random_output_len=7, seed=1)


def test_random_texts_share_their_prefix() -> None:
    made = requests_of(num_prompts=5, random_input_len=10, random_output_len=7, random_prefix_len=40)
    start = made[0].prompt[:60]
    assert all(request.prompt.startswith(start) for request in made)


def test_token_ids_are_sent_as_they_are() -> None:
    made = requests_of(num_prompts=3, random_input_len=9, random_output_len=2, prompt_token_ids=True)
    assert all(isinstance(request.prompt, list) and len(request.prompt) == 9 for request in made)


def test_warm_up_prompts_are_not_those_that_are_measured() -> None:
    maker = RequestMaker(ServeOptions(num_warmups=3, **SMALL), TOKENIZER)
    measured, _ = maker.requests()
    warmups = maker.warmups(measured)
    assert len(warmups) == 3 and not {one.prompt for one in warmups} & {one.prompt for one in measured}


def test_a_custom_file_gives_its_prompts(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": f"p{n}", "output_tokens": n + 1}) for n in range(5)))
    made = requests_of(
        dataset_name="custom", dataset_path=str(path), custom_output_len=-1, disable_shuffle=True, num_prompts=3
    )
    assert [(one.prompt, one.output_len) for one in made] == [("p0", 1), ("p1", 2), ("p2", 3)]


@pytest.mark.parametrize("line", ["nonsense", "[1]", '{"text": "x"}', '{"prompt": ""}'])
def test_a_bad_line_of_a_file_is_named(line: str, tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(f'{{"prompt": "fine"}}\n{line}\n')
    with pytest.raises(InvalidParameterError, match="line 2"):
        requests_of(dataset_name="custom", dataset_path=str(path))


def test_sharegpt_conversations_become_prompts(tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "What does a scheduler do?"}, {"from": "gpt", "value": "It plans each step."}]
    path = tmp_path / "sharegpt.json"
    path.write_text(json.dumps([{"conversations": turns}]))
    (made,) = requests_of(dataset_name="sharegpt", dataset_path=str(path))
    assert made.prompt == turns[0]["value"] and made.output_len == len(TOKENIZER.encode(turns[1]["value"]))


def test_a_trace_keeps_times_lengths_and_shared_prefixes(tmp_path: Path) -> None:
    lines = [
        {"timestamp": 2000, "input_length": 20, "output_length": 3, "hash_ids": [1, 2, 3], "block_size": 8},
        {"timestamp": 1000, "input_length": 12, "output_length": 4, "hash_ids": [1, 4], "block_size": 8},
        {"timestamp": 1500, "input_length": 10, "output_length": 0, "hash_ids": [9]},
    ]
    path = tmp_path / "trace.jsonl"
    path.write_text("\n".join(json.dumps(line) for line in lines))
    made = requests_of(
        dataset_name="timed_trace", dataset_path=str(path), timed_trace_speed=2.0,
        prompt_token_ids=True,
    )  # fmt: skip
    assert [one.arrival for one in made] == [0.0, 0.25, 0.5]
    assert [(one.prompt_len, one.output_len) for one in made] == [(12, 4), (10, 1), (20, 3)]
    assert made[0].prompt[:8] == made[2].prompt[:8] and made[0].prompt[8:] != made[2].prompt[8:12]


# --- the wire -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_events_are_the_same_however_the_bytes_are_cut(size: int, newline: str) -> None:
    stream = "data: one\n\n: comment\n\nevent: x\ndata: two\n\ndata:three\ndata: four\n\n".replace(
        "\n", newline
    ).encode()
    got: list[bytes] = []
    splitter = EventSplitter(got.append)
    for start in range(0, len(stream), size):
        splitter.feed(stream[start : start + size])
    assert got == [b"one", b"two", b"three\nfour"]


async def test_a_connection_is_used_again_and_a_closed_one_replaced() -> None:
    accepted = 0

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal accepted
        accepted += 1
        for _ in range(2):  # then it closes an idle connection without a word
            await reader.readuntil(b"\r\n\r\n")
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with server, ConnectionPool(Origin("127.0.0.1", server.sockets[0].getsockname()[1])) as pool:
        for _ in range(4):
            assert (await pool.get("/x")).body == b"ok"
        assert accepted == 2


@pytest.mark.parametrize("answer", [b"", b"nonsense\r\n\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nabc"])
async def test_an_answer_that_is_none_is_an_error(answer: bytes) -> None:
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(answer)
        writer.close()

    server = await asyncio.start_server(handle, "127.0.0.1", 0)
    async with server, ConnectionPool(Origin("127.0.0.1", server.sockets[0].getsockname()[1])) as pool:
        with pytest.raises(ConnectionFailedError):
            await pool.get("/x")


# --- the command ----------------------------------------------------------------------------------------------


def test_the_command_prints_the_report_and_writes_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = "--num-prompts 3 --input-len 5 --output-len 4 --save-result --save-detailed --result-filename r.json"
    with fake_server() as server:
        status = main(["bench", "serve", "--base-url", server.url, "--result-dir", str(tmp_path), *flags.split()])
    assert status == 0 and " Serving Benchmark Result " in capsys.readouterr().out
    result = json.loads((tmp_path / "r.json").read_text())
    assert result["completed"] == 3 and len(result["itls"]) == 3 and result["environment"]["versions"]


def test_the_status_is_1_when_all_requests_failed(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--num-prompts", "2", "--input-len", "5", "--output-len", "4"]
    with fake_server(fail_every=1, faults_from=1) as server:
        assert main(["bench", "serve", "--base-url", server.url, *flags]) == 1
        assert "! failed 2 x: HTTP 503: too many requests queued" in capsys.readouterr().out
        assert main(["bench", "serve", "--base-url", server.url, *flags]) == 2
    assert capsys.readouterr().err.startswith("mini-vllm: error: the server failed the first")


def test_the_client_runs_without_torch_until_the_report() -> None:
    code = "import sys, mini_vllm.bench.serve.runner, mini_vllm.bench.serve.datasets; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
