"""Step records as a Chrome trace: the rules of the format, and that the picture tells what happened."""

import json
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import pytest

from mini_vllm.engine.chrome_trace import PID, STEPS_TID, Event, chrome_trace
from mini_vllm.engine.core import EngineCore
from mini_vllm.engine.trace import StepRecord
from tests.core.harness import PagedExecutor, make_request, make_scheduler, run_engine


def record_of_a_busy_engine() -> tuple[EngineCore, list[StepRecord]]:
    """Eight requests on a small pool: chunks, preemptions, ends, an abort, and a clock with an odd origin."""
    now = [1234.5678]

    def clock() -> float:
        now[0] += 0.00012345678
        return now[0]

    scheduler = make_scheduler(
        num_blocks=9, max_num_batched_tokens=16, max_num_seqs=4, clock=clock, enable_caching=False
    )
    engine = EngineCore(scheduler, PagedExecutor(9, 4), trace_detailed=True)
    for i in range(8):
        engine.add_request(make_request(f"r{i}", 3 + 4 * (i % 3), max_tokens=6 + i))
    for _ in range(4):
        engine.step()
    engine.abort_requests(["r1"])
    run_engine(engine)
    assert scheduler.num_preemptions > 1
    return engine, engine.trace.last()


@pytest.fixture
def records() -> list[StepRecord]:
    return record_of_a_busy_engine()[1]


def check_format(trace: dict[str, Any]) -> None:
    """What a viewer needs of every event. Raises AssertionError."""
    assert json.loads(json.dumps(trace, allow_nan=False)) == trace
    tids = {event["tid"] for event in trace["traceEvents"]}
    for event in trace["traceEvents"]:
        assert {"ph", "name", "pid", "tid", "ts"} <= event.keys() and isinstance(event["name"], str)
        assert event["pid"] == PID and isinstance(event["tid"], int)
        assert isinstance(event["ts"], int | float) and event["ts"] >= 0
        check_phase(event)
    named = {e["tid"] for e in trace["traceEvents"] if e["ph"] == "M" and e["name"] == "thread_name"}
    assert named == tids, "every track has a name"
    for tid in tids:
        check_spans([e for e in trace["traceEvents"] if e["tid"] == tid and e["ph"] == "X"])


def check_phase(event: Event) -> None:
    assert event["ph"] in "XiCM"
    assert ("dur" in event) == (event["ph"] == "X")
    if event["ph"] == "X":
        assert event["dur"] >= 0
    elif event["ph"] == "C":
        assert event["args"] and all(isinstance(value, int | float) for value in event["args"].values())
    elif event["ph"] == "i":
        assert event["s"] in ("t", "p", "g")
    else:
        assert event["args"].keys() <= {"name", "sort_index"}


def check_spans(spans: Iterable[Event]) -> None:
    """Of two spans in one track one lies inside the other or after it; ours follow one another."""
    end = 0.0
    for span in sorted(spans, key=lambda span: span["ts"]):
        assert span["ts"] >= end, "spans overlap"
        end = span["ts"] + span["dur"]


def of(trace: dict[str, Any], phase: str, tid: int | None = None) -> list[Event]:
    return [e for e in trace["traceEvents"] if e["ph"] == phase and tid in (None, e["tid"])]


def test_the_trace_keeps_the_rules_of_the_format(records: list[StepRecord]) -> None:
    check_format(chrome_trace(records))


def test_no_records_are_an_empty_trace() -> None:
    trace = chrome_trace([])
    check_format(trace)
    assert {event["ph"] for event in trace["traceEvents"]} == {"M"}


def test_steps_are_spans_in_microseconds_from_the_first_on(records: list[StepRecord]) -> None:
    steps = of(chrome_trace(records), "X", STEPS_TID)
    assert [step["name"] for step in steps] == [f"step {record.step_id}" for record in records]
    assert steps[0]["ts"] == 0
    for step, record in zip(steps, records, strict=True):
        assert step["ts"] == pytest.approx((record.start_time - records[0].start_time) * 1e6, abs=0.01)
        assert step["dur"] == pytest.approx(record.duration * 1e6, abs=0.01)
        assert step["args"]["tokens"] == record.total_num_scheduled_tokens
        assert step["args"].get("waiting", {}) == record.waiting


def test_every_chunk_is_in_the_lane_of_its_request(records: list[StepRecord]) -> None:
    trace = chrome_trace(records)
    chunks = [event for event in of(trace, "X") if event["tid"] != STEPS_TID]
    drawn: dict[float, dict[str, int]] = defaultdict(dict)
    for chunk in chunks:
        drawn[chunk["ts"]][chunk["name"]] = chunk["args"]["tokens"]
    for step, record in zip(of(trace, "X", STEPS_TID), records, strict=True):
        assert drawn.get(step["ts"], {}) == record.num_scheduled_tokens
    assert len({chunk["tid"] for chunk in chunks}) == max(len(r.num_scheduled_tokens) for r in records)


def test_preemptions_and_ends_are_marks_in_the_lane(records: list[StepRecord]) -> None:
    trace = chrome_trace(records)
    marks = of(trace, "i")
    lanes = {(e["ts"] + e["dur"], e["name"]): e["tid"] for e in of(trace, "X") if e["tid"] != STEPS_TID}
    preempted = [mark["args"]["request"] for mark in marks if mark["name"] == "preempted"]
    assert preempted == [request_id for record in records for request_id in record.preempted_req_ids]
    finished = {mark["args"]["request"]: mark for mark in marks if mark["name"].startswith("finished")}
    assert sorted(finished) == [f"r{i}" for i in range(8) if i != 1]
    for request_id, mark in finished.items():
        assert mark["name"] == "finished: length" and mark["tid"] == lanes[mark["ts"], request_id]


def test_counters_follow_the_records(records: list[StepRecord]) -> None:
    counters = of(chrome_trace(records), "C")
    waiting = [event["args"]["waiting"] for event in counters if event["name"] == "requests"]
    usage = [event["args"]["percent"] for event in counters if event["name"] == "KV cache"]
    assert waiting == [record.num_waiting for record in records]
    assert usage == [pytest.approx(100 * record.kv_cache_usage, abs=0.001) for record in records]


def test_a_plain_trace_tells_of_the_head_alone() -> None:
    record = StepRecord(7, 1.0, 0.5, {"a": 3}, ["a"], [], {}, 1, 2, "b", "batch full (max_num_seqs)", 0.25)
    (step,) = of(chrome_trace([record]), "X", STEPS_TID)
    assert step["args"]["waiting"] == {"b": "batch full (max_num_seqs)"}


@pytest.mark.parametrize(
    "breakage",
    [
        lambda events: events[-1].update(ts=-1),
        lambda events: events[-1].pop("tid"),
        lambda events: next(e for e in events if e["ph"] == "X").update(dur=10**9),
        lambda events: events[-1].update(ph="Q"),
        lambda events: events.append({**events[-1], "tid": 99}),
    ],
)
def test_a_trace_against_the_rules_is_noticed(records: list[StepRecord], breakage: Any) -> None:
    """Broken controls of the checker."""
    trace = chrome_trace(records)
    breakage(trace["traceEvents"])
    with pytest.raises((AssertionError, KeyError)):
        check_format(trace)
