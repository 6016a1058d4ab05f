"""What each step did and why the rest waited: the answer to "why is my request waiting?".

A `StepRecord` is made from the plan after the fact and costs a few references; text is rendered only when
somebody reads it or the DEBUG log is on. Admission is strictly from the head of the queue, so the head's
reason and the length of the queue account for every waiting request; a detailed trace names them one by one.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from mini_vllm.core.reporting import reason_of
from mini_vllm.core.scheduler import Scheduler
from mini_vllm.core.scheduler_output import EngineCoreOutput, SchedulerOutput


@dataclass(frozen=True)
class StepRecord:
    """One step. Times are seconds on the engine's clock."""

    step_id: int
    start_time: float
    duration: float
    num_scheduled_tokens: dict[str, int]
    """Request id to tokens, in batch order."""
    new_req_ids: Sequence[str]
    preempted_req_ids: Sequence[str]
    finished: dict[str, str]
    """Requests that ended in this step, with their finish reason."""
    num_running: int
    num_waiting: int
    waiting_head: str | None
    waiting_reason: str
    """Why the head of the queue waits; empty when nothing does."""
    kv_cache_usage: float
    waiting: dict[str, str] = field(default_factory=dict)
    """Every waiting request in queue order, with its reason; only in a detailed trace."""

    @property
    def total_num_scheduled_tokens(self) -> int:
        return sum(self.num_scheduled_tokens.values())

    def __str__(self) -> str:
        ran = ", ".join(f"{request_id}:{n}" for request_id, n in self.num_scheduled_tokens.items()) or "nothing"
        parts = [
            f"step {self.step_id}: {self.num_running} running, {self.num_waiting} waiting",
            f"scheduled {self.total_num_scheduled_tokens} tokens ({ran})",
            f"KV cache {self.kv_cache_usage:.1%}",
        ]
        if self.preempted_req_ids:
            parts.append(f"preempted {', '.join(self.preempted_req_ids)}")
        if self.finished:
            parts.append("finished " + ", ".join(f"{rid} ({why})" for rid, why in self.finished.items()))
        if self.waiting_head is not None:
            behind = f" (and {self.num_waiting - 1} behind it)" if self.num_waiting > 1 else ""
            parts.append(f"{self.waiting_head} waits: {self.waiting_reason}{behind}")
        return "; ".join(parts)


@dataclass
class StepTrace:
    """The last `capacity` records, oldest first.

    detailed: note every waiting request, which takes time and memory with the length of the queue.
    """

    capacity: int = 256
    detailed: bool = False
    records: deque[StepRecord] = field(init=False)

    def __post_init__(self) -> None:
        self.records = deque(maxlen=self.capacity)

    def add(
        self,
        scheduler: Scheduler,
        plan: SchedulerOutput,
        outputs: Sequence[EngineCoreOutput],
        start_time: float,
        end_time: float,
        preempted_req_ids: Sequence[str],
    ) -> None:
        """Note a step that has just been applied, and who gave way for it."""
        waiting = scheduler.waiting_reasons() if self.detailed else {}
        self.records.append(record_step(scheduler, plan, outputs, start_time, end_time, waiting, preempted_req_ids))

    def last(self, n: int | None = None) -> list[StepRecord]:
        """The newest `n` records (all when None), oldest first."""
        records = list(self.records)
        return records if n is None else records[max(len(records) - n, 0) :]


def record_step(
    scheduler: Scheduler,
    plan: SchedulerOutput,
    outputs: Sequence[EngineCoreOutput],
    start_time: float,
    end_time: float,
    waiting: dict[str, str],
    preempted_req_ids: Sequence[str],
) -> StepRecord:
    """The record of a step that has just been applied."""
    head = scheduler.waiting.peek() if scheduler.waiting else None
    return StepRecord(
        step_id=plan.step_id,
        start_time=start_time,
        duration=end_time - start_time,
        num_scheduled_tokens=plan.num_scheduled_tokens,
        new_req_ids=[new.req_id for new in plan.new_reqs],
        preempted_req_ids=preempted_req_ids,
        finished={out.request_id: out.finish_reason for out in outputs if out.finish_reason is not None},
        num_running=len(scheduler.running),
        num_waiting=len(scheduler.waiting),
        waiting_head=None if head is None else head.request_id,
        waiting_reason="" if head is None else reason_of(head),
        kv_cache_usage=scheduler.kv.usage,
        waiting=waiting,
    )
