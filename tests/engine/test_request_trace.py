"""The recorded trace of requests: Mooncake's fields, order of arrival, shared prefixes, and no text."""

import json
import threading
from pathlib import Path
from typing import Any

import pytest

from mini_vllm.engine import request_trace
from mini_vllm.engine.request_trace import RequestTraceRecorder, read_request_trace
from mini_vllm.exceptions import ConfigError
from mini_vllm.request import Request
from tests.core.harness import make_request

SHARED = list(range(1000, 1008))


def record(path: Path, *requests: Request, finish: list[str] | None = None, **options: Any) -> list[dict[str, Any]]:
    """Record arrivals (one a quarter of a second), then ends in the order `finish`; the lines as objects."""
    recorder = RequestTraceRecorder(path, block_size=4, clock=lambda: 100.0, **options)
    for index, request in enumerate(requests):
        request.arrival_time = 100.0 + index / 4
        recorder.record_arrival(request)
    for request_id in [r.request_id for r in requests] if finish is None else finish:
        recorder.record_finish(request_id, 7, "length")
    recorder.close()
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_line_has_mooncakes_fields_and_ours(tmp_path: Path) -> None:
    request = make_request("a", 9, max_tokens=7, n=2, priority=3, tenant="secret key", user="bob")
    (line,) = record(tmp_path / "t.jsonl", request)
    assert line == {
        "timestamp": 0, "input_length": 9, "output_length": 7, "hash_ids": [0, 1, 2], "block_size": 4, "tenant": 0,
        "user": 0, "n": 2, "max_tokens": 7, "priority": 3, "finish_reason": "length",
    }  # fmt: skip


def test_shared_prefixes_have_the_same_numbers_and_nothing_else_has(tmp_path: Path) -> None:
    prompts = [[*SHARED, 1, 2, 3], [*SHARED, 1, 2, 3], [*SHARED, 9], [1, *SHARED], [*SHARED, 1, 2, 3, 4]]
    lines = record(tmp_path / "t.jsonl", *(make_request(f"r{i}", prompt) for i, prompt in enumerate(prompts)))
    assert [line["hash_ids"] for line in lines] == [[0, 1, 2], [0, 1, 2], [0, 1, 3], [4, 5, 6], [0, 1, 7]]


def test_salts_part_prefixes_as_they_do_in_the_cache(tmp_path: Path) -> None:
    requests = [make_request(f"r{i}", SHARED, cache_salt=salt) for i, salt in enumerate([None, "x", "x", "None"])]
    assert [line["hash_ids"] for line in record(tmp_path / "t.jsonl", *requests)] == [[0, 1], [2, 3], [2, 3], [4, 5]]


def test_tenants_are_numbers(tmp_path: Path) -> None:
    who = [("k1", "a"), ("k2", "a"), ("k1", "b"), ("k1", "a")]
    requests = [make_request(f"r{i}", 4, tenant=name, user=user) for i, (name, user) in enumerate(who)]
    lines = record(tmp_path / "t.jsonl", *requests)
    assert [(line["tenant"], line["user"]) for line in lines] == [(0, 0), (1, 1), (0, 2), (0, 0)]


def test_no_text_no_token_and_no_name_is_written(tmp_path: Path) -> None:
    request = make_request("chatcmpl-very-secret", [987654] * 9, tenant="sk-key", user="bob", cache_salt="pepper")
    record(tmp_path / "t.jsonl", request)
    text = (tmp_path / "t.jsonl").read_text()
    assert not any(secret in text for secret in ("secret", "987654", "sk-key", "bob", "pepper"))


def test_lines_are_in_order_of_arrival_whatever_ends_first(tmp_path: Path) -> None:
    requests = [make_request(name, 4) for name in "abcd"]
    lines = record(tmp_path / "t.jsonl", *requests, finish=["d", "b", "a", "c"])
    assert [line["timestamp"] for line in lines] == [0, 250, 500, 750]


def test_what_had_not_ended_is_left_out_and_strangers_are_ignored(tmp_path: Path) -> None:
    requests = [make_request(name, 4) for name in "abcd"]
    lines = record(tmp_path / "t.jsonl", *requests, finish=["d", "nobody", "b", "b"])
    assert [line["timestamp"] for line in lines] == [250, 750]


def test_one_that_never_ends_does_not_hold_back_the_others_for_ever(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    requests = [make_request(f"r{i}", 4) for i in range(10)]
    finish = [f"r{i}" for i in range(1, 10)] + ["r0"]
    lines = record(path, *requests, finish=finish, max_held_lines=3)
    assert sorted(line["timestamp"] for line in lines) == [250 * i for i in range(10)]
    assert lines[0]["timestamp"] == 250, "it was not waited for"
    assert [request.timestamp for request in read_request_trace(path)] == [250 * i for i in range(10)]


def test_the_table_of_blocks_is_bounded(tmp_path: Path) -> None:
    """What was seen longest ago is forgotten: less sharing is shown than there was, never more."""
    prompts = [SHARED[:4], [1] * 4, [2] * 4, [3] * 4, SHARED[:4]]
    requests = [make_request(f"r{i}", prompt) for i, prompt in enumerate(prompts)]
    lines = record(tmp_path / "t.jsonl", *requests, max_numbers=3)
    assert [line["hash_ids"] for line in lines] == [[0], [1], [2], [3], [4]]


def test_lines_are_on_disk_soon_without_closing(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    recorder = RequestTraceRecorder(path, block_size=4)
    request = make_request("a", 4)
    recorder.record_arrival(request)
    recorder.record_finish("a", 1, "stop")
    waited = threading.Event()
    for _ in range(200):
        if path.read_text():
            break
        waited.wait(0.01)
    assert len(read_request_trace(path)) == 1
    recorder.close()
    recorder.close()


def test_a_place_that_cannot_be_written_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="record_trace: cannot write"):
        RequestTraceRecorder(tmp_path / "no" / "such" / "folder")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_is_reported_once_and_harms_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    reports: list[str] = []
    monkeypatch.setattr(request_trace.logger, "error", lambda message, error: reports.append(message % error))
    recorder = RequestTraceRecorder("/dev/full", block_size=4)
    for i in range(3000):
        recorder.record_arrival(make_request(f"r{i}", 4))
        recorder.record_finish(f"r{i}", 1, "stop")
    recorder.close()
    assert len(reports) == 1 and "No space left" in reports[0]
    assert not [thread for thread in threading.enumerate() if thread.name == "request-trace"]


# -- reading ------------------------------------------------------------------------------------------------------

GOOD = {"timestamp": 5, "input_length": 513, "output_length": 2, "hash_ids": [0, 1]}


def write(path: Path, *lines: Any) -> Path:
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return path


def test_a_public_trace_is_read_with_its_own_block_size(tmp_path: Path) -> None:
    path = write(tmp_path / "t", GOOD | {"timestamp": 9}, "", GOOD | {"later_field": 1})
    later, earlier = read_request_trace(path)[::-1]
    assert (earlier.timestamp, later.timestamp, earlier.block_size, earlier.hash_ids) == (5, 9, 512, (0, 1))
    assert (earlier.n, earlier.tenant, earlier.max_tokens, earlier.finish_reason) == (1, 0, None, None)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ("[1]", "must be an object, got list"),
        ({}, "timestamp: must be a number of at least 0, got None"),
        (GOOD | {"timestamp": -1}, "timestamp: must be a number"),
        ('{"timestamp": NaN}', "timestamp: must be a number"),
        (GOOD | {"timestamp": True}, "timestamp: must be a number"),
        (GOOD | {"input_length": 0}, "input_length: must be an integer of at least 1, got 0"),
        (GOOD | {"output_length": 1.5}, "output_length: must be an integer"),
        (GOOD | {"hash_ids": "0"}, "hash_ids: must be a list"),
        (GOOD | {"hash_ids": [0, -1]}, "hash_ids: must be a list"),
        (GOOD | {"hash_ids": [0]}, "hash_ids: 513 tokens are 2 blocks of 512, got 1"),
        (GOOD | {"block_size": 0}, "block_size: must be an integer of at least 1"),
        (GOOD | {"n": 0}, "n: must be"),
        (GOOD | {"max_tokens": "x" * 10_000}, "max_tokens: must be an integer of at least 1, got x{80}$"),
        (GOOD | {"priority": 0.5}, "priority: must be an integer, got 0.5"),
        (GOOD | {"finish_reason": 3}, "finish_reason: must be a string"),
    ],
)
def test_a_bad_line_is_named_with_its_number_and_field(tmp_path: Path, line: Any, says: str) -> None:
    path = write(tmp_path / "trace.jsonl", GOOD, line)
    with pytest.raises(ConfigError, match=rf"trace\.jsonl, line 2: {says}"):
        read_request_trace(path)


def test_a_file_that_cannot_be_read_is_an_error_of_ours(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read as a request trace"):
        read_request_trace(tmp_path / "missing")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="cannot be read as a request trace"):
        read_request_trace(tmp_path / "binary")
