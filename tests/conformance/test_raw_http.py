"""HTTP/1.1 as it comes over a socket: pipelined, kept alive, cut off, malformed, hostile."""

import contextlib
import json
import socket
import time
from typing import Any

import httpx2
import pytest

from tests.entrypoints.server.rig import RunningServer

BODY = json.dumps({"model": "tiny", "prompt": "hi", "max_tokens": 2, "temperature": 0}).encode()


def connect(server: RunningServer) -> socket.socket:
    host, port = server.url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=20)


def post(body: bytes = BODY, *headers: bytes, path: bytes = b"/v1/completions") -> bytes:
    """A request as bytes; its length is given unless a header speaks of a transfer encoding."""
    lines = [b"POST " + path + b" HTTP/1.1", b"host: test", b"content-type: application/json", *headers]
    if not any(header.lower().startswith(b"transfer-encoding") for header in headers):
        lines.append(b"content-length: %d" % len(body))
    return b"\r\n".join(lines) + b"\r\n\r\n" + body


def answers(sock: socket.socket, number: int) -> list[tuple[int, dict[str, str], bytes]]:
    """So many responses, read one after another from one connection."""
    found, file = [], sock.makefile("rb")
    for _ in range(number):
        status = int(file.readline().split()[1])
        headers = {}
        while line := file.readline().strip():
            name, _, value = line.decode("latin-1").partition(":")
            headers[name.lower()] = value.strip()
        if headers.get("transfer-encoding") == "chunked":
            body = b""
            while size := int(file.readline(), 16):
                body += file.read(size)
                file.readline()
            file.readline()
        else:
            body = file.read(int(headers.get("content-length", 0)))
        found.append((status, headers, body))
    return found


def exchange(server: RunningServer, data: bytes, *, half_close: bool = False) -> bytes:
    """Send this and read until the server closes, or has been silent for a while."""
    received = b""
    with connect(server) as sock, contextlib.suppress(OSError):
        sock.sendall(data)
        if half_close:
            sock.shutdown(socket.SHUT_WR)
        sock.settimeout(2)
        while piece := sock.recv(65536):
            received += piece
    return received


@pytest.fixture(autouse=True)
def still_serving(server: RunningServer) -> Any:
    """After each test the server answers, nothing runs, and its log has no traceback."""
    length = len(server.output())
    yield
    deadline = time.monotonic() + 10
    with httpx2.Client(timeout=20, base_url=server.url) as http:
        assert (
            http.post("/v1/completions", content=BODY, headers={"content-type": "application/json"}).status_code == 200
        )
        while http.get("/load").json() != {"server_load": 0} and time.monotonic() < deadline:
            time.sleep(0.02)
        assert http.get("/load").json() == {"server_load": 0}
        assert 'num_requests_running{engine="0",model_name="tiny"} 0.0' in http.get("/metrics").text
    assert "Traceback" not in server.output()[length:]


def test_pipelined_requests_are_answered_in_their_order(server: RunningServer) -> None:
    streamed = json.dumps({"model": "tiny", "prompt": "hi", "max_tokens": 3, "stream": True}).encode()
    with connect(server) as sock:
        sock.sendall(post() + post(streamed) + b"GET /version HTTP/1.1\r\nhost: test\r\n\r\n" + post(b"[]") + post())
        first, stream, version, wrong, last = answers(sock, 5)
    assert json.loads(first[2])["object"] == json.loads(last[2])["object"] == "text_completion"
    assert stream[1]["content-type"].startswith("text/event-stream") and stream[2].endswith(b"data: [DONE]\n\n")
    assert "version" in json.loads(version[2]) and wrong[0] == 400
    ids = [answer[1]["x-request-id"] for answer in (first, stream, version, wrong, last)]
    assert len(set(ids)) == 5


def test_a_connection_outlives_errors_and_streams(server: RunningServer) -> None:
    streamed = json.dumps({"model": "tiny", "prompt": "hi", "max_tokens": 3, "stream": True}).encode()
    with connect(server) as sock:
        for body, status in (
            (BODY, 200),
            (b"{", 400),
            (streamed, 200),
            (b'{"model":"no","prompt":"a"}', 404),
            (BODY, 200),
        ):
            sock.sendall(post(body))
            assert [answer[0] for answer in answers(sock, 1)] == [status]


def test_a_pipelined_client_that_leaves_is_forgotten(server: RunningServer) -> None:
    long = json.dumps({"model": "tiny", "prompt": "hi", "max_tokens": 190, "ignore_eos": True, "stream": True}).encode()
    with connect(server) as sock:
        sock.sendall(post(long) * 5)
        sock.recv(100)


def test_a_chunked_body_is_taken_whole(server: RunningServer) -> None:
    chunks = b"".join(b"%x\r\n%b\r\n" % (1, BODY[i : i + 1]) for i in range(len(BODY))) + b"0\r\n\r\n"
    with connect(server) as sock:
        sock.sendall(post(chunks, b"transfer-encoding: chunked") + post())
        assert [answer[0] for answer in answers(sock, 2)] == [200, 200]


def test_a_client_may_wait_to_be_told_to_go_on(server: RunningServer) -> None:
    head, _, body = post(BODY, b"expect: 100-continue").partition(b"\r\n\r\n")
    with connect(server) as sock:
        sock.sendall(head + b"\r\n\r\n")
        assert sock.recv(1000).startswith(b"HTTP/1.1 100")
        sock.sendall(body)
        assert answers(sock, 1)[0][0] == 200


def test_head_requests_have_no_body(server: RunningServer) -> None:
    with connect(server) as sock:
        sock.sendall(b"HEAD /health HTTP/1.1\r\nhost: a\r\n\r\nHEAD /v1/models HTTP/1.1\r\nhost: a\r\n\r\n")
        sock.sendall(b"GET /version HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n")
        data = b""
        while piece := sock.recv(65536):
            data += piece
    assert data.count(b"HTTP/1.1 ") == 3 and data.rstrip().endswith(b"}")
    assert data.count(b"{") == 1  # the version's


CUT_OFF = {
    "in its head": post()[:60],
    "in its body": post()[:-5],
    "in a chunk": post(b"10\r\n{", b"transfer-encoding: chunked"),
    "before the last chunk": post(b"%x\r\n%b\r\n" % (len(BODY), BODY), b"transfer-encoding: chunked"),
    "after what it pipelined": post() + post()[:-5],
}


@pytest.mark.parametrize("half_close", [True, False])
@pytest.mark.parametrize("where", CUT_OFF)
def test_a_request_that_is_cut_off_leaves_nothing_behind(where: str, half_close: bool, server: RunningServer) -> None:
    if half_close:
        assert b" 500 " not in exchange(server, CUT_OFF[where], half_close=True)
    else:
        with connect(server) as sock:
            sock.sendall(CUT_OFF[where])


MALFORMED = {
    "a chunk of no size": post(b"zz\r\nhi\r\n0\r\n\r\n", b"transfer-encoding: chunked"),
    "a chunk of negative size": post(b"-1\r\nhi\r\n0\r\n\r\n", b"transfer-encoding: chunked"),
    "an endless chunk size": post(b"f" * 10_000 + b"\r\nhi", b"transfer-encoding: chunked"),
    "a length that is none": post(BODY, b"content-length: x"),
    "a length below zero": b"POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-length: -1\r\n\r\n",
    "an endless length": b"POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-length: " + b"9" * 5000 + b"\r\n\r\n",
    "two lengths": post(BODY, b"content-length: 3"),
    "a length and chunks": post(BODY, b"content-length: 3", b"transfer-encoding: chunked"),
    "a version that is none": b"GET /health HTTP/9.9\r\nhost: a\r\n\r\n",
    "no version": b"GET /health\r\n\r\n",
    "an unknown method": b"BREW /health HTTP/1.1\r\nhost: a\r\n\r\n",
    "bytes in the path": b"GET /v1/models/\xff\xfe HTTP/1.1\r\nhost: a\r\n\r\n",
    "blanks in the path": b"GET /v1/ models HTTP/1.1\r\nhost: a\r\n\r\n",
    "a nul in a header": b"GET /health HTTP/1.1\r\nhost: a\r\nx: \x00\r\n\r\n",
    "a bare line feed in a header": b"GET /health HTTP/1.1\r\nhost: a\r\nx-request-id: a\nx-b: c\r\n\r\n",
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x00" * 200,
    "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "noise": bytes(range(256)) * 20,
}


@pytest.mark.parametrize("kind", MALFORMED)
def test_what_is_no_http_is_refused_or_closed(kind: str, server: RunningServer) -> None:
    answer = exchange(server, MALFORMED[kind])
    assert len(answer) < 4096
    assert all(line.split()[1] != b"500" for line in answer.split(b"\r\n") if line.startswith(b"HTTP/1.1"))


@pytest.mark.parametrize(
    "path",
    ["/v1/models/%ff%fe", "/v1/models/%00", "/v1/models/..%2f..%2fetc", "/v1/responses/%ed%a0%80", "/%", "//", "/v1/"],
)
def test_strange_paths_are_not_found(path: str, server: RunningServer) -> None:
    answer = exchange(server, b"GET " + path.encode() + b" HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n")
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 404 "), head
    assert json.loads(body)["error"]["message"]


def test_a_query_that_is_no_text_changes_nothing(server: RunningServer) -> None:
    answer = exchange(server, b"GET /v1/models?limit=%ff&%00=%ed HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 200 ")
