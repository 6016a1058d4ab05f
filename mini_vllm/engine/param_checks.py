"""What is wrong with sampling parameters can partly be told only by someone who knows the model.

`SamplingParams` has checked ranges and types. Here ids meet the vocabulary, counts of logprobs the engine's limit,
and bad words become the sequences of ids that must not be completed.
"""

from collections.abc import Iterable

from mini_vllm.exceptions import InvalidParameterError
from mini_vllm.sampling_params import SamplingParams
from mini_vllm.text.tokenizer import Tokenizer

DEFAULT_MAX_LOGPROBS = 20
MAX_N = 16384
"""Samples of one prompt; vLLM's limit. Each is a request to the core."""


class ParamChecker:
    """Checks parameters against one model. Raises `InvalidParameterError` naming field and limit.

    vocab_size: ids are 0 to one less. max_logprobs: the most a request may ask for a position; -1 is the vocabulary.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, max_logprobs: int) -> None:
        self.tokenizer = tokenizer
        self.vocab_size = vocab_size
        self.max_logprobs = vocab_size if max_logprobs == -1 else max_logprobs

    def check(self, params: SamplingParams) -> None:
        """Raise unless the model can do what is asked."""
        if params.n > MAX_N:
            raise InvalidParameterError("n", f"must be at most {MAX_N}, got {params.n}")
        self._check_count("logprobs", params.logprobs)
        self._check_count("prompt_logprobs", params.prompt_logprobs)
        self._check_ids("logprob_token_ids", params.logprob_token_ids or ())
        self._check_count("logprob_token_ids", len(params.logprob_token_ids or ()))
        self._check_ids("stop_token_ids", params.stop_token_ids)
        self._check_ids("allowed_token_ids", params.allowed_token_ids or ())
        self._check_ids("logit_bias", params.logit_bias or ())

    def _check_count(self, field: str, count: int | None) -> None:
        if count is None:
            return
        asked = self.vocab_size if count == -1 else count
        if asked > self.max_logprobs:
            whole = " (the whole vocabulary)" if count == -1 else ""
            raise InvalidParameterError(
                field,
                f"asks for {asked} logprobs{whole} at each position, the engine allows at most {self.max_logprobs} "
                "(max_logprobs; -1 allows all)",
            )

    def _check_ids(self, field: str, ids: Iterable[int]) -> None:
        for token_id in ids:
            if not 0 <= token_id < self.vocab_size:
                raise InvalidParameterError(
                    field,
                    f"token id {token_id} is out of range: the model's vocabulary has ids 0 to {self.vocab_size - 1}",
                )

    def bad_words_token_ids(self, params: SamplingParams) -> list[list[int]]:
        """Every way in which a bad word may be spelt: at the beginning of a text, and after a space.

        A spelling that ends with another is left out: it cannot be completed without completing that one.
        """
        sequences: list[list[int]] = []
        for word in params.bad_words or ():
            for text in (word.lstrip(), " " + word.lstrip()):
                ids = self.tokenizer.encode(text, add_special_tokens=False)
                if not any(ids[-len(known) :] == known for known in sequences):
                    sequences.append(ids)
        if any(not ids for ids in sequences):
            raise InvalidParameterError("bad_words", "has a word that the tokenizer gives no token for")
        # What the model has no row for, it cannot generate.
        return [ids for ids in sequences if max(ids) < self.vocab_size]
