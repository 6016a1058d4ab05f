"""Step records as a picture: Chrome's trace event format, which Perfetto and chrome://tracing open.

One track has the steps, one lane each the requests that ran side by side, with the tokens every step gave them;
counters show tokens, requests and the KV cache. Preemptions and ends are marks in the lanes. The format is described
in Google's "Trace Event Format" document: times in microseconds, `ph` X for a span, i for a mark, C for a counter, M
for a name.
"""

import heapq
from collections.abc import Iterable
from typing import Any

from mini_vllm.engine.trace import StepRecord

Event = dict[str, Any]

PID = 1
STEPS_TID = 0
"""Lanes are numbered from 1 on."""


def chrome_trace(records: Iterable[StepRecord]) -> dict[str, Any]:
    """The trace as a JSON object. Its time begins with the first record, oldest first."""
    ordered = list(records)
    origin = ordered[0].start_time if ordered else 0.0
    lanes = _Lanes()
    events: list[Event] = []
    for record in ordered:
        events += _step_events(record, lanes, *_span(record, origin))
    return {"traceEvents": _names(lanes.count) + events, "displayTimeUnit": "ms"}


def _span(record: StepRecord, origin: float) -> tuple[float, float]:
    """(start, duration) in microseconds. Both ends are rounded alike, so that steps never overlap."""
    start = round((record.start_time - origin) * 1e9)
    end = round((record.start_time + record.duration - origin) * 1e9)
    return start / 1e3, (end - start) / 1e3


def _step_events(record: StepRecord, lanes: "_Lanes", start: float, duration: float) -> list[Event]:
    events = [_step(record, start, duration), *_counters(record, start)]
    for request_id in record.preempted_req_ids:
        events.append(_mark("preempted", request_id, lanes.lane_of(request_id), start))
    lanes.keep(record.num_scheduled_tokens)
    for request_id, num_tokens in record.num_scheduled_tokens.items():
        events.append(
            _event("X", request_id, lanes.enter(request_id), start, dur=duration, args={"tokens": num_tokens})
        )
    for request_id, reason in record.finished.items():
        events.append(_mark(f"finished: {reason}", request_id, lanes.lane_of(request_id), start + duration))
    lanes.leave(record.finished)
    return events


def _step(record: StepRecord, start: float, duration: float) -> Event:
    args: dict[str, Any] = {
        "tokens": record.total_num_scheduled_tokens,
        "requests": len(record.num_scheduled_tokens),
        "new": list(record.new_req_ids),
        "preempted": list(record.preempted_req_ids),
        "finished": dict(record.finished),
    }
    if record.waiting_head is not None:
        args["waiting"] = record.waiting or {record.waiting_head: record.waiting_reason}
    return _event("X", f"step {record.step_id}", STEPS_TID, start, dur=duration, args=args)


def _counters(record: StepRecord, start: float) -> list[Event]:
    """What each counter shows from this step on."""
    values = {
        "scheduled tokens": {"tokens": record.total_num_scheduled_tokens},
        "requests": {"running": record.num_running, "waiting": record.num_waiting},
        "KV cache": {"percent": round(100 * record.kv_cache_usage, 3)},
    }
    return [_event("C", name, STEPS_TID, start, args=args) for name, args in values.items()]


def _mark(what: str, request_id: str, lane: int, time: float) -> Event:
    return _event("i", what, lane, time, s="t", args={"request": request_id})


def _event(phase: str, name: str, tid: int, time: float, **fields: Any) -> Event:
    return {"ph": phase, "name": name, "cat": "engine", "pid": PID, "tid": tid, "ts": time, **fields}


def _names(num_lanes: int) -> list[Event]:
    threads = {STEPS_TID: "steps"} | {lane: f"request slot {lane}" for lane in range(1, num_lanes + 1)}
    events = [_event("M", "process_name", STEPS_TID, 0, args={"name": "mini-vllm engine core"})]
    for tid, name in threads.items():
        events.append(_event("M", "thread_name", tid, 0, args={"name": name}))
        events.append(_event("M", "thread_sort_index", tid, 0, args={"sort_index": tid}))
    return events


class _Lanes:
    """Which lane a request is drawn in: the lowest that is free when it begins to run."""

    def __init__(self) -> None:
        self.count = 0
        self._taken: dict[str, int] = {}
        self._free: list[int] = []

    def lane_of(self, request_id: str) -> int:
        """Its lane; the track of the steps for one that was never seen running."""
        return self._taken.get(request_id, STEPS_TID)

    def enter(self, request_id: str) -> int:
        if request_id not in self._taken:
            if not self._free:
                self.count += 1
                heapq.heappush(self._free, self.count)
            self._taken[request_id] = heapq.heappop(self._free)
        return self._taken[request_id]

    def leave(self, request_ids: Iterable[str]) -> None:
        for request_id in request_ids:
            lane = self._taken.pop(request_id, None)
            if lane is not None:
                heapq.heappush(self._free, lane)

    def keep(self, scheduled: Iterable[str]) -> None:
        """Aborted requests leave no record: whoever is not in a step gives its lane up."""
        self.leave(self._taken.keys() - set(scheduled))
