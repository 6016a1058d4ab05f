"""Claims about `run-batch`: every line has its answer in its place, whatever the others are, and after any kill."""

import asyncio
import contextlib
import http.server
import io
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mini_vllm.entrypoints.batch.lines import BatchLine, count_lines, read_batch
from mini_vllm.entrypoints.batch.output import OrderedOutput, Patch, read_ahead, scan_output
from mini_vllm.entrypoints.batch.runner import WINDOW_FACTOR, Answerer, Result, run_lines
from mini_vllm.entrypoints.cli.main import main
from mini_vllm.entrypoints.cli.run_batch import Job
from mini_vllm.exceptions import ConfigError, EngineDeadError
from tests.entrypoints.echo_batch import Echo, answered
from tests.entrypoints.server.rig import client, serving, state
from tests.entrypoints.terminal import ROOT

LIMIT = 1 << 16


def completion(custom_id: str, **body: Any) -> dict[str, Any]:
    fields = {"model": "tiny", "prompt": f"hello {custom_id}", "max_tokens": 3, "temperature": 0, **body}
    return {"custom_id": custom_id, "method": "POST", "url": "/v1/completions", "body": fields}


def write_lines(path: Path, lines: list[Any]) -> Path:
    path.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines))
    return path


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# --- the input ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "custom_id", "message"),
    [
        ("nonsense", None, "line 2: JSON is malformed"),
        ('{"custom_id": "x"', None, "line 2: "),
        ("[1, 2]", None, "line 2: Expected `object`"),
        ('{"custom_id": "x", "method": "POST", "url": "/v1/completions"}', "x", "missing required field `body`"),
        ('{"method": "POST", "url": "/v1/completions", "body": {}}', None, "missing required field `custom_id`"),
        ('{"custom_id": 7, "method": "POST", "url": "/v1/completions", "body": {}}', None, "Expected `str`"),
        (json.dumps(completion("x") | {"method": "GET"}), "x", "method must be POST"),
        (json.dumps(completion("x") | {"url": "/metrics"}), "x", "url must be one of"),
        (json.dumps(completion("x", stream=True)), "x", "stream: a batch has no streams"),
        (json.dumps(completion("")), "", "custom_id must have"),
        (json.dumps(completion("first")), "first", "custom_id 'first' was used on line 1 already"),
        (json.dumps(completion("x", prompt="y" * LIMIT)), None, f"line 2: has more than {LIMIT} bytes"),
    ],
)
def test_a_line_that_cannot_be_run_says_why_and_ends_nothing(
    line: str, custom_id: str | None, message: str, tmp_path: Path
) -> None:
    path = write_lines(tmp_path / "in.jsonl", [completion("first"), line, completion("last")])
    first, middle, last = read_batch(path, LIMIT)
    assert (first.custom_id, last.custom_id, last.position, last.number) == ("first", "last", 2, 3)
    assert first.problem is None and last.problem is None
    assert middle.problem is not None and message in middle.problem.message
    assert middle.custom_id == custom_id


def test_blank_lines_and_the_mark_of_utf8_are_skipped_and_bodies_passed_on_as_they_are(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    body = '{"temperature": 1e-3, "model":"tiny", "prompt": "\\u00e9"}'
    text = f'\n{{"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {body}}}\r\n\n'
    path.write_bytes(b"\xef\xbb\xbf" + text.lstrip().encode() + text.replace('"a"', '"b"').encode())
    lines = list(read_batch(path, LIMIT))
    assert [(line.position, line.custom_id, line.body.decode()) for line in lines] == [(0, "a", body), (1, "b", body)]
    assert count_lines(path) == 2


# --- the output -----------------------------------------------------------------------------------------------


def test_lines_come_out_in_order_and_what_waits_is_on_disk(tmp_path: Path) -> None:
    ahead, written = tmp_path / "out.ahead", []
    output = OrderedOutput(written.append, ahead=ahead)
    for position in (2, 1):
        output.add(position, answered(str(position)))
    assert not written and sorted(read_ahead(ahead)) == [1, 2]
    output.add(0, answered("0"))
    assert written == [answered("0"), answered("1"), answered("2")] and not read_ahead(ahead)
    output.close()
    assert not ahead.exists()


def test_the_file_of_waiting_lines_survives_a_torn_line(tmp_path: Path) -> None:
    ahead = tmp_path / "out.ahead"
    ahead.write_bytes(b"5 " + answered("5") + b"\n7 " + answered("7")[:20])
    assert read_ahead(ahead) == {5: answered("5")}


def test_an_output_is_scanned_up_to_where_it_was_torn(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    whole = answered("a") + b"\n" + answered("b", 503) + b"\n"
    path.write_bytes(whole + answered("c")[:30])
    earlier = scan_output(path, iter(["a", "b", "c"]))
    assert (earlier.num_lines, earlier.num_bytes, earlier.failed) == (2, len(whole), [1])


@pytest.mark.parametrize("ids", [["a", "x"], ["a"]])
def test_an_output_of_another_input_is_refused(ids: list[str], tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    path.write_bytes(answered("a") + b"\n" + answered("b") + b"\n")
    with pytest.raises(ConfigError, match="belongs to another input"):
        scan_output(path, iter(ids))


def test_a_patch_replaces_its_lines_and_leaves_the_file_alone_until_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    path.write_bytes(b"0\n1\n2\n3\n")
    patch = Patch(path, [1, 2])
    patch.write(b"one")
    assert path.read_bytes() == b"0\n1\n2\n3\n"
    patch.write(b"two")
    patch.finish()
    assert path.read_bytes() == b"0\none\ntwo\n3\n"


# --- the runner -----------------------------------------------------------------------------------------------


async def test_concurrency_and_the_window_are_bounded_and_order_is_kept() -> None:
    """The first line takes until all others that may run are done; the input is never read further than the window."""
    running = peak = read = 0
    first_may_end = asyncio.Event()
    written: list[bytes] = []

    def lines() -> Iterator[tuple[int, BatchLine]]:
        nonlocal read
        for position in range(200):
            read += 1
            yield position, BatchLine(position, position + 1)

    async def answer(line: BatchLine) -> Result:
        nonlocal running, peak
        running += 1
        peak = max(peak, running)
        if line.position == 0:
            await first_may_end.wait()
        else:
            await asyncio.sleep(random.Random(line.position).random() / 500)
        running -= 1
        return Result(b"%d" % line.position, True)

    task = asyncio.create_task(run_lines(lines(), answer, OrderedOutput(written.append), concurrency=4))
    await asyncio.sleep(0.2)
    assert not written and read <= 4 * WINDOW_FACTOR + 1
    first_may_end.set()
    await task
    assert written == [b"%d" % position for position in range(200)] and peak == 4


async def test_a_dead_engine_ends_the_job_and_what_was_answered_stays() -> None:
    written: list[bytes] = []

    async def answer(line: BatchLine) -> Result:
        if line.position == 3:
            raise EngineDeadError("the engine died")
        return Result(b"%d" % line.position, True)

    lines = ((position, BatchLine(position, position + 1)) for position in range(100))
    with pytest.raises(EngineDeadError, match="the engine died"):
        await run_lines(lines, answer, OrderedOutput(written.append), concurrency=1)
    assert written == [b"0", b"1", b"2"]


async def test_answers_are_those_of_the_server(tmp_path: Path) -> None:
    """Two hundred lines of all kinds: each answer is the server's own, in the place of its line."""
    lines = _two_hundred_lines()
    path = write_lines(tmp_path / "in.jsonl", lines)
    written: list[bytes] = []
    async with serving(max_num_seqs=8) as app, client(app) as http:
        answerer = Answerer(app, state(app).engine)
        source = ((line.position, line) for line in read_batch(path, LIMIT))
        await run_lines(source, answerer.answer, OrderedOutput(written.append), concurrency=8)
        await answerer.aclose()
        got = [json.loads(line) for line in written]
        direct = await http.post("/v1/completions", json=lines[0]["body"])
    assert len(got) == 200
    for index, (line, answer) in enumerate(zip(lines, got, strict=True)):
        is_fine = isinstance(line, dict) and line["body"].get("temperature") == 0 and line["custom_id"] == f"r{index}"
        assert answer["custom_id"] == (line["custom_id"] if isinstance(line, dict) else None)
        assert (answer["error"] is None) == is_fine and set(answer) == {"id", "custom_id", "response", "error"}
        assert answer["response"]["status_code"] == (200 if is_fine else 400)
        assert (answer["response"]["body"] is not None) == is_fine
    assert got[0]["response"]["body"]["choices"] == direct.json()["choices"]
    assert got[3]["error"]["param"] == "temperature"


def _two_hundred_lines() -> list[Any]:
    """Every seventh is no JSON, every eleventh has a field out of range, every thirteenth a custom_id used before."""
    lines: list[Any] = []
    for index in range(200):
        line = completion(f"r{index}", max_tokens=1 + index % 4)
        if index % 7 == 5:
            line = "{broken"  # type: ignore[assignment]
        elif index % 11 == 3:
            line["body"]["temperature"] = -1
        elif index % 13 == 9:
            line["custom_id"] = "r0"
        lines.append(line)
    return lines


@pytest.mark.parametrize(
    ("url", "body"),
    [
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 2}),
        ("/v1/responses", {"input": "hello", "max_output_tokens": 2}),
        ("/v1/messages", {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 2}),
    ],
)
async def test_every_api_can_be_asked(url: str, body: dict[str, Any]) -> None:
    line = BatchLine(0, 1, "a", url, json.dumps({"model": "tiny", **body}).encode())
    wrong = BatchLine(1, 2, "b", url, json.dumps({"model": "other", **body}).encode())
    async with serving() as app:
        answerer = Answerer(app, state(app).engine)
        fine, failed = await answerer.answer(line), await answerer.answer(wrong)
        await answerer.aclose()
    assert fine.succeeded and json.loads(fine.line)["response"]["body"]["model"] == "tiny"
    answer = json.loads(failed.line)
    assert not failed.succeeded and answer["response"]["status_code"] == 404 and answer["error"]["message"]


# --- the command ----------------------------------------------------------------------------------------------

ENGINE = ["--num-gpu-blocks-override", "200", "--served-model-name", "tiny", "--num-threads", "1"]


def command(*args: str) -> list[str]:
    return [sys.executable, "-m", "mini_vllm", "run-batch", *args, *ENGINE]


def run(*args: str) -> "subprocess.CompletedProcess[bytes]":
    environment = os.environ | {"OMP_NUM_THREADS": "1", "VLLM_API_KEY": "not for us"}
    return subprocess.run(command(*args), capture_output=True, timeout=90, cwd=ROOT, check=False, env=environment)


@pytest.mark.slow
def test_a_job_that_was_killed_goes_on_where_it_was(tmp_path: Path) -> None:
    """kill -9 in the middle, and a line torn by hand; after --resume all are there, and finished ones untouched."""
    lines = [completion(f"r{index}", max_tokens=24, ignore_eos=True) for index in range(30)]
    lines[4]["body"]["temperature"] = -1  # fails each time
    source, target = write_lines(tmp_path / "in.jsonl", lines), tmp_path / "out.jsonl"
    process = subprocess.Popen(
        command("-i", str(source), "-o", str(target), "--max-num-seqs", "4"), cwd=ROOT, stderr=subprocess.PIPE,
        start_new_session=True,
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while not (target.exists() and target.read_bytes().count(b"\n") > 6):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    before = target.read_bytes().splitlines(keepends=True)
    kept = [line for line in before if line.endswith(b"\n")]
    assert 6 < len(kept) < 30
    target.write_bytes(b"".join(kept[:-1]) + kept[-1][:40])

    done = run("-i", str(source), "-o", str(target), "--resume", "--max-num-seqs", "4")
    assert done.returncode == 0, done.stderr
    assert b"29 succeeded, 1 failed" in done.stderr
    assert [line["custom_id"] for line in read_lines(target)] == [f"r{index}" for index in range(30)]
    after = target.read_bytes().splitlines(keepends=True)
    same = [index for index in range(len(kept) - 1) if index != 4]
    assert [after[index] for index in same] == [kept[index] for index in same]
    assert not list(tmp_path.glob("out.jsonl.*"))


@pytest.fixture
def echo(monkeypatch: pytest.MonkeyPatch) -> Echo:
    """In place of the engine and the application."""
    made = Echo("unlucky")
    monkeypatch.setattr(Job, "_answerer", lambda job: made.in_place_of_the_engine(job))
    return made


@pytest.mark.parametrize("tear", [0, 40])
def test_a_kill_loses_no_line_that_was_finished(tear: int, tmp_path: Path, echo: Echo) -> None:
    """Killed at some moment, and the last line torn by hand: what was there is kept as it was, the rest is asked."""
    source = write_lines(tmp_path / "in.jsonl", [completion(f"r{index}") for index in range(400)])
    target, ahead = tmp_path / "out.jsonl", tmp_path / "out.jsonl.ahead"
    command = [sys.executable, "-m", "tests.entrypoints.echo_batch", str(source), str(target), "0.1"]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not (target.exists() and target.read_bytes().count(b"\n") > 20):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    process.kill()
    process.wait()
    left = target.read_bytes()[: -tear or None]
    target.write_bytes(left)
    kept, waiting = left[: left.rfind(b"\n") + 1], read_ahead(ahead)
    assert main(["run-batch", "-i", str(source), "-o", str(target), "--resume"]) == 0
    assert [line["custom_id"] for line in read_lines(target)] == [f"r{index}" for index in range(400)]
    assert target.read_bytes().startswith(kept) and not ahead.exists()
    known = {f"r{index}" for index in [*range(kept.count(b"\n")), *waiting]}
    assert not known & set(echo.asked) and len(echo.asked) == 400 - len(known)


def test_resume_runs_failed_lines_again_and_a_finished_job_not_at_all(tmp_path: Path, echo: Echo) -> None:
    source = write_lines(tmp_path / "in.jsonl", [completion(name) for name in "abcd"])
    target, ahead = tmp_path / "out.jsonl", tmp_path / "out.jsonl.ahead"
    target.write_bytes(answered("a") + b"\n" + answered("b", 503) + b"\n")
    ahead.write_bytes(b"3 " + answered("d") + b"\n")
    assert main(["run-batch", "-i", str(source), "-o", str(target), "--resume"]) == 0
    assert echo.asked == ["c", "b"]
    lines = read_lines(target)
    assert [line["custom_id"] for line in lines] == ["a", "b", "c", "d"]
    assert all(line["error"] is None for line in lines) and not ahead.exists()
    assert main(["run-batch", "-i", str(source), "-o", str(target), "--resume"]) == 0
    assert echo.asked == ["c", "b"]  # nothing was left to ask
    assert main(["run-batch", "-i", str(source), "-o", str(target)]) == 2  # nor is an output replaced unasked


def test_the_status_is_1_only_when_all_failed(tmp_path: Path, echo: Echo, capsys: pytest.CaptureFixture[str]) -> None:
    target = str(tmp_path / "out.jsonl")
    source = str(write_lines(tmp_path / "in.jsonl", ["broken", completion("unlucky")]))
    assert main(["run-batch", "-i", source, "-o", target]) == 1
    assert main(["run-batch", "-i", source, "-o", target, "--resume"]) == 1
    source = str(write_lines(tmp_path / "in.jsonl", [completion("fine"), completion("unlucky")]))
    assert main(["run-batch", "-i", source, "-o", target, "--resume"]) == 2  # the output of another input
    assert main(["run-batch", "-i", source, "-o", target, "--overwrite"]) == 0
    assert "1 succeeded, 1 failed" in capsys.readouterr().err
    assert [line["custom_id"] for line in read_lines(Path(target))] == ["fine", "unlucky"]


def test_pipes_and_urls_do_for_files(
    echo: Echo, monkeypatch: pytest.MonkeyPatch, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(json.dumps(completion("piped")).encode())))
    assert main(["run-batch", "-i", "-", "-o", "-"]) == 0
    assert json.loads(capfdbinary.readouterr().out)["custom_id"] == "piped"
    with file_server(json.dumps(completion("fetched")).encode()) as (url, put):
        assert main(["run-batch", "-i", f"{url}/in", "-o", f"{url}/out"]) == 0
    assert json.loads(put[0])["custom_id"] == "fetched"
    assert main(["run-batch", "-i", f"{url}/in", "-o", "-"]) == 2
    assert b"input_file: cannot fetch" in capfdbinary.readouterr().err


@contextlib.contextmanager
def file_server(content: bytes) -> Iterator[tuple[str, list[bytes]]]:
    """(its URL, what was PUT to it); a GET gives `content`."""
    put: list[bytes] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(content)

        def do_PUT(self) -> None:
            put.append(self.rfile.read(int(self.headers["content-length"])))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *args: Any) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", put
        finally:
            server.shutdown()
            thread.join()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["-i", "nowhere.jsonl", "-o", "-"], "input_file: "),
        (["-i", "-", "-o", "nowhere/out.jsonl"], "output_file: "),
        (["-i", "-", "-o", "-", "--resume"], "resume: "),
    ],
)
def test_files_that_cannot_be_are_refused_before_a_model_is_loaded(
    flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run-batch", *flags]) == 2
    assert capsys.readouterr().err.startswith(f"mini-vllm: error: {message}")
