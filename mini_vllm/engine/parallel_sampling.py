"""A request as its caller sees it: one prompt, `n` sequences, one response.

The core runs one request for the prompt, and lets `n - 1` children part from it when the first token is sampled; each
reports under an id of its own. `ParentRequest` is handed all their news and puts them together under the caller's
id: whatever the `output_kind`, an output is one `RequestOutput` with a `CompletionOutput` for each index.
"""

from collections.abc import Mapping, Sequence

from mini_vllm.core.scheduler_output import EngineCoreOutput
from mini_vllm.engine.logprobs import LogprobsShaper, PromptLogprobsCollector, TokenTexts
from mini_vllm.engine.metrics.stats import FinishedRequestStats, IterationStats, between
from mini_vllm.engine.sequence_output import SequenceOutput
from mini_vllm.outputs import RequestMetrics, RequestOutput
from mini_vllm.request import Request
from mini_vllm.sampling_params import RequestOutputKind
from mini_vllm.text.tokenizer import Tokenizer


def child_ids(request_id: str, n: int) -> list[str]:
    """Ids of the samples after the first, which has the request's own."""
    return [f"{index}_{request_id}" for index in range(1, n)]


class ParentRequest:
    """An unfinished request and its sequences, by the ids under which the core reports them.

    trace_headers: `traceparent` and the like, which came with it. stream_interval: see `OutputProcessor`.
    """

    def __init__(
        self,
        request: Request,
        prompt_text: str | None,
        tokenizer: Tokenizer | None,
        texts: TokenTexts,
        trace_headers: Mapping[str, str] | None = None,
        stream_interval: int = 1,
    ) -> None:
        params = request.sampling_params
        self.params = params
        self.trace_headers = trace_headers
        self.request_id = request.request_id
        self.prompt_text = prompt_text
        self.prompt_token_ids = list(request.prompt_token_ids)
        self.output_kind = params.output_kind
        self.metrics = RequestMetrics(arrival_time=request.arrival_time)
        self.num_cached_tokens = 0
        self.error: str | None = None
        shaper = LogprobsShaper(params, texts if params.detokenize else TokenTexts(None))
        self.sequences = {
            core_id: SequenceOutput(index, params, self.prompt_token_ids, tokenizer, shaper)
            for index, core_id in enumerate((self.request_id, *request.unborn_ids))
        }
        self._prompt_logprobs = PromptLogprobsCollector(shaper) if params.prompt_logprobs is not None else None
        self._num_unfinished = len(self.sequences)
        self._stream_interval = stream_interval
        self._with_news: dict[int, SequenceOutput] = {}

    @property
    def is_finished(self) -> bool:
        return self._num_unfinished == 0

    @property
    def num_output_tokens(self) -> int:
        """Of all samples."""
        return sum(len(sequence.token_ids) for sequence in self.sequences.values())

    @property
    def finish_reason(self) -> str | None:
        """That of the first sample which has one."""
        return next((each.finish_reason for each in self.sequences.values() if each.finish_reason), None)

    def unfinished_ids(self) -> list[str]:
        """Ids of the sequences that have not ended, as the core knows them."""
        return [core_id for core_id, sequence in self.sequences.items() if not sequence.is_finished]

    def take(self, news: EngineCoreOutput, now: float, stats: IterationStats | None = None) -> SequenceOutput:
        """The core's news of one sequence that has not ended; returns that sequence."""
        sequence = self.sequences[news.request_id]
        if self._prompt_logprobs is not None and news.prompt_logprobs is not None:
            self._prompt_logprobs.add(news.prompt_logprobs)
        if news.times is not None:
            self.metrics.queued_time, self.metrics.scheduled_time = news.times
        if not news.new_token_ids and news.finish_reason is None:
            return sequence
        sequence.take(news)
        if news.num_preemptions:
            self.metrics.num_preemptions = sum(each.num_preemptions for each in self.sequences.values())
        if news.new_token_ids:
            self._note_tokens(sequence, news, now, stats)
        if self.output_kind is not RequestOutputKind.FINAL_ONLY:
            self._with_news[sequence.index] = sequence
        if sequence.finish_reason is not None:
            self._note_end(sequence, news, now, stats)
        return sequence

    def _note_tokens(
        self, sequence: SequenceOutput, news: EngineCoreOutput, now: float, stats: IterationStats | None
    ) -> None:
        metrics = self.metrics
        metrics.last_token_time = now
        if metrics.first_token_time is None:
            metrics.first_token_time = now
            self.num_cached_tokens = news.num_cached_tokens
            if stats is not None:
                stats.num_prompt_tokens += len(self.prompt_token_ids)
                stats.num_cached_tokens += news.num_cached_tokens
        if stats is not None:
            stats.num_generation_tokens += sequence.num_new
            if sequence.last_token_time is None:
                stats.times_to_first_token.append(max(now - metrics.arrival_time, 0.0))
            else:
                stats.inter_token_latencies.append(now - sequence.last_token_time)
        if sequence.last_token_time is None:
            sequence.first_token_time = now
        sequence.last_token_time = now

    def _note_end(
        self, sequence: SequenceOutput, news: EngineCoreOutput, now: float, stats: IterationStats | None
    ) -> None:
        self._num_unfinished -= 1
        self.error = self.error or news.error
        if self._num_unfinished == 0:
            self.metrics.finished_time = now
        if stats is None:
            return
        stats.finished.append(self._finished_stats(sequence, now))
        if self._num_unfinished == 0:
            stats.num_samples.append(len(self.sequences))
            stats.max_generation_tokens.append(max(len(each.token_ids) for each in self.sequences.values()))

    def _finished_stats(self, sequence: SequenceOutput, now: float) -> FinishedRequestStats:
        assert sequence.finish_reason is not None
        scheduled = self.metrics.scheduled_time
        num_tokens = len(sequence.token_ids)
        num_prompt = len(self.prompt_token_ids)
        decode_time = between(sequence.first_token_time, sequence.last_token_time)
        computed = per_token = None
        if sequence.first_token_time is not None:
            computed = 0 if sequence.index else num_prompt - self.num_cached_tokens
        if decode_time is not None and num_tokens > 1:
            per_token = decode_time / (num_tokens - 1)
        return FinishedRequestStats(
            finish_reason=sequence.finish_reason,
            e2e_latency=max(now - self.metrics.arrival_time, 0.0),
            queue_time=between(self.metrics.queued_time, scheduled),
            prefill_time=between(scheduled, sequence.first_token_time),
            decode_time=decode_time,
            inference_time=between(scheduled, sequence.last_token_time),
            mean_time_per_output_token=per_token,
            num_prompt_tokens=num_prompt,
            num_cached_tokens=self.num_cached_tokens,
            num_computed_prefill_tokens=computed,
            num_generation_tokens=num_tokens,
            num_preemptions=sequence.num_preemptions,
            max_tokens_param=self.params.max_tokens,
        )

    def output(self) -> RequestOutput | None:
        """What the caller gets after a step; None when there is nothing (yet)."""
        reported = self._to_report()
        if not reported:
            return None
        delta = self.output_kind is RequestOutputKind.DELTA
        return RequestOutput(
            request_id=self.request_id,
            prompt=self.prompt_text,
            prompt_token_ids=self.prompt_token_ids,
            outputs=[sequence.report(delta) for sequence in reported],
            finished=self.is_finished,
            prompt_logprobs=None if self._prompt_logprobs is None else self._prompt_logprobs.report(once=delta),
            metrics=self.metrics,
            num_cached_tokens=self.num_cached_tokens,
            error=self.error,
        )

    def _to_report(self) -> Sequence[SequenceOutput]:
        if self.output_kind is RequestOutputKind.FINAL_ONLY:
            return list(self.sequences.values()) if self.is_finished else ()
        new = self._take_due()
        if new and self.output_kind is RequestOutputKind.CUMULATIVE:
            return list(self.sequences.values())
        return sorted(new, key=lambda sequence: sequence.index) if len(new) > 1 else new

    def _take_due(self) -> list[SequenceOutput]:
        """Those with news that their caller is to hear of now."""
        new = list(self._with_news.values())
        if self._stream_interval > 1:
            new = [sequence for sequence in new if sequence.is_due(self._stream_interval)]
        for sequence in new:
            del self._with_news[sequence.index]
        return new
