"""Log-probabilities in the shape callers get them: a dict for each position, from token id to `Logprob`.

The worker reports plain numbers (`TokenLogprobs`): the position's own token first, then the likeliest ones in order,
then those asked for by id. Here they get ranks and text, and prompt positions, which come chunk by chunk and
again after a preemption, are put together once.
"""

from collections.abc import Iterable, Sequence

from mini_vllm.core.scheduler_output import PromptLogprobs, TokenLogprobs
from mini_vllm.outputs import Logprob, LogprobsAtPosition
from mini_vllm.sampling_params import SamplingParams
from mini_vllm.text.tokenizer import Tokenizer


class TokenTexts:
    """The text of single tokens, each decoded once. tokenizer: None gives None for all."""

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        self._tokenizer = tokenizer
        self._texts: dict[int, str] = {}

    def __getitem__(self, token_id: int) -> str | None:
        if self._tokenizer is None:
            return None
        text = self._texts.get(token_id)
        if text is None:
            text = self._texts[token_id] = self._tokenizer.decode([token_id], skip_special_tokens=False)
        return text


class LogprobsShaper:
    """Shapes the positions of one request. params: what was asked for."""

    def __init__(self, params: SamplingParams, texts: TokenTexts) -> None:
        self._texts = texts
        self._num_by_id = len(params.logprob_token_ids or ())

    def sampled(self, item: TokenLogprobs) -> LogprobsAtPosition:
        """The sampled token, the likeliest ones, and those that were asked for by id."""
        return self._shape(item, len(item.token_ids) - self._num_by_id)

    def prompt(self, item: TokenLogprobs) -> LogprobsAtPosition:
        """The prompt's own token and the likeliest ones."""
        return self._shape(item, len(item.token_ids))

    def _shape(self, item: TokenLogprobs, num_ranked: int) -> LogprobsAtPosition:
        """Of the entries the first has the rank that is given, those up to `num_ranked` are 1st, 2nd and so on, the
        others have none."""
        shaped: LogprobsAtPosition = {}
        for position, (token_id, logprob) in enumerate(zip(item.token_ids, item.logprobs, strict=True)):
            if token_id not in shaped:
                rank = item.rank if position == 0 else position if position < num_ranked else None
                shaped[token_id] = Logprob(logprob, rank, self._texts[token_id])
        return shaped


class OutputLogprobs:
    """Those of the sampled tokens of one sequence. cumulative: the sum over the sampled tokens themselves."""

    def __init__(self, shaper: LogprobsShaper) -> None:
        self._shaper = shaper
        self.positions: list[LogprobsAtPosition] = []
        self.cumulative = 0.0

    def add(self, items: Iterable[TokenLogprobs]) -> None:
        for item in items:
            self.positions.append(self._shaper.sampled(item))
            self.cumulative += item.logprobs[0]


class PromptLogprobsCollector:
    """Those of the prompt's tokens: None for the first, which nothing predicts, then a dict for each."""

    def __init__(self, shaper: LogprobsShaper) -> None:
        self._shaper = shaper
        self.positions: list[LogprobsAtPosition | None] = [None]
        self._is_new = True

    def add(self, chunk: PromptLogprobs) -> None:
        """Take the positions from `chunk.start` on; those that are here already are computed again after a
        preemption and are left as they were."""
        self._take(chunk.positions[max(len(self.positions) - chunk.start, 0) :])

    def _take(self, items: Sequence[TokenLogprobs]) -> None:
        self.positions += map(self._shaper.prompt, items)

    def report(self, once: bool) -> list[LogprobsAtPosition | None] | None:
        """All positions; with `once`, only to the first who asks."""
        if once and not self._is_new:
            return None
        self._is_new = False
        return self.positions
