"""A request as its caller sees it: one prompt, `n` sequences, one response.

The core runs one request for the prompt, and lets `n - 1` children part from it when the first token is sampled; each
reports under an id of its own. `ParentRequest` is handed all their news and puts them together under the caller's
id: whatever the `output_kind`, an output is one `RequestOutput` with a `CompletionOutput` for each index.
"""

from collections.abc import Sequence

from mini_vllm.core.scheduler_output import EngineCoreOutput
from mini_vllm.engine.logprobs import LogprobsShaper, PromptLogprobsCollector, TokenTexts
from mini_vllm.engine.sequence_output import SequenceOutput
from mini_vllm.outputs import RequestMetrics, RequestOutput
from mini_vllm.request import Request
from mini_vllm.sampling_params import RequestOutputKind
from mini_vllm.text.tokenizer import Tokenizer


def child_ids(request_id: str, n: int) -> list[str]:
    """Ids of the samples after the first, which has the request's own."""
    return [f"{index}_{request_id}" for index in range(1, n)]


class ParentRequest:
    """An unfinished request and its sequences, by the ids under which the core reports them."""

    def __init__(
        self, request: Request, prompt_text: str | None, tokenizer: Tokenizer | None, texts: TokenTexts
    ) -> None:
        params = request.sampling_params
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
        self._with_news: list[SequenceOutput] = []

    @property
    def is_finished(self) -> bool:
        return self._num_unfinished == 0

    def unfinished_ids(self) -> list[str]:
        """Ids of the sequences that have not ended, as the core knows them."""
        return [core_id for core_id, sequence in self.sequences.items() if not sequence.is_finished]

    def take(self, news: EngineCoreOutput, now: float) -> SequenceOutput:
        """The core's news of one sequence that has not ended; returns that sequence."""
        sequence = self.sequences[news.request_id]
        if self._prompt_logprobs is not None and news.prompt_logprobs is not None:
            self._prompt_logprobs.add(news.prompt_logprobs)
        if news.new_token_ids:
            self._note_tokens(news, now)
        elif news.finish_reason is None:
            return sequence
        sequence.take(news)
        if self.output_kind is not RequestOutputKind.FINAL_ONLY:
            self._with_news.append(sequence)
        if sequence.finish_reason is not None:
            self._note_end(news, now)
        return sequence

    def _note_tokens(self, news: EngineCoreOutput, now: float) -> None:
        metrics = self.metrics
        metrics.last_token_time = now
        if metrics.first_token_time is None:
            metrics.first_token_time = now
            self.num_cached_tokens = news.num_cached_tokens

    def _note_end(self, news: EngineCoreOutput, now: float) -> None:
        self._num_unfinished -= 1
        self.error = self.error or news.error
        if self._num_unfinished == 0:
            self.metrics.finished_time = now

    def output(self) -> RequestOutput | None:
        """What the caller gets after a step; None when there is nothing (yet)."""
        reported = self._to_report()
        if not reported:
            return None
        delta = self.output_kind is RequestOutputKind.DELTA
        self.metrics.num_preemptions = sum([sequence.num_preemptions for sequence in self.sequences.values()])
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
        new, self._with_news = self._with_news, []
        if new and self.output_kind is RequestOutputKind.CUMULATIVE:
            return list(self.sequences.values())
        return sorted(new, key=lambda sequence: sequence.index) if len(new) > 1 else new
