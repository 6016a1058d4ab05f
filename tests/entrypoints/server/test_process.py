"""`mini-vllm serve` as a process: how it starts, how it ends, and what its clients see of both."""

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import ssl
import stat
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from tests.entrypoints.server.rig import RunningServer, free_port, running_server, started_server, wait_healthy

LONG = {"prompt": "def f(", "max_tokens": 1000, "ignore_eos": True, "temperature": 0, "stream": True}
SHORT = {"prompt": "def f(", "max_tokens": 4, "temperature": 0}


pytestmark = pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="looks at processes through /proc")


def engine_pid(server: RunningServer) -> int:
    return int(re.findall(r"EngineCore pid=(\d+)", server.output())[-1])


def is_alive(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def wait_until(condition: Any, seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come true in time"
        time.sleep(0.02)


class Reader(threading.Thread):
    """Reads a stream to its end, or until it breaks."""

    def __init__(self, url: str, body: dict[str, Any]) -> None:
        super().__init__(daemon=True)
        self.url, self.body = url, body
        self.frames: list[str] = []
        self.began = threading.Event()
        self.broken: Exception | None = None

    def __enter__(self) -> "Reader":
        self.start()
        assert self.began.wait(30)
        return self

    def __exit__(self, *error: object) -> None:
        self.join(60)

    def run(self) -> None:
        try:
            with httpx2.stream("POST", f"{self.url}/v1/completions", json=self.body, timeout=60) as response:
                assert response.status_code == 200, response.read()
                for line in response.iter_lines():
                    if line.startswith("data: "):
                        self.frames.append(line[6:])
                        self.began.set()
        except Exception as error:
            self.broken = error
        finally:
            self.began.set()

    @property
    def finish_reason(self) -> str | None:
        chunks = [json.loads(frame) for frame in self.frames if frame != "[DONE]"]
        reasons = [choice["finish_reason"] for chunk in chunks for choice in chunk.get("choices", ())]
        return next((reason for reason in reasons if reason), None)


# -- how it starts -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["/nonexistent/model"], "nonexistent"),
        pytest.param(["--kv-cache-memory-bytes", "1k"], "KV cache", marks=pytest.mark.slow),
        (["--host", "no.such.host.invalid"], "host: cannot listen"),
        (["--otlp-traces-endpoint", "nonsense"], "otlp_traces_endpoint"),
    ],
)
def test_what_keeps_it_from_starting_is_one_line_and_status_2(argv: list[str], says: str) -> None:
    with started_server(*argv) as server:
        assert server.process.wait(60) == 2
        *_, last = server.output().splitlines()
        assert last.startswith("mini-vllm: error: ") and says in last
        assert "Traceback" not in server.output()


def test_a_port_in_use_is_told_before_anything_is_loaded() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with started_server("--port", str(port)) as server:
            assert server.process.wait(30) == 2
            assert f"port: cannot listen on 127.0.0.1:{port}: Address already in use" in server.output()
            assert "EngineCore" not in server.output()


def test_it_says_503_until_it_is_warm_then_serves_and_drains_and_ends_with_0(tmp_path: Path) -> None:
    trace = tmp_path / "trace.jsonl"
    with started_server("--record-trace", str(trace)) as server, httpx2.Client(timeout=10) as http:
        assert statuses_until_ready(server, http) == {503, 200}
        answer = http.post(f"{server.url}/v1/completions", json=SHORT)
        assert answer.status_code == 200 and answer.json()["usage"]["completion_tokens"] == 4
        metrics = http.get(f"{server.url}/metrics").text
        assert 'vllm:generation_tokens_total{engine="0",model_name="stdlib-llama-3.7m"} ' in metrics
        assert "libtorch" not in Path(f"/proc/{server.process.pid}/maps").read_text()  # the engine alone needs it
        with Reader(server.url, LONG | {"max_tokens": 300}) as reader:
            server.process.send_signal(signal.SIGTERM)
            wait_until(lambda: http.get(f"{server.url}/health").status_code == 503)
            refuses_new_requests(server, http)
        assert reader.broken is None and reader.finish_reason == "length"
        assert reader.frames[-1] == "[DONE]"
        assert server.process.wait(20) == 0
        assert "curl" in server.output() and server.url in server.output()
        assert [json.loads(line)["output_length"] for line in trace.read_text().splitlines()] == [4, 300]
        wait_until(lambda: not is_alive(engine_pid(server)))


def statuses_until_ready(server: RunningServer, http: httpx2.Client) -> set[int]:
    seen: set[int] = set()
    deadline = time.monotonic() + 90
    while 200 not in seen and time.monotonic() < deadline:
        with contextlib.suppress(httpx2.TransportError):
            seen.add(http.get(f"{server.url}/health").status_code)
            if seen == {503}:
                early = http.post(f"{server.url}/v1/messages", json={})
                assert early.status_code in (400, 529) and early.json()["type"] == "error"
        time.sleep(0.05)
    return seen


def refuses_new_requests(server: RunningServer, http: httpx2.Client) -> None:
    late = http.post(f"{server.url}/v1/completions", json=SHORT)
    assert late.status_code == 503 and late.headers["retry-after"]
    message = {"model": "stdlib-llama-3.7m", "max_tokens": 4, "messages": [{"role": "user", "content": "hi"}]}
    anthropic = http.post(f"{server.url}/v1/messages", json=message)
    assert (anthropic.status_code, anthropic.json()["error"]["type"]) == (529, "overloaded_error")
    assert anthropic.headers["retry-after"]


@pytest.mark.slow
def test_what_is_no_http_is_answered_in_the_same_shape() -> None:
    with running_server() as server:
        bad = raw(server.url, b"NONSENSE\r\n\r\n")
        assert b"400 Bad Request" in bad and b'"type":"invalid_request_error"' in bad
        huge = raw(server.url, b"GET /health HTTP/1.1\r\nhost: a\r\nx: " + b"x" * 70_000 + b"\r\n\r\n")
        assert b"431 Request Header Fields Too Large" in huge and b"--max-header-bytes" in huge
        endless = raw(server.url, b"GET /health HTTP/1.1\r\n" + b"x: y\r\n" * 100_000)
        assert b"431" in endless or endless == b""
        assert httpx2.get(f"{server.url}/health").status_code == 200


def raw(url: str, data: bytes) -> bytes:
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as sock:
        received = b""
        with contextlib.suppress(OSError):
            sock.sendall(data)
            while piece := sock.recv(65536):
                received += piece
        return received


# -- how it ends ---------------------------------------------------------------------------------------------


def test_the_death_of_the_engine_is_told_to_everybody_and_ends_the_server() -> None:
    with running_server() as server:
        with Reader(server.url, LONG) as reader:
            os.kill(engine_pid(server), signal.SIGKILL)
            died = time.monotonic()
            with httpx2.Client(timeout=10) as http, contextlib.suppress(httpx2.TransportError):
                wait_until(lambda: http.get(f"{server.url}/health").status_code == 503, 5)
                late = http.post(f"{server.url}/v1/completions", json=SHORT)
                assert late.status_code >= 500 and late.json()["error"]["code"]
        assert reader.broken is None
        assert json.loads(reader.frames[-2])["error"]["code"] == "engine_dead"
        assert reader.frames[-1] == "[DONE]"
        assert server.process.wait(15) == 1
        assert time.monotonic() - died < 15


@pytest.mark.slow
def test_what_does_not_finish_in_time_is_aborted_and_its_stream_still_ends_well() -> None:
    with running_server("--shutdown-timeout", "0.5") as server:
        with Reader(server.url, LONG) as reader:
            assert server.stop() == 0
        assert reader.broken is None
        assert reader.finish_reason == "abort" and reader.frames[-1] == "[DONE]"


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_ends_it_at_once(number: int) -> None:
    with running_server() as server, Reader(server.url, LONG | {"max_tokens": 1010}):
        server.process.send_signal(number)
        wait_until(lambda: "a second signal ends them" in server.output())
        start = time.monotonic()
        assert server.stop(number) == 128 + number
        assert time.monotonic() - start < 3
        wait_until(lambda: not is_alive(engine_pid(server)), 5)


@pytest.mark.slow
def test_control_c_reaches_the_engine_too_and_requests_still_finish() -> None:
    with running_server() as server:
        with Reader(server.url, LONG | {"max_tokens": 300}) as reader:
            os.killpg(server.process.pid, signal.SIGINT)  # as a terminal does
        assert reader.broken is None and reader.finish_reason == "length"
        assert server.process.wait(20) == 0


@pytest.mark.slow
def test_an_engine_that_hangs_is_taken_for_dead() -> None:
    with running_server("--watchdog-timeout", "2") as server:
        with Reader(server.url, LONG) as reader:
            os.kill(engine_pid(server), signal.SIGSTOP)
        assert json.loads(reader.frames[-2])["error"]["code"] == "engine_dead"
        assert server.process.wait(20) == 1
        assert not is_alive(engine_pid(server))


@pytest.mark.slow
def test_a_signal_while_the_model_loads_ends_it() -> None:
    with started_server() as server:
        wait_until(lambda: "Started server process" in server.output())
        assert server.stop() == 128 + signal.SIGTERM
        assert "Traceback" not in server.output()


@pytest.mark.slow
def test_kill_minus_9_of_the_server_takes_its_engine_along() -> None:
    with running_server() as server:
        pid = engine_pid(server)
        server.stop(signal.SIGKILL)
        wait_until(lambda: not is_alive(pid), 10)


@pytest.mark.slow
def test_a_dead_engine_is_started_again_when_asked_for() -> None:
    with running_server("--restart-engine") as server, httpx2.Client(timeout=10) as http:
        first = engine_pid(server)
        with Reader(server.url, LONG) as reader:
            os.kill(first, signal.SIGKILL)
        assert json.loads(reader.frames[-2])["error"]["code"] == "engine_dead"
        wait_until(lambda: http.get(f"{server.url}/health").status_code == 503, 5)
        meanwhile = http.post(f"{server.url}/v1/completions", json=SHORT)
        assert meanwhile.status_code == 503 and meanwhile.headers["retry-after"]
        wait_healthy(server)
        assert http.post(f"{server.url}/v1/completions", json=SHORT).status_code == 200
        assert engine_pid(server) != first
        assert server.stop() == 0


@pytest.mark.slow
def test_clients_that_leave_free_what_they_held() -> None:
    with running_server() as server, httpx2.Client(timeout=30) as http:

        def running() -> float:
            text = http.get(f"{server.url}/metrics").text
            return float(re.search(r"^vllm:num_requests_running\{.*\} (.*)$", text, re.M)[1])  # type: ignore[index]

        def leave(stream: bool) -> None:
            with contextlib.suppress(httpx2.TimeoutException):
                url = f"{server.url}/v1/completions"
                httpx2.post(url, json=LONG | {"stream": stream}, timeout=httpx2.Timeout(5, read=0.3))

        for stream in (True, False):
            thread = threading.Thread(target=leave, args=(stream,))
            thread.start()
            if not stream:
                wait_until(lambda: running() == 1)
            thread.join()
            wait_until(lambda: running() == 0, 3)
        assert http.get(f"{server.url}/load").json() == {"server_load": 0}


# -- where it listens ----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_unix_socket_is_for_this_user_alone_and_goes_with_the_server(tmp_path: Path) -> None:
    path = tmp_path / "server.sock"
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(path))  # what a server that was killed leaves behind
    with started_server("--uds", str(path), url="http://localhost") as server:
        wait_until(lambda: "Started server process" in server.output())
        wait_healthy(server, transport=httpx2.HTTPTransport(uds=str(path)))
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        with started_server("--uds", str(path)) as second:
            assert second.process.wait(30) == 2
            assert "another server listens" in second.output()
        assert path.exists()
        assert server.stop() == 0
        assert not path.exists()


def test_a_file_that_is_no_socket_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "precious"
    path.write_text("data")
    with started_server("--uds", str(path)) as server:
        assert server.process.wait(30) == 2
        assert "exists and is no socket" in server.output()
    assert path.read_text() == "data"


@pytest.fixture
def certificate(tmp_path: Path) -> Iterator[tuple[str, str]]:
    """Of localhost, signed by itself."""
    if shutil.which("openssl") is None:
        pytest.skip("there is no openssl")
    key, cert = str(tmp_path / "key.pem"), str(tmp_path / "cert.pem")
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", key, "-out", cert, "-days", "2",
         "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"],
        check=True, capture_output=True,
    )  # fmt: skip
    yield key, cert


@pytest.mark.slow
def test_tls_is_served_and_client_certificates_are_asked_for(certificate: tuple[str, str]) -> None:
    key, cert = certificate
    port = free_port()
    trusting = ssl.create_default_context(cafile=cert)
    known = ssl.create_default_context(cafile=cert)
    known.load_cert_chain(cert, key)
    argv = ("--ssl-keyfile", key, "--ssl-certfile", cert, "--ssl-ca-certs", cert, "--ssl-cert-reqs", "2")
    with running_server(*argv, "--port", str(port), url=f"https://localhost:{port}", verify=known) as server:
        assert httpx2.get(f"{server.url}/version", verify=known).status_code == 200
        with pytest.raises(httpx2.TransportError):
            httpx2.get(f"{server.url}/version", verify=trusting)
        with pytest.raises(httpx2.TransportError):
            httpx2.get(f"http://localhost:{port}/version")
        assert "https://127.0.0.1" in server.output()
