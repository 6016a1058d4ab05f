"""What the core reports becomes what callers get: text, metrics, `RequestOutput`.

The processor is handed each request when it is queued and the core's news after every step. It promises that a
finished or aborted request leaves nothing behind, that deltas add up to the cumulative text, and that the text
of a request does not depend on who shares the batch or on how it is delivered.
"""

from collections.abc import Iterable

from mini_vllm.core.scheduler_output import EngineCoreOutput
from mini_vllm.outputs import CompletionOutput, RequestMetrics, RequestOutput
from mini_vllm.request import Request
from mini_vllm.sampling_params import RequestOutputKind
from mini_vllm.text.detokenizer import IncrementalDetokenizer
from mini_vllm.text.tokenizer import Tokenizer


class _RequestState:
    """One unfinished request on this side of the core."""

    def __init__(self, request: Request, prompt_text: str | None, tokenizer: Tokenizer | None) -> None:
        params = request.sampling_params
        self.request_id = request.request_id
        self.prompt_text = prompt_text
        self.prompt_token_ids = list(request.prompt_token_ids)
        self.output_kind = params.output_kind
        self.token_ids: list[int] = []
        self.metrics = RequestMetrics(arrival_time=request.arrival_time)
        self.num_cached_tokens = 0
        self.detokenizer = None
        if tokenizer is not None and params.detokenize:
            self.detokenizer = IncrementalDetokenizer(tokenizer, self.prompt_token_ids, params.skip_special_tokens)

    def update(self, news: EngineCoreOutput, now: float) -> RequestOutput | None:
        """Take the news; None when the caller wants only the end and this is not it."""
        self.token_ids += news.new_token_ids
        self.num_cached_tokens = news.num_cached_tokens
        self._note_times(news, now)
        new_text = ""
        if self.detokenizer is not None:
            new_text = self.detokenizer.update(news.new_token_ids)
            if news.finished:
                new_text += self.detokenizer.flush()
        if self.output_kind is RequestOutputKind.FINAL_ONLY and not news.finished:
            return None
        return self._output(news, new_text)

    def _note_times(self, news: EngineCoreOutput, now: float) -> None:
        metrics = self.metrics
        metrics.num_preemptions = news.num_preemptions
        if news.new_token_ids:
            metrics.last_token_time = now
            if metrics.first_token_time is None:
                metrics.first_token_time = now
        if news.finished:
            metrics.finished_time = now

    def _output(self, news: EngineCoreOutput, new_text: str) -> RequestOutput:
        delta = self.output_kind is RequestOutputKind.DELTA
        completion = CompletionOutput(
            index=0,
            text=new_text if delta else self.detokenizer.text if self.detokenizer is not None else "",
            token_ids=list(news.new_token_ids if delta else self.token_ids),
            finish_reason=news.finish_reason,
            stop_reason=news.stop_reason,
        )
        return RequestOutput(
            request_id=self.request_id,
            prompt=self.prompt_text,
            prompt_token_ids=self.prompt_token_ids,
            outputs=[completion],
            finished=news.finished,
            metrics=self.metrics,
            num_cached_tokens=self.num_cached_tokens,
            error=news.error,
        )


class OutputProcessor:
    """The states of all unfinished requests of one engine. tokenizer: None gives ids only.

    num_prompt_tokens, num_generation_tokens: since the start; a prompt counts when its first token comes out.
    """

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        self.tokenizer = tokenizer
        self.num_prompt_tokens = 0
        self.num_generation_tokens = 0
        self._states: dict[str, _RequestState] = {}

    def __contains__(self, request_id: object) -> bool:
        return request_id in self._states

    @property
    def num_unfinished_requests(self) -> int:
        return len(self._states)

    def has_unfinished_requests(self) -> bool:
        return bool(self._states)

    def unfinished_request_ids(self) -> list[str]:
        """Ids in the order in which they were added."""
        return list(self._states)

    def add_request(self, request: Request, prompt_text: str | None) -> None:
        self._states[request.request_id] = _RequestState(request, prompt_text, self.tokenizer)

    def forget(self, request_id: str) -> None:
        """The core refused the request."""
        self._states.pop(request_id, None)

    def process(self, news: Iterable[EngineCoreOutput], now: float) -> list[RequestOutput]:
        """Outputs for one step's news, in the same order. News of requests that are gone is dropped."""
        outputs = []
        for item in news:
            state = self._states.get(item.request_id)
            if state is None:
                continue
            self._count(state, item)
            output = state.update(item, now)
            if item.finished:
                del self._states[item.request_id]
            if output is not None:
                outputs.append(output)
        return outputs

    def _count(self, state: _RequestState, news: EngineCoreOutput) -> None:
        self.num_generation_tokens += len(news.new_token_ids)
        if news.new_token_ids and not state.token_ids:
            self.num_prompt_tokens += len(state.prompt_token_ids)

    def abort(self, request_ids: Iterable[str], now: float) -> list[RequestOutput]:
        """Forget requests; their last outputs say 'abort' and hold what was generated. Unknown ids are ignored."""
        known = [request_id for request_id in dict.fromkeys(request_ids) if request_id in self._states]
        ends = [self._abort_news(self._states[request_id]) for request_id in known]
        return self.process(ends, now)

    @staticmethod
    def _abort_news(state: _RequestState) -> EngineCoreOutput:
        return EngineCoreOutput(
            state.request_id,
            finish_reason="abort",
            num_cached_tokens=state.num_cached_tokens,
            num_preemptions=state.metrics.num_preemptions,
        )
