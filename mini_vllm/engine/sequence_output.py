"""One sequence on the caller's side of the core: its ids, its text, its logprobs, and how it ends.

`SequenceOutput.take` is handed the core's news. It promises that text grows and never changes, that deltas add
up to the whole, and that nothing after a stop string is reported. Whoever owns it tells
the core of `stopped_by_text`.
"""

from mini_vllm.core.scheduler_output import EngineCoreOutput
from mini_vllm.engine.logprobs import LogprobsShaper, OutputLogprobs
from mini_vllm.outputs import CompletionOutput
from mini_vllm.sampling_params import SamplingParams
from mini_vllm.text.detokenizer import IncrementalDetokenizer
from mini_vllm.text.stop_strings import StopStringMatcher
from mini_vllm.text.tokenizer import Tokenizer


class SequenceOutput:
    """What one sequence generated so far.

    index: which of the samples of its prompt. stopped_by_text: a stop string was found, which the core cannot know.
    num_new: ids of the last news that are the sequence's, which are all unless a stop string came before the last.
    first_token_time, last_token_time: seconds on the core's clock, set by whoever owns it.
    """

    def __init__(
        self,
        index: int,
        params: SamplingParams,
        prompt_token_ids: list[int],
        tokenizer: Tokenizer | None,
        shaper: LogprobsShaper,
    ) -> None:
        self.index = index
        self.token_ids: list[int] = []
        self.finish_reason: str | None = None
        self.stop_reason: int | str | None = None
        self.stopped_by_text = False
        self.num_preemptions = 0
        self.num_new = 0
        self.first_token_time: float | None = None
        self.last_token_time: float | None = None
        self._min_tokens = params.min_tokens
        self._shows_stop = params.include_stop_str_in_output
        self._pieces: list[str] = []
        self._num_reported = 0
        self._logprobs = OutputLogprobs(shaper) if params.wants_logprobs else None
        self._detokenizer: IncrementalDetokenizer | None = None
        self._matcher: StopStringMatcher | None = None
        if tokenizer is not None and params.detokenize:
            self._detokenizer = IncrementalDetokenizer(
                tokenizer, prompt_token_ids, params.skip_special_tokens, params.spaces_between_special_tokens
            )
            if params.stop:
                self._matcher = StopStringMatcher(params.stop, params.include_stop_str_in_output)

    @property
    def is_finished(self) -> bool:
        return self.finish_reason is not None

    def take(self, news: EngineCoreOutput) -> None:
        """The core's news of this sequence. None may follow once it is finished."""
        self.finish_reason, self.stop_reason = news.finish_reason, news.stop_reason
        self.num_preemptions = news.num_preemptions
        new_ids = news.new_token_ids
        if self._matcher is not None:
            new_ids = new_ids[: self._read_watching(self._matcher, news)]
        elif self._detokenizer is not None:
            self._read(self._detokenizer, news)
        self.token_ids += new_ids
        self.num_new = len(new_ids)
        if self._logprobs is not None and news.logprobs:
            self._logprobs.add(news.logprobs[: len(new_ids)])

    # -- text -------------------------------------------------------------------------------------------------

    def _readable(self, news: EngineCoreOutput) -> list[int]:
        """The ids that have text: a token that ended the sequence by itself shows only when stops are shown."""
        if news.finish_reason == "stop" and not self._shows_stop:
            return news.new_token_ids[:-1]
        return news.new_token_ids

    def _read(self, detokenizer: IncrementalDetokenizer, news: EngineCoreOutput) -> None:
        if news.finish_reason is None:
            self._release(detokenizer.update(news.new_token_ids))
        else:
            self._release(detokenizer.update(self._readable(news)))
            self._release(detokenizer.flush())

    def _read_watching(self, matcher: StopStringMatcher, news: EngineCoreOutput) -> int:
        """Token by token, so that it is known which one completed a stop string. How many ids are the sequence's."""
        detokenizer = self._detokenizer
        assert detokenizer is not None
        num_free = self._min_tokens - len(self.token_ids)  # so many ids are not looked at
        for count, token_id in enumerate(self._readable(news), start=1):
            piece = detokenizer.update([token_id])
            if self._meets_stop(matcher, piece, armed=count > num_free):
                self.stopped_by_text = not news.finished
                return count
        num_new = len(news.new_token_ids)
        if news.finished and not self._meets_stop(matcher, detokenizer.flush(), armed=num_new > num_free):
            self._release(matcher.flush())
        return num_new

    def _meets_stop(self, matcher: StopStringMatcher, piece: str, armed: bool) -> bool:
        if not piece:
            return False
        shown, found = matcher.feed(piece, armed)
        self._release(shown)
        if found is None:
            return False
        self.finish_reason, self.stop_reason = "stop", found
        return True

    def _release(self, text: str) -> None:
        if text:
            self._pieces.append(text)

    # -- what callers get -------------------------------------------------------------------------------------

    def is_due(self, interval: int) -> bool:
        """Whether a caller who wants to hear every `interval` tokens is to hear of it now."""
        num_unreported = len(self.token_ids) - self._num_reported
        return num_unreported >= interval or self._num_reported == 0 or self.finish_reason is not None

    def report(self, delta: bool) -> CompletionOutput:
        """As of now, or (`delta`) what is new since the last report."""
        since = self._num_reported if delta else 0
        self._num_reported = len(self.token_ids)
        logprobs = self._logprobs
        return CompletionOutput(
            index=self.index,
            text=self._new_text() if delta else self._whole_text(),
            token_ids=self.token_ids[since:],
            cumulative_logprob=None if logprobs is None else logprobs.cumulative,
            logprobs=None if logprobs is None else logprobs.positions[since:],
            finish_reason=self.finish_reason,
            stop_reason=self.stop_reason,
        )

    def _whole_text(self) -> str:
        if len(self._pieces) > 1:
            self._pieces = ["".join(self._pieces)]
        return self._pieces[0] if self._pieces else ""

    def _new_text(self) -> str:
        new = "".join(self._pieces)
        self._pieces = []  # nobody asks for the whole of a stream
        return new
