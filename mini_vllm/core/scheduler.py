"""One token budget per step: decides how far every request may advance.

There are no phases. A request is behind by `num_tokens - num_computed_tokens`; a step gives it as many of
these as budget, threshold and memory allow, running requests first, then waiting ones. Chunked prefill,
prefix hits and resumption after a preemption are this one rule. `num_computed_tokens` advances when
the plan is made, so the next plan does not have to wait for this one's results.

With `async_scheduling` a request whose next token is still being sampled has a placeholder for it and may be planned
one token further. `may_plan_ahead` says when that is safe; whoever drives the scheduler asks first.
"""

import dataclasses
import time
from collections.abc import Callable, Iterable, Sequence

from mini_vllm.config import SchedulerConfig
from mini_vllm.core.interfaces import AdmissionRule
from mini_vllm.core.kv_cache_manager import KVCacheManager
from mini_vllm.core.planning import in_plan_order, new_request_data, unschedule
from mini_vllm.core.policy import make_queue, make_victim_picker
from mini_vllm.core.reporting import DEFERRED, news_of, note_head, outgrown, times_of, waiting_reasons
from mini_vllm.core.scheduler_output import (
    BlockCopy,
    BlockIds,
    EngineCoreOutput,
    ModelRunnerOutput,
    SchedulerOutput,
    SchedulerStats,
)
from mini_vllm.request import Request, RequestStatus, WaitingReason


class Scheduler:
    """Turns requests into plans and results into progress.

    requests: every unfinished request by id. running: those holding blocks, in order of admission.
    waiting: the others, in the order in which they will be admitted. A request is in exactly one of the two.
    A request for several samples is one request until its first token is there; then its children part from it.
    """

    def __init__(
        self,
        config: SchedulerConfig,
        kv: KVCacheManager,
        *,
        clock: Callable[[], float] = time.monotonic,
        rules: Sequence[AdmissionRule] = (),
    ) -> None:
        self.config = config
        self.kv = kv
        self.clock = clock
        self.rules = tuple(rules)
        self.requests: dict[str, Request] = {}
        self.running: list[Request] = []
        self.waiting = make_queue(config)
        self.num_preemptions = 0
        self.newly_preempted: list[str] = []
        """Who gave way since the plan before the last one was made."""
        self._pick_victim = make_victim_picker(config, self.waiting)
        self._step_id = 0
        self._num_lives = 0
        self._num_added = 0
        self._finished_req_ids: list[str] = []
        self._undone_req_ids: list[str] = []
        self._repeated_req_ids: list[str] = []
        self._unborn_ids: set[str] = set()
        self._block_copies: list[BlockCopy] = []
        self._failures: list[EngineCoreOutput] = []

    # -- requests in and out -----------------------------------------------------------------------------

    def add_request(self, request: Request) -> None:
        """Queue a validated request. Raises ValueError for an id that is alive, or that a child will have."""
        for request_id in (request.request_id, *request.unborn_ids):
            if self.is_in_use(request_id):
                raise ValueError(f"request_id: {request_id!r} is already in use")
        self._unborn_ids.update(request.unborn_ids)
        self._begin_life(request)
        self._num_added += 1
        request.arrival_index = self._num_added
        request.queued_time = self.clock()
        self.requests[request.request_id] = request
        self.waiting.add(request)

    def is_in_use(self, request_id: str) -> bool:
        return request_id in self.requests or request_id in self._unborn_ids

    def _begin_life(self, request: Request) -> None:
        # Unique over all requests: a later request may have the id of one whose results are still under way.
        self._num_lives += 1
        request.epoch = self._num_lives

    def finish_requests(self, request_ids: Iterable[str], status: RequestStatus) -> list[Request]:
        """End requests wherever they are (abort, stop string). Unknown and finished ids are ignored."""
        finished = [self.requests[rid] for rid in dict.fromkeys(request_ids) if rid in self.requests]
        for request in finished:
            self._finish(request, status)
        self._drop_finished_from_running()
        return finished

    def has_unfinished_requests(self) -> bool:
        return bool(self.requests)

    def has_work(self) -> bool:
        """Whether a step would do anything, be it only to report failures or tell workers of ended requests."""
        return bool(self.requests or self._failures or self._finished_req_ids)

    def _finish(self, request: Request, status: RequestStatus) -> None:
        request.status = status
        self.waiting.remove(request)
        self._release(request)
        self._unborn_ids.difference_update(request.unborn_ids)
        del self.requests[request.request_id]
        self._finished_req_ids += (request.request_id, *request.unborn_ids)

    def _release(self, request: Request) -> None:
        for rule in self.rules:
            rule.refund(request)
        self.kv.free(request)

    def _fail(self, request: Request, message: str) -> None:
        """End one request with an error of its own; its blocks of this step were never (well) written."""
        request.error = message
        self.kv.forget_unwritten(request.request_id)
        if request.status is RequestStatus.RUNNING:
            self.running.remove(request)
        self._finish(request, RequestStatus.FINISHED_ERROR)
        self._failures.append(news_of(request, []))
        times = times_of(request)
        for child_id in request.unborn_ids:
            self._failures.append(dataclasses.replace(self._failures[-1], request_id=child_id, times=times))

    def _drop_finished_from_running(self) -> None:
        running = RequestStatus.RUNNING
        self.running = [request for request in self.running if request.status is running]

    # -- the plan ----------------------------------------------------------------------------------------

    def schedule(self) -> SchedulerOutput:
        """Plan one step. The sum of scheduled tokens never exceeds `max_num_batched_tokens`."""
        self._step_id += 1
        self.kv.begin_step(self._step_id)
        plan = SchedulerOutput(step_id=self._step_id)
        budget = self._schedule_running(plan, self.config.max_num_batched_tokens)
        if self.waiting.counts_tokens:
            self._charge_running(plan)
        if plan.preempted_req_ids:
            note_head(self.waiting, WaitingReason.PREEMPTION)
        else:
            budget = self._schedule_waiting(plan, budget)
        plan.total_num_scheduled_tokens = self.config.max_num_batched_tokens - budget
        self._tell_departures(plan)
        return plan

    def _tell_departures(self, plan: SchedulerOutput) -> None:
        self.newly_preempted = plan.preempted_req_ids + self._undone_req_ids
        plan.preempted_req_ids = self.newly_preempted + self._repeated_req_ids
        plan.finished_req_ids = self._finished_req_ids
        plan.block_copies = self._block_copies
        self._block_copies = []
        self._undone_req_ids = []
        self._repeated_req_ids = []
        self._finished_req_ids = []

    def _schedule_running(self, plan: SchedulerOutput, budget: int) -> int:
        """First pass: those already running, in order of admission. Returns the budget left."""
        cached, scheduled, epochs = plan.cached_reqs, plan.num_scheduled_tokens, plan.epochs
        must_ask = bool(self.rules) or self.config.async_scheduling
        for request in tuple(self.running):
            if budget == 0:
                break
            start = request.num_computed_tokens
            is_plain = start < request.quiet_until and request.num_tokens - start == 1 and not request.unborn_ids
            if not is_plain or must_ask or request.spec_token_ids:
                budget = self._schedule_one(request, plan, budget)
                continue
            # One token into a block that it has: most of what is ever scheduled, hence written out.
            request_id = request.request_id
            cached.req_ids.append(request_id)
            cached.num_computed_tokens.append(start)
            scheduled[request_id] = 1
            epochs[request_id] = request.epoch
            request.num_computed_tokens = start + 1
            budget -= 1
        return budget

    def _schedule_one(self, request: Request, plan: SchedulerOutput, budget: int) -> int:
        """Give a running request what it may have, others giving way if need be. Returns the budget left."""
        if request.status is not RequestStatus.RUNNING:
            return budget  # gave way to a request before it
        num_new, _ = self._clamp(request, request.num_computed_tokens, budget)
        if num_new == 0:
            return budget
        block_ids = self.kv.allocate_slots(request, num_new)
        while block_ids is None:
            if not self.kv.can_ever_fit(request.num_tokens):
                self._fail(request, outgrown(request, self.kv))
                return budget
            victim = self._pick_victim(self.running)
            budget += self._preempt(victim, plan)
            if victim is request:
                return budget
            block_ids = self.kv.allocate_slots(request, num_new)
        self._commit_running(request, num_new, block_ids, plan)
        return budget - num_new

    def _schedule_waiting(self, plan: SchedulerOutput, budget: int) -> int:
        """Second pass: admit from the head of the queue until something runs out. Returns the budget left."""
        while self.waiting:
            if len(self.running) >= self.config.max_num_seqs:
                note_head(self.waiting, WaitingReason.MAX_NUM_SEQS)
                break
            if budget == 0:
                note_head(self.waiting, WaitingReason.TOKEN_BUDGET)
                break
            request = self.waiting.peek()
            if not self.kv.can_ever_fit(request.num_tokens):
                self._fail(request, outgrown(request, self.kv))
                continue
            blocks, num_cached = self.kv.get_computed_blocks(request)
            num_new, why = self._clamp(request, num_cached, budget)
            if num_new == 0:
                note_head(self.waiting, WaitingReason.RULE, why)
                break
            request.num_computed_tokens = num_cached
            if self.kv.allocate_slots(request, num_new, blocks) is None:
                request.num_computed_tokens = 0
                note_head(self.waiting, WaitingReason.KV_CACHE_FULL)
                break
            self._admit(self.waiting.pop(), num_new, plan)
            budget -= num_new
        return budget

    def _clamp(self, request: Request, start: int, budget: int) -> tuple[int, str]:
        """(tokens this request may compute from position `start`, which rule made it fewer)."""
        num_new = request.num_tokens + len(request.spec_token_ids) + request.num_output_placeholders - start
        if request.num_output_placeholders and request.ends_with_placeholders():
            return 0, ""  # what is under way is its last token
        threshold = self.config.long_prefill_token_threshold
        if 0 < threshold < num_new:
            num_new = threshold
        if num_new > budget:
            num_new = budget
        why = ""
        for rule in self.rules:
            allowed, reason = rule.clamp(request, start, num_new)
            if allowed < num_new:
                num_new, why = max(allowed, 0), reason
        return num_new, why

    def _commit_running(self, request: Request, num_new: int, block_ids: BlockIds, plan: SchedulerOutput) -> None:
        if request.new_to_worker:  # a child of the step before
            self._introduce(request, plan)
        else:
            cached = plan.cached_reqs
            cached.req_ids.append(request.request_id)
            cached.num_computed_tokens.append(request.num_computed_tokens)
            if any(block_ids):
                cached.new_block_ids[request.request_id] = block_ids
        self._commit(request, num_new, plan)

    def _charge_running(self, plan: SchedulerOutput) -> None:
        for request_id, num_tokens in plan.num_scheduled_tokens.items():
            self._charge(self.requests[request_id], num_tokens)

    def _charge(self, request: Request, num_tokens: int) -> None:
        """One for each token computed, and one for the token sampled."""
        self.waiting.charge(request, num_tokens + self.needs_sample(request))

    def _admit(self, request: Request, num_new: int, plan: SchedulerOutput) -> None:
        if request.scheduled_time is None:
            request.scheduled_time = self.clock()
        if request.num_cached_tokens < 0:
            request.num_cached_tokens = request.num_computed_tokens
            if request.reads_prefix_cache:
                self.kv.record_prefix_lookup(request.num_tokens, request.num_computed_tokens)
        request.status = RequestStatus.RUNNING
        self.running.append(request)
        self._introduce(request, plan)
        self._commit(request, num_new, plan)
        self._charge(request, num_new)

    def _introduce(self, request: Request, plan: SchedulerOutput) -> None:
        plan.new_reqs.append(new_request_data(request, self.kv.block_ids(request.request_id)))
        request.new_to_worker = False

    def _commit(self, request: Request, num_new: int, plan: SchedulerOutput) -> None:
        for rule in self.rules:
            rule.commit(request, request.num_computed_tokens, num_new)
        request_id = request.request_id
        plan.num_scheduled_tokens[request_id] = num_new
        plan.epochs[request_id] = request.epoch
        request.num_computed_tokens += num_new
        if self.config.async_scheduling and request.num_computed_tokens >= (
            request.num_tokens + request.num_output_placeholders
        ):
            request.num_output_placeholders += 1
        if request.unborn_ids and self.needs_sample(request):
            plan.forks[request_id] = list(request.unborn_ids)

    # -- planning while a step computes ------------------------------------------------------------------

    def may_plan_ahead(self) -> bool:
        """Whether the next plan can be made before the last one's results are there: nobody would have to give way.

        A request that gives way loses the token that is being sampled for it, and one that is about to end may free
        the blocks: so whoever is short of blocks waits for the results first.
        """
        free, budget = self.kv.block_pool.get_num_free_blocks(), self.config.max_num_batched_tokens
        if self.kv.num_blocks_for(budget) + len(self.running) * self.kv.num_groups <= free:
            return True  # however the budget is shared out, the running ones have room
        missing = 0
        for request in self.running:
            num_new, _ = self._clamp(request, request.num_computed_tokens, budget)
            if num_new:
                missing += self.kv.num_missing_blocks(request, num_new)
                budget -= num_new
        return missing <= free

    def redo_readers(self, plan: SchedulerOutput) -> None:
        """A row of the step before `plan` failed, and `plan` is under way: whom it admitted on cached blocks may read
        what that row did not write. They go back to the queue; nobody else can have found such blocks yet."""
        for new in reversed(plan.new_reqs):
            request = self._alive(new.req_id, plan) if new.num_computed_tokens else None
            if request is not None:
                self._to_waiting(request)
                self._undone_req_ids.append(new.req_id)

    # -- giving way --------------------------------------------------------------------------------------

    def _preempt(self, request: Request, plan: SchedulerOutput) -> int:
        """Back to the queue, to be recomputed; outputs are kept. Returns the budget it had taken in this plan."""
        refund = unschedule(request.request_id, plan)
        self._to_waiting(request)
        plan.preempted_req_ids.append(request.request_id)
        return refund

    def _to_waiting(self, request: Request) -> None:
        self.running.remove(request)
        self.kv.forget_unwritten(request.request_id)
        self._release(request)
        request.num_computed_tokens = 0
        request.num_output_placeholders = 0
        request.spec_token_ids = []
        request.new_to_worker = True
        request.num_preemptions += 1
        self._begin_life(request)
        request.status = RequestStatus.PREEMPTED
        request.waiting_reason = WaitingReason.PREEMPTED
        request.waiting_detail = ""
        self.num_preemptions += 1
        self.waiting.requeue(request)

    def undo_step(self, plan: SchedulerOutput) -> None:
        """The plan was not executed (an interrupt): its requests go back to the queue as if preempted."""
        self._undone_req_ids += self.newly_preempted  # no record of this step will tell
        self.newly_preempted = []
        self.repeat_departures(plan)
        for request_id in reversed(plan.num_scheduled_tokens):
            self.kv.forget_unwritten(request_id)
            request = self.requests.get(request_id)
            if request is not None and request.status is RequestStatus.RUNNING:
                self._to_waiting(request)
                self._undone_req_ids.append(request_id)

    def repeat_departures(self, plan: SchedulerOutput) -> None:
        """A worker may not have seen this plan: tell it again who left (dropping a row twice is harmless).

        Children that the plan had no budget for may lack the blocks it was to copy: they are computed again.
        """
        self._finished_req_ids = plan.finished_req_ids + self._finished_req_ids
        self._repeated_req_ids = plan.preempted_req_ids + self._repeated_req_ids
        for request in [request for request in reversed(self.running) if request.new_to_worker]:
            self._to_waiting(request)

    # -- results -----------------------------------------------------------------------------------------

    @staticmethod
    def needs_sample(request: Request) -> bool:
        """After `schedule()`: whether this step's tokens bring the request level, so that it samples one."""
        return request.num_computed_tokens >= request.num_tokens + max(request.num_output_placeholders - 1, 0)

    def update_from_output(self, plan: SchedulerOutput, result: ModelRunnerOutput) -> list[EngineCoreOutput]:
        """Append sampled tokens, end what is done, and report. Results of an earlier life are dropped."""
        for request_id, message in result.errors.items():
            self.kv.forget_unwritten(request_id, plan.step_id)
            request = self._alive(request_id, plan)
            if request is not None:
                self._fail(request, message)
        self.kv.confirm_step(plan.step_id)
        outputs = self._bear_children(plan, result) if plan.forks else []
        requests, num_unfinished = self.requests, len(self.requests)
        for (request_id, epoch), token_ids in zip(plan.epochs.items(), in_plan_order(plan, result), strict=True):
            request = requests.get(request_id)
            if request is None or request.epoch != epoch:
                continue
            if token_ids or request_id in result.prompt_logprobs:
                outputs.append(self._append_tokens(request, token_ids, result))
        if len(requests) < num_unfinished:
            self._drop_finished_from_running()
        outputs += self._failures
        self._failures = []
        return outputs

    def _alive(self, request_id: str, plan: SchedulerOutput) -> Request | None:
        request = self.requests.get(request_id)
        if request is None or request.epoch != plan.epochs.get(request_id):
            return None
        return request

    def _append_tokens(self, request: Request, token_ids: list[int], result: ModelRunnerOutput) -> EngineCoreOutput:
        for num_kept, token_id in enumerate(token_ids, start=1):
            is_last = request.append_and_check(token_id)
            if request.num_output_placeholders:
                request.num_output_placeholders -= 1
                self.kv.cache_known(request)
            if is_last:
                self._finish(request, request.status)
                token_ids = token_ids[:num_kept]
                break
        news = news_of(request, token_ids)
        if result.logprobs:
            news.logprobs = result.logprobs.get(request.request_id)
        if result.prompt_logprobs:
            news.prompt_logprobs = result.prompt_logprobs.get(request.request_id)
        return news

    # -- several samples of one prompt -------------------------------------------------------------------

    def _bear_children(self, plan: SchedulerOutput, result: ModelRunnerOutput) -> list[EngineCoreOutput]:
        """First tokens of the requests that part from another in this step, before any parent can end."""
        sampled = dict(zip(result.req_ids, result.sampled_token_ids, strict=True))
        news = []
        for parent_id in plan.forks:
            parent = self._alive(parent_id, plan)
            if parent is None or not sampled.get(parent_id):
                continue
            self._unborn_ids.difference_update(parent.unborn_ids)
            children = parent.bear_children()
            for child in children:
                self._begin_life(child)
                self.requests[child.request_id] = child
                if token_ids := sampled.get(child.request_id):
                    news.append(self._append_tokens(child, token_ids, result))
                else:
                    self._fail(child, result.errors.get(child.request_id, "the step gave it no first token"))
            self._place(parent, [child for child in children if not child.is_finished])
        return news

    def _place(self, parent: Request, children: list[Request]) -> None:
        """Children share the prompt's blocks while there is room; the others wait, and are computed by themselves.

        Copies of a partial last block are due before anything else is written, so they go with the next plan:
        a parent that ends meanwhile gives its block away.
        """
        homeless: list[Request] = []
        for child in children:
            has_place = not homeless and len(self.running) < self.config.max_num_seqs
            copies = self.kv.fork(parent, child) if has_place else None
            if copies is None:
                homeless.append(child)
                continue
            self._block_copies += copies
            child.status = RequestStatus.RUNNING
            self.running.append(child)
        for child in reversed(homeless):
            self.waiting.requeue(child)

    # -- looking in --------------------------------------------------------------------------------------

    def waiting_reasons(self) -> dict[str, str]:
        """Why each waiting request waits, in queue order. Worked out when asked, not every step."""
        return waiting_reasons(self.waiting)

    def stats(self) -> SchedulerStats:
        head_is_held = bool(self.waiting) and self.waiting.peek().waiting_reason in DEFERRED
        return SchedulerStats(
            step_id=self._step_id,
            num_running_reqs=len(self.running),
            num_waiting_reqs=len(self.waiting),
            num_waiting_deferred_reqs=int(head_is_held),
            kv_cache_usage=self.kv.usage,
            num_preemptions=self.num_preemptions,
            prefix_cache_queries=self.kv.prefix_cache_queries,
            prefix_cache_hits=self.kv.prefix_cache_hits,
        )

    def check_integrity(self) -> None:
        """Raise AssertionError if a request is lost, doubled, or holds blocks it should not. For idle moments."""
        running = [request.request_id for request in self.running]
        waiting = [request.request_id for request in self.waiting]
        assert len(set(running)) == len(running) and len(set(waiting)) == len(waiting), "a request is doubled"
        assert sorted(running + waiting) == sorted(self.requests), "a request is lost"
        assert all(request.status is RequestStatus.RUNNING for request in self.running), "status and list differ"
        self.kv.check_integrity(running)
