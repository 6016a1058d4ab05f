"""What the core reports becomes what callers get: text, logprobs, metrics, `RequestOutput`.

The processor is handed each request when it is queued and the core's news after every step. It promises that a
finished or aborted request leaves nothing behind, that deltas add up to the cumulative text, and that the text
of a request does not depend on who shares the batch or on how it is delivered.
"""

from collections.abc import Iterable, Mapping, Sequence

from mini_vllm.core.scheduler_output import EngineCoreOutput
from mini_vllm.engine.logprobs import TokenTexts
from mini_vllm.engine.metrics.stats import IterationStats
from mini_vllm.engine.metrics.tracing import RequestTracer
from mini_vllm.engine.parallel_sampling import ParentRequest
from mini_vllm.engine.request_trace import RequestTraceRecorder
from mini_vllm.outputs import RequestOutput
from mini_vllm.request import Request
from mini_vllm.text.tokenizer import Tokenizer


class OutputProcessor:
    """All unfinished requests of one engine, as their callers see them. tokenizer: None gives ids only.

    tracer: is told of each request that ended.
    stream_interval: tokens between two outputs of a sequence; its first token and its end come at once.
    trace_recorder: is told of each request that came and ended.
    num_prompt_tokens, num_generation_tokens: since the start; a prompt counts when its first token comes out.
    """

    def __init__(
        self,
        tokenizer: Tokenizer | None,
        tracer: RequestTracer | None = None,
        stream_interval: int = 1,
        trace_recorder: RequestTraceRecorder | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.tracer = tracer
        self.stream_interval = stream_interval
        self.trace_recorder = trace_recorder
        self.num_prompt_tokens = 0
        self.num_generation_tokens = 0
        self._texts = TokenTexts(tokenizer)
        self._requests: dict[str, ParentRequest] = {}
        self._by_core_id: dict[str, ParentRequest] = {}
        self._stopped: list[str] = []

    def __contains__(self, request_id: object) -> bool:
        """Whether an unfinished request, or one of its sequences, has this id."""
        return request_id in self._requests or request_id in self._by_core_id

    @property
    def num_unfinished_requests(self) -> int:
        return len(self._requests)

    def has_unfinished_requests(self) -> bool:
        return bool(self._requests)

    def unfinished_request_ids(self) -> list[str]:
        """Ids in the order in which they were added."""
        return list(self._requests)

    def add_request(
        self, request: Request, prompt_text: str | None, trace_headers: Mapping[str, str] | None = None
    ) -> None:
        parent = ParentRequest(request, prompt_text, self.tokenizer, self._texts, trace_headers, self.stream_interval)
        self._requests[request.request_id] = parent
        for core_id in parent.sequences:
            self._by_core_id[core_id] = parent
        if self.trace_recorder is not None:
            self.trace_recorder.record_arrival(request)

    def forget(self, request_id: str) -> None:
        """The core refused the request, or it is done."""
        parent = self._requests.pop(request_id, None)
        if parent is None:
            return
        for core_id in parent.sequences:
            self._by_core_id.pop(core_id, None)
        if self.trace_recorder is not None:
            self.trace_recorder.record_finish(request_id, parent.num_output_tokens, parent.finish_reason)

    def core_ids(self, request_ids: Iterable[str]) -> list[str]:
        """The ids under which the core runs what is left of these requests. Unknown ones are ignored."""
        known = [self._requests[request_id] for request_id in request_ids if request_id in self._requests]
        return [core_id for parent in known for core_id in parent.unfinished_ids()]

    def requests_of(self, core_ids: Sequence[str]) -> list[str]:
        """The unfinished requests to which these ids of the core belong."""
        asked = set(core_ids)
        return [request_id for request_id, parent in self._requests.items() if not asked.isdisjoint(parent.sequences)]

    def process(
        self, news: Iterable[EngineCoreOutput], now: float, stats: IterationStats | None = None
    ) -> list[RequestOutput]:
        """Outputs for one step's news, one a request. News of sequences that are gone is dropped.

        now: when the step ended, on the core's clock. stats: is filled with what the news adds up to.
        """
        touched: dict[str, ParentRequest] = {}
        for item in news:
            core_id = item.request_id
            parent = self._by_core_id.get(core_id)
            if parent is None:
                continue
            if item.new_token_ids and parent.metrics.first_token_time is None:
                self.num_prompt_tokens += len(parent.prompt_token_ids)
            sequence = parent.take(item, now, stats)
            if item.new_token_ids:
                self.num_generation_tokens += sequence.num_new
            if sequence.finish_reason is not None:
                del self._by_core_id[core_id]
                if sequence.stopped_by_text:
                    self._stopped.append(core_id)
            touched[parent.request_id] = parent
        return self._outputs(touched.values())

    def _outputs(self, touched: Iterable[ParentRequest]) -> list[RequestOutput]:
        outputs = []
        for parent in touched:
            output = parent.output()
            if output is not None:
                outputs.append(output)
                if output.finished:
                    self.forget(parent.request_id)
                    if self.tracer is not None:
                        self.tracer.request_finished(parent)
        return outputs

    def take_stopped(self) -> list[str]:
        """Ids (the core's) of the sequences that a stop string has ended since this was last asked."""
        stopped, self._stopped = self._stopped, []
        return stopped

    def abort(
        self,
        request_ids: Iterable[str],
        now: float,
        stats: IterationStats | None = None,
        *,
        finish_reason: str = "abort",
        error: str | None = None,
    ) -> list[RequestOutput]:
        """Forget requests; their last outputs say `finish_reason` and hold what was generated. Unknown ids are ignored.

        finish_reason, error: 'error' and why, for requests that end because their engine died.
        """
        known = [self._requests[rid] for rid in dict.fromkeys(request_ids) if rid in self._requests]
        ends = [
            self._end_news(parent, core_id, finish_reason, error)
            for parent in known
            for core_id in parent.unfinished_ids()
        ]
        return self.process(ends, now, stats)

    @staticmethod
    def _end_news(parent: ParentRequest, core_id: str, finish_reason: str, error: str | None) -> EngineCoreOutput:
        return EngineCoreOutput(
            core_id,
            finish_reason=finish_reason,
            error=error,
            num_cached_tokens=parent.num_cached_tokens,
            num_preemptions=parent.sequences[core_id].num_preemptions,
        )
